"""Loss weights that change during a training, such as the weight of a KL or a DINO term (note 002 §2, note 004).

A schedule is a function of the step alone, so a resumed training goes on where it was and two trials agree at every step.
It raises ValueError when it is built with a number that is not finite or with a count below 1.
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
    """A straight line from `start` at step 0 to `end` at step `steps`; then `end`."""

    start: float
    end: float
    steps: int

    def __call__(self, step: float) -> float:
        return _between(self.start, self.end, step / self.steps)


@dataclass(frozen=True)
class CyclicalLinear(_Checked):
    """`cycles` equal cycles in `steps` steps; then `end`. A cycle rises from `start` to `end` in its first `ratio` and stays there.

    A KL term that is taken back again and again lets the decoder keep using the latent (Fu et al. 2019, whose 4 and 0.5
    are the defaults). Note 004 anneals so over 3,000,000 steps; `ratio=1` is its saw-tooth without a plateau.
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
        within = (max(step, 0) * self.cycles % self.steps) / self.steps  # exact where the steps are integers
        return _between(self.start, self.end, within / self.ratio)


@dataclass(frozen=True)
class WarmUp(_Checked):
    """A straight line from 0 at step 0 to `value` at step `steps`; then `value`.

    Note 004's `min(0.01, step / 100000)` is `WarmUp(steps=1000, value=0.01)`.
    """

    steps: int
    value: float

    def __call__(self, step: float) -> float:
        return _between(0.0, self.value, step / self.steps)


def _between(start: float, end: float, share: float) -> float:
    share = min(max(share, 0.0), 1.0)
    return (1 - share) * start + share * end  # exact at both ends
