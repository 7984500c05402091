"""Schedules for loss weights: of the SSIM loss, of a KL or a DINO term (note 002 §2, note 004).

A schedule depends only on the step, `Adaptive` only on the gradients of the step. So none needs a state on resume. In a file a
schedule is a mapping with its kind, such as `{cosine: {start: 10, end: 1, steps: 200}}`; see SCHEDULES. Constructors raise
ValueError for non-finite numbers and for counts below 1. Without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tune_ssim.base.errors import FieldError
from tune_ssim.base.numbers import is_number
from tune_ssim.base.validation import Problems, build_dataclass, problem
from tune_ssim.base.yaml_source import describe, did_you_mean, short_repr


@dataclass(frozen=True)
class _Checked:
    def __post_init__(self) -> None:
        for key, number in asdict(self).items():
            if key in ("steps", "cycles"):
                if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                    raise FieldError(key, f"must be an integer >= 1, got {number!r}")
            elif not is_number(number) or not math.isfinite(number):
                raise FieldError(key, f"must be a finite number, got {number!r}")


class Schedule(_Checked):
    """Step → weight."""

    def __call__(self, step: float) -> float:
        raise NotImplementedError

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights between which all others lie."""
        return tuple(number for key, number in asdict(self).items() if key in ("value", "start", "end"))


@dataclass(frozen=True)
class Constant(Schedule):
    """`value` at every step."""

    value: float

    def __call__(self, step: float) -> float:
        return float(self.value)


@dataclass(frozen=True)
class Linear(Schedule):
    """Linear from `start` at step 0 to `end` at step `steps`, then constant at `end`.

    Note 004's `min(0.01, step / 100000)` is `Linear(0.0, 0.01, steps=1000)`.
    """

    start: float
    end: float
    steps: int

    def __call__(self, step: float) -> float:
        return _between(self.start, self.end, step / self.steps)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from `start` at step 0 to `end` at step `steps`, then constant at `end` (Loshchilov and Hutter 2017, without
    their restarts)."""

    start: float
    end: float
    steps: int

    def __call__(self, step: float) -> float:
        share = min(max(step / self.steps, 0.0), 1.0)
        return _between(self.start, self.end, (1 - math.cos(math.pi * share)) / 2)


@dataclass(frozen=True)
class WarmUp(Schedule):
    """Linear from 0 at step 0 to `value` at step `steps`, then constant."""

    value: float
    steps: int

    def __call__(self, step: float) -> float:
        return _between(0.0, self.value, step / self.steps)


@dataclass(frozen=True)
class CyclicalLinear(Schedule):
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
            raise FieldError("cycles", f"must be at most steps ({self.steps}), got {self.cycles}")
        if not 0 < self.ratio <= 1:
            raise FieldError("ratio", f"must be in (0, 1], got {self.ratio!r}")

    def __call__(self, step: float) -> float:
        if step >= self.steps:
            return float(self.end)
        within = (max(step, 0) * self.cycles % self.steps) / self.steps  # exact for integer steps
        return _between(self.start, self.end, within / self.ratio)


@dataclass(frozen=True)
class Adaptive(_Checked):
    """The weight with which the gradient of a loss is `target_ratio` times as long as the gradient of all other losses:

        weight = target_ratio · ‖∇ others‖ / ‖∇ loss‖,   at most `max_weight`

    This is the rule of VQGAN (Esser et al. 2021), with its limit of 1e4, at every step anew as there: no average, so no state.
    Its `+ 1e-4` under the fraction is left out, since gradients of an SSIM loss may be smaller than that. GradNorm (Chen et al.
    2018) balances the gradients of tasks too, with weights that it learns.
    """

    target_ratio: float
    max_weight: float = 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, number in asdict(self).items():
            if number <= 0:
                raise FieldError(key, f"must be > 0, got {number!r}")


NO_CLAMP = "cannot be combined with an adaptive ssim_loss_weight: a clamped gradient does not follow the weight"

SCHEDULES: dict[str, type[Any]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "warm_up": WarmUp,
    "cyclical": CyclicalLinear,
    "adaptive": Adaptive,
}


def read_schedule(given: Any) -> Schedule | Adaptive:
    """A schedule as written in a file, e.g. `{warm_up: {value: 10, steps: 50}}`. Raises Problems, a ValueError."""
    if not isinstance(given, Mapping) or len(given) != 1:
        raise problem(f"a schedule is one of {', '.join(SCHEDULES)} with its numbers, got {describe(given)}")
    ((kind, numbers),) = given.items()
    if kind not in SCHEDULES:
        raise problem(f"unknown schedule {short_repr(kind)}{did_you_mean(kind, SCHEDULES)}")
    problems = Problems()
    with problems.at(kind):
        built: Schedule | Adaptive = build_dataclass(SCHEDULES[kind], numbers, [one.name for one in fields(SCHEDULES[kind])])
        return built
    raise problems


def written_schedule(schedule: Schedule | Adaptive) -> dict[str, dict[str, float]]:
    """The mapping that `read_schedule` reads, with every number."""
    return {next(kind for kind, one in SCHEDULES.items() if type(schedule) is one): asdict(schedule)}


def _between(start: float, end: float, share: float) -> float:
    share = min(max(share, 0.0), 1.0)
    return (1 - share) * start + share * end  # exact at both ends
