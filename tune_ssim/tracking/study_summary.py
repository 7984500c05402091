"""What MLflow's parent run says of a study: counts, the setting to use, and what its confirmation found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.results.proof import comparison
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.winner import NoSafeTrial, best_safe, confirmations


@dataclass(frozen=True)
class StudySummary:
    """champion: the trial whose setting `export` writes; None without a safe setting that beats the baseline.

    settings: the champion's. metrics: `trials/<verdict>`, the champion's objective, and of a confirmed one
    `confirmed/<metric>` with `/low` and `/high`, the ends of its confidence interval."""

    champion: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def summary_of(folder: StudyFolder) -> StudySummary:
    trials = folder.trials()
    counts = Counter(trial.verdict for trial in trials if trial.role is Role.SEARCH)
    metrics = {f"trials/{verdict}": float(counts[verdict]) for verdict in Verdict if counts[verdict]}
    try:
        best = best_safe(folder)
    except NoSafeTrial:
        return StudySummary(metrics=metrics)
    objective = folder.objective
    metrics |= {goal.name: best.metric(goal.name) for goal in objective.goals if math.isfinite(best.metric(goal.name))}
    baselines = [trial for trial in trials if trial.role is Role.BASELINE]
    found = comparison(confirmations(best, trials), baselines).get(objective.delta)
    if found is not None and found["interval"]:
        name, (low, high) = f"confirmed/{objective.delta}", found["interval"]
        metrics |= {name: found["mean"], f"{name}/low": low, f"{name}/high": high}
    return StudySummary(best.trial_id, best.settings, metrics)
