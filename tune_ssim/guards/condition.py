"""What a `Rule` is made of: a guard that also knows whether what it looks for holds right now."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from tune_ssim.guards.guard import Fold, Found, Guard, State
from tune_ssim.guards.violation import ACTIONS, Violation
from tune_ssim.records.record_table import Column, Table


class Condition(Guard, Protocol):
    """Its state has a key `holds`; it speaks when that turns true, and again only after it was false in between."""

    def bound(self, state: State) -> Fold:
        """As `update`, in place."""
        ...

    def fold_table(self, state: State, table: Table) -> list[Found]: ...

    def finding(self, state: State) -> Violation:
        """What it says, or would say again, while `state["holds"]`."""
        ...


def check_band(lower: float, upper: float) -> None:
    if not lower < upper:
        raise ValueError(f"lower ({lower}) must be below upper ({upper})")


def check_count(name: str, value: int, least: int = 1) -> None:
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def check_action(action: str) -> None:
    if action not in ACTIONS:
        raise ValueError(f"action must be {', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}, got {action!r}")


def measured(values: Mapping[str, float], metric: str, over: str | None) -> float | None:
    """A metric of a record, or its quotient with another; None where one is missing. By zero the quotient is infinite with the
    sign of what is divided, and 0 of zero itself: nothing of nothing."""
    value = values.get(metric)
    if value is None or over is None:
        return value
    below = values.get(over)
    if below is None:
        return None
    return value / below if below else 0.0 if not value else math.copysign(math.inf, value)


def measured_column(table: Table, metric: str, over: str | None) -> Column | None:
    """The same of every record that has it."""
    return table.column(metric) if over is None else table.quotient(metric, over)


def band_words(lower: float, upper: float) -> str:
    """`below 0.1`, `above 1`, `outside [0.3, 1.5]`: which side is the wrong one."""
    if lower == float("-inf"):
        return f"above {upper:g}"
    return f"below {lower:g}" if upper == float("inf") else f"outside [{lower:g}, {upper:g}]"
