"""How many training steps a second two slots do in a search: a bare loop, tune_ssim on Ray, and stock Ray Tune with MLflow.

    python benchmarks/throughput.py [--trials 6] [--steps 200] [--rounds 3] [--output benchmarks/results/throughput.json]

All train the bundled task with the same settings and seed, in two processes side by side with one thread each:
  bare          set-up and steps, and one evaluation at the end of each trial; no Ray, no MLflow, no guard
  bare, tested  the same with the samples and their statistics at the smoke test's steps
  tune_ssim     `run_study` on Ray with the default guards, MLflow in SQLite, every step recorded
  stock         `ray.tune.Tuner` with `MLflowLoggerCallback` in SQLite, a report every step, one evaluation at the end of each trial

Steps of all trials over the time from the first trial's start to the last one's end. The four go in turn, in each round; shares are
medians over the rounds. Starting Ray, baseline and calibration are outside.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "0")

import ray
import torch
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from rich.console import Console
from rich.table import Table
from ssim import save

from tune_ssim.guards import SmokeTest
from tune_ssim.orchestration.phases import run_study
from tune_ssim.study.space import GRAD_SCALE, MAX_T, WEIGHT
from tune_ssim.study.study import Study, load_study
from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.trials.sample_check import statistics_of

SLOTS = 2
GAINS = (4.0, 6.0, 8.0, 10.0, 12.0, 14.0)  # safe with this task, so that every trial runs to its end


def setting(gain: float) -> dict[str, Any]:
    return {WEIGHT: gain, MAX_T: 1.0, GRAD_SCALE: 1.0}


def gains(trials: int) -> list[float]:
    return [GAINS[index % len(GAINS)] for index in range(trials)]


def train(gain: float, steps: int, report: Callable[[Mapping[str, Any]], None], smoke_steps: tuple[int, ...]) -> None:
    """One trial. report: is given every step's numbers, and the evaluation at the end."""
    training = FundusSR()
    training.setup({"preset": "sgd", "steps": steps, **setting(gain), "pixel_loss_weight": 0}, 0)
    for step in range(1, steps + 1):
        numbers = {name: float(value) for name, value in training.step().items()}
        if step in smoke_steps:
            statistics_of(training.sample(0))
        report(numbers if step < steps else numbers | dict(training.evaluate()))
    training.close()


def bare(trials: int, steps: int, smoke_steps: tuple[int, ...]) -> float:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(SLOTS)
    times = context.Queue()
    shares = [gains(trials)[slot::SLOTS] for slot in range(SLOTS)]
    workers = [context.Process(target=bare_worker, args=(share, steps, smoke_steps, barrier, times)) for share in shares]
    for worker in workers:
        worker.start()
    spans = [times.get() for _ in workers]
    for worker in workers:
        worker.join()
    return trials * steps / (max(end for _, end in spans) - min(start for start, _ in spans))


def bare_worker(share: list[float], steps: int, smoke_steps: tuple[int, ...], barrier: Any, times: Any) -> None:
    torch.set_num_threads(1)
    barrier.wait()  # libraries are loaded by now
    start = time.time()
    for gain in share:
        train(gain, steps, lambda numbers: None, smoke_steps)
    times.put((start, time.time()))


def study_of(trials: int, steps: int) -> Study:
    names = ("preflight", "calibration", "confirm")
    points = [setting(gain) for gain in gains(trials)]
    space = {
        "name": "fixed",
        "parameters": {"gain": {"log_uniform": [1, 100]}},
        "fixed": {MAX_T: 1.0, GRAD_SCALE: 1.0},
        "points": points,
    }
    return load_study(
        {
            "name": "throughput",
            "task": "fundus_sr",
            "task_config": {"preset": "sgd", "steps": steps},
            "space": space,
            "search": {"strategy": "random", "trials": trials, "concurrency": SLOTS},
            **dict.fromkeys(names),
        }
    )


def product(trials: int, steps: int) -> float:
    with tempfile.TemporaryDirectory() as storage:
        folder = run_study(study_of(trials, steps), storage=Path(storage))
        events = list(folder.events())
        starts = [event["time_ms"] for event in events if event["event"] == "trial" and event["trial_id"].startswith("trial-")]
        ends = [event["time_ms"] for event in events if event["event"] == "verdict" and event["trial_id"].startswith("trial-")]
        done = sum(trial.steps for trial in folder.trials() if trial.trial_id.startswith("trial-"))
        return 1000 * done / (max(ends) - min(starts))


def stock_trial(config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    began = time.time()
    train(config["gain"], config["steps"], lambda numbers: tune.report({**numbers, "began": began, "at": time.time()}), ())


def stock(trials: int, steps: int) -> float:
    with tempfile.TemporaryDirectory() as storage:
        ray.init(num_cpus=SLOTS, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            tuner = tune.Tuner(
                tune.with_resources(stock_trial, {"cpu": 1}),
                param_space={"gain": tune.grid_search(gains(trials)), "steps": steps},
                tune_config=tune.TuneConfig(max_concurrent_trials=SLOTS),
                run_config=tune.RunConfig(
                    storage_path=storage,
                    verbose=0,
                    callbacks=[MLflowLoggerCallback(f"sqlite:///{storage}/mlflow.db", experiment_name="stock")],
                ),
            )
            results = [result.metrics for result in tuner.fit()]
        finally:
            ray.shutdown()
    done = sum(result["training_iteration"] for result in results)
    return float(done / (max(result["at"] for result in results) - min(result["began"] for result in results)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "throughput.json")
    arguments = parser.parse_args()
    of = (arguments.trials, arguments.steps)
    smoke_steps = tuple(step for step in (*SmokeTest().at, arguments.steps) if step)
    ways: dict[str, Callable[[], float]] = {
        "bare": partial(bare, *of, ()),
        "bare, tested": partial(bare, *of, smoke_steps),
        "tune_ssim": partial(product, *of),
        "stock": partial(stock, *of),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(arguments.rounds):
        for name, way in ways.items():
            rates[name].append(way())
            print(f"round {round_ + 1}: {name} {rates[name][-1]:.1f} steps/s", flush=True)
    table = Table("", "steps/s", "share of bare", "share of bare, tested")
    rows = {}
    for name, found in rates.items():
        shares = {of: statistics.median(a / b for a, b in zip(found, rates[of], strict=True)) for of in ("bare", "bare, tested")}
        rows[name] = {"steps_per_s": statistics.median(found), "rounds": found, "share_of": shares}
        table.add_row(name, f"{rows[name]['steps_per_s']:.1f}", *(f"{100 * share:.0f} %" for share in shares.values()))
    Console(width=100).print(table)
    save(arguments.output, {"slots": SLOTS, "trials": arguments.trials, "steps": arguments.steps, "rows": rows})


if __name__ == "__main__":
    main()
