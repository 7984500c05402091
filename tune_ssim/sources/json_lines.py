"""A JSON object a line: plain JSONL, or lines tagged `TUNE_SSIM {...}` in the midst of other output."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tune_ssim.sources.rows import Rows

TAG = "TUNE_SSIM {"  # what a training prints before its JSON, so that nothing else in its output is taken for a row

# strict=False: a control character in a text is no reason to lose the numbers beside it.
_decode: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder(strict=False))["scan_once"]  # (text, begin) → (value, end)


class JsonLines:
    """Once a tagged line was seen, only tagged lines are rows, and no other line is a trouble."""

    format = "jsonl"

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.tagged = False

    def take(self, lines: list[str], number: int) -> None:
        """The lines `number`, `number` + 1, … of the log."""
        for number, line in enumerate(lines, number):  # noqa: B020
            if self.tagged:
                self._take_tagged(line, number)
                continue
            try:
                row, end = _decode(line, 0)
            except (StopIteration, ValueError, RecursionError):
                row, end = None, 0
            if type(row) is dict and end == len(line):
                self._rows.add_object(row, number, line)
            else:
                self._take_odd(line, number)

    def _take_odd(self, line: str, number: int) -> None:
        """No JSON object from its first to its last character."""
        if TAG in line:
            self.tagged = True
            self._rows.trouble.forget()  # other output, as it turns out
            self._take_tagged(line, number)
        elif line.strip() != line:
            self.take([line.strip()], number)
        elif line:
            self._rows.trouble.skip(number, line, "no JSON object")

    def _take_tagged(self, line: str, number: int) -> None:
        begin = line.find(TAG)
        if begin < 0:
            return
        try:
            row, _ = _decode(line, begin + len(TAG) - 1)
        except (StopIteration, ValueError, RecursionError):
            self._rows.trouble.skip(number, line[begin:], "no JSON object after the tag")
        else:
            self._rows.add_object(row, number, line)

    def to_json(self) -> dict[str, Any]:
        return {"tagged": self.tagged}

    def load_json(self, data: Mapping[str, Any]) -> None:
        self.tagged = data["tagged"]


def json_object(line: str) -> dict[str, Any] | None:
    """The object that a whole line is, else None."""
    line = line.strip()
    try:
        row, end = _decode(line, 0)
    except (StopIteration, ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and end == len(line) else None
