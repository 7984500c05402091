"""Printed tables of one record each: a line for each metric, as the loggers of OpenAI's baselines, guided-diffusion and
Stable-Baselines3 print them."""

from __future__ import annotations

import re
from typing import Any

from tune_ssim.records import EPOCH
from tune_ssim.records.readers.reader import LineFormat
from tune_ssim.records.readers.rows import Rows
from tune_ssim.records.readers.values import text_number

# `| loss      | 16.6 |`, and `| train/    |      |` above the lines of a section.
CELLS = re.compile(r"\s{0,200}\|(\s{0,40})([^|]{1,200}?)\s{0,200}\|\s{0,200}([^|]{0,200}?)\s{0,200}\|\s{0,200}")
RULE = re.compile(r"\s{0,200}[-=+]{5,400}\s{0,200}")


class TableLines(LineFormat):
    """A table is a record; it ends with a rule, or where a name comes again."""

    format = "text"

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.has_rows = False
        self._row: dict[str, Any] = {}
        self._number = 0
        self._section = ""

    def recognises(self, line: str, number: int) -> bool:
        """Takes a line, and returns whether a table that is a row of a training is complete."""
        self.take([line], number)
        return self.has_rows

    def take(self, lines: list[str], number: int) -> None:
        for at, line in enumerate(lines, number):
            cells = CELLS.fullmatch(line) if "|" in line else None
            if cells is not None:
                self._take_cells(len(cells[1]), cells[2], cells[3], at)
            elif self._row and line.strip() and RULE.fullmatch(line):
                self.finish()

    def _take_cells(self, indent: int, name: str, value: str, number: int) -> None:
        if not value:
            self._section = name if name.endswith("/") else ""
            return
        if indent < 2:
            self._section = ""
        name = self._section + name
        if name in self._row:
            self.finish()
        self._number = self._number or number
        self._row[name] = value

    def finish(self) -> None:
        row, number = self._row, self._number
        self._row, self._number, self._section = {}, 0, ""
        numbers = {name for name, value in row.items() if text_number(value) is not None}
        has_step = any(name.lower() in (*self._rows.names.steps, EPOCH) for name in row)
        if self.has_rows or (has_step and len(numbers) > 1):
            self.has_rows = True
            self._rows.add_object(dict(row), number, "")
