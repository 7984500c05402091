"""Norm models with a closed form."""

from __future__ import annotations

from typing import Any

import numpy as np

from tune_ssim.probes.norm_model import NormModel


def at_right_angles(natural_gains: dict[float, float], **changes: Any) -> NormModel:
    """By max_t the gain at which the main and the SSIM gradient are equally long; they are at right angles, so
    ratio = sqrt(1 + (gain / natural)²). An infinite gain: no sample passes that gate. The pixel gradient is 1e-3 of the main."""
    q = np.zeros((len(natural_gains), 4, 3, 3))
    q[..., 0, 0], q[..., 1, 1] = 1, 1e-6
    for index, natural in enumerate(natural_gains.values()):
        q[index, :, 2, 2] = natural**-2.0
    parts: dict[str, Any] = {"max_ts": tuple(natural_gains), "q": q, "active": q[..., 2, 2] > 0, "baseline": np.ones(4)}
    return NormModel(**{**parts, "batches": (1, 2, 3, 4), "method": "gram", "held": {"ssim_grad_scale": 1.0}, **changes})
