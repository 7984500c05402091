"""Statistics by which a `Sample` is judged, and checks that it can be: no verdict blames the model for a user's mistake."""

from __future__ import annotations

from typing import Any

import torch

from tune_ssim.base.errors import UserError
from tune_ssim.probes import collapse_statistics
from tune_ssim.trials.training import Sample

# Beyond [0, 1]: decoders, bicubic resampling and noise on an input overshoot by less; of images in [-1, 1] or 0..255 nearly every
# one has a pixel further out.
OVERSHOOT = 0.5
WANTED = "float [n, 3, height, width] in [0, 1]"


def statistics_of(sample: Sample) -> dict[str, float]:
    """All statistics by which a sample is judged: those of collapse and those of the task."""
    found: dict[str, float] = {}
    if len(sample.images):
        found = collapse_statistics(
            sample.images,
            references=sample.references,
            inputs=sample.inputs,
            reconstructions=sample.reconstructions,
            examples=sample.examples,
        )
    if sample.token_ids is not None and sample.vocabulary_size is not None:
        ids = sample.token_ids
        outside = (ids < 0) | (ids >= sample.vocabulary_size)  # SEEDS B1: such an id decodes to None
        found["undecodable_fraction"] = outside.double().mean().item() if ids.numel() else 0.0
    return {**found, **sample.statistics}


def require_kind(sample: Sample) -> None:
    """Raises UserError for a `kind_problem`."""
    if problem := kind_problem(sample):
        raise UserError(f"samples: {' '.join(problem)}")


def kind_problem(sample: Sample) -> tuple[str, str] | None:
    """The first field that is not what it must be, and why: images that are not float tensors `[n, 3 or 1, H, W]` or whose shapes
    do not match, tokens that are not integers. Nothing is copied from a device unless there is a problem. A text-only sample has no
    images."""
    ids, images = sample.token_ids, sample.images
    if ids is not None and (not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.is_complex()):
        return "token_ids", f"must be a tensor of integers, got {_describe(ids)}"
    if isinstance(images, torch.Tensor) and images.ndim and not len(images):
        return None
    for name in ("images", "references", "inputs", "reconstructions", "examples"):
        found = getattr(sample, name)
        if (found is not None or name == "images") and not _are_images(found):
            return name, f"must be {WANTED}, got {_describe(found)}"
    for name, beside in (("references", sample.references), ("inputs", sample.inputs)):
        if beside is None:
            continue
        if len(beside) not in (1, len(images)) or (name == "references" and beside.shape[-2:] != images.shape[-2:]):
            like = "of the number and size of the images" if name == "references" else "one an image"
            return name, f"must be {like}, got {list(beside.shape)} beside images {list(images.shape)}"
    return None


def _are_images(found: Any) -> bool:
    is_float = isinstance(found, torch.Tensor) and found.is_floating_point()
    return is_float and found.ndim == 4 and found.shape[1] in (1, 3) and found.numel() > 0


def require_range(sample: Sample) -> str:
    """Raises UserError for real images (not generated) far outside [0, 1]. Returns a warning, or "".

    Generated images are never refused for their range: a ruined model may give any value, NaN included, and the smoke test judges
    that. The warning mentions that a different value range would explain it too."""
    for name in ("references", "inputs", "examples"):
        real = getattr(sample, name)
        if real is not None and len(sample.images) and _is_far_out(real):
            raise UserError(f"samples: {name} must be {WANTED} (they may be up to {OVERSHOOT:g} beyond), got {_describe(real)}")
    if _is_far_out(sample.images):
        return (
            f"samples: images should be {WANTED}, got {_describe(sample.images)}: in another range, or of a model that is ruined?"
        )
    return ""


def _is_far_out(images: torch.Tensor) -> bool:
    return bool(((images < -OVERSHOOT) | (images > 1 + OVERSHOOT)).any())  # NaN compares false


def _describe(found: Any) -> str:
    """E.g. `uint8 [4, 3, 32, 32] from 0 to 255`."""
    if not isinstance(found, torch.Tensor):
        shape = getattr(found, "shape", None)
        kind = f"{type(found).__module__}.{type(found).__name__}".removeprefix("builtins.")
        return kind if shape is None else f"{kind} {getattr(found, 'dtype', '')} {list(shape)}"
    described = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    if found.is_complex():
        return described
    finite = found.detach().double().flatten()
    finite = finite[torch.isfinite(finite)]
    return f"{described} from {finite.min().item():.4g} to {finite.max().item():.4g}" if len(finite) else described
