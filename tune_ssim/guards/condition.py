"""The conditions of a `Rule`: guards that also track whether their condition is currently true."""

from __future__ import annotations

from typing import Protocol

from tune_ssim.guards.guard import Found, Guard, State
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Column, Table


class Condition(Guard, Protocol):
    """A guard whose state has a key `holds`: whether its condition is currently true.

    It fires when `holds` becomes true, and fires again only after `holds` was false in between."""

    def fold(self, state: State, table: Table) -> list[Found]:
        """See `TableGuard.fold`."""
        ...

    def finding(self, state: State) -> Violation:
        """The violation to report while `state["holds"]` is true."""
        ...


def check_band(lower: float, upper: float) -> None:
    if not lower < upper:
        raise ValueError(f"lower ({lower}) must be below upper ({upper})")


def check_count(name: str, value: int, minimum: int = 1) -> None:
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")


def as_action(action: Action | str) -> Action:
    """The action, also from its text. Raises ValueError for anything else."""
    try:
        return Action(action)
    except ValueError:
        *others, last = (one.value for one in Action)
        raise ValueError(f"action must be {', '.join(others)} or {last}, got {action!r}") from None


def measured_column(table: Table, metric: str, over: str | None) -> Column | None:
    """A metric, or its ratio to the metric `over`; None if no record has it."""
    return table.column(metric) if over is None else table.quotient(metric, over)


def describe_band(lower: float, upper: float) -> str:
    """A violation of the bounds in words: `below 0.1`, `above 1`, `outside [0.3, 1.5]`."""
    if lower == float("-inf"):
        return f"above {upper:g}"
    return f"below {lower:g}" if upper == float("inf") else f"outside [{lower:g}, {upper:g}]"
