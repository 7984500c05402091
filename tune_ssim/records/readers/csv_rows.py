"""CSV with a header, delimited by comma, semicolon or tab. Rows may have empty fields (Lightning's metrics.csv)."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence

from tune_ssim.records import EPOCH, LOSS
from tune_ssim.records.readers.reader import LineFormat
from tune_ssim.records.readers.rows import Rows
from tune_ssim.records.readers.values import as_held_out, text_number

DELIMITERS = ",;\t"
TENSORBOARD = ["wall time", "step", "value"]  # the header of a scalar that was downloaded from its page
TAG_IN_NAME = re.compile(r"tag-(.+)\.csv$")  # run-train-tag-loss.csv


class CsvRows(LineFormat):
    """The rows of a CSV log. The first line is the header; a later line of names replaces it (a restarted run).

    Empty fields are missing values. Fields that contain a line break are not supported; such rows count as unread."""

    format = "csv"

    def __init__(self, rows: Rows, file_name: str = "") -> None:
        super().__init__(rows)
        self._file_name = file_name
        self._header: list[str] = []
        self._delimiter = ","
        self._step: int | None = None  # index of the step column
        self._metrics: list[tuple[int, str]] = []  # the other columns: (index, name)

    def take(self, lines: list[str], number: int) -> None:
        if not self._take_together(lines):
            for at, line in enumerate(lines, number):
                if line:
                    self._take_line(line, at)

    def _take_together(self, lines: list[str]) -> bool:
        """Takes lines that are all complete numeric rows with increasing steps. Otherwise returns False and takes none.

        They are parsed as JSON, the fastest way to many numbers without NumPy, with a null at the end of each line."""
        width, text = len(self._header), f"{self._delimiter}null{self._delimiter}".join(lines)
        if self._step is None or "" in self._header or len(set(self._header)) < width:
            return False
        if self._delimiter != ",":
            text = text.replace(",", "?").replace(self._delimiter, ",")  # a decimal comma is not JSON
        try:
            fields = json.loads(f"[{text}]")
            columns = {name: fields[k :: width + 1] for k, name in enumerate(self._header)}
            given = columns.pop(self._header[self._step])
            steps = list(map(int, given))
        except (ValueError, TypeError, OverflowError, RecursionError):
            return False
        is_whole = len(fields) == (width + 1) * len(lines) - 1 and fields[width :: width + 1] == [None] * (len(lines) - 1)
        return is_whole and steps == given and self._rows.add_columns(steps, columns)

    def _take_line(self, line: str, number: int) -> None:
        if not self._header:
            self._delimiter = delimiter_of(line)
            self._begin(split_fields(line, self._delimiter))
            return
        fields = split_fields(line, self._delimiter)
        if len(fields) != len(self._header):
            if not self._begins_again(fields) and line.strip():
                self._rows.issues.skip(number, line, f"{len(fields)} fields, the header has {len(self._header)}")
            return
        try:
            values = {name: float(fields[k]) for k, name in self._metrics if fields[k]}
        except ValueError:
            if self._begins_again(fields):
                return
            values = self._odd_values(fields)
            values = as_held_out(values, dict(zip(self._header, fields, strict=True)))
        self._rows.add(None if self._step is None else fields[self._step], values, number, line)

    def _begin(self, header: Sequence[str]) -> None:
        """Finds the step column and the metric columns."""
        self._header = self._without_run([name.strip() for name in header])
        lower = [name.lower() for name in self._header]
        step = next((name for name in self._rows.names.steps if name.lower() in lower), None)
        self._step = None if step is None else lower.index(step.lower())
        if step is not None:
            self._rows.names.used.add(step)
        elif EPOCH not in lower:
            self._rows.steps.number_rows()
        self._metrics = [(k, name) for k, name in enumerate(self._header) if k != self._step and name]

    def _without_run(self, header: list[str]) -> list[str]:
        """The names of metrics in an export of W&B (`run-12 - train/loss`, with `…__MIN` and `…__MAX`) or of TensorBoard's page;
        empty for a column that is none."""
        if [name.lower() for name in header] == TENSORBOARD and header[2] not in self._rows.names.given:
            tag = TAG_IN_NAME.search(self._file_name)
            if tag is None:
                self._rows.issues.note("Value is taken for loss; else `--map Value=…`")
            return ["", header[1], tag[1] if tag else LOSS]
        exported = {name: name.rpartition(" - ")[2] for name in header if f"{name}__MIN" in header and f"{name}__MAX" in header}
        counts = Counter(exported.values())
        extremes = {name + end for name in exported for end in ("__MIN", "__MAX")}
        names = {name: short for name, short in exported.items() if counts[short] == 1 and name not in self._rows.names.given}
        return ["" if name in extremes else names.get(name, name) for name in header]

    def _begins_again(self, fields: Sequence[str]) -> bool:
        """Takes the fields as a new header if they are one."""
        is_new = is_header(fields) and bool(set(self._header) & {field.strip() for field in fields})
        if is_new:
            self._begin(fields)
        return is_new

    def _odd_values(self, fields: Sequence[str]) -> dict[str, float]:
        """The numbers of a row that also has text fields. Accepts decimal commas unless the delimiter is a comma."""
        values = {}
        for k, name in self._metrics:
            number = text_number(fields[k] if self._delimiter == "," else fields[k].replace(",", "."))
            if number is not None:
                values[name] = number
        return values


def delimiter_of(line: str) -> str:
    """The most frequent of DELIMITERS in a header line."""
    return max(DELIMITERS, key=line.count)


def split_fields(line: str, delimiter: str) -> list[str]:
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:  # a field of more than 128 KiB
        return [line]


def is_header(fields: Sequence[str]) -> bool:
    """Whether all fields are distinct names, not numbers."""
    texts = [field.strip() for field in fields]
    return all(text and text_number(text) is None for text in texts) and len(set(texts)) == len(texts)


def looks_like_csv(first: str, second: str, step_names: Sequence[str], named_csv: bool) -> bool:
    """Whether the first two lines of a log are a CSV header and a row.

    named_csv: the file name ends in .csv or .tsv. Otherwise there must also be a step column or a purely numeric row."""
    delimiter = delimiter_of(first)
    names, fields = ([text.strip() for text in split_fields(line, delimiter)] for line in (first, second))
    # pandas writes an empty name for the index column
    if len(names) != len(fields) or not is_header([names[0] or "index", *names[1:]]):
        return False
    if len(names) == 1 and not named_csv:
        return False
    numbers = [text_number(field.replace(",", ".") if delimiter != "," else field) for field in fields if field]
    if not any(number is not None for number in numbers):
        return False
    has_step = bool({name.lower() for name in names} & {name.lower() for name in step_names})
    return named_csv or has_step or None not in numbers
