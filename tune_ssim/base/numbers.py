"""Numbers among plain values."""

from __future__ import annotations

import math
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float; true is not 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_float(value: float) -> float:
    """An integer that is too large for a float becomes infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def is_same(one: Any, other: Any, tolerance: float = 1e-9) -> bool:
    """Whether two values are equal, numbers up to a relative tolerance. The default is far below any difference that matters in
    training, and 0.1 · 0.1 equals 0.01."""
    if is_number(one) and is_number(other):
        return one == other or math.isclose(as_float(one), as_float(other), rel_tol=tolerance)
    return not is_number(one) and not is_number(other) and bool(one == other)
