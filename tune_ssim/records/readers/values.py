"""Converts names and numbers of third-party logs to ours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from tune_ssim.base.errors import UserError
from tune_ssim.records import EPOCH
from tune_ssim.records.metric_names import HELD_OUT_WORDS, is_held_out

# Keys for the step, first match wins: plain loops; Hugging Face and MMEngine; wandb; Lightning in wandb.
STEP_NAMES = ("step", "global_step", "iter", "iteration", "_step", "trainer/global_step")
# The same of other producers, which are not looked for in printed lines: LLaMA-Factory; ms-swift; Ray Tune; fairseq;
# Stable-Baselines3; EDM and StyleGAN.
OTHER_STEP_NAMES = (
    "global_steps", "train_step", "training_step", "current_step", "current_steps", "global_step/max_steps", "training_iteration",
    "num_updates", "time/total_timesteps", "total_timesteps", "iters", "steps", "progress/kimg", "progress/tick",
)  # fmt: skip
SUMMARY = {"num", "mean", "std", "min", "max", "count", "median", "sum"}  # keys of a metric that is summarised over a tick
MAX_STEP = 2**63 - 1  # as TensorBoard and MLflow store it
Value = TypeVar("Value")
SPLIT_NAMES = ("split", "mode", "phase", "stage", "subset")  # keys of the data that a row is of; mode: MMCV
UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}
ROUNDED = re.compile(r"(?P<digits>\d{1,9}(?:\.\d{1,6})?)(?:(?P<unit>[kKmMbB])|e\+?(?P<exponent>\d{1,2}))")
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+")
WINDOWS = re.compile(r"1\.#(?:(inf)|ind|[qs]?nan)0*", re.IGNORECASE)  # Inf and NaN of an old C library: 1.#INF, -1.#IND, 1.#QNAN
MAX_NESTING = 6  # levels of objects read from a JSON row, as "train/loss"
MAX_NAMES = 10_000  # cached names; bounds memory for a log whose names never repeat


class Names(dict[str, str]):
    """Metric name in the log → ours. `given`: the user's mapping; other names are unchanged, except that unpaired surrogates
    (from a broken escape) are replaced because they cannot be printed. Raises UserError if `given` does not map names to
    names."""

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.given = dict(given or {})
        self.used: set[str] = set()  # the given names that the log has
        for theirs, ours in self.given.items():
            if not (isinstance(theirs, str) and isinstance(ours, str) and theirs and ours):
                raise UserError(f"names: must map their metric names to ours, e.g. grad_norm: total_norm; got {theirs!r}: {ours!r}")
        self.given_steps = tuple(theirs for theirs, ours in self.given.items() if ours == "step")
        self.printed_steps = (*self.given_steps, *STEP_NAMES)  # in printed lines
        self.steps = (*self.printed_steps, *OTHER_STEP_NAMES)

    def __missing__(self, theirs: str) -> str:
        if len(self) >= MAX_NAMES:
            self.clear()
        ours = theirs.encode("utf-8", "replace").decode()
        self[theirs] = ours
        return ours

    def step_of(self, row: dict[str, Any]) -> Any:
        """Removes the step from a row and returns its raw value; None if there is none. Falls back to a case-insensitive match, and
        to objects inside the row."""
        for key in self.given_steps:
            if (value := _taken(row, key)) is not None:
                self.used.add(key)
                return value
        for key in self.steps:
            if key in row:
                return _plain(row.pop(key))
        lower = {key.lower(): key for key in row}
        for key in self.steps:
            if key in lower:
                return _plain(row.pop(lower[key]), is_rounded=key.endswith("kimg"))
        for outer, inside in row.items():
            for key in inside if isinstance(inside, dict) else ():
                if key.lower() in self.steps or f"{outer}/{key}".lower() in self.steps:
                    return _plain(inside.pop(key), is_rounded=key.lower() == "kimg")
        return None

    def rename(self, values: dict[str, Value]) -> dict[str, Value]:
        """Renames by `given`, in place. A renamed metric overrides one that already has our name."""
        if self.given:
            found = [theirs for theirs in self.given if theirs in values]
            self.used.update(found)
            values.update({self.given[theirs]: values.pop(theirs) for theirs in found})
        return values

    @property
    def unused(self) -> list[str]:
        """The given names that the log does not have."""
        return [theirs for theirs in self.given if not {theirs, theirs.lower()} & self.used]


def _taken(row: dict[str, Any], key: str) -> Any:
    """Removes `outer/inner` from a row, however deep it lies; None if it is not there."""
    if key in row:
        return _plain(row.pop(key))
    for at, letter in enumerate(key):
        inside = row.get(key[:at]) if letter == "/" else None
        if isinstance(inside, dict) and (value := _taken(inside, key[at + 1 :])) is not None:
            return value
    return None


def _plain(value: Any, is_rounded: bool = False) -> Any:
    """The mean of a summarised value; any other value is unchanged. is_rounded: of thousands of images, which may be broken."""
    if isinstance(value, dict) and "mean" in value:
        value = value["mean"]
    return round(value) if is_rounded and isinstance(value, float) and math.isfinite(value) else value


def as_held_out(values: dict[str, Value], row: Mapping[str, Any]) -> dict[str, Value]:
    """The values with `val_` before each name if the row says that it is of held-out data: `"split": "val"`."""
    words = [row[key].lower() for key in SPLIT_NAMES if isinstance(row.get(key), str)]
    if HELD_OUT_WORDS.isdisjoint(words):
        return values
    return {name if is_held_out(name) or name == EPOCH else f"val_{name}": value for name, value in values.items()}


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


def broken_in(values: Iterable[Any], level: int = 1) -> float | None:
    """The first number in JSON values, or in a list or an object among them, that is not finite; else None."""
    for value in values:
        if isinstance(value, (list, dict)):
            inside = value.values() if isinstance(value, dict) else value
            number = broken_in(inside, level + 1) if level < MAX_NESTING else None
        else:
            number = number_in(value)
        if number is not None and not math.isfinite(number):
            return number
    return None


def without_windows(text: str) -> str:
    """The text with `1.#INF` as `inf` and `1.#QNAN` as `nan`."""
    return WINDOWS.sub(lambda found: "inf" if found[1] else "nan", text) if ".#" in text else text


def text_number(text: str) -> float | None:
    """The number in a text such as "0.3", "1e-4", "nan" or "-Infinity"; None for other text, including "1_000"."""
    try:
        return None if "_" in text else float(without_windows(text))
    except ValueError:
        return None


def rounded_step(value: Any) -> tuple[int, int] | None:
    """The step in a text that shows its first digits only, such as `1K` or `1.2e+04`, and what its last digit counts; else None."""
    found = ROUNDED.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 20 else None
    if found is None:
        return None
    unit = UNITS[found["unit"].lower()] if found["unit"] else 10 ** int(found["exponent"])
    step = round(float(found["digits"]) * unit)
    return (step, unit // 10 ** len(found["digits"].partition(".")[2])) if 0 < step <= MAX_STEP else None


def step_in(value: Any) -> int | None:
    """The step in a value such as "12", 12 or 12.0: an integer >= 0, else None."""
    if type(value) is int:
        return value if 0 <= value <= MAX_STEP else None
    if isinstance(value, str):
        if len(value) < 19 and value.isascii() and value.isdigit():
            return int(value)
        if len(value) > 40:
            return None
        digits = value.partition("/")[0].strip()  # 10/438
        if THOUSANDS.fullmatch(digits):
            digits = digits.replace(",", "")
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
            if "mean" in value and value.keys() <= SUMMARY:
                values.update(numbers_of({name: value["mean"]}, names, prefix, level))
            elif level < MAX_NESTING:
                values.update(numbers_of(value, names, f"{prefix}{name}/", level + 1))
        else:
            number = broken_in(value) if isinstance(value, list) else number_in(value)
            if number is not None:
                values[names[prefix + name]] = number
    return values
