"""The report of a guard that fired."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tune_ssim.guards.verdict import Action


@dataclass(frozen=True)
class Violation:
    guard: str
    step: int
    metric: str
    value: float
    limit: float
    action: Action
    sentence: str
    remedy: str = ""  # what to try first
    cause: str = ""  # the likely cause

    def __post_init__(self) -> None:
        object.__setattr__(self, "action", Action(self.action))  # saved states and user-defined guards may pass the text

    def evidence(self) -> dict[str, Any]:
        """`{guard, step, metric, value, limit}`, as written to `trials.jsonl`."""
        everything = asdict(self)
        return {key: everything[key] for key in ("guard", "step", "metric", "value", "limit")}
