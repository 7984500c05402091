"""A baseline from the log of a finished run, and what such a log cannot prove."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from tune_ssim.base.errors import UserError
from tune_ssim.guards import Baseline, BaselineRun
from tune_ssim.records import LOSS, TOTAL_NORM, TOTAL_NORM_MAIN, Record, held_out_values
from tune_ssim.records.metric_names import usual_names
from tune_ssim.records.readers import Source, read_all
from tune_ssim.records.record_table import Table

NO_SEED = -1  # matches no trial, so norms are never paired with those of a log
UNKNOWN = "its code, weights, data, seed and batches"
MAX_RECORDS = 1_000_000  # norms kept in memory; about a hundred megabytes


def baseline_of_log(
    path: str,
    *,
    format: str | None = None,
    pattern: str | Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    held_out: Mapping[str, float] | None = None,
    also: str = "",
) -> Baseline:
    """The baseline of a study from the log of a pixel-loss run, in any format of `records.readers`.

    also: a metric whose values are kept too.
    held_out: held-out metrics; default the last value of every metric that is not a training metric. Raises UserError for a
    log without total_norm."""
    records = read_all(path, format=format, pattern=pattern, names=names)
    return _baseline(records, NO_SEED, held_out, also, f"baseline.log: {path}", "`names: {theirs: total_norm}` says what it is")


def baseline_of_source(source: Source, label: str) -> Baseline:
    """The baseline for the check of another log, which may have common other names for total_norm. Its norms are paired by step.

    label: what the log is called in the UserError for a log without total_norm."""

    def records() -> Iterator[Record]:
        usual: dict[str, str] | None = None
        for part in source.all_batches():
            table = Table.of(part)
            if table and usual is None:
                usual = usual_names(table.metrics)
            yield from table.renamed(usual or {})

    return _baseline(records(), 0, None, "", label, "`--map theirs=total_norm` renames")


def _baseline(
    records: Iterable[Record], seed: int, held_out: Mapping[str, float] | None, also: str, label: str, hint: str
) -> Baseline:
    series: dict[str, dict[int, float]] = {name: {} for name in (TOTAL_NORM, TOTAL_NORM_MAIN, LOSS, also) if name}
    last: dict[str, float] = {}
    for record in records:
        for name, points in series.items():
            if name in record.values and len(points) < MAX_RECORDS:
                points[record.step] = record.values[name]
        last |= record.values
    if not any(math.isfinite(norm) for norm in series[TOTAL_NORM].values()):
        found = ", ".join(sorted(last)) or "no metric at all"
        raise UserError(f"{label}: no {TOTAL_NORM} in it, found {found}; {hint}")
    evaluation = held_out_values(last) | dict(held_out or {})
    return Baseline((BaselineRun(seed, {name: points for name, points in series.items() if points}, evaluation, {}, "log"),))


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
