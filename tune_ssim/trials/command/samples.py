"""Samples that a smoke test command wrote to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tune_ssim.base.errors import UserError
from tune_ssim.study.command_spec import SmokeCommand
from tune_ssim.trials.training import Sample

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def read_samples(spec: SmokeCommand, out: Path, beside: Callable[[str], Path]) -> Sample:
    """The samples in the folder `out`. beside: a path of the specification → its place. Raises UserError."""
    paths = sorted(out.glob(spec.images)) if spec.images else []

    def images_of(folder: str | None) -> torch.Tensor | None:
        return read_images([beside(folder) / path.relative_to(out) for path in paths], folder) if folder else None

    examples = None
    if spec.examples is not None:
        files = sorted(path for path in beside(spec.examples).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        examples = read_images(files, spec.examples)
    return Sample(
        read_images(paths, f"{spec.images} in {{out}}") if spec.images else torch.zeros(0, 3, 1, 1),
        references=images_of(spec.references),
        reconstructions=images_of(spec.reconstructions),
        inputs=images_of(spec.inputs),
        examples=examples,
        token_ids=_read_tokens(out / spec.tokens) if spec.tokens is not None else None,
        vocabulary_size=spec.vocabulary_size,
    )


def read_images(paths: Sequence[Path], what: str) -> torch.Tensor:
    """`[n, 3, H, W]` in [0, 1]. Raises UserError for files that are not images, or differ in size."""
    import numpy as np
    from PIL import Image

    if not paths:
        raise UserError(f"smoke: no images: {what}")
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1))
        except (OSError, ValueError) as error:
            raise UserError(f"smoke: {path}: {error}") from None
    sizes = sorted({(image.shape[1], image.shape[2]) for image in images})
    if len(sizes) > 1:
        raise UserError(f"smoke: images of one size are needed, {what} has {sizes[0]} and {sizes[-1]}")
    return torch.stack(images)


def _read_tokens(path: Path) -> torch.Tensor:
    """All ids in one row. An id that cannot be decoded may be null; it becomes -1."""
    try:
        rows = json.loads(path.read_bytes())
        return torch.tensor([-1 if token is None else int(token) for row in rows for token in row])
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"smoke: {path.name}: not a JSON list of lists of token ids ({error})") from None
