"""A metric that must stay within bounds: the guard users write most."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tune_ssim.guards.guard import State
from tune_ssim.guards.violation import Action, Violation
from tune_ssim.records import Record


@dataclass(frozen=True)
class Threshold:
    """Fires after `patience` records in a row with `metric` outside [`lower`, `upper`]. NaN counts as outside."""

    metric: str
    lower: float = -math.inf
    upper: float = math.inf
    patience: int = 1
    action: Action = "prune"

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by the study's loader)

    def __post_init__(self) -> None:
        if not self.lower < self.upper:
            raise ValueError(f"lower ({self.lower}) must be below upper ({self.upper})")
        if self.patience < 1:
            raise ValueError(f"patience must be >= 1, got {self.patience}")
        if self.action not in ("warn", "probe", "prune", "abort"):
            raise ValueError(f"action must be warn, probe, prune or abort, got {self.action!r}")

    @property
    def name(self) -> str:
        return f"threshold:{self.metric}"

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def init(self) -> State:
        return {"outside": 0, "last_step": -1}

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        value = record.values.get(self.metric)
        if value is None or record.step <= state["last_step"]:
            return state, None
        inside = self.lower <= value <= self.upper
        state = {"outside": 0 if inside else state["outside"] + 1, "last_step": record.step}
        if state["outside"] != self.patience:
            return state, None
        limit = self.lower if value < self.lower else self.upper
        bounds = f"[{self.lower:g}, {self.upper:g}]"
        sentence = f"{self.metric} is {value:.4g}, outside {bounds}, {self.patience} records in a row"
        return state, Violation(self.name, record.step, self.metric, value, limit, self.action, sentence)

    def unjudged(self, state: State) -> str | None:
        return None
