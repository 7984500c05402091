"""Losses: SSIM, the gated decoded-image loss, rectified flow, latent terms, and weight schedules.

The only heavy import is torch. Names load on first use, since a study reads its schedules without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tune_ssim.base.lazy import load_on_first_use

if TYPE_CHECKING:
    from tune_ssim.losses.decoded import DecodedLoss, DecodedLossResult, clamp_gradient, scale_gradient
    from tune_ssim.losses.flow import TimeLaw, euler_sample, noisy_latent, velocity_target, z0_from_velocity
    from tune_ssim.losses.latent import active_units, dino_alignment, kl_to_standard_normal, marginal_kl, reparameterise
    from tune_ssim.losses.schedules import Schedule
    from tune_ssim.losses.structural import ssim, ssim_loss

__all__ = [
    "DecodedLoss",
    "DecodedLossResult",
    "Schedule",
    "TimeLaw",
    "active_units",
    "clamp_gradient",
    "dino_alignment",
    "euler_sample",
    "kl_to_standard_normal",
    "marginal_kl",
    "noisy_latent",
    "reparameterise",
    "scale_gradient",
    "ssim",
    "ssim_loss",
    "velocity_target",
    "z0_from_velocity",
]  # fmt: skip

_MODULES = {
    "decoded": ("DecodedLoss", "DecodedLossResult", "clamp_gradient", "scale_gradient"),
    "flow": ("TimeLaw", "euler_sample", "noisy_latent", "velocity_target", "z0_from_velocity"),
    "latent": ("active_units", "dino_alignment", "kl_to_standard_normal", "marginal_kl", "reparameterise"),
    "schedules": ("Schedule",),
    "structural": ("ssim", "ssim_loss"),
}
__getattr__, __dir__ = load_on_first_use(__name__, _MODULES)
