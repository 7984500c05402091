"""How fast is `tune_ssim.losses.ssim` beside pytorch-msssim? Both in one process, interleaved, on the same tensors.

    python benchmarks/ssim.py [--rounds 21] [--output benchmarks/results/ssim.json]

Ratios are medians of per-round ratios (theirs / ours), so that load from other processes falls on both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_msssim import ssim as msssim_ssim
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tune_ssim.losses import ssim

SHAPES = [(8, 3, 64, 64), (4, 3, 256, 256)]
THREADS = [1, 2]
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ssim.json")
    arguments = parser.parse_args()
    rows = [
        measure(threads, shape, backward, arguments.rounds) for threads in THREADS for shape in SHAPES for backward in (False, True)
    ]
    table = Table("threads", "shape", "pass", "ours ms", "pytorch-msssim ms", "ratio (quartiles)", "max |difference|")
    for row in rows:
        table.add_row(
            str(row["threads"]),
            "×".join(map(str, row["shape"])),
            row["pass"],
            f"{row['ours_ms']:.2f}",
            f"{row['pytorch_msssim_ms']:.2f}",
            f"{row['ratio']:.2f} ({row['ratio_quartiles'][0]:.2f}–{row['ratio_quartiles'][1]:.2f})",
            f"{row['max_abs_difference']:.1e}",
        )
    Console(width=120).print(table)
    save(
        arguments.output,
        {"rounds": arguments.rounds, "rows": rows, "versions": {"pytorch-msssim": version("pytorch-msssim")}},
    )


def measure(threads: int, shape: tuple[int, ...], backward: bool, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).requires_grad_(backward)
    y = (0.7 * x.detach() + 0.3 * torch.rand(shape, generator=generator)).clamp(0, 1)

    def theirs(x: Tensor, y: Tensor) -> Tensor:
        return msssim_ssim(x, y, data_range=1.0, size_average=False)

    difference = (ssim(x, y) - theirs(x, y)).abs().max().item()
    times = interleave([lambda: run(ssim, x, y), lambda: run(theirs, x, y)], rounds)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "threads": threads,
        "shape": list(shape),
        "pass": "forward+backward" if backward else "forward",
        "ours_ms": 1e3 * statistics.median(times[0]),
        "pytorch_msssim_ms": 1e3 * statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "max_abs_difference": difference,
    }


def run(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    value = (1 - function(x, y)).mean()
    if x.requires_grad:
        x.grad = None
        value.backward()


def interleave(calls: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each call in each round; who goes first alternates."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(WARM_UP + rounds):
        for j in range(len(calls)) if i % 2 == 0 else reversed(range(len(calls))):
            start = time.perf_counter()
            calls[j]()
            if i >= WARM_UP:
                times[j].append(time.perf_counter() - start)
    return times


def save(path: Path, result: dict[str, Any]) -> None:
    """Write `result` with the hardware, the versions and the commit it was measured on."""
    result = {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "tune_ssim/losses")),
        "hardware": {"cpu": cpu_model(), "logical_cpus": os.cpu_count(), "load_average_1min": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **result.pop("versions", {})},
        **result,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written(result))


def written(result: dict[str, Any]) -> str:
    """JSON, with each item of a long list on a line of its own."""
    long = {key: value for key, value in result.items() if isinstance(value, list) and len(value) > 20}
    text = json.dumps({**result, **{key: f"<{key}>" for key in long}}, indent=2, ensure_ascii=False)
    for key, items in long.items():
        lines = ",\n    ".join(json.dumps(item, ensure_ascii=False) for item in items)
        text = text.replace(f'"<{key}>"', f"[\n    {lines}\n  ]")
    return text + "\n"


def git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
