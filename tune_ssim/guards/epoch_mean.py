"""The mean of a metric over each epoch, as printed by a training script at the end of an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tune_ssim.base.errors import check_field
from tune_ssim.guards.condition import Band
from tune_ssim.guards.guard import Found, State
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records import EPOCH, Record
from tune_ssim.records.record_table import Table


@dataclass(frozen=True)
class EpochMean(Band):
    """Fires when the mean of `metric` over an epoch is outside [`lower`, `upper`] (SEEDS D1). NaN counts as outside.

    The epoch comes from the metric `epoch` (2.7 is in epoch 2), or from the step if `steps_per_epoch` is set. An epoch is
    judged once it has as many records as the previous one, or at the first record of the next epoch.
    epoch: judge only this epoch, counting from 1 at the start of the log.
    """

    action: Action = Action.ABORT
    epoch: int | None = None
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epoch", "steps_per_epoch"):
            count = vars(self)[name]
            check_field(count is None or count >= 1, name, "must be >= 1", count)

    @property
    def name(self) -> str:
        return f"epoch_mean:{self.metric}" + ("" if self.epoch is None else f":{self.epoch}")

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,) if self.steps_per_epoch else (self.metric, EPOCH)

    def init(self) -> State:
        """number: epochs in the log so far. label: the log's number of the current epoch. length: records of the previous epoch.
        judged, value: number and mean of the latest judged epoch."""
        return {
            "number": 0, "label": None, "sum": 0.0, "count": 0, "length": 0,
            "last_step": -1, "judged": 0, "value": None, "holds": False,
        }  # fmt: skip

    def fold(self, state: State, table: Table) -> list[Found]:
        return [(row, found) for row, record in enumerate(table) if (found := self._advance(state, record)) is not None]

    def _advance(self, state: State, record: Record) -> Violation | None:
        value = record.values.get(self.metric)
        if value is None or record.step <= state["last_step"]:
            return None
        label = self._label(record)
        if label is None:
            return None
        held = state["holds"]
        if label != state["label"]:
            if state["judged"] != state["number"]:
                self._judge(state)  # the epoch ended with fewer records than the previous one
            state |= {"number": state["number"] + 1, "label": label, "sum": 0.0, "count": 0, "length": state["count"]}
        state["sum"] += value
        state["count"] += 1
        state["last_step"] = record.step
        if state["count"] == state["length"]:
            self._judge(state)
        return self.finding(state) if state["holds"] and not held else None

    def _label(self, record: Record) -> float | None:
        if self.steps_per_epoch is not None:
            return record.step // self.steps_per_epoch
        epoch = record.values.get(EPOCH)
        return None if epoch is None or not math.isfinite(epoch) else math.floor(epoch)

    def _judge(self, state: State) -> None:
        mean = state["sum"] / state["count"]
        about = self.epoch is None or self.epoch == state["number"]
        state |= {"judged": state["number"], "value": mean, "holds": about and self.is_outside(mean)}

    def finding(self, state: State) -> Violation:
        subject = f"the mean of {self.metric} over epoch {state['judged']} is"
        return self.violation(state["last_step"], state["value"], subject)

    def unjudged(self, state: State) -> str | None:
        if self.epoch is not None and state["judged"] >= self.epoch:
            return None
        if self.epoch is None and state["judged"] == state["number"] > 0:
            return None
        if self.epoch is not None:
            return f"epoch {self.epoch} was not reached, or not over, at the end of the log"
        mean = f"; its mean so far is {state['sum'] / state['count']:.4g}" if state["count"] else ""
        return f"epoch {state['number']} was not over at the end of the log{mean}"
