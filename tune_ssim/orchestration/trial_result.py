"""The verdict that our trainable puts into the last result of a Ray trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tune_ssim.trials.summary import TrialSummary


def verdict_of(result: Mapping[str, Any]) -> tuple[TrialSummary, dict[str, Any]] | None:
    """The summary and the parameters that were in force; None before the trial's end, and for a trainable that is not ours.

    Both travel as JSON text, since Ray flattens nested dicts in a result and its loggers refuse odd values."""
    if not isinstance(result.get("summary"), str):
        return None
    return TrialSummary.from_dict(json.loads(result["summary"])), json.loads(result.get("effective") or "{}")
