"""Prune when a loss or the gradient norm is NaN or Inf (note 000 §5.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tune_ssim.base.errors import check_field
from tune_ssim.guards.guard import Found, State, TableGuard
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records import LOSS, STEP_SKIPPED, TOTAL_NORM, Record
from tune_ssim.records.record_table import Table


@dataclass(frozen=True)
class NonFinite(TableGuard):
    """Checks every metric whose name starts with one of `prefixes`.

    Steps skipped by a GradScaler are normal in fp16, while it searches for the scale, and are not judged. More than
    `max_skipped` skipped steps in a row mean that the training no longer makes progress.
    """

    prefixes: tuple[str, ...] = ("loss", "total_norm")
    max_skipped: int = 20  # torch's GradScaler starts at 2**16 and halves at each skip: 16 skips reach a scale of 1

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by the study's loader)
    name = "non_finite"
    metrics = (f"{LOSS}*",)  # `loss`, or any loss term if the log has only those

    def __post_init__(self) -> None:
        check_field(bool(self.prefixes), "prefixes", "must name at least one metric", self.prefixes)
        check_field(self.max_skipped >= 1, "max_skipped", "must be >= 1", self.max_skipped)

    def init(self) -> State:
        return {"skipped": 0, "last_step": -1}

    def _advance(self, state: State, record: Record) -> Violation | None:
        values = record.values
        if values.get(STEP_SKIPPED):
            if record.step <= state["last_step"]:
                return None  # a step that is logged twice counts once
            state["skipped"] += 1
            state["last_step"] = record.step
            if state["skipped"] <= self.max_skipped:
                return None
            norm = values.get(TOTAL_NORM, math.inf)
            sentence = f"{state['skipped']} steps in a row were skipped for a non-finite gradient: the training no longer moves"
            return self._violation(record.step, TOTAL_NORM, norm, sentence)
        if LOSS in values or any(name.startswith(LOSS) for name in values):
            state["skipped"] = 0
            state["last_step"] = record.step
        if math.isfinite(sum(values.values())):  # then every value is finite
            return None
        for metric, value in sorted(values.items()):
            if metric.startswith(self.prefixes) and not math.isfinite(value):
                return self._violation(record.step, metric, value, f"{metric} is {value} at step {record.step}")
        return None

    def fold(self, state: State, table: Table) -> list[Found]:
        columns = {name: table.column(name) for name in table.metrics if name.startswith((LOSS, *self.prefixes))}
        judged = (column for name, column in columns.items() if column and name.startswith(self.prefixes))
        if STEP_SKIPPED in table.metrics or not all(column.all_finite for column in judged):
            return [(row, found) for row, record in enumerate(table) if (found := self._advance(state, record)) is not None]
        last = max((column.steps[-1] for name, column in columns.items() if column and name.startswith(LOSS)), default=None)
        if last is not None:
            state["skipped"], state["last_step"] = 0, last
        return []

    def _violation(self, step: int, metric: str, value: float, sentence: str) -> Violation:
        cause = "a step too large, or numbers that half precision cannot hold"
        remedy = "lower the learning rate, or the gain of an auxiliary loss; clip the gradient; compute losses in float32"
        return Violation(self.name, step, metric, value, math.inf, Action.PRUNE, sentence, remedy, cause)
