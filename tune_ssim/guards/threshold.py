"""Bounds for a metric or for the ratio of two metrics."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from tune_ssim.base.errors import check_field
from tune_ssim.guards.condition import RatioBand
from tune_ssim.guards.guard import Found, State
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Table


@dataclass(frozen=True)
class Threshold(RatioBand):
    """Fires after `patience` consecutive records with `metric` outside [`lower`, `upper`]. NaN counts as outside.

    steps: the consecutive records must also span this many training steps, regardless of the logging interval.
    """

    patience: int = 1  # records in a row
    action: Action = Action.PRUNE  # what a study does
    steps: int = 1

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by the study's loader)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self.patience >= 1, "patience", "must be >= 1", self.patience)
        check_field(self.steps >= 1, "steps", "must be >= 1", self.steps)

    @property
    def name(self) -> str:
        return f"threshold:{self.quantity}"

    def init(self) -> State:
        """outside: consecutive records out of bounds so far. since, value: step of the first and value of the latest of them.
        records: number of all records, from `first_step` to `last_step`."""
        return {
            "outside": 0, "since": 0, "value": None, "holds": False,
            "records": 0, "first_step": None, "last_step": self.after - 1,
        }  # fmt: skip

    def fold(self, state: State, table: Table) -> list[Found]:
        column = self.column(table)
        begin = 0 if column is None else bisect_right(column.steps, state["last_step"])
        if column is None or begin == len(column.steps):
            return []
        if state["first_step"] is None:
            state["first_step"] = column.steps[begin]
        state["records"] += len(column.steps) - begin
        found, looked_at, lower, upper = [], begin - 1, self.lower, self.upper
        outside = [at for at, value in enumerate(column.values) if not lower <= value <= upper]  # NaN counts
        for at in outside[bisect_left(outside, begin) :]:
            if at > looked_at + 1:
                state["outside"], state["holds"] = 0, False
            looked_at = at
            state["last_step"] = column.steps[at]
            violation = self._outside(state, column.steps[at], column.values[at])
            if violation is not None:
                found.append((column.rows[at], violation))
        if looked_at < len(column.steps) - 1:
            state["outside"], state["holds"] = 0, False
            state["last_step"] = column.steps[-1]
        return found

    def _outside(self, state: State, step: int, value: float) -> Violation | None:
        if not state["outside"]:
            state["since"] = step
        state["outside"] += 1
        state["value"] = value
        if state["holds"] or state["outside"] < self.patience or step - state["since"] + 1 < self.steps:
            return None
        state["holds"] = True
        return self.finding(state)

    def finding(self, state: State) -> Violation:
        detail = ""
        if self.steps > 1:
            detail = f", in every record of {state['last_step'] - state['since'] + 1} steps"
        elif self.patience > 1:
            detail = f", {state['outside']} records in a row"
        return self.violation(state["last_step"], state["value"], f"{self.quantity} is", detail)

    def unjudged(self, state: State) -> str | None:
        if not state["records"]:
            return f"{self.quantity} has no record{self.begun}"
        spanned = state["last_step"] - state["first_step"] + 1
        if spanned < self.steps:
            return f"{self.steps} steps in a row are needed{self.begun}; the log has {spanned}"
        if state["records"] < self.patience:
            return f"{self.patience} records in a row are needed{self.begun}; the log has {state['records']}"
        return None
