"""Checks of the result of `sample()` or `sample_ema()`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tune_ssim.before_launch.preflight.report import Check, broken, warn
from tune_ssim.before_launch.preflight.subject import describe_error
from tune_ssim.testing.metrics import describe_kind
from tune_ssim.trials.sample_check import kind_problem, statistics_of
from tune_ssim.trials.training import Sample

# Tolerance outside [0, 1]: rounding of a clamp in half precision; a noisy low-resolution input may leave it a little more.
SLACK = {"images": 1e-4, "references": 1e-4, "reconstructions": 1e-4, "inputs": 0.5}


def check_sample(name: str, sample: Any) -> Iterator[Check]:
    """Checks the result of one call of `sample()` or `sample_ema()`."""
    if not isinstance(sample, Sample):
        remedy = "return tune_ssim.Sample(images, references, inputs)"
        yield broken(name, f"{name}() returned {describe_kind(sample)}", remedy)
        return
    if problem := kind_problem(sample):
        part, words = problem
        remedy = "return a tensor of integers" if part == "token_ids" else _remedy(getattr(sample, part))
        yield broken(f"{name}/{part}", f"{part} {words}", remedy)
        return
    problems = [check for part, slack in SLACK.items() for check in _check_range(name, part, getattr(sample, part), slack)]
    if sample.reconstructions is not None and sample.reconstructions.shape != sample.images.shape:
        sentence = f"reconstructions are {list(sample.reconstructions.shape)}, images are {list(sample.images.shape)}"
        problems.append(broken(f"{name}/reconstructions", sentence, _remedy(sample.reconstructions)))
    if sample.token_ids is not None and sample.vocabulary_size is None:
        problems.append(broken(f"{name}/token_ids", "token_ids without vocabulary_size", "return vocabulary_size too"))
    yield from problems
    if problems:
        return
    if sample.references is None and sample.inputs is None:
        sentence = f"{name}() has neither references nor inputs: only flat or noisy images can be recognised"
        remedy = "return the ground truth of fixed held-out crops as references, or the low-resolution inputs"
        yield warn(f"{name}/references", sentence, remedy)
    try:
        statistics_of(sample)
    except Exception as error:
        yield broken(name, f"the samples cannot be judged: {describe_error(error)}", "see tune_ssim.Sample for shapes and ranges")


def _remedy(images: Any) -> str:
    """What to do about images of the wrong kind."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        return "return a float tensor [n, channels, height, width], also for one image: x[None]"
    if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        return "channels last: images.permute(0, 3, 1, 2)"
    if not images.is_floating_point():
        return "images.float() / 255, in [0, 1]"
    return "references and reconstructions are the same crops in the same size; an input is one of a sample, and not larger"


def _check_range(name: str, part: str, images: torch.Tensor | None, slack: float) -> Iterator[Check]:
    finite = torch.empty(0) if images is None else images.detach()[torch.isfinite(images)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if low >= -slack and high <= 1 + slack:
        return
    remedy = "images.clamp(0, 1)"
    if high > 2:
        remedy = "divide by 255 and clamp(0, 1)"
    elif low < -0.5:
        remedy = "map [-1, 1] to [0, 1]: (images * 0.5 + 0.5).clamp(0, 1)"
    yield broken(f"{name}/{part}", f"{part} are in [{low:.3g}, {high:.3g}], not in [0, 1]", remedy)
