"""A JSON object a line: plain JSONL, or lines tagged `TUNE_SSIM {...}` in the midst of other output."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tune_ssim.records.readers.rows import Rows
from tune_ssim.records.readers.values import Names, numbers_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

TAG = "TUNE_SSIM {"  # what a training prints before its JSON, so that nothing else in its output is taken for a row

TOGETHER = 4096  # lines that are decoded at once: names are then made once for all, and they stay in the cache
MANY = 256  # lines from which on loading pyarrow pays

# strict=False: a control character in a text is no reason to lose the numbers beside it.
_decode: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder(strict=False))["scan_once"]  # (text, begin) → (value, end)


_decode_strictly: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]


# What others print for a float that is no number: C++, JavaScript, a loop of one's own. `json` reads NaN and Infinity only.
ODD_NUMBER = re.compile(r"([:,\[]\s*)([-+]?)(nan|inf(?:inity)?)(?=\s*[,}\]])", re.IGNORECASE)


class JsonLines:
    """Once a tagged line was seen, only tagged lines are rows, and no other line is reported as unread."""

    format = "jsonl"

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.tagged = False

    def take(self, lines: list[str], number: int) -> None:
        """The lines `number`, `number` + 1, … of the log."""
        for begin in range(0, len(lines), TOGETHER):
            block = lines[begin : begin + TOGETHER]
            if not self.tagged and len(block) >= MANY and (columns := columns_of(block)) and self._rows.add_arrays(columns):
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
        """No JSON object from its first to its last character."""
        if TAG in line:
            self.tagged = True
            self._rows.forget()  # other output, as it turns out
            self._take_tagged(line, number)
        elif line.strip() != line:
            self._take_line(line.strip(), number)
        elif line:
            self._rows.issues.skip(number, line, "no JSON object")

    def _take_tagged(self, line: str, number: int) -> None:
        begin = line.find(TAG)
        if begin < 0:
            return
        begin += len(TAG) - 1
        row, _ = decoded(line, begin)
        if row is None:
            row, _ = decoded(with_plain_numbers(line[begin:]))
        if row is None:
            self._rows.issues.skip(number, line[begin:], "no JSON object after the tag")
        else:
            self._rows.add_object(row, number, line)


def columns_of(lines: Sequence[str]) -> dict[str, NDArray[Any]] | None:
    """The numbers of lines that are one flat object each, all with the same names, by name, as int64 or float64; None for any
    other lines. The numbers are those that reading line by line gives (a whole -0 may keep its sign)."""
    text = "\n".join(lines)
    if text[:1] != "{" or not text.count("{") == len(lines) == text.count("\n{") + 1:
        return None  # not one object on each line
    try:
        import pyarrow
        from pyarrow import json as arrow_json
    except ImportError:  # it is optional: the json module reads the same numbers, more slowly
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
    """The objects of `count` lines that are joined by a comma and a newline; None if not every line is one object.

    `text` must be free of "[". Then a line can only begin outside of any object (a string holds no raw newline, and in an
    object no "{" follows a comma), so `count` objects are one a line."""
    try:
        rows, end = _decode_strictly(f"[{text}]", 0)
    except (StopIteration, ValueError, RecursionError):
        return None
    whole = end == len(text) + 2 and len(rows) == count and all(type(row) is dict for row in rows)
    return rows if whole else None


def decoded(text: str, begin: int = 0) -> tuple[Any, int]:
    """The JSON value that begins there, and its end; (None, 0) where there is none."""
    try:
        return _decode(text, begin)
    except (StopIteration, ValueError, RecursionError):
        return None, 0


def with_plain_numbers(line: str) -> str:
    """`nan`, `-inf` and the like as `json` reads them."""

    def plain(match: re.Match[str]) -> str:
        before, sign, word = match.groups()
        return before + ("NaN" if word[0] in "nN" else ("-" if sign == "-" else "") + "Infinity")

    return ODD_NUMBER.sub(plain, line)


def json_object(line: str) -> dict[str, Any] | None:
    """The object that a whole line is, else None."""
    line = line.strip()
    row, end = decoded(line)
    if row is None:
        row, end = decoded(line := with_plain_numbers(line))
    return row if isinstance(row, dict) and end == len(line) else None


def is_row(line: str, names: Names) -> bool:
    """Whether a line is an object with a number in it."""
    row = json_object(line) if line.lstrip()[:1] == "{" else None
    return row is not None and bool(numbers_of(row, names))
