"""Settings of a bundled task: unknown names and values out of range give one-line errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from tune_ssim.base.errors import UserError
from tune_ssim.base.yaml_source import did_you_mean

Config = TypeVar("Config")
POSITIVE, NOT_NEGATIVE = (math.ulp(0.0), math.inf), (0.0, math.inf)  # (lower, upper) of a number


def read_config(
    kind: type[Config],
    task: str,
    config: Mapping[str, Any],
    *,
    choices: Mapping[str, Sequence[Any]] | None = None,
    counts: Mapping[str, int] | None = None,
    multiples: Mapping[str, int] | None = None,
    numbers: Mapping[str, tuple[float, float]] | None = None,
    optional: Sequence[str] = (),
) -> Config:
    """The dataclass `kind` with the settings of `config`.

    choices: name → values. counts: name → least integer. multiples: name → its unit. numbers: name → (lower, upper), both allowed
    and finite. optional: names that may be null. Raises UserError naming the task and the setting.
    """
    known = sorted(field.name for field in fields(kind))  # type: ignore[arg-type]
    for name in sorted(set(config) - set(known)):
        guess = did_you_mean(name, known)
        raise UserError(f"{task}: unknown key '{name}'{guess}; known keys: {', '.join(known)}")
    made = kind(**config)
    for name, valid in (choices or {}).items():
        value = getattr(made, name)
        if not any(value is one or (type(value) is type(one) and value == one) for one in valid):
            raise UserError(f"{task}: {name} {value!r}; valid: {', '.join('null' if one is None else str(one) for one in valid)}")

    def require(name: str, kinds: Any, lower: float, upper: float, expected: str, unit: int = 0) -> None:
        value = getattr(made, name)
        if value is None and name in optional:
            return
        is_valid = isinstance(value, kinds) and not isinstance(value, bool) and lower <= value <= upper and math.isfinite(value)
        if not is_valid or (unit and value % unit):
            raise UserError(f"{task}: {name} must be {expected}, got {value!r}")

    for name, least in (counts or {}).items():
        require(name, int, least, math.inf, f"an integer >= {least}")
    for name, unit in (multiples or {}).items():
        require(name, int, unit, math.inf, f"a positive multiple of {unit}", unit)
    for name, (lower, upper) in (numbers or {}).items():
        from_lower = "> 0" if lower == POSITIVE[0] else f">= {lower:g}"
        expected = f"a finite number {from_lower}" if math.isinf(upper) else f"a number in [{lower:g}, {upper:g}]"
        require(name, (int, float), lower, upper, expected)
    return made
