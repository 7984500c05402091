"""A study → Ray Tune → the study's folder and its mirror in MLflow."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import ray
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, ResultGrid, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.base.files import check_name, write_atomically
from tune_ssim.guards import Baseline, Guard
from tune_ssim.guards.baseline_log import baseline_of_log, describe, require_steps
from tune_ssim.orchestration.before_launch import before_launch, inspect, norm_model
from tune_ssim.orchestration.confirm import PREFIX, ConfirmSearch, confirm_seeds, confirm_steps, longer
from tune_ssim.orchestration.live_table import LiveTable
from tune_ssim.orchestration.search import BaselineFirst, GuardedOptunaSearch, StagedSearch
from tune_ssim.orchestration.study_callback import LIVE_TABLES, StudyCallback
from tune_ssim.orchestration.trainable import CONTEXT, GuardedTrainable, Parts, make_trainable
from tune_ssim.results.events import EventWriter
from tune_ssim.results.proof import differences
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.trial_text import setting_text
from tune_ssim.results.winner import ranked
from tune_ssim.trials.summary import TrialSummary
from tune_ssim.trials.training import load_task
from tune_ssim.trials.trial import harm_of

if TYPE_CHECKING:
    from rich.console import Console

    from tune_ssim.study.study import Study

SEARCH, CONFIRM = "run", "confirm"  # phases that are Ray experiments, by their folder below the study's `ray/`
DRAIN_TIMEOUT_S = 120.0  # for MLflow to catch up after the last trial; what is left over is mirrored later
UNREACHED_TIMEOUT_S = 10.0  # the same, if it has not taken a single event during the study
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}  # trials side by side: contended threads are slower than one thread each
UNLIMITED = 1000  # places where nothing is needed
CONNECT_TIMEOUT_S = 5.0  # what Ray itself grants a single attempt
PROCESS_FAILURES = 2  # a trial whose process died goes on from its checkpoint; exceptions of the training are verdicts


def run(
    study: Study,
    *,
    storage: Path,
    name: str | None = None,
    address: str | None = None,
    resume: bool = False,
    tracking_uri: str | None = None,
    console: Console | None = None,
) -> StudyFolder:
    """Runs `study` to its end, or goes on with it, and returns its folder.

    storage: the storage path; several studies and MLflow's default SQLite store live there. On several nodes it must be shared.
    name: in place of the study's own; a name that is taken gets a suffix, unless `resume`.
    address: of a Ray cluster; None starts a local one. Raises UserError, or BadSetup when the baseline itself fails.
    """
    folder = _folder(study, storage, name, resume)
    load_task(study.task_path, study.import_path)  # a misspelt task is known before Ray starts
    folder.create()
    if not resume:
        write_atomically(folder.study_file, study.to_yaml().encode())
    writer = EventWriter(folder)
    with _ray(study, address) as cluster:
        concurrency = _concurrency(study, cluster)
        writer.study_started(folder.name, study.sha256)
        writer.file("study.yaml")
        mirror = _mirror(study, folder, tracking_uri)
        total = study.search.trials + study.baseline_seeds
        unsound = stopped = ""
        try:
            with LiveTable(total, console) as table:
                LIVE_TABLES[str(folder.path)] = table
                table.say(_where(cluster))
                before_launch(study, folder, writer, table, _gpus(study, cluster))
                if not _begun(folder, CONFIRM):
                    table.phase(f"{folder.name}: {plan_in_words(study.baseline_seeds, study.search.trials, concurrency)}")
                    stopped = _search(study, folder, cluster, concurrency, table)
                if not stopped and not _failure(folder.trials()) and not _unfinished(folder):
                    _confirm(study, folder, cluster, concurrency, table)
        except (BadSetup, UserError) as error:
            unsound = str(error)
            raise
        finally:
            LIVE_TABLES.pop(str(folder.path), None)
            for path in sorted((folder.path / "baseline").glob("*.json")):
                writer.file(f"baseline/{path.name}", "baseline")
            trials = folder.trials()
            reason = _failure(trials)
            writer.study_ended(unsound or reason or stopped or "done")
            if mirror is not None:
                _drain(mirror, folder, console)
    if reason:
        raise _as_error(trials, reason)
    if unfinished := _unfinished(folder):
        # Ray takes Ctrl-C for itself, saves its state and returns as if all were well.
        raise KeyboardInterrupt(f"{len(unfinished)} trials were still running")
    if stopped:
        raise UserError(f"{stopped}; the search ended before its other trials (--resume goes on with them)")
    return folder


def plan_in_words(baselines: int, trials: int, concurrency: int) -> str:
    counts = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in ((baselines, "baseline"), (trials, "trial"))]
    return f"{counts[0]}, then {counts[1]}, {concurrency} at a time"


def _folder(study: Study, storage: Path, name: str | None, resume: bool) -> StudyFolder:
    wanted = check_name(name or study.name)
    path = storage / wanted
    if resume:
        if not (path / "study.yaml").exists():
            raise UserError(f"--resume: no study {wanted!r} that was started in {storage}")
        return StudyFolder(path)
    number = 2
    while path.exists() and any(path.iterdir()):
        path = storage / f"{wanted}-{number}"
        number += 1
    return StudyFolder(path)


# -- Ray


@contextmanager
def _ray(study: Study, address: str | None) -> Iterator[dict[str, float]]:
    """Connects, yields the cluster's resources, and shuts down what it started. An existing connection is used as it is."""
    _quiet()
    mine = not ray.is_initialized()
    if mine:
        options: dict[str, Any] = {
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "runtime_env": {"env_vars": WORKER_ENVIRONMENT},
        }
        if address is None:
            cpus = study.resources.cpus * (study.search.concurrency if isinstance(study.search.concurrency, int) else 1)
            options |= {"address": "local", "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus))}
        else:
            _require_reachable(address)
            options["address"] = address
            options.pop("include_dashboard")
        try:
            ray.init(**options)
        except Exception as error:
            if address is None:
                raise
            raise UserError(f"--address {address}: {str(error).splitlines()[0]}") from None
    try:
        with _sigterm_as_ctrl_c() if mine else nullcontext():
            yield ray.cluster_resources()
    finally:
        if mine:
            ray.shutdown()


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A batch system or a container ends a study as Ctrl-C does; Ray's own handler prints a stack of addresses and dies."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: a handler that is not Python's


def _require_reachable(address: str) -> None:
    """Raises UserError where nobody listens: Ray itself tries for minutes, and fills the screen."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and the like
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--address {address}: {getattr(error, 'strerror', None) or error}") from None


def _where(cluster: dict[str, float]) -> str:
    """Ray's ports listen on every interface, whatever one asks for: the token is the fence, so it is said whether it is on."""
    try:
        from ray._private.authentication.authentication_utils import is_token_auth_enabled
    except ImportError:  # not a public name
        fence = "whether token authentication is on is not known"
    else:
        fence = "token authentication is on"
        if not is_token_auth_enabled():
            fence = "token authentication is OFF: whoever reaches Ray's ports can run code here (RAY_AUTH_MODE=token)"
    gpus = f"{cluster['GPU']:g} GPUs" if cluster.get("GPU") else "no GPU"
    return f"Ray: {cluster.get('CPU', 0):g} CPUs, {gpus}; {fence}"


def _quiet() -> None:
    """Ray's own reporting off: the table says it better. Warnings and errors of the task still come."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_PROMPT_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # ASHA's metric is there at its rungs only
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\..*")


def _gpus(study: Study, cluster: dict[str, float]) -> float:
    """Of a trial, or of each of its workers or nodes."""
    if study.resources.gpus_per_worker is not None:
        return study.resources.gpus_per_worker
    gpus = study.resources.gpus
    return (1.0 if cluster.get("GPU") else 0.0) if gpus == "auto" else float(gpus)


def _concurrency(study: Study, cluster: dict[str, float]) -> int:
    """Trials side by side; never more than the nodes can hold, so that none waits for ever."""
    cpus, gpus, parts = study.resources.cpus, _gpus(study, cluster), study.resources.parts
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # How many parts of a trial fit on each node; what is left over on one is of no use to another.
    room = [min(_times(node.get("CPU", 0.0), cpus), _times(node.get("GPU", 0.0), gpus)) for node in nodes]
    if study.resources.nodes == 1:
        fits = sum(room) // parts
        what = "a trial" if parts == 1 else f"each of a trial's {parts} workers"
    else:  # a part on each of several different nodes
        fits = _spread(room, parts)
        what = f"a trial, on each of {parts} nodes,"
    if fits < 1:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UserError(f"resources: {what} needs {cpus:g} CPUs and {gpus:g} GPUs; the cluster's nodes have {have}")
    wanted = study.search.concurrency
    return fits if wanted == "auto" else min(int(wanted), fits)


def _times(there: float, needed: float) -> int:
    return int(there / needed + 1e-6) if needed else UNLIMITED


def _spread(room: Sequence[int], parts: int) -> int:
    """How many trials can each have `parts` places on different nodes, of nodes with so many places: the largest n for which the
    nodes have n * parts places, counting at most n of each."""
    count = 0
    while sum(min(places, count + 1) for places in room) >= (count + 1) * parts and count < UNLIMITED:
        count += 1
    return count


def _begun(folder: StudyFolder, phase: str) -> bool:
    return (folder.ray_folder / phase).exists()


def _attempt(folder: StudyFolder, phase: str) -> str:
    """The phase's name, numbered from its second start on."""
    count = sum(1 for path in folder.ray_folder.glob(f"{phase}*") if path.is_dir())
    return phase if count == 0 else f"{phase}-{count + 1}"


def _past(folder: StudyFolder, steps: int, objective: str) -> dict[str, dict[str, Any]]:
    """How the trials of a study that is resumed ended, as a searcher wants to know it. One whose process died has no result."""
    found: dict[str, dict[str, Any]] = {}
    for trial in folder.trials():
        if trial.is_repeated_on_resume:
            continue
        found[trial.trial_id] = {
            **trial.metrics,
            objective: trial.metric(objective) if trial.verdict.has_result else math.nan,
            "verdict": trial.verdict.value,
            "reason": trial.reason,
            "config": trial.config,
            "role": trial.role.value,
            "harm": harm_of(trial.verdict, trial.evidence, trial.steps, steps),
        }
    return found


def _past_baseline(folder: StudyFolder, names: Sequence[str], past: Mapping[str, Any]) -> Baseline | None:
    """The baseline of these runs, if all of them had ended and it was written."""
    if not all(past.get(name, {}).get("verdict") == "safe" for name in names):
        return None
    for path in (folder.path / "baseline").glob("*.json"):
        try:
            baseline = Baseline.read(path, path.stem)
        except ValueError:  # torn or changed
            continue
        if [run.trial_id for run in baseline.runs] == list(names):
            return baseline
    return None


def _fit(
    study: Study,
    folder: StudyFolder,
    phase: str,
    cluster: dict[str, float],
    searcher: Searcher,
    *,
    samples: int,
    concurrency: int,
    steps: int,
    guards: Sequence[Guard],
    scheduler: TrialScheduler | None = None,
) -> None:
    """One phase, or what is left of it: nothing of Ray's own state is needed, which a kill may leave torn or out of date."""
    if samples <= 0:
        return
    asha = study.scheduler if scheduler is not None else None
    trainable: type[GuardedTrainable] = make_trainable(
        study.task_path,
        guards,
        task_config={**study.task_config, "steps": steps},
        steps=steps,
        keep=study.objective.rules,
        objective=study.objective.maximize,
        report_every=study.report_every,
        result_every=study.result_every,
        checkpoint_every=study.checkpoint_every,
        evaluate_every=asha.grace_steps if asha else None,
        import_path=study.import_path,
        parts=Parts(study.resources.workers, study.resources.nodes, study.resources.cpus, _gpus(study, cluster)),
    )
    with_resources = tune.with_resources(trainable, trainable.spec.parts.resources())
    tuner = Tuner(
        with_resources,
        tune_config=TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=samples,
            max_concurrent_trials=concurrency,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=RunConfig(
            name=_attempt(folder, phase),
            storage_path=str(folder.ray_folder),
            callbacks=[StudyCallback(folder, steps)],
            stop=BaselineStopper(),
            failure_config=FailureConfig(max_failures=PROCESS_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_at_end=True),
            verbose=0,
        ),
    )
    _check(tuner.fit())


def _check(results: ResultGrid) -> None:
    """A trial whose process died is a line in the table. Of a baseline it is the end: nothing can be compared."""
    for result in results:
        context = (result.config or {}).get(CONTEXT) or {}
        if result.error is not None and context.get("role") == "baseline":
            last = [line for line in str(result.error).splitlines() if line.strip()][-1].strip()
            raise UserError(f"{context.get('trial_id')}: its process died: {last} (--resume tries again)")


def _search(study: Study, folder: StudyFolder, cluster: dict[str, float], concurrency: int, table: LiveTable) -> str:
    """Why it ended before its last trial; empty: it did not."""
    model, limit, skip_above = norm_model(folder)
    search: dict[str, Any] = {
        "metric": study.objective.maximize,
        "model": model,
        "limit": limit,
        "skip_above": skip_above,
        "skip_log": folder.skipped_file,
        "seed": study.search.seed,
        "concurrency": concurrency,
        "deterministic": study.search.deterministic and study.scheduler is None,
        "sampler": optuna.samplers.RandomSampler(seed=study.search.seed) if study.search.strategy == "random" else None,
    }
    if len(study.space.stages) > 1:
        inner: Any = StagedSearch(study.space, study.search.trials, **search)
    else:
        stage = study.space.stages[0]
        n_latin = min(6, max(0, study.search.trials - len(stage.points)))
        inner = GuardedOptunaSearch(stage, n_latin=n_latin, **search)
    seeds = [study.search.seed + index for index in range(study.baseline_seeds)]
    past = _past(folder, study.steps, study.objective.maximize)
    log = study.baseline.log
    if log is None:
        baseline = _past_baseline(folder, [f"baseline-{index}" for index in range(len(seeds))], past)
    else:
        baseline, seeds = baseline_of_log(log.file, **log.model_dump(exclude={"file"})), [study.search.seed]
        require_steps(baseline, log.file, study.steps)
        table.say(describe(baseline, log.file))
    past = {name: result for name, result in past.items() if result["role"] == "search" and baseline is not None}
    table.ended = len(past) + (0 if baseline is None else study.baseline_seeds)
    searcher = BaselineFirst(
        inner,
        study.baseline_settings,
        folder=folder.path / "baseline",
        seeds=seeds,
        baseline=baseline,
        storage=folder.path.parent,
        study=folder.name,
        past=past,
    )
    _fit(
        study,
        folder,
        SEARCH,
        cluster,
        searcher,
        samples=study.search.trials - len(past) + (len(seeds) if baseline is None else 0),
        concurrency=concurrency,
        steps=study.steps,
        guards=study.guard_list,
        scheduler=_scheduler(study),
    )
    for skipped in folder.skipped():
        table.say(f"not launched: {setting_text(skipped.config)}: {skipped.sentence}")
    if inner.reason:
        table.say(f"the search ended early: {inner.reason}")
    return searcher.failure


def _confirm(study: Study, folder: StudyFolder, cluster: dict[str, float], concurrency: int, table: LiveTable) -> None:
    """The finalists and the baseline again, with further seeds and for longer."""
    if study.confirm is None:
        return
    finalists = ranked(folder.trials(), study.objective.maximize)[: study.confirm.finalists]
    if not finalists:
        return
    seeds, steps = confirm_seeds(study), confirm_steps(study)
    table.phase(f"confirm: the baseline and up to {len(finalists)} finalists, {len(seeds)} new seeds, {steps} steps")
    table.total = None  # how many finalists it takes is not known
    settings = [(trial.trial_id, trial.settings) for trial in finalists]
    _fit_confirmation(study, folder, cluster, concurrency, settings, seeds, steps)


def _fit_confirmation(
    study: Study,
    folder: StudyFolder,
    cluster: dict[str, float],
    concurrency: int,
    finalists: Sequence[tuple[str, Mapping[str, Any]]],
    seeds: Sequence[int],
    steps: int,
) -> None:
    settings = [(name, {key: value for key, value in setting.items() if value is not None}) for name, setting in finalists]
    inner = ConfirmSearch(settings, seeds, study.objective.maximize)
    past = _past(folder, steps, study.objective.maximize)
    baseline = _past_baseline(folder, [f"{PREFIX}baseline-{index}" for index in range(len(seeds))], past)
    past = {name: result for name, result in past.items() if result["role"] == "confirm" and baseline is not None}
    searcher = BaselineFirst(
        inner,
        study.baseline_settings,
        folder=folder.path / "baseline",
        seeds=seeds,
        baseline=baseline,
        prefix=PREFIX,
        past=past,
        storage=folder.path.parent,
        study=folder.name,
    )
    _fit(
        study,
        folder,
        CONFIRM,
        cluster,
        searcher,
        samples=len(seeds) * (len(finalists) + (baseline is None)) - len(past),
        concurrency=concurrency,
        steps=steps,
        guards=longer(study.guard_list, steps),
    )


def inspect_on(study: Study, *, address: str, preflight: bool, calibration: bool, provenance: bool) -> dict[str, Any]:
    """`inspect` with a connection of its own, for the verbs that look at a study before it is launched."""
    with _ray(study, address) as cluster:
        return inspect(study, _gpus(study, cluster), preflight=preflight, calibration=calibration, provenance=provenance)


def confirm_again(
    study: Study,
    setting: Mapping[str, Any],
    name: str,
    *,
    seeds: Sequence[int],
    steps: int,
    recorded: Mapping[str, str],
    storage: Path,
    address: str | None = None,
    console: Console | None = None,
) -> tuple[dict[str, str], list[TrialSummary]]:
    """One setting through the confirm phase, for `tune-ssim verify`: (hashes of code, weights and data as they are now, trials).

    recorded: the hashes that are expected; if they differ there are no trials, since they would prove something else."""
    folder = StudyFolder(storage / study.name).create()
    write_atomically(folder.study_file, study.to_yaml().encode())
    with _ray(study, address) as cluster:
        found = inspect(study, _gpus(study, cluster), preflight=False, calibration=False, provenance=True)["provenance"]
        if differences(recorded, found):
            return found, []
        with LiveTable(None, console) as table:
            LIVE_TABLES[str(folder.path)] = table
            try:
                table.phase(f"confirming {name} again: {len(seeds)} seeds, {steps} steps")
                _fit_confirmation(study, folder, cluster, _concurrency(study, cluster), [(name, setting)], seeds, steps)
            finally:
                LIVE_TABLES.pop(str(folder.path), None)
    if _unfinished(folder):
        raise KeyboardInterrupt
    return found, folder.trials()


def _trial_name(trial: Any) -> str:
    return str((trial.config.get(CONTEXT) or {}).get("trial_id", trial.trial_id))


class BaselineStopper(Stopper):
    """Ends the study at once when its baseline is a bad set-up: no setting is to blame, no further step is worth taking."""

    def __init__(self) -> None:
        self.over = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        context = (result.get("config") or {}).get(CONTEXT) or {}
        self.over = self.over or (context.get("role") == "baseline" and result.get("verdict") in ("bad_setup", "error"))
        return False

    def stop_all(self) -> bool:
        return self.over


class GuardedASHA(ASHAScheduler):
    """ASHA over training steps that leaves the baseline alone."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if not _is_baseline(trial):
            super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if _is_baseline(trial):
            return TrialScheduler.CONTINUE
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if not _is_baseline(trial):
            super().on_trial_complete(tune_controller, trial, result)


def _is_baseline(trial: Any) -> bool:
    return bool((trial.config.get(CONTEXT) or {}).get("role") == "baseline")


def _scheduler(study: Study) -> Any:
    asha = study.scheduler
    if asha is None:
        return None
    return GuardedASHA(
        time_attr="step",
        metric="held_out_now",
        mode="max",
        max_t=asha.max_steps,
        grace_period=asha.grace_steps,
        reduction_factor=asha.reduction_factor,
    )


# -- MLflow, which may be anywhere or nowhere


def _mirror(study: Study, folder: StudyFolder, uri: str | None) -> Any:
    if study.tracking is None:
        return None
    from tune_ssim.tracking.mirror import MLflowMirror

    mirror = MLflowMirror(folder, uri or study.tracking.uri)
    mirror.start()
    return mirror


def _drain(mirror: Any, folder: StudyFolder, console: Console | None) -> None:
    if not mirror.drain(DRAIN_TIMEOUT_S if mirror.reached() else UNREACHED_TIMEOUT_S) and console is not None:
        words = f"MLflow: {mirror.status()}; nothing is lost, `tune-ssim mirror {folder.name}` goes on when it is there"
        console.print(words, markup=False, highlight=False)


# -- how it ended


def _failure(trials: list[TrialSummary]) -> str:
    """Why the study as a whole failed: its baseline did, or every trial failed in the same way."""
    for trial in trials:
        if trial.role == "baseline" and trial.verdict != "safe":
            return trial.reason
    broken = [trial for trial in trials if trial.role != "baseline"]
    if broken and all(trial.verdict in ("bad_setup", "error") for trial in broken):
        return broken[0].reason
    return ""


def _unfinished(folder: StudyFolder) -> set[str]:
    started = {event["trial_id"] for event in folder.events() if event.get("event") == "trial"}
    return started - {trial.trial_id for trial in folder.trials()}


def _as_error(trials: list[TrialSummary], reason: str) -> Exception:
    verdict = next(trial.verdict for trial in trials if trial.reason == reason)
    return BadSetup(reason) if verdict == "bad_setup" else UserError(reason)
