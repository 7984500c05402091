"""Crops of one real photograph, cut into a training part and a spatially separate held-out part.

The study's image is `skimage.data.retina()` (1411 x 1411 RGB, CC0, inside the scikit-image wheel: no download), halved
by area averaging to 705 x 705. The top 70 % of the rows train; the bottom 30 % are held out. Other images of the same
wheel represent a user's own data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

from tune_ssim.base.errors import UserError
from tune_ssim.tasks.bundled import sha256_of

CROP = 48  # pixels; 12 x 12 latents behind an f = 4 autoencoder
IMAGES = ("retina", "immunohistochemistry", "microaneurysms", "astronaut", "coffee", "chelsea")  # all in the wheel
FACTOR = 4  # super-resolution factor: the low-resolution input is CROP / FACTOR wide
LOW_RES_NOISE = 0.03  # standard deviation added to the low-resolution input, on the [0, 1] scale
TRAIN_ROWS = 0.7
BACKGROUND = 0.06  # a pixel whose brightest channel is below this lies outside the camera's round field of view
MAX_BACKGROUND = 0.05  # share of such pixels that a crop may have


@dataclass(frozen=True)
class FundusImages:
    """`train`, `held_out`: `[3, H, W]` float32 in [0, 1]; `*_origins`: `[n, 2]` valid top-left (row, column) of crops.
    `crop`: their size in pixels."""

    train: torch.Tensor
    held_out: torch.Tensor
    train_origins: torch.Tensor
    held_out_origins: torch.Tensor
    crop: int = CROP

    def train_crops(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`[count, 3, crop, crop]` in [0, 1], drawn uniformly with replacement, flipped at random."""
        rows = torch.randint(len(self.train_origins), (count,), generator=generator)
        return flipped(cut(self.train, self.train_origins[rows], self.crop), generator)

    def held_out_crops(self, count: int) -> torch.Tensor:
        """`[count, 3, crop, crop]`: fixed crops, spread evenly over the held-out part."""
        rows = torch.linspace(0, len(self.held_out_origins) - 1, count).round().long()
        return cut(self.held_out, self.held_out_origins[rows], self.crop)

    def held_out_sources(self, count: int) -> list[int]:
        """Index of the image that each held-out crop is cut from."""
        return [0] * count

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of all pixels and crop origins of the two parts."""
        parts = {"data/train": (self.train, self.train_origins), "data/held_out": (self.held_out, self.held_out_origins)}
        return {name: sha256_of(tensors) for name, tensors in parts.items()}


def cut(image: torch.Tensor, origins: torch.Tensor, crop: int) -> torch.Tensor:
    """Crops of `image` `[3, H, W]` at `origins` `[n, 2]` → `[n, 3, crop, crop]`."""
    return torch.stack([image[:, r : r + crop, c : c + crop] for r, c in origins.tolist()])


def flipped(crops: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`[n, 3, H, W]`, each mirrored with probability 1/2 in either direction."""
    flip = torch.rand(len(crops), 2, generator=generator) < 0.5
    crops = torch.where(flip[:, 0, None, None, None], crops.flip(-1), crops)
    return torch.where(flip[:, 1, None, None, None], crops.flip(-2), crops)


def low_resolution(images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """The degraded input: `FACTOR`-fold average pooling of `[n, 3, H, W]`, plus `noise` of the pooled shape if given."""
    pooled = functional.avg_pool2d(images, FACTOR)
    return pooled if noise is None else pooled + LOW_RES_NOISE * noise


def _origins(image: torch.Tensor, crop: int) -> torch.Tensor:
    outside = (image.amax(dim=0, keepdim=True) < BACKGROUND).float()
    share = functional.avg_pool2d(outside[None], crop, stride=1)[0, 0]
    return (share <= MAX_BACKGROUND).nonzero()


@lru_cache(maxsize=2)
def load_fundus_images(image: str = "retina", crop: int = CROP) -> FundusImages:
    """One of `IMAGES`, decoded once per process (0.2 s). Raises UserError if it is too small for crops of this size."""
    from skimage import data

    pixels = np.asarray(getattr(data, image)())
    photo = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255
    photo = photo[None].expand(3, -1, -1).contiguous() if photo.ndim == 2 else photo.permute(2, 0, 1)
    if image == "retina":
        photo = functional.avg_pool2d(photo[None], 2)[0]  # 1411 -> 705
    split = int(TRAIN_ROWS * photo.shape[1])
    train, held_out = photo[:, :split].contiguous(), photo[:, split:].contiguous()
    if min(held_out.shape[1:]) < crop:
        raise UserError(f"fundus_sr: image {image!r} holds out {held_out.shape[1]} x {held_out.shape[2]} pixels; crop is {crop}")
    return FundusImages(train, held_out, _origins(train, crop), _origins(held_out, crop), crop)
