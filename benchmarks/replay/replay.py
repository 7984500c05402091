"""Plays recorded curves through the real search, trials, guards and winner, and through Ray's own searchers and schedulers.

Time is counted in training steps of one worker. Samples and evaluations cost what the header says they cost.
"""

from __future__ import annotations

import heapq
import logging
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from curves import Curves, Run

from tune_ssim.base.files import jsonable, write_atomically
from tune_ssim.guards import NormRatio
from tune_ssim.guards.verdict import Action
from tune_ssim.orchestration.before_launch import write_json
from tune_ssim.orchestration.executor import JobSearch, Phase
from tune_ssim.orchestration.phases import StudyRun
from tune_ssim.orchestration.progress import NoProgress
from tune_ssim.orchestration.recorder import StudyRecorder
from tune_ssim.results.events import EventWriter
from tune_ssim.results.study_folder import CALIBRATION, StudyFolder
from tune_ssim.results.winner import NoSafeTrial, best_safe
from tune_ssim.search.search import Outcome
from tune_ssim.study.space import MAX_T, gain_of
from tune_ssim.study.study import Study, load_study
from tune_ssim.trials.job import TrialJob
from tune_ssim.trials.training import Sample, Training
from tune_ssim.trials.trial_run import TrialReport, TrialRun


@dataclass(frozen=True)
class Played:
    """A trial of a simulated search."""

    gain: float
    max_t: float
    steps: int
    role: str = "search"
    verdict: str = ""
    value: float = math.nan  # of the objective at the end


@dataclass
class Result:
    """A simulated search. pick: the setting it hands over. makespan, busy: in training steps. tuned: the steps of what the search
    itself spent, baselines included; calibration comes on top."""

    trials: list[Played]
    pick: Played | None
    why_none: str = ""
    end_reason: str = ""
    calibration: int = 0
    makespan: float = 0.0
    busy: float = 0.0
    confirm: list[Played] = field(default_factory=list)


class ReplayTraining(Training):
    """Replays the run that belongs to the configuration and seed."""

    def __init__(self, curves: Curves, snap: bool = False) -> None:
        self.curves, self.snap = curves, snap
        self.n_samples = self.n_evaluations = 0

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.config, self.n = dict(config), 0
        self.run: Run = self.curves.play(gain_of(config), float(config.get(MAX_T) or 1.0), seed, self.snap)
        self.rows = [(name, row.tolist()) for name, row in self.run.values["steps"].items()]

    def step(self) -> dict[str, float]:
        found = {name: row[self.n] for name, row in self.rows if not math.isnan(row[self.n])}
        self.n += 1
        return found

    def sample(self, noise: int = 0) -> Sample:
        """The recorded statistics of the nearest step at which samples were taken; `noise` 1 where it was recorded, else 0."""
        self.n_samples += 1
        steps = self.curves.steps_of("smoke")
        index = min(range(len(steps)), key=lambda i: (abs(steps[i] - self.n), -i))
        found = self.run.at("smoke_again", index) if noise else {}
        return Sample(torch.zeros(0, 3, 1, 1), statistics=found or self.run.at("smoke", index))

    def evaluate(self) -> dict[str, float]:
        """Between two recorded steps, interpolated."""
        self.n_evaluations += 1
        return evaluation_at(self.curves, self.run, self.n)

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]

    def effective(self) -> dict[str, Any]:
        recorded = self.curves.header["baseline_effective"]
        return {**recorded, **{name: value for name, value in self.config.items() if name in recorded}}


def evaluation_at(curves: Curves, run: Run, step: int) -> dict[str, float]:
    steps = curves.steps_of("evaluations")
    rows = run.values["evaluations"]
    found = {name: float(np.interp(step, steps, row)) for name, row in rows.items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}


# -- the simulated clock


class Running(Protocol):
    """A trial on the clock."""

    def advance(self) -> float:
        """Trains until there is something to tell. Returns the time it took, in training steps."""

    def tell(self) -> bool:
        """Tells it. Returns whether the trial has ended."""


