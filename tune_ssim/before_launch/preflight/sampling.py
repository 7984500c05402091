"""Checks of inference: it repeats, it generates, and it follows the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    if sample.references is not None and len(sample.references) > 1:
        yield rules.distinct_references(len(sample.references.flatten(1).unique(dim=0)), len(sample.references))
    again: Sample = call(task, "sample", 0)
    others = {"references": sample.references, "reconstructions": sample.reconstructions}
    distances = {name: distance(sample.images, images) for name, images in others.items() if images is not None}
    floor = None
    if sample.references is not None and sample.reconstructions is not None:
        floor = distance(sample.reconstructions, sample.references)
    yield rules.samples(distance(sample.images, again.images), distances, floor)


def check_weights(task: Any, parameters: Sequence[Tensor], before: Sample) -> Iterator[Check]:
    """Checks that samples change with the weights, and that inference leaves these as they are. If the steps since `before` have
    not changed the samples, the weights are changed by force, and one more step taken, which updates averaged weights."""
    kept = [parameter.detach().clone() for parameter in parameters]
    follow = not torch.equal(call(task, "sample", 0).images, before.images)
    if task.abilities().sample_ema:
        call(task, "sample_ema", 0)
    if any(not torch.equal(old, parameter.detach()) for old, parameter in zip(kept, parameters, strict=True)):
        remedy = "put the trained weights back after inference with averaged ones"
        yield Check("sampling/weights", "bad_setup", "inference changes the weights that are trained", {}, remedy)
        return
    if not follow:
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1 + CHANGE)
        call(task, "step")
        follow = not torch.equal(call(task, "sample", 0).images, before.images)
    yield rules.samples_follow(follow)


def distance(x: Tensor, y: Tensor) -> float:
    """Root mean square difference of images in [0, 1]; infinite if they have other shapes or are not finite."""
    if x.shape != y.shape:
        return float("inf")
    found = (x.float() - y.to(x.device).float()).square().mean().sqrt().item()
    return found if found == found else float("inf")
