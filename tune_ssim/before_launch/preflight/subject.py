"""The training under test. Failures inside it become checks; what it does not show is unknown."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.before_launch.preflight.report import Check, Status
from tune_ssim.losses import TimeLaw
from tune_ssim.trials.training import OPTIONAL, Forward, Training, as_training

T = TypeVar("T")


class Failure(Exception):
    """A method of the training failed, so the set-up is not sound. remedy: what to do about it."""

    def __init__(self, sentence: str, remedy: str = "") -> None:
        super().__init__(sentence)
        self.remedy = remedy


class Unavailable(Exception):
    """The training lacks what a check needs, so the check is `unknown`."""


@dataclass(frozen=True)
class Subject:
    """A training's class and its configuration. One instance at a time, since two copies of a model may not fit into memory.

    setup_s: the seconds of each set-up so far."""

    task_class: Callable[[], Any]
    config: Mapping[str, Any]
    seed: int
    device: str | None
    disable_update: Mapping[str, Any]  # settings that switch the update off
    setup_s: list[float] = field(default_factory=list, compare=False)

    def make(self, settings: Mapping[str, Any] | None = None, seed: int | None = None) -> Training:
        """A new instance. Raises UserError for settings that the training refuses, Failure for anything else."""
        started = time.perf_counter()
        task = as_training(self.task_class())
        self.set_up(task, settings, seed)
        self.setup_s.append(time.perf_counter() - started)
        return task

    def set_up(self, task: Training, settings: Mapping[str, Any] | None = None, seed: int | None = None) -> None:
        try:
            task.setup({**self.config, **(settings or {})}, self.seed if seed is None else seed, self.device)
        except BadSetup as error:
            raise Failure(str(error)) from None
        except UserError:
            raise
        except ValueError as error:  # raised by Training.setup for an invalid configuration
            raise UserError(f"{type(task).__name__}: {error}") from None
        except (Exception, SystemExit) as error:
            raise failure_of(task, "setup", error) from error

    def unmoved(self, settings: Mapping[str, Any]) -> Training:
        """An instance whose steps do not change the weights."""
        try:
            return self.make({**settings, **self.disable_update})
        except UserError as error:
            raise Unavailable(f"the update cannot be switched off: {error}") from None


def call(task: Training, method: str, *arguments: Any) -> Any:
    """Raises Unavailable if the training lacks the method, Failure if the method fails."""
    if method in OPTIONAL and not task.abilities().has(method):
        raise Unavailable(f"the task has no {method}()")
    try:
        return getattr(task, method)(*arguments)
    except (Exception, SystemExit) as error:
        raise failure_of(task, method, error) from error


def decoder_of(task: Training, forward: Forward) -> Callable[[torch.Tensor], torch.Tensor]:
    """The decoder of a forward pass, which raises Failure if it fails."""

    def decode(latents: torch.Tensor) -> torch.Tensor:
        try:
            return forward.decode(latents)
        except (Exception, SystemExit) as error:
            raise failure_of(task, "decode", error) from error

    return decode


def looked_at(task: Training, look: Callable[[Training], T]) -> T:
    """`look(task)`. A forward pass with unexpected shapes or types raises Failure, too."""
    try:
        return look(task)
    except Failure:
        raise
    except Exception as error:
        raise failure_of(task, "forward", error) from error


def failure_of(task: Any, method: str, error: BaseException) -> Failure:
    """A failure of a method, with the line in the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = Path(str(getattr(sys.modules.get(type(task).__module__), "__file__", "")))
    place = next((frame for frame in reversed(frames) if own.name and Path(frame.filename) == own), frames[-1])
    where = f"{Path(place.filename).name}:{place.lineno}"
    return Failure(f"{method}() failed: {describe_error(error)} ({where})", f"mend {where}, in {place.name}()")


def guarded(name: str, checks: Callable[[], Iterator[Check]], failed: Status = "bad_setup") -> Iterator[Check]:
    """The checks. Those that need a missing method are `unknown`; those that fail inside the training get the status `failed`."""
    try:
        yield from checks()
    except Unavailable as reason:
        yield Check(name, "unknown", str(reason))
    except Failure as failure:
        yield Check(name, failed, str(failure), remedy=failure.remedy)
    except UserError as error:
        remedy = "accept them, if a study may set them"
        yield Check(name, "unknown", f"the task refuses the settings of this check: {error}", remedy=remedy)
    except Exception as error:  # unexpected shapes and types; errors inside the training arrive as Failure
        remedy = "see tune_ssim.Training for what is expected"
        yield Check(name, "unknown", f"could not be measured: {describe_error(error)}", remedy=remedy)


def time_law(task: Training) -> TimeLaw:
    if task.time_law is None:
        raise Unavailable("the task has no time_law")
    return task.time_law


def numbers(metrics: Any) -> dict[str, float]:
    """A step's numeric metrics on the host."""
    found: dict[str, float] = {}
    for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            found[str(name)] = float(value.detach() if isinstance(value, torch.Tensor) else value)
    return found


def describe_error(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, UserError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
