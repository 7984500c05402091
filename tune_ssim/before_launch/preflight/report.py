"""Results of preflight and of `check_task`: checks with a status and evidence, convertible to JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "unknown", "warn", "bad_setup", "broken"]
SEVERITY: tuple[Status, ...] = ("ok", "unknown", "warn", "bad_setup", "broken")
MARKS: dict[Status, str] = {"ok": "✓", "unknown": "?", "warn": "!", "bad_setup": "✗", "broken": "✗"}


@dataclass(frozen=True)
class Check:
    """The result of one check. name: `subject` or `subject/part`. evidence: the numbers behind the sentence.

    bad_setup: no study with this set-up can give a result. broken (of `check_task`): no study with this class can, or it would
    misjudge. warn: it works, and something is lost. unknown: could not be measured. remedy: what to do; empty if all is well.
    seconds: that it took; checks of one measurement share it, and the first of them has it all."""

    name: str
    status: Status
    sentence: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    remedy: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        line = f"{MARKS[self.status]} {self.name}: {self.sentence}"
        return f"{line}\n    → {self.remedy}" if self.remedy else line


def ok(name: str, sentence: str) -> Check:
    return Check(name, "ok", sentence)


def unknown(name: str, sentence: str, remedy: str = "") -> Check:
    return Check(name, "unknown", sentence, remedy=remedy)


def warn(name: str, sentence: str, remedy: str = "") -> Check:
    return Check(name, "warn", sentence, remedy=remedy)


def broken(name: str, sentence: str, remedy: str) -> Check:
    return Check(name, "broken", sentence, remedy=remedy)


def judge(
    name: str,
    is_sound: bool,
    sentence: str,
    evidence: Mapping[str, float],
    remedy: str,
    otherwise: Status = "bad_setup",
    *,
    fault: str = "",
) -> Check:
    """`ok`, or the status `otherwise` with the remedy, and `fault` added to the sentence."""
    if is_sound:
        return Check(name, "ok", sentence, evidence)
    return Check(name, otherwise, sentence + fault, evidence, remedy)


def some(names: Sequence[str], words: str) -> str:
    """`3 changed (conv.weight, …)`; empty for none."""
    first = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
    return f"{len(names)} {words} ({first})" if names else ""


def listed(*clauses: str) -> str:
    return "; ".join(clause for clause in clauses if clause)


@dataclass(frozen=True)
class Report:
    """All checks of one set-up or class, in the order in which to look for a cause."""

    checks: tuple[Check, ...]
    seconds: float = math.nan

    @property
    def status(self) -> Status:
        """The worst status; `unknown` only if all checks are unknown."""
        known = [check.status for check in self.checks if check.status != "unknown"]
        return max(known, key=SEVERITY.index, default="unknown")

    @property
    def reason(self) -> str:
        """The first of the worst checks in one line; empty if all is well."""
        if self.status in ("ok", "unknown"):
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
