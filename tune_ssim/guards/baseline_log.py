"""A baseline from the log of a finished run, and what such a log cannot prove."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from tune_ssim.base.errors import UserError
from tune_ssim.guards import Baseline, BaselineRun
from tune_ssim.records import TOTAL_NORM, TOTAL_NORM_MAIN, held_out_values
from tune_ssim.records.readers import read_all

NO_SEED = -1  # matches no trial, so norms are never paired with those of a log
UNKNOWN = "its code, weights, data, seed and batches"


def baseline_of_log(
    path: str,
    *,
    format: str | None = None,
    pattern: str | Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    held_out: Mapping[str, float] | None = None,
) -> Baseline:
    """The baseline from the log of a pixel-loss run, in any format of `records.readers`.

    held_out: held-out metrics; default the last value of every metric that is not a training metric. Raises UserError for a
    log without total_norm."""
    series: dict[str, dict[int, float]] = {TOTAL_NORM: {}, TOTAL_NORM_MAIN: {}}
    last: dict[str, float] = {}
    for record in read_all(path, format=format, pattern=pattern, names=names):
        for name, points in series.items():
            if name in record.values:
                points[record.step] = record.values[name]
        last |= record.values
    if not any(math.isfinite(norm) for norm in series[TOTAL_NORM].values()):
        found = ", ".join(sorted(last)) or "no metric at all"
        raise UserError(
            f"baseline.log: {path}: no {TOTAL_NORM} in it, found {found}; `names: {{theirs: total_norm}}` says what it is"
        )
    evaluation = held_out_values(last) | dict(held_out or {})
    return Baseline((BaselineRun(NO_SEED, {name: points for name, points in series.items() if points}, evaluation, {}, "log"),))


def require_steps(baseline: Baseline, path: str, steps: int) -> None:
    """Raises UserError if the log ends long before a trial of `steps` steps does."""
    logged = [0, *sorted(baseline.runs[0].series[TOTAL_NORM])]
    interval = max(later - earlier for earlier, later in pairwise(logged))
    if logged[-1] + interval < steps:
        raise UserError(
            f"baseline.log: {path}: its last {TOTAL_NORM} is at step {logged[-1]}, the trials have {steps} steps; say "
            f"task_config: {{steps: {logged[-1]}}}, or give the log of a longer run"
        )


def describe(baseline: Baseline, path: str) -> str:
    """One line on what the log shows and what it cannot prove."""
    run = baseline.runs[0]
    steps = sorted(run.series[TOTAL_NORM])
    held_out = ", ".join(f"{name} {value:.4g}" for name, value in sorted(run.evaluation.items()))
    found = f"{TOTAL_NORM} at {len(steps)} steps from {steps[0]} to {steps[-1]}; held out: {held_out or 'nothing'}"
    return f"baseline from {path}: {found}. Not known: {UNKNOWN}, so norms are compared unpaired"
