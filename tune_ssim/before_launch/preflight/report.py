"""What preflight says: a verdict for every question about a set-up, each with its evidence. Plain data, JSON in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "unknown", "warn", "bad_setup"]
SEVERITY: tuple[Status, ...] = ("ok", "unknown", "warn", "bad_setup")


@dataclass(frozen=True)
class Check:
    """One verdict. name: `subject` or `subject/part`. evidence: the numbers behind the sentence."""

    name: str
    status: Status
    sentence: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All checks of one set-up, in the order in which one would look for a cause."""

    checks: tuple[Check, ...]
    seconds: float = math.nan

    @property
    def status(self) -> Status:
        """The worst; `unknown` only where nothing at all is known."""
        known = [check.status for check in self.checks if check.status != "unknown"]
        return max(known, key=SEVERITY.index, default="unknown")

    @property
    def reason(self) -> str:
        """The first of the worst checks in one line; empty if all is well."""
        if self.status not in ("warn", "bad_setup"):
            return ""
        check = next(check for check in self.checks if check.status == self.status)
        return f"{check.name}: {check.sentence}"

    def of(self, status: Status) -> list[Check]:
        return [check for check in self.checks if check.status == status]

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "reason": self.reason,
            "seconds": self.seconds,
            "checks": [asdict(check) | {"evidence": dict(check.evidence)} for check in self.checks],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`, also after JSON that spells NaN and Infinity as text."""
        checks = tuple(
            Check(**{**check, "evidence": {name: float(value) for name, value in check["evidence"].items()}})
            for check in data["checks"]
        )
        return cls(checks, float(data["seconds"]))
