"""What a guard says when it fires."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Action = Literal["warn", "probe", "prune", "abort"]
"""`warn`: say it. `probe`: a smoke test at once decides. `prune`: end the trial. `abort`: bad set-up, end the study."""
ACTIONS: tuple[str, ...] = get_args(Action)


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
    cause: str = ""  # what is likely behind it

    def evidence(self) -> dict[str, Any]:
        """`{guard, step, metric, value, limit}`, as written to `trials.jsonl`."""
        everything = asdict(self)
        return {key: everything[key] for key in ("guard", "step", "metric", "value", "limit")}
