"""What a `Rule` is made of: a guard that also knows whether what it looks for holds right now."""

from __future__ import annotations

from typing import Protocol

from tune_ssim.guards.guard import Found, Guard, State
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Column, Table


class Condition(Guard, Protocol):
    """Its state has a key `holds`. It fires when `holds` becomes true, and again only after it was false in between."""

    def fold(self, state: State, table: Table) -> list[Found]:
        """See `TableGuard.fold`."""
        ...

    def finding(self, state: State) -> Violation:
        """What it says, or would say again, while `state["holds"]`."""
        ...


def check_band(lower: float, upper: float) -> None:
    if not lower < upper:
        raise ValueError(f"lower ({lower}) must be below upper ({upper})")


def check_count(name: str, value: int, least: int = 1) -> None:
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def as_action(action: Action | str) -> Action:
    """The action, also by its text. Raises ValueError for any other."""
    try:
        return Action(action)
    except ValueError:
        *others, last = (one.value for one in Action)
        raise ValueError(f"action must be {', '.join(others)} or {last}, got {action!r}") from None


def measured_column(table: Table, metric: str, over: str | None) -> Column | None:
    """A metric, or its quotient with another, of the records that have it."""
    return table.column(metric) if over is None else table.quotient(metric, over)


def band_words(lower: float, upper: float) -> str:
    """`below 0.1`, `above 1`, `outside [0.3, 1.5]`: which side is the wrong one."""
    if lower == float("-inf"):
        return f"above {upper:g}"
    return f"below {lower:g}" if upper == float("inf") else f"outside [{lower:g}, {upper:g}]"
