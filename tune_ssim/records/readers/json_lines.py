"""One JSON object per line: plain JSONL, or lines tagged `TUNE_SSIM {...}` among other output."""

from __future__ import annotations

import json
import re
from typing import Any

from tune_ssim.records.readers.reader import LineFormat
from tune_ssim.records.readers.rows import Rows
from tune_ssim.records.readers.values import Names, numbers_of, without_windows

TAG = "TUNE_SSIM {"  # a training prints this before its JSON, so that no other output is mistaken for a row

BLOCK_LINES = 4096  # lines decoded at once: keys are decoded once per block, and a block fits in the cache

# strict=False: a control character in a string must not invalidate the other values of the row.
DECODER = json.JSONDecoder(strict=False)

# Spellings of non-finite floats by C++, JavaScript and custom loops. `json` accepts only NaN and Infinity.
ODD_NUMBER = re.compile(r"([:,\[]\s*)([-+]?)(nan|inf(?:inity)?)(?=\s*[,}\]])", re.IGNORECASE)


class JsonLines(LineFormat):
    """The rows of a JSONL log. After the first tagged line, only tagged lines are rows and all other lines are ignored."""

    format = "jsonl"

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.tagged = False

    def take(self, lines: list[str], number: int) -> None:
        for begin in range(0, len(lines), BLOCK_LINES):
            block = lines[begin : begin + BLOCK_LINES]
            text = ",\n".join(block)
            rows = None if self.tagged or "[" in text else objects(text, len(block))
            if rows is None:
                for at, line in enumerate(block, number + begin):
                    self._take_line(line, at)
            elif "\\" in text or not self._rows.add_objects(rows):
                for at, (row, line) in enumerate(zip(rows, block, strict=True), number + begin):
                    self._rows.add_object(row, at, line)

    def _take_line(self, line: str, number: int) -> None:
        if not self.tagged:
            row = json_object(line)
            if row is not None:
                self._rows.add_object(row, number, line)
                return
            if TAG not in line:
                if line.strip():
                    self._rows.issues.skip(number, line, "not a JSON object")
                return
            self.tagged = True
            self._rows.discard()  # the lines so far were other output
        begin = line.find(TAG)
        if begin >= 0:
            text = line[begin + len(TAG) - 1 :]
            row = decoded(text)[0] or decoded(with_plain_numbers(text))[0]
            if row is None:
                self._rows.issues.skip(number, text, "not a JSON object after the tag")
            else:
                self._rows.add_object(row, number, line)


def objects(text: str, count: int) -> list[dict[str, Any]] | None:
    """Parses `count` lines joined by a comma and a newline; None unless every line is one object.

    `text` must not contain "[". Then a line can only start outside of any object (a string has no raw newline, and inside
    an object no "{" follows a comma), so `count` objects means one per line."""
    try:
        rows = json.loads(f"[{text}]")
    except (ValueError, RecursionError):
        return None
    return rows if len(rows) == count and all(type(row) is dict for row in rows) else None


def decoded(text: str) -> tuple[Any, int]:
    """The JSON value at the start of a text, and its end; (None, 0) if there is none."""
    try:
        return DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0


def with_plain_numbers(line: str) -> str:
    """The line with `nan`, `-inf`, `1.#INF` and similar rewritten as NaN and Infinity, which `json` accepts."""

    def plain(match: re.Match[str]) -> str:
        before, sign, word = match.groups()
        return before + ("NaN" if word[0] in "nN" else ("-" if sign == "-" else "") + "Infinity")

    return ODD_NUMBER.sub(plain, without_windows(line))


def json_object(line: str) -> dict[str, Any] | None:
    """The JSON object that makes up the whole line, else None."""
    line = line.strip()
    row, end = decoded(line)
    if row is None:
        row, end = decoded(line := with_plain_numbers(line))
    return row if isinstance(row, dict) and end == len(line) else None


def is_row(line: str, names: Names) -> bool:
    """Whether a line is a JSON object with at least one number."""
    row = json_object(line) if line.lstrip()[:1] == "{" else None
    return row is not None and bool(numbers_of(row, names))
