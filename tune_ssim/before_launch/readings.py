"""Readings of total_norm: the first batches of a training at one configuration, with its update switched off."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.probes.norm_model import Array
from tune_ssim.records import ACTIVE_FRACTION, TOTAL_NORM
from tune_ssim.trials.training import Training


@dataclass(frozen=True)
class Reading:
    """norms, active_fraction (NaN where it is not reported): `[batch]`. step_s: seconds a step took. max_grad_norm: at which a
    command was seen to clip its gradients."""

    norms: Array
    active_fraction: Array
    step_s: float
    max_grad_norm: float | None = None


Reader = Callable[[Sequence[Mapping[str, Any]], int], list[Reading]]
"""Takes (configurations, number of batches) and returns a reading for each configuration, in their order."""


def read_here(
    set_up: Callable[[Mapping[str, Any]], Training],
    disable_update: Mapping[str, Any],
    configs: Sequence[Mapping[str, Any]],
    batches: int,
) -> list[Reading]:
    """Reads a training in this process, one configuration after the other. Raises BadSetup if its weights change."""
    return [_read(set_up(config), disable_update, batches) for config in configs]


def _read(task: Training, disable_update: Mapping[str, Any], batches: int) -> Reading:
    before = _weights_of(task)
    norms, active = [], []
    started = time.perf_counter()
    for _ in range(batches):
        metrics = task.step() or {}
        if TOTAL_NORM not in metrics:
            raise UserError(f"calibration: the task's step() reports no {TOTAL_NORM}; saw {', '.join(metrics)}")
        norms.append(float(metrics[TOTAL_NORM]))
        if before is not None and not math.isfinite(norms[-1]):
            _restore(task, before)  # a learning rate of 0 times a gradient of NaN is a weight of NaN
        active.append(float(metrics.get(ACTIVE_FRACTION, math.nan)))
    step_s = (time.perf_counter() - started) / batches
    if before is not None and any(not torch.equal(a, b) for a, b in zip(before, _weights_of(task) or [], strict=True)):
        words = f"with {disable_update} the training still changed the weights"
        raise BadSetup(f"calibration: {words}: say in calibration.disable_update how its update is switched off")
    return Reading(np.asarray(norms), np.asarray(active), step_s)


def _weights_of(task: Training) -> list[torch.Tensor] | None:
    """A copy on the host, to detect changes; None if the task does not show them."""
    if not task.abilities().trainable_parameters:
        return None
    return [p.detach().cpu().clone() for p in task.trainable_parameters()]


def _restore(task: Training, weights: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, weight in zip(task.trainable_parameters(), weights, strict=True):
            parameter.copy_(weight)
