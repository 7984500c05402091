"""Runs a study trial by trial in this process, without Ray, so that breakpoints in a user's task work and tests are fast."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.before_launch.inspection import inspect_here
from tune_ssim.orchestration.executor import JobSearch, Phase
from tune_ssim.orchestration.recorder import StudyRecorder
from tune_ssim.orchestration.trainings import make_training
from tune_ssim.search.search import Done, Outcome, Wait
from tune_ssim.study.study import Study
from tune_ssim.trials.job import TrialJob
from tune_ssim.trials.trial_run import TrialRun

CHECKPOINTS = "checkpoints"  # subfolder of the study, in place of Ray's


class InProcessExecutor:
    """Executes jobs in the same order as Ray, so that suggestions and verdicts are the same."""

    is_sequential = True

    def describe(self) -> str:
        return "in this process, one trial after the other"

    def concurrency(self, study: Study) -> int:
        """The concurrency of Ray with enough resources, since the suggestions depend on it. One trial runs at a time."""
        if study.resources.parts > 1:
            raise UserError("resources: workers and nodes need Ray; leave out --in-process")
        if study.scheduler is not None:
            raise UserError("scheduler: asha needs trials side by side; leave out --in-process")
        wanted = study.search.concurrency
        return 1 if wanted == "auto" else int(wanted)

    def inspect(self, study: Study, **phases: Any) -> dict[str, Any]:
        return inspect_here(study, **phases)

    def run(self, phase: Phase, search: JobSearch, recorder: StudyRecorder) -> None:
        while isinstance(job := search.ask(), TrialJob):
            self._run_job(phase, job, search, recorder)
        assert not isinstance(job, Wait), "the search waits although every trial has been reported"
        assert isinstance(job, Done)

    def _run_job(self, phase: Phase, job: TrialJob, search: JobSearch, recorder: StudyRecorder) -> None:
        recorder.trial_started(job)
        own = recorder.folder.path / CHECKPOINTS / job.trial_id
        found = sorted(own.glob("step_*"), reverse=True) if own.is_dir() else []
        run = TrialRun(phase.spec, job, partial(make_training, phase.spec), checkpoints=found)
        if found and not run.is_resumed:  # of another configuration: they must not outlive the new ones
            shutil.rmtree(own)
        try:
            result = None
            while result is None:
                report = run.advance()
                recorder.reported(job.trial_id, report)
                result = report.result
                if result is not None or report.wants_checkpoint:
                    _save(run, own, report.step)
        finally:
            run.close()
        search.tell(job.trial_id, Outcome.of(result.summary, result.harm, result.baseline))

    def __enter__(self) -> InProcessExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _save(run: TrialRun, folder: Path, step: int) -> None:
    """Saves a checkpoint and keeps the newest two, in case a kill truncates one."""
    run.save(folder / f"step_{step:08d}")
    for old in sorted(folder.glob("step_*"), reverse=True)[2:]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
