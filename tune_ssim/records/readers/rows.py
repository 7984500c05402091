"""Converts rows of a log, from any format, to records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tune_ssim.records.readers.parse_issues import ParseIssues
from tune_ssim.records.readers.steps import Steps
from tune_ssim.records.readers.values import MAX_STEP, Names, numbers_of, step_in
from tune_ssim.records.record_table import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tune_ssim.records.record_table import Array

FLOAT, NUMBER = {float}, {float, int}


def are_steps(values: Sequence[Any]) -> bool:
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= MAX_STEP


class Rows:
    """Collects the rows of every format. `names`: metric names in the log → ours."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.issues = ParseIssues()
        self.names = Names(names)
        self.steps = Steps(self.issues)

    def add_object(self, row: dict[str, Any], line: int, text: str, plain: bool = False) -> None:
        """Adds a JSON object, which is modified. `text`: the text it was read from; `plain`: that text has no escapes. An
        object without numbers is ignored."""
        step = self.names.step_of(row)
        # A typical row has only floats and is used directly as the record's values.
        values = row if plain and set(map(type, row.values())) == FLOAT else numbers_of(row, self.names)
        if self.names.given:
            self.names.rename(values)
        if values:
            self.add(step, values, line, text)

    def add_objects(self, rows: list[dict[str, Any]]) -> bool:
        """Adds many objects without escapes at once. False: nothing was added or modified; add them one by one."""
        key = next((key for key in self.names.steps if key in rows[0]), None)
        before = self.names.steps[: self.names.steps.index(key)] if key else ()
        if key is None or any(name in row for name in before for row in rows):
            return False
        return self._add_columns_of(rows, key) or self._add_rows(rows, key)

    def add_columns(self, steps: Sequence[int], columns: Mapping[str, Sequence[float] | Array], names: Names) -> bool:
        """Adds rows with the same metrics as columns, renamed by `names`. False: nothing was added."""
        if not columns or not are_steps(steps):
            return False
        return self.steps.add_table(Table(steps, columns=names.rename(dict(columns)) if names.given else columns))

    def add_arrays(self, columns: Mapping[str, NDArray[Any]]) -> bool:
        """Adds many rows with the same keys as int64 or float64 columns. False: nothing was added."""
        key = next((key for key in self.names.steps if key in columns), None)
        if key is None or columns[key].dtype.kind != "i":
            return False
        others = {name: values.astype(float) for name, values in columns.items() if name != key}
        return self.add_columns(columns[key].tolist(), others, self.names)

    def _add_columns_of(self, rows: list[dict[str, Any]], key: str) -> bool:
        """Adds rows with the same keys in the same order and numeric values, the usual case. False: nothing was added."""
        names = tuple(rows[0])
        if len(names) < 2 or not all(map(names.__eq__, map(tuple, rows))):
            return False
        columns: dict[str, Any] = dict(zip(names, zip(*map(dict.values, rows), strict=True), strict=True))
        steps = columns.pop(key)
        for name, values in columns.items():
            types = set(map(type, values))
            if types != FLOAT:
                if not types <= NUMBER:
                    return False
                try:
                    columns[name] = tuple(map(float, values))
                except OverflowError:
                    return False
        return self.add_columns(steps, columns, self.names)

    def _add_rows(self, rows: list[dict[str, Any]], key: str) -> bool:
        steps: list[Any] = [row.get(key) for row in rows]
        if not are_steps(steps):
            return False
        values = []
        for row in rows:
            ours = {name: value for name, value in row.items() if name != key}
            values.append(ours if set(map(type, ours.values())) == FLOAT else numbers_of(ours, self.names))
            if self.names.given:
                self.names.rename(values[-1])
        return all(values) and self.steps.add_table(Table(steps, rows=values))

    def add(self, step: Any, values: dict[str, float], line: int, text: str = "") -> None:
        """Adds one row. `step`: the raw value from the log."""
        if step is None or step == "":
            self.steps.add(None, values, line, text)
            return
        whole = step_in(step)
        if whole is None:
            self.issues.skip(line, text, "its step is not an integer >= 0")
        else:
            self.steps.add(whole, values, line, text)

    def discard(self) -> None:
        """Discards pending rows and unread lines that turned out to be other output. Released records are kept."""
        self.issues.discard()
        self.steps.discard()
