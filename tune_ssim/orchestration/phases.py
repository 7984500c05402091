"""The phases of a study: before launch, baseline and search, confirm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from tune_ssim.base.errors import ENVIRONMENT, BadSetup, StudyInterrupted, UserError
from tune_ssim.base.extras import is_installed
from tune_ssim.base.files import check_name, describe_disk, write_atomically
from tune_ssim.guards import Baseline, BaselineRun
from tune_ssim.guards.baseline_log import baseline_of_log, describe, require_steps
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.orchestration.before_launch import can_draw, check_before_launch, norm_model
from tune_ssim.orchestration.executor import Executor, Phase
from tune_ssim.orchestration.in_process import InProcessExecutor
from tune_ssim.orchestration.progress import NoProgress, Progress
from tune_ssim.orchestration.recorder import StudyRecorder
from tune_ssim.orchestration.stops import stops_as_ctrl_c
from tune_ssim.report.pareto_picture import draw_front
from tune_ssim.report.study_page import PAGE, write_page
from tune_ssim.results.events import EventWriter, ended_trials
from tune_ssim.results.intervals import MIN_RUNS
from tune_ssim.results.pareto import pareto_front
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.study_lock import LOCK_FILE, StudyLock
from tune_ssim.results.trial_text import format_setting
from tune_ssim.results.winner import ranked
from tune_ssim.search.baseline_first import BaselineFirst
from tune_ssim.search.confirm import PREFIX, ConfirmSearch, confirm_seeds, confirm_steps, for_longer
from tune_ssim.search.demonstrations import WithDemonstrations
from tune_ssim.search.guided import GuidedSearch
from tune_ssim.search.optuna_search import DEFAULT_LATIN_POINTS, OptunaSearch
from tune_ssim.search.search import Outcome, Search
from tune_ssim.search.staged import StagedSearch
from tune_ssim.study.sections import BaselineLog
from tune_ssim.study.study import Study, load_study
from tune_ssim.tracking.mirror import MLflowMirror
from tune_ssim.trials.final_verdict import TrialPlan, harm_of
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.summary import TrialSummary
from tune_ssim.trials.trial_run import TrialSpec

SEARCH, CONFIRM = "run", "confirm"  # names of phases and of their folders in the study's `ray/`
FREE_ON_RESUME = ("name", "resources", "tracking", "import_path", "report_every", "result_every", "checkpoint_every", "confirm")
FRONT_PICTURE = "pareto.png"
ENDED_EARLY = 0.9  # fraction of the steps: a baseline whose last record is earlier ended by itself
DRAIN_TIMEOUT_S = 120.0  # for MLflow to catch up after the last trial; the rest is mirrored later
UNREACHED_TIMEOUT_S = 10.0  # the same, if it accepted no event during the study


def run_study(
    study: Study,
    *,
    storage: Path,
    name: str | None = None,
    address: str | None = None,
    resume: bool = False,
    tracking_uri: str | None = None,
    in_process: bool = False,
    progress: Progress | None = None,
) -> StudyFolder:
    """Runs or resumes `study` and returns its folder.

    storage: the storage path, for all studies and MLflow's default SQLite store. On several nodes it must be shared.
    name: replaces the study's own; a name that is taken gets a suffix, unless `resume`. address: of a Ray cluster; None starts
    a local one. in_process: without Ray, trial by trial in this process. Raises UserError, also if another process runs this study;
    BadSetup if the baseline fails; StudyInterrupted if the study was stopped."""
    folder = _folder(study, storage, name, resume)
    load_task(study.task_path, study.import_path)  # a misspelt task fails before Ray starts
    folder.create()
    if resume:
        _require_same_study(study, load_study(folder.study_file), folder)
    try:
        _run_in(folder, study, address, tracking_uri, in_process, progress or NoProgress())
    except KeyboardInterrupt:
        if not folder.study_file.exists():
            raise
        raise StudyInterrupted(folder.name) from None
    except OSError as error:
        if error.errno not in ENVIRONMENT:
            raise
        again = f"`tune-ssim run --resume --name {folder.name}` goes on" if folder.study_file.exists() else "start the study again"
        place = f"{error.filename or folder.path}: {error.strerror} ({describe_disk(folder.path)})"
        raise UserError(f"{place}; finished trials are kept; once this is fixed, {again}") from error
    return folder


def _run_in(
    folder: StudyFolder, study: Study, address: str | None, tracking_uri: str | None, in_process: bool, progress: Progress
) -> None:
    with StudyLock(folder.path) as lock, make_executor(study, address, in_process) as executor, stops_as_ctrl_c():
        if address is not None:
            from tune_ssim.orchestration.doctor import require_fit

            uri = tracking_uri or (study.tracking.uri if study.tracking is not None else None)
            for line in require_fit(study, folder.path.parent, uri):
                progress.say(f"warning: {line}")
        # Also on resume: more trials, or other resources, belong to what the study is now.
        write_atomically(folder.study_file, study.to_yaml().encode())
        run = StudyRun(study, EventWriter(folder, lock.require_held), executor, progress)
        run.writer.study_started(folder.name, study.sha256)
        run.writer.file("study.yaml")
        mirror = None
        if study.tracking is not None:
            mirror = MLflowMirror(folder, tracking_uri or study.tracking.uri)
            mirror.start()
        problem = ""
        try:
            problem = run.phases()
        except (BadSetup, UserError) as error:
            problem = str(error)
            raise
        except KeyboardInterrupt:
            problem = f"interrupted; `tune-ssim run --resume --name {folder.name}` goes on"
            raise
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
            raise
        finally:
            if not lock.is_lost:
                for path in sorted((folder.path / "baseline").glob("*.json")):
                    run.writer.file(f"baseline/{path.name}", "baseline")
                run.write_report(problem or "done")
                run.writer.study_ended(problem or "done")
            if mirror is not None:
                _drain(mirror, folder, progress)


def make_executor(study: Study, address: str | None, in_process: bool) -> Executor:
    if in_process:
        return InProcessExecutor()
    from tune_ssim.orchestration.ray_executor import RayExecutor

    return RayExecutor(study, address)


class StudyRun:
    """One start of a study. A resumed study goes through all its phases again. Trials that have ended are replayed to the search
    instead of run, so that a study can be resumed after a stop at any moment of any phase."""

    def __init__(self, study: Study, writer: EventWriter, executor: Executor, progress: Progress) -> None:
        self.study, self.writer, self.folder, self.executor, self.progress = study, writer, writer.folder, executor, progress
        self.concurrency = executor.concurrency(study)

    def phases(self) -> str:
        """Runs all phases. Returns why the study ended early, if it did. Raises BadSetup or UserError if it failed as a whole."""
        study = self.study
        self.progress.say(self.executor.describe())
        self._restore_trials()
        for warning in study.warnings:
            self.progress.say(f"warning: {warning}")
        check_before_launch(study, self.folder, self.writer, self.progress, self.executor)
        at_a_time = 1 if self.executor.is_sequential else self.concurrency
        self.progress.phase(f"{self.folder.name}: {describe_plan(study.baseline_seeds, study.search.trials, at_a_time)}")
        failure = self.search()
        self._require_sound(lambda trial: not trial.trial_id.startswith(PREFIX))
        if failure:
            raise UserError(f"{failure}; the search ended before its other trials (--resume goes on with them)")
        self.confirm()
        self._require_sound(lambda trial: True)
        return ""

    def _restore_trials(self) -> None:
        """Lines of `trials.jsonl` that are lost, such as after a power failure, are taken from the events."""
        present = {trial.trial_id for trial in self.folder.trials()}
        try:
            lost = [trial for trial in ended_trials(self.folder) if trial.trial_id not in present]
        except UserError as error:
            self.progress.say(f"warning: {error}; MLflow and the report lack what is not readable there")
            return
        for trial in lost:
            self.folder.add_trial(trial)
        if lost:
            names = ", ".join(dict.fromkeys(trial.trial_id for trial in lost))
            self.progress.say(f"warning: {self.folder.trials_file} lacked {names}, restored from {self.folder.events_file.name}")

    def search(self) -> str:
        """Runs baseline and search. Returns the failure that ended it before its last trial; empty if none."""
        study = self.study
        previous = self._previous(Role.SEARCH, study.steps)
        seeds = [study.search.seed + index for index in range(study.baseline_seeds)]
        baseline, runs = None, {}
        if (log := study.baseline.log) is not None:
            baseline, seeds = self._baseline_of_log(log), [study.search.seed]
            if study.steps is not None:
                require_steps(baseline, log.file, study.steps)
            self.progress.say(describe(baseline, log.file))
        else:
            runs = self._baseline_runs([f"baseline-{index}" for index in range(len(seeds))])
        search: BaselineFirst

        def noise_floor() -> float:
            """The smallest useful improvement, or the difference between the baseline's seeds if that is larger."""
            file = search.baseline_file
            found = file.read().noise_floor(study.objective.metric) if file else None
            return max(found or 0.0, study.objective.min_improvement or 0.0)

        inner, demonstrations = self._make_search(noise_floor), study.demonstrations
        n_trials = study.search.trials + len(demonstrations)
        if demonstrations:
            inner = WithDemonstrations(inner, demonstrations)
        search = self._baseline_first(inner, seeds, baseline=baseline, runs=runs, previous=previous, max_trials=n_trials)
        self.progress.expect(n_trials + study.baseline_seeds, len(previous) + len(runs))
        self._run(SEARCH, search, study.steps, study.guard_list, with_scheduler=True)
        for skipped in self.folder.skipped():
            self.progress.say(f"not launched: {format_setting(skipped.config)}: {skipped.sentence}")
        if search.end_reason:
            self.progress.say(f"the search ended early: {search.end_reason}")
        self._draw_front()
        return search.failure

    def write_report(self, end: str) -> None:
        """Also of a study that was stopped, if a trial has ended."""
        if not all(map(is_installed, ("jinja2", "matplotlib", "PIL"))):
            return
        try:
            if not self.folder.trials():
                return
            write_page(self.folder, end=end)
        except Exception as error:  # the study is done, and its result does not depend on a page about it
            self.progress.say(f"{PAGE} was not written: {error}; `tune-ssim report {self.folder.name}` tries again")
        else:
            self.writer.file(PAGE)

    def _draw_front(self) -> None:
        trials, objective = self.folder.trials(), self.study.objective
        front = pareto_front(trials, objective)
        if front and can_draw(FRONT_PICTURE, self.progress):
            write_atomically(self.folder.path / FRONT_PICTURE, draw_front(trials, front, objective, self.folder.name))
            self.writer.file(FRONT_PICTURE)

    def _baseline_of_log(self, log: BaselineLog) -> Baseline:
        """Raises UserError if the log lacks what the objective compares with."""
        objective = self.study.objective
        found = baseline_of_log(log.file, also=objective.metric, **log.model_dump(exclude={"file"}))
        (run,) = found.runs
        logged = list(run.series.get(objective.metric, {}).values())
        evaluation = objective.measure(run.evaluation, objective.remember(logged) if logged else [])
        problem = objective.problem(evaluation, logged, [])
        if problem and objective.is_delta:
            raise UserError(f"{problem}; say it in baseline.log: {{file: {log.file}, held_out: {{{objective.metric}: ...}}}}")
        return Baseline((replace(run, evaluation=evaluation),))

    def _make_search(self, noise_floor: Callable[[], float]) -> Search:
        study = self.study
        model, limit, max_ratio = norm_model(self.folder)
        options: dict[str, Any] = {
            "model": model,
            "limit": limit,
            "max_ratio": max_ratio,
            "skip_log": self.folder.skipped_file,
            "also": study.objective.also,
            "seed": study.search.seed,
            "concurrency": self.concurrency,
            "deterministic": study.search.deterministic and study.scheduler is None,
            "sampler": optuna.samplers.RandomSampler(seed=study.search.seed) if study.strategy == "random" else None,
        }
        if len(study.space.stages) > 1:
            return StagedSearch(study.space, study.search.trials, objective=study.objective, noise_floor=noise_floor, **options)
        stage = study.space.stages[0]
        if study.strategy == "guided":
            assert model is not None, "a guided study calibrates"
            return GuidedSearch(
                stage,
                model,
                start=study.baseline_settings,
                noise_floor=noise_floor,
                max_ratio=max_ratio,
                is_parallel=self.concurrency > 2,
            )
        n_latin = min(DEFAULT_LATIN_POINTS, max(0, study.search.trials - len(stage.points)))
        return OptunaSearch(stage, n_latin=n_latin, direction=study.objective.direction, **options)

    def confirm(self) -> None:
        """Repeats the finalists and the baseline with new seeds and more steps."""
        if self.study.confirm is None:
            return
        trials = self.folder.trials()
        finalists = ranked(trials, self.study.objective)[: self.study.confirm.finalists]
        if not finalists:
            return
        seeds, steps = confirm_seeds(self.study), confirm_steps(self.study)
        reached = max((trial.steps for trial in trials if trial.role is Role.BASELINE), default=0)
        length = describe_length(None if reached < ENDED_EARLY * (self.study.steps or 0) else steps)
        words = f"the baseline and up to {len(finalists)} finalists, {len(seeds)} new seeds, {length}"
        self.progress.phase(f"confirm: {words}")
        self.confirm_settings([(trial.trial_id, trial.settings) for trial in finalists], seeds, steps)

    def confirm_settings(
        self,
        finalists: Sequence[tuple[str, Mapping[str, Any]]],
        seeds: Sequence[int],
        steps: int | None,
        decide_after: int = MIN_RUNS,
    ) -> None:
        """decide_after: see `ConfirmSearch`."""
        settings = [(name, {key: value for key, value in setting.items() if value is not None}) for name, setting in finalists]
        previous = self._previous(Role.CONFIRM, steps)
        runs = self._baseline_runs([f"{PREFIX}baseline-{index}" for index in range(len(seeds))])
        self.progress.expect(None, len(previous) + len(runs))  # the number of finalists to test is unknown
        confirm = ConfirmSearch(settings, seeds, self.study.objective.min_improvement, decide_after)
        search = self._baseline_first(confirm, seeds[:decide_after], runs=runs, previous=previous, prefix=PREFIX)
        self._run(CONFIRM, search, steps, for_longer(self.study.guard_list, steps))

    def _baseline_first(self, search: Search, seeds: Sequence[int], **options: Any) -> BaselineFirst:
        return BaselineFirst(
            search,
            self.study.baseline_settings,
            folder=self.folder.path / "baseline",
            seeds=seeds,
            storage=self.folder.path.parent,
            study=self.folder.name,
            **options,
        )

    def _run(
        self, name: str, search: BaselineFirst, steps: int | None, guards: Sequence[Any], *, with_scheduler: bool = False
    ) -> None:
        """Runs a phase, or the rest of it. Raises KeyboardInterrupt if it was stopped."""
        study = self.study
        asha = study.scheduler if with_scheduler else None
        plan = TrialPlan(
            steps=steps,
            guards=tuple(guards),
            keep=study.objective.rules,
            objective=study.objective,
            requires_objective=True,
            evaluate_at=(steps // 2,) if with_scheduler and study.strategy == "guided" and steps is not None and steps > 1 else (),
            report_every=study.report_every,
        )
        spec = TrialSpec(
            study.task_path,
            plan,
            study.task_config if steps is None else {**study.task_config, "steps": steps},
            study.result_every,
            study.checkpoint_every,
            asha.grace_steps if asha else None,
            study.import_path,
            None if name != SEARCH else Role.SEARCH if study.baseline.log is not None else Role.BASELINE,
        )
        recorder = StudyRecorder(self.writer, self.progress, steps, study.objective)
        self.executor.run(Phase(name, spec, self.concurrency, asha), search, recorder)
        if recorder.unfinished and not (search.failure or recorder.has_failed_baseline):
            # Ray handles Ctrl-C itself, saves its state and returns normally.
            raise KeyboardInterrupt(f"{len(recorder.unfinished)} trials were still running")

    def _previous(self, role: Role, steps: int | None) -> dict[str, Outcome]:
        """Outcomes of trials from earlier starts. A trial whose process died has none and runs again."""
        trials = self.folder.trials()
        if steps is None:  # as long as the baseline
            prefix = PREFIX if role is Role.CONFIRM else "baseline"
            lengths = (trial.steps for trial in trials if trial.role is Role.BASELINE and trial.trial_id.startswith(prefix))
            steps = max(lengths, default=None)
        return {
            trial.trial_id: Outcome.of(trial, harm_of(trial.verdict, trial.evidence, trial.steps, steps))
            for trial in trials
            if trial.role == role and not trial.is_repeated_on_resume
        }

    def _baseline_runs(self, names: Sequence[str]) -> dict[str, BaselineRun]:
        """Baseline runs from earlier starts, by trial id. A damaged one is reported and runs again."""
        found: dict[str, BaselineRun] = {}
        for path in sorted((self.folder.path / "baseline").rglob("*.json")):
            try:
                baseline = Baseline.read(path, path.stem)
            except UserError as error:
                self.progress.say(f"{path}: damaged, the baseline in it runs again ({error})")
                continue
            found |= {run.trial_id: run for run in baseline.runs if run.trial_id in names}
        safe = {trial.trial_id for trial in self.folder.trials() if trial.verdict == Verdict.SAFE}
        for name in names:
            if name in safe and name not in found:
                self.progress.say(f"{name} runs again: no file in {self.folder.path / 'baseline'} has its curves")
        return {name: run for name, run in found.items() if name in safe}

    def _require_sound(self, of_phases_so_far: Callable[[TrialSummary], bool]) -> None:
        """Raises if the study failed as a whole: its baseline failed, or every trial failed in the same way. A later phase that
        failed in an earlier start is run again."""
        trials = [trial for trial in self.folder.trials() if of_phases_so_far(trial)]
        failed = next((trial for trial in trials if trial.role == Role.BASELINE and trial.verdict != Verdict.SAFE), None)
        others = [trial for trial in trials if trial.role != Role.BASELINE]
        if failed is None and others and all(trial.verdict in (Verdict.BAD_SETUP, Verdict.ERROR) for trial in others):
            failed = others[0]
        if failed is not None:
            raise (BadSetup if failed.verdict == Verdict.BAD_SETUP else UserError)(failed.reason)


def describe_plan(baselines: int, trials: int, concurrency: int) -> str:
    counts = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in ((baselines, "baseline"), (trials, "trial"))]
    return f"{counts[0]}, then {counts[1]}, {concurrency} at a time"


