"""What does watching a training step cost? Total norm every step and taps every 16th, against the same step unwatched.

    python benchmarks/probes.py [--windows 15] [--output benchmarks/results/probes.json]

Seven trainings of the same model go step by step side by side, in changing order:
  plain     forward, backward, AdamW
  watched   total_norm each step, GradientTaps every 16 steps on three modules (norms, coverage, update ratio), numbers fetched
            once in 16 steps
  norm      total_norm alone          taps      GradientTaps alone
  note      note 002 §9: a hook on every parameter, each with .item(), every step; no update ratio
  clip      plain with clip_grad_norm_, as most loops have it; what it returns is the total norm, for nothing
  clip_taps the same with GradientTaps: what watching adds to a loop that clips

A figure is the difference of a step's CPU time to that of `plain` (of clip_taps: of `clip`) at the same step, over the median step
of `plain`: the median over windows for each of the 16 places in a window, since taps work at three of them, and the mean of these.
CPU time, since other processes on a shared machine disturb wall time by more than what is measured. `self`: within the watching
lines alone.
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
BESIDE = {"watched": "plain", "norm": "plain", "taps": "plain", "note": "plain", "clip": "plain", "clip_taps": "clip"}
VARIANTS = ("plain", *BESIDE)


class Training:
    """One model, one optimiser, one way to watch."""

    def __init__(
        self, make: Callable[[], tuple[nn.Module, dict[str, nn.Module], Callable[[nn.Module], Tensor]]], variant: str
    ) -> None:
        torch.manual_seed(0)
        self.model, tags, self.loss = make()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.variant = variant
        self.taps = GradientTaps(tags, every=EVERY) if variant in ("watched", "taps", "clip_taps") else None
        self.pending: list[dict[str, Any]] = []
        self.own: list[float] = []  # seconds of each step spent watching
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
        if self.variant.startswith("clip"):
            metrics["total_norm"] = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        start = time.process_time()
        if self.variant in ("watched", "norm"):
            metrics["total_norm"] = total_norm(self.parameters)
        if self.taps is not None:
            metrics |= self.taps.read()
        self.own.append(time.process_time() - start)
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
    "bundled denoiser, batch 16": denoiser(16),
    "transformer 4×192, 4×64 tokens": transformer(192, 4, 64, 4),
    "transformer 4×192, 16×64 tokens": transformer(192, 4, 64, 16),
    "bundled denoiser, batch 1": denoiser(1),
    "transformer 2×64, 2×16 tokens": transformer(64, 2, 16, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "probes.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, make, arguments.windows) for name, make in MODELS.items()]
    table = Table("model", "parameters", "step ms", *(f"{name} %" for name in BESIDE), "self %", "self µs: norm + taps")
    for row in rows:
        costs = (f"{row['cost_percent'][name]:+.2f} ± {row['standard_error'][name]:.2f}" for name in BESIDE)
        size = f"{row['parameters']:,} in {row['tensors']}"
        more = f"{row['self_percent']:.2f}", f"{row['total_norm_us']:.0f} + {row['taps_us']:.0f}"
        table.add_row(row["model"], size, f"{row['step_cpu_ms']:.1f}", *costs, *more)
    Console(width=150).print(table)
    save(arguments.output, {"threads": 1, "every": EVERY, "windows": arguments.windows, "gpu": "not measured", "rows": rows})


def measure(name: str, make: Callable[[], Any], windows: int) -> dict[str, Any]:
    trainings = [Training(make, variant) for variant in VARIANTS]
    spent: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for step in range(1, EVERY * (windows + 1)):
        shift = step % len(VARIANTS)
        for training in trainings[shift:] + trainings[:shift]:
            start = time.process_time()
            training.step()
            spent[training.variant].append(time.process_time() - start)
    places = [range(EVERY + k, EVERY * (windows + 1) - 1, EVERY) for k in range(EVERY)]  # the first window warms up
    plain = statistics.median(spent["plain"][EVERY:])
    costs, errors = {}, {}
    for variant, beside in BESIDE.items():
        found = []
        for place in places:
            differences = [100 * (spent[variant][n] - spent[beside][n]) / plain for n in place]
            lower, middle, upper = statistics.quantiles(differences, n=4)
            found.append((middle, 0.93 * (upper - lower) / len(place) ** 0.5))  # standard error of a median
        costs[variant] = statistics.mean(middle for middle, _ in found)
        errors[variant] = sum(error**2 for _, error in found) ** 0.5 / EVERY
    watched = next(training for training in trainings if training.variant == "watched")
    own = [statistics.median(watched.own[n] for n in place) for place in places]
    parameters = trainings[0].parameters
    return {
        "model": name,
        "parameters": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "step_cpu_ms": 1e3 * plain,
        "cost_percent": costs,
        "standard_error": errors,
        "self_percent": 100 * statistics.mean(own) / plain,
        "total_norm_us": 1e6 * statistics.median(own),
        "taps_us": 1e6 * (statistics.mean(own) - statistics.median(own)),  # a step, on average
    }


if __name__ == "__main__":
    main()
