"""The contract of a task: what is trained. A task is a flat, readable loop; no base class is needed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol, runtime_checkable

import torch

from tune_ssim.base.errors import UserError
from tune_ssim.losses import DecodedLoss, DecodedLossResult

Number = float | torch.Tensor  # 0-d tensors may stay on the device: the trial resolves them every `report_every` steps


@dataclass
class Sample:
    """What inference makes of fixed inputs and fixed noise.

    images: `[n, 3, H, W]` in [0, 1] as generated; may contain non-finite pixels.
    references: `[n, 3, H, W]`, what they should look like (ground truth), or None.
    inputs: `[n, 3, h, w]`, a low-resolution input that the sample should agree with after down-sampling, or None.
    reconstructions: `[n, 3, H, W]`, the references through the frozen autoencoder: the best a sample can be, or None.
    examples: `[m, 3, h, w]`, other real images of the kind, where there is no truth: what energy and contrast compare with.
    statistics: further numbers to be judged, e.g. `flow_loss_top_bin`.
    token_ids: integers of any shape, as generated where the task makes text; vocabulary_size: ids must lie in [0, this).
    """

    images: torch.Tensor
    references: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    reconstructions: torch.Tensor | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)
    token_ids: torch.Tensor | None = None
    vocabulary_size: int | None = None
    examples: torch.Tensor | None = None


@dataclass
class Part:
    """A network of the task, as it is in memory.

    trains: False for a frozen one. weights: the safetensors file that it must have been loaded from; None: it starts fresh
    on purpose. kind: `raw` or `ema`.
    """

    module: torch.nn.Module
    trains: bool
    weights: Path | None = None
    kind: str = "raw"


@dataclass
class Forward:
    """The forward pass of one training step, on the autograd graph: everything up to the losses, nothing updated.

    main: 0-d, the main loss. z0: `[batch, ...]`, the prediction of the clean latent. t: `[batch]`, on the host.
    targets: `[batch, 3, H, W]` in [0, 1]. loss, decode: the very objects that the training step uses.
    velocity_target: what the network should have predicted, for comparison with a predictor that knows nothing.
    is_target, sizes: see `DecodedLoss`.
    """

    main: torch.Tensor
    z0: torch.Tensor
    t: torch.Tensor
    targets: torch.Tensor
    loss: DecodedLoss
    decode: Callable[[torch.Tensor], torch.Tensor]
    velocity_target: torch.Tensor | None = None
    is_target: torch.Tensor | None = None
    sizes: Sequence[tuple[int, int]] | None = None

    def auxiliary(self, loss: DecodedLoss | None = None, is_target: torch.Tensor | None = None) -> DecodedLossResult:
        """The auxiliary losses with the parameters in force, or of another `loss` or part of the batch."""
        chosen = self.is_target if is_target is None else is_target
        return (loss or self.loss)(self.z0, self.t, self.targets, self.decode, is_target=chosen, sizes=self.sizes)


@runtime_checkable
class Task(Protocol):
    """The random numbers of step n come from (seed, n, rank), never from the configuration: trials and baseline see
    identical batches and noise, and resuming needs no generator state.

    These seven are the contract. A task that has more of the following is seen deeper by preflight and calibration, and what
    a task lacks they call `unknown`:

    - `forward(n) -> Forward` of training step n with the weights as they are; `trainable_parameters()`; `time_law: TimeLaw`
    - `parts() -> Mapping[str, Part]`: its networks, by name
    - `training_images(n) -> [batch, 3, H, W]`: the images of step n, in [0, 1]
    - `sample_ema(noise) -> Sample | None`: the same inference with averaged weights, where there are any
    - `fingerprints() -> Mapping[str, str]`: a hash for each part of its data, e.g. `data/train`, `data/held_out`
    - `left_out() -> Mapping[str, str]`: files of its data that are not used, and why
    - `latent_statistics() -> (means, standard deviations)` of each channel of its training images' latents
    - where it has text: `token_ids` of its samples, and `loss_ce` and `label_fraction` among the metrics of a step

    A task that reads a process of its own gives its metrics with their `step`, None from `step` when that process has ended well
    and from `sample` while there is nothing to sample from, and has or may have the following; see `CommandTask`:

    - `takes_samples`: False where samples come among the metrics, as `smoke/…`; `is_paired`: False where batches are its own;
      `can_resume`: False where a state cannot be loaded
    - `identify(name, folder)` before and `want_samples_at(steps)` after `setup`; `image(step)`: a picture of samples; `close()`

    A learning rate of 0 in its configuration must leave the weights as they are: that is how an update is switched off.
    """

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


def load_task(task: str | type | Mapping[str, Any], import_path: str | None = None) -> Callable[[], Any]:
    """What makes the task behind "module:Class", "module:function" or a command. Raises UserError naming what is missing."""
    if isinstance(task, type):
        return task
    if isinstance(task, Mapping):
        return _command(task, import_path)
    module_name, _, class_name = task.partition(":")
    if import_path and import_path not in sys.path:
        sys.path.insert(0, import_path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"task {task!r}: no module {error.name!r} (looked in the study's folder and the environment)") from None
    found = getattr(module, class_name, None)
    if isinstance(found, FunctionType):  # a loop that reports through `trial_context`: a process of its own
        paths = os.pathsep.join(filter(None, (import_path, os.environ.get("PYTHONPATH"))))
        place = {"PYTHONPATH": paths.replace("{", "{{").replace("}", "}}")}
        return _command(
            {"command": ["{python}", "-m", "tune_ssim.trials.command.call_function", task], "environment": place}, import_path
        )
    if not isinstance(found, type):
        raise UserError(f"task {task!r}: module {module_name!r} has no class or function {class_name!r}")
    missing = [name for name in CONTRACT if not callable(getattr(found, name, None))]
    if missing:
        raise UserError(f"task {task!r}: {class_name} has no {', '.join(missing)}; see tune_ssim.Task for the contract")
    return found


def _command(spec: Mapping[str, Any], cwd: str | None) -> Callable[[], Any]:
    from tune_ssim.study.command_spec import CommandSpec
    from tune_ssim.trials.command.command_task import CommandTask

    return partial(CommandTask, CommandSpec.model_validate(dict(spec)), cwd)
