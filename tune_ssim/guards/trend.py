"""Detects whether a noisy metric rises, or does not fall, with a significance test against its noise."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import lt, mul
from typing import Any, Literal, NamedTuple

from tune_ssim.base.errors import check_field
from tune_ssim.guards.condition import Condition, set_action
from tune_ssim.guards.guard import Found, State
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Table

BLOCKS = 20  # blocks per window: enough to estimate the noise, few enough to judge often
PLACES = tuple(i - (BLOCKS - 1) / 2 for i in range(BLOCKS))  # block positions relative to the middle of the window
SQUARES = sum(place * place for place in PLACES)
JUDGED_SCALES = 4  # windows of 1, 2, 4 and 8 times the length are judged if noise hides the trend in shorter ones
SCALES = 12  # window lengths up to 2048 times, to know how slowly a metric has been falling
JUDGE_EVERY = 4  # a window is judged again after this many new blocks
# Largest correlation of neighbouring blocks with which a window is conclusive. Above it, fewer than 6 of its 18 residuals are
# independent; 20 blocks with a true correlation of 0.9 or 0.98 show only 0.7 on average (running means, EMAs of white noise).
MAX_CORRELATION = 0.5
CORRELATION_MEMORY = 4 * BLOCKS // JUDGE_EVERY  # judgements in the running mean; the same number as in four disjoint windows
MAX_LEVEL = 1e150  # its square is still finite; larger values count as overflow
BUFFER = 25  # values of a block that are kept before they are averaged
# Normal quantiles. Windows overlap and are judged repeatedly, so these are stricter than for a single test. False alarms on
# several kinds of noise, and the delay for a real trend, are measured in tests/test_trend.py.
RISE_SIGMAS = 4.0
FALL_SIGMAS = 2.3
STALL_SIGMAS = 3.5


@dataclass(frozen=True)
class Trend(Condition):
    """Fires when `metric` is "rising", or "not falling", over a window of at least `steps` training steps.

    A window has BLOCKS blocks of steps/BLOCKS steps, or of one record if the training logs less often, so it may span more
    steps. The level of a block is the mean of the middle half of its values, which ignores outliers. A straight line is
    fitted to the levels; its error is estimated from the residuals and the correlation of neighbouring blocks (smoothed
    logs), in this window and in earlier ones. If neighbours are strongly correlated, the window is inconclusive.

    rising: the line rises significantly and by more than `by` of the level, and each quarter of the window is above the
    previous one, or each block is. not falling: the line does not fall significantly, and a fall of `by` per `steps`, or at
    the pace seen in longer windows, can be excluded. If noise hides a trend, windows of two, four and eight times the length
    are judged in the same way, and longer ones instead of inconclusive ones. A metric below `settled` times its highest level
    has finished falling, so a plateau there is not reported.
    """

    metric: str
    trend: Literal["rising", "not falling"]
    steps: int = 200  # note 002 §7
    by: float = 0.03  # relative to the level: the smallest change a window can detect with noise of a few percent
    settled: float = 0.0
    after: int = 0  # earlier steps are not judged: a warm-up
    action: Action = Action.WARN

    def __post_init__(self) -> None:
        check_field(self.trend in ("rising", "not falling"), "trend", "must be 'rising' or 'not falling'", self.trend)
        check_field(self.steps >= BLOCKS, "steps", f"must be >= {BLOCKS}", self.steps)
        check_field(self.after >= 0, "after", "must be >= 0", self.after)
        check_field(0 <= self.by < math.inf, "by", "must be >= 0", self.by)
        check_field(0 <= self.settled < 1, "settled", "must be >= 0 and < 1", self.settled)
        set_action(self)

    @property
    def name(self) -> str:
        return f"{self.trend.replace(' ', '_')}:{self.metric}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def init(self) -> State:
        """`values` and `block` ([sum, count] of earlier ones) are of the running block, which began at `start` and ends before
        `end`. `blocks` counts the finished ones. Each of `scales` has the latest BLOCKS of them, oldest first, twice as long
        as those of the scale before, its `pace` once `_pace` asked for it, and how much neighbours were `alike`: a running
        mean that begins with white noise, so that a bend in the first windows does not silence those after it. `since`,
        `first` and `last` are of the line that was found last. `nan`: an infinite value may have been none."""
        scales: list[dict[str, Any]] = [{"levels": [], "starts": [], "pace": None, "alike": 0.0} for _ in range(SCALES)]
        return {
            "values": [], "block": [0.0, 0], "start": None, "end": -1, "last_step": self.after - 1, "holds": False,
            "blocks": 0, "scales": scales, "peak": None, "since": None, "first": None, "last": None, "nan": False,
        }  # fmt: skip

    def fold(self, state: State, table: Table) -> list[Found]:
        column = table.column(self.metric)
        if column is None:
            return []
        rows, steps, values = column.rows, column.steps, column.values
        nans: list[int] = []
        if not column.all_finite:
            nans = [at for at, value in enumerate(values) if value != value]
            values = [value if value == value else math.inf for value in values]
        found, begin, count = [], bisect_right(steps, state["last_step"]), len(steps)
        while begin < count:
            # Up to and including the value that closes the block.
            room = BUFFER - len(state["values"])
            end = min(bisect_left(steps, state["end"], begin, min(begin + room, count)) + 1, begin + room, count)
            state["values"] += values[begin:end]
            if nans and bisect_left(nans, begin) < bisect_left(nans, end):
                state["nan"] = True
            begin = end
            state["last_step"] = steps[begin - 1]
            if steps[begin - 1] >= state["end"] or len(state["values"]) == BUFFER:
                violation = self._close(state, steps[begin - 1])
                if violation is not None:
                    found.append((rows[begin - 1], violation))
        return found

    def _close(self, state: State, step: int) -> Violation | None:
        """Called when the buffer is full, or when the block ends; then the newest value belongs to the next block."""
        values, block, held = state["values"], state["block"], state["holds"]
        if state["start"] is None:
            state["start"], state["end"] = step, step + self.steps / BLOCKS
        elif step >= state["end"]:
            newest = values.pop()
            count = len(values)
            level = (block[0] + (count * _centre(values) if count else 0.0)) / (block[1] + count)
            self._judge(state, state["start"], level)
            state["values"], state["block"] = [newest], [0.0, 0]
            state["start"], state["end"] = step, step + self.steps / BLOCKS
        if len(state["values"]) == BUFFER:
            state["block"] = [block[0] + BUFFER * _centre(values), block[1] + BUFFER]
            state["values"] = []
        return self.finding(state) if state["holds"] and not held else None

    def _judge(self, state: State, start: int, level: float) -> None:
        """Adds a block and updates whether the trend holds. A trend holds until the opposite is seen. Longer windows are judged
        only if shorter ones are inconclusive."""
        if not abs(level) < MAX_LEVEL:
            state |= {"since": start, "first": state["peak"] or 0.0, "last": level, "holds": True}
            return
        if state["peak"] is None or level > state["peak"]:
            state["peak"] = level
        state["blocks"] = count = state["blocks"] + 1
        undecided, conclusive = True, 0
        for scale, kept in enumerate(state["scales"]):
            levels, starts = kept["levels"], kept["starts"]
            levels.append(level)
            starts.append(start)
            if len(levels) > BLOCKS:
                del levels[0], starts[0]
            if count % JUDGE_EVERY == 0:
                kept["pace"] = None
                if len(levels) == BLOCKS:
                    line = Line.through(levels)
                    kept["alike"] += (line.alike - kept["alike"]) / CORRELATION_MEMORY
                    line = line.allowing(kept["alike"])
                    # Beyond JUDGED_SCALES only if shorter windows were inconclusive, and a fall of `by` per `steps` is possible.
                    near = scale < JUDGED_SCALES or (conclusive < JUDGED_SCALES and self.by * 2**scale < 1)
                    if undecided and (near or state["holds"]):
                        undecided = not self._decide(state, scale, line)
                    conclusive += line.is_conclusive
            if count % 2:
                return
            count //= 2
            start, level = starts[-2], (levels[-2] + levels[-1]) / 2

    def _decide(self, state: State, scale: int, line: Line) -> bool:
        """Judges the window of a scale. False if it is inconclusive."""
        levels, starts = state["scales"][scale]["levels"], state["scales"][scale]["starts"]
        rise, min_change = line.rise, self.by * 2**scale * abs(line.middle)
        if state["holds"] and rise >= 0:
            return False
        if not state["holds"] and self.trend == "rising" and rise <= 0:
            return True
        if not state["holds"] and self.trend == "not falling" and rise < -min_change:
            return False
        if not line.is_conclusive and not (_never_falls(levels) or _never_rises(levels)):
            return False
        if state["holds"]:
            # One lucky window, or a fall from before the trend, does not end it.
            falls = rise + line.doubt(STALL_SIGMAS) < 0 and (scale == 0 or starts[0] >= state["since"])
            state["holds"] = not falls
            return falls
        if line.falls:
            return True
        if self.trend == "rising":
            found = rise > min_change and (_never_falls(levels) or (rise > line.doubt(RISE_SIGMAS) and _climbs(levels)))
        else:
            lowest = max(rise, 0.0) if _never_falls(levels) else rise - line.doubt(STALL_SIGMAS)
            found = lowest >= -min_change and levels[-1] >= self.settled * state["peak"] and lowest >= self._pace(state, scale)
            found = found and not any(Line.through(kept["levels"]).falls for kept in state["scales"][:scale])
        if found:
            low, high = min(levels), max(levels)  # the ends of the fitted line may lie outside the observed levels
            first, last = (min(max(end, low), high) for end in (line.middle - line.rise / 2, line.middle + line.rise / 2))
            state |= {"since": starts[0], "first": first, "last": last, "holds": True}
        return found

    def _pace(self, state: State, scale: int) -> float:
        """The expected fall in this window at the pace of the longer windows that fall significantly; the slowest of these, or
        -inf if there are none. In a long training the loss may fall too slowly for a short window without being stuck."""
        slowest = -math.inf
        for longer in range(scale + 1, SCALES):
            kept = state["scales"][longer]
            if len(kept["levels"]) < BLOCKS:
                break
            if kept["pace"] is None:
                line = Line.through(kept["levels"])
                kept["pace"] = line.rise if line.falls else 0.0
            if kept["pace"] < 0:
                slowest = max(slowest, kept["pace"] / 2 ** (longer - scale))
        return slowest

    def finding(self, state: State) -> Violation:
        end, first, last = state["last_step"], state["first"], state["last"]
        if state["nan"] and not math.isfinite(last):
            last = math.nan
        where = f"over steps {state['since']}-{end}"
        if not abs(last) < MAX_LEVEL:
            sentence = f"{self.metric} is {last:g} {where}"
        elif self.trend == "rising":
            sentence = f"{self.metric} rose from {first:.4g} to {last:.4g} {where}"
        else:
            sentence = f"{self.metric} has not fallen {where}: from {first:.4g} to {last:.4g}"
        return Violation(self.name, end, self.metric, last, first, self.action, sentence)

    def unjudged(self, state: State) -> str | None:
        if len(state["scales"][0]["levels"]) < BLOCKS:
            begun = "" if not self.after else f" after step {self.after}"
            return f"a trend over {self.steps} steps needs {BLOCKS} records that span them{begun}; the log ends before"
        return None


def free(alike: float) -> float:
    """Effective degrees of freedom of a line's error: BLOCKS - 2, reduced for correlated neighbours."""
    return max((BLOCKS - 2) * (1 - alike) / (1 + alike), 1.0)


