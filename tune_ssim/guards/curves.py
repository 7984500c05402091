"""Metrics of a log of any length as curves of bounded size: for a picture, and to see what fell over the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MAX_BLOCKS = 1024  # more than a picture has columns


@dataclass
class Curve:
    """Blocks of equally many records. `steps` are the blocks' last ones; `mean`, `low` and `high` are of their finite values
    (NaN where a block has none), `zero` and `broken` the shares of values that are 0 or not finite."""

    steps: Array = field(default_factory=lambda: np.empty(0))
    mean: Array = field(default_factory=lambda: np.empty(0))
    low: Array = field(default_factory=lambda: np.empty(0))
    high: Array = field(default_factory=lambda: np.empty(0))
    zero: Array = field(default_factory=lambda: np.empty(0))
    broken: Array = field(default_factory=lambda: np.empty(0))
    records: int = 0
    _per_block: int = 1
    _steps: Array = field(default_factory=lambda: np.empty(0))  # of records that do not fill a block yet
    _values: Array = field(default_factory=lambda: np.empty(0))

    def add(self, steps: Sequence[float], values: Sequence[float] | Array) -> None:
        self.records += len(steps)
        all_steps = np.concatenate([self._steps, np.asarray(steps, float)])
        all_values = np.concatenate([self._values, np.asarray(values, float)])
        whole = len(all_steps) // self._per_block * self._per_block
        self._steps, self._values = all_steps[whole:].copy(), all_values[whole:].copy()
        if not whole:
            return
        self._append(all_steps[:whole], all_values[:whole])
        while len(self.steps) > MAX_BLOCKS:
            self._halve()

    def levels(self, count: int) -> Array:
        """`count` means of equally long parts of the log; NaN where a part has no finite value. Fewer for fewer blocks."""
        parts = np.array_split(self.mean, min(count, len(self.mean)) or 1)
        return np.array([_mean(part) for part in parts])

    def _append(self, steps: Array, values: Array) -> None:
        rows = values.reshape(-1, self._per_block)
        finite = np.isfinite(rows)
        count = finite.sum(1)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            mean = np.where(finite, rows, 0.0).sum(1) / count
        none = count == 0
        low, high = np.where(finite, rows, np.inf).min(1), np.where(finite, rows, -np.inf).max(1)
        low[none] = high[none] = np.nan
        new = (steps[self._per_block - 1 :: self._per_block], mean, low, high, (rows == 0).mean(1), 1 - finite.mean(1))
        for name, more in zip(("steps", "mean", "low", "high", "zero", "broken"), new, strict=True):
            setattr(self, name, np.concatenate([getattr(self, name), more]))

    def _halve(self) -> None:
        """Pairs of blocks become one; the last one of an odd number would need records that are gone, so it joins the pair
        before it."""
        begins = np.arange(0, len(self.steps) - 1, 2)
        blocks = np.add.reduceat(np.ones(len(self.steps)), begins)
        weights = 1 - self.broken
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            total = np.add.reduceat(np.where(weights > 0, self.mean * weights, 0.0), begins)
            self.mean = total / np.add.reduceat(weights, begins)
        self.steps = np.maximum.reduceat(self.steps, begins)
        self.low, self.high = np.fmin.reduceat(self.low, begins), np.fmax.reduceat(self.high, begins)
        self.zero, self.broken = (np.add.reduceat(shares, begins) / blocks for shares in (self.zero, self.broken))
        self._per_block *= 2


def _mean(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
