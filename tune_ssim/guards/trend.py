"""Does a noisy metric rise, or fail to fall? Judged by what noise of that size cannot do."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import lt, mul
from typing import Any, Literal, NamedTuple

from tune_ssim.guards.condition import as_action, check_count
from tune_ssim.guards.guard import Found, State, TableGuard
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Table

BLOCKS = 20  # of a window: enough to see how strong the noise is, few enough to judge at each
PLACES = tuple(i - (BLOCKS - 1) / 2 for i in range(BLOCKS))  # of the blocks, about the middle of the window
SQUARES = sum(place * place for place in PLACES)
JUDGED = 4  # windows of 1, 2, 4 and 8 times the length: how far back is looked where the noise hides the trend
SCALES = 12  # up to 2048 times: how slowly a metric has been falling all along
LOOK = 4  # a window is judged when so many of its blocks are new
# Correlation of neighbouring blocks beyond which a window cannot tell: fewer than 6 of its 18 residuals count, and 20 blocks with
# a correlation of 0.9 show 0.7 on average, one of 0.98 no more (running means and EMAs of white noise).
ALIKE = 0.5
REMEMBERED = 4 * BLOCKS // LOOK  # looks at a window: as many as at four that share no block
HUGE = 1e150  # its square is still a number; what is beyond has gone out of range
BUFFER = 25  # values kept of a block before they are summed up
# Deviates of a normal distribution. Windows overlap and are judged again and again, so these are stricter than for one test;
# what they give on healthy noise of several kinds, and how soon a real trend is seen, is measured in tests/test_trend.py.
CERTAIN_RISE = 4.0
CERTAIN_FALL = 2.3
CERTAIN_STALL = 3.5


@dataclass(frozen=True)
class Trend(TableGuard):
    """Fires when `metric` is "rising", or "not falling", over a window of at least `steps` training steps.

    A window is BLOCKS blocks of steps/BLOCKS steps, or of one record where the training logs less often, so it may span more
    steps. A block counts as the mean of the middle half of its values: outliers do not matter. Through the blocks goes a
    straight line; its error is estimated from the scatter about it, with the correlation of neighbours (smoothed logs), in
    this window and in the ones before. Where neighbours are so much alike that the window is as good as a few values, it
    cannot tell.

    rising: the line rises by more than `by` of the level and for certain, and each quarter of the window lies above the
    one before; or every block does. not falling: the line does not fall for certain, and a fall of `by` per `steps` can be
    excluded, or one at the pace at which longer windows show it falling. Where the noise hides a trend, windows of twice,
    four and eight times the length are judged in the same way, and longer ones in place of those that cannot tell. A metric
    that is below `settled` of its highest level has done its falling: there a plateau is no finding.
    """

    metric: str
    trend: Literal["rising", "not falling"]
    steps: int = 200  # note 002 §7
    by: float = 0.03  # of the level: what a window of noise of a few percent can still tell apart
    settled: float = 0.0
    after: int = 0  # earlier steps are not judged: a warm-up
    action: Action = Action.WARN

    def __post_init__(self) -> None:
        if self.trend not in ("rising", "not falling"):
            raise ValueError(f"trend must be 'rising' or 'not falling', got {self.trend!r}")
        check_count("steps", self.steps, minimum=BLOCKS)
        check_count("after", self.after, minimum=0)
        for name, most in (("by", math.inf), ("settled", 1.0)):
            if not 0 <= getattr(self, name) < most:
                raise ValueError(f"{name} must be >= 0{'' if most == math.inf else ' and < 1'}, got {getattr(self, name)}")
        object.__setattr__(self, "action", as_action(self.action))

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
            # Up to and with the value that closes the block.
            most = min(begin + BUFFER - len(state["values"]), count)
            end = bisect_left(steps, state["end"], begin, most) + 1
            state["values"] += values[begin : min(end, most)]
            if nans and bisect_left(nans, begin) < bisect_left(nans, min(end, most)):
                state["nan"] = True
            begin = min(end, most)
            state["last_step"] = steps[begin - 1]
            if end <= most or len(state["values"]) == BUFFER:
                violation = self._close(state, steps[begin - 1])
                if violation is not None:
                    found.append((rows[begin - 1], violation))
        return found

    def _close(self, state: State, step: int) -> Violation | None:
        """The block is full: of values that are kept, or of steps; then the newest value is the first of the next one."""
        values, block, held = state["values"], state["block"], state["holds"]
        if state["start"] is None:
            state["start"], state["end"] = step, step + self.steps / BLOCKS
        elif step >= state["end"]:
            newest = values.pop()
            level = (block[0] + (len(values) * _centre(values) if values else 0.0)) / (block[1] + len(values))
            self._judge(state, state["start"], level)
            state |= {"values": [newest], "block": [0.0, 0], "start": step, "end": step + self.steps / BLOCKS}
        if len(state["values"]) == BUFFER:
            state["block"] = [block[0] + BUFFER * _centre(values), block[1] + BUFFER]
            state["values"] = []
        return self.finding(state) if state["holds"] and not held else None

    def _judge(self, state: State, start: int, level: float) -> None:
        """One more block: does the trend hold? Once it does, it does until the contrary is seen. A longer window is asked only
        where the shorter ones cannot tell."""
        if not abs(level) < HUGE:
            state |= {"since": start, "first": state["peak"] or 0.0, "last": level, "holds": True}
            return
        if state["peak"] is None or level > state["peak"]:
            state["peak"] = level
        state["blocks"] = count = state["blocks"] + 1
        undecided, told = True, 0
        for scale, kept in enumerate(state["scales"]):
            levels, starts = kept["levels"], kept["starts"]
            levels.append(level)
            starts.append(start)
            if len(levels) > BLOCKS:
                del levels[0], starts[0]
            if count % LOOK == 0:
                kept["pace"] = None
                if len(levels) == BLOCKS:
                    line = Line.through(levels)
                    kept["alike"] += (line.alike - kept["alike"]) / REMEMBERED
                    line = line.allowing(kept["alike"])
                    # Longer than JUDGED: where shorter ones could not tell, and `by` per `steps` is not yet all there is.
                    near = scale < JUDGED or (told < JUDGED and self.by * 2**scale < 1)
                    if undecided and (near or state["holds"]):
                        undecided = not self._decide(state, scale, line)
                    told += line.tells
            if count % 2:
                return
            count //= 2
            start, level = starts[-2], (levels[-2] + levels[-1]) / 2

    def _decide(self, state: State, scale: int, line: Line) -> bool:
        """Judges the window of a scale; False: its noise does not tell."""
        levels, starts = state["scales"][scale]["levels"], state["scales"][scale]["starts"]
        rise, least = line.rise, self.by * 2**scale * abs(sum(levels) / BLOCKS)
        if state["holds"] and rise >= 0:
            return False
        if not state["holds"] and self.trend == "rising" and rise <= 0:
            return True
        if not state["holds"] and self.trend == "not falling" and rise < -least:
            return False
        if not line.tells and not (_never_falls(levels) or _never_rises(levels)):
            return False
        if state["holds"]:
            # It is not given up for one lucky window, nor for what was before it.
            falls = rise + line.doubt(CERTAIN_STALL) < 0 and (scale == 0 or starts[0] >= state["since"])
            state["holds"] = not falls
            return falls
        if line.falls:
            return True
        if self.trend == "rising":
            found = rise > least and (_never_falls(levels) or (rise > line.doubt(CERTAIN_RISE) and _climbs(levels)))
        else:
            lowest = max(rise, 0.0) if _never_falls(levels) else rise - line.doubt(CERTAIN_STALL)
            found = lowest >= -least and levels[-1] >= self.settled * state["peak"] and lowest >= self._pace(state, scale)
            found = found and not any(Line.through(kept["levels"]).falls for kept in state["scales"][:scale])
        if found:
            low, high = min(levels), max(levels)  # of a curve that is no straight line the ends lie beyond what was seen
            first, last = (min(max(end, low), high) for end in (line.middle - line.rise / 2, line.middle + line.rise / 2))
            state |= {"since": starts[0], "first": first, "last": last, "holds": True}
        return found

    def _pace(self, state: State, scale: int) -> float:
        """How much a metric falls in this window that goes on as it has fallen, for certain, over a longer one: a long training
        falls too slowly for a short window to show it, and is not stuck. (Of several, the slowest; -inf without any.)"""
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
        if not abs(last) < HUGE:
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
    """Degrees of freedom of a line's error: of the BLOCKS - 2, as many as count where neighbours are so much alike."""
    return max((BLOCKS - 2) * (1 - alike) / (1 + alike), 1.0)


