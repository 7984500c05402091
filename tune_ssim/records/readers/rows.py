"""Converts rows of a log, from any format, to records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tune_ssim.records.readers.parse_issues import ParseIssues
from tune_ssim.records.readers.steps import Steps
from tune_ssim.records.readers.values import MAX_STEP, Names, as_held_out, numbers_of, rounded_step, step_in
from tune_ssim.records.record_table import Table


class Rows:
    """Collects the rows of every format. `names`: metric names in the log → ours."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.issues = ParseIssues()
        self.names = Names(names)
        self.steps = Steps(self.issues)

    def add(self, step: Any, values: dict[str, float], line: int, text: str = "", names: Names | None = None) -> None:
        """Adds one row, with metric names as in the log; a row without metrics is only counted.

        step: the raw value from the log, or None. text: what the row was read from. names: default those of the log."""
        if not values:
            if (empty := step_in(step)) is not None:
                self.issues.empty.add(empty)
            return
        self.issues.empty.end()
        values = (self.names if names is None else names).rename(values)
        if step is None or step == "":
            self.steps.add(None, values, line, text)
            return
        rounded = rounded_step(step)
        whole = step_in(step) if rounded is None else self.steps.exact(*rounded)
        if whole is None:
            self.issues.skip(line, text, "its step is not an integer >= 0")
            self.steps.keep_broken(values, line)
        else:
            self.steps.add(whole, values, line, text)

    def add_aside(self, values: dict[str, float], line: int, names: Names) -> None:
        """Adds what is not finite among the numbers of a row that is of no step of the training."""
        self.steps.keep_broken(names.rename(values), line)

    def add_object(self, row: dict[str, Any], line: int, text: str) -> None:
        """Adds a JSON object, which is modified."""
        step = self.names.step_of(row)
        self.add(step, as_held_out(numbers_of(row, self.names), row), line, text)

    def add_columns(self, steps: Sequence[Any], columns: Mapping[str, Sequence[Any]], names: Names | None = None) -> bool:
        """Adds rows with the same metrics as columns. False: nothing was added, because a value is not a number or the steps do
        not increase; add the rows one by one."""
        if not columns or set(map(type, steps)) != {int} or min(steps) < 0 or max(steps) > MAX_STEP:
            return False
        try:
            floats: dict[str, Sequence[float]] = {name: tuple(map(float, values)) for name, values in columns.items()}
        except (TypeError, ValueError, OverflowError):
            return False
        self.issues.empty.end()
        return self.steps.add_table(Table(steps, columns=(self.names if names is None else names).rename(floats)))

    def add_objects(self, rows: list[dict[str, Any]]) -> bool:
        """Adds JSON objects without escapes, with the same keys in the same order, which is the usual case. False: nothing was
        added; add them one by one."""
        names = tuple(rows[0])
        key = next((key for key in self.names.steps if key in names), None)
        if (
            key is None
            or (self.names.given_steps and key not in self.names.given_steps)
            or not all(map(names.__eq__, map(tuple, rows)))
        ):
            return False
        self.names.used.add(key)
        columns: dict[str, Any] = dict(zip(names, zip(*map(dict.values, rows), strict=True), strict=True))
        if any(str in set(map(type, column)) for column in columns.values()):  # float() takes "1_0" for a number
            return False
        return self.add_columns(columns.pop(key), columns)

    def discard(self) -> None:
        """Discards pending rows and unread lines that turned out to be other output. Released records are kept."""
        self.issues.discard()
        self.steps.discard()
