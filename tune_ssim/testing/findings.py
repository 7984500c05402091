"""What the conformance suite says of a task: a list for people, one exception for their tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "unknown", "warn", "broken"]
MARKS: dict[Status, str] = {"ok": "✓", "unknown": "?", "warn": "!", "broken": "✗"}


@dataclass(frozen=True)
class Finding:
    """One part of the contract. broken: a study with this task fails or misjudges. warn: it works, and something is lost.
    unknown: could not be looked at. remedy: what to do; empty if all is well."""

    name: str
    status: Status
    sentence: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{MARKS[self.status]} {self.name}: {self.sentence}"
        return f"{line}\n    → {self.remedy}" if self.remedy else line


@dataclass(frozen=True)
class TaskReport:
    """All findings about one task, in the order in which one would mend them."""

    task: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Nothing is broken. What could not be looked at does not count against the task."""
        return not self.of("broken")

    def of(self, status: Status) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == status]

    def raise_if_broken(self) -> None:
        """AssertionError with all that is broken: the last line of a user's test."""
        if broken := self.of("broken"):
            raise AssertionError("\n".join((f"{self.task} does not keep the contract of a task:", *map(str, broken))))

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, "ok": self.ok, "seconds": self.seconds, "findings": [asdict(f) for f in self.findings]}

    def __str__(self) -> str:
        counts: Mapping[str, int] = {status: len(self.of(status)) for status in MARKS}
        told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return "\n".join((f"{self.task}: {told} ({self.seconds:.1f} s)", *(f"  {_indented(finding)}" for finding in self.findings)))


def _indented(finding: Finding) -> str:
    return str(finding).replace("\n", "\n  ")
