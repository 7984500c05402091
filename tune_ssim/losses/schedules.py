"""Schedules for loss weights, such as the weight of a KL or a DINO term (note 002 §2, note 004).

A schedule depends only on the step, so it needs no state on resume and is the same in all trials.
Constructors raise ValueError for non-finite numbers and for counts below 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

Schedule = Callable[[float], float]
"""Step → weight."""


@dataclass(frozen=True)
class _Checked:
    def __post_init__(self) -> None:
        for key, number in asdict(self).items():
            if key in ("steps", "cycles"):
                if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                    raise ValueError(f"{key} must be an integer >= 1, got {number!r}")
            elif not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
                raise ValueError(f"{key} must be a finite number, got {number!r}")


@dataclass(frozen=True)
class Constant(_Checked):
    """`value` at every step."""

    value: float

    def __call__(self, step: float) -> float:
        return float(self.value)


@dataclass(frozen=True)
class Linear(_Checked):
    """Linear from `start` at step 0 to `end` at step `steps`, then constant at `end`.

    Note 004's `min(0.01, step / 100000)` is `Linear(0.0, 0.01, steps=1000)`.
    """

    start: float
    end: float
    steps: int

    def __call__(self, step: float) -> float:
        return _between(self.start, self.end, step / self.steps)


@dataclass(frozen=True)
class CyclicalLinear(_Checked):
    """`cycles` equal cycles over `steps` steps, then constant at `end`.

    Each cycle goes linearly from `start` to `end` during its first fraction `ratio` and then stays at `end`. Restarting the KL
    weight keeps the decoder using the latent (Fu et al. 2019; their 4 and 0.5 are the defaults). Note 004 anneals over
    3,000,000 steps; `ratio=1` is its saw-tooth without a plateau.
    """

    start: float
    end: float
    steps: int
    cycles: int = 4
    ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycles > self.steps:
            raise ValueError(f"cycles ({self.cycles}) must be at most steps ({self.steps})")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio!r}")

    def __call__(self, step: float) -> float:
        if step >= self.steps:
            return float(self.end)
        within = (max(step, 0) * self.cycles % self.steps) / self.steps  # exact for integer steps
        return _between(self.start, self.end, within / self.ratio)


def _between(start: float, end: float, share: float) -> float:
    share = min(max(share, 0.0), 1.0)
    return (1 - share) * start + share * end  # exact at both ends
