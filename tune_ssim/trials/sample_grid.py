"""Draws a `Sample` as a picture: input, target, autoencoder and sample, one column per image."""

from __future__ import annotations

import io

import torch
from torch.nn import functional

from tune_ssim.trials.training import Sample

COLUMNS, GAP, ENLARGE = 8, 2, 2


def draw_grid(sample: Sample) -> bytes:
    """PNG of the first 8 images. Rows, where available: input (nearest neighbour), target, VAE, sample.

    Non-finite pixels are magenta."""
    from PIL import Image

    size = sample.images.shape[-2:]
    rows = [sample.inputs, sample.references, sample.reconstructions, sample.images]
    grid = torch.cat([_row(images, size) for images in rows if images is not None], dim=1)
    pixels = (grid[:, GAP:, GAP:] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels).resize((pixels.shape[1] * ENLARGE, pixels.shape[0] * ENLARGE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _row(images: torch.Tensor, size: torch.Size) -> torch.Tensor:
    images = images[:COLUMNS].detach().float().cpu()
    if images.shape[-2:] != size:
        images = functional.interpolate(images, size=size, mode="nearest")
    broken = ~torch.isfinite(images).all(dim=1, keepdim=True)
    magenta = torch.tensor([1.0, 0.0, 1.0])[None, :, None, None]
    images = torch.where(broken, magenta, images.nan_to_num().clamp(0, 1))
    padded = functional.pad(images, (GAP, 0, GAP, 0), value=1.0)
    return torch.cat(list(padded), dim=2)
