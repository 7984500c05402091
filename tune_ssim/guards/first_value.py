"""The first value of a metric: what it is before training could have changed it says how the run was set up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from tune_ssim.guards.condition import band_words, check_action, check_band
from tune_ssim.guards.guard import Fold, Found, InPlace, State
from tune_ssim.guards.violation import Action, Violation
from tune_ssim.records import Record
from tune_ssim.records.record_table import Table


@dataclass(frozen=True)
class FirstValue(InPlace):
    """Fires if the first record of `metric` has it outside [`lower`, `upper`], and never afterwards (SEEDS D2, D3)."""

    metric: str
    lower: float = -math.inf
    upper: float = math.inf
    action: Action = "abort"

    def __post_init__(self) -> None:
        check_band(self.lower, self.upper)
        check_action(self.action)

    @property
    def name(self) -> str:
        return f"first:{self.metric}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def init(self) -> State:
        return {"step": None, "value": None, "holds": False}

    def bound(self, state: State) -> Fold:
        return partial(self._advance, state)

    def fold_table(self, state: State, table: Table) -> list[Found]:
        column = None if state["step"] is not None else table.column(self.metric)
        if column is None:
            return []
        violation = self._advance(state, table[column.rows[0]])
        return [] if violation is None else [(column.rows[0], violation)]

    def _advance(self, state: State, record: Record) -> Violation | None:
        if state["step"] is not None:
            return None
        value = record.values.get(self.metric)
        if value is None:
            return None
        state |= {"step": record.step, "value": value, "holds": not self.lower <= value <= self.upper}
        return self.finding(state) if state["holds"] else None

    def finding(self, state: State) -> Violation:
        value = state["value"]
        limit = self.lower if value < self.lower or self.upper == math.inf else self.upper
        sentence = f"{self.metric} starts at {value:.4g}, {band_words(self.lower, self.upper)}"
        return Violation(self.name, state["step"], self.metric, value, limit, self.action, sentence)

    def unjudged(self, state: State) -> str | None:
        return None
