"""Limits on how much a held-out metric may get worse than the baseline: the boundary between `safe` and `degraded`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

DISPLAY_NAMES = {"psnr": "PSNR", "ssim": "SSIM"}


@dataclass(frozen=True)
class Margin:
    """A metric relative to the baseline's, and its limit. value: the difference, or with `is_ratio` the quotient. is_floor: the
    limit is the smallest value allowed, otherwise the largest."""

    metric: str
    value: float
    limit: float
    is_floor: bool
    is_ratio: bool

    @property
    def is_broken(self) -> bool:
        """NaN breaks every limit."""
        return not (self.value >= self.limit if self.is_floor else self.value <= self.limit)

    @property
    def harm(self) -> float:
        """`decades_beyond` its limit; infinite for NaN."""
        found = decades_beyond(self.value, self.limit)
        return math.inf if math.isnan(found) else found

    @property
    def sentence(self) -> str:
        shown, bound = DISPLAY_NAMES.get(self.metric, self.metric), "at least" if self.is_floor else "at most"
        if self.is_ratio:
            return f"{shown} {self.value:.3g}x the baseline's ({bound} {self.limit:g}x)"
        return f"{shown} {self.value:+.4g} against the baseline ({bound} {self.limit:+g})"


def decades_beyond(value: float, limit: float) -> float:
    """How far `value` lies beyond `limit`: 1 for ten times the limit. Of a limit of zero, the distance counts."""
    return math.log10(1 + abs(value - limit) / (abs(limit) or 1.0))


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

    def covers(self, name: str) -> bool:
        """Whether it limits this metric."""
        return name == self.metric or name.startswith(self.metric + "/")

    def margins(self, found: Mapping[str, float], baseline: Mapping[str, float]) -> Iterator[Margin]:
        """The margin of every metric that the rule covers."""
        for name, value in found.items():
            if not self.covers(name) or name not in baseline:
                continue
            delta, ratio = value - baseline[name], value / baseline[name] if baseline[name] else math.inf
            for limit, number, is_floor, is_ratio in (
                (self.min_delta, delta, True, False),
                (self.max_delta, delta, False, False),
                (self.min_ratio, ratio, True, True),
                (self.max_ratio, ratio, False, True),
            ):
                if limit is not None:
                    yield Margin(name, number, limit, is_floor, is_ratio)
