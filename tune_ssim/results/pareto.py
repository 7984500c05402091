"""The Pareto front of a study with several objectives."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tune_ssim.results.winner import safe_trials
from tune_ssim.study.objective import Objective
from tune_ssim.trials.summary import TrialSummary

Ranks = tuple[float, ...]  # of a trial in each objective, less is better


def pareto_front(summaries: Iterable[TrialSummary], objective: Objective) -> list[TrialSummary]:
    """The safe settings of the search that no other one dominates: is at least as good in every objective, and better in one.

    Best first in the first objective. Empty for a study with one objective, which has no front but a best trial."""
    if not objective.also:
        return []
    candidates = [(summary, _ranks(summary, objective)) for summary in safe_trials(summaries, objective)]
    measured = [(summary, ranks) for summary, ranks in candidates if all(map(math.isfinite, ranks))]
    return [summary for summary, ranks in measured if not any(_dominates(other, ranks) for _, other in measured)]


def _ranks(summary: TrialSummary, objective: Objective) -> Ranks:
    return tuple(goal.rank(summary.metric(goal.name)) for goal in objective.goals)


def _dominates(one: Ranks, other: Ranks) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
