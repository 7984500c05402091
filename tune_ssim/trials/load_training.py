"""Loads the training that a study names as its task."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.extras import install_hint
from tune_ssim.study.command_spec import CommandSpec
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.training import Training, missing_methods, training_class


def load_task(task: str | type | Mapping[str, Any], import_path: str | None = None) -> Callable[[], Training]:
    """A factory for the training given as a class, "module:Class", "module:function" or a command. Raises UserError naming what
    is missing."""
    if isinstance(task, type):
        return training_class(task)
    if isinstance(task, Mapping):
        return _command(task, import_path)
    module_name, _, class_name = task.partition(":")
    if import_path and import_path not in sys.path:
        sys.path.insert(0, import_path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if module_name.startswith("tune_ssim.") and install_hint(error.name):
            raise  # the CLI reports what to install
        raise UserError(f"task {task!r}: no module {error.name!r} (looked in the study's folder and the environment)") from None
    found = getattr(module, class_name, None)
    if isinstance(found, FunctionType):  # a loop that reports through `trial_context` runs in a separate process
        paths = os.pathsep.join(filter(None, (import_path, os.environ.get("PYTHONPATH"))))
        place = {"PYTHONPATH": paths.replace("{", "{{").replace("}", "}}")}
        return _command(
            {"command": ["{python}", "-m", "tune_ssim.trials.command.call_function", task], "environment": place}, import_path
        )
    if not isinstance(found, type):
        raise UserError(f"task {task!r}: module {module_name!r} has no class or function {class_name!r}")
    if missing := missing_methods(found):
        raise UserError(f"task {task!r}: {class_name} has no {', '.join(missing)}; see tune_ssim.Training for the contract")
    return training_class(found)


def _command(spec: Mapping[str, Any], cwd: str | None) -> Callable[[], Training]:
    return partial(CommandTask, CommandSpec.model_validate(dict(spec)), cwd)