def simulate(workers: int, start_next: Callable[[], Running | None], began: float = 0.0) -> tuple[float, float]:
    """Runs trials on `workers` until there are none left. start_next: None if there is none now; it is asked again after each tell.
    Returns the time of the end and the workers' busy time."""
    queue: list[tuple[float, int, Running]] = []
    now, busy, order = began, 0.0, 0

    def push(trial: Running) -> None:
        nonlocal busy, order
        took = trial.advance()
        busy, order = busy + took, order + 1
        heapq.heappush(queue, (now + took, order, trial))

    while True:
        while len(queue) < workers and (trial := start_next()) is not None:
            push(trial)
        if not queue:
            return now, busy
        now, _, trial = heapq.heappop(queue)
        if not trial.tell():
            push(trial)


# -- the product


class _ProductTrial:
    def __init__(self, job: TrialJob, run: TrialRun, costs: Costs, ended: Callable[[TrialReport], None]) -> None:
        self.job, self.run, self.costs, self.ended = job, run, costs, ended
        self.before = 0.0
        self.report = TrialReport()

    def advance(self) -> float:
        while True:
            self.report = self.run.advance()
            if self.report.result is not None or self.report.held_out is not None:
                break
        training = self.run.training
        assert isinstance(training, ReplayTraining)
        spent = self.costs.of(self.report.step, training)
        took, self.before = spent - self.before, spent
        return took

    def tell(self) -> bool:
        if self.report.result is None:
            return False
        self.run.close()
        self.ended(self.report)
        return True


@dataclass(frozen=True)
class Costs:
    """In training steps."""

    evaluation: float = 0.0
    sample: float = 0.0
    calibration: int = 0

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> Costs:
        costs = header.get("costs", {})
        calibration = header.get("calibration", {}).get("step_equivalents", 0)
        return cls(costs.get("evaluation", 0.0), costs.get("sample", 0.0), int(costs.get("calibration", calibration)))

    def of(self, steps: int, training: ReplayTraining) -> float:
        return steps + self.evaluation * training.n_evaluations + self.sample * training.n_samples


class ReplayExecutor:
    """An `orchestration.executor.Executor` on the simulated clock. Phases follow one another."""

    def __init__(self, curves: Curves, workers: int, snap: bool = False) -> None:
        self.curves, self.workers, self.snap = curves, workers, snap
        self.costs = Costs.of_header(curves.header)
        self.played: list[Played] = []
        self.now = self.busy = 0.0

    def describe(self) -> str:
        return f"recorded curves {self.curves.name}, {self.workers} at a time"

    def concurrency(self, study: Study) -> int:
        return self.workers

    def run(self, phase: Phase, search: JobSearch, recorder: StudyRecorder) -> None:
        spec = replace(phase.spec, plan=replace(phase.spec.plan, image_grids=False))

        def start_next() -> _ProductTrial | None:
            job = search.ask()
            if not isinstance(job, TrialJob):
                return None
            run = TrialRun(spec, job, partial(ReplayTraining, self.curves, self.snap))
            return _ProductTrial(job, run, self.costs, partial(ended, job))

        def ended(job: TrialJob, report: TrialReport) -> None:
            result = report.result
            assert result is not None
            summary = result.summary
            recorder.folder.add_trial(summary)
            self.played.append(
                Played(
                    summary.gain,
                    float(summary.config.get(MAX_T) or 1.0),
                    summary.steps,
                    summary.role.value,
                    summary.verdict.value,
                    summary.metric(summary.objective),
                )
            )
            search.tell(job.trial_id, Outcome.of(summary, result.harm, result.baseline))

        self.now, busy = simulate(self.workers, start_next, self.now)
        self.busy += busy

    def __enter__(self) -> ReplayExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def product_study(curves: Curves, changes: Mapping[str, Any], seed: int, workers: int, confirm: bool) -> Study:
    header = curves.header
    given = {
        "name": "replay",
        "task": header["task"],
        "task_config": header["task_config"],
        # Guided as in the bundled study; the others with the default of `baseline.seeds`.
        "baseline": {**header["baseline"], "seeds": 1 if changes.get("search", {}).get("strategy") == "guided" else 2},
        "preflight": None,
        "tracking": None,
        "confirm": {"finalists": 3, "seeds": 3, "steps": curves.steps} if confirm else None,
        **header.get("study_sections", {}),
        **changes,
    }
    return load_study({**given, "search": {"concurrency": workers, "seed": seed, **changes.get("search", {})}})


