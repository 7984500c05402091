"""When does an adaptive gain do better than a constant one, and where does it fail? Bundled task, real runs.

    python benchmarks/adaptive.py [--cases sgd:32:3,adamw_clip:32:3,sgd:64:2] [--steps 200]

A case is regime:crop:seeds. The default takes about a quarter of an hour on an idle core.

`adaptive: {target_ratio: r}` holds ‖gradient of the weighted SSIM loss‖ = r · ‖gradient of the flow loss‖ at every step. The
constant gain beside it has that ratio before the first update (median over the calibrated batches). So both push equally hard at
first, and what differs comes from adapting. No guard acts: each run takes all its steps. Truth as in benchmarks/replay: ruined is
3 dB PSNR or 0.03 SSIM below the baseline of the same seed, or a non-finite loss; *collapsed* means that the smoke test fails at
one of its steps. Writes benchmarks/results/adaptive.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from tune_ssim.base.files import jsonable
from tune_ssim.before_launch.calibration import calibrate
from tune_ssim.guards import SmokeTest
from tune_ssim.probes.norm_model import MAIN, SSIM
from tune_ssim.study.study import load_study
from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.trials.sample_check import statistics_of

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "adaptive.json"
CASES = "sgd:32:3,adamw_clip:32:3,sgd:64:2"
TARGETS = (0.5, 1.0, 2.0, 4.0)
MAX_T = 1.0  # the gate of the best settings of the bundled task
BASELINE = {"pixel_loss_weight": 0.05, "pixel_loss_max_t": 0.3}
RUINED_DB, RUINED_SSIM = -3.0, -0.03  # benchmarks/replay/truth.py
WINDOW = 20  # steps at both ends over which weights are compared


def settings(regime: str, crop: int) -> dict[str, dict[str, Any]]:
    """Name → settings: the baseline, and for each target the adaptive weight and the constant one."""
    bundled = load_study("fundus_ssim")
    study = bundled.replace(task_config={**bundled.task_config, "preset": regime, "crop": crop}, name="adaptive")
    model = calibrate(study).model
    gate = model.max_ts.index(MAX_T)
    q = model.q[gate, model.active[gate]]
    equal = float(np.median(np.sqrt(q[:, MAIN, MAIN] / q[:, SSIM, SSIM])))  # the gain at which both gradients are equally long
    found: dict[str, dict[str, Any]] = {"baseline": BASELINE}
    for target in TARGETS:
        common = {"ssim_loss_max_t": MAX_T, "ssim_grad_scale": 1.0}
        found[f"constant {target:g}"] = {**common, "ssim_loss_weight": target * equal}
        found[f"adaptive {target:g}"] = {**common, "ssim_loss_weight": {"adaptive": {"target_ratio": target}}}
    return found


def run(config: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """One training to its end, with what it measured on the way."""
    task = FundusSR()
    task.setup({**config, "steps": steps}, seed)
    guard = SmokeTest()
    start = statistics_of(task.sample(0))
    norms, weights, collapsed_at, began = [], [], None, time.perf_counter()
    for n in range(1, steps + 1):
        record = {name: float(value) for name, value in task.step().items()}
        norms.append(record["total_norm"])
        weights.append(record.get("ssim_loss_weight", config.get("ssim_loss_weight", math.nan)))
        if not math.isfinite(record["loss"]):
            collapsed_at = n
            break
        if guard.due(n, steps) and collapsed_at is None and guard.findings(statistics_of(task.sample(0)), start):
            collapsed_at = n
    found = task.evaluate()
    return {
        "ssim": found["ssim"],
        "psnr": found["psnr"],
        "norms": norms,
        "weights": weights,
        "collapsed_at": collapsed_at,
        "seconds": round(time.perf_counter() - began, 1),
    }


def measure(regime: str, crop: int, seeds: Sequence[int], steps: int) -> Iterator[dict[str, Any]]:
    """A row for each setting: every seed against its baseline."""
    reference: dict[int, dict[str, Any]] = {}
    for name, setting in settings(regime, crop).items():
        runs = {seed: run({"preset": regime, "crop": crop, **setting}, seed, steps) for seed in seeds}
        reference = reference or runs
        yield row(name, setting, runs, reference) | {"regime": regime, "crop": crop}


def row(name: str, setting: dict[str, Any], runs: dict[int, Any], reference: dict[int, Any]) -> dict[str, Any]:
    deltas = {metric: {seed: one[metric] - reference[seed][metric] for seed, one in runs.items()} for metric in ("ssim", "psnr")}
    ruined = [
        seed
        for seed, one in runs.items()
        if not (deltas["psnr"][seed] > RUINED_DB and deltas["ssim"][seed] > RUINED_SSIM) or not math.isfinite(one["norms"][-1])
    ]
    weights = [one["weights"] for one in runs.values()]
    return {
        "setting": name,
        "weight": setting.get("ssim_loss_weight", 0.0),
        "delta_ssim": deltas["ssim"],
        "delta_psnr": deltas["psnr"],
        "ruined": len(ruined),
        "collapsed": sum(one["collapsed_at"] is not None for one in runs.values()),
        "runs": len(runs),
        "norm_ratio": [median(one["norms"]) / median(reference[seed]["norms"]) for seed, one in runs.items()],
        "weight_first": [median(one[:WINDOW]) for one in weights],
        "weight_last": [median(one[-WINDOW:]) for one in weights],
        "weight_spread": [float(np.quantile(one, 0.9) / np.quantile(one, 0.1)) for one in weights],  # from batch to batch
        # Of an adaptive weight with the norm of the baseline on the same batch: how much it follows the noise of the batches.
        "weight_follows_norm": [float(spearmanr(one["weights"], reference[seed]["norms"][: len(one["weights"])])[0])
                                if name.startswith("adaptive") else math.nan for seed, one in runs.items()],
        "seconds": [one["seconds"] for one in runs.values()],
    }  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of docs/spaces.md: adaptive beside constant, for each regime, crop and target."""
    by_key = {(one["regime"], one["crop"], one["setting"]): one for one in rows}
    lines = []
    for regime, crop, setting in by_key:
        kind, _, target = setting.partition(" ")
        if kind != "constant":
            continue
        pair = [
            by_key[regime, crop, f"{name} {target}"]
            for name in ("constant", "adaptive")
            if (regime, crop, f"{name} {target}") in by_key
        ]
        cells = [
            " → ".join(f"{mean(one[metric].values()):{form}}" for one in pair)
            for metric, form in (("delta_ssim", "+.4f"), ("delta_psnr", "+.2f"))
        ]
        cells.append(" → ".join(f"{mean(one['norm_ratio']):.1f}" for one in pair))
        cells.append(" → ".join(f"{mean(one['weight_last']):.0f}" for one in pair))
        lines.append(f"| {regime}, {crop} | {target} | {' | '.join(cells)} |")
    return lines


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="adaptive and constant weights")
    columns = (
        "regime",
        "crop",
        "setting",
        "dSSIM",
        "dPSNR (dB)",
        "ruined",
        "collapsed",
        "norm ratio",
        "weight first, last",
        "p90/p10",
    )
    for column in columns:
        shown.add_column(column)
    for one in rows:
        ends = [mean(one[name]) for name in ("weight_first", "weight_last")]
        shown.add_row(
            one["regime"],
            str(one["crop"]),
            one["setting"],
            *(f"{mean(values):+.4f} ± {stdev(values) if len(values) > 1 else 0:.4f}"
              for values in (list(one["delta_ssim"].values()), list(one["delta_psnr"].values()))),
            f"{one['ruined']}/{one['runs']}",
            f"{one['collapsed']}/{one['runs']}",
            f"{mean(one['norm_ratio']):.2f}",
            "–" if math.isnan(ends[0]) else f"{ends[0]:.0f}, {ends[1]:.0f}",
            "–" if math.isnan(ends[0]) else f"{mean(one['weight_spread']):.1f}",
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    rows = []
    for case in options.cases.split(","):
        regime, crop, seeds = case.split(":")
        for one in measure(regime, int(crop), range(int(seeds)), options.steps):
            rows.append(one)
            head = {"commit": commit, "machine": platform.processor() or platform.machine(), "steps": options.steps}
            options.json.write_text(json.dumps(jsonable({**head, "max_t": MAX_T, "rows": rows}), indent=1) + "\n")
    Console(width=160).print(table(rows))


if __name__ == "__main__":
    main()
