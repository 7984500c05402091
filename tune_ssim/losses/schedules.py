"""Weights that change over a training: KL alpha, DINO alpha, SSIM weight (note 002 §2, note 004).

A schedule is a function of the step alone, so a resumed training goes on where it was and two trials agree at every step.
In a space or a configuration it is one line, a name with its settings, or a plain number:

    kl_weight: 0.01
    kl_weight: {linear: {start: 0, end: 0.01, steps: 1000}}
    kl_weight: {cosine: {start: 0.1, end: 0, steps: 2000}}
    kl_weight: {cyclical_linear: {start: 0, end: 0.01, steps: 2000, cycles: 4}}
    dino_weight: {warm_up: {steps: 500, value: 0.1}}
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

from tune_ssim.base.errors import UserError


@dataclass(frozen=True)
class Constant:
    """`value` at every step."""

    value: float

    name: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: float) -> float:
        return float(self.value)


@dataclass(frozen=True)
class Linear:
    """From `start` at step 0 in a straight line to `end` at step `steps`, and `end` ever after."""

    start: float
    end: float
    steps: int

    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: float) -> float:
        return _between(self.start, self.end, step / self.steps)


@dataclass(frozen=True)
class Cosine:
    """From `start` at step 0 along half a cosine, flat at both ends, to `end` at step `steps`, and `end` ever after."""

    start: float
    end: float
    steps: int

    name: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: float) -> float:
        return _between(self.start, self.end, (1 - math.cos(math.pi * min(max(step / self.steps, 0.0), 1.0))) / 2)


@dataclass(frozen=True)
class CyclicalLinear:
    """`cycles` equal cycles in `steps` steps: each rises from `start` to `end` in its first `ratio`, and stays there for
    the rest. `end` ever after.

    A KL term that is taken back again and again lets the decoder keep using the latent (Fu et al. 2019, whose 4 and 0.5
    are the defaults). Note 004 anneals so over 3,000,000 steps; `ratio: 1` is its saw-tooth without a plateau.
    """

    start: float
    end: float
    steps: int
    cycles: int = 4
    ratio: float = 0.5

    name: ClassVar[str] = "cyclical_linear"

    def __post_init__(self) -> None:
        _check(self)
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
class WarmUp:
    """From 0 at step 0 in a straight line to `value` at step `steps`, and `value` ever after.

    Note 004's `min(0.01, step / 100000)` is `{warm_up: {steps: 1000, value: 0.01}}`.
    """

    steps: int
    value: float

    name: ClassVar[str] = "warm_up"

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: float) -> float:
        return _between(0.0, self.value, step / self.steps)


Schedule = Constant | Linear | Cosine | CyclicalLinear | WarmUp
SCHEDULES: dict[str, type[Schedule]] = {kind.name: kind for kind in (Constant, Linear, Cosine, CyclicalLinear, WarmUp)}


def parse_schedule(value: Any, where: str = "schedule", *, lower: float = 0.0) -> Schedule:
    """The schedule that `value` names: a number (constant), a mapping as above, or a schedule as it is.

    `where` begins every message, such as `fundus_sr: kl_weight`. `lower`: no number of the schedule may be below it; a
    loss weight is at least 0. Raises UserError with what was got and what is valid.
    """
    schedule: Schedule
    if isinstance(value, (Constant, Linear, Cosine, CyclicalLinear, WarmUp)):
        schedule = value
    elif _is_number(value):
        schedule = _build(where, Constant, {"value": value})
    else:
        if not isinstance(value, Mapping) or len(value) != 1:
            shape = f"{len(value)} keys ({', '.join(map(str, value))})" if isinstance(value, Mapping) else repr(value)
            raise UserError(f"{where}: got {shape}; expected a number, or one of {', '.join(SCHEDULES)} with its settings")
        (name, settings), *_ = value.items()
        if name not in SCHEDULES:
            raise UserError(f"{where}: unknown schedule {name!r}{_did_you_mean(name, SCHEDULES)}")
        schedule = _build(f"{where}: {name}", SCHEDULES[name], settings)
    for key, number in asdict(schedule).items():
        if key not in ("steps", "cycles", "ratio") and number < lower:
            raise UserError(f"{where}: {schedule.name}: {key}={number!r}; expected a number >= {lower:g}")
    return schedule


def schedule_config(schedule: Schedule) -> float | dict[str, dict[str, float]]:
    """What `parse_schedule` reads as this schedule: plain JSON, for a task's `effective()` and for exports."""
    return schedule.value if isinstance(schedule, Constant) else {schedule.name: asdict(schedule)}


def _build(where: str, kind: type[Schedule], settings: Any) -> Schedule:
    known = [item.name for item in fields(kind)]
    needed = [item.name for item in fields(kind) if item.default is MISSING]
    if not isinstance(settings, Mapping):
        raise UserError(f"{where}: got {settings!r}; expected a mapping with {', '.join(needed)}")
    for key in settings:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{_did_you_mean(key, known)}")
    missing = [key for key in needed if key not in settings]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing; valid: {', '.join(known)}")
    try:
        return kind(**settings)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _check(schedule: Schedule) -> None:
    for key, number in asdict(schedule).items():
        if key in ("steps", "cycles"):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{key} must be an integer >= 1, got {number!r}")
        elif not _is_number(number) or not abs(number) <= sys.float_info.max:  # an integer may be too large for a float
            raise ValueError(f"{key} must be a finite number, got {number!r}")


def _between(start: float, end: float, share: float) -> float:
    share = min(max(share, 0.0), 1.0)
    return (1 - share) * start + share * end  # exact at both ends


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _did_you_mean(word: Any, valid: Any) -> str:
    close = difflib.get_close_matches(str(word).lower(), list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"
