"""A JSON document that the training rewrites each time: Hugging Face's trainer_state.json, or a list of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tune_ssim.records import Record
from tune_ssim.records.readers.json_lines import json_object
from tune_ssim.records.readers.line_file import LineFile
from tune_ssim.records.readers.parse_issues import ParseIssues
from tune_ssim.records.readers.parser import LineParser
from tune_ssim.records.readers.rows import Rows

MAX_BYTES = 256 * 1024 * 1024  # the whole document must fit in memory
FIRST_LINE_BYTES = 1024 * 1024  # the first line must end within this many bytes to be recognised


class JsonFile:
    """Rows are the objects of `log_history` or of the list. A file with one object per line is read as lines (MMEngine's
    vis_data/*.json). An incomplete document, still being written, yields no rows."""

    format = "json"

    def __init__(self, path: Path, names: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._names = names
        self._rows = Rows(names)
        self._rows.issues.unit = "row"
        self._done = 0  # rows taken
        self._seen: list[int] = []  # device, inode, size and mtime of the version that was read last
        self._why_unread = ""
        self._lines: LineFile | None = None

    @property
    def issues(self) -> ParseIssues:
        return self._lines.issues if self._lines else self._rows.issues

    def read(self) -> list[Record]:
        return [record for part in self.batches() for record in part]

    def finish(self) -> list[Record]:
        records = self.read()
        if self._lines:
            return [*records, *self._lines.finish()]
        if self._why_unread:
            self.issues.note(f"{self.path}: {self._why_unread}")
        return [*records, *self._rows.steps.finish()]

    def held(self) -> int | None:
        return self._lines.held() if self._lines else self._rows.steps.held()

    def release(self) -> list[Record]:
        return self._lines.release() if self._lines else self._rows.steps.release()

    def batches(self) -> Iterator[Sequence[Record]]:
        if self._lines is None:
            try:
                self._look()
            except FileNotFoundError:
                return
            except OSError as error:
                self.issues.note(f"{self.path}: {error.strerror or error}")
        if self._lines is not None:
            yield from self._lines.batches()
        else:
            yield self._rows.steps.take()

    def _look(self) -> None:
        """Takes the new rows if the file has changed since the last read."""
        status = self.path.stat()
        version = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
        if version == self._seen or not status.st_size:
            return
        with self.path.open("rb") as file:
            start = file.read(min(FIRST_LINE_BYTES, MAX_BYTES))
            if holds_lines(start):
                self._as_lines()
                return
            if status.st_size > MAX_BYTES:
                self._why_unread = f"longer than {MAX_BYTES // 2**20} MiB; use a format of lines"
                return
            data = start + file.read()
        self._seen, self._why_unread = version, ""
        try:
            document = json.loads(data.decode("utf-8-sig", "replace"), strict=False)
        except (ValueError, RecursionError) as error:
            self._why_unread = f"no JSON document ({error})"
            return
        rows = document.get("log_history") if isinstance(document, dict) else document
        if not isinstance(rows, list):
            self._why_unread = "neither `log_history` nor a list of objects"
            return
        if len(rows) < self._done:
            self._done = 0
            self._rows.steps.begin_anew()
            self.issues.note("the log was rewritten while it was read: repeated steps are skipped")
        for number, row in enumerate(rows[self._done :], self._done + 1):
            if isinstance(row, dict):
                self._rows.add_object(row, number, str(row)[:200])
            else:
                self.issues.skip(number, str(row)[:200], "not a JSON object")
        self._done = self.issues.lines = len(rows)

    def _as_lines(self) -> LineFile:
        self._lines = LineFile(self.path, LineParser(format="jsonl", names=self._names))
        return self._lines


def holds_lines(start: bytes) -> bool:
    """Whether a JSON file with these first bytes has one object per line, and is not a single document."""
    first, newline, _ = start.decode("utf-8-sig", "replace").lstrip().partition("\n")
    row = json_object(first) if newline else None
    return row is not None and "log_history" not in row


def holds_document(data: bytes) -> bool:
    """Whether a file with these first bytes looks like a single document for JsonFile."""
    text = data.decode("utf-8-sig", "replace").lstrip()
    if holds_lines(data):
        return False
    if text.startswith("["):
        return text[1:].lstrip().startswith("{")
    return text.startswith("{") and '"log_history"' in text