class Line(NamedTuple):
    """A least-squares line through BLOCKS equally spaced levels. middle: level in the middle. rise: from first to last block.
    error: standard error of the rise. freedom: degrees of freedom of the error. alike: correlation of neighbouring residuals."""

    middle: float
    rise: float
    error: float
    freedom: float
    alike: float = 0.0

    @classmethod
    def through(cls, levels: Sequence[float]) -> Line:
        """Fits the line. The error accounts for correlated noise, as in a smoothed log: for AR(1) residuals with correlation ρ the
        variance of a slope grows by (1+ρ)/(1-ρ), and the degrees of freedom shrink by the same factor. The estimate of ρ is
        biased by about -(2+4ρ)/n for a fitted line (Marriott and Pope 1954), which is corrected."""
        n = BLOCKS
        first = levels[0]
        above = [level - first for level in levels]
        mean, slope = sum(above) / n, sum(map(mul, PLACES, above)) / SQUARES
        squares = sum(map(mul, above, above))
        scatter = squares - n * mean * mean - slope * slope * SQUARES  # of the residuals r
        if scatter <= 1e-12 * squares:  # rounding, or as good as none
            return cls(first + mean, slope * (n - 1), 0.0, n - 2)
        # Σ r_i r_(i+1) from Σ (r_(i+1) - r_i)², which needs no residuals but the first and the last (above[0] is 0).
        differences = 2 * (squares - sum(map(mul, above[1:], above))) - above[-1] ** 2
        differences += slope * ((n - 1) * slope - 2 * above[-1])
        ends = (mean + slope * PLACES[0]) ** 2 + (above[-1] - mean - slope * PLACES[-1]) ** 2
        alike = (scatter - (ends + differences) / 2) / scatter
        alike = min(max(alike + (2 + 4 * alike) / n, 0.0), 0.9)
        freedom = free(alike)
        return cls(first + mean, slope * (n - 1), math.sqrt(scatter / (freedom * SQUARES)) * (n - 1), freedom, alike)

    def allowing(self, alike: float) -> Line:
        """The same line with its error increased for a correlation of at least `alike`."""
        if alike <= self.alike or not self.error:
            return self
        freedom = free(alike)
        return Line(self.middle, self.rise, self.error * math.sqrt(self.freedom / freedom), freedom, alike)

    @property
    def is_conclusive(self) -> bool:
        """Whether its error can be trusted."""
        return not self.error or self.alike <= MAX_CORRELATION

    @property
    def falls(self) -> bool:
        """Whether it falls significantly."""
        return self.rise + self.doubt(FALL_SIGMAS) < 0

    def doubt(self, certainty: float) -> float:
        """Half-width of a confidence interval for the rise: the error times the quantile of Student's t that corresponds to the
        normal quantile `certainty`. Uses the approximation of Wallace (1959), within 5 % from 10 degrees of freedom on."""
        if not self.error:
            return 0.0
        freedom = self.freedom
        power = (certainty * (8 * freedom + 1) / (8 * freedom + 3)) ** 2 / freedom
        return self.error * math.sqrt(freedom * math.expm1(min(power, 50.0)))


def _climbs(levels: Sequence[float]) -> bool:
    """Whether each quarter of the window is above the previous one."""
    quarter = BLOCKS // 4
    return all(a < b for a, b in pairwise(sum(levels[i : i + quarter]) for i in range(0, BLOCKS, quarter)))


def _never_falls(levels: Sequence[float]) -> bool:
    """Whether the levels rise at every block but one. Then the noise is ignored, because a curved line has too large an error."""
    return sum(map(lt, levels, levels[1:])) >= BLOCKS - 2


def _never_rises(levels: Sequence[float]) -> bool:
    return sum(map(lt, levels[1:], levels)) >= BLOCKS - 2


def _centre(values: Sequence[float]) -> float:
    """The mean of the middle half of the values (of three, the median), which ignores outliers."""
    ordered, count = sorted(values), len(values)
    cut = (count + 1) // 4
    return sum(ordered[cut : count - cut]) / (count - 2 * cut)
