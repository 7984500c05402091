"""Grey patches of real photographs, each with its subject, cut into a training part and a spatially separate held-out part.

The photographs are in the scikit-image wheel (no download). Colours are averaged to grey, every photograph is halved
by area averaging (the large retina twice), and its grey levels are stretched between their 2nd and 98th percentile. The top
70 % of the rows train; the bottom 30 % are held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

from tune_ssim.tasks.bundled import sha256_of

PATCH = 16  # pixels
# Function of skimage.data → subject.
PHOTOS: Mapping[str, str] = {
    "brick": "brick",
    "grass": "grass",
    "gravel": "gravel",
    "coins": "coins",
    "page": "text",
    "moon": "moon",
    "chelsea": "cat",
    "camera": "photographer",
    "retina": "retina",
    "immunohistochemistry": "tissue",
    "astronaut": "astronaut",
    "coffee": "coffee",
}
SUBJECTS = tuple(PHOTOS.values())
TRAIN_ROWS = 0.7
TRAIN_STRIDE, HELD_OUT_STRIDE = 4, 8  # pixels between patches
STRETCH = (0.02, 0.98)  # quantiles of the grey levels that become 0 and 1


@dataclass(frozen=True)
class PhotoPatches:
    """`train[k]`, `held_out[k]`: `[n, 1, 16, 16]` float32 in [0, 1], every patch of photograph k."""

    train: tuple[torch.Tensor, ...]
    held_out: tuple[torch.Tensor, ...]

    def train_batch(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`[count, 1, 16, 16]` and their subjects `[count]`: every photograph is equally likely, and so is every patch of it."""
        subjects = torch.randint(len(self.train), (count,), generator=generator)
        places = torch.rand(count, generator=generator)
        rows = [int(place * len(self.train[k])) for k, place in zip(subjects.tolist(), places.tolist(), strict=True)]
        return torch.stack([self.train[k][row] for k, row in zip(subjects.tolist(), rows, strict=True)]), subjects

    def held_out_batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Fixed patches: the same number from every photograph, spread evenly over its held-out part."""
        subjects = torch.arange(count) * len(self.held_out) // count
        chosen = []
        for k, patches in enumerate(self.held_out):
            chosen.append(patches[torch.linspace(0, len(patches) - 1, int((subjects == k).sum())).round().long()])
        return torch.cat(chosen), subjects

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of all pixels of the two parts of the photographs."""
        return {"data/train": sha256_of(self.train), "data/held_out": sha256_of(self.held_out)}


@lru_cache(maxsize=1)
def load_photo_patches() -> PhotoPatches:
    """All of `PHOTOS`, decoded once per process (0.6 s)."""
    parts = [load_photo(name) for name in PHOTOS]
    return PhotoPatches(
        tuple(_patches(train, TRAIN_STRIDE) for train, _ in parts),
        tuple(_patches(held_out, HELD_OUT_STRIDE) for _, held_out in parts),
    )


def load_photo(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The training rows and the held-out rows of one of `PHOTOS`: `[H, W]` in [0, 1]."""
    from skimage import data

    pixels = np.ascontiguousarray(getattr(data, name)())
    photo = torch.from_numpy(pixels).float() / 255
    photo = photo[..., :3].mean(dim=-1) if photo.ndim == 3 else photo
    photo = functional.avg_pool2d(photo[None, None], 4 if name == "retina" else 2)[0, 0]
    dark, bright = torch.quantile(photo.flatten(), torch.tensor(STRETCH))
    photo = ((photo - dark) / (bright - dark)).clamp(0, 1)
    split = int(TRAIN_ROWS * photo.shape[0])
    return photo[:split], photo[split:]


def _patches(photo: torch.Tensor, stride: int) -> torch.Tensor:
    return photo.unfold(0, PATCH, stride).unfold(1, PATCH, stride).reshape(-1, 1, PATCH, PATCH).contiguous()