def run_product(
    curves: Curves, changes: Mapping[str, Any], seed: int, workers: int, *, snap: bool = False, confirm: bool = False
) -> Result:
    """A whole search of the product: its own phases, executed on the clock. changes: sections of the study."""
    study = product_study(curves, changes, seed, workers, confirm)
    with tempfile.TemporaryDirectory() as storage:
        folder = StudyFolder(Path(storage) / "replay").create()
        write_atomically(folder.study_file, study.to_yaml().encode())
        calibration = write_calibration(folder, curves, study)
        executor = ReplayExecutor(curves.of_search(seed), workers, snap)
        executor.now = float(calibration)
        run = StudyRun(study, EventWriter(folder), executor, _Progress())
        failure = run.search()
        n_search = len(executor.played)
        makespan, busy = executor.now, executor.busy + calibration
        try:
            best = best_safe(folder)
            pick, why_none = Played(best.gain, float(best.config[MAX_T]), best.steps, value=best.metric(best.objective)), ""
            if confirm:
                run.confirm()
                best = best_safe(folder)
                pick = Played(best.gain, float(best.config[MAX_T]), best.steps, value=best.metric(best.objective))
        except NoSafeTrial as error:
            pick, why_none = None, str(error)
    said = run.progress.said if isinstance(run.progress, _Progress) else []
    end = next((line for line in said if line.startswith("the search ended")), "")
    return Result(
        executor.played[:n_search],
        pick,
        failure or why_none,
        end,
        calibration,
        makespan,
        busy,
        executor.played[n_search:],
    )


