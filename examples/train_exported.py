"""Trains an exported setting and the baseline side by side on new seeds: `python examples/train_exported.py EXPORT.json [SEED …]`.

Uses the task alone: no Ray, no guards, no study. Prints what the exported setting gains, seed by seed.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tune_ssim.tasks.fundus_sr import FundusSR

STEPS = 200
BASELINE = {"ssim_loss_weight": 0.0, "pixel_loss_weight": 0.05, "pixel_loss_max_t": 0.3}  # note 000: pixel loss only


def train(settings: dict[str, Any], seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    task = FundusSR()
    task.setup({"preset": "sgd", "steps": STEPS, **settings}, seed)
    for _ in range(STEPS):
        task.step()
    return task.evaluate()


def main() -> None:
    exported = json.loads(Path(sys.argv[1]).read_text())["config"]
    seeds = [int(seed) for seed in sys.argv[2:]] or [11, 12]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        tuned = [pool.submit(train, exported, seed) for seed in seeds]
        plain = [pool.submit(train, BASELINE, seed) for seed in seeds]
    for seed, one, other in zip(seeds, tuned, plain, strict=True):
        a, b = one.result(), other.result()
        print(f"seed {seed}: SSIM {a['ssim'] - b['ssim']:+.4f}, PSNR {a['psnr'] - b['psnr']:+.2f} dB against the baseline")


if __name__ == "__main__":
    main()
