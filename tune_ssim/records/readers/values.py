"""Converts names and numbers of third-party logs to ours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from tune_ssim.base.errors import UserError
from tune_ssim.records import LOSS, TOTAL_NORM

# Keys for the step, first match wins: plain loops; Hugging Face and MMEngine; wandb; Lightning in wandb.
STEP_NAMES = ("step", "global_step", "iter", "iteration", "_step", "trainer/global_step")
MAX_STEP = 2**63 - 1  # as TensorBoard and MLflow store it
Value = TypeVar("Value")
MAX_NESTING = 3  # levels of objects read from a JSON row, as "train/loss"
# Our name → words that identify the metric (one is needed), and words that may also occur in its name (Lightning, Hugging Face,
# MMEngine, DeepSpeed, fairseq).
USUAL_WORDS = {
    LOSS: ({"loss"}, {"train", "training", "total", "step"}),
    TOTAL_NORM: ({"norm", "gnorm", "gradnorm"}, {"grad", "gradient", "global", "total", "train", "training"}),
}
MAX_NAMES = 10_000  # cached names; bounds memory for a log whose names never repeat


class Names(dict[str, str]):
    """Metric name in the log → ours. `given`: the user's mapping; other names are unchanged, except that unpaired surrogates
    (from a broken escape) are replaced because they cannot be printed. Raises UserError if `given` does not map names to
    names."""

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.given = dict(given or {})
        for theirs, ours in self.given.items():
            if not (isinstance(theirs, str) and isinstance(ours, str) and theirs and ours):
                raise UserError(f"names: must map their metric names to ours, e.g. grad_norm: total_norm; got {theirs!r}: {ours!r}")
        self.steps = (*(theirs for theirs, ours in self.given.items() if ours == "step"), *STEP_NAMES)

    def __missing__(self, theirs: str) -> str:
        if len(self) >= MAX_NAMES:
            self.clear()
        ours = theirs.encode("utf-8", "replace").decode()
        self[theirs] = ours
        return ours

    def step_of(self, row: dict[str, Any]) -> Any:
        """Removes the step from a row and returns its raw value; None if there is none. Falls back to a case-insensitive match."""
        for key in self.steps:
            if key in row:
                return row.pop(key)
        for key in row:
            if key.lower() in STEP_NAMES:
                return row.pop(key)
        return None

    def rename(self, values: dict[str, Value]) -> dict[str, Value]:
        """Renames by `given`, in place. A renamed metric overrides one that already has our name."""
        values.update({ours: values.pop(theirs) for theirs, ours in self.given.items() if theirs in values})
        return values


def usual_names(metrics: Iterable[str]) -> dict[str, str]:
    """Common names of loss and gradient norm in the log → our names, if ours is missing and exactly one metric matches."""
    words = {name: set(re.findall("[a-z]+", name.lower())) for name in metrics}
    found = {}
    for ours, (one_of, others) in USUAL_WORDS.items():
        candidates = [name for name in words if words[name] <= one_of | others and words[name] & one_of]
        if ours not in words and len(candidates) == 1:
            found[candidates[0]] = ours
    return found


def number_in(value: Any) -> float | None:
    """The number in a JSON value, including text such as "NaN", "Infinity" or "0.3"; None for anything else.
    An integer too large for a float becomes infinite."""
    if isinstance(value, str):
        return text_number(value)
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return None


def text_number(text: str) -> float | None:
    """The number in a text such as "0.3", "1e-4", "nan" or "-Infinity"; None for other text, including "1_000"."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def step_in(value: Any) -> int | None:
    """The step in a value such as "12", 12 or 12.0: an integer >= 0, else None."""
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
    """The numbers of a JSON object under our names. Nested keys become "outer/inner"."""
    values: dict[str, float] = {}
    for name, value in row.items():
        if type(value) is float:
            values[names[prefix + name]] = value
        elif isinstance(value, dict):
            if level < MAX_NESTING:
                values.update(numbers_of(value, names, f"{prefix}{name}/", level + 1))
        else:
            number = number_in(value)
            if number is not None:
                values[names[prefix + name]] = number
    return values