def describe_length(steps: int | None) -> str:
    return "until the command ends by itself" if steps is None else f"{steps} steps"


def inspect_on(study: Study, *, address: str, **phases: Any) -> dict[str, Any]:
    """Preflight, calibration or provenance, run on a cluster, for the verbs that inspect a study before launch."""
    with make_executor(study, address, in_process=False) as executor:
        return executor.inspect(study, **phases)


def _folder(study: Study, storage: Path, name: str | None, resume: bool) -> StudyFolder:
    wanted = check_name(name or study.name)
    path = storage / wanted
    if resume:
        if not (path / "study.yaml").exists():
            raise UserError(f"--resume: no study {wanted!r} that was started in {storage}")
        return StudyFolder(path)
    number = 2
    while _is_taken(path):
        path = storage / f"{wanted}-{number}"
        number += 1
    return StudyFolder(path)


def _require_same_study(study: Study, before: Study, folder: StudyFolder) -> None:
    """Raises UserError, naming the keys, for a study that would not have made the trials that are there: its proof would describe
    another study than the one that was run."""
    now, then = _without_free_keys(study), _without_free_keys(before)
    if changed := sorted(key for key in {*now, *then} if now.get(key) != then.get(key)):
        raise UserError(
            f"--resume: {folder.study_file}: the study was started with another {', '.join(changed)}; resume it without STUDY and "
            "options, or start a new study with --name"
        )


def _without_free_keys(study: Study) -> dict[str, Any]:
    """What a study's trials depend on. How many they are, where they run and how they are watched may change on resume."""
    found = {key: value for key, value in study.to_dict().items() if key not in FREE_ON_RESUME}
    return found | {"search": {key: value for key, value in found["search"].items() if key not in ("trials", "concurrency")}}


def _is_taken(path: Path) -> bool:
    """Whether the study exists: a start killed before it wrote study.yaml does not count."""
    if not path.exists():
        return False
    if not path.is_dir():
        return True
    for entry in path.iterdir():
        is_leftover = entry.name.startswith(".") or entry.name == LOCK_FILE or (entry.is_dir() and not any(entry.iterdir()))
        if not is_leftover:
            return True
    return False


def _drain(mirror: MLflowMirror, folder: StudyFolder, progress: Progress) -> None:
    if not mirror.drain(DRAIN_TIMEOUT_S, unreached_timeout_s=UNREACHED_TIMEOUT_S):
        progress.say(f"MLflow: {mirror.status()}; nothing is lost, `tune-ssim mirror {folder.name}` goes on when it is there")
