"""Records the results of trials in the study's folder, its events and the progress display."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tune_ssim.base.passwords import hide_password
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.orchestration.progress import Progress
from tune_ssim.results.events import EventWriter
from tune_ssim.results.study_folder import StudyFolder, ended_ids
from tune_ssim.results.trial_text import format_setting
from tune_ssim.study.objective import DEFAULT_OBJECTIVE, Objective
from tune_ssim.study.space import resolve_settings
from tune_ssim.trials.job import TrialJob
from tune_ssim.trials.quarantine import Ledger
from tune_ssim.trials.summary import TrialSummary
from tune_ssim.trials.trial_run import TrialReport, TrialResult


@dataclass
class _Recorded:
    """Ids of trials in the study's folder, from earlier starts too: those with a final verdict, and the baselines that are safe."""

    ended: set[str] = field(default_factory=set)
    sound_baselines: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: StudyFolder) -> _Recorded:
        found = cls()
        for trial in folder.trials():
            found.add(trial)
        return found

    def add(self, trial: TrialSummary) -> None:
        self.ended |= ended_ids([trial])
        if trial.role is Role.BASELINE and trial.verdict is Verdict.SAFE:
            self.sound_baselines.add(trial.trial_id)


class StudyRecorder:
    """Called by every executor. The first verdict of a trial is final."""

    def __init__(
        self, writer: EventWriter, progress: Progress, steps: int | None, objective: Objective = DEFAULT_OBJECTIVE
    ) -> None:
        self.writer, self.folder, self.progress, self.steps, self.objective = writer, writer.folder, progress, steps, objective
        self.started: set[str] = set()
        self.ended: set[str] = set()
        self.has_failed_baseline = False
        self._has_contact = False
        self._recorded: _Recorded | None = None

    @property
    def unfinished(self) -> set[str]:
        return self.started - self.ended

    @property
    def recorded(self) -> _Recorded:
        """Read once, not for each of thousands of trials: no other process writes to the study."""
        if self._recorded is None:
            self._recorded = _Recorded.of(self.folder)
        return self._recorded

    def trial_started(self, job: TrialJob) -> None:
        settings = resolve_settings(job.settings)
        self.writer.trial_started(job.trial_id, job.role.value, settings, job.slot, reason=job.reason)
        self.started.add(job.trial_id)
        self.progress.trial_started(job.trial_id, settings)
        if job.reason:
            self.progress.say(f"{job.trial_id}: {format_setting(settings)}: {job.reason}")

    def reported(self, trial_id: str, report: TrialReport) -> None:
        if trial_id in self.ended:
            return
        self.writer.require_lock()
        self.writer.result(trial_id, {"records": [record.to_json() for record in report.records], "images": report.images})
        self.progress.trial_progress(trial_id, report.step, self.steps or 0, report.norm_ratio)
        for line in () if self._has_contact else report.contact:
            self.progress.say(line)
        self._has_contact |= bool(report.contact)
        for checkpoint in report.checkpoints:
            self.folder.add_checkpoint(trial_id, checkpoint)
        if report.notice:
            self.progress.say(f"{trial_id}: {report.notice}")
        if report.result is not None:
            self.trial_ended(report.result)

    def trial_ended(self, result: TrialResult) -> None:
        summary = result.summary
        if summary.trial_id in self.ended:
            return
        self.writer.require_lock()
        self.ended.add(summary.trial_id)
        if self.steps is None and summary.role is Role.BASELINE:
            self.steps = summary.steps  # the others are as long
        self.has_failed_baseline |= summary.role is Role.BASELINE and summary.verdict is not Verdict.SAFE
        if result.traceback:
            errors = self.folder.path / "errors"
            errors.mkdir(exist_ok=True)
            (errors / f"{summary.trial_id}.txt").write_text(hide_password(result.traceback))
        if summary.verdict == Verdict.PRUNED:
            summary.quarantined = quarantine_checkpoints(self.folder, summary, self.recorded.sound_baselines)
        if not self.folder.add_trial(summary, self.recorded.ended):
            return  # its first verdict is final
        self.recorded.add(summary)
        if result.files and summary.role is not Role.SEARCH:
            self.folder.add_files_seen(summary.trial_id, result.files)
        self.writer.verdict(summary.trial_id, summary.to_dict(), result.effective)
        self.progress.trial_ended(summary)

    def ended_without_result(self, job: TrialJob, verdict: Verdict, reason: str, last: Mapping[str, Any]) -> None:
        """Records a trial without its own verdict: a scheduler stopped it, or its process died."""
        steps = int(last.get("step") or 0)
        metrics = {name: float(last[name]) for name in ("norm_ratio", "held_out_now") if last.get(name) is not None}
        settings = resolve_settings(job.settings)
        summary = TrialSummary(
            trial_id=job.trial_id, role=job.role, seed=job.seed, config=settings, verdict=verdict, reason=reason,
            objective=self.objective.name, direction=self.objective.direction,
            horizon={"steps": steps}, steps=steps, metrics=metrics,
        )  # fmt: skip
        self.trial_ended(TrialResult(summary))


def quarantine_checkpoints(folder: StudyFolder, summary: TrialSummary, baselines: Collection[str]) -> list[str]:
    """Enters every checkpoint that a ruined trial wrote into the storage path's ledger; returns their ids.

    Nothing is entered unless some contents are known to be sound, since the starting weights must never be entered. A training in a
    separate process does not show its starting weights; there the baseline's checkpoints count as sound."""
    start = folder.start()
    sound = [*start.contents] if start else []
    sound += [checkpoint.contents for name in sorted(baselines) for checkpoint in folder.checkpoints(name)]
    if not sound:
        return []
    ledger, evidence, ids = Ledger(folder.path.parent), summary.evidence or {}, []
    for checkpoint in folder.checkpoints(summary.trial_id):
        entered = ledger.add(
            checkpoint.contents,
            sound=sound,
            study=folder.name,
            trial_id=summary.trial_id,
            step=checkpoint.step,
            reason=summary.reason,
            guard=evidence.get("guard"),
            parents=checkpoint.parents,
            path=checkpoint.path,
        )
        if entered.entry is not None and entered.entry.id not in ids:
            ids.append(entered.entry.id)
    return ids
