"""Prune when a loss or the gradient norm is NaN or Inf (note 000 §5.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tune_ssim.base.errors import check_field
from tune_ssim.guards.guard import Found, State, TableGuard
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records import LOSS, STEP_SKIPPED, TOTAL_NORM, Record
from tune_ssim.records.metric_names import is_loss_like
from tune_ssim.records.record_table import Table

DEFAULT_PREFIXES = (LOSS, TOTAL_NORM)


@dataclass(frozen=True)
class NonFinite(TableGuard):
    """Checks every metric whose name starts with one of `prefixes`, and, with the default, every other loss by its name
    (`val_loss`, `kl_loss`, `nll`; see `is_loss_like`).

    Steps skipped by a GradScaler are normal in fp16, while it searches for the scale, and are not judged. More than
    `max_skipped` skipped steps in a row mean that the training no longer makes progress. A log may not say which steps were
    skipped: infinite norms before the first finite one, with finite losses, are taken for such steps.
    """

    prefixes: tuple[str, ...] = DEFAULT_PREFIXES  # of the metrics that are judged
    max_skipped: int = 20  # torch's GradScaler starts at 2**16 and halves at each skip: 16 skips reach a scale of 1

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by the study's loader)
    name = "non_finite"
    metrics = (f"{LOSS}*",)  # `loss`, or any loss term if the log has only those

    def __post_init__(self) -> None:
        check_field(bool(self.prefixes), "prefixes", "must name at least one metric", self.prefixes)
        check_field(self.max_skipped >= 1, "max_skipped", "must be >= 1", self.max_skipped)

    def judges(self, metric: str) -> bool:
        return metric.startswith(self.prefixes) or (self.prefixes == DEFAULT_PREFIXES and is_loss_like(metric))

    def init(self) -> State:
        """skipped: steps in a row. infinite: norms before the first finite one, which sets norm_seen."""
        return {"skipped": 0, "last_step": -1, "infinite": 0, "norm_seen": False}

    def _advance(self, state: State, record: Record) -> Violation | None:
        values = record.values
        norm = values.get(TOTAL_NORM)
        if norm is not None and math.isfinite(norm):
            state["norm_seen"] = True
        broken = self._broken(values) if not math.isfinite(sum(values.values())) else []
        is_silent = STEP_SKIPPED not in values and not state["norm_seen"]
        searches_scale = is_silent and broken == [TOTAL_NORM] and norm == math.inf
        if values.get(STEP_SKIPPED) or searches_scale:
            if record.step <= state["last_step"]:
                return None  # a step that is logged twice counts once
            state["skipped"] += 1
            state["infinite"] += searches_scale
            state["last_step"] = record.step
            if state["skipped"] <= self.max_skipped:
                return None
            sentence = f"{state['skipped']} steps in a row were skipped for a non-finite gradient: the training no longer moves"
            return self._violation(record.step, TOTAL_NORM, math.inf if norm is None else norm, sentence)
        if any(map(is_loss_like, values)):
            state["skipped"] = 0
            state["last_step"] = record.step
        if not broken:
            return None
        metric = broken[0]
        return self._violation(record.step, metric, values[metric], f"{metric} is {values[metric]} at step {record.step}")

    def _broken(self, values: Mapping[str, float]) -> list[str]:
        """The judged metrics that are not finite, those named by a prefix first."""
        found = [metric for metric, value in values.items() if not math.isfinite(value) and self.judges(metric)]
        return sorted(found, key=lambda metric: (not metric.startswith(self.prefixes), metric))

    def fold(self, state: State, table: Table) -> list[Found]:
        judged = [column for name in table.metrics if self.judges(name) and (column := table.column(name))]
        if STEP_SKIPPED in table.metrics or not all(column.all_finite for column in judged):
            return [(row, found) for row, record in enumerate(table) if (found := self._advance(state, record)) is not None]
        last = max(
            (column.steps[-1] for name in table.metrics if is_loss_like(name) and (column := table.column(name))), default=None
        )
        if last is not None:
            state["skipped"], state["last_step"] = 0, last
        if TOTAL_NORM in table.metrics:
            state["norm_seen"] = True
        return []

    def unjudged(self, state: State) -> str | None:
        if state["infinite"] and not state["norm_seen"]:
            return f"guard '{self.name}' saw no finite {TOTAL_NORM}: it is infinite in {state['infinite']} records"
        return None

    def remark(self, state: State) -> str:
        """A note on infinite norms that were not judged; empty if there were none."""
        if not state["infinite"] or not state["norm_seen"]:
            return ""
        first = "norm is" if state["infinite"] == 1 else f"{state['infinite']} norms are"
        return f"the first {first} infinite: normal in fp16, where the gradient scaler first searches its scale"

    def _violation(self, step: int, metric: str, value: float, sentence: str) -> Violation:
        cause = "a step too large, or numbers that half precision cannot hold"
        remedy = "lower the learning rate, or the gain of an auxiliary loss; clip the gradient; compute losses in float32"
        return Violation(self.name, step, metric, value, math.inf, Action.PRUNE, sentence, remedy, cause)
