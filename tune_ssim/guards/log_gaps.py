"""Finds what a training does not report or no guard judges: a loss that is no longer logged, other metrics that are not finite."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from operator import sub
from typing import Any

from tune_ssim.records import LOSS
from tune_ssim.records.metric_names import is_held_out, is_loss_like
from tune_ssim.records.readers.parse_issues import EmptyRows
from tune_ssim.records.record_table import Column, Table

MAX_NOTES = 12  # metrics that are not finite, named in notes
# Records without the loss at the end of a log that may be a test after the training.
MIN_MISSING = 10
# A loss is missing if it is absent for this many times the longest distance of two records with it: a producer may log it every
# n-th record (Lightning's CSV).
MISSING_DISTANCES = 2


@dataclass
class Presence:
    """Where a metric was last seen. Rows count from the beginning of the log."""

    last: int = -1
    distance: int = 1  # the longest between two records with it
    next_step: int | None = None  # the step of the first record after the last one with it

    def add(self, table: Table, column: Column | None, before: int) -> None:
        """before: rows before this table."""
        if column is None:
            if self.last >= 0 and self.next_step is None:
                self.next_step = table.steps[0]
            return
        rows = column.rows
        if self.last >= 0:
            self.distance = max(self.distance, before + rows[0] - self.last)
        if len(rows) < len(table):
            self.distance = max(self.distance, max(map(sub, rows[1:], rows), default=1))
        self.last = before + rows[-1]
        self.next_step = table.steps[rows[-1] + 1] if rows[-1] + 1 < len(table) else None

    def doubt(self, metric: str, records: int, empty: EmptyRows) -> str | None:
        """Why a log whose loss stopped is not healthy; None if it is there to the end. records: of the whole log."""
        missing = records - 1 - self.last + empty.count
        step = empty.first_step if self.next_step is None else self.next_step
        distance = max(self.distance, empty.longest + 1)
        if self.last < 0 or step is None or missing < max(MIN_MISSING, MISSING_DISTANCES * distance):
            return None
        return f"{metric} is missing in {missing} of {records + empty.count} records, from step {step} on"


class LossPresence:
    """The training losses in a stream of records, and whether they are reported to its end. A NaN may be written as an empty
    cell, or be left out."""

    def __init__(self) -> None:
        self.records = 0
        self._losses: dict[str, Presence] = {}

    def add(self, table: Table) -> None:
        for name in table.metrics:
            if name not in self._losses and is_training_loss(name):
                self._losses[name] = Presence()
        for name, presence in self._losses.items():
            presence.add(table, table.column(name), self.records)
        self.records += len(table)

    def __contains__(self, metric: str) -> bool:
        return metric in self._losses

    @property
    def all_end_early(self) -> bool:
        """Whether no loss is reported to the end; False if there was none."""
        doubts = [one.doubt(name, self.records, EmptyRows()) for name, one in self._losses.items()]
        return bool(doubts) and None not in doubts

    def doubts(self, empty: EmptyRows | None = None) -> Iterator[str]:
        """The loss, or else every loss term, that is no longer reported at the end. empty: the rows without a number."""
        for name in [LOSS] if LOSS in self._losses else self._losses:
            if sentence := self._losses[name].doubt(name, self.records, empty or EmptyRows()):
                yield sentence

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.records, "losses": {name: asdict(one) for name, one in self._losses.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.records = state["records"]
        self._losses = {name: Presence(**one) for name, one in state["losses"].items()}


def is_training_loss(metric: str) -> bool:
    return is_loss_like(metric) and not is_held_out(metric)


class NotFinite:
    """Finds NaN and Inf in the metrics that no guard checks for them."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}  # metric → its first value that is not finite, and the step
        self._broken: Counter[str] = Counter()  # records in which it is not finite
        self._records: Counter[str] = Counter()  # records that have it

    def add(self, table: Table, metrics: Iterable[str]) -> None:
        for metric in metrics:
            column = table.column(metric)
            if column is None:
                continue
            self._records[metric] += len(column.values)
            if not column.all_finite:
                is_finite = list(map(math.isfinite, column.values))
                first = is_finite.index(False)
                self._first.setdefault(metric, (column.values[first], column.steps[first]))
                self._broken[metric] += is_finite.count(False)

    def notes(self) -> Iterator[str]:
        for metric, (value, step) in islice(self._first.items(), MAX_NOTES):
            yield f"{metric} is {value} in {self._broken[metric]} of {self._records[metric]} records, from step {step}, not judged"
        if len(self._first) > MAX_NOTES:
            yield f"{len(self._first) - MAX_NOTES} more metrics are not finite, not judged"
