"""Confidence intervals of paired differences between a setting and the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

LEVEL = 0.95  # confidence level of the intervals
MIN_RUNS = 2  # an interval needs two


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Mean and confidence interval (Student's t, two-sided) of paired differences, one per seed; no interval for a single seed.

    It covers the seeds, not other images: all runs are evaluated on the same held-out images."""
    from scipy.stats import t as student_t  # imported here because it takes half a second and `tune-ssim trials` does not need it

    mean = fmean(differences)
    if len(differences) < MIN_RUNS:
        return {"n": len(differences), "mean": mean, "interval": None, "level": LEVEL}
    half = float(student_t.ppf(0.5 + LEVEL / 2, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return {"n": len(differences), "mean": mean, "interval": [mean - half, mean + half], "level": LEVEL}


def exceeds(improvements: Sequence[float], least: float | None) -> bool | None:
    """Whether the true mean improvement exceeds `least`: True if the whole interval does, False if none of it does, else None.

    least None: for studies of earlier versions, which asked for a mean above zero."""
    if len(improvements) < MIN_RUNS or not all(map(math.isfinite, improvements)):
        return None
    if least is None:
        return fmean(improvements) > 0
    lower, upper = paired(improvements)["interval"]
    return True if lower > least else False if upper < least else None
