"""Measurements during training: gradients, weights and samples. The only heavy import is torch, at the first use of a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tune_ssim.base.lazy import load_on_first_use

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
        narrowed_tensors,
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
    "narrowed_tensors",
    "shadow_terms",
    "tensor_contents",
    "tensor_hashes",
    "total_norm",
    "update_ratio",
]

_MODULES = {
    "collapse": ("collapse_statistics",),
    "gradients": ("loss_norms", "total_norm", "update_ratio"),
    "norm_model": ("NormModel", "Prediction"),
    "shadow": ("shadow_terms",),
    "taps": ("GradientTaps",),
    "weights": (
        "WeightComparison",
        "compare_with_file",
        "content_id",
        "file_contents",
        "narrowed_tensors",
        "tensor_contents",
        "tensor_hashes",
    ),
}
__getattr__, __dir__ = load_on_first_use(__name__, _MODULES)
