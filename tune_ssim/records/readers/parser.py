"""Parses log lines into records, from the pipe of a process or from a file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tune_ssim.base.errors import UserError
from tune_ssim.records import Record
from tune_ssim.records.readers.csv_rows import CsvRows, delimiter_of, is_header, looks_like_csv, split_fields
from tune_ssim.records.readers.json_lines import TAG, JsonLines, is_row
from tune_ssim.records.readers.lines import MAX_LINE_BYTES, Lines
from tune_ssim.records.readers.parse_issues import excerpt
from tune_ssim.records.readers.printed import PRINTED
from tune_ssim.records.readers.proposal import propose_pattern
from tune_ssim.records.readers.reader import LineFormat, Reader
from tune_ssim.records.readers.rows import Rows
from tune_ssim.records.readers.table_lines import TableLines
from tune_ssim.records.readers.text_lines import HOW_A_PATTERN_LOOKS, PrintedLines, text_format

LINE_FORMATS = ("jsonl", "csv", "text")
FEED_BYTES = 1024 * 1024  # bytes split at a time, to bound memory for large chunks
SHOWN_LINES = 3  # lines of an unknown log quoted in the message
KEPT_LINES = 50  # lines from which a pattern is proposed


class LineParser(Reader):
    """Turns bytes, in chunks of any size, into records.

    format: jsonl, csv or text (see docs/logs.md). None: the first line that is a row in one of these formats decides, and a
    line tagged TUNE_SSIM decides at any time, or with `tagged` False is passed over. without: built-in patterns that are not
    tried then. names: metric names in the log → ours.
    pattern: for text. The constructor raises UserError for invalid arguments; other methods never raise for bad content."""

    def __init__(
        self,
        *,
        format: str | None = None,
        names: Mapping[str, str] | None = None,
        pattern: str | Sequence[str] | None = None,
        file_name: str = "",
        tagged: bool = True,
        without: Collection[str] = (),
    ) -> None:
        if format is not None and format not in LINE_FORMATS:
            raise UserError(f"format: must be one of {', '.join(LINE_FORMATS)} for lines; got {format!r}")
        if pattern is not None and format not in (None, "text"):
            raise UserError(f"pattern: goes with format text, not with {format}")
        super().__init__(Rows(names))
        self._lines = Lines()
        self._format: LineFormat
        if format == "jsonl":
            self._format = JsonLines(self.rows)
        elif format == "csv":
            self._format = CsvRows(self.rows, file_name)
        elif format == "text" or pattern is not None:
            self._format = text_format(self.rows, pattern)
        else:
            self._format = AnyLines(self.rows, file_name, tagged, without)

    @property
    def format(self) -> str | None:
        """The format; None if not detected yet."""
        return self._format.format or None

    def feed(self, data: bytes) -> list[Record]:
        """Takes bytes and returns the records that are now complete."""
        return [record for part in self.feed_batches(data) for record in part]

    def feed_batches(self, data: bytes) -> list[Sequence[Record]]:
        """Like `feed`, but returns batches, as tables where possible."""
        for begin in range(0, len(data), FEED_BYTES):
            self._take(self._lines.feed(data[begin : begin + FEED_BYTES]))
        return self.rows.steps.take_batches()

    def finish(self) -> list[Record]:
        self._take(self._lines.finish())
        self._format.finish()
        if why := self._format.why_no_rows():
            self.issues.note(why)
        return super().finish()

    def begin_anew(self, reason: str) -> None:
        """Restarts at the beginning of a file that was replaced or truncated."""
        self.issues.note(reason)
        self._lines.begin_anew()
        self.rows.steps.begin_anew()

    def _take(self, lines: list[str]) -> None:
        issues = self.issues
        while self._lines.too_long:
            self._lines.too_long -= 1
            issues.lines += 1
            issues.skip(issues.lines, "", f"longer than {MAX_LINE_BYTES // 2**20} MiB")
        if lines:
            self._format.take(lines, issues.lines + 1)
            self.issues.lines += len(lines)


class AnyLines(LineFormat):
    """Detects the format from the first line that is a row; earlier lines are skipped."""

    def __init__(self, rows: Rows, file_name: str = "", tagged: bool = True, without: Collection[str] = ()) -> None:
        super().__init__(rows)
        self._tagged = tagged
        self._file_name = file_name
        self._named_csv = file_name.lower().endswith((".csv", ".tsv"))
        self._named_jsonl = file_name.lower().endswith((".jsonl", ".ndjson"))
        self._printed = PrintedLines(rows, without=without)
        self._table = TableLines(rows)
        self._chosen: LineFormat | None = None
        self._first: list[str] = []  # the first lines that are not blank
        self._seen = 0

    def take(self, lines: list[str], number: int) -> None:
        if not self._tagged:
            lines = ["" if TAG in line else line for line in lines]
        elif not isinstance(self._chosen, JsonLines) and TAG in "\n".join(lines):
            tagged = next(k for k, line in enumerate(lines) if TAG in line)
            self._take_untagged(lines[:tagged], number)
            self._chosen = JsonLines(self._rows)
            lines, number = lines[tagged:], number + tagged
        self._take_untagged(lines, number)
        self.format = self._chosen.format if self._chosen else ""

    def _take_untagged(self, lines: list[str], number: int) -> None:
        for k, line in enumerate(lines):
            if self._chosen is not None:
                self._chosen.take(lines[k:], number + k)
                return
            if line.strip():
                self._look_at(line, number + k)

    def _look_at(self, line: str, number: int) -> None:
        """Chooses a format if this line allows it, and then takes the line."""
        self._seen += 1
        if len(self._first) < KEPT_LINES:
            self._first.append(line[:1000])
        if self._seen == 1 and self._named_csv and is_header(split_fields(line, delimiter_of(line))):
            self._chosen = CsvRows(self._rows, self._file_name)
        elif self._seen == 2 and looks_like_csv(self._first[0], line, self._rows.names.steps, self._named_csv):
            self._chosen = CsvRows(self._rows, self._file_name)
            self._chosen.take([self._first[0], line], number - 1)
            return
        elif is_row(line, self._rows.names) or self._named_jsonl:
            self._chosen = JsonLines(self._rows)
        elif self._printed.recognises(line):
            self._chosen = self._printed
        elif self._printed.name is not None:  # it has taken the line
            self._chosen = self._printed
            return
        elif self._table.recognises(line, number):
            self._chosen = self._table
            return
        if self._chosen is not None:
            self._chosen.take([line], number)

    def finish(self) -> None:
        for one in (self._printed, self._table) if self._chosen is None else (self._chosen,):
            one.finish()
        if self._chosen is None and self._table.has_rows:
            self._chosen = self._table
        elif self._chosen is None and self._printed.name is not None:
            self._chosen = self._printed
        self.format = self._chosen.format if self._chosen else ""

    def why_no_rows(self) -> str:
        if self._chosen is not None or not self._seen:
            return ""
        shown = " ".join(excerpt(line) for line in self._first[:SHOWN_LINES])
        proposed = propose_pattern(self._first)
        if proposed:
            return f"no row of a training in {self._seen} lines, beginning with {shown}; try {proposed}"
        return (
            f"no row of a training in {self._seen} line{'s' if self._seen > 1 else ''}, beginning with {shown}; "
            f"give a format ({', '.join(LINE_FORMATS)}), or a pattern: {' or '.join(PRINTED)}, or {HOW_A_PATTERN_LOOKS}"
        )
