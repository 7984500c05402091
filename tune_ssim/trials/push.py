"""`trial_context` makes any training loop a trial with three lines. Outside a study its methods only validate their arguments.

    with tune_ssim.trial_context(ssim_loss_weight=0.1) as t:           # the values outside a study
        weight = t.config["ssim_loss_weight"]
        for step, batch in enumerate(loader, 1):
            loss = loss_of(model, batch) + weight * model.losses(batch)["loss_head"]
            loss.backward()
            t.report(step=step, loss=loss, total_norm=torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))

It works in a script that a study runs as a command, and in a function that a study names. The trial with its guards runs in another
process: it reads the reports from a folder and writes its verdict there.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tune_ssim.trials.channel import VARIABLE, TrainingEnd

if TYPE_CHECKING:
    import torch

    from tune_ssim.trials.training import Sample

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")  # torchrun and accelerate; srun; mpirun


class TrialPruned(Exception):
    """The trial is over. `report` raises it; the `with` block of `trial_context` catches it."""


def trial_context(**defaults: Any) -> TrialContext:
    """A context manager; see the module. `defaults`: the configuration outside a study, and the values of keys that the study does
    not set. Safe on every rank of a distributed training: all ranks may report, only rank 0 sends."""
    folder = os.environ.get(VARIABLE)
    if not folder or not Path(folder).is_dir():  # other nodes may lack the folder; their rank is not 0 anyway
        return TrialContext(None, defaults)
    return TrialContext(TrainingEnd(Path(folder)), defaults)


class TrialContext:
    """config: the settings to train with. steps: number of steps, None if the study does not give it, or outside a study."""

    def __init__(self, channel: TrainingEnd | None, defaults: Mapping[str, Any]) -> None:
        self._channel = channel
        self.config = _Settings({**defaults, **(channel.config if channel else {})})
        self.steps = channel.steps if channel else None
        self._step, self._n_read_sent = 0, -1
        self._send_read()  # from now on nothing that it prints is taken for a record

    @property
    def is_active(self) -> bool:
        """Whether the loop runs in a study."""
        return self._channel is not None

    @property
    def calibrating(self) -> bool:
        """Whether this is a short start for preflight or calibration: only its first steps are read, and no update is kept. A loop
        may skip its validation, samples and checkpoints."""
        return self._channel is not None and self._channel.calibrating

    @property
    def seed(self) -> int:
        """A loop that seeds its batches and noise with it sees the same as the baseline, so norms are compared step by step."""
        self.config.read.add("seed")
        return self._channel.seed if self._channel else 0

    def report(self, *, step: int, **metrics: float | torch.Tensor) -> None:
        """Reports the metrics of one optimiser step (the first is 1) under the standard names: loss, total_norm (before clipping),
        ssim_active_fraction, … Values are numbers, or tensors and arrays of one element. Within a study, tensors are copied from
        their device here.

        Raises TrialPruned when the trial is over; TypeError or ValueError, also outside a study, for other values."""
        self._step = self._whole("report", step)
        self._send_record(self._step, {name: self._number("report", name, value) for name, value in metrics.items()})
        self.raise_if_over()

    def samples(
        self,
        images: torch.Tensor | Sample,
        *,
        step: int | None = None,
        references: torch.Tensor | None = None,
        inputs: torch.Tensor | None = None,
        reconstructions: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        vocabulary_size: int | None = None,
        **statistics: float,
    ) -> None:
        """Sends samples from fixed inputs and fixed noise to the smoke test: a `tune_ssim.Sample`, or its fields one by one.
        step: None is the last reported one. Call it when `due(step)`; step 0 is before the first update.

        Raises UserError, a ValueError, for images that are not float tensors `[n, 3, H, W]`, and within a study for references or
        inputs far outside [0, 1]."""
        at = self._step if step is None else self._whole("samples", step)
        numbers = {f"smoke/{name}": self._number("samples", name, value) for name, value in statistics.items()}
        if _rank() == 0:
            from tune_ssim.trials.sample_check import require_kind
            from tune_ssim.trials.training import Sample

            if isinstance(images, Sample):
                sample = images
            else:
                sample = Sample(images, references, inputs, reconstructions, {}, token_ids, vocabulary_size)
            numbers |= {f"smoke/{name}": self._number("samples", name, value) for name, value in sample.statistics.items()}
            require_kind(sample)
            if self._channel is not None:
                self._send_samples(self._channel, at, sample, numbers)
        self.raise_if_over()

    def _send_samples(self, channel: TrainingEnd, step: int, sample: Sample, numbers: Mapping[str, float]) -> None:
        from tune_ssim.trials.sample_check import require_range, statistics_of
        from tune_ssim.trials.sample_grid import draw_grid

        if doubt := require_range(sample):
            warnings.warn(doubt, stacklevel=3)
        found = {f"smoke/{name}": value for name, value in statistics_of(sample).items()}
        if len(sample.images):
            channel.save_image(step, draw_grid(sample))
        self._send_record(step, {**found, **numbers})

    def due(self, step: int) -> bool:
        """Whether the study requests samples after this step."""
        return self._channel is not None and (step in self._channel.smoke_at or step == self._channel.steps)

    def in_force(self, **parameters: Any) -> None:
        """Sends parameters as read where they are used, e.g. `in_force(ssim_loss_weight=criterion.weight)`. A study compares them
        with the values it set, and stops a training that does not use them. Takes JSON values and numbers of any kind.

        Raises TypeError, also outside a study, for any other value."""
        self._send({"effective": {name: self._stated(name, value) for name, value in parameters.items()}})

    def held_out(self, **metrics: float | torch.Tensor | Sequence[float]) -> None:
        """Sends metrics measured on held-out data at the end, e.g. `ssim`, `psnr` (dB), for the study's objective and margins. A
        list has one number for each held-out image; the metric is their mean.

        Raises TypeError, also outside a study, for a value that is neither a number nor a list of them."""
        numbers = {
            name: [self._number("held_out", name, one) for one in value]
            if isinstance(value, (list, tuple)) and value
            else self._number("held_out", name, value)
            for name, value in metrics.items()
        }
        self._send({"held_out": numbers})

    def raise_if_over(self) -> None:
        """Raises TrialPruned once the trial has a verdict. For loops that report rarely."""
        if self._channel is not None and (verdict := self._channel.verdict()) is not None:
            raise TrialPruned(f"{verdict['verdict']}: {verdict['reason']}")

    def __enter__(self) -> TrialContext:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self._send_read()
        ended = "finished" if error is None else "pruned" if isinstance(error, TrialPruned) else f"failed: {error!r}"
        self._send({"ended": ended})
        return isinstance(error, TrialPruned)

    def _send_read(self) -> None:
        if len(self.config.read) != self._n_read_sent:
            self._n_read_sent = len(self.config.read)
            self._send({"read": sorted(self.config.read)})

    def _send_record(self, step: int, values: Mapping[str, float]) -> None:
        self._send_read()  # first: a record makes the trial check which settings were looked up
        self._send({**values, "step": step})

    def _send(self, message: Mapping[str, Any]) -> None:
        if (channel := self._sender) is not None:
            channel.send(message)

    @property
    def _sender(self) -> TrainingEnd | None:
        """The channel on rank 0; None on other ranks and outside a study, where reports are only validated."""
        return self._channel if _rank() == 0 else None

    def _plain(self, value: Any) -> Any:
        """A tensor or array of one element as a Python number; other values unchanged. Without a sender nothing is copied from
        another device: 0 replaces the number."""
        shape = getattr(value, "shape", None)
        if shape is None or math.prod(shape) != 1 or not hasattr(value, "item"):
            return value
        device = getattr(getattr(value, "device", None), "type", "cpu")
        return value.item() if device == "cpu" or self._sender is not None else 0

    def _number(self, where: str, name: str, value: Any) -> float:
        try:
            return float(self._plain(value))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TypeError(f"{where}: {name} must be one number, got {_short_repr(value)}") from None

    def _whole(self, where: str, step: Any) -> int:
        try:
            plain = self._plain(step)
        except (TypeError, ValueError, RuntimeError):
            plain = step
        if isinstance(plain, bool) or not isinstance(plain, int | float) or plain < 0 or plain % 1 != 0:
            raise ValueError(f"{where}: step must be an integer >= 0, got {_short_repr(step)}")
        return int(plain)

    def _stated(self, name: str, value: Any) -> Any:
        try:
            return json.loads(json.dumps(value, default=self._plain))
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"in_force: {name} must be a plain value, got {_short_repr(value)}") from None


class _Settings(Mapping[str, Any]):
    """A configuration that records which settings were looked up."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        self.read.add(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return json.dumps(self._values, default=str)


def _rank() -> int:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return next((int(os.environ[name]) for name in RANK_VARIABLES if os.environ.get(name, "").isdigit()), 0)


def _short_repr(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None or not len(shape) else f"a tensor of shape {list(shape)}"
