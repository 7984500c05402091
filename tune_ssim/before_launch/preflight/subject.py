"""The task under test: what goes wrong inside it is a finding, what it does not show is unknown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.losses import TimeLaw
from tune_ssim.trials.training import OPTIONAL, Training, as_training


class Failure(Exception):
    """A method of the task failed: the set-up is not sound, whatever the reason."""


class Unavailable(Exception):
    """The task does not show what is needed here: the check is `unknown`."""


@dataclass(frozen=True)
class Subject:
    """A task's class and what it is set up with. One instance at a time: two copies of a model may not fit into memory."""

    task_class: Callable[[], Any]
    config: Mapping[str, Any]
    seed: int
    device: str | None
    disable_update: Mapping[str, Any]  # settings that switch the update off

    def make(self, settings: Mapping[str, Any], seed: int | None = None) -> Training:
        """A new instance. Raises UserError for settings that the task refuses, Failure for anything else."""
        task = as_training(self.task_class())
        try:
            task.setup({**self.config, **settings}, self.seed if seed is None else seed, self.device)
        except BadSetup as error:
            raise Failure(str(error)) from None
        except UserError:
            raise
        except ValueError as error:  # how a task refuses a configuration (trials.training.Training.setup)
            raise UserError(f"{self.task_class.__name__}: {error}") from None
        except Exception as error:
            raise Failure(f"setup() failed: {words(error)}") from error
        return task

    def unmoved(self, settings: Mapping[str, Any]) -> Training:
        """One whose steps change nothing."""
        try:
            return self.make({**settings, **self.disable_update})
        except UserError as error:
            raise Unavailable(f"the update cannot be switched off: {error}") from None


def call(task: Training, method: str, *arguments: Any) -> Any:
    """Raises Unavailable where the task has no such method, Failure where the method fails."""
    if method in OPTIONAL and not task.abilities().has(method):
        raise Unavailable(f"the task has no {method}()")
    try:
        return getattr(task, method)(*arguments)
    except Exception as error:
        raise Failure(f"{method}() failed: {words(error)}") from error


def time_law(task: Training) -> TimeLaw:
    if task.time_law is None:
        raise Unavailable("the task has no time_law")
    return task.time_law


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A step's metrics on the host."""
    return {name: float(value) for name, value in metrics.items()}


def words(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
