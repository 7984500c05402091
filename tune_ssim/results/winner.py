"""The best safe setting of a study."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tune_ssim.base.errors import UserError
from tune_ssim.base.yaml_source import did_you_mean
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.results.intervals import exceeds, paired
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.objective import Objective
from tune_ssim.study.space import WEIGHT
from tune_ssim.trials.summary import TrialSummary

_OF_GUARDS = ("norm_ratio_max", "loss_ratio_max", "loss_ratio_end", "smoke_used_max")


class NoSafeTrial(UserError):
    """The study has no setting to export. The message counts the verdicts and names the nearest miss."""


def best_safe(
    study: StudyFolder | Path | str | Iterable[TrialSummary], *, objective: Objective | str | None = None, where: str = "this study"
) -> TrialSummary:
    """The safe trial with the best objective, unless the confirm phase refuted it.

    `study`: a study's folder, its path, or summaries. `objective`: a name is that of a metric to maximise; without it the one of
    the folder's study.yaml, or of the summaries. What qualifies: see `ranked`. After a confirm phase, only a setting that held
    there does: see `holds`. On a tie the first one wins.

    Raises NoSafeTrial if nothing qualifies, or if no setting is better than the baseline.
    """
    if isinstance(study, (str, Path)):
        study = StudyFolder(Path(study))
    if isinstance(study, StudyFolder):
        where, objective = study.name, objective or study.objective
        summaries = study.trials()
    else:
        summaries = list(study)
        objective = objective or next((Objective.of(one.objective, one.direction) for one in summaries), Objective())
    if isinstance(objective, str):
        objective = Objective(maximize=objective)
    tried = [summary for summary in summaries if summary.role is not Role.BASELINE]
    candidates = safe_trials(summaries, objective)
    if not candidates:
        raise NoSafeTrial(f"{where}: no safe trial to export: {_why_none(tried, objective)}")
    best = candidates[0]
    if not objective.is_improved(best.metrics):
        has_ssim = any(summary.config.get(WEIGHT) for summary in tried)
        advice = "search larger gains, or keep the pixel loss" if has_ssim else "search other settings, or keep the baseline's"
        raise NoSafeTrial(
            f"{where}: no setting beats the baseline{objective.by_more_than}: the best of {len(candidates)} safe trials, "
            f"{best.trial_id}, has {_result(best, objective)}; {advice}"
        )
    if not any(summary.role is Role.CONFIRM for summary in summaries):
        return best
    held = [summary for summary in ranked(summaries, objective) if holds(confirmations(summary, summaries), objective)]
    if not held:
        reasons = "; ".join(
            _why_not_held(summary, summaries, objective) for summary in candidates if confirmations(summary, summaries)
        )
        raise NoSafeTrial(f"{where}: no finalist held in the confirm phase: {reasons}")
    return held[0]


def chosen(folder: StudyFolder, trial_id: str) -> TrialSummary:
    """The trial of the search with this id, to export it instead of the best. Raises UserError if there is none, and NoSafeTrial if
    any trial of its setting was not safe."""
    trials = folder.trials()
    searched = {summary.trial_id: summary for summary in trials if summary.role is Role.SEARCH}
    summary = searched.get(trial_id)
    if summary is None:
        raise UserError(f"{folder.name}: no trial {trial_id!r} of the search{did_you_mean(trial_id, searched)}")
    same = [other for other in trials if other.setting_key == summary.setting_key and other.verdict.speaks_against_setting]
    against = same[0] if same and summary.verdict is Verdict.SAFE else summary
    if against.verdict is not Verdict.SAFE:
        what = "" if against is summary else f"{trial_id}: its setting was not safe in another trial: "
        raise NoSafeTrial(f"{folder.name}: {what}{against.trial_id} is {against.verdict}: {against.reason}")
    return summary


def ranked(summaries: Iterable[TrialSummary], objective: Objective) -> list[TrialSummary]:
    """Trials of the search that may win, best first, without duplicate settings.

    A trial qualifies if its verdict is `safe` (which includes the margins of `objective.keep`: a trial outside them
    is `degraded`), its objective is finite and better than the baseline's, and no other trial of the same setting was pruned or
    degraded."""
    return [summary for summary in safe_trials(summaries, objective) if objective.is_improved(summary.metrics)]


def safe_trials(summaries: Iterable[TrialSummary], objective: Objective) -> list[TrialSummary]:
    """As `ranked`, whether better than the baseline or not."""
    tried = [summary for summary in summaries if summary.role is not Role.BASELINE]
    searched = [summary for summary in tried if summary.role is Role.SEARCH] or tried
    refuted = {summary.setting_key for summary in searched if summary.verdict.speaks_against_setting}
    found: dict[str, TrialSummary] = {}
    for summary in sorted(searched, key=lambda one: objective.rank(one.metric(objective.name))):
        key = summary.setting_key
        if summary.verdict is Verdict.SAFE and math.isfinite(summary.metric(objective.name)) and key not in refuted:
            found.setdefault(key, summary)
    return list(found.values())


def confirmations(summary: TrialSummary, summaries: Iterable[TrialSummary]) -> list[TrialSummary]:
    """The trials of the confirm phase that ran `summary`'s setting."""
    key = summary.setting_key
    return [other for other in summaries if other.role is Role.CONFIRM and other.setting_key == key]


