"""What the README says about the loss, measured: `python benchmarks/readme_findings.py [--out FOLDER]` (4 minutes).

Trains the bundled task at fixed gains with the guards only looking on, folds what was recorded through the default guards, and
writes a table (stdout), `benchmarks/results/findings.json` and `docs/images/safe_and_ruined.png`. Nothing is prepared.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tune_ssim.guards import Baseline, NonFinite, NormRatio, SmokeTest, Watch
from tune_ssim.losses import ssim, ssim_loss
from tune_ssim.records import ACTIVE_FRACTION, LOSS_SSIM, TOTAL_NORM, Record
from tune_ssim.study.study import load_study
from tune_ssim.tasks.fundus_images import load_fundus_images, low_resolution
from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.trials.final_verdict import TrialPlan
from tune_ssim.trials.trial import Trial

ROOT = Path(__file__).resolve().parents[1]
STEPS = 200
UNTOUCHED, SAFE, RUINED = ("sgd", 0.001, 0.3), ("sgd", 30.0, 0.3), ("sgd", 2000.0, 0.3)
RUNS = [
    *(("sgd", gain, 0.3) for gain in (0.001, 1.0, 10.0, 30.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)),
    ("sgd", 16.0, 1.0),
    ("sgd", 1e4, 0.1),
    ("adamw_clip", 30.0, 0.3),
    ("adamw_clip", 1000.0, 0.3),
    ("adamw_hot", 100.0, 0.3),
]


def train(preset: str, gain: float | None, max_t: float, baseline: Baseline | None) -> dict[str, Any]:
    """One run to its end, whatever the guards say; `gain` None is the baseline."""
    torch.set_num_threads(1)
    looking_on = (NormRatio(on_excess="warn"), SmokeTest(consecutive=10**6))
    trial = Trial(FundusSR(), TrialPlan(steps=STEPS, guards=looking_on, image_grids=False))
    loss: dict[str, Any] = {"pixel_loss_weight": 0.05} if gain is None else {"ssim_loss_weight": gain, "ssim_loss_max_t": max_t}
    role = "baseline" if gain is None else "search"
    trial.start({"preset": preset, "steps": STEPS, **loss}, role=role, baseline=baseline)
    records = trial.advance()
    found = dict(trial.task.evaluate())
    if baseline is not None:
        found |= {f"delta_{name}": found[name] - baseline.runs[0].evaluation[name] for name in ("ssim", "psnr")}
    return {
        "records": [record.to_json() for record in records],
        "metrics": found,
        "clipped": trial.effective["max_grad_norm"] is not None,
        "images": trial.task.sample().images[:32:4],
        "baseline": Baseline((trial.baseline_run(),)).to_bytes() if gain is None else None,
    }


def judged(run: dict[str, Any], baseline: Baseline) -> str:
    """What the default guards say to the recorded stream: the same words at the same step as live."""
    keep = load_study().objective.rules
    norm = NormRatio().bind(baseline, 0, run["clipped"])
    watch = Watch([norm, SmokeTest(), NonFinite()])
    for violation in watch.fold(Record.from_json(record) for record in run["records"]):
        if violation.action in ("prune", "abort"):
            return f"pruned by {violation.guard} at step {violation.step}"
    for rule in keep:
        for margin in rule.margins(run["metrics"], baseline.runs[0].evaluation):
            if margin.is_broken:
                return f"degraded: {margin.sentence}"
    return "safe"


def norm_ratios(run: dict[str, Any], baseline: Baseline) -> list[tuple[int, float]]:
    series = baseline.runs[0].series[TOTAL_NORM]
    return [
        (step, values[TOTAL_NORM] / series[step])
        for step, values in run["records"]
        if TOTAL_NORM in values and values[ACTIVE_FRACTION] > 0
    ]


def row_of(name: tuple[str, float, float], run: dict[str, Any], baseline: Baseline) -> dict[str, Any]:
    ratios = norm_ratios(run, baseline)

    def between(first: int, last: int) -> float:
        return median([ratio for step, ratio in ratios if first <= step <= last] or [float("nan")])

    losses = [values[LOSS_SSIM] for _, values in run["records"] if LOSS_SSIM in values]
    tenth = max(1, len(losses) // 10)
    preset, gain, max_t = name
    return {
        "preset": preset,
        "gain": gain,
        "max_t": max_t,
        "norm_ratio_steps_1_to_25": between(1, 25),
        "norm_ratio_steps_25_to_75": between(25, 75),
        "norm_ratio_steps_150_to_200": between(150, 200),
        "loss_ssim_first_tenth": median(losses[:tenth]),
        "loss_ssim_last_tenth": median(losses[-tenth:]),
        "delta_ssim": run["metrics"]["delta_ssim"],
        "delta_psnr": run["metrics"]["delta_psnr"],
        "verdict": judged(run, baseline),
    }


def blindness() -> dict[str, float]:
    """SSIM of pictures that nobody would call a restoration."""
    crops = load_fundus_images().held_out_crops(128)
    generator = torch.Generator().manual_seed(0)
    low = low_resolution(crops, torch.randn(128, 3, 12, 12, generator=generator))
    bicubic = torch.nn.functional.interpolate(low, scale_factor=4, mode="bicubic").clamp(0, 1)
    flat = crops.mean(dim=(2, 3), keepdim=True).expand_as(crops)
    noisy = (crops + 0.05 * torch.randn(crops.shape, generator=generator)).clamp(0, 1)
    found = {"flat mean colour": flat, "bicubic": bicubic, "noise of 0.05 on the original": noisy}
    return {name: float(ssim(images, crops).mean()) for name, images in found.items()}


def gradient_at_decoder() -> float:
    """|∂(1-SSIM)/∂x| over |∂L2/∂x| at the decoder's output, unit weights, median over the starting model's training batches."""
    task = FundusSR()
    task.setup({"preset": "sgd", "steps": STEPS}, 0, "cpu")
    found = []
    for n in range(1, 13):
        crops, low, z0, noise, t = task._batch(n)
        with torch.no_grad():
            t_image = t[:, None, None, None]
            z_t = (1 - t_image) * z0 + t_image * noise
            x = task.vae.decode(z_t - t_image * task.model(z_t, t, low)) * 0.5 + 0.5
        x.requires_grad_(True)
        (by_ssim,) = torch.autograd.grad(ssim_loss(x, crops).mean(), x)
        (by_l2,) = torch.autograd.grad((x - crops).square().mean(), x)
        found.append(float(by_ssim.norm() / by_l2.norm()))
    return median(found)


def draw(path: Path, runs: dict[tuple[str, float, float], dict[str, Any]], baseline: Baseline) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {SAFE: "#2a7fb8", RUINED: "#c0392b"}
    figure = plt.figure(figsize=(13, 5), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=[1.1, 1.1, 1.2])
    curves, norms = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    untouched = {step: values[LOSS_SSIM] for step, values in runs[UNTOUCHED]["records"] if LOSS_SSIM in values}
    for row, name in enumerate((SAFE, RUINED)):
        run, label = runs[name], f"gain {name[1]:g}, max_t {name[2]:g}"
        points = [(s, values[LOSS_SSIM] - untouched[s]) for s, values in run["records"] if LOSS_SSIM in values and s in untouched]
        smooth = [(points[i][0], median(value for _, value in points[max(0, i - 20) : i + 1])) for i in range(5, len(points))]
        curves.plot(*zip(*points, strict=True), ".", color=colours[name], alpha=0.2)
        curves.plot(*zip(*smooth, strict=True), color=colours[name], label=label)
        norms.semilogy(*zip(*norm_ratios(run, baseline), strict=True), ".-", ms=3, lw=0.8, color=colours[name], label=label)
        picture = figure.add_subplot(grid[row, 2])
        images = run["images"].clamp(0, 1)
        rows = [torch.cat(list(images[i : i + 4]), dim=2) for i in (0, 4)]
        picture.imshow(torch.cat(rows, dim=1).permute(1, 2, 0).numpy())
        delta = run["metrics"]
        picture.set_title(f"samples, {label}\nSSIM {delta['delta_ssim']:+.3f}, PSNR {delta['delta_psnr']:+.1f} dB", fontsize=10)
        picture.axis("off")
    curves.axhline(0, color="black", lw=0.8)
    curves.set(title="SSIM loss falls in both runs", xlabel="step", ylim=(-0.02, 0.04))
    curves.set_ylabel("1 - SSIM, minus the same batch without an SSIM loss")
    norms.axhline(10, color="black", lw=0.8, ls="--")
    norms.text(0, 10, " limit of the norm guard", fontsize=9, va="center", backgroundcolor="white")
    norms.set(title="gradient norm over the pixel-loss baseline's", xlabel="step", ylabel="norm ratio")
    curves.legend(frameon=False), norms.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT, help="where benchmarks/results and docs/images are written")
    out = parser.parse_args().out
    presets = sorted({preset for preset, _, _ in RUNS})
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        made = dict(zip(presets, pool.map(train, presets, [None] * 3, [0.3] * 3, [None] * 3), strict=True))
        baselines = {preset: Baseline.from_bytes(run["baseline"]) for preset, run in made.items()}
        columns = list(zip(*RUNS, strict=True))
        results = pool.map(train, *columns, [baselines[preset] for preset in columns[0]])
        runs = dict(zip(RUNS, results, strict=True))
    rows = [row_of(name, run, baselines[name[0]]) for name, run in runs.items()]

    table = Table(title="Fixed settings, 200 steps, batch 8, seed 0, guards only looking on")
    for heading in (
        "preset",
        "gain",
        "max_t",
        "norm ratio 1-25",
        "25-75",
        "150-200",
        "1-SSIM",
        "ΔSSIM",
        "ΔPSNR",
        "the guards' verdict",
    ):
        table.add_column(heading)
    for row in rows:
        numbers = [f"{row[f'norm_ratio_steps_{part}']:.3g}" for part in ("1_to_25", "25_to_75", "150_to_200")]
        losses = f"{row['loss_ssim_first_tenth']:.3f} → {row['loss_ssim_last_tenth']:.3f}"
        deltas = [f"{row['delta_ssim']:+.4f}", f"{row['delta_psnr']:+.2f}"]
        table.add_row(row["preset"], f"{row['gain']:g}", f"{row['max_t']:g}", *numbers, losses, *deltas, row["verdict"])
    Console(width=150).print(table)
    facts = {"ssim_of_unrestored_images": blindness(), "gradient_of_ssim_over_l2_at_decoder": gradient_at_decoder()}
    print(json.dumps(facts, indent=1))

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, CPU"
    report = {"rows": rows, **facts, "baselines": {p: dict(b.runs[0].evaluation) for p, b in baselines.items()}}
    (out / "benchmarks/results").mkdir(parents=True, exist_ok=True)
    (out / "benchmarks/results/findings.json").write_text(
        json.dumps({**report, "machine": machine, "commit": commit}, indent=1) + "\n"
    )
    draw(out / "docs/images/safe_and_ruined.png", runs, baselines["sgd"])


if __name__ == "__main__":
    main()
