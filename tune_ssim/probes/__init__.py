"""Measurements during training: gradients, weights and samples. The only heavy import is torch, at the first use of a name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_ssim.probes.collapse import collapse_statistics
    from tune_ssim.probes.gradients import loss_norms, total_norm, update_ratio
    from tune_ssim.probes.norm_model import NormModel, Prediction
    from tune_ssim.probes.shadow import shadow_terms
    from tune_ssim.probes.taps import GradientTaps
    from tune_ssim.probes.weights import (
        WeightComparison,
        compare_with_file,
        content_id,
        file_contents,
        tensor_contents,
        tensor_hashes,
    )

__all__ = [
    "GradientTaps",
    "NormModel",
    "Prediction",
    "WeightComparison",
    "collapse_statistics",
    "compare_with_file",
    "content_id",
    "file_contents",
    "loss_norms",
    "shadow_terms",
    "tensor_contents",
    "tensor_hashes",
    "total_norm",
    "update_ratio",
]

_MODULE_OF = {
    "GradientTaps": "taps",
    "NormModel": "norm_model",
    "Prediction": "norm_model",
    "collapse_statistics": "collapse",
    "loss_norms": "gradients",
    "shadow_terms": "shadow",
    "total_norm": "gradients",
    "update_ratio": "gradients",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tune_ssim.probes' has no attribute {name!r}")
    return getattr(import_module(f"tune_ssim.probes.{_MODULE_OF.get(name, 'weights')}"), name)
