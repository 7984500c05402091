"""A trial as a Ray Tune Trainable: works in a study and alone, inside a user's own `tune.Tuner`."""

from __future__ import annotations

import glob
import json
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileType
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.result import SHOULD_CHECKPOINT

from tune_ssim.base.errors import BadSetup, NothingToResume, UserError
from tune_ssim.base.files import jsonable
from tune_ssim.guards import Baseline, Guard, KeepRule, NonFinite, NormRatio, SmokeTest
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.orchestration.nodes import NodesProcess
from tune_ssim.orchestration.workers import WorkersTask
from tune_ssim.records import Record
from tune_ssim.study.space import resolve_settings
from tune_ssim.tracking.mlflow_source import open_new_run
from tune_ssim.trials.checkpoint import load_checkpoint
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.quarantine import Ledger
from tune_ssim.trials.summary import OBJECTIVE, TrialSummary, reported_config
from tune_ssim.trials.training import Training, load_task
from tune_ssim.trials.trial import Judgement, Trial, TrialPlan

CONTEXT = "tune_ssim"  # key of a trial's config under which a study says who the trial is
RESULT_S = 2.0  # a result costs the driver 8 ms (benchmarks/command.py): with ten trials at once it stays below 5 % of a core
WORK = "work"  # in a study's folder: what the trainings themselves leave behind, a folder a trial


@dataclass(frozen=True)
class Parts:
    """A trial over `workers` processes, or a command on `nodes`, each with `cpus` and `gpus`; neither: one process."""

    workers: int = 1
    nodes: int = 1
    cpus: float = 1.0
    gpus: float = 0.0

    def resources(self) -> tune.PlacementGroupFactory:
        """What Ray reserves for a trial, all or nothing. The process that judges several parts only waits: it takes none."""
        bundle = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        if self.workers * self.nodes == 1:
            return tune.PlacementGroupFactory([bundle])
        strategy = "STRICT_SPREAD" if self.nodes > 1 else "PACK"
        return tune.PlacementGroupFactory([{}, *[bundle] * (self.workers * self.nodes)], strategy=strategy)


@dataclass(frozen=True)
class TrialSpec:
    """Everything about a trial but its settings; travels to the workers with the class."""

    task: str | type | Mapping[str, Any]  # "my_pkg.train:MyTask", the class itself, or a command
    plan: TrialPlan
    task_config: Mapping[str, Any] = field(default_factory=dict)
    result_every: int | None = 10  # training steps per result that Ray sees; None: one in RESULT_S seconds
    checkpoint_every: int | None = None  # training steps; None: when Ray's CheckpointConfig says
    evaluate_every: int | None = None  # training steps between held-out evaluations for a scheduler; None: at the end only
    import_path: str | None = None  # put in front of sys.path on the workers, for a task beside the study file
    parts: Parts = Parts()

    def make_task(self) -> Training:
        if self.parts.workers > 1:
            return WorkersTask(self.task, self.import_path, self.parts.workers, self.parts.cpus, self.parts.gpus)
        task = load_task(self.task, self.import_path)()
        if isinstance(task, CommandTask):
            task.open_mlflow = open_new_run
            if self.parts.nodes > 1:
                task.launch = partial(NodesProcess, self.parts.nodes, self.parts.cpus, self.parts.gpus)
        return task


