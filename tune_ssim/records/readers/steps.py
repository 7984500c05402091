"""Merges the rows of a log into one record per step, with increasing steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tune_ssim.records import EPOCH, Record
from tune_ssim.records.metric_names import is_loss_like, is_norm_like
from tune_ssim.records.readers.parse_issues import ParseIssues
from tune_ssim.records.readers.step_counter import StepCounter
from tune_ssim.records.readers.values import MAX_STEP
from tune_ssim.records.record_table import Table

MAX_AHEAD = 8  # steps that may wait for earlier ones, so that one misread step does not suppress all later records
UNNUMBERED = 10  # rows without a step before rows are numbered instead: a config may be printed first

NUMBERED = "no step column: the rows are numbered from 1"
BY_EPOCH = "no step: the epochs are the steps"


class Steps:
    """`add` rows, `take` records. The newest step is pending until a later one appears, because a trainer may log one step in
    several rows.

    If a metric of a step is logged twice, the first value wins. Rows of steps that were already released are skipped and
    reported in `issues`: repeated lines change nothing, and a run that restarts from an older checkpoint counts again once
    it has passed the last step it had reached. A counter that begins again at each epoch is counted on, see `StepCounter`.
    A loss or a norm that is not finite is never skipped: it is added to the pending step.

    A step far ahead of the steps after it (a misread number, a line mixed from two writers) waits for them. In a log without
    steps, the epochs are the steps where each has one row, else rows are numbered from 1."""

    def __init__(self, issues: ParseIssues) -> None:
        self.issues = issues
        self._counter = StepCounter(issues)
        self.last = -1  # newest released step
        self._step = -1  # the pending step
        self._values: dict[str, float] = {}
        self._given: frozenset[str] | None = None  # metrics of the pending step that `release` returned early
        self._ahead: dict[int, dict[str, float]] = {}  # later steps that arrived before the pending one
        self._released: list[Record] = []
        self._parts: list[Sequence[Record]] = []  # batches released before `_released`
        self._rows: int | None = None  # rows numbered so far; None: the log has steps, or this is not known yet
        self._has_steps = False
        self._counts_epochs = False
        self._waiting: list[tuple[dict[str, float], int, str]] = []  # rows without a step, until it is known if the log has steps
        self._replayed_until = -1  # after a restart of the file, repeated steps up to here are expected
        self._broken: dict[str, float] = {}  # non-finite values of skipped rows, until there is a pending step

    def add(self, step: int | None, values: dict[str, float], line: int, text: str = "") -> None:
        """Adds a row, with the `line` it came from. Takes ownership of `values`."""
        if step is not None:
            step = self._counter.count(step, values.get(EPOCH), line)
        if step is None:
            self._without_step(values, line, text)
        elif step == self._step > self.last:  # else finish() has released it
            self._values.update({name: value for name, value in values.items() if name not in self._values})
            self.keep_broken(values, line)
        elif step == self._step and self._given is not None:
            self._values.update({name: value for name, value in values.items() if name not in self._given})
            self.keep_broken(values, line)
        elif step > self._step:
            if self._step < 0:
                self._knows_steps()
            self._release(step)
            if self._ahead and step in self._ahead:
                values = {**values, **self._ahead.pop(step)}
            self._step, self._values = step, {**values, **self._broken}
            self._broken = {}
        elif step > self.last and len(self._ahead) < MAX_AHEAD:
            self._ahead[self._step] = self._values
            self._step, self._values = step, values
        elif step > self._replayed_until:
            self.issues.repeat(line, step, self._step)
            self.keep_broken(values, line)

    def exact(self, step: int, unit: int) -> int:
        """See `StepCounter.exact`."""
        return self._counter.exact(step, unit)

    def keep_broken(self, values: Mapping[str, float], line: int) -> None:
        """Keeps the losses and norms of a skipped row that are not finite, as values of the pending step."""
        for name, value in values.items():
            if math.isfinite(value) or not (is_norm_like(name) or is_loss_like(name)):
                continue
            if math.isfinite(self._values.get(name, 0.0)) and name not in self._broken:
                self.issues.keep(line, name, value)
                (self._values if self.held() is not None else self._broken)[name] = value

    def add_table(self, table: Table) -> bool:
        """Adds many rows at once if their steps strictly increase. False: nothing was added; add them one by one."""
        if self._ahead or self._broken or self._waiting or self._counter.earlier_steps:
            return False
        if len(table) < 2 or table.steps[0] <= max(self._step, self.last) or not table.grows:
            return False
        epochs = table.column(EPOCH)
        self._counter.advance(table.steps, epochs.values[-1] if epochs else None)
        if self._step < 0:
            self._knows_steps()
        self._release(table.steps[0])
        self._close_batch()
        self._parts.append(table[:-1])
        self.last = table.steps[-2]
        held = table[len(table) - 1]
        self._step, self._values = held.step, dict(held.values)
        return True

    def take(self) -> list[Record]:
        """Complete records since the last call."""
        return [record for part in self.take_batches() for record in part]

    def take_batches(self) -> list[Sequence[Record]]:
        """Like `take`, but as batches; records that arrived as a table stay a table."""
        self._close_batch()
        parts, self._parts = self._parts, []
        return parts

    def _close_batch(self) -> None:
        if self._released:
            self._parts.append(self._released)
            self._released = []

    def held(self) -> int | None:
        """The pending step, or None."""
        return self._step if self._step > self.last or (self._given is not None and self._values) else None

    def release(self) -> list[Record]:
        """Releases the pending step. Later rows of it become another record of the same step, with only the new metrics."""
        if self.held() is not None:
            given = (self._given or frozenset()) | set(self._values)
            self._release(self._step + 1)
            self._values, self._given = {}, given
        return self.take()

    def finish(self) -> list[Record]:
        """All remaining records, including the pending step."""
        if self._waiting and _are_epochs(self._waiting):
            self._count_epochs()
        elif self._waiting:
            self.number_rows()
        self._release(MAX_STEP + 1)
        return self.take()

    def number_rows(self) -> None:
        """Numbers the rows from 1, for a log without steps."""
        if self._rows is not None:
            return
        self._rows = 0
        self._take_waiting(NUMBERED)

    def _count_epochs(self) -> None:
        self._counts_epochs = True
        self._take_waiting(BY_EPOCH)

    def _take_waiting(self, note: str) -> None:
        self.issues.note(note)
        waiting, self._waiting = self._waiting, []
        for values, line, text in waiting:
            self._without_step(values, line, text)

    def discard(self) -> None:
        """Discards the rows that are not released yet."""
        self._step, self._values, self._ahead, self._waiting = self.last, {}, {}, []
        self._rows, self._counts_epochs = None, False
        self.issues.notes = [note for note in self.issues.notes if note not in (NUMBERED, BY_EPOCH)]

    def begin_anew(self) -> None:
        """Restarts at the beginning of the log; rows up to the current step will be repeated."""
        self._replayed_until = max(self._step, *self._ahead, self.last)
        self._counter.begin_anew()
        if self._rows is not None:
            self._rows = 0

    def _release(self, before: int) -> None:
        """Releases the pending step, and later steps below `before`."""
        if self.held() is not None:  # otherwise finish() has already released it
            self._released.append(Record(self._step, self._values))
            self.last = self._step
        self._given = None
        for step in sorted(step for step in self._ahead if step < before) if self._ahead else ():
            self._released.append(Record(step, self._ahead.pop(step)))
            self._step = self.last = step

    def _without_step(self, values: dict[str, float], line: int, text: str) -> None:
        if self._rows is not None:
            self._rows += 1
            self.add(self._rows, values, line)
        elif self._counts_epochs and _epoch_of(values) is not None:
            self.add(_epoch_of(values), values, line)
        elif self._has_steps:
            self._leave(values, line, text)
        else:
            self._waiting.append((values, line, text[:100]))
            if _are_epochs(self._waiting):
                if _epoch_of(values) != _epoch_of(self._waiting[0][0]):
                    self._count_epochs()
            elif len(self._waiting) >= UNNUMBERED:
                self.number_rows()

    def _leave(self, values: Mapping[str, float], line: int, text: str) -> None:
        """Leaves out a row without a step in a log that has steps. That of an epoch as a whole is nothing unusual."""
        if _epoch_of(values) is None:
            self.issues.skip(line, text, "no step")
        self.keep_broken(values, line)

    def _knows_steps(self) -> None:
        """Called at the first step: earlier rows without a step were not rows of the training."""
        self._has_steps = True
        for row in self._waiting:
            self._leave(*row)
        self._waiting = []


def _epoch_of(values: Mapping[str, float]) -> int | None:
    epoch = values.get(EPOCH, math.nan)
    return int(epoch) if math.isfinite(epoch) and epoch >= 0 and epoch == int(epoch) else None


def _are_epochs(rows: Sequence[tuple[Mapping[str, float], int, str]]) -> bool:
    """Whether each epoch has one row, or several with different losses."""
    latest, seen = -1, set[str]()
    for values, _, _ in rows:
        epoch, losses = _epoch_of(values), set(filter(is_loss_like, values))
        if epoch is None or epoch < latest or (epoch == latest and losses & seen):
            return False
        seen = losses | seen if epoch == latest else losses
        latest = epoch
    return True
