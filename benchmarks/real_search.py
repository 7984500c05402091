"""Guided search against stock Ray Tune for real: same task, same wall time, two workers; picks measured again on fresh seeds.

    python benchmarks/real_search.py [--seeds 5] [--crop 32] [--fresh 2] [--output benchmarks/results/real_search.json]

For each seed: a guided study on Ray as a user runs it, without preflight and confirm phase, from its start to its
pick. Then stock Ray Tune (ASHA and Optuna's TPE, as in benchmarks/replay) for the same wall time: gains 0.1 to 1000 log-uniform and
max_t of 0.1, 0.3 and 1; held-out SSIM at the rungs 25, 75 and 200; pick: the best last result. Both picks are then trained anew on
`--fresh` seeds that neither has seen, in pairs with the baseline: the truth. Appends to the output, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "0")

import ray
import torch
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console
from rich.table import Table
from ssim import save

from tune_ssim.guards.verdict import Role
from tune_ssim.orchestration.phases import run_study
from tune_ssim.results.winner import NoSafeTrial, best_safe
from tune_ssim.study.space import GRAD_SCALE, MAX_T, WEIGHT
from tune_ssim.study.study import load_study
from tune_ssim.tasks.fundus_sr import FundusSR

STEPS, RUNGS, WORKERS = 200, (25, 75, 200), 2
BASELINE = {"pixel_loss_weight": 0.05, "pixel_loss_max_t": 0.3}
FIRST_FRESH_SEED = 1000
RUINED = {"ssim": 0.03, "psnr": 3.0}  # below the baseline, as in benchmarks/replay/truth.py


def task_config(crop: int) -> dict[str, Any]:
    return {"preset": "sgd", "steps": STEPS, "crop": crop}


def setting(gain: float, max_t: float) -> dict[str, Any]:
    return {WEIGHT: gain, MAX_T: max_t, GRAD_SCALE: 1.0, "pixel_loss_weight": 0.0}


def evaluated(crop: int, settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Held-out metrics of a training from scratch."""
    torch.set_num_threads(1)
    training = FundusSR()
    training.setup({**task_config(crop), **settings}, seed)
    for _ in range(STEPS):
        training.step()
    return {name: float(value) for name, value in training.evaluate().items() if name in RUINED}


def guided(seed: int, crop: int) -> dict[str, Any]:
    study = load_study(
        {
            "name": "guided",
            "task": "fundus_sr",
            "task_config": task_config(crop),
            "baseline": {**BASELINE, "seeds": 1},
            "space": "wide",
            "search": {"strategy": "guided", "trials": 12, "seed": seed, "concurrency": WORKERS},
            "preflight": None,
            "confirm": None,
        }
    )
    with tempfile.TemporaryDirectory() as storage:
        began_s = time.perf_counter()
        folder = run_study(study, storage=Path(storage))
        wall_s = time.perf_counter() - began_s
        trials = folder.trials()
        try:
            best = best_safe(folder).config
            pick = {"gain": best[WEIGHT] * best[GRAD_SCALE], "max_t": best[MAX_T]}
        except NoSafeTrial:
            pick = None
        steps = sum(trial.steps for trial in trials)
        return {"pick": pick, "steps": steps, "trials": sum(one.role is Role.SEARCH for one in trials), "wall_s": round(wall_s, 1)}


