"""Runs trials with Ray Tune, in parallel, on one or more machines."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, ResultGrid, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.stopper import Stopper

from tune_ssim.base.errors import UserError
from tune_ssim.before_launch.inspection import found_or_raise, inspect_study, is_command
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.orchestration.executor import JobSearch, Phase
from tune_ssim.orchestration.progress import NoProgress
from tune_ssim.orchestration.ray_cluster import concurrency_of, connection, describe_cluster, gpus_of
from tune_ssim.orchestration.ray_internals import forget_statistics, intercept_failures, keep_actors, without_snapshots
from tune_ssim.orchestration.ray_job import drop_bulk, drop_ending, job_of, report_of
from tune_ssim.orchestration.ray_search import JobSearcher
from tune_ssim.orchestration.ray_starts import take_on_ray
from tune_ssim.orchestration.recorder import StudyRecorder
from tune_ssim.orchestration.retries import OWN_DEATHS, Retries, error_of
from tune_ssim.orchestration.trainable import TrialResources, trainable_class
from tune_ssim.results.events import EventWriter
from tune_ssim.study.objective import Objective
from tune_ssim.study.sections import Asha
from tune_ssim.study.study import Study
from tune_ssim.trials.job import TrialJob
from tune_ssim.trials.summary import PROCESS_DIED

PENDING_S = 30.0  # usually enough for a trial's process to start
RAYLET_DIED = "the Ray of this study has died (its raylet was killed, by a lack of memory perhaps)"
MAX_PENDING = "TUNE_MAX_PENDING_TRIALS_PG"  # setting of Ray Tune; its default with a searcher is one trial at a time


class RayExecutor:
    """Runs trials with Ray Tune. address: of a Ray cluster; None starts a local one. An existing connection is reused."""

    is_sequential = False

    def __init__(self, study: Study, address: str | None = None) -> None:
        self._connection: AbstractContextManager[dict[str, float]] = connection(study, address)
        self._study, self._is_private = study, address is None

    def __enter__(self) -> RayExecutor:
        self.cluster = self._connection.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._connection.__exit__(*error)

    def describe(self) -> str:
        return describe_cluster(self.cluster)

    def concurrency(self, study: Study) -> int:
        return concurrency_of(study, self.cluster)

    def inspect(
        self, study: Study, *, preflight: bool, calibration: bool, provenance: bool, steps: int | None = None, **of_starts: Any
    ) -> dict[str, Any]:
        """Runs as a Ray task with a trial's resources, since the driver's node may have no accelerator. The starts of a command
        are tasks of their own."""
        resources = self._resources(study)
        remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=1)(inspect_study)
        found: dict[str, Any] = {}
        if is_command(study) and (preflight or calibration):
            take = partial(take_on_ray, study, resources)
            found = found_or_raise(inspect_study(study, preflight, calibration, False, steps, take, **of_starts))
            preflight = calibration = False
        return found | found_or_raise(
            ray.get(remote.remote(study, preflight, calibration, provenance, steps if preflight else None))
        )

    def _resources(self, study: Study) -> TrialResources:
        wanted = study.resources
        return TrialResources(wanted.workers, wanted.nodes, wanted.cpus, gpus_of(study, self.cluster))

    def run(self, phase: Phase, search: JobSearch, recorder: StudyRecorder) -> None:
        """Runs a phase. Ray's own state, which a kill may leave truncated or outdated, is never read again."""
        resources = self._resources(self._study)
        placement, objective = resources.placement(), phase.spec.plan.objective
        recording = _RayRecording(recorder, self._is_private)
        retries = Retries(_trial_name, recorder.progress.say)
        before = os.environ.get(MAX_PENDING)
        os.environ[MAX_PENDING] = before or str(phase.concurrency)
        tuner = Tuner(
            tune.with_resources(trainable_class(phase.spec, resources), placement),
            tune_config=TuneConfig(
                search_alg=JobSearcher(search, objective),
                scheduler=_scheduler(phase.scheduler, _Controls(placement, phase.concurrency, retries), objective),
                num_samples=-1,  # until the search is done
                max_concurrent_trials=phase.concurrency,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=RunConfig(
                name=_attempt(recorder, phase.name),
                storage_path=str(recorder.folder.ray_folder),
                callbacks=[recording],
                stop=recording,
                failure_config=FailureConfig(max_failures=OWN_DEATHS),
                checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_at_end=True),
                verbose=0,
            ),
        )
        try:
            results = tuner.fit()
        finally:
            if before is None:
                del os.environ[MAX_PENDING]
        if recording.error is not None:
            raise recording.error
        _require_baselines(results)


def _trial_name(trial: Any) -> str:
    return job_of(trial.config, trial.trial_id).trial_id


def _attempt(recorder: StudyRecorder, phase: str) -> str:
    """The phase's name, numbered from its second start on."""
    count = sum(1 for path in recorder.folder.ray_folder.glob(f"{phase}*") if path.is_dir())
    return phase if count == 0 else f"{phase}-{count + 1}"


def _require_baselines(results: ResultGrid) -> None:
    """Reports trials whose process died. Raises UserError for a baseline, since nothing can be compared without it."""
    for result in results:
        job = job_of(result.config or {}, "")
        if result.error is not None and job.role == Role.BASELINE:
            last = [line for line in str(result.error).splitlines() if line.strip()][-1].strip()
            raise UserError(f"{job.trial_id}: its process died: {last} (--resume tries again)")


