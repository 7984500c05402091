"""The model that `train.py` trains: the bundled denoiser, and a head that says four tokens about the low-resolution image."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from tune_ssim.tasks.fundus_images import CROP, FACTOR
from tune_ssim.tasks.fundus_networks import Denoiser

VOCABULARY, TOKENS = 8, 4


class SmallBagel(nn.Module):
    """`(z_t [n, 4, h, w], t [n], low [n, 3, h, w])` → velocity `[n, 4, h, w]` and token logits `[n, TOKENS, VOCABULARY]`."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser()
        self.language = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * (CROP // FACTOR) ** 2, 64), nn.SiLU(), nn.Linear(64, TOKENS * VOCABULARY)
        )

    def forward(self, z_t: torch.Tensor, t: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.denoiser(z_t, t, low), self.language(low).view(-1, TOKENS, VOCABULARY)


def crop_tokens(crops: torch.Tensor) -> torch.Tensor:
    """What there is to say about crops in [0, 1]: the brightness of their quadrants in `VOCABULARY` steps, `[n, TOKENS]`."""
    brightness = functional.adaptive_avg_pool2d(crops.mean(dim=1, keepdim=True), 2).flatten(1)
    return (brightness * VOCABULARY).long().clamp(0, VOCABULARY - 1)


def save_model(model: nn.Module, path: Path) -> None:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path, metadata={"format": "pt"})


def load_model(model: nn.Module, path: Path, logger: logging.Logger) -> None:
    """Not strict, and what does not fit is only logged: BAGEL's way, and the reason why effects are tested and not flags."""
    found = model.load_state_dict(load_file(path), strict=False)
    logger.info(f"Loaded {path}: missing {found.missing_keys}, unexpected {found.unexpected_keys}")
