"""A trial as a Ray Tune Trainable, for studies and for a user's own `tune.Tuner`."""

from __future__ import annotations

import glob
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileType
from ray import tune

from tune_ssim.base.errors import UserError
from tune_ssim.guards import Guard, KeepRule, NonFinite, NormRatio, SmokeTest
from tune_ssim.orchestration.nodes import NodesProcess
from tune_ssim.orchestration.ray_job import job_of, result_of
from tune_ssim.orchestration.retries import PASSED_THROUGH, Preempted
from tune_ssim.orchestration.trainings import make_training
from tune_ssim.orchestration.workers import WorkersTask
from tune_ssim.study.objective import OBJECTIVE, Objective
from tune_ssim.trials.checkpoint import load_checkpoint
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.final_verdict import TrialPlan
from tune_ssim.trials.job import TrialJob
from tune_ssim.trials.training import Training
from tune_ssim.trials.trial_run import TrialRun, TrialSpec


@dataclass(frozen=True)
class TrialResources:
    """Resources of a trial: `workers` processes, or a command on `nodes`, each with `cpus` and `gpus`; by default one process."""

    workers: int = 1
    nodes: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    def placement(self) -> tune.PlacementGroupFactory:
        """What Ray reserves for a trial, all or nothing. A process that only waits for several others gets no resources."""
        bundle = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        if self.workers * self.nodes == 1:
            return tune.PlacementGroupFactory([bundle])
        strategy = "STRICT_SPREAD" if self.nodes > 1 else "PACK"
        return tune.PlacementGroupFactory([{}, *[bundle] * (self.workers * self.nodes)], strategy=strategy)


class GuardedTrainable(tune.Trainable):
    """Made by `make_trainable`. A trial ends by `done=True` with a verdict, never by an exception of the training."""

    spec: TrialSpec
    resources: TrialResources
    _run: TrialRun | None = None
    _workers: WorkersTask | None = None  # reused by consecutive trials of this process
    _is_leaving = False  # this process was asked to end
    _has_left = False  # and the trial is ready to go on elsewhere

    def setup(self, config: dict[str, Any]) -> None:
        self._catch_sigterm()
        self.reset_config(config)

    def _catch_sigterm(self) -> None:
        """SIGTERM announces a preemption: the trial is saved and goes on elsewhere. A second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            return

        def leave(number: int, frame: Any) -> None:
            if self._is_leaving or self._run is None:
                signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: the handler was not set from Python
                signal.raise_signal(number)
            self._is_leaving = True
            if self._run is not None:
                self._run.is_leaving = True

        before = signal.signal(signal.SIGTERM, leave)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Reuses the process for another trial: 0.25 s instead of 3.4 s, since torch is already imported."""
        self._leave()
        job = job_of(new_config, self.trial_id)
        self._run = TrialRun(self.spec, job, self._make_training, checkpoints=earlier_checkpoints(job), pass_through=PASSED_THROUGH)
        self._run.is_leaving = self._is_leaving
        return True

    def _make_training(self) -> Training:
        if self.resources.workers > 1:
            if self._workers is None:
                size = self.resources
                self._workers = WorkersTask(self.spec.task, self.spec.import_path, size.workers, size.cpus, size.gpus)
            return self._workers
        training = make_training(self.spec)
        if self.resources.nodes > 1 and isinstance(training, CommandTask):
            training.launch = partial(NodesProcess, self.resources.nodes, self.resources.cpus, self.resources.gpus)
        return training

    def step(self) -> dict[str, Any]:
        assert self._run is not None
        if self._has_left:
            raise Preempted("its process was asked to end (SIGTERM)")
        report = self._run.advance()
        self._has_left = self._is_leaving
        return result_of(report, self.spec.plan.objective.name)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        assert self._run is not None
        self._run.save(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint_dir: str | dict[str, Any]) -> None:
        assert isinstance(checkpoint_dir, str) and self._run is not None
        self._run.load(Path(checkpoint_dir))

    def restore(self, checkpoint_path: Any) -> None:
        """Resumes from Ray's checkpoint, or from the newest intact one. After a kill Ray's snapshot may be older than the last
        checkpoints, so the one it refers to may be deleted, and another may be truncated. Without any, the trial starts again."""
        wanted = getattr(checkpoint_path, "checkpoint", checkpoint_path)
        if not isinstance(wanted, tune.Checkpoint):
            super().restore(checkpoint_path)
            return
        for found in [wanted, *_beside(wanted)]:
            try:
                if not _exists(found):
                    continue
                with found.as_directory() as folder:
                    load_checkpoint(Path(folder))
            except (OSError, UserError):
                continue
            super().restore(found)
            return

    def cleanup(self) -> None:
        self._leave(for_good=True)

    def _leave(self, for_good: bool = False) -> None:
        """Ends what the last trial runs outside this process. Workers are kept for the next trial unless one failed."""
        run, self._run = self._run, None
        if run is None:
            return
        if run.training is not self._workers or for_good or run.failure is not None:
            run.close()
            self._workers = None


