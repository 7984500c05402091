"""Judges whether every branch of the loss works (SEEDS C5: its loss falls, it has a gradient, and its coverage is complete)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from tune_ssim.guards import NonFinite, Rule
from tune_ssim.guards.curves import Curve
from tune_ssim.guards.rule_pack import Branch, RulePack
from tune_ssim.records import TOTAL_NORM
from tune_ssim.records.metric_names import is_loss_weight

Answer = Literal["yes", "no", "unknown"]
LEVELS = 20  # number of equal parts of the log that are compared
MIN_RECORDS = 20  # one per part
LATE_LEVELS = 5  # number of parts at the end whose mean is the final level
MIN_SIGMAS = 3.0  # standard errors of a significant change; this is one test on the whole log, not one per window
MIN_FALL = 0.03  # smallest fall that counts, relative to the first level, unless the noise is larger
MAX_REBOUND = 0.5  # fraction of the fall that may be lost again
COVERAGE_TOLERANCE = 0.1  # relative (SEEDS C4)
MAX_BAD_RECORDS = 0.1  # fraction of records with a bad gradient or coverage: a skipped step, the first step of a run


@dataclass(frozen=True)
class BranchFinding:
    """The answer to one of the three questions. subject: loss, gradient or coverage."""

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
    """The keys of the curves that `judge_branch` needs: a metric, or a pair of metrics for their ratio."""
    coverage: list[str | tuple[str, str]] = [(branch.has_grad, branch.trainable)] if branch.has_grad else []
    return [branch.loss, *branch.gradient, *coverage]


def judge_branch(
    pack: RulePack | None,
    name: str,
    branch: Branch,
    curves: Mapping[Any, Curve],
    holding: Mapping[str, tuple[Rule, int]] | None = None,
) -> BranchReport:
    """Judges one branch.

    pack: None for a log that matches no pack. curves: by the keys of `series_of`; a metric that never appeared has none. holding:
    rule name → the rule and the step since which its condition has been true; rules about this branch that are still violated at
    the end count against it."""
    prefix = "any/" if pack is None else f"{pack.name}/"
    expected = 1.0 if pack is None else float(pack.options.get("ga") or 1)
    found = [_annealed(_loss(branch, curves), curves), _gradient(branch, curves), _coverage(branch, curves, expected)]
    findings = [finding for finding in found if finding is not None]
    for rule_name, (rule, step) in (holding or {}).items():
        if rule_name.startswith(prefix) and rule.about[0] in branch.metrics:
            subject = "loss" if branch.loss in rule.about else "coverage" if branch.has_grad in rule.about else "gradient"
            index = [finding.subject for finding in findings].index(subject)
            if findings[index].answer != "no":
                words = f"{rule_name.removeprefix(prefix)} holds since step {step}: {rule.sentence}"
                findings[index] = BranchFinding(subject, "no", words)
    return BranchReport(prefix[:-1], name, tuple(findings))


def _loss(branch: Branch, curves: Mapping[Any, Curve]) -> BranchFinding:
    curve = curves.get(branch.loss)
    if curve is None:
        return BranchFinding("loss", "unknown", f"no metric {branch.loss}")
    late_broken = curve.broken[-max(1, len(curve.broken) // 4) :]
    if late_broken and _mean(late_broken) > 0.5:
        return BranchFinding("loss", "no", f"{branch.loss} is not finite {_since(curve, curve.broken)}")
    levels = [level for level in curve.levels(LEVELS) if math.isfinite(level)]
    if curve.records < MIN_RECORDS or len(levels) < LEVELS // 2:
        return BranchFinding("loss", "unknown", f"{curve.records} records of {branch.loss} are too few to see it fall")
    late = min(LATE_LEVELS, len(levels) // 2)
    first, last = levels[0], _mean(levels[-late:])
    # Noise from differences of neighbouring levels, so that the fall itself does not count as noise.
    noise = median(abs(after - before) for before, after in pairwise(levels)) / (math.sqrt(2) * 0.6745)
    error = MIN_SIGMAS * noise * math.sqrt(1 + 1 / late)
    min_fall = MIN_FALL * abs(first)
    lowest = min(levels)
    since = levels[levels.index(lowest) + 1 :][-late:]  # the last levels after the lowest one
    fall, back = first - lowest, _mean(since) - lowest if since else 0.0
    falls = last - first < -error and first - last > 1e-12 * abs(first)
    if branch.may_rise and not falls:
        middle = _mean(levels[len(levels) // 2 : -late])
        if abs(last - middle) <= max(error, MIN_FALL * abs(middle)):
            return BranchFinding("loss", "yes", f"{branch.loss} has settled: from {first:.3g} to {middle:.3g}, then {last:.3g}")
        return BranchFinding("loss", "unknown", f"{branch.loss} has not settled: from {first:.3g} to {middle:.3g}, then {last:.3g}")
    # Two more standard deviations, because the lowest of twenty levels is low by chance.
    if fall > max(error, min_fall) and back > max(
        MAX_REBOUND * fall, MIN_SIGMAS * noise * math.sqrt(1 + 1 / max(len(since), 1)) + 2 * noise
    ):
        return BranchFinding(
            "loss", "no", f"{branch.loss} fell from {first:.3g} to {lowest:.3g} and rose again, to {lowest + back:.3g}"
        )
    if falls:
        return BranchFinding("loss", "yes", f"{branch.loss} fell from {first:.3g} to {last:.3g}")
    if last - first - error >= -min_fall:
        if branch.may_be_flat and last - first <= max(error, min_fall):
            return BranchFinding("loss", "unknown", f"{branch.loss} is flat, as in a fine-tuning: from {first:.3g} to {last:.3g}")
        word = "rose" if last - first > max(error, min_fall) else "did not fall"
        return BranchFinding("loss", "no", f"{branch.loss} {word}: from {first:.3g} to {last:.3g}")
    return BranchFinding("loss", "unknown", f"{branch.loss} is too noisy to tell whether it fell ({first:.3g} to {last:.3g})")


def _annealed(finding: BranchFinding, curves: Mapping[Any, Curve]) -> BranchFinding:
    """A loss that rises because the weight of one of its terms does is no fault."""
    if finding.answer != "no" or "rose" not in finding.sentence:
        return finding
    for name, curve in curves.items():
        means = [mean for mean in curve.mean if math.isfinite(mean)] if isinstance(name, str) and is_loss_weight(name) else []
        if means and means[-1] > means[0] * (1 + MIN_FALL):
            weight = f"{name} from {means[0]:.3g} to {means[-1]:.3g}"
            return BranchFinding(finding.subject, "unknown", f"{finding.sentence}; so did a weight in it ({weight})")
    return finding


def _gradient(branch: Branch, curves: Mapping[Any, Curve]) -> BranchFinding | None:
    """None if nothing says what its gradient is."""
    if not branch.gradient or (branch.gradient == (TOTAL_NORM,) and not branch.has_grad and TOTAL_NORM not in curves):
        return None
    name = next((metric for metric in branch.gradient if metric in curves), None)
    if name is None:
        return BranchFinding("gradient", "unknown", f"no metric {' or '.join(branch.gradient)}")
    curve = curves[name]
    gone = [zero + broken for zero, broken in zip(curve.zero, curve.broken, strict=True)]
    if not gone:
        return BranchFinding("gradient", "unknown", f"{name} has no record yet")
    if name == TOTAL_NORM:
        gone = gone[_first_finite(curve) :]
        zero, late_zero = _mean(curve.zero), curve.zero[-max(2, len(gone) // 4) :]
        # Micro-steps of an accumulation and groups of equal rewards have a norm of zero, which says nothing of the other steps.
        if MAX_BAD_RECORDS < zero < 1 and min(late_zero) < 1 and not any(curve.broken):
            return BranchFinding("gradient", "unknown", f"{name} is zero in {zero:.0%} of the records, and not in the others")
    late = gone[-max(1, len(gone) // 4) :]
    if _mean(late) > 0.5:
        what = "zero" if curve.zero[-1] >= curve.broken[-1] else "not finite"
        return BranchFinding("gradient", "no", f"{name} is {what} {_since(curve, gone)}")
    if _mean(gone) > MAX_BAD_RECORDS:
        return BranchFinding("gradient", "no", f"{name} is zero or not finite in {_mean(gone):.0%} of the records")
    return BranchFinding("gradient", "yes", f"its gradient is there ({name} {_range(curve)})")


def _first_finite(curve: Curve) -> int:
    """The number of infinite norms before the first finite one, while a gradient scaler may search its scale; else 0."""
    first = next((at for at, share in enumerate(curve.broken) if share < 1), 0)
    return first if first <= NonFinite().max_skipped else 0


def _coverage(branch: Branch, curves: Mapping[Any, Curve], expected: float) -> BranchFinding | None:
    """None if the branch has no gradient taps."""
    if not branch.has_grad:
        return None
    curve = curves.get((branch.has_grad, branch.trainable))
    if curve is None or not curve.mean:
        absent = next((name for name in (branch.has_grad, branch.trainable) if name not in curves), branch.has_grad)
        return BranchFinding("coverage", "unknown", f"no metric {absent}")
    wrong = [mean for mean in curve.mean if not abs(mean / expected - 1) <= COVERAGE_TOLERANCE]
    share_wrong = len(wrong) / len(curve.mean)
    if share_wrong > MAX_BAD_RECORDS:
        numbers = [mean for mean in wrong if not math.isnan(mean)]
        typical = f"{median(numbers):.3g}" if numbers else "not a number"
        share = "in every record" if share_wrong == 1 else f"in {share_wrong:.0%} of the records"
        return BranchFinding("coverage", "no", f"coverage is {typical} {share}, and should be {expected:g}")
    return BranchFinding("coverage", "yes", f"coverage {median(mean for mean in curve.mean if not math.isnan(mean)):.3g}")


def _since(curve: Curve, gone: Sequence[float]) -> str:
    """When the gradient or loss was lost for good."""
    present = [step for step, share in zip(curve.steps, gone, strict=True) if share <= 0.5]
    return f"after step {int(present[-1])}" if present else "from the first record on"


def _range(curve: Curve) -> str:
    low = min(value for value in curve.low if not math.isnan(value))
    high = max(value for value in curve.high if not math.isnan(value))
    return f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
