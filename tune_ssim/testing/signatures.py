"""Checks that the seven methods exist and can be called as a trial calls them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.before_launch.preflight.subject import describe_error
from tune_ssim.testing.findings import broken, ok
from tune_ssim.trials.training import CONTRACT, missing_methods

# How a trial calls each method, and its expected signature.
CALLS: dict[str, tuple[tuple[tuple[Any, ...], ...], str]] = {
    "setup": ((({}, 0), ({}, 0, None)), "def setup(self, config, seed, device=None)"),
    "step": (((),), "def step(self)"),
    "sample": (((), (0,)), "def sample(self, noise=0)"),
    "evaluate": (((),), "def evaluate(self)"),
    "state_dict": (((),), "def state_dict(self)"),
    "load_state_dict": ((({},),), "def load_state_dict(self, state)"),
    "effective": (((),), "def effective(self)"),
}
ALIASES = {
    "setup": ("set_up", "build", "init", "configure"),
    "step": ("train_step", "training_step", "train", "update"),
    "sample": ("generate", "samples", "infer", "inference"),
    "evaluate": ("eval", "validate", "validation", "test"),
    "state_dict": ("get_state", "save", "save_checkpoint", "state"),
    "load_state_dict": ("set_state", "load", "load_checkpoint", "load_state"),
    "effective": ("effective_config", "get_config", "config", "params"),
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
            "a trial makes the task without arguments and calls setup(config, seed, device): move the building there",
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
    for name in CONTRACT:
        calls, reads = CALLS[name]
        written = inspect.getattr_static(task_class, name, None)
        method = getattr(task, name, None) if not isinstance(written, property) else written
        if method is None or (name in missing and callable(written)):
            near = next((alias for alias in ALIASES[name] if callable(getattr(task, alias, None))), None)
            hint = f"rename {near}()" if near else "add it"
            yield broken(f"method/{name}", f"there is no {name}()", f"{hint}: {reads}; see tune_ssim.Task")
        elif not callable(method):
            yield broken(f"method/{name}", f"{name} is a {type(method).__name__}, not a method", f"make it {reads}")
        elif inspect.iscoroutinefunction(method) or inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
            yield broken(
                f"method/{name}",
                f"{name}() is a generator or a coroutine: calling it does nothing",
                f"make it an ordinary method that returns its result: {reads}",
            )
        elif refusal := _refusal(method, calls):
            yield broken(f"method/{name}", f"{name}{_signature(method)}: {refusal}", f"make it {reads}")
        else:
            yield ok(f"method/{name}", f"{name}{_signature(method)}")


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
