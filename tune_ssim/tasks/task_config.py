"""Settings of a bundled task: unknown names and values out of range give one-line errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from tune_ssim.base.errors import UserError
from tune_ssim.base.yaml_source import did_you_mean

Config = TypeVar("Config")


def read_config(
    kind: type[Config],
    task: str,
    config: Mapping[str, Any],
    *,
    choices: Mapping[str, Sequence[Any]] | None = None,
    counts: Mapping[str, int] | None = None,
    numbers: Mapping[str, tuple[float, float]] | None = None,
    switches: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> Config:
    """The dataclass `kind` with the settings of `config`.

    choices: name → values. counts: name → least integer. numbers: name → (lower, upper), both allowed and finite.
    switches: true or false. optional: names that may be null. Raises UserError naming the task and the setting.
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
    for name, least in (counts or {}).items():
        value = getattr(made, name)
        if value is None and name in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{task}: {name} must be an integer >= {least}, got {value!r}")
    for name, (lower, upper) in (numbers or {}).items():
        value = getattr(made, name)
        if value is None and name in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (lower <= value <= upper and math.isfinite(value)):
            bounds = f"a finite number >= {lower:g}" if math.isinf(upper) else f"a number in [{lower:g}, {upper:g}]"
            raise UserError(f"{task}: {name} must be {bounds}, got {value!r}")
    for name in switches:
        if not isinstance(getattr(made, name), bool):
            raise UserError(f"{task}: {name} must be true or false, got {getattr(made, name)!r}")
    return made