def stock_trial(config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    training = FundusSR()
    training.setup({**task_config(config["crop"]), **setting(config["gain"], config["max_t"])}, config["seed"])
    for step in range(1, STEPS + 1):
        training.step()
        if step in RUNGS:
            tune.report({"step": step, "ssim": float(training.evaluate()["ssim"])})


def stock(seed: int, crop: int, budget_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as storage:
        began_s = time.perf_counter()
        ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            left_s = budget_s - (time.perf_counter() - began_s)  # starting Ray is part of both times
            space = {"gain": tune.loguniform(0.1, 1000), "max_t": tune.choice([0.1, 0.3, 1.0]), "crop": crop, "seed": seed}
            tuner = tune.Tuner(
                tune.with_resources(stock_trial, {"cpu": 1}),
                param_space=space,
                tune_config=tune.TuneConfig(
                    metric="ssim",
                    mode="max",
                    num_samples=32,
                    max_concurrent_trials=WORKERS,
                    time_budget_s=left_s,
                    search_alg=OptunaSearch(seed=seed),
                    scheduler=AsyncHyperBandScheduler(time_attr="step", max_t=STEPS, grace_period=25, reduction_factor=3),
                ),
                run_config=tune.RunConfig(storage_path=storage, verbose=0),
            )
            results = [result for result in tuner.fit() if result.metrics and "ssim" in result.metrics]
        finally:
            ray.shutdown()
        wall_s = time.perf_counter() - began_s
        best = max(results, key=lambda result: result.metrics["ssim"], default=None)
        pick = best and {"gain": best.metrics["config"]["gain"], "max_t": best.metrics["config"]["max_t"]}
        steps = sum(result.metrics["step"] for result in results)
        trained = best and best.metrics["step"]
        return {"pick": pick, "trained": trained, "steps": steps, "trials": len(results), "wall_s": round(wall_s, 1)}


def truths(seed: int, crop: int, picks: dict[str, dict[str, float] | None], fresh: int) -> dict[str, Any]:
    """Improvements of the picks over the baseline on fresh seeds. No pick keeps the baseline: an improvement of zero."""
    seeds = [FIRST_FRESH_SEED + 100 * seed + index for index in range(fresh)]
    runs = {"baseline": BASELINE} | {name: setting(**pick) for name, pick in picks.items() if pick}
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        futures = {(name, one): pool.submit(evaluated, crop, settings, one) for name, settings in runs.items() for one in seeds}
        found = {key: future.result() for key, future in futures.items()}
    result = {}
    for name in picks:
        runs_of = [found.get((name, one), found["baseline", one]) for one in seeds]
        deltas = {
            metric: [run[metric] - found["baseline", one][metric] for run, one in zip(runs_of, seeds, strict=True)]
            for metric in RUINED
        }
        mean = {metric: statistics.fmean(values) for metric, values in deltas.items()}
        ruined = any(mean[metric] < -by for metric, by in RUINED.items())
        result[name] = {"delta_ssim": deltas["ssim"], "delta_psnr": deltas["psnr"], "ruined": ruined}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--crop", type=int, default=32)
    parser.add_argument("--fresh", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "real_search.json")
    arguments = parser.parse_args()
    output: Path = arguments.output
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"] if output.exists() else []
    for seed in range(arguments.seeds):
        if any(row["seed"] == seed for row in rows):
            continue
        row: dict[str, Any] = {"seed": seed, "crop": arguments.crop, "guided": guided(seed, arguments.crop)}
        row["stock"] = stock(seed, arguments.crop, row["guided"]["wall_s"])
        picks = {name: row[name]["pick"] for name in ("guided", "stock")}
        for name, truth in truths(seed, arguments.crop, picks, arguments.fresh).items():
            row[name] |= truth
        rows.append(row)
        save(output, {"workers": WORKERS, "steps": STEPS, "fresh_seeds": arguments.fresh, "rows": rows})
        print(f"seed {seed}:", json.dumps({name: row[name] for name in picks}), flush=True)
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("", "seeds", "steps", "trials", "wall s", "no pick", "ΔSSIM on fresh seeds", "ΔPSNR dB", "ruined")
    for name in ("guided", "stock"):
        found = [row[name] for row in rows]
        ssim, psnr = ([statistics.fmean(one[key]) for one in found] for key in ("delta_ssim", "delta_psnr"))
        table.add_row(
            name,
            str(len(found)),
            *(f"{statistics.median(one[key] for one in found):.0f}" for key in ("steps", "trials", "wall_s")),
            str(sum(one["pick"] is None for one in found)),
            f"{statistics.fmean(ssim):+.4f} ({min(ssim):+.4f} to {max(ssim):+.4f})",
            f"{statistics.fmean(psnr):+.2f} ({min(psnr):+.2f} to {max(psnr):+.2f})",
            str(sum(one["ruined"] for one in found)),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
