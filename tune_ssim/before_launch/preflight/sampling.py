"""Checks of inference: it repeats, it generates, and it follows the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tune_ssim.before_launch.preflight import rules
from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.before_launch.preflight.subject import call
from tune_ssim.trials.training import Sample

CHANGE = 0.1  # of a weight, relative: changes any sample


def check_sampling(task: Any, sample: Sample) -> Iterator[Check]:
    """Checks that the samples are the same when they are drawn again, and no copy of what they are compared with."""
    again: Sample = call(task, "sample", 0)
    others = {"references": sample.references, "reconstructions": sample.reconstructions}
    distances = {name: distance(sample.images, images) for name, images in others.items() if images is not None}
    floor = None
    if sample.references is not None and sample.reconstructions is not None:
        floor = distance(sample.reconstructions, sample.references)
    yield rules.samples(distance(sample.images, again.images), distances, floor)


def follows_weights(task: Any, parameters: Iterable[Tensor], before: Sample) -> bool:
    """Whether samples change with the weights. If the steps since `before` have not changed them, the weights are changed by force,
    and one more step taken, which updates averaged weights."""
    if not torch.equal(call(task, "sample", 0).images, before.images):
        return True
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1 + CHANGE)
    call(task, "step")
    return not torch.equal(call(task, "sample", 0).images, before.images)


def distance(x: Tensor, y: Tensor) -> float:
    """Root mean square difference of images in [0, 1]; infinite if they have other shapes or are not finite."""
    if x.shape != y.shape:
        return float("inf")
    found = (x.float() - y.to(x.device).float()).square().mean().sqrt().item()
    return found if found == found else float("inf")
