"""What is observed during a training: torch only."""

from tune_ssim.probes.collapse import collapse_statistics
from tune_ssim.probes.gradients import total_norm

__all__ = ["collapse_statistics", "total_norm"]
