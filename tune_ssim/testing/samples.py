"""Checks of the result of `sample()` or `sample_ema()`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.before_launch.preflight.subject import describe_error
from tune_ssim.testing.findings import broken, warn
from tune_ssim.trials.training import Sample
from tune_ssim.trials.trial import statistics_of

SLACK = 1e-4  # tolerance outside [0, 1]: rounding of a clamp in half precision


def check_sample(name: str, sample: Any) -> Iterator[Check]:
    """Checks the result of one call."""
    if not isinstance(sample, Sample):
        kind = "nothing (None)" if sample is None else f"a {type(sample).__name__}"
        yield broken(name, f"{name}() returned {kind}", "return tune_ssim.Sample(images, references, inputs)")
        return
    problems = []
    shape = list(sample.images.shape) if isinstance(sample.images, torch.Tensor) else []
    for part in ("images", "references", "inputs", "reconstructions"):
        images = getattr(sample, part)
        if images is None and part != "images":
            continue
        # A noisy low-resolution input may leave [0, 1] a little.
        if problem := _picture_problem(images, slack=0.5 if part == "inputs" else SLACK):
            problems.append(broken(f"{name}/{part}", f"{part} {problem[0]}", problem[1]))
        elif part in ("references", "reconstructions") and list(images.shape) != shape:
            sentence = f"{part} is {list(images.shape)}, images is {shape}"
            remedy = "they are compared pixel by pixel: give the same crops in the same size"
            problems.append(broken(f"{name}/{part}", sentence, remedy))
        elif part == "inputs" and shape and (len(images) != shape[0] or images.shape[-1] > shape[-1]):
            sentence = f"inputs is {list(images.shape)}, images is {shape}"
            remedy = "give one input a sample, not larger than it: the sample is averaged down to the input's size"
            problems.append(broken(f"{name}/inputs", sentence, remedy))
    if sample.token_ids is not None and sample.vocabulary_size is None:
        problems.append(broken(f"{name}/token_ids", "token_ids without vocabulary_size", "say vocabulary_size"))
    yield from problems
    if problems:
        return
    if sample.references is None and sample.inputs is None:
        yield warn(
            f"{name}/references",
            f"{name}() has neither references nor inputs: only flat or noisy images can be recognised",
            "return the ground truth of fixed held-out crops as references, or the low-resolution inputs",
        )
    try:
        statistics_of(sample)
    except Exception as error:
        yield broken(name, f"the samples cannot be judged: {describe_error(error)}", "see tune_ssim.Sample for shapes and ranges")


def _picture_problem(images: Any, slack: float) -> tuple[str, str] | None:
    """(problem, remedy) of a batch of images."""
    if not isinstance(images, torch.Tensor):
        return f"is a {type(images).__name__}", "return a float tensor [n, channels, height, width]"
    if images.ndim != 4 or not len(images):
        return (
            f"has shape {list(images.shape)}, not [n, channels, height, width]",
            "return a batch of images, also for one: x[None]",
        )
    if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        return f"has shape {list(images.shape)}: channels last", "images.permute(0, 3, 1, 2)"
    if not images.is_floating_point():
        return f"is {str(images.dtype).removeprefix('torch.')}", "images.float() / 255, in [0, 1]"
    finite = images.detach()[torch.isfinite(images)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if low >= -slack and high <= 1 + slack:
        return None
    if high > 2:
        remedy = "divide by 255 and clamp(0, 1)"
    elif low < -0.5:
        remedy = "map [-1, 1] to [0, 1]: (images * 0.5 + 0.5).clamp(0, 1)"
    else:
        remedy = "images.clamp(0, 1)"
    return f"lies in [{low:.3g}, {high:.3g}], not in [0, 1]", remedy