class _RayRecording(tune.Callback, Stopper):
    """Passes results to the recorder, and removes their bulky keys so that they do not fill Ray's snapshots.

    Ends the phase early if its baseline failed, since no setting is to blame and no further step is useful, or if a result cannot
    be recorded. error: the first exception of the recorder. Raised in a callback, Ray would wrap it in its own."""

    def __init__(self, recorder: StudyRecorder, is_private: bool) -> None:
        """is_private: whether the Ray cluster is used by this study only."""
        self.recorder, self.is_private = recorder, is_private
        self.error: Exception | None = None
        self._looked_s = 0.0
        self._pending: dict[str, float] = {}  # trial → start of its wait on the monotonic clock; NaN: already reported

    def __getstate__(self) -> dict[str, Any]:
        """For Ray's snapshot, which is never restored. The progress display cannot be pickled."""
        return {
            "recorder": StudyRecorder(EventWriter(self.recorder.folder), NoProgress(), self.recorder.steps),
            "error": None,
            "is_private": True,
            "_pending": {},
        }

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False  # no trial is stopped by itself

    def stop_all(self) -> bool:
        return self.error is not None or self.recorder.has_failed_baseline

    def _record(self, action: Callable[[], None]) -> None:
        if self.error is None:
            try:
                action()
            except Exception as error:
                self.error = error

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Reports why a trial is waiting. Looks once a second, so that a step of a long study costs no more than of a short one."""
        if time.monotonic() - self._looked_s < 1:
            return
        self._looked_s = time.monotonic()
        if self.is_private and not any(node["Alive"] for node in ray.nodes()):  # on a cluster a node may join again
            again = f"`tune-ssim run --resume --name {self.recorder.folder.name}` goes on"
            self.error = self.error or UserError(f"{RAYLET_DIED}; {again}")
            return
        for trial in trials:
            if trial.status != "PENDING":
                continue
            name = _trial_name(trial)
            since_s = self._pending.setdefault(name, time.monotonic())
            if time.monotonic() - since_s > PENDING_S:
                self._pending[name] = math.nan
                self.recorder.progress.say(f"{name} waits: {_what_it_waits_for(trial, self.is_private)}")

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._record(lambda: self.recorder.trial_started(_job(trial)))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._record(lambda: self.recorder.reported(_job(trial).trial_id, report_of(result)))
        drop_bulk(result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial without its own verdict was stopped by a scheduler."""
        self._ended_without_result(trial, Verdict.STOPPED, "stopped by the scheduler before its last step")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended_without_result(trial, Verdict.ERROR, f"{PROCESS_DIED}: {error_of(trial) or 'no message'}")

    def _ended_without_result(self, trial: Any, verdict: Verdict, reason: str) -> None:
        last = trial.last_result or {}
        self._record(lambda: self.recorder.ended_without_result(_job(trial), verdict, reason, last))
        drop_ending(last)  # the searcher has it
        forget_statistics(trial)


def _job(trial: Any) -> TrialJob:
    return job_of(trial.config, trial.trial_id)


def _what_it_waits_for(trial: Any, is_private: bool) -> str:
    bundles = trial.placement_group_factory.bundles
    free = ray.available_resources()
    needed = {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}
    short = [kind for kind, count in needed.items() if count > free.get(kind, 0.0)]
    if not short:
        return f"its process has been starting for {PENDING_S:g} s, or the free resources are spread over too many nodes"
    if is_private:  # this trial and those running in parallel use the rest
        return f"its process has been starting for {PENDING_S:g} s: the machine is busy"
    return "it needs " + " and ".join(
        f"{needed[kind]:g} {kind}s, {free.get(kind, 0.0):g} are free (other jobs on this cluster have the rest)" for kind in short
    )


@dataclass
class _Controls:
    """What a scheduler changes in the experiment's controller when the first trial is added: see `ray_internals`."""

    placement: tune.PlacementGroupFactory
    concurrency: int
    retries: Retries
    _is_done: bool = False

    def take(self, controller: Any) -> None:
        if not self._is_done:
            self._is_done = True
            keep_actors(controller, self.placement, self.concurrency)
            intercept_failures(controller, self.retries.failed)
            without_snapshots(controller)  # a study is resumed from its own folder


class _InOrder(FIFOScheduler):
    """Runs every trial to its end."""

    def __init__(self, controls: _Controls) -> None:
        super().__init__()
        self._controls = controls

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._controls.take(tune_controller)
        super().on_trial_add(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        self._controls.retries.start_due()
        return super().choose_trial_to_run(tune_controller)


class GuardedASHA(ASHAScheduler):
    """ASHA over training steps that never stops the baseline."""

    def __init__(self, controls: _Controls, **options: Any) -> None:
        super().__init__(**options)
        self._controls = controls

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._controls.take(tune_controller)
        if not _is_baseline(trial):
            super().on_trial_add(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        self._controls.retries.start_due()
        return super().choose_trial_to_run(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if _is_baseline(trial):
            return TrialScheduler.CONTINUE
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if not _is_baseline(trial):
            super().on_trial_complete(tune_controller, trial, result)


def _is_baseline(trial: Any) -> bool:
    return _job(trial).role == Role.BASELINE


def _scheduler(asha: Asha | None, controls: _Controls, objective: Objective) -> TrialScheduler:
    if asha is None:
        return _InOrder(controls)
    return GuardedASHA(
        controls,
        time_attr="step",
        metric="held_out_now",
        mode=objective.direction[:3],
        max_t=asha.max_steps,
        grace_period=asha.grace_steps,
        reduction_factor=asha.reduction_factor,
    )