def earlier_checkpoints(job: TrialJob) -> list[Path]:
    """Checkpoints of this trial from earlier starts of the study, newest first."""
    if not job.storage or not job.study:
        return []
    found = Path(job.storage, job.study, "ray").glob(f"*/{glob.escape(job.trial_id)}/checkpoint_*")
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def _exists(checkpoint: tune.Checkpoint) -> bool:
    return bool(checkpoint.filesystem.get_file_info(checkpoint.path).type != FileType.NotFound)


def _beside(checkpoint: tune.Checkpoint) -> list[tune.Checkpoint]:
    """Checkpoints of the same trial, newest first."""
    trial = checkpoint.path.rpartition("/")[0]
    entries = checkpoint.filesystem.get_file_info(FileSelector(trial, allow_not_found=True))
    names = sorted((entry.base_name for entry in entries if entry.base_name.startswith("checkpoint_")), reverse=True)
    return [tune.Checkpoint(f"{trial}/{name}", checkpoint.filesystem) for name in names]


def trainable_class(spec: TrialSpec, resources: TrialResources = TrialResources()) -> type[GuardedTrainable]:
    return type("GuardedTrial", (GuardedTrainable,), {"spec": spec, "resources": resources})


def make_trainable(
    task: str | type | Mapping[str, Any],
    guards: Sequence[Guard] = (NormRatio(), SmokeTest(), NonFinite()),
    *,
    task_config: Mapping[str, Any] | None = None,
    steps: int = 200,
    keep: Sequence[KeepRule] = (),
    objective: str | Objective = OBJECTIVE,
    report_every: int = 1,
    result_every: int | None = 10,
    checkpoint_every: int | None = None,
    evaluate_every: int | None = None,
    import_path: str | None = None,
    parts: TrialResources = TrialResources(),
) -> type[GuardedTrainable]:
    """A Trainable class for `tune.Tuner`. `task`: a subclass of `trials.training.Training`, or "module:Class"; or a
    function that reports through `trial_context`, as "module:function"; or a command, as a mapping for
    `study.command_spec.CommandSpec`.

    Its config has the settings of the task, and `gain` as short for ssim_loss_weight = gain / ssim_grad_scale. Its last result has
    verdict, reason, pruned (0/1), pruned_by, harm (a graded constraint, feasible if <= 0), the objective and every held-out metric;
    `records` and `images` are for callbacks. It reports every `result_every` training steps, or with None every two seconds.
    Every `checkpoint_every` steps it asks Ray for a checkpoint, in addition to Ray's CheckpointConfig. The norm guard needs a
    baseline: wrap the searcher in `BaselineFirst`.
    """
    goal = Objective(maximize=objective) if isinstance(objective, str) else objective
    plan = TrialPlan(steps=steps, guards=tuple(guards), keep=tuple(keep), objective=goal, report_every=report_every)
    spec = TrialSpec(task, plan, dict(task_config or {}), result_every, checkpoint_every, evaluate_every, import_path)
    return trainable_class(spec, parts)
