"""Limits on how much a held-out metric may get worse than the baseline: the boundary between `safe` and `degraded`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

DISPLAY_NAMES = {"psnr": "PSNR", "ssim": "SSIM"}


@dataclass(frozen=True)
class KeepRule:
    """A limit on a held-out metric, or on a family of metrics (`flow_loss_bins` for `flow_loss_bins/0` …).

    Has exactly one limit relative to the baseline: on the difference (`min_delta`, `max_delta`) or on the ratio (`min_ratio`,
    `max_ratio`)."""

    metric: str
    min_delta: float | None = None
    max_delta: float | None = None
    min_ratio: float | None = None
    max_ratio: float | None = None

    def broken_by(self, found: Mapping[str, float], baseline: Mapping[str, float]) -> tuple[str, float, float, str] | None:
        """(metric, value, limit, sentence) of the first violated limit, or None. NaN violates every limit."""
        for name, measured, limit, is_floor in self.measured(found, baseline):
            if not (measured >= limit if is_floor else measured <= limit):
                shown, bound = DISPLAY_NAMES.get(name, name), "at least" if is_floor else "at most"
                is_delta = self.min_delta is not None or self.max_delta is not None
                how = (
                    f"{measured:+.4g} against the baseline ({bound} {limit:+g})"
                    if is_delta
                    else f"{measured:.3g}x the baseline's ({bound} {limit:g}x)"
                )
                return name, measured, limit, f"{shown} {how}"
        return None

    def measured(self, found: Mapping[str, float], baseline: Mapping[str, float]) -> Iterator[tuple[str, float, float, bool]]:
        """(metric, difference or ratio, limit, whether the limit is a floor) for every metric that the rule covers."""
        for name, value in found.items():
            if (name != self.metric and not name.startswith(self.metric + "/")) or name not in baseline:
                continue
            delta, ratio = value - baseline[name], value / baseline[name] if baseline[name] else math.inf
            for limit, number, is_floor in (
                (self.min_delta, delta, True),
                (self.max_delta, delta, False),
                (self.min_ratio, ratio, True),
                (self.max_ratio, ratio, False),
            ):
                if limit is not None:
                    yield name, number, limit, is_floor
