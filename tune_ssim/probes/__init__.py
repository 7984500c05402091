"""Measurements during training: gradients, weights and samples. The only heavy import is torch."""

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
