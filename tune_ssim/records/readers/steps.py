"""Records from the rows of a log: rows of one step are merged, and steps only increase."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tune_ssim.records import Record
from tune_ssim.records.readers.parse_issues import ParseIssues
from tune_ssim.records.readers.values import MAX_STEP
from tune_ssim.records.record_table import Table

AHEAD = 8  # steps that wait until the others have reached them; one that was misread must not silence the rest
UNNUMBERED = 10  # rows without a step that are waited for before they are numbered: a config may be printed first

NUMBERED = "no step column: the rows are numbered from 1"


class Steps:
    """`add` rows, `take` records. The newest step is held back until a later one appears, since a trainer may log one
    step in several rows.

    If a value of a step is logged twice, the first one wins. A row of a step that was released already is skipped, and
    `issues` reports it: lines that come twice change nothing, and a run that restarts from an older checkpoint counts
    again once it has passed the step it had reached before.

    A step far ahead of the steps after it (a misread number, a line of two writers) waits for them. A log without
    steps has its rows numbered from 1."""

    def __init__(self, issues: ParseIssues) -> None:
        self.issues = issues
        self.last = -1  # newest step that was released
        self._step = -1  # held back
        self._values: dict[str, float] = {}
        self._given: frozenset[str] | None = None  # metrics of that step that `release` gave before they had to be
        self._ahead: dict[int, dict[str, float]] = {}  # later steps that came before it
        self._released: list[Record] = []
        self._parts: list[Sequence[Record]] = []  # released before these
        self._rows: int | None = None  # counted so far, of a log without steps; None: it has steps, or is not known yet
        self._has_steps = False
        self._waiting: list[tuple[dict[str, float], int, str]] = []  # rows without a step, while it is not known
        self._heard_up_to = -1  # after the file began anew: what comes again is expected

    def add(self, step: int | None, values: dict[str, float], line: int, text: str = "") -> None:
        """A row in its order, with the `line` it came from. Keeps `values`, which may change later."""
        if step is None:
            self._without_step(values, line, text)
        elif step == self._step > self.last:  # else finish() has released it
            for name, value in values.items():
                self._values.setdefault(name, value)
        elif step == self._step and self._given is not None:
            self._values.update({name: value for name, value in values.items() if name not in self._given})
        elif step > self._step:
            if self._step < 0:
                self._knows_steps()
            self._release(step)
            if self._ahead and step in self._ahead:
                values = {**values, **self._ahead.pop(step)}
            self._step, self._values = step, values
        elif step > self.last and len(self._ahead) < AHEAD:
            self._ahead[self._step] = self._values
            self._step, self._values = step, values
        else:
            if step > self._heard_up_to:
                self.issues.repeat(line, step, self._step)

    def add_table(self, table: Table) -> bool:
        """Many rows at once, if each has a later step than the one before; False: they have to be added one by one."""
        if len(table) < 2 or self._ahead or table.steps[0] <= max(self._step, self.last) or not table.grows:
            return False
        if self._step < 0:
            self._knows_steps()
        if self.held() is not None and self._given is None and not self._released and tuple(self._values) == table.metrics:
            table = table.behind(Record(self._step, self._values))  # one part, not two
        else:
            self._release(table.steps[0])
            self._part()
        self._parts.append(table[:-1])
        self.last = table.steps[-2]
        held = table[len(table) - 1]
        self._step, self._values = held.step, dict(held.values)
        return True

    def take(self) -> list[Record]:
        """What is complete and was not taken yet."""
        return [record for part in self.take_batches() for record in part]

    def take_batches(self) -> list[Sequence[Record]]:
        """The same, those that came together as one table."""
        self._part()
        parts, self._parts = self._parts, []
        return joined(parts) if len(parts) > 1 else parts

    def _part(self) -> None:
        if self._released:
            self._parts.append(self._released)
            self._released = []

    def held(self) -> int | None:
        """The step that is held back."""
        return self._step if self._step > self.last or (self._given is not None and self._values) else None

    def release(self) -> list[Record]:
        """The step that is held back, and no longer: rows of it that come yet make a further record of the same step, of the
        metrics that it did not have."""
        if self.held() is not None:
            given = (self._given or frozenset()) | set(self._values)
            self._release(self._step + 1)
            self._values, self._given = {}, given
        return self.take()

    def finish(self) -> list[Record]:
        """The rest, with the step that was held back."""
        if self._waiting:
            self.number_rows()
        self._release(MAX_STEP + 1)
        return self.take()

    def number_rows(self) -> None:
        """This log has no steps."""
        if self._rows is not None:
            return
        self._rows = 0
        self.issues.note(NUMBERED)
        waiting, self._waiting = self._waiting, []
        for values, line, text in waiting:
            self._without_step(values, line, text)

    def forget(self) -> None:
        """The rows that were not released yet were none."""
        self._step, self._values, self._ahead, self._waiting = self.last, {}, {}, []
        self._rows = None
        if NUMBERED in self.issues.notes:
            self.issues.notes.remove(NUMBERED)

    def begin_anew(self) -> None:
        """The log starts again from its beginning; its rows up to here are known."""
        self._heard_up_to = max(self._step, *self._ahead, self.last)
        if self._rows is not None:
            self._rows = 0

    def _release(self, before: int) -> None:
        """The step held back, and those ahead of it that lie before a new one."""
        if self.held() is not None:  # else there is none, or finish() has released it
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
        elif self._has_steps:
            self.issues.skip(line, text, "no step")
        else:
            self._waiting.append((values, line, text[:100]))
            if len(self._waiting) == UNNUMBERED:
                self.number_rows()

    def _knows_steps(self) -> None:
        """A step has come; what came before without one was no row of the training."""
        self._has_steps = True
        for _, line, text in self._waiting:
            self.issues.skip(line, text, "no step")
        self._waiting = []


def joined(parts: Sequence[Sequence[Record]]) -> list[Sequence[Record]]:
    """Tables of the same metrics that follow one another as one: it costs the guards little more than any of them."""
    found: list[Sequence[Record]] = []
    for names, of_run in groupby(parts, key=lambda part: part.by_columns if isinstance(part, Table) else None):
        run = list(of_run)
        found += run if names is None or len(run) == 1 else [Table.joined([part for part in run if isinstance(part, Table)])]
    return found
