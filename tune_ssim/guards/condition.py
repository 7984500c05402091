"""The conditions of a `Rule`: guards that also track whether their condition is currently true."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tune_ssim.base.errors import FieldError, check_field
from tune_ssim.guards.guard import State, TableGuard
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Column, Table


class Condition(TableGuard):
    """A guard whose state has a key `holds`: whether its condition is currently true.

    It fires when `holds` becomes true, and fires again only after `holds` was false in between."""

    def finding(self, state: State) -> Violation:
        """The violation to report while `state["holds"]` is true."""
        raise NotImplementedError


@dataclass(frozen=True)
class Band(Condition):
    """The condition that a number made from `metric` is outside [`lower`, `upper`]. NaN counts as outside."""

    metric: str  # its name in the log
    lower: float = -math.inf  # in the metric's unit; none by default
    upper: float = math.inf  # the same

    def __post_init__(self) -> None:
        check_field(self.lower < self.upper, "lower", f"must be below upper ({self.upper})", self.lower)
        set_action(self)

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def is_outside(self, value: float) -> bool:
        return not self.lower <= value <= self.upper

    def violation(self, step: int, value: float, subject: str, detail: str = "") -> Violation:
        """subject: the beginning of the sentence, e.g. `loss is`. detail: its end."""
        is_low = value < self.lower or self.upper == math.inf
        if self.lower == -math.inf:
            band = f"above {self.upper:g}"
        else:
            band = f"below {self.lower:g}" if self.upper == math.inf else f"outside [{self.lower:g}, {self.upper:g}]"
        action: Action = vars(self)["action"]
        limit, sentence = self.lower if is_low else self.upper, f"{subject} {value:.4g}, {band}{detail}"
        return Violation(self.name, step, self.metric, value, limit, action, sentence)


@dataclass(frozen=True)
class RatioBand(Band):
    """A `Band` for a metric or for its ratio to the metric `over`. after: steps before it are not judged."""

    over: str | None = field(default=None, kw_only=True)
    after: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self.after >= 0, "after", "must be >= 0", self.after)

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,) if self.over is None else (self.metric, self.over)

    @property
    def quantity(self) -> str:
        """The name of what is judged."""
        return " / ".join(self.metrics)

    def column(self, table: Table) -> Column | None:
        """What is judged, for the records that have it; None if there are none."""
        return table.column(self.metric) if self.over is None else table.quotient(self.metric, self.over)

    @property
    def begun(self) -> str:
        return f" after step {self.after}" if self.after else ""


def set_action(guard: object) -> None:
    """Makes the text in the field `action` an Action. Raises FieldError for anything else."""
    action = vars(guard)["action"]
    try:
        object.__setattr__(guard, "action", Action(action))
    except ValueError:
        *others, last = (one.value for one in Action)
        raise FieldError("action", f"must be {', '.join(others)} or {last}, got {action!r}") from None
