"""A JSON document: Hugging Face's trainer_state.json, which the training rewrites each time, a list of objects, or a scalar that
was downloaded from TensorBoard's page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tune_ssim.base.numbers import is_number
from tune_ssim.records import LOSS, Record
from tune_ssim.records.readers.json_lines import json_object
from tune_ssim.records.readers.reader import Source
from tune_ssim.records.readers.rows import Rows

MAX_BYTES = 256 * 1024 * 1024  # the whole document must fit in memory


class JsonFile(Source):
    """Rows are the objects of `log_history` or of the list, or its lists of time, step and value. An incomplete document, still
    being written, yields no rows."""

    def __init__(self, path: Path, names: Mapping[str, str] | None = None) -> None:
        super().__init__(Rows(names))
        self.issues.unit = "row"
        self.path = path
        self._done = 0  # rows taken
        self._seen: list[int] = []  # device, inode, size and mtime of the version that was read last
        self._why_unread = ""

    def batches(self) -> Iterator[Sequence[Record]]:
        try:
            self._take_new_rows()
        except FileNotFoundError:
            return
        except OSError as error:
            self.issues.note(f"{self.path}: {error.strerror or error}")
        yield self.rows.steps.take()

    def finish(self) -> list[Record]:
        records = super().finish()
        if self._why_unread:
            self.issues.note(f"{self.path}: {self._why_unread}")
        return records

    def _take_new_rows(self) -> None:
        """Takes the new rows if the file has changed since the last read."""
        status = self.path.stat()
        version = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
        if version == self._seen or not status.st_size:
            return
        if status.st_size > MAX_BYTES:
            self._why_unread = f"longer than {MAX_BYTES // 2**20} MiB; use a format of lines"
            return
        data = self.path.read_bytes()
        self._seen, self._why_unread = version, ""
        try:
            document = json.loads(data.decode("utf-8-sig", "replace"), strict=False)
        except (ValueError, RecursionError) as error:
            self._why_unread = f"no JSON document ({error})"
            return
        found = document.get("log_history") if isinstance(document, dict) else document
        if not isinstance(found, list):
            self._why_unread = "neither `log_history` nor a list of objects"
            return
        if len(found) < self._done:
            self._done = 0
            self.rows.steps.begin_anew()
            self.issues.note("the log was rewritten while it was read: repeated steps are skipped")
        for number, row in enumerate(found[self._done :], self._done + 1):
            if isinstance(row, dict):
                self.rows.add_object(row, number, str(row)[:200])
            elif isinstance(row, list) and len(row) == 3 and all(map(is_number, row)):
                self.issues.note("its values are taken for loss")
                self.rows.add(row[1], {LOSS: float(row[2])}, number)
            else:
                self.issues.skip(number, str(row)[:200], "not a JSON object")
        self._done = self.issues.lines = len(found)


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
        return text[1:].lstrip().startswith(("{", "["))
    return text.startswith("{") and '"log_history"' in text
