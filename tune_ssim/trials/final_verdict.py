"""Plan, judgement and margins for `Trial._finish`, which computes the verdict after the last step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.yaml_source import did_you_mean
from tune_ssim.guards import (
    Baseline,
    Divergence,
    Guard,
    KeepRule,
    Margin,
    NonFinite,
    NormRatio,
    Rule,
    SmokeTest,
    Violation,
    Watch,
    decades_beyond,
)
from tune_ssim.guards.log_gaps import LossPresence
from tune_ssim.guards.verdict import Verdict
from tune_ssim.guards.watch import MAX_SHOWN_NAMES
from tune_ssim.records import LOSS, TOTAL_NORM
from tune_ssim.study.objective import DEFAULT_OBJECTIVE, Objective

NOISE_FACTOR = 2.0  # differences between the baseline's seeds; FACTS §6: the margin of SSIM is two standard deviations of them
OF_MARGINS = "objective"  # `guard` in the evidence of a degraded trial
MIN_HARM = 0.05  # harm of a trial ruined close to its end: above zero, below the harm of any early prune


@dataclass(frozen=True)
class TrialPlan:
    """The settings that all trials of a study share."""

    steps: int | None  # optimiser steps; None: until a command ends by itself
    guards: tuple[Guard, ...]
    keep: tuple[KeepRule, ...] = ()
    objective: Objective = DEFAULT_OBJECTIVE
    requires_objective: bool = False  # whether a baseline that does not measure it is an error
    evaluate_at: tuple[int, ...] = ()  # steps of held-out evaluations before the end, if the training runs in this process
    report_every: int = 1  # steps between copies from the device, and so between verdicts
    image_grids: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "report_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be >= 1, got {value}")

    @property
    def last_step(self) -> float:
        return math.inf if self.steps is None else self.steps


@dataclass(frozen=True)
class Judgement:
    """How a trial ended, with the evidence."""

    verdict: Verdict
    reason: str
    violation: Violation | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    per_image: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of trials that the proof compares


def rules_without_metric(plan: TrialPlan, measured: Mapping[str, float]) -> Iterator[str]:
    """A sentence for each `keep` rule on a metric that the baseline did not measure. The default ones are for any training."""
    for rule in plan.keep:
        if rule not in DEFAULT_OBJECTIVE.rules and not any(map(rule.covers, measured)):
            guess = did_you_mean(rule.metric, measured)
            yield f"objective.keep: {rule.metric}: not measured by the baseline, so nothing was judged by it{guess}"


def not_measured(plan: TrialPlan, found: Mapping[str, float], reference: Mapping[str, float]) -> list[str]:
    """Metrics with a `keep` rule that only the baseline measured."""
    return [rule.metric for rule in plan.keep if any(map(rule.covers, reference)) and not any(map(rule.covers, found))]


def margins_of(
    plan: TrialPlan, watch: Watch, baseline: Baseline, found: Mapping[str, float], reference: Mapping[str, float]
) -> Iterator[Margin]:
    """The margins of `keep`, of the loss at the end, and, if `keep` covers nothing that was measured, of the objective."""
    of_keep = [margin for rule in plan.keep for margin in rule.margins(found, reference)]
    yield from of_keep
    for guard in watch.guards:
        if isinstance(guard, Divergence) and guard.max_end_ratio is not None:
            ratio = guard.end_ratio(watch.state_of(guard.name))
            if ratio is not None:
                yield Margin(f"{LOSS} at the end", ratio, guard.max_end_ratio, is_floor=False, is_ratio=True)
    name, is_floor = plan.objective.metric, plan.objective.direction == "maximize"
    noise = baseline.noise_floor(name)
    if not of_keep and noise and name in found and name in reference:
        limit = NOISE_FACTOR * (-noise if is_floor else noise)
        yield Margin(name, found[name] - reference[name], limit, is_floor=is_floor, is_ratio=False)


def unwatched_end(watch: Watch, losses: LossPresence) -> list[str]:
    """Why the end of the training was not judged: no loss was reported there, and a NaN may be left out."""
    if not _guards_of_loss(watch) or not losses.all_end_early:
        return []
    return [f"{doubt}: the end of the training was not judged" for doubt in losses.doubts()]


def guards_without_loss(watch: Watch, losses: LossPresence, names: Collection[str]) -> Iterator[str]:
    """A sentence where a guard of the loss did not judge all of the training. names: the metrics that it reported."""
    if LOSS in losses and _guards_of_loss(watch):
        yield from losses.doubts()
    elif any(isinstance(guard, Divergence) for guard in watch.guards):
        saw = ", ".join(sorted(names)[:MAX_SHOWN_NAMES]) or "no metric at all"
        yield f"guard '{Divergence.name}' judged nothing: no record has {LOSS}; saw {saw}"


def _guards_of_loss(watch: Watch) -> list[Guard]:
    return [guard for guard in watch.guards if isinstance(guard, (NonFinite, Divergence))]


def guards_that_judged(watch: Watch) -> Iterator[str]:
    """What each guard found, except for NaN: a training without NaN may be ruined all the same."""
    for guard in watch.guards:
        state = watch.state_of(guard.name)
        if isinstance(guard, (NormRatio, Divergence)):
            if state["max_ratio"] is not None:
                what = TOTAL_NORM if isinstance(guard, NormRatio) else LOSS
                yield f"{what} at most {state['max_ratio']:.3g}x (limit {guard.limit:g})"
        elif isinstance(guard, SmokeTest):
            if (used := guard.summary(state).get("smoke_used_max")) is not None:
                yield f"samples used at most {used:.0%} of the smoke test's limits"
        elif isinstance(guard, Rule):
            if guard.insufficient_data(state) is None:
                yield guard.name
        elif not isinstance(guard, NonFinite):
            yield guard.name


def harm_of(verdict: str, evidence: Mapping[str, Any] | None, step: int, steps: int | None) -> float:
    """A constraint value for samplers: feasible if <= 0, otherwise a grade of the harm. For the norm guard and for margins it is
    the excess in decades; for any other prune, the fraction of the training that was left."""
    if verdict not in (Verdict.PRUNED, Verdict.DEGRADED, Verdict.BAD_SETUP):
        return 0.0
    if evidence is not None and evidence["guard"] in (NormRatio.name, OF_MARGINS) and math.isfinite(float(evidence["value"])):
        return max(MIN_HARM, decades_beyond(float(evidence["value"]), float(evidence["limit"])))
    if verdict == Verdict.DEGRADED:
        return 1.0  # a metric that is not finite
    return max(MIN_HARM, 1 - step / steps) if steps else MIN_HARM
