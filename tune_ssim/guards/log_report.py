"""What the check of a log found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tune_ssim.guards import NonFinite, Violation
from tune_ssim.guards.branch_report import BranchReport
from tune_ssim.guards.curves import Curve
from tune_ssim.guards.rule_pack import RulePack
from tune_ssim.records import LOSS, TOTAL_NORM

SCHEMA = 1  # of `LogReport.to_json`, docs/check_schema.md
MAX_JUDGED_NAMES = 4  # judged metrics named in the summary
MAX_GOOD = 2  # falling losses named in it
ACTION_MEANINGS = {
    "warn": "look at it",
    "probe": "a live trial would be given a smoke test at once",
    "prune": "a live trial would end here",
    "abort": "a live study would end here: the set-up is bad",
}
PLAIN_NAMES = {LOSS: "loss", TOTAL_NORM: "gradient norm"}


@dataclass(frozen=True)
class Alert:
    """An alert of a guard. times: how often it fired, last at `last_step`. after_end: a live trial would have ended before it."""

    violation: Violation
    source: str = ""
    times: int = 1
    last_step: int = 0
    after_end: bool = False

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        return plain.pop("violation") | plain


@dataclass(frozen=True)
class Unknown:
    """A guard that could not judge the log, and why."""

    guard: str
    reason: str
    missing: tuple[str, ...] = ()  # metrics that never appeared


@dataclass(frozen=True)
class LogReport:
    log: str
    records: int
    steps: tuple[int, int] | None  # first and last
    packs: tuple[RulePack, ...]
    branches: tuple[BranchReport, ...]
    alerts: tuple[Alert, ...]
    unknown: tuple[Unknown, ...]
    judged: tuple[str, ...]  # guards that could have fired
    ended: Violation | None  # the violation that would have ended a live trial
    notes: tuple[str, ...]
    curves: Mapping[Any, Curve] = field(repr=False)  # by metric, or by a pair of metrics for their ratio
    passed_over: int = 0  # skipped rows: repeated steps and lines that could not be read
    judged_metrics: tuple[str, ...] = ()  # metrics that a guard or a branch judged
    metrics: int = 0  # number of all metrics
    doubts: tuple[str, ...] = ()  # why a log without alerts is not called healthy

    @property
    def verdict(self) -> str:
        """`alerts` if there are any; else `does_not_work` if a branch does not work; else `unknown` if no guard could judge, at
        least as many rows were skipped as read, or there is another doubt; else `healthy`."""
        if self.alerts:
            return "alerts"
        if self._broken_branches:
            return "does_not_work"
        return "unknown" if self.reasons else "healthy"

    @property
    def reasons(self) -> list[str]:
        """Why the log, without alerts, cannot be called healthy."""
        found = list(self.doubts)
        if self.passed_over >= max(self.records, 1):
            skipped = f"{self.passed_over} rows were passed over or unread and {self.records} judged"
            found.append(f"{skipped}: not enough to say that all is well")
        if not self.judged:
            found.append("nothing could be judged")
        return found

    @property
    def _broken_branches(self) -> list[BranchReport]:
        return [branch for branch in self.branches if branch.verdict == "does not work"]

    @property
    def summary(self) -> str:
        """The verdict in one line, what is good first."""
        if self.verdict == "alerts":
            return self._alerts_in_words()
        if self.verdict == "does_not_work":
            names = ", ".join(branch.branch for branch in self._broken_branches)
            why = next(finding.sentence for finding in self._broken_branches[0].findings if finding.answer == "no")
            return f"does not work: {names}: {why}; no alert"
        if self.verdict == "unknown":
            return f"unknown: {'; '.join(self.reasons)}; no alert"
        findings = [finding for branch in self.branches for finding in branch.findings if finding.subject == "loss"]
        good = [finding.sentence for finding in findings if finding.answer == "yes"]
        return f"healthy: {'; '.join([*good[:MAX_GOOD], 'no alert', self._judged_in_words()])}"

    def _alerts_in_words(self) -> str:
        first = min(self.alerts, key=lambda alert: alert.violation.step).violation
        count = sum(alert.times for alert in self.alerts)
        where = "" if f"step {first.step}" in first.sentence else f" (step {first.step})"
        ends = f"; {ACTION_MEANINGS[self.ended.action].replace('here', f'at step {self.ended.step}')}" if self.ended else ""
        return f"{count} alert{'s' if count > 1 else ''}: {first.sentence}{where}{', the first' if count > 1 else ''}{ends}"

    def _judged_in_words(self) -> str:
        names = [PLAIN_NAMES.get(name, name) for name in self.judged_metrics]
        if len(names) > MAX_JUDGED_NAMES:
            names = [*names[:MAX_JUDGED_NAMES], f"{len(names) - MAX_JUDGED_NAMES} more"]
        what = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        judged = f"{what}, {len(self.judged_metrics)} of {self.metrics} metrics judged"
        is_short = set(self.judged) == {NonFinite.name}
        return judged + (f", for NaN and Inf alone: {self.records} records are too few for more" if is_short else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "log": self.log,
            "verdict": self.verdict,
            "summary": self.summary,
            "records": self.records,
            "first_step": self.steps and self.steps[0],
            "last_step": self.steps and self.steps[1],
            "metrics": self.metrics,
            "judged_metrics": list(self.judged_metrics),
            "rules": [{"pack": pack.name, "options": dict(pack.options)} for pack in self.packs],
            "branches": [branch.to_json() for branch in self.branches],
            "alerts": [alert.to_json() for alert in self.alerts],
            "ended": None if self.ended is None else {key: asdict(self.ended)[key] for key in ("guard", "step", "action")},
            "unknown": [asdict(unknown) for unknown in self.unknown],
            "judged": list(self.judged),
            "notes": list(self.notes),
        }
