"""The first value of a metric, which shows how a run was set up before training could change it."""

from __future__ import annotations

from dataclasses import dataclass

from tune_ssim.guards.condition import Band
from tune_ssim.guards.guard import Found, State
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Table


@dataclass(frozen=True)
class FirstValue(Band):
    """Fires if the first value of `metric` is outside [`lower`, `upper`]. Later values are not judged (SEEDS D2, D3)."""

    action: Action = Action.ABORT

    @property
    def name(self) -> str:
        return f"first:{self.metric}"

    def init(self) -> State:
        return {"step": None, "value": None, "holds": False}

    def fold(self, state: State, table: Table) -> list[Found]:
        column = None if state["step"] is not None else table.column(self.metric)
        if column is None:
            return []
        value = column.values[0]
        state |= {"step": column.steps[0], "value": value, "holds": self.is_outside(value)}
        return [(column.rows[0], self.finding(state))] if state["holds"] else []

    def finding(self, state: State) -> Violation:
        return self.violation(state["step"], state["value"], f"{self.metric} starts at")
