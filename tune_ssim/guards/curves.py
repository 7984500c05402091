"""Bounded-size curves of metrics from logs of any length, for plots and for trends over the whole run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tune_ssim.records.record_table import Column

MAX_BLOCKS = 1024  # even; more than the pixel columns of a plot


@dataclass
class Curve:
    """A metric in blocks with the same number of records. Independent of how the log is split into batches.

    steps: the last step of each block. mean, low, high: over its finite values; NaN if it has none. zero, broken: the
    fractions of values that are 0 or non-finite."""

    steps: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    zero: list[float] = field(default_factory=list)
    broken: list[float] = field(default_factory=list)
    records: int = 0
    _per_block: int = 1
    _steps: list[float] = field(default_factory=list)  # records that do not fill a block yet
    _values: list[float] = field(default_factory=list)

    def add(self, column: Column) -> None:
        self.records += len(column.steps)
        steps, values = [*self._steps, *column.steps], [*self._values, *column.values]
        all_finite = column.all_finite and all(map(math.isfinite, self._values))
        begin = 0
        while begin + self._per_block <= len(steps):
            end = begin + self._per_block
            self._append(steps[end - 1], values[begin:end], all_finite)
            if len(self.steps) == MAX_BLOCKS:
                self._halve()
            begin = end
        self._steps, self._values = steps[begin:], values[begin:]

    def levels(self, count: int) -> list[float]:
        """Means over `count` equal parts of the log; NaN if a part has no finite value. Fewer parts if there are fewer blocks."""
        parts = min(count, len(self.mean)) or 1
        size, longer = divmod(len(self.mean), parts)
        ends = [size * (k + 1) + min(k + 1, longer) for k in range(parts)]
        return [_mean(list(filter(math.isfinite, self.mean[begin:end]))) for begin, end in zip([0, *ends], ends, strict=False)]

    def _append(self, step: float, values: list[float], all_finite: bool) -> None:
        finite = values if all_finite else list(filter(math.isfinite, values))
        low, high = min(finite, default=math.nan), max(finite, default=math.nan)
        self.steps.append(step)
        self.mean.append(_mean(finite))
        self.low.append(low)
        self.high.append(high)
        self.zero.append(finite.count(0.0) / len(values) if low <= 0 <= high else 0.0)
        self.broken.append(1 - len(finite) / len(values))

    def _halve(self) -> None:
        """Pairs of blocks become one."""
        pairs = range(0, len(self.steps), 2)
        shares = [1 - broken for broken in self.broken]
        self.mean = [_weighted(self.mean[k : k + 2], shares[k : k + 2]) for k in pairs]
        self.steps = self.steps[1::2]
        self.low = [_ignoring_nan(min, self.low[k : k + 2]) for k in pairs]
        self.high = [_ignoring_nan(max, self.high[k : k + 2]) for k in pairs]
        self.zero = [(self.zero[k] + self.zero[k + 1]) / 2 for k in pairs]
        self.broken = [(self.broken[k] + self.broken[k + 1]) / 2 for k in pairs]
        self._per_block *= 2


def _mean(values: Sequence[float]) -> float:
    """NaN if there are none."""
    return sum(values) / len(values) if values else math.nan


def _weighted(means: Sequence[float], shares: Sequence[float]) -> float:
    total = sum(shares)
    return sum(mean * share for mean, share in zip(means, shares, strict=True) if share > 0) / total if total > 0 else math.nan


def _ignoring_nan(choose: Callable[[Iterable[float]], float], values: Sequence[float]) -> float:
    return choose([value for value in values if not math.isnan(value)] or [math.nan])
