"""Is every branch of the loss working? (SEEDS C5: its loss falls, its gradient is there, its coverage is whole, all at once.)"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from tune_ssim.guards import Rule
from tune_ssim.guards.curves import Array, Curve
from tune_ssim.guards.rule_pack import Branch, RulePack

Answer = Literal["yes", "no", "unknown"]
LEVELS = 20  # equally long parts of the log that are compared
MIN_RECORDS = 20  # one a part
LATE = 5  # parts at the end whose mean is what the branch has come to
CERTAIN = 3.0  # standard errors; one look at the whole log, not hundreds at windows
SMALL = 0.03  # of the first level: a fall that is smaller than this is none, if the noise admits to say so
RISEN = 0.5  # of the fall that is lost again
OFF = 0.1  # of the coverage (SEEDS C4)
FEW = 0.1  # share of the records in which gradient or coverage may be wrong: a skipped step, the first of a run


@dataclass(frozen=True)
class BranchFinding:
    """One of the three questions: `subject` is loss, gradient or coverage."""

    subject: str
    answer: Answer
    sentence: str


@dataclass(frozen=True)
class BranchReport:
    pack: str
    branch: str
    findings: tuple[BranchFinding, ...]

    @property
    def verdict(self) -> Literal["works", "does not work", "unknown"]:
        answers = [finding.answer for finding in self.findings]
        return "does not work" if "no" in answers else "unknown" if "unknown" in answers else "works"

    def to_json(self) -> dict[str, Any]:
        findings = [asdict(finding) for finding in self.findings]
        return {"pack": self.pack, "branch": self.branch, "verdict": self.verdict.replace(" ", "_"), "findings": findings}


def series_of(branch: Branch) -> list[str | tuple[str, str]]:
    """The curves that `judge_branch` needs: of metrics, and of the quotient of two."""
    coverage: list[str | tuple[str, str]] = [(branch.has_grad, branch.trainable)] if branch.has_grad else []
    return [branch.loss, *branch.gradient, *coverage]


def judge_branch(
    pack: RulePack, branch: Branch, curves: Mapping[Any, Curve], holding: Mapping[str, tuple[Rule, int]] | None = None
) -> BranchReport:
    """`curves` by the keys of `series_of`; a metric that never appeared has none. `holding`: rules of which what they look for
    still holds at the end, by name, and since which step: one that is about the branch speaks against it."""
    expected = float(pack.options.get("ga") or 1)
    findings = [_loss(branch, curves), _gradient(branch, curves), _coverage(branch, curves, expected)]
    about = {branch.loss, *branch.gradient, branch.has_grad, branch.trainable}
    for name, (rule, step) in (holding or {}).items():
        if name.startswith(f"{pack.name}/") and rule.about[0] in about:
            subject = "loss" if branch.loss in rule.about else "coverage" if branch.has_grad in rule.about else "gradient"
            index = ("loss", "gradient", "coverage").index(subject)
            if findings[index].answer != "no":
                words = f"{name.removeprefix(pack.name + '/')} holds since step {step}: {rule.sentence}"
                findings[index] = BranchFinding(subject, "no", words)
    return BranchReport(pack.name, branch.name, tuple(findings))


@np.errstate(over="ignore", invalid="ignore")
def _loss(branch: Branch, curves: Mapping[Any, Curve]) -> BranchFinding:
    curve = curves.get(branch.loss)
    if curve is None:
        return BranchFinding("loss", "unknown", f"no metric {branch.loss}")
    late_broken = curve.broken[-max(1, len(curve.broken) // 4) :]
    if late_broken.size and late_broken.mean() > 0.5:
        return BranchFinding("loss", "no", f"{branch.loss} is not finite {_since(curve, curve.broken)}")
    levels = curve.levels(LEVELS)
    levels = levels[np.isfinite(levels)]
    if curve.records < MIN_RECORDS or len(levels) < LEVELS // 2:
        return BranchFinding("loss", "unknown", f"{curve.records} records of {branch.loss} are too few to see it fall")
    late = min(LATE, len(levels) // 2)
    first, last = float(levels[0]), float(levels[-late:].mean())
    # The scatter of neighbours, so that the fall itself does not count as noise.
    noise = float(np.median(np.abs(np.diff(levels)))) / (math.sqrt(2) * 0.6745)
    error = CERTAIN * noise * math.sqrt(1 + 1 / late)
    least = SMALL * abs(first)
    since = levels[int(levels.argmin()) + 1 :][-late:]  # what came after the lowest
    lowest = float(levels.min())
    fall, back = first - lowest, float(since.mean()) - lowest if since.size else 0.0
    falls = last - first < -error and first - last > 1e-12 * abs(first)
    if branch.may_rise and not falls:
        middle = float(levels[len(levels) // 2 : -late].mean())
        if abs(last - middle) <= max(error, SMALL * abs(middle)):
            return BranchFinding("loss", "yes", f"{branch.loss} has settled: from {first:.3g} to {middle:.3g}, then {last:.3g}")
        return BranchFinding("loss", "unknown", f"{branch.loss} has not settled: from {first:.3g} to {middle:.3g}, then {last:.3g}")
    # Two deviations more: the lowest of twenty levels is lower than most.
    if fall > max(error, least) and back > max(RISEN * fall, CERTAIN * noise * math.sqrt(1 + 1 / max(since.size, 1)) + 2 * noise):
        return BranchFinding(
            "loss", "no", f"{branch.loss} fell from {first:.3g} to {lowest:.3g} and rose again, to {lowest + back:.3g}"
        )
    if falls:
        return BranchFinding("loss", "yes", f"{branch.loss} fell from {first:.3g} to {last:.3g}")
    if last - first - error >= -least:
        if branch.may_be_flat and last - first <= max(error, least):
            return BranchFinding("loss", "unknown", f"{branch.loss} is flat, as in a fine-tuning: from {first:.3g} to {last:.3g}")
        word = "rose" if last - first > max(error, least) else "did not fall"
        return BranchFinding("loss", "no", f"{branch.loss} {word}: from {first:.3g} to {last:.3g}")
    return BranchFinding("loss", "unknown", f"{branch.loss} is too noisy to tell whether it fell ({first:.3g} to {last:.3g})")


def _gradient(branch: Branch, curves: Mapping[Any, Curve]) -> BranchFinding:
    if not branch.gradient:
        return BranchFinding("gradient", "unknown", "the rule pack names no gradient for it")
    name = next((metric for metric in branch.gradient if metric in curves), None)
    if name is None:
        return BranchFinding("gradient", "unknown", f"no metric {' or '.join(branch.gradient)}")
    curve = curves[name]
    gone = curve.zero + curve.broken
    if not gone.size:
        return BranchFinding("gradient", "unknown", f"{name} has no record yet")
    late = gone[-max(1, len(gone) // 4) :]
    if late.mean() > 0.5:
        what = "zero" if curve.zero[-1] >= curve.broken[-1] else "not finite"
        return BranchFinding("gradient", "no", f"{name} is {what} {_since(curve, gone)}")
    if gone.mean() > FEW:
        return BranchFinding("gradient", "no", f"{name} is zero or not finite in {gone.mean():.0%} of the records")
    return BranchFinding("gradient", "yes", f"its gradient is there ({name} {_range(curve)})")


def _coverage(branch: Branch, curves: Mapping[Any, Curve], expected: float) -> BranchFinding:
    if not branch.has_grad:
        return BranchFinding("coverage", "unknown", "the rule pack names no coverage for it")
    curve = curves.get((branch.has_grad, branch.trainable))
    if curve is None or not curve.mean.size:
        absent = next((name for name in (branch.has_grad, branch.trainable) if name not in curves), branch.has_grad)
        return BranchFinding("coverage", "unknown", f"no metric {absent}")
    off = ~(np.abs(curve.mean / expected - 1) <= OFF)
    if off.mean() > FEW:
        wrong = curve.mean[off]
        typical = "not a number" if np.isnan(wrong).all() else f"{np.nanmedian(wrong):.3g}"
        share = "in every record" if off.all() else f"in {off.mean():.0%} of the records"
        return BranchFinding("coverage", "no", f"coverage is {typical} {share}, and should be {expected:g}")
    return BranchFinding("coverage", "yes", f"coverage {np.nanmedian(curve.mean):.3g}")


def _since(curve: Curve, gone: Array) -> str:
    """From when on it was gone for good."""
    present = np.flatnonzero(gone <= 0.5)
    return "from the first record on" if not present.size else f"after step {int(curve.steps[present[-1]])}"


def _range(curve: Curve) -> str:
    low, high = np.nanmin(curve.low), np.nanmax(curve.high)
    return f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
