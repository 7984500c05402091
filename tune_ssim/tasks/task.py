"""The contract of a task: what is trained. A task is a flat, readable loop; no base class is needed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from tune_ssim.errors import UserError

Number = float | torch.Tensor  # 0-d tensors may stay on the device: the trial resolves them every `report_every` steps


@dataclass
class Sample:
    """What inference makes of fixed inputs and fixed noise.

    images: `[n, 3, H, W]` in [0, 1] as generated; may contain non-finite pixels.
    references: `[n, 3, H, W]`, what they should look like (ground truth), or None.
    inputs: `[n, 3, h, w]`, a low-resolution input that the sample should agree with after down-sampling, or None.
    reconstructions: `[n, 3, H, W]`, the references through the frozen autoencoder: the best a sample can be, or None.
    statistics: further numbers to be judged, e.g. `flow_loss_top_bin`, `undecodable_fraction`.
    """

    images: torch.Tensor
    references: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    reconstructions: torch.Tensor | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """The random numbers of step n come from (seed, n, rank), never from the configuration: trials and baseline see
    identical batches and noise, and resuming needs no generator state."""

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        """Builds model, data and optimiser afresh; `device` None means cuda if there, else cpu. `config` always has `steps`,
        the length of the trial, for schedules of the learning rate.

        Raises ValueError for a configuration it does not understand: unknown keys included."""
        ...

    def step(self) -> Mapping[str, Number]:
        """One optimiser step; its metrics under the standard names of `records`."""
        ...

    def sample(self, noise: int = 0) -> Sample:
        """Inference on fixed inputs. `noise` 0 and 1 are two fixed draws. Leaves the training untouched."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Held-out metrics with fixed noise: `ssim`, `psnr` (dB), …"""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors (possibly nested in dicts) and JSON values: everything that the next step depends on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def effective(self) -> Mapping[str, Any]:
        """The parameters really in force, read where they are used: JSON values. `max_grad_norm` None = no clipping."""
        ...


CONTRACT = ("setup", "step", "sample", "evaluate", "state_dict", "load_state_dict", "effective")


def load_task(task: str | type, import_path: str | None = None) -> type:
    """The class behind "module:Class". Raises UserError naming what is missing."""
    if isinstance(task, type):
        return task
    module_name, _, class_name = task.partition(":")
    if import_path and import_path not in sys.path:
        sys.path.insert(0, import_path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"task {task!r}: no module {error.name!r} (looked in the study's folder and the environment)") from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise UserError(f"task {task!r}: module {module_name!r} has no class {class_name!r}")
    missing = [name for name in CONTRACT if not callable(getattr(found, name, None))]
    if missing:
        raise UserError(f"task {task!r}: {class_name} has no {', '.join(missing)}; see tune_ssim.Task for the contract")
    return found
