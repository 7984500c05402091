"""Made-up learning curves in the format of benchmarks/replay, for tests: no figure of the project comes from them."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from norm_models import at_right_angles

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "replay"))

from curves import FORMAT, Curves, Run

STEPS = 60
EVALUATIONS, SMOKE_TESTS = [0, 15, 30, 60], [0, 15, 30, 45, 60]
HALF_GAIN = {0.1: 80.0, 0.3: 20.0, 1.0: 8.0}  # the gain at which the SSIM gradient equals the main one


def synthetic_curves(
    *,
    best_ratio: float = 3.0,
    best: float = 0.008,
    ruin_ratio: float = 15.0,
    noise: float = 0.0003,
    seeds: int = 4,
    gains: tuple[float, ...] = (1.0, 3.0, 8.0, 16.0, 32.0, 64.0, 125.0, 400.0),
) -> Curves:
    """A training that is best at the norm ratio `best_ratio` behind the widest gate, by `best`, and ruined from `ruin_ratio` on."""
    model = at_right_angles(HALF_GAIN)
    runs = [made(0.0, 1.0, seed, 1.0, best_ratio, best, ruin_ratio, noise) for seed in range(seeds)]
    for seed in range(seeds):
        for max_t in HALF_GAIN:
            for gain in gains:
                ratio = model.predict_gain(gain, max_t).ratio
                runs.append(made(gain, max_t, seed, ratio, best_ratio, best * (0.5 + 0.5 * max_t), ruin_ratio, noise))
    header: dict[str, Any] = {
        "format": FORMAT,
        "name": "synthetic",
        "task": "fundus_sr",
        "task_config": {"steps": STEPS},
        "baseline": {"pixel_loss_weight": 0.05, "pixel_loss_max_t": 0.3},
        "baseline_effective": {"ssim_loss_weight": 0.0, "ssim_loss_max_t": 0.3, "ssim_grad_scale": 1.0, "pixel_loss_weight": 0.05}
        | {"pixel_loss_max_t": 0.3, "max_grad_norm": None, "lr": 0.005, "batch_size": 8},
        "steps": STEPS,
        "evaluation_steps": EVALUATIONS,
        "smoke_steps": SMOKE_TESTS,
        "calibration": {"model": model.to_dict()},
        "costs": {"evaluation": 20.0, "sample": 5.0, "calibration": 30.0},
    }
    return Curves(header, runs)


def made(
    gain: float, max_t: float, seed: int, ratio: float, best_ratio: float, best: float, ruin_ratio: float, noise: float
) -> Run:
    random = np.random.default_rng(seed)  # the same batches for every setting of a seed
    norms = np.exp(random.normal(0, 0.3, STEPS))
    luck = random.normal(0, noise) * (gain > 0) * math.log(1 + ratio)
    is_ruined = ratio > ruin_ratio
    gained = best * max(0.0, 1 - (math.log(ratio / best_ratio) / math.log(6)) ** 2) if gain else 0.0
    gained = gained + luck if not is_ruined else -0.3
    lost_db = 8.0 if is_ruined else 0.0

    def row(values: Any) -> Any:
        return np.asarray(values, np.float32)

    rise = np.array(EVALUATIONS) / STEPS
    harm = np.minimum(1, 4 * np.array(SMOKE_TESTS) / STEPS) * lost_db
    smoke = {"reference_psnr": row(30 - harm), "consistency_psnr": row(28 - harm), "std_ratio": row(np.ones(len(SMOKE_TESTS)))}
    again = {name: row([math.nan] * (len(SMOKE_TESTS) - 1) + [float(values[-1])]) for name, values in smoke.items()}
    return Run(
        gain,
        max_t,
        seed,
        {
            "steps": {
                "loss": row(np.full(STEPS, 0.3)),
                "total_norm": row(norms * ratio),
                "ssim_active_fraction": row(np.full(STEPS, 1.0 if gain else 0.0)),
            },
            "evaluations": {"ssim": row(0.875 + gained * rise), "psnr": row(31 - lost_db * np.minimum(1, 4 * rise))},
            "smoke": smoke,
            "smoke_again": again,
        },
    )
