"""A training run as a stream of records: each has a step and the metrics measured at that step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Standard metric names. Losses are unweighted means over the active samples.
LOSS = "loss"  # the weighted sum that is minimised
LOSS_FLOW = "loss_flow"
LOSS_SSIM = "loss_ssim"  # 1 - SSIM, in [0, 1]; absent from steps where no sample took part
LOSS_PIXEL = "loss_pixel"
TOTAL_NORM = "total_norm"  # L2 norm of the whole gradient, before clipping
TOTAL_NORM_MAIN = "total_norm_main"  # the same for the main (flow) loss only
NORM_RATIO = "norm_ratio"  # computed by the norm guard: the latest window relative to the baseline
ACTIVE_FRACTION = "ssim_active_fraction"  # share of the batch with 0 < t <= max_t
STEP_SKIPPED = "step_skipped"  # 1 if a GradScaler skipped the update; an infinite norm is then normal
LR = "lr"
EPOCH = "epoch"  # may be fractional
SMOKE = "smoke/"  # prefix: collapse statistics of the samples at this step
SMOKE_AGAIN = "smoke_again/"  # prefix: the same with the second noise


@dataclass(frozen=True)
class Record:
    """A step >= 0 (0 = before the first update) and its metrics. NaN and Inf are valid values."""

    step: int
    values: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.step, int) or isinstance(self.step, bool) or self.step < 0:
            raise ValueError(f"record step must be an integer >= 0, got {self.step!r}")

    def to_json(self) -> list[Any]:
        return [self.step, dict(self.values)]

    @classmethod
    def from_json(cls, data: Any) -> Record:
        step, values = data
        return cls(step, values)


def is_of_training(step: int, names: Iterable[str]) -> bool:
    """Whether a record shows that training has started. Samples at step 0 do not: a training loop may read its settings and
    report its effective parameters only in its first step."""
    return step > 0 or not all(name.startswith(SMOKE) for name in names)


# Prefixes of metrics of the training itself, which are not held-out metrics.
TRAINING_METRICS = (SMOKE, "dbg/", LOSS, TOTAL_NORM, ACTIVE_FRACTION, LR, STEP_SKIPPED, "update_ratio", "grad_coverage")


def held_out_values(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a log that may come from held-out data: all except training metrics."""
    return {name: value for name, value in values.items() if not name.startswith(TRAINING_METRICS)}


def merge(records: Iterable[Record]) -> list[Record]:
    """One record per step, in step order. If a metric of a step is logged twice, the first value wins."""
    by_step: dict[int, dict[str, float]] = {}
    for record in records:
        values = by_step.setdefault(record.step, {})
        for name, value in record.values.items():
            values.setdefault(name, value)
    return [Record(step, by_step[step]) for step in sorted(by_step)]
