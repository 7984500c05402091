"""Checks that the seven methods exist and can be called as a trial calls them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from tune_ssim.before_launch.preflight.report import Check, broken, ok
from tune_ssim.before_launch.preflight.subject import describe_error
from tune_ssim.trials.training import CONTRACT, missing_methods

# For each method the arguments of a trial's calls, its expected signature, and the names that other trainers give it.
METHODS: dict[str, tuple[tuple[tuple[Any, ...], ...], str, tuple[str, ...]]] = {
    "setup": ((({}, 0), ({}, 0, None)), "setup(self, config, seed, device=None)", ("set_up", "build", "init", "configure")),
    "step": (((),), "step(self)", ("train_step", "training_step", "train", "update")),
    "sample": (((), (0,)), "sample(self, noise=0)", ("generate", "samples", "infer", "inference")),
    "evaluate": (((),), "evaluate(self)", ("eval", "validate", "validation", "test")),
    "state_dict": (((),), "state_dict(self)", ("get_state", "save", "save_checkpoint", "state")),
    "load_state_dict": ((({},),), "load_state_dict(self, state)", ("set_state", "load", "load_checkpoint", "load_state")),
    "effective": (((),), "effective(self)", ("effective_config", "get_config", "config", "params")),
}


def check_class(task_class: Any) -> Iterator[Check]:
    if not isinstance(task_class, type):
        kind = type(task_class).__name__
        got = f"an object of {kind}" if not callable(task_class) or hasattr(task_class, "step") else f"a {kind}"
        yield broken("class", f"a task is a class, got {got}", f"pass the class: check_task({kind})")
        return
    try:
        bare(task_class)
    except (Exception, SystemExit) as error:
        yield broken(
            "class",
            f"{task_class.__name__}() failed: {describe_error(error)}",
            "a trial makes the task without arguments and calls setup(config, seed, device): build everything there",
        )
        return
    yield ok("class", f"{task_class.__name__}() can be made without arguments")


def bare(task_class: type) -> Any:
    """An instance, even if required methods are missing; `check_methods` lists them."""
    found = type(task_class.__name__, (task_class,), {}) if inspect.isabstract(task_class) else task_class
    if inspect.isabstract(found):
        found.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    return found()


def check_methods(task_class: type) -> Iterator[Check]:
    """A finding for each of the seven; its name is `method/NAME`."""
    task, missing = bare(task_class), missing_methods(task_class)
    for method in CONTRACT:
        calls, expected, aliases = METHODS[method]
        name, reads = f"method/{method}", f"def {expected}"
        written = inspect.getattr_static(task_class, method, None)
        found = getattr(task, method, None) if not isinstance(written, property) else written
        if found is None or (method in missing and callable(written)):
            near = next((alias for alias in aliases if callable(getattr(task, alias, None))), None)
            hint = f"rename {near}()" if near else "add it"
            yield broken(name, f"there is no {method}()", f"{hint}: {reads}; see tune_ssim.Training")
        elif not callable(found):
            yield broken(name, f"{method} is a {type(found).__name__}, not a method", f"make it {reads}")
        elif inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found) or inspect.isasyncgenfunction(found):
            remedy = f"make it an ordinary method that returns its result: {reads}"
            yield broken(name, f"{method}() is a generator or a coroutine: calling it does nothing", remedy)
        elif refusal := _refusal(found, calls):
            yield broken(name, f"{method}{_signature(found)}: {refusal}", f"make it {reads}")
        else:
            yield ok(name, f"{method}{_signature(found)}")


def _refusal(method: Any, calls: tuple[tuple[Any, ...], ...]) -> str:
    """Why a call does not fit the signature; empty if all do, or if the signature is unknown."""
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return ""
    for arguments in calls:
        try:
            signature.bind(*arguments)
        except TypeError as error:
            return f"{error} when called with {len(arguments)} argument{'' if len(arguments) == 1 else 's'}"
    return ""


def _signature(method: Any) -> str:
    try:
        return str(inspect.signature(method))
    except Exception:  # the repr() of a default is user code
        return "(…)"
