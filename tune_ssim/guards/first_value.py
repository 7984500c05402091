"""The first value of a metric, which shows how a run was set up before training could change it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tune_ssim.guards.condition import as_action, check_band, describe_band
from tune_ssim.guards.guard import Found, State, TableGuard
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Table


@dataclass(frozen=True)
class FirstValue(TableGuard):
    """Fires if the first value of `metric` is outside [`lower`, `upper`]. Later values are not judged (SEEDS D2, D3)."""

    metric: str
    lower: float = -math.inf
    upper: float = math.inf
    action: Action = Action.ABORT

    def __post_init__(self) -> None:
        check_band(self.lower, self.upper)
        object.__setattr__(self, "action", as_action(self.action))

    @property
    def name(self) -> str:
        return f"first:{self.metric}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def init(self) -> State:
        return {"step": None, "value": None, "holds": False}

    def fold(self, state: State, table: Table) -> list[Found]:
        column = None if state["step"] is not None else table.column(self.metric)
        if column is None:
            return []
        value = column.values[0]
        state |= {"step": column.steps[0], "value": value, "holds": not self.lower <= value <= self.upper}
        return [(column.rows[0], self.finding(state))] if state["holds"] else []

    def finding(self, state: State) -> Violation:
        value = state["value"]
        limit = self.lower if value < self.lower or self.upper == math.inf else self.upper
        sentence = f"{self.metric} starts at {value:.4g}, {describe_band(self.lower, self.upper)}"
        return Violation(self.name, state["step"], self.metric, value, limit, self.action, sentence)

    def unjudged(self, state: State) -> str | None:
        return None
