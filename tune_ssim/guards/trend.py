"""Does a noisy metric rise, or fail to fall? Judged by what noise of that size cannot do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import mul
from typing import Literal

from tune_ssim.guards.condition import check_action, check_count
from tune_ssim.guards.guard import State
from tune_ssim.guards.violation import Action, Violation
from tune_ssim.records import Record

BLOCKS = 20  # of a window: enough to see how strong the noise is, few enough to judge at each
SCALES = 4  # windows of 1, 2, 4 and 8 times the length: how far back is looked where the noise hides the trend
GROUP = 5  # neighbours whose median is taken first: two of five may be outliers
BUFFER = 5 * GROUP  # values kept of a block before they are summed up
# Standard deviations of a normal distribution. Windows overlap and are judged BLOCKS times each, so these are stricter than a single test's; what they give
# on healthy noise of several kinds, and how soon they see a real trend, is measured in tests/test_trend.py.
CERTAIN_RISE = 4.0
CERTAIN_FALL = 2.3
CERTAIN_STALL = 3.5


@dataclass(frozen=True)
class Change:
    """Of a straight line through the levels of a window: from its first to its last, with the standard error."""

    first: float
    last: float
    error: float
    freedom: float  # degrees of freedom of the error: how many independent residuals it was estimated from

    def doubt(self, certainty: float) -> float:
        """How far the true change may be off: `error` times the quantile of Student's t that is as rare as the normal deviate
        `certainty`, by the approximation of Wallace (1959); within 5 % of it from 10 degrees of freedom on."""
        if not self.error:
            return 0.0
        df = self.freedom
        power = (certainty * (8 * df + 1) / (8 * df + 3)) ** 2 / df
        return self.error * math.sqrt(df * math.expm1(min(power, 50.0)))

    @property
    def total(self) -> float:
        return self.last - self.first


@dataclass(frozen=True)
class Trend:
    """Fires when `metric` is "rising", or "not falling", over a window of at least `steps` training steps.

    A window is BLOCKS blocks of steps/BLOCKS steps, or of one record where the training logs less often, so it may span more
    steps. A block counts as the mean of medians of five neighbours: single outliers do not matter. Through the blocks goes a
    straight line; its error is estimated from the scatter about it, with the correlation of neighbours (smoothed logs).

    rising: the line rises by more than `by` of the level and for certain, and each quarter of the window lies above the
    one before. not falling: the line does not fall for certain, and a fall of `by` per `steps` can be excluded. Where the
    noise hides a trend, windows of twice, four and eight times the length are judged in the same way. A metric that is
    below `settled` of its highest level has done its falling: there a plateau is no finding.
    """

    metric: str
    trend: Literal["rising", "not falling"]
    steps: int = 200  # note 002 §7
    by: float = 0.03  # of the level: what a window of noise of a few percent can still tell apart
    settled: float = 0.0
    after: int = 0  # earlier steps are not judged: a warm-up
    action: Action = "warn"

    def __post_init__(self) -> None:
        if self.trend not in ("rising", "not falling"):
            raise ValueError(f"trend must be 'rising' or 'not falling', got {self.trend!r}")
        check_count("steps", self.steps, least=BLOCKS)
        check_count("after", self.after, least=0)
        for name, most in (("by", math.inf), ("settled", 1.0)):
            if not 0 <= getattr(self, name) < most:
                raise ValueError(f"{name} must be >= 0{'' if most == math.inf else ' and < 1'}, got {getattr(self, name)}")
        check_action(self.action)

    @property
    def name(self) -> str:
        return f"{self.trend.replace(' ', '_')}:{self.metric}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def init(self) -> State:
        """`values` and `block` ([sum, count] of earlier ones) are of the running block, which began at `start`."""
        scales = [{"levels": [], "starts": [], "half": None} for _ in range(SCALES)]
        seen = {"scales": scales, "peak": None, "since": None, "first": None, "last": None}
        return {"values": [], "block": [0.0, 0], "start": None, "last_step": self.after - 1, "seen": seen, "holds": False}

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        value = record.values.get(self.metric)
        step = record.step
        if value is None or step <= state["last_step"]:
            return state, None
        start, values, block, seen, holds = state["start"], state["values"], state["block"], state["seen"], state["holds"]
        if start is None:
            start = step
        elif (step - start) * BLOCKS >= self.steps:  # the record is the first of a new block
            level = (block[0] + len(values) * _centre(values)) / (block[1] + len(values))
            seen, holds = self._judged(seen, start, level, holds)
            start, values, block = step, [], [0.0, 0]
        elif len(values) == BUFFER:
            values, block = [], [block[0] + BUFFER * _centre(values), block[1] + BUFFER]
        new = {
            "values": [*values, value if value == value else math.inf],
            "block": block, "start": start, "last_step": step, "seen": seen, "holds": holds,
        }  # fmt: skip
        return new, self.finding(new) if holds and not state["holds"] else None

    def _judged(self, seen: State, start: int, level: float, held: bool) -> tuple[State, bool]:
        """One more block, and whether the trend holds: once it does, it does until the contrary is seen.

        Each scale has the latest BLOCKS blocks, oldest first, twice as long as those of the scale before; `half` is the first
        half of the next one. A longer window is asked only where the shorter ones cannot tell."""
        peak = level if seen["peak"] is None else max(seen["peak"], level)
        seen = {**seen, "scales": list(seen["scales"]), "peak": peak}
        verdict: bool | None = None
        for scale, old in enumerate(seen["scales"]):
            levels, starts = [*old["levels"][1 - BLOCKS :], level], [*old["starts"][1 - BLOCKS :], start]
            if verdict is None and len(levels) == BLOCKS and all(map(math.isfinite, levels)):
                change = line_through(levels)
                verdict = self._verdict(levels, change, 2**scale, peak)
                if verdict is not None:
                    seen |= {"since": starts[0], "first": change.first, "last": change.last}
            half = old["half"]
            seen["scales"][scale] = {"levels": levels, "starts": starts, "half": [start, level] if half is None else None}
            if half is None:
                break
            start, level = half[0], (half[1] + level) / 2
        if not math.isfinite(level):
            return {**seen, "since": start, "first": peak, "last": level}, True
        return seen, held if verdict is None else verdict

    def _verdict(self, levels: Sequence[float], change: Change, windows: int, peak: float) -> bool | None:
        """Whether the trend holds over so many windows; None: the noise does not tell."""
        if change.total + change.doubt(CERTAIN_FALL) < 0:
            return False
        least = self.by * windows * abs(sum(levels) / BLOCKS)
        if self.trend == "not falling":
            stalls = change.total - change.doubt(CERTAIN_STALL) >= -least
            return levels[-1] >= self.settled * peak if stalls else None
        quarter = BLOCKS // 4
        quarters = [sum(levels[i : i + quarter]) for i in range(0, BLOCKS, quarter)]
        rises = change.total > max(least, change.doubt(CERTAIN_RISE)) and all(a < b for a, b in pairwise(quarters))
        return True if rises else None

    def finding(self, state: State) -> Violation:
        seen, end = state["seen"], state["last_step"]
        first, last = seen["first"], seen["last"]
        where = f"over steps {seen['since']}-{end}"
        if not math.isfinite(last):
            sentence = f"{self.metric} is {last} {where}"
        elif self.trend == "rising":
            sentence = f"{self.metric} rose from {first:.4g} to {last:.4g} {where}"
        else:
            sentence = f"{self.metric} has not fallen {where}: from {first:.4g} to {last:.4g}"
        return Violation(self.name, end, self.metric, last, first, self.action, sentence)

    def unjudged(self, state: State) -> str | None:
        if len(state["seen"]["scales"][0]["levels"]) < BLOCKS:
            begun = "" if not self.after else f" after step {self.after}"
            return f"a trend over {self.steps} steps needs {BLOCKS} records that span them{begun}; the log ends before"
        return None


def line_through(levels: Sequence[float]) -> Change:
    """The least-squares line through equally spaced levels, and the standard error of its change from end to end.

    The error allows for noise in which neighbours are alike, as in a smoothed log: for residuals of an AR(1) process with
    correlation ρ the variance of a mean or slope grows by (1+ρ)/(1-ρ). Of so few residuals the estimate of ρ is too low by
    about (2+4ρ)/n for a fitted line (Marriott and Pope 1954), which is added back.
    """
    n = len(levels)
    weights, squares = _weights(n)
    mean = sum(levels) / n
    slope = sum(map(mul, weights, levels)) / squares
    residuals = [level - mean - slope * x for x, level in zip(weights, levels, strict=True)]
    scatter = sum(map(mul, residuals, residuals))
    half = slope * (n - 1) / 2
    if scatter <= 1e-24 * n * mean * mean:  # rounding
        return Change(mean - half, mean + half, 0.0, n - 2)
    alike = sum(map(mul, residuals, residuals[1:])) / scatter
    alike = min(max(alike + (2 + 4 * alike) / n, 0.0), 0.9)
    fewer = (1 - alike) / (1 + alike)
    variance = scatter / ((n - 2) * fewer * squares)
    return Change(mean - half, mean + half, math.sqrt(variance) * (n - 1), max((n - 2) * fewer, 1.0))


@lru_cache(maxsize=64)
def _weights(n: int) -> tuple[tuple[float, ...], float]:
    """-(n-1)/2 … (n-1)/2 and the sum of their squares."""
    weights = tuple(i - (n - 1) / 2 for i in range(n))
    return weights, sum(map(mul, weights, weights))


def _centre(values: Sequence[float]) -> float:
    """The mean of medians of at least GROUP values (of all, where there are fewer)."""
    groups = max(1, len(values) // GROUP)
    return sum(_median(values[i::groups]) for i in range(groups)) / groups


def _median(values: Sequence[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
