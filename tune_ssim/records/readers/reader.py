"""What all readers of a log have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tune_ssim.records import Record
from tune_ssim.records.readers.parse_issues import ParseIssues
from tune_ssim.records.readers.rows import Rows


class Reader:
    """Collects rows and returns them as records. Steps only increase over the lifetime of a reader."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @property
    def issues(self) -> ParseIssues:
        return self.rows.issues

    def held(self) -> int | None:
        """The pending step, which is held back because more rows of it may come; None if there is none."""
        return self.rows.steps.held()

    def release(self) -> list[Record]:
        """Releases the pending step. Later rows of it become another record of the same step."""
        return self.rows.steps.release()

    def finish(self) -> list[Record]:
        """All remaining records, including an unterminated last line and the pending step."""
        return self.rows.steps.finish()


class Source(Reader):
    """A log that may still be growing, and need not exist yet. Bad content is noted in `issues` and never raises an error."""

    def batches(self) -> Iterator[Sequence[Record]]:
        """Complete records since the last call, in batches of bounded size."""
        raise NotImplementedError

    def read(self) -> list[Record]:
        """The records of `batches` in one list."""
        return [record for part in self.batches() for record in part]

    def finish(self) -> list[Record]:
        return [*self.read(), *super().finish()]

    def all_batches(self) -> Iterator[Sequence[Record]]:
        """The records of a finished log, in batches of bounded size."""
        yield from self.batches()
        yield self.finish()


class LineFormat:
    """Takes lines of one format and adds their rows."""

    format = ""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def take(self, lines: list[str], number: int) -> None:
        """Takes the lines `number`, `number` + 1, … of the log."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called at the end of a log: adds a row that is not complete yet."""

    def why_no_rows(self) -> str:
        """At the end of a log: why no line was a row; empty if one was, or if every other line was noted in `issues`."""
        return ""
