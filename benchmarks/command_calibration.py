"""What a calibrated command predicts, compared with what it then does. Nobody changed the programs; each has its own launcher.

    python benchmarks/command_calibration.py [--settings 5] [--trainings 8]

1. The study's command is calibrated with its updates held off from outside.
2. `settings` random settings, started again with updates held off: total_norm of every batch, predicted against observed.
3. `trainings` settings across the space, really trained for 75 steps: rank correlation of the predicted norm ratio with the median
   ratio to the baseline over steps 25 to 75.

bagel_style prints no norm; `pushes` prints one with 8 and with 4 digits, and cannot be observed. Writes
benchmarks/results/command_calibration.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy.stats import spearmanr

from tune_ssim.base.yaml_source import read_yaml
from tune_ssim.before_launch.command.inspect import inspect_command
from tune_ssim.before_launch.command.starts import Start, StartJob
from tune_ssim.before_launch.command.take_start import take_here
from tune_ssim.probes.norm_model import NormModel
from tune_ssim.study.study import Study, load_study
from tune_ssim.trials.load_training import load_task

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BATCHES = 12
FIRST, LAST = 25, 75  # steps of the training whose norms are compared; the issue's


def bagel(folder: Path, ranks: int) -> Study:
    if not (folder / "data").exists():
        shutil.copytree(ROOT / "examples" / "bagel_style", folder, dirs_exist_ok=True)
        subprocess.run([sys.executable, "prepare.py", "--out=data"], cwd=folder, check=True, capture_output=True)
    given: dict[str, Any] = read_yaml(folder / "study.yaml").value
    given["task"]["command"] = [word.replace("nproc_per_node=1", f"nproc_per_node={ranks}") for word in given["task"]["command"]]
    given["task_config"]["steps"] = LAST
    given |= {"calibration": {"batches": BATCHES}, "guards": {"smoke_test": None}}
    path = folder / f"study-{ranks}.yaml"
    path.write_text(json.dumps(given))
    return load_study(path)


def pushes(folder: Path, digits: int) -> Study:
    names = ("ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale", "pixel_loss_weight", "lr")
    flags = ["--steps={steps}", "--seed={seed}", f"--digits={digits}", *(f"--{name}={{{name}}}" for name in names)]
    pattern = r"step (?P<step>\d+): loss (?P<loss>\S+) total_norm (?P<total_norm>\S+)"
    space = {"gain": {"log_uniform": [0.1, 100]}, "ssim_loss_max_t": {"choice": [0.3, 1.0]}}
    return load_study(
        {
            "name": f"pushes-{digits}",
            "task": {
                "command": [sys.executable, str(ROOT / "tests" / "programs" / "pushes.py"), *flags],
                "records": {"pattern": pattern},
            },
            "task_config": {"steps": LAST, "lr": 0.01},
            "baseline": {"pixel_loss_weight": 0.05, "ssim_loss_max_t": 1.0, "ssim_grad_scale": 1.0},
            "space": {"name": "pushes", "parameters": space, "fixed": {"ssim_grad_scale": 1.0, "pixel_loss_weight": 0.0}},
            "calibration": {"batches": BATCHES, "update_off": {"lr": 0}},
            "guards": {"smoke_test": None},
        }
    )


def predicted(model: NormModel, gain: float, gate: int) -> Any:
    v = np.array([1.0, 0.0, gain])
    return np.sqrt(np.einsum("i,bij,j->b", v, np.nan_to_num(model.q[gate]), v))


def measure(study: Study, settings: int, trainings: int) -> dict[str, Any]:
    make = load_task(study.task_path, study.import_path)
    taken: list[Start] = []
    with tempfile.TemporaryDirectory() as folder:
        run = partial(take_here, make, study.name, Path(folder))

        def take(jobs: Any) -> list[Start]:
            taken.extend(found := list(run(jobs)))
            return found

        started = time.perf_counter()
        found = inspect_command(study, make, take, preflight=False, calibration=True)["calibration"]
        seconds, starts = time.perf_counter() - started, len(taken)
        model = NormModel.from_dict(found["model"])
        base = {**study.task_config, "pixel_loss_weight": 0.0, "ssim_grad_scale": 1.0}
        still = dict(study.calibration.disable_update) if study.calibration else {}
        draw, errors = random.Random(0), []
        for _ in range(settings):
            gain, gate = 10 ** draw.uniform(-1, 3), draw.randrange(len(model.max_ts))
            config = {**base, **still, "ssim_loss_weight": gain, "ssim_loss_max_t": model.max_ts[gate]}
            (start,) = run([StartJob(config, study.search.seed, BATCHES)])
            errors += (np.abs(predicted(model, gain, gate) / start.values("total_norm") - 1)).tolist()
        gate = len(model.max_ts) - 1
        pairs = []
        baseline_config = {**study.task_config, **study.baseline_settings}
        jobs = [StartJob(baseline_config, study.search.seed, LAST, is_held=False)]
        gains = [model.gain_for(ratio, model.max_ts[gate]) for ratio in np.geomspace(1.05, 30, trainings)]
        config = {**base, "ssim_loss_max_t": model.max_ts[gate]}
        jobs += [StartJob({**config, "ssim_loss_weight": gain}, study.search.seed, LAST, is_held=False) for gain in gains]
        baseline, *trained = run(jobs)
        for gain, start in zip(gains, trained, strict=True):
            window = slice(FIRST - 1, LAST)
            ratio = median(start.values("total_norm")[window]) / median(baseline.values("total_norm")[window])
            pairs.append((float(model.predict_gain(gain, model.max_ts[gate]).ratio), float(ratio)))
    row = {
        "starts": starts,
        "gates": len(model.max_ts),
        "calibration_s": round(seconds, 1),
        "share_of_study": round(found["share_of_study"], 3),
        "check_error": found["check"]["relative_error"],
        "worst_error": float(max(errors)),
        "rank_correlation": round(float(spearmanr([p for p, _ in pairs], [m for _, m in pairs]).statistic), 3),
        "ratios": [[round(p, 3), round(m, 3)] for p, m in pairs],
    }
    print(study.name, json.dumps({key: value for key, value in row.items() if key != "ratios"}), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", type=int, default=5)
    parser.add_argument("--trainings", type=int, default=8)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for digits in (8, 4):
            rows[f"pushes, {digits} digits"] = measure(pushes(Path(folder), digits), options.settings, options.trainings)
        for ranks in (1, 2):
            study = bagel(Path(folder, "bagel"), ranks)
            rows[f"bagel_style, {ranks} rank{'s' if ranks > 1 else ''}"] = measure(study, options.settings, options.trainings)
    (HERE / "results" / "command_calibration.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
