"""What is optimised: SSIM, the gated decoded-image loss, rectified flow. Imports torch and nothing heavier."""

from tune_ssim.losses.flow import (
    TimestepLaw,
    euler_sample,
    expected_active_fraction,
    flow_loss,
    noisy_latent,
    sample_t,
    velocity_target,
    z0_from_velocity,
)
from tune_ssim.losses.structural import ssim, ssim_loss

__all__ = [
    "TimestepLaw",
    "euler_sample",
    "expected_active_fraction",
    "flow_loss",
    "noisy_latent",
    "sample_t",
    "ssim",
    "ssim_loss",
    "velocity_target",
    "z0_from_velocity",
]