class Line(NamedTuple):
    """The least-squares line through BLOCKS equally spaced levels: its level in the `middle`, its `rise` from the first to the
    last, the standard `error` of that, the error's degrees of `freedom`, and how much neighbouring residuals are `alike`."""

    middle: float
    rise: float
    error: float
    freedom: float
    alike: float = 0.0

    @classmethod
    def through(cls, levels: Sequence[float]) -> Line:
        """The error allows for noise in which neighbours are alike, as in a smoothed log: for residuals of an AR(1) process with
        correlation ρ the variance of a slope grows by (1+ρ)/(1-ρ), and as many fewer residuals count. Of so few the estimate
        of ρ is too low, by about (2+4ρ)/n for a fitted line (Marriott and Pope 1954), which is added back."""
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
        """The same line, with the error of noise whose neighbours are as much alike as that, where they are less so here."""
        if alike <= self.alike or not self.error:
            return self
        freedom = free(alike)
        return Line(self.middle, self.rise, self.error * math.sqrt(self.freedom / freedom), freedom, alike)

    @property
    def tells(self) -> bool:
        """Whether its error can be trusted."""
        return not self.error or self.alike <= ALIKE

    @property
    def falls(self) -> bool:
        """For certain."""
        return self.rise + self.doubt(CERTAIN_FALL) < 0

    def doubt(self, certainty: float) -> float:
        """How far the true rise may be off: its error times the quantile of Student's t that is as rare as the normal deviate
        `certainty`, by the approximation of Wallace (1959); within 5 % of it from 10 degrees of freedom on."""
        if not self.error:
            return 0.0
        freedom = self.freedom
        power = (certainty * (8 * freedom + 1) / (8 * freedom + 3)) ** 2 / freedom
        return self.error * math.sqrt(freedom * math.expm1(min(power, 50.0)))


def _climbs(levels: Sequence[float]) -> bool:
    """Each quarter lies above the one before."""
    quarter = BLOCKS // 4
    return all(a < b for a, b in pairwise(sum(levels[i : i + quarter]) for i in range(0, BLOCKS, quarter)))


def _never_falls(levels: Sequence[float]) -> bool:
    """But for one block. Then no noise has to be allowed for: of a curve that is no straight line the error is too large."""
    return sum(map(lt, levels, levels[1:])) >= BLOCKS - 2


def _never_rises(levels: Sequence[float]) -> bool:
    return sum(map(lt, levels[1:], levels)) >= BLOCKS - 2


def _centre(values: Sequence[float]) -> float:
    """The mean of the middle half (of three, the median): what lies far out does not count."""
    ordered, count = sorted(values), len(values)
    cut = (count + 1) // 4
    return sum(ordered[cut : count - cut]) / (count - 2 * cut)
