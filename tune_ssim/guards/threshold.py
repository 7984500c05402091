"""Bounds for a metric or for the ratio of two metrics."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from tune_ssim.guards.condition import as_action, check_band, check_count, describe_band, measured_column
from tune_ssim.guards.guard import Found, State, TableGuard
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Table


@dataclass(frozen=True)
class Threshold(TableGuard):
    """Fires after `patience` consecutive records with `metric` outside [`lower`, `upper`]. NaN counts as outside.

    over: another metric; judge the ratio of the two. steps: the consecutive records must also span this many training steps,
    regardless of the logging interval. after: steps before it are not judged.
    """

    metric: str
    lower: float = -math.inf
    upper: float = math.inf
    patience: int = 1
    action: Action = Action.PRUNE
    over: str | None = None
    steps: int = 1
    after: int = 0

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by the study's loader)

    def __post_init__(self) -> None:
        check_band(self.lower, self.upper)
        check_count("patience", self.patience)
        object.__setattr__(self, "action", as_action(self.action))
        check_count("steps", self.steps)
        check_count("after", self.after, minimum=0)

    @property
    def name(self) -> str:
        return f"threshold:{self._what}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,) if self.over is None else (self.metric, self.over)

    def init(self) -> State:
        """outside: consecutive records out of bounds so far. since, value: step of the first and value of the latest of them.
        records: number of all records, from `first_step` to `last_step`."""
        return {
            "outside": 0, "since": 0, "value": None, "holds": False,
            "records": 0, "first_step": None, "last_step": self.after - 1,
        }  # fmt: skip

    def fold(self, state: State, table: Table) -> list[Found]:
        column = measured_column(table, self.metric, self.over)
        begin = 0 if column is None else bisect_right(column.steps, state["last_step"])
        if column is None or begin == len(column):
            return []
        if state["first_step"] is None:
            state["first_step"] = column.steps[begin]
        state["records"] += len(column) - begin
        found, looked_at = [], begin - 1
        for at in column.outside(self.lower, self.upper, begin):
            if at > looked_at + 1:
                state["outside"], state["holds"] = 0, False
            looked_at = at
            state["last_step"] = column.steps[at]
            violation = self._outside(state, column.steps[at], column.values[at])
            if violation is not None:
                found.append((column.rows[at], violation))
        if looked_at < len(column) - 1:
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
        value = state["value"]
        limit = self.lower if value < self.lower or self.upper == math.inf else self.upper
        sentence = f"{self._what} is {value:.4g}, {describe_band(self.lower, self.upper)}"
        if self.steps > 1:
            sentence += f", in every record of {state['last_step'] - state['since'] + 1} steps"
        elif self.patience > 1:
            sentence += f", {state['outside']} records in a row"
        return Violation(self.name, state["last_step"], self.metric, value, limit, self.action, sentence)

    def unjudged(self, state: State) -> str | None:
        """Why the log is too short for this guard to fire, or None."""
        begun = "" if not self.after else f" after step {self.after}"
        if not state["records"]:
            return f"{self._what} has no record{begun}"
        spanned = state["last_step"] - state["first_step"] + 1
        if spanned < self.steps:
            return f"{self.steps} steps in a row are needed{begun}; the log has {spanned}"
        if state["records"] < self.patience:
            return f"{self.patience} records in a row are needed{begun}; the log has {state['records']}"
        return None

    @property
    def _what(self) -> str:
        return self.metric if self.over is None else f"{self.metric} / {self.over}"
