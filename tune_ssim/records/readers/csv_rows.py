"""CSV with a header, delimited by comma, semicolon or tab. Rows may have empty fields (Lightning's metrics.csv)."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from tune_ssim.records.readers.rows import Rows
from tune_ssim.records.readers.values import text_number
from tune_ssim.records.record_table import Table, numpy_or_none

DELIMITERS = ",;\t"
MIN_TABLE_ROWS = 16  # number of rows from which reading them as a table is faster
MAX_EXACT_INT = 2**53  # integers up to here are exact as floats


class CsvRows:
    """The rows of a CSV log. The first line is the header; a later line of names replaces it (a restarted run).

    Empty fields are missing values. Fields that contain a line break are not supported; such rows count as unread."""

    format = "csv"

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._header: list[str] = []
        self._delimiter = ","
        self._step: int | None = None  # index of the step column
        self._names: list[tuple[int, str]] = []  # the other columns: (index, our name)
        self._plain: list[str] = []  # our names of all columns if they are unique, for fast reading of rows without empty fields

    def take(self, lines: list[str], number: int) -> None:
        """The lines `number`, `number` + 1, … of the log."""
        if len(lines) >= MIN_TABLE_ROWS and self._take_table(lines):
            return
        add = self._rows.add
        for number, line in enumerate(lines, number):  # noqa: B020
            if not line:
                continue
            if not self._header:
                self._delimiter = delimiter_of(line)
                self._begin(split_fields(line, self._delimiter))
                continue
            fields = line.split(self._delimiter) if '"' not in line else split_fields(line, self._delimiter)
            if len(fields) != len(self._header):
                if self._is_new_header(fields):
                    self._begin(fields)
                elif line.strip():
                    self._rows.issues.skip(number, line, f"{len(fields)} fields, the header has {len(self._header)}")
                continue
            try:
                if self._plain and "" not in fields:
                    values = dict(zip(self._plain, map(float, fields), strict=True))
                    if self._step is not None:
                        del values[self._plain[self._step]]
                else:
                    values = {name: float(fields[k]) for k, name in self._names if fields[k]}
            except ValueError:
                if self._is_new_header(fields):
                    self._begin(fields)
                    continue
                values = self._odd_values(fields)
            if values:
                add(None if self._step is None else fields[self._step], values, number, line)

    def _take_table(self, lines: list[str]) -> bool:
        """Takes lines that are all complete numeric rows with increasing steps. Otherwise returns False and takes none."""
        if not self._plain or self._step is None or not lines[0].strip() or (np := numpy_or_none()) is None:
            return False
        try:
            table = np.loadtxt(lines, delimiter=self._delimiter, comments=None, ndmin=2)
        except ValueError:
            return False
        if table.shape != (len(lines), len(self._plain)):
            return False
        steps = table[:, self._step]
        increasing = (steps[1:] > steps[:-1]).all()
        if not (steps[0] >= 0 and steps[-1] < MAX_EXACT_INT and increasing and (steps == np.floor(steps)).all()):
            return False
        columns = {name: table[:, k] for k, name in enumerate(self._plain) if k != self._step}
        return bool(columns) and self._rows.steps.add_table(Table(steps.astype(int).tolist(), columns=columns))

    def _begin(self, header: Sequence[str]) -> None:
        """Finds the step column, and our names for the metric columns."""
        self._header = [name.strip() for name in header]
        names = self._rows.names
        lower = [name.lower() for name in self._header]
        found = [lower.index(name.lower()) for name in names.steps if name.lower() in lower]
        self._step = found[0] if found else None
        if self._step is None:
            self._rows.steps.number_rows()
        # A mapping by the user overrides a column that already has our name, so it comes last.
        columns = [(k, name) for k, name in enumerate(self._header) if k != self._step and name]
        given = [(k, names.given[name]) for k, name in columns if name in names.given]
        self._names = [(k, names[name]) for k, name in columns if name not in names.given] + given
        ours = dict(self._names)
        plain = [ours.get(k, name) for k, name in enumerate(self._header)]
        self._plain = plain if len({*plain} - {""}) == len(plain) else []

    def _is_new_header(self, fields: Sequence[str]) -> bool:
        return is_header(fields) and bool(set(self._header) & {field.strip() for field in fields})

    def _odd_values(self, fields: Sequence[str]) -> dict[str, float]:
        """The numbers of a row that also has text fields. Accepts decimal commas unless the delimiter is a comma."""
        values = {}
        for k, name in self._names:
            text = fields[k] if self._delimiter == "," else fields[k].replace(",", ".")
            number = text_number(text)
            if number is not None:
                values[name] = number
        return values


def delimiter_of(line: str) -> str:
    """The most frequent of DELIMITERS in a header line."""
    return max(DELIMITERS, key=line.count)


def split_fields(line: str, delimiter: str) -> list[str]:
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
