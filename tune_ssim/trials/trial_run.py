"""Runs a trial job from start to summary. Independent of Ray and of the study's folder."""

from __future__ import annotations

import math
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import BadSetup, NothingToResume, UserError
from tune_ssim.guards import Baseline, Violation
from tune_ssim.guards.verdict import Action, Role, Verdict
from tune_ssim.records import Record
from tune_ssim.study.space import resolve_settings
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.command.contact_report import STEPS, first_contact
from tune_ssim.trials.final_verdict import Judgement, TrialPlan
from tune_ssim.trials.job import TrialJob
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.quarantine import Ledger, Refusal
from tune_ssim.trials.summary import TrialSummary, reported_config
from tune_ssim.trials.training import Training
from tune_ssim.trials.trial import Trial

RESULT_S = 2.0  # a result costs the driver 8 ms (benchmarks/command.py), so ten concurrent trials take below 5 % of a core
WORK = "work"  # subfolder of a study with the trainings' own files, one folder per trial


@dataclass(frozen=True)
class TrialSpec:
    """The settings that all trials of a phase share; sent to the workers.

    task: "my_pkg.train:MyTask", the class itself, or a command as a mapping. result_every: training steps per report; None: one
    every RESULT_S seconds. checkpoint_every: in training steps; None: only the last. evaluate_every: training steps between
    held-out evaluations for a scheduler; None: at the end only. first_contact: trials of this role report how a command is read
    (`first_contact`). import_path: prepended to sys.path, for a task in the folder of
    the study file."""

    task: str | type | Mapping[str, Any]
    plan: TrialPlan
    task_config: Mapping[str, Any] = field(default_factory=dict)
    result_every: int | None = 10
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    import_path: str | None = None
    first_contact: Role | None = None

    def make_training(self) -> Training:
        training: Training = load_task(self.task, self.import_path)()
        return training


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended. harm: a graded constraint, feasible if <= 0. baseline: set for a safe baseline run, for comparison with
    other trials. effective: the parameters that were in force. files: see `Training.files_seen`. traceback: set if the
    training raised an exception."""

    summary: TrialSummary
    harm: float = 0.0
    effective: Mapping[str, Any] = field(default_factory=dict)
    baseline: Baseline | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    traceback: str = ""


@dataclass
class TrialReport:
    """What happened since the previous report. checkpoints: those written by the training or by us, by content. images: PNG by
    step. last: the newest loss and total_norm. contact: lines about how a command is read, once. held_out: metrics for a scheduler.
    notice: what to tell the user now. result: set once the trial has ended."""

    step: int = 0
    records: list[Record] = field(default_factory=list)
    images: dict[int, bytes] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    norm_ratio: float | None = None
    last: dict[str, float] = field(default_factory=dict)
    contact: list[str] = field(default_factory=list)
    held_out: float | None = None
    notice: str = ""
    wants_checkpoint: bool = False
    result: TrialResult | None = None


class TrialRun:
    """Call `advance` until a report has a result, then `close`. An exception of the training gives the verdict `error`.

    make_training: called once; `training` may be passed to the next trial. checkpoints: those of earlier starts of this trial,
    newest first. pass_through: exceptions to propagate because the training did not raise them, such as a worker's death."""

    def __init__(
        self,
        spec: TrialSpec,
        job: TrialJob,
        make_training: Callable[[], Training] | None = None,
        *,
        checkpoints: Sequence[Path] = (),
        pass_through: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.spec, self.job = spec, job
        self.training: Training | None = None
        self.trial: Trial | None = None
        self.settings: dict[str, Any] = {}
        self.failure: Judgement | None = None
        self._traceback = ""
        self._first: list[Record] | None = [] if job.role == spec.first_contact else None  # until they are reported
        self._pass_through = pass_through
        self._started_s = time.perf_counter()
        self._is_started = self.is_resumed = False
        self.is_leaving = False  # set from outside: the next report comes as soon as possible, with a checkpoint
        self._guarded(lambda: self._start(make_training or spec.make_training, checkpoints))

    def _start(self, make_training: Callable[[], Training], checkpoints: Sequence[Path]) -> None:
        job = self.job
        self.settings = resolve_settings(job.settings)
        self.training = make_training()
        if job.storage and job.study:
            self.training.identify(f"{job.study}-{job.trial_id}", Path(job.storage, job.study, WORK))
        baseline, plan = None if job.baseline is None else job.baseline.read(), self.spec.plan
        if plan.steps is None and baseline is not None:
            plan = replace(plan, steps=baseline.reference(job.seed).last_step or None)
        self.trial = Trial(self.training, plan)
        self._start_afresh(baseline)
        for checkpoint in checkpoints if self.training.can_resume else ():
            if self._load(checkpoint):
                self.is_resumed = True
                break

    def _start_afresh(self, baseline: Baseline | None) -> None:
        assert self.trial is not None
        steps = self.trial.plan.steps
        config = {**({} if steps is None else {"steps": steps}), **self.spec.task_config, **self.settings}
        self._is_started = False
        self.trial.start(
            config, seed=self.job.seed, role=self.job.role, baseline=baseline, searched=self.job.searched, rival=self.job.rival
        )
        self._is_started = True

    def load(self, checkpoint: Path) -> bool:
        """Resumes from a checkpoint. False if it cannot be used; the trial is then unchanged, or starts again."""
        return self.failure is None and bool(self._guarded(lambda: self._load(checkpoint)))

    def _load(self, checkpoint: Path) -> bool:
        """Raises BadSetup for a checkpoint that another trial ruined."""
        trial, training = self.trial, self.training
        assert trial is not None and training is not None
        if not training.can_resume:
            return False  # the trial starts again
        if self.job.storage:
            try:
                refusal = Ledger(self.job.storage).check(checkpoint)
            except BadSetup:  # truncated by a kill: not a checkpoint
                return False
            if refusal is not None:
                if (refusal.entry.study, refusal.entry.trial_id) != (self.job.study, self.job.trial_id):
                    raise BadSetup(str(refusal))
                trial.verdict = _pruned_before(refusal)
                trial.step = refusal.entry.step
                return True
        try:
            trial.load(checkpoint)
        except NothingToResume:
            return True
        except (OSError, UserError):  # truncated by a kill, or from another configuration
            self._start_afresh(trial.baseline)
            return False
        return True

    def save(self, folder: Path) -> None:
        if self.failure is None and self.trial is not None:
            self.trial.save(folder)

    @property
    def _judgement(self) -> Judgement | None:
        return self.failure or (self.trial.verdict if self.trial else None)

    def advance(self) -> TrialReport:
        """Trains until there is something to report."""
        report = TrialReport()
        if self.failure is None:
            self._guarded(lambda: self._advance(report))
        judgement = self._judgement
        if self._first is not None and isinstance(self.training, CommandTask):
            self._first += report.records
            if self._first and (judgement is not None or report.step >= STEPS):
                plan = self.spec.plan
                report.contact = [*first_contact(self.training, self._first, plan.guards, plan.objective)]
                self._first = None
        if judgement is not None:
            report.result = self._result(judgement)
            if judgement.verdict == Verdict.PRUNED and self.trial is not None and self._is_started:
                # The final state is saved after this report, so that checkpoint is announced before it is written.
                self._guarded(self.trial.note_contents)
                report.checkpoints += self.trial.wrote
        return report

    def _advance(self, report: TrialReport) -> None:
        """Fills the report. If the training raises an exception, the report has everything up to it."""
        trial, spec = self.trial, self.spec
        assert trial is not None and self.training is not None
        before, began_s = trial.step, time.monotonic()
        is_due = wants_evaluation = False
        try:
            while not (trial.verdict is not None or report.wants_checkpoint or wants_evaluation or is_due or self.is_leaving):
                report.records += trial.advance(spec.result_every or spec.plan.report_every)
                report.wants_checkpoint = self.training.can_resume and _passed(spec.checkpoint_every, before, trial.step)
                wants_evaluation = trial.verdict is None and _passed(spec.evaluate_every, before, trial.step)
                report.notice = self.training.notice()
                is_due = spec.result_every is not None or bool(report.notice) or time.monotonic() - began_s >= RESULT_S
            report.wants_checkpoint |= self.is_leaving and self.training.can_resume
        finally:
            report.records += trial.records_before_error
            report.step, report.norm_ratio = trial.step, trial.norm_ratio()
            report.images, trial.images = trial.images, {}
            report.checkpoints, trial.wrote = trial.wrote, []
            newest = report.records[-1].values if report.records else {}
            report.last = {name: newest[name] for name in ("loss", "total_norm") if name in newest}
        if wants_evaluation:
            name, found = spec.plan.objective.metric, trial.measure()
            if name not in found:
                raise UserError(f"step {trial.step}: no {name} for the scheduler, found {', '.join(found) or 'nothing'}")
            report.held_out = found[name]

    def _result(self, judgement: Judgement) -> TrialResult:
        trial = self.trial if self._is_started else None  # None if it failed before its start
        objective, violation = self.spec.plan.objective, judgement.violation
        metrics = dict(trial.summary_metrics()) if trial and not self.failure else {}
        effective = dict(trial.effective) if trial else {}
        summary = TrialSummary(
            trial_id=self.job.trial_id,
            role=self.job.role,
            verdict=judgement.verdict,
            reason=judgement.reason,
            seed=self.job.seed,
            objective=objective.name,
            direction=objective.direction,
            config=reported_config(self.settings, effective),
            horizon=trial.horizon() if trial else {},
            evidence=violation.evidence() if violation else None,
            steps=trial.step if trial else 0,
            curve=list(trial.curve) if trial else [],
            per_image={name: list(values) for name, values in judgement.per_image.items()},
            metrics={**metrics, "seconds": round(time.perf_counter() - self._started_s, 3)},
            checked=list(trial.checked) if trial and judgement.verdict == Verdict.SAFE else [],
            warnings=[*(warning.sentence for warning in trial.warnings), *trial.remarks] if trial else [],
        )
        baseline = None
        if trial is not None and judgement.verdict == Verdict.SAFE and self.job.role == Role.BASELINE:
            baseline = Baseline((trial.baseline_run(self.job.trial_id),))
        files = dict(trial.task.files_seen()) if trial else {}
        harm = trial.harm() if trial and not self.failure else 0.0
        return TrialResult(summary, harm, effective, baseline, files, self._traceback)

    def close(self) -> None:
        """Ends what the training runs outside this process."""
        if self.training is not None:
            try:
                self.training.close()
            except Exception as error:  # the trial has its verdict
                warnings.warn(f"{self.job.trial_id}: the training's close: {type(error).__name__}: {error}", stacklevel=2)

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """The result of `action`. An exception becomes the verdict, with its location; the trial's result has the traceback.
        After a verdict it becomes a warning of the trial."""
        try:
            return action()
        except UserError as error:
            found = Judgement(Verdict.ERROR, str(error))
        except BadSetup as finding:
            found = Judgement(Verdict.BAD_SETUP, str(finding))
        except self._pass_through:
            raise
        except Exception as error:
            self._traceback = traceback.format_exc()
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            found = Judgement(Verdict.ERROR, f"{type(error).__name__}: {error} ({where})")
        if self.trial is not None and self._judgement is not None:
            self.trial.remarks += (f"after the verdict: {found.reason}",)
        else:
            self.failure = found
        self.close()
        return None


def _pruned_before(refusal: Refusal) -> Judgement:
    """The verdict of a trial that finds its own checkpoint in quarantine."""
    entry = refusal.entry
    violation = Violation(entry.guard or "quarantine", entry.step, "", math.nan, math.nan, Action.PRUNE, entry.reason)
    return Judgement(Verdict.PRUNED, entry.reason, violation)


def _passed(every: int | None, before: int, step: int) -> bool:
    """Whether a multiple of `every` lies in (before, step]."""
    return every is not None and step // every > before // every
