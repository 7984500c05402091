"""The report of `check_task`: printed as a list, or raised as one exception in tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tune_ssim.before_launch.preflight.report import MARKS, Check, Report

Finding = Check


def ok(name: str, sentence: str) -> Check:
    return Check(name, "ok", sentence)


def unknown(name: str, sentence: str, remedy: str) -> Check:
    return Check(name, "unknown", sentence, remedy=remedy)


def warn(name: str, sentence: str, remedy: str) -> Check:
    return Check(name, "warn", sentence, remedy=remedy)


def broken(name: str, sentence: str, remedy: str) -> Check:
    return Check(name, "broken", sentence, remedy=remedy)


@dataclass(frozen=True)
class TaskReport(Report):
    """All findings about one class, in the order in which to fix them."""

    task: str = ""

    @property
    def findings(self) -> tuple[Check, ...]:
        return self.checks

    @property
    def ok(self) -> bool:
        """Whether nothing is broken. Unmeasured checks do not count."""
        return not self.of("broken")

    def raise_if_broken(self) -> None:
        """Raises AssertionError listing everything broken, for use at the end of a test."""
        if found := self.of("broken"):
            raise AssertionError("\n".join((f"{self.task} does not keep the contract of a task:", *map(str, found))))

    def to_dict(self) -> dict[str, Any]:
        findings = [{name: value for name, value in asdict(check).items() if name != "evidence"} for check in self.checks]
        return {"task": self.task, "ok": self.ok, "seconds": self.seconds, "findings": findings}

    def __str__(self) -> str:
        counts: Mapping[str, int] = {status: len(self.of(status)) for status in MARKS}
        summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        lines = (str(check).replace("\n", "\n  ") for check in self.checks)
        return "\n".join((f"{self.task}: {summary} ({self.seconds:.1f} s)", *(f"  {line}" for line in lines)))
