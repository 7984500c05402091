"""The mean of a noisy metric over a window of steps, for metrics of which single records may cross a limit by chance."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from tune_ssim.base.errors import check_field
from tune_ssim.guards.condition import RatioBand
from tune_ssim.guards.guard import Found, State
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Table

BLOCKS = 20  # blocks per window, as in `Trend`; the window advances by one block


@dataclass(frozen=True)
class MovingMean(RatioBand):
    """Fires when the mean of `metric` over the last `steps` training steps is outside [`lower`, `upper`]. NaN counts as outside.

    over: judge the mean of the ratio. The window has BLOCKS blocks of steps/BLOCKS steps, or of one record if the training logs
    less often, so it may span more steps.
    from_start: if the mean of the first window is within the bounds, later windows are not judged, and neither is a log that
    starts after `steps`. (For a learning rate that decays to zero.)
    """

    steps: int = 200  # note 002 §7
    action: Action = Action.WARN
    from_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self.steps >= BLOCKS, "steps", f"must be >= {BLOCKS}", self.steps)

    @property
    def name(self) -> str:
        return f"moving_mean:{self.quantity}"

    def init(self) -> State:
        """sum, count: of the current block, which ends before step `end`. sums, counts, starts: of the latest BLOCKS complete
        blocks, oldest first. value, until: mean and last step of the latest judged window. over: with `from_start`, judging
        is finished."""
        return {
            "sum": 0.0, "count": 0, "start": 0, "end": -1, "sums": [], "counts": [], "starts": [],
            "last_step": self.after - 1, "until": -1, "value": None, "holds": False, "over": False,
        }  # fmt: skip

    def fold(self, state: State, table: Table) -> list[Found]:
        column = self.column(table)
        if column is None:
            return []
        found, begin, count = [], bisect_right(column.steps, state["last_step"]), len(column.steps)
        while begin < count:
            if column.steps[begin] >= state["end"]:
                violation = self._close(state, column.steps[begin])
                if violation is not None:
                    found.append((column.rows[begin], violation))
            end = bisect_left(column.steps, state["end"], begin + 1)
            total = state["sum"]
            for value in column.values[begin:end]:
                total += value
            state["sum"], state["count"], state["last_step"] = total, state["count"] + end - begin, column.steps[end - 1]
            begin = end
        return found

    def _close(self, state: State, step: int) -> Violation | None:
        """Closes the block before this step, and judges the window that ends with it."""
        held = state["holds"]
        if state["count"]:
            for name, value in (("sums", state["sum"]), ("counts", state["count"]), ("starts", state["start"])):
                state[name].append(value)
                del state[name][:-BLOCKS]
            if len(state["sums"]) == BLOCKS and not state["over"]:
                state |= {"value": sum(state["sums"]) / sum(state["counts"]), "until": state["last_step"]}
                state["holds"] = self.is_outside(state["value"])
                state["over"] = self.from_start and not state["holds"]
        elif self.from_start:
            state["over"] = step > self.after + self.steps
        state |= {"sum": 0.0, "count": 0, "start": step, "end": step + self.steps / BLOCKS, "last_step": step}
        return self.finding(state) if state["holds"] and not held else None

    def finding(self, state: State) -> Violation:
        subject = f"the mean of {self.quantity} over steps {state['starts'][0]}-{state['until']} is"
        return self.violation(state["last_step"], state["value"], subject)

    def unjudged(self, state: State) -> str | None:
        if state["value"] is None and state["over"]:
            return f"what counts are the first {self.steps} steps; the log begins later"
        if state["value"] is None:
            return f"a mean over {self.steps} steps needs {BLOCKS} records that span them{self.begun}; the log ends before"
        return None
