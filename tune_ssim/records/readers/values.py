"""Names and numbers of somebody else's log, made ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from tune_ssim.base.errors import UserError

# Where a row says its step, the first that is there: plain loops; Hugging Face and MMEngine; wandb; Lightning in wandb.
STEP_NAMES = ("step", "global_step", "iter", "iteration", "_step", "trainer/global_step")
MAX_STEP = 2**63 - 1  # as TensorBoard and MLflow store it
Value = TypeVar("Value")
NESTED = 3  # levels of objects in a JSON row that are read, as "train/loss"
KNOWN_NAMES = 10_000  # remembered; a log whose names never repeat must not fill the memory


class Names(dict[str, str]):
    """Their name → ours. `given` is what the user said, other names stay as they are (but for halves of
    surrogate pairs, from a broken escape, which cannot be printed). Raises UserError for a `given` that is not names → names."""

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.given = dict(given or {})
        for theirs, ours in self.given.items():
            if not (isinstance(theirs, str) and isinstance(ours, str) and theirs and ours):
                raise UserError(f"names: must map their metric names to ours, e.g. grad_norm: total_norm; got {theirs!r}: {ours!r}")
        self.steps = (*(theirs for theirs, ours in self.given.items() if ours == "step"), *STEP_NAMES)

    def __missing__(self, theirs: str) -> str:
        if len(self) >= KNOWN_NAMES:
            self.clear()
        ours = theirs.encode("utf-8", "replace").decode()
        self[theirs] = ours
        return ours

    def step_of(self, row: dict[str, Any]) -> Any:
        """Takes the step out of a row, as it stands there; None if there is none. `Step` is `step` where there is no other."""
        for key in self.steps:
            if key in row:
                return row.pop(key)
        for key in row:
            if key.lower() in STEP_NAMES:
                return row.pop(key)
        return None

    def rename(self, values: dict[str, Value]) -> dict[str, Value]:
        """What `given` says, which beats a metric that had our name already."""
        moved = {ours: values.pop(theirs) for theirs, ours in self.given.items() if theirs in values}
        values.update(moved)
        return values


def number_in(value: Any) -> float | None:
    """A number as JSON or a person may write it ("NaN", "Infinity", "0.3" included); None for everything else.
    A whole number beyond the range of a float is infinite."""
    if isinstance(value, str):
        return text_number(value)
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return None


def text_number(text: str) -> float | None:
    """ "0.3", "1e-4", "nan", "-Infinity"; None for any other text. Python's own "1_000" is none."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def step_in(value: Any) -> int | None:
    """A whole number from zero on ("12", 12, 12.0), else None."""
    if type(value) is int:
        return value if 0 <= value <= MAX_STEP else None
    if isinstance(value, str):
        if len(value) < 19 and value.isascii() and value.isdigit():
            return int(value)
        if len(value) > 40:
            return None
        digits = value.strip()
        if digits.isascii() and digits.isdigit():
            return step_in(int(digits))
        value = text_number(digits)
    if isinstance(value, float) and 0 <= value <= MAX_STEP and value.is_integer():
        return step_in(int(value))
    return None


def numbers_of(row: Mapping[str, Any], names: Names, prefix: str = "", level: int = 1) -> dict[str, float]:
    """The numbers of a JSON object under our names; those of an object inside as "outer/inner"."""
    values: dict[str, float] = {}
    for name, value in row.items():
        if type(value) is float:
            values[names[prefix + name]] = value
        elif isinstance(value, dict):
            if level < NESTED:
                values.update(numbers_of(value, names, f"{prefix}{name}/", level + 1))
        else:
            number = number_in(value)
            if number is not None:
                values[names[prefix + name]] = number
    return values
