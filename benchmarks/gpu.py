"""What the losses and the instrumentation cost on a GPU. One script of a few minutes; on a machine without one it runs on the CPU.

    python benchmarks/gpu.py [--rounds 30] [--device cuda] [--size 1] [--output benchmarks/results/gpu.json]

  ssim         forward + backward of `tune_ssim.losses.ssim`, plain and compiled by torch.compile, beside pytorch-msssim and, where
               it is installed (`pip install fused-ssim`, which builds CUDA kernels), fused-ssim; interleaved, on the same tensors
  decoded      DecodedLoss through the bundled task's decoder: both losses on one decode, beside a decode for each loss
  watching     total_norm every step and GradientTaps every 16th, as shares of a training step of a transformer
  transfers    copies from the device to the host in a training step of the bundled task under the default guards

Times are by CUDA events on a GPU and by the clock on a CPU: medians, and ratios of the same round. `--size` below 1 shrinks the
images, for a trial run. No result of a GPU is committed unless the JSON names one under `device`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode import bundled_decoder
from probes import Training as Watched
from probes import transformer
from pytorch_msssim import ssim as msssim_ssim
from rich.console import Console
from rich.table import Table
from ssim import save
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tune_ssim.guards import Baseline
from tune_ssim.guards.verdict import Role
from tune_ssim.losses import DecodedLoss, ssim, ssim_loss
from tune_ssim.study.study import load_study
from tune_ssim.trials.final_verdict import TrialPlan
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.trial import Trial

SHAPES = ((8, 3, 256, 256), (4, 3, 512, 512))
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=float, default=1.0, help="scale of the images' sides and of the watched model")
    parser.add_argument("--steps", type=int, default=32, help="training steps over which transfers are counted")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which needs a compiler")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    console = Console(width=140)
    found = {
        "ssim": [ssim_row(shape, device, arguments) for shape in SHAPES],
        "decoded": decoded_row(device, arguments),
        "watching": watching_row(device, arguments),
        "transfers": transfers_row(device, arguments.steps),
    }
    show(found, name, console)
    save(arguments.output, {"device": name, "rounds": arguments.rounds, "size": arguments.size, **found})


def ssim_row(shape: tuple[int, ...], device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    batch, channels, *sides = shape
    size = (batch, channels, *(max(16, round(side * arguments.size)) for side in sides))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(size, generator=generator).to(device).requires_grad_()
    y = (0.7 * x.detach() + 0.3 * torch.rand(size, generator=generator).to(device)).clamp(0, 1)
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": lambda x, y: ssim(x, y).mean()}
    if not arguments.no_compile:
        ways["ours_compiled"] = torch.compile(ways["ours"])
    ways["pytorch_msssim"] = lambda x, y: msssim_ssim(x, y, data_range=1.0)
    if (fused := fused_ssim()) is not None and device.type == "cuda":
        ways["fused_ssim"] = lambda x, y: fused(x, y, padding="valid")
    values = {name: way(x, y).item() for name, way in ways.items()}
    largest = max(abs(value - values["ours"]) for value in values.values())
    assert largest < 1e-4, f"not the same SSIM: {values}"  # else their times mean nothing

    def pass_of(way: Callable[[Tensor, Tensor], Tensor]) -> None:
        x.grad = None
        (1 - way(x, y)).backward()

    times = timed({name: partial(pass_of, way) for name, way in ways.items()}, device, arguments.rounds)
    return {"shape": list(size), **summary(times, "ours"), "max_abs_difference": largest}


def fused_ssim() -> Callable[..., Tensor] | None:
    try:
        from fused_ssim import fused_ssim as function  # a package of CUDA kernels, which few machines can build
    except ImportError:
        return None
    return function  # type: ignore[no-any-return]


def decoded_row(device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    decoder = bundled_decoder(device)
    side = max(4, round(64 * arguments.size))
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(8, 4, side, side, generator=generator).to(device).requires_grad_()
    target = torch.rand(8, 3, 4 * side, 4 * side, generator=generator).to(device)
    t = torch.linspace(0.05, 0.95, 8, device=device)
    loss = DecodedLoss(0.1, 1.0, pixel_loss_weight=0.05, pixel_loss_max_t=1.0)

    def shared() -> None:
        z0.grad = None
        loss(z0, t, target, decoder).total.backward()

    def separate() -> None:
        z0.grad = None
        one = ssim_loss((decoder(z0) * 0.5 + 0.5).clamp(0, 1), target).mean()
        other = ((decoder(z0) * 0.5 + 0.5).clamp(0, 1) - target).square().mean()
        (0.1 * one + 0.05 * other).backward()

    times = timed({"shared": shared, "separate": separate}, device, arguments.rounds)
    return {"images": list(target.shape), **summary(times, "shared")}


def watching_row(device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    width = max(64, round(1024 * arguments.size) // 64 * 64)
    trainings = {}
    for variant in ("plain", "watched", "clip", "clip_taps"):
        with torch.device(device):  # model and data are made there
            trainings[variant] = Watched(transformer(width, 4, 64, 8), variant)
    steps = {variant: training.step for variant, training in trainings.items()}
    # Taps work at some steps of a window of 16, so whole windows are timed.
    windows = {variant: partial(repeat, step, 16) for variant, step in steps.items()}
    times = timed(windows, device, max(3, arguments.rounds // 4))
    ratios = {
        variant: 100 * (statistics.median(b / a for a, b in zip(times[beside], times[variant], strict=True)) - 1)
        for variant, beside in (("watched", "plain"), ("clip_taps", "clip"))
    }
    parameters = sum(parameter.numel() for parameter in trainings["plain"].parameters)
    step_ms = 1e3 * statistics.median(times["plain"]) / 16
    return {"parameters": parameters, "step_ms": step_ms, "percent_of_a_step": ratios}


def repeat(action: Callable[[], None], times: int) -> None:
    for _ in range(times):
        action()


def transfers_row(device: torch.device, steps: int) -> dict[str, Any]:
    """Reads of a device's number by the host (`aten::_local_scalar_dense`, which on a GPU waits for it) and copies to the host."""
    study = load_study("fundus_ssim")
    total = steps + 1  # the first one is not counted
    plan = TrialPlan(total, tuple(study.guard_list), image_grids=False)
    settings = {"ssim_loss_weight": 10.0, "ssim_loss_max_t": 1.0, "ssim_grad_scale": 1.0, "pixel_loss_weight": 0}
    config = {**study.task_config, "steps": total, "crop": 32}
    baseline = Trial(load_task(study.task_path, study.import_path)(), plan)
    baseline.start({**config, **study.baseline_settings}, role=Role.BASELINE, device=str(device))
    baseline.advance()
    trial = Trial(load_task(study.task_path, study.import_path)(), plan)
    trial.start({**config, **settings}, baseline=Baseline([baseline.baseline_run()]), device=str(device))
    bare = load_task(study.task_path, study.import_path)()
    bare.setup({**config, **settings}, 0, str(device))
    return {
        "the step alone": transfers(bare.step, device, steps),
        "a trial with the default guards": transfers(lambda: trial.advance(1), device, steps),
    }


