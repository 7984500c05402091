"""What does the gated, shared decode save? Beside it the notes' way (note 000 §5.3): each loss decodes for itself.

    python benchmarks/decode.py [--rounds 15] [--output benchmarks/results/decode.json]

Three ways to the same losses, forward + backward through a frozen convolutional decoder, interleaved:
  shared   DecodedLoss: the samples that pass a gate, decoded once for both losses
  gated    each loss decodes its own gated samples
  full     each loss decodes the whole batch and masks afterwards
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from ssim import interleave, save
from torch import Tensor

from tune_ssim.losses import DecodedLoss, ssim_loss
from tune_ssim.tasks.fundus_networks import VAE
from tune_ssim.tasks.fundus_sr import VAE_FILE, WEIGHTS, load_weights

SSIM_WEIGHT, PIXEL_WEIGHT = 0.1, 0.05  # note 000 §5.3
BATCH, LATENT = 8, (4, 12, 12)  # 48×48 crops at f = 4


def bundled_decoder(device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """The bundled task's frozen VAE decoder."""
    vae = VAE().requires_grad_(False).eval()
    load_weights(vae, WEIGHTS / VAE_FILE)
    return vae.to(device).decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    decoder = bundled_decoder()
    rows = [measure(decoder, max_t, arguments.rounds) for max_t in (0.1, 0.3, 1.0)]
    table = Table("max_t of both", "active of 8", "shared ms", "gated ms", "full ms", "gated / shared", "full / shared")
    for row in rows:
        table.add_row(
            str(row["max_t"]),
            str(row["active"]),
            *(f"{row[name]:.1f}" for name in ("shared_ms", "gated_ms", "full_ms")),
            *(f"{row[name]:.2f}" for name in ("gated_over_shared", "full_over_shared")),
        )
    Console(width=120).print(table)
    save(arguments.output, {"decoder": VAE_FILE, "threads": arguments.threads, "rounds": arguments.rounds, "rows": rows})


def measure(decoder: Callable[[Tensor], Tensor], max_t: float, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(BATCH, *LATENT, generator=generator).requires_grad_()
    targets = torch.rand(BATCH, 3, 4 * LATENT[1], 4 * LATENT[2], generator=generator)
    t = (torch.arange(BATCH) + 0.5) / BATCH  # uniform, without the luck of the draw
    loss = DecodedLoss(SSIM_WEIGHT, max_t, pixel_loss_weight=PIXEL_WEIGHT, pixel_loss_max_t=max_t)
    active = t <= max_t

    def unit(images: Tensor) -> Tensor:
        return (images * 0.5 + 0.5).clamp(0, 1)

    def shared() -> Tensor:
        return loss(z0, t, targets, decoder).total

    def gated() -> Tensor:
        one = ssim_loss(unit(decoder(z0[active])), targets[active]).mean()
        other = (unit(decoder(z0[active])) - targets[active]).square().mean()
        return SSIM_WEIGHT * one + PIXEL_WEIGHT * other

    def full() -> Tensor:
        one = ssim_loss(unit(decoder(z0)), targets)[active].mean()
        other = (unit(decoder(z0)) - targets).square().flatten(1).mean(1)[active].mean()
        return SSIM_WEIGHT * one + PIXEL_WEIGHT * other

    ways = {"shared": shared, "gated": gated, "full": full}
    totals = [way().item() for way in ways.values()]
    assert max(totals) - min(totals) < 1e-6, totals  # the same losses, or the comparison means nothing

    def step(way: Callable[[], Tensor]) -> None:
        z0.grad = None
        way().backward()

    times = interleave([lambda way=way: step(way) for way in ways.values()], rounds)  # type: ignore[misc]
    own, per_loss, whole = times
    return {
        "max_t": max_t,
        "active": int(active.sum()),
        **{f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in zip(ways, times, strict=True)},
        "gated_over_shared": statistics.median(b / a for a, b in zip(own, per_loss, strict=True)),
        "full_over_shared": statistics.median(b / a for a, b in zip(own, whole, strict=True)),
    }


if __name__ == "__main__":
    main()
