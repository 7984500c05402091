"""Metrics for a logger that accepts only losses (note 002 §0): tensors that print as a number but add zero to a sum."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tune_ssim.base.errors import UserError

# Operations of a logger on a term. In all other operations (arithmetic) the term is zero.
_READ = {
    *("__array__", "__float__", "__format__", "__get__", "__hash__", "__repr__", "item", "numpy", "tolist"),
    *("clone", "cpu", "cuda", "detach", "double", "float", "to", "mean", "sum", "reshape", "squeeze", "view"),
    *("dim", "numel", "size", "isfinite", "isinf", "isnan"),
}


def shadow_terms(metrics: Mapping[str, float | Tensor], prefix: str = "loss_") -> dict[str, Tensor]:
    """Renames `dbg/grad_flow` to `loss_dbg_grad_flow`, for a trainer that sums and prints everything that starts with `prefix`:

        losses |= shadow_terms(taps.read())
        total = sum(losses.values())        # unchanged, to the bit, and so is every gradient

    A term has the value of the metric when it is read (`item`, `float`, `mean`, `format`, …) and is exactly zero in arithmetic.
    So NaN and Inf are shown but do not reach the loss (0·NaN would). 0-d tensors stay on their device; numbers go to the device
    of the first tensor. Metrics that already start with `prefix` are skipped. Raises UserError if two names collide.
    """
    device = next((value.device for value in metrics.values() if isinstance(value, Tensor)), None)
    terms: dict[str, Tensor] = {}
    for name, value in metrics.items():
        if name.startswith(prefix):
            continue
        term = prefix + re.sub(r"\W+", "_", name)
        if term in terms:
            raise UserError(f"shadow_terms: {name!r} and another metric both become {term!r}; rename one")
        tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), device=device)
        if tensor.ndim:
            raise UserError(f"shadow_terms: {name!r} has shape {tuple(tensor.shape)}; expected a number")
        terms[term] = tensor.as_subclass(_Shadow)
    return terms


class _Shadow(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = func.__name__ in _READ
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*_plain(args, zero=not read), **_plain(kwargs or {}, zero=not read))
            return found.as_subclass(cls) if read and isinstance(found, Tensor) and found.is_floating_point() else found


def _plain(value: Any, zero: bool) -> Any:
    if isinstance(value, _Shadow):
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device) if zero else value.as_subclass(Tensor)
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, zero) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item, zero) for key, item in value.items()}
    return value