class GuardedTrainable(tune.Trainable):
    """Made by `make_trainable`. A trial ends by `done=True` with a verdict, never by an exception of the training."""

    spec: TrialSpec

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ray reuses the process for another trial: 0.25 s instead of 3.4 s with torch already imported."""
        self._leave()
        self.__dict__.pop("trial", None)  # of the configuration before
        self._started = time.perf_counter()
        context = dict(new_config.get(CONTEXT) or {})
        self.trial_name_in_study = str(context.get("trial_id") or self.trial_id)
        self.role = str(context.get("role", "search"))
        self.storage = context.get("storage")  # where the ledger of ruined checkpoints is
        self.study = context.get("study")  # its name; its folder is in the storage path
        self.seed = int(context.get("seed", new_config.get("seed", 0)))
        self.searched = tuple(context.get("searched") or ())
        self.settings: dict[str, Any] = {}
        self.failure: Judgement | None = None
        self.traceback = ""
        self._quietly(lambda: self._start(new_config, context))
        return True

    def _start(self, new_config: Mapping[str, Any], context: Mapping[str, Any]) -> None:
        given = {key: value for key, value in new_config.items() if key not in (CONTEXT, "seed")}
        if CONTEXT not in new_config:
            self.searched = tuple(given)
        self.settings = resolve_settings(given)
        config = {"steps": self.spec.plan.steps, **self.spec.task_config, **self.settings}
        baseline = context.get("baseline")
        task = self._workers or self.spec.make_task()
        self._workers = task if isinstance(task, WorkersTask) else None
        if self.storage and self.study:
            task.identify(f"{self.study}-{self.trial_name_in_study}", Path(self.storage, self.study, WORK))
        self.trial = Trial(task, self.spec.plan)
        start = partial(
            self.trial.start,
            config,
            seed=self.seed,
            role=self.role,
            baseline=Baseline.read(baseline["path"], baseline["sha256"]) if baseline else None,
            searched=self.searched,
        )
        start()
        for checkpoint in self._of_earlier_starts():
            try:
                self._load(checkpoint)
                break
            except (OSError, UserError):  # cut short by a kill, or of another configuration
                start()

    def _of_earlier_starts(self) -> list[Path]:
        """Checkpoints of this trial from before the study was interrupted, the newest first."""
        if not self.storage or not self.study or not self.trial.task.can_resume:
            return []
        found = Path(self.storage, self.study, "ray").glob(f"*/{glob.escape(self.trial_name_in_study)}/checkpoint_*")
        return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)

    def step(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if self.failure is None:
            self._quietly(lambda: self._advance(result))
        verdict = self.failure or self.trial.verdict
        if self.failure is not None:
            self._leave()
        if verdict is not None:
            result |= self._final(verdict)
            if verdict.verdict == "pruned":
                # Ray saves the state once more after this result: that checkpoint is known before it is written.
                self._quietly(lambda: self.trial.note_contents())
                result["wrote"] = [*result.get("wrote", []), *self.trial.wrote]
        return result

    def _advance(self, result: dict[str, Any]) -> None:
        """Fills the result, where the training raises an exception with all that it gave until then."""
        trial, spec = self.trial, self.spec
        before, began, records = trial.step, time.monotonic(), list[Record]()
        to_save = to_evaluate = is_time = False
        try:
            while not (trial.verdict is not None or to_save or to_evaluate or is_time):
                records += trial.advance(spec.result_every or spec.plan.report_every)
                to_save = _passed(spec.checkpoint_every, before, trial.step) and trial.task.can_resume
                to_evaluate = trial.verdict is None and _passed(spec.evaluate_every, before, trial.step)
                is_time = spec.result_every is not None or time.monotonic() - began >= RESULT_S
        finally:
            records += trial.records_before_error
            images, trial.images = trial.images, {}
            wrote, trial.wrote = trial.wrote, []
            last = records[-1].values if records else {}
            result |= {
                "step": trial.step,
                "records": [record.to_json() for record in records],
                "images": images,
                "wrote": wrote,
                "norm_ratio": trial.norm_ratio(),
                spec.plan.objective: math.nan,  # until the end; Ray insists that every result has the searcher's metric
                **{name: last[name] for name in ("loss", "total_norm") if name in last},
            }
        if to_save:
            result[SHOULD_CHECKPOINT] = True
        if to_evaluate:
            name, found = spec.plan.objective.removeprefix("delta_"), trial.task.evaluate()
            if name not in found:
                raise UserError(f"step {trial.step}: no held-out {name} for the scheduler, found {', '.join(found) or 'nothing'}")
            result["held_out_now"] = found[name]

    def _final(self, verdict: Judgement) -> dict[str, Any]:
        """The last result: what a searcher, a callback or a ResultGrid wants to know about the trial."""
        trial: Trial | None = self.__dict__.get("trial")
        if trial is not None and not trial.is_set_up:  # it failed before there was anything to say about it
            trial = None
        metrics = dict(trial.summary_metrics()) if trial and not self.failure else {}
        violation = verdict.violation
        objective = float(metrics.get(self.spec.plan.objective, math.nan))
        effective = dict(trial.effective) if trial else {}
        summary = TrialSummary(
            trial_id=self.trial_name_in_study,
            role=Role(self.role),
            seed=self.seed,
            objective=self.spec.plan.objective,
            config=reported_config(self.settings, effective),
            verdict=verdict.verdict,
            reason=verdict.reason,
            horizon=trial.horizon() if trial else {},
            evidence=violation.evidence() if violation else None,
            steps=trial.step if trial else 0,
            metrics={**metrics, "seconds": round(time.perf_counter() - self._started, 3)},
            warnings=[warning.sentence for warning in trial.warnings] if trial else [],
        )
        result: dict[str, Any] = {
            "done": True,
            "verdict": verdict.verdict.value,
            "reason": verdict.reason,
            "pruned": int(verdict.verdict == "pruned"),
            "pruned_by": violation.guard if violation and verdict.verdict == "pruned" else "",
            "harm": trial.harm() if trial and not self.failure else 0.0,
            # A trial that did not reach its end has no objective: no sampler may take it for a result.
            self.spec.plan.objective: objective if verdict.verdict in ("safe", "degraded") else math.nan,
            "summary": json.dumps(summary.to_dict()),
            "effective": json.dumps(jsonable(effective)),
            "traceback": self.traceback,
        }
        if verdict.verdict == "safe" and self.role == "baseline" and trial:
            result["baseline_run"] = Baseline((trial.baseline_run(self.trial_name_in_study),)).to_bytes().decode()
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        if self.failure is None:
            self.trial.save(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint_dir: str | dict[str, Any]) -> None:
        assert isinstance(checkpoint_dir, str)
        if self.failure is None:
            self._quietly(lambda: self._load(Path(checkpoint_dir)))

    def restore(self, checkpoint_path: Any) -> None:
        """From the checkpoint that Ray knows of, or from the newest that is there. After a kill Ray's snapshot may be older than
        the last checkpoints, and of these it keeps one: the one that it remembers is then gone. Without any the trial begins
        again."""
        wanted = getattr(checkpoint_path, "checkpoint", checkpoint_path)
        if not isinstance(wanted, tune.Checkpoint) or _exists(wanted):
            super().restore(checkpoint_path)
            return
        for found in _beside(wanted):
            try:
                with found.as_directory() as folder:
                    load_checkpoint(Path(folder))  # a kill may have cut it short
            except (OSError, UserError):
                continue
            super().restore(found)
            return

    def _load(self, folder: Path) -> None:
        if not self.trial.task.can_resume:
            return  # it begins again
        if self.storage:
            Ledger(self.storage).require_clean(folder)
        with suppress(NothingToResume):
            self.trial.load(folder)

    def cleanup(self) -> None:
        self._leave(for_good=True)
        self.__dict__.pop("trial", None)

    _workers: WorkersTask | None = None  # of this process, for one trial after the other

    def _leave(self, for_good: bool = False) -> None:
        """Ends what the last trial runs outside this process. Workers stay for the next one, unless one of them failed."""
        failed = self.__dict__.get("failure") is not None
        if self._workers is not None and (for_good or failed):
            self._workers.close()
            self._workers = None
        task = self.trial.task if "trial" in self.__dict__ else None
        if task is not None and not isinstance(task, WorkersTask):
            task.close()

    def _quietly(self, action: Any) -> None:
        """Runs `action`; an exception becomes the verdict `error` with its place, and a traceback in the result."""
        try:
            action()
        except UserError as error:
            self.failure = Judgement(Verdict.ERROR, str(error))
        except BadSetup as finding:
            self.failure = Judgement(Verdict.BAD_SETUP, str(finding))
        except RayActorError:  # a worker died: Ray starts the trial again, from its last checkpoint
            raise
        except Exception as error:
            self.traceback = traceback.format_exc()
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self.failure = Judgement(Verdict.ERROR, f"{type(error).__name__}: {error} ({where})")


def _passed(every: int | None, before: int, step: int) -> bool:
    """Whether a multiple of `every` lies in (before, step]."""
    return every is not None and step // every > before // every


def _exists(checkpoint: tune.Checkpoint) -> bool:
    return bool(checkpoint.filesystem.get_file_info(checkpoint.path).type != FileType.NotFound)


def _beside(checkpoint: tune.Checkpoint) -> list[tune.Checkpoint]:
    """Checkpoints of the same trial, the newest first."""
    trial = checkpoint.path.rpartition("/")[0]
    entries = checkpoint.filesystem.get_file_info(FileSelector(trial, allow_not_found=True))
    names = sorted((entry.base_name for entry in entries if entry.base_name.startswith("checkpoint_")), reverse=True)
    return [tune.Checkpoint(f"{trial}/{name}", checkpoint.filesystem) for name in names]


def make_trainable(
    task: str | type | Mapping[str, Any],
    guards: Sequence[Guard] = (NormRatio(), SmokeTest(), NonFinite()),
    *,
    task_config: Mapping[str, Any] | None = None,
    steps: int = 200,
    keep: Sequence[KeepRule] = (),
    objective: str = OBJECTIVE,
    report_every: int = 1,
    result_every: int | None = 10,
    checkpoint_every: int | None = None,
    evaluate_every: int | None = None,
    import_path: str | None = None,
    parts: Parts = Parts(),
) -> type[GuardedTrainable]:
    """A Trainable class for `tune.Tuner`. `task`: a class that keeps the contract of `Training`, or "module:Class"; or
    a function that reports through `trial_context`, as "module:function"; or a command, as a mapping for
    `study.command_spec.CommandSpec`.

    Its config: settings of the task, and `gain` as short for ssim_loss_weight = gain / ssim_grad_scale. Its last result has
    verdict, reason, pruned (0/1), pruned_by, harm (a graded constraint, feasible <= 0), the objective and every held-out metric;
    `records` and `images` are for callbacks. A result comes every `result_every` training steps, or with None every two seconds.
    Every `checkpoint_every` steps it asks Ray for a checkpoint, beside what Ray's CheckpointConfig says. The norm guard needs a
    baseline: wrap the searcher in `BaselineFirst`.
    """
    plan = TrialPlan(
        steps=steps,
        guards=tuple(guards),
        keep=tuple(keep),
        objective=objective,
        report_every=report_every,
    )
    spec = TrialSpec(task, plan, dict(task_config or {}), result_every, checkpoint_every, evaluate_every, import_path, parts)
    return type("GuardedTrial", (GuardedTrainable,), {"spec": spec})
