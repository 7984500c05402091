"""An ordinary training loop: a small diffusion model sharpens pixelated photographs. `python plain_loop.py [STEPS]`

The network predicts the clean image from a noisy one, (1 - t) x + t noise, and from a coarse one: t = 0 is clean, t = 1 noise.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import torch
from skimage import data
from torch import Tensor, nn
from torch.nn import functional

CROP, CROPS_HELD_OUT = 32, 32  # pixels; number of crops that the training never sees
TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)  # at which inference stops on its way from noise to image


class Network(nn.Module):
    """(noisy `[n, 3, H, W]`, t `[n]`, coarse `[n, 3, H, W]`) → clean. What it adds to the coarse image is 0 at first."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(7, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, noisy: Tensor, t: Tensor, coarse: Tensor) -> Tensor:
        plane = t[:, None, None, None].expand(-1, 1, *noisy.shape[2:])
        return coarse + self.body(torch.cat([noisy, plane, coarse], dim=1))


def photographs() -> tuple[Tensor, Tensor]:
    """One to train on and `[n, 3, CROP, CROP]` crops of another, both in [0, 1]; they come with scikit-image."""
    train, other = (torch.from_numpy(image()).permute(2, 0, 1).float() / 255 for image in (data.astronaut, data.chelsea))
    generator = torch.Generator().manual_seed(0)
    return train, cut(other, CROPS_HELD_OUT, generator)


def cut(photograph: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`[count, 3, CROP, CROP]` at random places."""
    rows, columns = (torch.randint(size - CROP, (count,), generator=generator).tolist() for size in photograph.shape[1:])
    return torch.stack([photograph[:, r : r + CROP, c : c + CROP] for r, c in zip(rows, columns, strict=True)])


def pixelate(images: Tensor) -> Tensor:
    return functional.interpolate(halve(images), scale_factor=2)


def halve(images: Tensor) -> Tensor:
    return functional.avg_pool2d(images, 2)


def mix(images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return torch.lerp(images, noise, t[:, None, None, None])


@torch.no_grad()
def sharpen(network: Network, coarse: Tensor, noise: Tensor) -> Tensor:
    x = noise
    for t, following in pairwise(TIMES):
        clean = network(x, torch.full((len(x),), t), coarse)
        x = torch.lerp(clean, x, following / t)  # the same noise, less of it
    return x.clamp(0, 1)


def main(steps: int = 200, lr: float = 1e-3, batch_size: int = 8, seed: int = 0) -> None:
    torch.manual_seed(seed)
    photograph, held_out = photographs()
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    for n in range(1, steps + 1):
        images = cut(photograph, batch_size)
        t, noise = torch.rand(batch_size), torch.randn_like(images)
        predicted = network(mix(images, noise, t), t, pixelate(images))
        loss = functional.mse_loss(predicted, images)

        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if n % 50 == 0:
            print(f"step {n}: loss {loss.item():.5f}, gradient norm {norm.item():.3f}")
    error = (sharpen(network, pixelate(held_out), torch.randn_like(held_out)) - held_out).square().mean(dim=(1, 2, 3))
    print(f"held out: PSNR {-10 * error.log10().mean():.2f} dB")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
