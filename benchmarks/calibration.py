"""Does calibration predict what training does? Bundled task, preset sgd, real runs.

    python benchmarks/calibration.py [--processes 2]

1. total_norm of real first steps against the prediction, for random settings, images and model sizes.
2. Readings of total_norm alone against the gradients themselves.
3. The ratio measured over steps 25-75 of real trainings against the one predicted at step 0: rank correlation, and by how
   much it over-estimates. A training whose norm is not finite any more counts as one of the largest.
4. What a calibration costs.
Writes benchmarks/results/calibration.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from tune_ssim.before_launch.calibration import Calibration, calibrate
from tune_ssim.study.study import Study, load_study
from tune_ssim.tasks.fundus_sr import FundusSR

ROOT = Path(__file__).resolve().parents[1]
PIXEL = {"pixel_loss_weight": 0.05, "pixel_loss_max_t": 0.3}
GAINS, GATES = (0.01, 1.0, 3.0, 10.0, 30.0, 100.0, 200.0, 500.0), (0.1, 0.3, 1.0)
WINDOW = range(25, 76)
OTHERS: tuple[dict[str, Any], ...] = (
    {},
    {"image": "immunohistochemistry"},
    {"image": "astronaut"},
    {"width": 32, "pretrained": False},
    {"crop": 64, "batch_size": 4},
    {"t_law": "shifted_sigmoid_normal"},
)


def study(method: str = "auto", batches: int = 24, **config: Any) -> Study:
    bundled = load_study("fundus_ssim")
    assert bundled.calibration is not None
    options = bundled.calibration.model_copy(update={"method": method, "batches": batches})
    return bundled.replace(task_config={**bundled.task_config, **config}, calibration=options)


def first_steps(setting: dict[str, Any], steps: int, **config: Any) -> list[float]:
    task = FundusSR()
    task.setup({"preset": "sgd", "lr": 0.0, **config, **setting}, seed=0)
    return [float(task.step()["total_norm"]) for _ in range(steps)]


def step_zero(config: dict[str, Any]) -> dict[str, Any]:
    """The largest relative error over random settings, each on its first three steps."""
    found, draw, errors = calibrate(study(batches=3, **config)), random.Random(1), []
    for _ in range(8):
        gate = draw.randrange(len(found.model.max_ts))
        weight, scale = 10 ** draw.uniform(-3, 4), 10 ** draw.uniform(-3, 1)
        pixel = draw.choice([0.0, 0.05, 300.0, 1e4])
        setting = {"ssim_loss_weight": weight, "ssim_grad_scale": scale, "ssim_loss_max_t": found.model.max_ts[gate]}
        v = np.array([1.0, pixel, weight * scale])
        for k, measured in enumerate(first_steps({**setting, **PIXEL, "pixel_loss_weight": pixel}, 3, **config)):
            errors.append(abs(float(np.sqrt(v @ found.model.q[gate, k] @ v)) / measured - 1))
    return {"config": config, "comparisons": len(errors), "largest_relative_error": max(errors)}


def train(gain: float, gate: float) -> list[tuple[float, float]]:
    """(total_norm, active fraction) of every step; gain 0 is the baseline."""
    setting = PIXEL if gain == 0 else {"ssim_loss_weight": gain, "ssim_loss_max_t": gate}
    task = FundusSR()
    task.setup({"preset": "sgd", **setting}, seed=0)
    made = []
    for _ in range(max(WINDOW)):
        metrics = task.step()
        made.append((float(metrics["total_norm"]), float(metrics["ssim_active_fraction"])))
    return made


def ratio(run: list[tuple[float, float]], baseline: list[tuple[float, float]]) -> float:
    """Of the medians over the window's active steps, as the norm guard forms it."""
    pairs = [(run[n - 1][0], baseline[n - 1][0]) for n in WINDOW if run[n - 1][1] > 0]
    above, below = (np.median([pair[i] for pair in pairs]) for i in (0, 1))
    return float(above / below) if math.isfinite(above) else math.inf


def cpu_s() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def timed(method: str) -> tuple[Calibration, dict[str, float]]:
    before, cpu = time.perf_counter(), cpu_s()
    found = calibrate(study(method))
    return found, {"wall_s": time.perf_counter() - before, "cpu_s": cpu_s() - cpu, "share_of_study": found.share_of_study}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/calibration.json")
    options = parser.parse_args()
    torch.set_num_threads(1)

    calibrate(study(batches=1))  # imports and the photograph, once a process
    gram, gram_cost = timed("gram")
    read, read_cost = timed("readings")
    apart = max(
        abs(math.log(read.model.predict_gain(gain, gate).ratio / gram.model.predict_gain(gain, gate).ratio))
        for gain in GAINS
        for gate in read.model.max_ts
    )
    errors = [step_zero(config) for config in OTHERS]

    points = [(gain, gate) for gate in GATES for gain in GAINS]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        baseline, *runs = pool.map(train, *zip((0.0, 1.0), *points, strict=True))
    rows = [
        {"gain": gain, "max_t": gate, "predicted": gram.model.predict_gain(gain, gate).ratio, "measured": ratio(run, baseline)}
        for (gain, gate), run in zip(points, runs, strict=True)
    ]
    table = Table(title="norm ratio: predicted at step 0, measured over steps 25-75")
    for heading in ("gain", "max_t", "predicted", "measured"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(f"{row[name]:.3g}" for name in ("gain", "max_t", "predicted", "measured")))
    Console().print(table)
    pushing = [row for row in rows if row["predicted"] > 1.5 and math.isfinite(row["measured"])]
    factors = [row["predicted"] / row["measured"] for row in pushing]
    correlation = float(spearmanr([row["predicted"] for row in rows], [row["measured"] for row in rows]).statistic)

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    report = {
        "step_zero": errors,
        "readings_against_gram_log_ratio": apart,
        "rank_correlation_steps_25_to_75": correlation,
        "predicted_over_measured": {"median": float(np.median(factors)), "range": [min(factors), max(factors)]},
        "check_relative_error": {"gram": gram.check.relative_error, "readings": read.check.relative_error},
        "cost": {"gram": gram_cost, "readings": read_cost, "batches": len(gram.model.batches)},
        "rows": rows,
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, CPU, one thread",
        "load": os.getloadavg()[0],
        "commit": commit,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "rows"}, indent=1))


if __name__ == "__main__":
    main()
