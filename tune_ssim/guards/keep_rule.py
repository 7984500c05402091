"""What may not get worse than the baseline: the margins between `safe` and `degraded`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

SHOWN_NAMES = {"psnr": "PSNR", "ssim": "SSIM"}


@dataclass(frozen=True)
class KeepRule:
    """A held-out metric (or a family, `flow_loss_bins` for `flow_loss_bins/0` …) that may not get worse than this.

    Exactly one limit, against the baseline: a difference (`min_delta`, `max_delta`) or a quotient (`min_ratio`, `max_ratio`)."""

    metric: str
    min_delta: float | None = None
    max_delta: float | None = None
    min_ratio: float | None = None
    max_ratio: float | None = None

    def broken_by(self, found: Mapping[str, float], baseline: Mapping[str, float]) -> tuple[str, float, float, str] | None:
        """(metric, value, limit, sentence) of the first breach; NaN is a breach."""
        for name, value in found.items():
            if name != self.metric and not name.startswith(self.metric + "/"):
                continue
            if name not in baseline:
                continue
            reference = baseline[name]
            delta, ratio = value - reference, value / reference if reference else math.inf
            for limit, measured, is_lower, words in (
                (self.min_delta, delta, True, "{name} {delta:+.4g} against the baseline (at least {limit:+g})"),
                (self.max_delta, delta, False, "{name} {delta:+.4g} against the baseline (at most {limit:+g})"),
                (self.min_ratio, ratio, True, "{name} {ratio:.3g}x the baseline's (at least {limit:g}x)"),
                (self.max_ratio, ratio, False, "{name} {ratio:.3g}x the baseline's (at most {limit:g}x)"),
            ):
                if limit is not None and not (measured >= limit if is_lower else measured <= limit):
                    shown = SHOWN_NAMES.get(name, name)
                    return name, measured, limit, words.format(name=shown, delta=delta, ratio=ratio, limit=limit)
        return None
