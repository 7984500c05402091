"""One JSON object per line: plain JSONL, or lines tagged `TUNE_SSIM {...}` among other output."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tune_ssim.records.readers.rows import Rows
from tune_ssim.records.readers.values import Names, numbers_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

TAG = "TUNE_SSIM {"  # a training prints this before its JSON, so that no other output is mistaken for a row

BLOCK_LINES = 4096  # lines decoded at once: keys are decoded once per block, and a block fits in the cache
MIN_ARROW_LINES = 256  # number of lines from which loading pyarrow pays off

# strict=False: a control character in a string must not invalidate the other values of the row.
_decode: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder(strict=False))["scan_once"]  # (text, begin) → (value, end)


_decode_strictly: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]


# Spellings of non-finite floats by C++, JavaScript and custom loops. `json` accepts only NaN and Infinity.
ODD_NUMBER = re.compile(r"([:,\[]\s*)([-+]?)(nan|inf(?:inity)?)(?=\s*[,}\]])", re.IGNORECASE)


class JsonLines:
    """The rows of a JSONL log. After the first tagged line, only tagged lines are rows and all other lines are ignored."""

    format = "jsonl"

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.tagged = False

    def take(self, lines: list[str], number: int) -> None:
        """The lines `number`, `number` + 1, … of the log."""
        for begin in range(0, len(lines), BLOCK_LINES):
            block = lines[begin : begin + BLOCK_LINES]
            many = len(block) >= MIN_ARROW_LINES
            if not self.tagged and many and (columns := columns_of(block)) and self._rows.add_arrays(columns):
                continue
            text = ",\n".join(block)
            rows = None if self.tagged or "[" in text else objects(text, len(block))
            if rows is None:
                for at, line in enumerate(block, number + begin):
                    self._take_line(line, at)
            else:
                plain = "\\" not in text
                if plain and self._rows.add_objects(rows):
                    continue
                for at, (row, line) in enumerate(zip(rows, block, strict=True), number + begin):
                    self._rows.add_object(row, at, line, plain)

    def _take_line(self, line: str, number: int) -> None:
        if self.tagged:
            self._take_tagged(line, number)
            return
        row, end = decoded(line)
        if type(row) is dict and end == len(line):
            self._rows.add_object(row, number, line)
        elif (plain := with_plain_numbers(line)) != line:
            self._take_line(plain, number)
        else:
            self._take_odd(line, number)

    def _take_odd(self, line: str, number: int) -> None:
        """Takes a line that is not exactly one JSON object."""
        if TAG in line:
            self.tagged = True
            self._rows.discard()  # the lines so far were other output
            self._take_tagged(line, number)
        elif line.strip() != line:
            self._take_line(line.strip(), number)
        elif line:
            self._rows.issues.skip(number, line, "not a JSON object")

    def _take_tagged(self, line: str, number: int) -> None:
        begin = line.find(TAG)
        if begin < 0:
            return
        begin += len(TAG) - 1
        row, _ = decoded(line, begin)
        if row is None:
            row, _ = decoded(with_plain_numbers(line[begin:]))
        if row is None:
            self._rows.issues.skip(number, line[begin:], "not a JSON object after the tag")
        else:
            self._rows.add_object(row, number, line)


def columns_of(lines: Sequence[str]) -> dict[str, NDArray[Any]] | None:
    """Parses lines that are flat objects with the same numeric keys into int64 or float64 columns; None for any other lines.

    The values are the same as when reading line by line (except that an integer -0 may keep its sign)."""
    text = "\n".join(lines)
    if text[:1] != "{" or not text.count("{") == len(lines) == text.count("\n{") + 1:
        return None  # not one object on each line
    try:
        import numpy  # noqa: F401  # what Arrow's columns become
        import pyarrow
        from pyarrow import json as arrow_json
    except ImportError:  # optional: the json module gives the same numbers, more slowly
        return None

    data = text.encode()
    options = arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1)
    try:
        table = arrow_json.read_json(pyarrow.BufferReader(data), read_options=options)
    except pyarrow.ArrowInvalid:
        return None
    plain = all(column.type in (pyarrow.int64(), pyarrow.float64()) and not column.null_count for column in table.columns)
    if not plain or table.num_rows != len(lines):
        return None
    columns: dict[str, NDArray[Any]] = {
        name: column.to_numpy() for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return columns


def objects(text: str, count: int) -> list[dict[str, Any]] | None:
    """Parses `count` lines joined by a comma and a newline; None unless every line is one object.

    `text` must not contain "[". Then a line can only start outside of any object (a string has no raw newline, and inside
    an object no "{" follows a comma), so `count` objects means one per line."""
    try:
        rows, end = _decode_strictly(f"[{text}]", 0)
    except (StopIteration, ValueError, RecursionError):
        return None
    whole = end == len(text) + 2 and len(rows) == count and all(type(row) is dict for row in rows)
    return rows if whole else None


def decoded(text: str, begin: int = 0) -> tuple[Any, int]:
    """The JSON value that starts at `begin`, and its end; (None, 0) if there is none."""
    try:
        return _decode(text, begin)
    except (StopIteration, ValueError, RecursionError):
        return None, 0


def with_plain_numbers(line: str) -> str:
    """The line with `nan`, `-inf` and similar rewritten as NaN and Infinity, which `json` accepts."""

    def plain(match: re.Match[str]) -> str:
        before, sign, word = match.groups()
        return before + ("NaN" if word[0] in "nN" else ("-" if sign == "-" else "") + "Infinity")

    return ODD_NUMBER.sub(plain, line)


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