def holds(confirmed: Sequence[TrialSummary], objective: Objective) -> bool:
    """Whether a setting had at least two trials in the confirm phase, all safe, and the confidence interval of their improvement
    lies above the smallest useful one."""
    if any(trial.verdict is not Verdict.SAFE for trial in confirmed):
        return False
    return exceeds([objective.improvement(trial.metrics) for trial in confirmed], objective.min_improvement) is True


def _result(summary: TrialSummary, objective: Objective) -> str:
    """`delta_ssim -0.001`, or `val_loss 2.5 (delta_val_loss +0.3)`"""
    delta = f"{objective.delta} {summary.metric(objective.delta):+.4g}"
    return delta if objective.is_delta else f"{objective.name} {summary.metric(objective.name):.4g} ({delta})"


def are_copies(confirmed: Sequence[TrialSummary], objective: Objective) -> bool:
    """Whether all seeds gave the same objective and the same extremes at the guards, bit for bit: one training, run again."""
    found = {tuple(trial.metrics.get(name) for name in (objective.name, *_OF_GUARDS)) for trial in confirmed}
    return len(confirmed) > 1 and len(found) == 1 and math.isfinite(confirmed[0].metric(objective.name))


def why_copies(confirmed: Sequence[TrialSummary], objective: Objective) -> str:
    value = confirmed[0].metric(objective.name)
    return (
        f"its {len(confirmed)} seeds gave the same {objective.name}, {value:.9g}, to the last digit: they are "
        "copies of one training, no repetitions; put {seed} where the program takes its seed from"
    )


def why_unconfirmed(confirmed: Sequence[TrialSummary], objective: Objective) -> str:
    """Why a setting that does not hold is unproven."""
    if not confirmed:
        return "it was not confirmed with further seeds"
    failed = _first_unsafe(confirmed)
    result = _improvement(confirmed, objective) if failed is None else f"with seed {failed.seed} it is {_verdict(failed)}"
    seeds = "1 new seed" if len(confirmed) == 1 else f"{len(confirmed)} new seeds"
    return f"tried with {seeds} and not confirmed: {result}"


def _why_not_held(summary: TrialSummary, summaries: Iterable[TrialSummary], objective: Objective) -> str:
    confirmed = confirmations(summary, summaries)
    if (failed := _first_unsafe(confirmed)) is not None:
        return f"{summary.trial_id} with seed {failed.seed} is {_verdict(failed)}"
    words = f"{summary.trial_id} has {_improvement(confirmed, objective)}"
    if len(confirmed) == 1:
        return f"{words} with one seed, which shows nothing"
    return f"{words} over {len(confirmed)} seeds, which does not beat the baseline{objective.by_more_than}"


def _first_unsafe(confirmed: Iterable[TrialSummary]) -> TrialSummary | None:
    return next((trial for trial in confirmed if trial.verdict is not Verdict.SAFE), None)


def _verdict(summary: TrialSummary) -> str:
    return f"{summary.verdict}: {summary.reason}"


def _improvement(confirmed: Sequence[TrialSummary], objective: Objective) -> str:
    """`delta_ssim +0.0023 [-0.0061, +0.0107]`, without an interval of one seed."""
    found = paired([trial.metric(objective.delta) for trial in confirmed])
    words = f"{objective.delta} {found['mean']:+.4g}"
    if found["interval"] is None:
        return words
    lower, upper = found["interval"]
    return f"{words} [{lower:+.4g}, {upper:+.4g}]"


def _why_none(tried: list[TrialSummary], objective: Objective) -> str:
    if not tried:
        return "no trial of the search has ended"
    counts = Counter(summary.verdict for summary in tried)
    parts = [", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())]
    if counts[Verdict.SAFE]:
        parts.append(f"the safe ones have no finite {objective.name}, or another trial of the same setting was ruined")
    measured = [summary for summary in tried if math.isfinite(summary.metric(objective.name))]
    nearest = min(measured, key=lambda one: objective.rank(one.metric(objective.name)), default=None) or max(
        tried, key=lambda one: one.steps
    )
    parts.append(f"nearest miss {nearest.trial_id} ({nearest.verdict}): {nearest.reason}")
    return "; ".join(parts)
