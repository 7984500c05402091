"""A row of a log, as an object or as named texts, on its way to a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune_ssim.sources.steps import Steps
from tune_ssim.sources.trouble import Trouble
from tune_ssim.sources.values import Names, numbers_of, step_in

FLOAT = {float}


class Rows:
    """What every format hands its rows to; `names`: their metric names → ours."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.trouble = Trouble()
        self.names = Names(names)
        self.steps = Steps(self.trouble)

    def add_object(self, row: dict[str, Any], line: int, text: str, plain: bool = False) -> None:
        """A JSON object, which is used up, and the text that it was read from; `plain`: without escapes in it. An object
        without numbers is no row."""
        step = self.names.step_of(row)
        # The usual row is nothing but floats, and becomes the record's values as it is.
        values = row if plain and set(map(type, row.values())) == FLOAT else numbers_of(row, self.names)
        if self.names.given:
            self.names.rename(values)
        if values:
            self.add(step, values, line, text)

    def add(self, step: Any, values: dict[str, float], line: int, text: str = "") -> None:
        """`step` as the log has it."""
        if step is None or step == "":
            self.steps.add(None, values, line, text)
            return
        whole = step_in(step)
        if whole is None:
            self.trouble.skip(line, text, "its step is no whole number from 0 on")
        else:
            self.steps.add(whole, values, line, text)

    def forget(self) -> None:
        """What was taken for rows, and for unreadable ones, was other output. What was released stays so."""
        self.trouble.forget()
        self.steps.forget()

    def to_json(self) -> dict[str, Any]:
        return {"trouble": self.trouble.to_json(), "steps": self.steps.to_json()}

    def load_json(self, data: Mapping[str, Any]) -> None:
        self.trouble = self.steps.trouble = Trouble.from_json(data["trouble"])
        self.steps.load_json(data["steps"])