class _Progress(NoProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def write_calibration(folder: StudyFolder, curves: Curves, study: Study) -> int:
    """The recorded calibration as the study's own. Returns its cost in training steps; 0 if the study does not calibrate."""
    if not study.calibrates:
        return 0
    guard, factor = study.guards.get(NormRatio.name), study.search.skip_beyond
    limit = guard.limit if isinstance(guard, NormRatio) else None
    clipped = curves.header["baseline_effective"].get("max_grad_norm") is not None
    prunes = isinstance(guard, NormRatio) and replace(guard, clipped=clipped).action is Action.PRUNE
    skip_above = factor * limit if limit is not None and factor is not None and prunes else None
    model = curves.header["calibration"]["model"]
    write_json(folder.path / CALIBRATION, jsonable({"model": model, "settings": [], "limit": limit, "skip_above": skip_above}))
    return Costs.of_header(curves.header).calibration


# -- stock Ray Tune

STOCK_TRIALS = 32
STOCK_GAINS = (0.1, 1000.0)  # a user's guess, as in FACTS §6
REPORT_EVERY = 25  # training steps between two results, as in FACTS §6
GRACE, REDUCTION = 25, 3  # FACTS §6


class _StockTrial:
    def __init__(self, stock: _Stock, trial_id: str, config: Mapping[str, Any]) -> None:
        self.stock, self.trial_id = stock, trial_id
        self.gain, self.max_t = float(config["gain"]), float(config["max_t"])
        self.run = stock.curves.play(self.gain, self.max_t, stock.seed, stock.snap)
        self.step = 0
        self.result: dict[str, Any] = {}

    def advance(self) -> float:
        before, self.step = self.step, min(self.step + REPORT_EVERY, self.stock.curves.steps)
        value = evaluation_at(self.stock.curves, self.run, self.step).get(self.stock.metric, math.nan)
        self.result = {"training_iteration": self.step, "step": self.step, self.stock.metric: value}
        return self.step - before + self.stock.costs.evaluation

    def tell(self) -> bool:
        return self.stock.told(self)


class _Stock:
    """Ray's own searcher and scheduler objects, called as Ray's controller calls them."""

    def __init__(self, curves: Curves, seed: int, metric: str, tpe: bool, asha: bool, trials: int, snap: bool) -> None:
        import optuna
        from ray.tune.schedulers import AsyncHyperBandScheduler
        from ray.tune.search.optuna import OptunaSearch

        for name in ("ray.tune", "ray.tune.search.optuna.optuna_search"):
            logging.getLogger(name).setLevel(logging.ERROR)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.curves, self.seed, self.metric, self.snap, self.left = curves, seed, metric, snap, trials
        self.costs = Costs.of_header(curves.header)
        distributions = {
            "gain": optuna.distributions.FloatDistribution(*STOCK_GAINS, log=True),
            "max_t": optuna.distributions.CategoricalDistribution(curves.max_ts),
        }
        sampler = optuna.samplers.TPESampler(seed=seed) if tpe else optuna.samplers.RandomSampler(seed=seed)
        self.searcher = OptunaSearch(space=distributions, metric=metric, mode="max", sampler=sampler)
        self.scheduler = (
            AsyncHyperBandScheduler(
                time_attr="step", metric=metric, mode="max", max_t=curves.steps, grace_period=GRACE, reduction_factor=REDUCTION
            )
            if asha
            else None
        )
        self.ended: list[_StockTrial] = []

    def start_next(self) -> _StockTrial | None:
        if not self.left:
            return None
        self.left -= 1
        trial = _StockTrial(self, f"{self.left:05d}", self.searcher.suggest(f"{self.left:05d}") or {})
        if self.scheduler:
            self.scheduler.on_trial_add(None, SimpleNamespace(trial_id=trial.trial_id))
        return trial

    def told(self, trial: _StockTrial) -> bool:
        done = trial.step >= self.curves.steps
        ray_trial = SimpleNamespace(trial_id=trial.trial_id)
        if done and self.scheduler:
            self.scheduler.on_trial_complete(None, ray_trial, trial.result)
        elif self.scheduler:
            done = self.scheduler.on_trial_result(None, ray_trial, trial.result) == "STOP"
        if done:
            self.searcher.on_trial_complete(trial.trial_id, trial.result)
            self.ended.append(trial)
        else:
            self.searcher.on_trial_result(trial.trial_id, trial.result)
        return done


def run_stock(
    curves: Curves, seed: int, workers: int, *, tpe: bool, asha: bool, trials: int = STOCK_TRIALS, snap: bool = False
) -> Result:
    """A search of stock Ray Tune. The pick is that of `ResultGrid.get_best_result`: the trial with the best last result."""
    np.random.seed(seed)
    metric = str(curves.header.get("metric", "ssim"))
    stock = _Stock(curves.of_search(seed), seed, metric, tpe, asha, trials, snap)
    makespan, busy = simulate(workers, stock.start_next)
    played = [Played(one.gain, one.max_t, one.step, value=one.result[metric]) for one in stock.ended]
    measured = [one for one in played if not math.isnan(one.value)]
    return Result(played, max(measured, key=lambda one: one.value, default=None), makespan=makespan, busy=busy)


# -- no search


def run_recommended(curves: Curves, ratio: float, max_t: float) -> Result:
    """No trial: the setting with a predicted norm ratio."""
    from tune_ssim.probes.norm_model import NormModel

    model = NormModel.from_dict(curves.header["calibration"]["model"])
    costs = Costs.of_header(curves.header)
    pick = Played(model.gain_for(ratio, max_t), max_t, 0)
    return Result([], pick, calibration=costs.calibration, makespan=costs.calibration, busy=costs.calibration)
