"""What is optimised: SSIM, the gated decoded-image loss, rectified flow. Imports torch and nothing heavier."""

from tune_ssim.losses.decoded import DecodedLoss, DecodedLossResult, clamp_gradient, scale_gradient
from tune_ssim.losses.flow import (
    TimeLaw,
    euler_sample,
    flow_loss,
    noisy_latent,
    velocity_target,
    z0_from_velocity,
)
from tune_ssim.losses.structural import ssim, ssim_loss

__all__ = [
    "DecodedLoss",
    "DecodedLossResult",
    "TimeLaw",
    "clamp_gradient",
    "euler_sample",
    "flow_loss",
    "noisy_latent",
    "scale_gradient",
    "ssim",
    "ssim_loss",
    "velocity_target",
    "z0_from_velocity",
]
