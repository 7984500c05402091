"""Finds a loss that is no longer logged: a NaN may be written as an empty cell or as null."""

from __future__ import annotations

from dataclasses import dataclass
from operator import sub

from tune_ssim.records.readers.parse_issues import EmptyRows
from tune_ssim.records.record_table import Column, Table

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
