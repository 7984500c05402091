"""Converts trial jobs to and from Ray configs, and trial reports to and from Ray results. No other module knows these formats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray.tune.result import SHOULD_CHECKPOINT

from tune_ssim.base.files import jsonable
from tune_ssim.guards import Baseline
from tune_ssim.guards.verdict import Verdict
from tune_ssim.records import Record
from tune_ssim.search.search import Outcome
from tune_ssim.study.objective import Objective
from tune_ssim.trials.job import TrialJob
from tune_ssim.trials.summary import PROCESS_DIED, TrialSummary
from tune_ssim.trials.trial_run import TrialReport, TrialResult

JOB = "trial_job"  # key of a config, next to the settings
BULKY = ("records", "images", "traceback", "wrote", "contact", "notice", "files_seen")  # keys of a result
ENDING = ("summary", "effective", "baseline_run")


def config_of(job: TrialJob) -> dict[str, Any]:
    """The settings, as every scheduler and callback of Ray expects them, and the job."""
    return {**job.settings, JOB: job}


def job_of(config: Mapping[str, Any], trial_id: str) -> TrialJob:
    """The job in a config. In a user's own Tuner, without a job, it is made from the config; a `seed` in it is the trial's."""
    job = config.get(JOB)
    if isinstance(job, TrialJob):
        return job
    settings = {key: value for key, value in config.items() if key not in (JOB, "seed")}
    return TrialJob(trial_id, settings, seed=int(config.get("seed", 0)), searched=tuple(settings))


def result_of(report: TrialReport, objective: str) -> dict[str, Any]:
    """The Ray result of a report. For its last keys see `trainable.make_trainable`."""
    result: dict[str, Any] = {
        "step": report.step,
        "records": [record.to_json() for record in report.records],
        "images": report.images,
        "wrote": report.checkpoints,
        "contact": report.contact,
        "norm_ratio": report.norm_ratio,
        "notice": report.notice,
        objective: math.nan,  # until the end; Ray requires the searcher's metric in every result
        **report.last,
    }
    if report.wants_checkpoint:
        result[SHOULD_CHECKPOINT] = True
    if report.held_out is not None:
        result["held_out_now"] = report.held_out
    if (ended := report.result) is None:
        return result
    summary = ended.summary
    guard = summary.evidence["guard"] if summary.evidence and summary.verdict == Verdict.PRUNED else ""
    result |= {
        **summary.metrics,
        "done": True,
        "verdict": summary.verdict.value,
        "reason": summary.reason,
        "pruned": int(summary.verdict == Verdict.PRUNED),
        "pruned_by": guard,
        "harm": ended.harm,
        # A trial that did not reach its end has no objective, so that no sampler uses one.
        objective: summary.metric(objective) if summary.verdict.has_result else math.nan,
        "summary": json.dumps(summary.to_dict()),
        "effective": json.dumps(jsonable(ended.effective)),
        "files_seen": json.dumps(dict(ended.files)),
        "traceback": ended.traceback,
    }
    if ended.baseline is not None:
        result["baseline_run"] = ended.baseline.to_bytes().decode()
    return result


def drop_bulk(result: dict[str, Any]) -> None:
    """Removes what has been recorded from a result, so that it does not fill Ray's snapshots."""
    for key in BULKY:
        result.pop(key, None)


def drop_ending(result: dict[str, Any]) -> None:
    """Removes how a trial ended, once the searcher and the recorder have it. Ray keeps the last result of every trial."""
    for key in ENDING:
        result.pop(key, None)


def report_of(result: Mapping[str, Any]) -> TrialReport:
    """The inverse of `result_of`."""
    return TrialReport(
        step=int(result.get("step") or 0),
        records=[Record.from_json(record) for record in result.get("records") or []],
        images=dict(result.get("images") or {}),
        checkpoints=list(result.get("wrote") or []),
        contact=list(result.get("contact") or []),
        norm_ratio=result.get("norm_ratio"),
        notice=result.get("notice") or "",
        result=ending_of(result),
    )


def ending_of(result: Mapping[str, Any]) -> TrialResult | None:
    """How the trial ended; None before its end, and for a foreign trainable."""
    if (verdict := verdict_of(result)) is None:
        return None
    baseline = result.get("baseline_run")
    return TrialResult(
        verdict[0],
        harm=float(result.get("harm") or 0.0),
        effective=verdict[1],
        baseline=Baseline.from_bytes(baseline.encode()) if baseline else None,
        files=json.loads(result.get("files_seen") or "{}"),
        traceback=result.get("traceback") or "",
    )


def outcome_of(result: Mapping[str, Any] | None, objective: Objective, error: bool = False) -> Outcome:
    """The outcome for a search. A foreign trainable may have no verdict."""
    if error:
        return Outcome(reason=PROCESS_DIED, died=True)
    result = result or {}
    if (ended := ending_of(result)) is not None:
        outcome = Outcome.of(ended.summary, ended.harm, ended.baseline)
    else:
        verdict, harm = result.get("verdict"), result.get("harm")
        outcome = Outcome(Verdict(verdict) if verdict else None, harm=math.nan if harm is None else float(harm))
    known = {name: float(result[name]) for name in (objective.name, objective.delta) if result.get(name) is not None}
    return replace(outcome, value=known.get(objective.name, math.nan), improvement=objective.improvement(known))


def verdict_of(result: Mapping[str, Any]) -> tuple[TrialSummary, dict[str, Any]] | None:
    """The summary and the parameters that were in force; None before the trial's end, and for a foreign trainable.

    Both are stored as JSON text, since Ray flattens nested dicts in a result and its loggers reject some values."""
    if not isinstance(result.get("summary"), str):
        return None
    return TrialSummary.from_dict(json.loads(result["summary"])), json.loads(result.get("effective") or "{}")