def transfers(action: Callable[[], Any], device: torch.device, steps: int) -> dict[str, float | None]:
    action()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        repeat(action, steps)
    counts = {event.key: event.count for event in profiler.key_averages()}
    copies = sum(count for key, count in counts.items() if "DtoH" in key)
    return {
        "host_reads_per_step": counts.get("aten::_local_scalar_dense", 0) / steps,
        "copies_to_host_per_step": copies / steps if device.type == "cuda" else None,
    }


def timed(ways: Mapping[str, Callable[[], None]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round. The order rotates."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for round_ in range(WARM_UP + rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            spent_s = seconds_of(ways[name], device)
            if round_ >= WARM_UP:
                times[name].append(spent_s)
    return times


def seconds_of(action: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        action()
        return time.perf_counter() - began_s
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    action()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def summary(times: Mapping[str, list[float]], beside: str) -> dict[str, Any]:
    """Medians in ms, and how many times as long as `beside` each of the others takes."""
    ratios = {
        name: statistics.median(b / a for a, b in zip(times[beside], found, strict=True))
        for name, found in times.items()
        if name != beside
    }
    return {"ms": {name: 1e3 * statistics.median(found) for name, found in times.items()}, f"over_{beside}": ratios}


def show(found: Mapping[str, Any], name: str, console: Console) -> None:
    table = Table("measured on " + name, "ms", "times as long")
    for row in found["ssim"]:
        table.add_row(f"SSIM forward + backward {row['shape']}", words(row["ms"]), words(row["over_ours"]))
    decoded = found["decoded"]
    table.add_row(f"decoded losses {decoded['images']}", words(decoded["ms"]), words(decoded["over_shared"]))
    console.print(table)
    watching = found["watching"]
    shares = ", ".join(f"{variant} {percent:+.2f} %" for variant, percent in watching["percent_of_a_step"].items())
    console.print(f"watching a step of {watching['step_ms']:.1f} ms, {watching['parameters']:,} parameters: {shares}")
    for which, row in found["transfers"].items():
        copies = row["copies_to_host_per_step"]
        copied = "not measured on a CPU" if copies is None else f"{copies:.2f}"
        console.print(f"{which}: {row['host_reads_per_step']:.2f} reads by the host a step, copies to the host: {copied}")


def words(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number:.2f}" for name, number in numbers.items())


if __name__ == "__main__":
    main()
