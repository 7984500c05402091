"""The best safe setting of a study."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from tune_ssim.base.errors import UserError
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.trials.summary import OBJECTIVE, TrialSummary


class NoSafeTrial(UserError):
    """The study has no setting to export. The message counts the verdicts and names the nearest miss."""


def best_safe(
    study: StudyFolder | Path | str | Iterable[TrialSummary], *, objective: str | None = None, where: str = "this study"
) -> TrialSummary:
    """The safe trial with the largest objective, unless the confirm phase refuted it.

    `study`: a study's folder, its path, or summaries. `objective`: a metric's name; without it `objective.maximize` of
    the folder's study.yaml, else `delta_ssim`. What qualifies: see `ranked`. After a confirm phase, only a
    setting that held there does: all its trials safe, and a mean objective above zero. On a tie the first one wins.

    Raises NoSafeTrial if nothing qualifies, or if the best delta is not above zero, that is, no setting beats the
    baseline.
    """
    if isinstance(study, (str, Path)):
        study = StudyFolder(Path(study))
    if isinstance(study, StudyFolder):
        where, objective = study.name, objective or study.objective
        summaries = study.trials()
    else:
        summaries, objective = list(study), objective or OBJECTIVE
    tried = [summary for summary in summaries if summary.role is not Role.BASELINE]
    candidates = _safe_trials(summaries, objective)
    if not candidates:
        raise NoSafeTrial(f"{where}: no safe trial to export: {_why_none(tried, objective)}")
    best = candidates[0]
    if objective.startswith("delta_") and best.metric(objective) <= 0:
        raise NoSafeTrial(
            f"{where}: no setting beats the baseline: the best of {len(candidates)} safe trials, {best.trial_id}, "
            f"has {objective} {best.metric(objective):+.4g}; search larger gains, or keep the pixel loss"
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


def ranked(summaries: Iterable[TrialSummary], objective: str = OBJECTIVE) -> list[TrialSummary]:
    """Trials of the search that may win, best first, without duplicate settings.

    A trial qualifies if its verdict is `safe` (which includes the margins of `objective.keep`: a trial outside them
    is `degraded`), its objective is finite and, where it is a difference to the baseline, above zero, and no other
    trial of the same setting was pruned or degraded."""
    return [
        summary
        for summary in _safe_trials(summaries, objective)
        if summary.metric(objective) > 0 or not objective.startswith("delta_")
    ]


def _safe_trials(summaries: Iterable[TrialSummary], objective: str) -> list[TrialSummary]:
    tried = [summary for summary in summaries if summary.role is not Role.BASELINE]
    searched = [summary for summary in tried if summary.role is Role.SEARCH] or tried
    refuted = {summary.setting_key for summary in searched if summary.verdict.speaks_against_setting}
    found: dict[str, TrialSummary] = {}
    for summary in sorted(searched, key=lambda s: -s.metric(objective) if math.isfinite(s.metric(objective)) else math.inf):
        key = summary.setting_key
        if summary.verdict is Verdict.SAFE and math.isfinite(summary.metric(objective)) and key not in refuted:
            found.setdefault(key, summary)
    return list(found.values())


def confirmations(summary: TrialSummary, summaries: Iterable[TrialSummary]) -> list[TrialSummary]:
    """The trials of the confirm phase that ran `summary`'s setting."""
    key = summary.setting_key
    return [other for other in summaries if other.role is Role.CONFIRM and other.setting_key == key]


def holds(confirmed: Sequence[TrialSummary], objective: str = OBJECTIVE) -> bool:
    """Whether a setting had at least two trials in the confirm phase, all safe and on average better than the baseline."""
    if len(confirmed) < 2 or any(trial.verdict is not Verdict.SAFE for trial in confirmed):
        return False
    return not objective.startswith("delta_") or fmean(trial.metric(objective) for trial in confirmed) > 0


def _why_not_held(summary: TrialSummary, summaries: Iterable[TrialSummary], objective: str) -> str:
    confirmed = confirmations(summary, summaries)
    failed = next((trial for trial in confirmed if trial.verdict is not Verdict.SAFE), None)
    if failed is not None:
        return f"{summary.trial_id} with seed {failed.seed} is {failed.verdict}: {failed.reason}"
    mean = fmean(trial.metric(objective) for trial in confirmed)
    return f"{summary.trial_id} has {objective} {mean:+.4g} over {len(confirmed)} seeds"


def _why_none(tried: list[TrialSummary], objective: str) -> str:
    if not tried:
        return "no trial of the search has ended"
    counts = Counter(summary.verdict for summary in tried)
    parts = [", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())]
    if counts[Verdict.SAFE]:
        parts.append(f"the safe ones have no finite {objective}, or another trial of the same setting was ruined")
    measured = [summary for summary in tried if math.isfinite(summary.metric(objective))]
    nearest = max(measured or tried, key=lambda summary: summary.metric(objective) if measured else summary.steps)
    parts.append(f"nearest miss {nearest.trial_id} ({nearest.verdict}): {nearest.reason}")
    return "; ".join(parts)
