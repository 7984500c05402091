"""What does watching a training step cost? Total norm every step and taps every 16th, against the same step unwatched.

    python benchmarks/probes.py [--windows 15] [--output benchmarks/results/probes.json]

Five trainings of the same model go step by step side by side, in changing order:
  plain     forward, backward, AdamW
  watched   total_norm each step, GradientTaps every 16 steps on three modules (norms, coverage, update ratio), numbers fetched
            once in 16 steps
  norm      total_norm alone          taps      GradientTaps alone
  note      note 002 §9: a hook on every parameter, each with .item(), every step; no update ratio

A figure is the median over windows of 16 steps of the CPU time of a window over that of `plain` in the same window. CPU time, since
other processes on a shared machine disturb wall time by more than what is measured; wall time is recorded beside it.
No GPU was measured: there `.item()` also waits for the device, and total_norm and taps do not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from ssim import save
from torch import Tensor, nn

from tune_ssim.probes import GradientTaps, total_norm
from tune_ssim.tasks.fundus_networks import Denoiser

EVERY = 16
VARIANTS = ("plain", "watched", "norm", "taps", "note")


class Training:
    """One model, one optimiser, one way to watch."""

    def __init__(
        self, make: Callable[[], tuple[nn.Module, dict[str, nn.Module], Callable[[nn.Module], Tensor]]], variant: str
    ) -> None:
        torch.manual_seed(0)
        self.model, tags, self.loss = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.variant = variant
        self.taps = GradientTaps(tags, every=EVERY) if variant in ("watched", "taps") else None
        self.pending: list[dict[str, Any]] = []
        self.squares: dict[str, float] = {}
        if variant == "note":
            for tag, module in tags.items():
                for parameter in module.parameters():
                    parameter.register_hook(lambda gradient, tag=tag: self._note(tag, gradient))

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.loss(self.model)
        loss.backward()
        metrics: dict[str, Any] = {"loss": loss.detach()}
        if self.variant in ("watched", "norm"):
            metrics["total_norm"] = total_norm(self.model.parameters())
        if self.taps is not None:
            metrics |= self.taps.read()
        if self.squares:
            metrics |= {tag: square**0.5 for tag, square in self.squares.items()}
            self.squares = {}
        self.optimizer.step()
        self.pending.append(metrics)
        if len(self.pending) == EVERY:  # every variant fetches its numbers in one go
            torch.stack([v.double() for m in self.pending for v in m.values() if isinstance(v, Tensor)]).tolist()
            self.pending = []

    def _note(self, tag: str, gradient: Tensor) -> None:
        self.squares[tag] = self.squares.get(tag, 0.0) + gradient.detach().float().pow(2).sum().item()


def denoiser(batch: int) -> Callable[[], Any]:
    """The bundled task's denoiser (331k parameters) on 48×48 crops: 12×12 latents."""

    def make() -> Any:
        model = Denoiser()
        z, t, low = torch.randn(batch, 4, 12, 12), torch.rand(batch), torch.rand(batch, 3, 12, 12)
        children = [child for child in model.children() if next(child.parameters(), None) is not None]
        third = -(-len(children) // 3)
        tags = {f"part{k}": nn.ModuleList(children[k * third : (k + 1) * third]) for k in range(3)}
        return model, tags, lambda model: model(z, t, low).square().mean()

    return make


def transformer(width: int, layers: int, tokens: int, batch: int) -> Callable[[], Any]:
    def make() -> Any:
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        model = nn.ModuleDict(
            {"body": nn.TransformerEncoder(layer, layers), "mu": nn.Linear(width, 8), "log_var": nn.Linear(width, 8)}
        )
        x = torch.randn(batch, tokens, width)

        def loss(model: Any) -> Tensor:
            hidden = model["body"](x)
            return model["mu"](hidden).square().mean() + model["log_var"](hidden).exp().mean()

        return model, dict(model.items()), loss

    return make


MODELS = {
    "bundled denoiser, batch 8": denoiser(8),
    "transformer 6×256, 4×128 tokens": transformer(256, 6, 128, 4),
    "bundled denoiser, batch 1": denoiser(1),
    "transformer 2×64, 2×16 tokens": transformer(64, 2, 16, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "probes.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, make, arguments.windows) for name, make in MODELS.items()]
    table = Table("model", "parameters", "step ms", *(f"{name} %" for name in VARIANTS[1:]))
    for row in rows:
        costs = (
            f"{row['cost_percent'][name]:+.2f} ({' … '.join(f'{q:+.2f}' for q in row['quartiles'][name])})" for name in VARIANTS[1:]
        )
        table.add_row(row["model"], f"{row['parameters']:,} in {row['tensors']}", f"{row['step_cpu_ms']:.1f}", *costs)
    Console(width=150).print(table)
    save(arguments.output, {"threads": 1, "every": EVERY, "windows": arguments.windows, "gpu": "not measured", "rows": rows})


def measure(name: str, make: Callable[[], Any], windows: int) -> dict[str, Any]:
    trainings = [Training(make, variant) for variant in VARIANTS]
    cpu: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    wall: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for window in range(-1, windows):  # the first warms up
        spent = {variant: [0.0, 0.0] for variant in VARIANTS}
        for k in range(EVERY):
            shift = (k + window) % len(VARIANTS)
            for training in trainings[shift:] + trainings[:shift]:
                start = time.process_time(), time.perf_counter()
                training.step()
                spent[training.variant][0] += time.process_time() - start[0]
                spent[training.variant][1] += time.perf_counter() - start[1]
        if window >= 0:
            for variant in VARIANTS:
                cpu[variant].append(spent[variant][0])
                wall[variant].append(spent[variant][1])
    costs = {v: [100 * (b / a - 1) for a, b in zip(cpu["plain"], cpu[v], strict=True)] for v in VARIANTS[1:]}
    parameters = list(trainings[0].model.parameters())
    return {
        "model": name,
        "parameters": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "step_cpu_ms": 1e3 * statistics.median(cpu["plain"]) / EVERY,
        "step_wall_ms": 1e3 * statistics.median(wall["plain"]) / EVERY,
        "cost_percent": {v: statistics.median(c) for v, c in costs.items()},
        "quartiles": {v: statistics.quantiles(c, n=4)[::2] for v, c in costs.items()},
        "cost_percent_wall": {
            v: statistics.median(100 * (b / a - 1) for a, b in zip(wall["plain"], wall[v], strict=True)) for v in VARIANTS[1:]
        },
        "cost_us_a_step": {
            v: 1e6 * statistics.median(b - a for a, b in zip(cpu["plain"], cpu[v], strict=True)) / EVERY for v in VARIANTS[1:]
        },
    }


if __name__ == "__main__":
    main()
