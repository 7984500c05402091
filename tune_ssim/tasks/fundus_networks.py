"""The two small networks of the bundled task: a convolutional VAE (f = 4, 4 latent channels) and a conditional denoiser."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

LATENT_CHANNELS, VAE_FACTOR = 4, 4  # of the bundled VAE


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


class ResidualBlock(nn.Module):
    """GroupNorm → SiLU → conv, twice, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            _norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class VAE(nn.Module):
    """Image in [-1, 1] `[n, 3, H, W]` ↔ latent `[n, 4, H/4, W/4]` of about unit variance.

    `latent_mean`, `latent_std` (`[1, 4, 1, 1]`) standardise the latent, as `scaling_factor` does in diffusers.
    """

    latent_mean: torch.Tensor
    latent_std: torch.Tensor
    latent_channels, factor = LATENT_CHANNELS, VAE_FACTOR

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * LATENT_CHANNELS, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, 2 * width, 3, padding=1), ResidualBlock(2 * width), nn.SiLU(),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(2 * width, width, 3, padding=1), nn.SiLU(),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip
        self.register_buffer("latent_mean", torch.zeros(1, LATENT_CHANNELS, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, LATENT_CHANNELS, 1, 1))

    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the posterior, each `[n, 4, h, w]`, not standardised."""
        mean, log_var = self.encoder(images).chunk(2, dim=1)
        return mean, log_var

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The posterior's mean, standardised: `[n, 4, h, w]`."""
        return (self.moments(images)[0] - self.latent_mean) / self.latent_std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents → images in about [-1, 1] (not clipped)."""
        return self.decoder(latents * self.latent_std + self.latent_mean)


class FilmBlock(nn.Module):
    """Residual block whose second normalisation is scaled and shifted by the time embedding (FiLM)."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int) -> None:
        super().__init__()
        self.norm_in = _norm(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * channels_out)
        self.norm_out = _norm(channels_out)
        self.conv_out = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(functional.silu(self.norm_in(x)))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_out(functional.silu(self.norm_out(h) * (1 + scale) + shift))
        return self.skip(x) + h


def timestep_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of `t` `[n]` in [0, 1] → `[n, width]`, frequencies 1 … 1000 rad."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), width // 2, device=t.device))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Denoiser(nn.Module):
    """Velocity of the flow: `(z_t [n, c, h, w], t [n], condition [n, 3, H, W] in [-1, 1])` → `[n, c, h, w]`; h, w even.

    A two-level U-Net. The low-resolution image is concatenated to the latent: unchanged if it has the latent's size, as with the
    bundled VAE. If the latent is smaller, `shrink` x `shrink` of its pixels become channels. If the latent is larger, its pixels
    are repeated.
    """

    def __init__(self, width: int = 48, embedding: int = 64, latent_channels: int = LATENT_CHANNELS, shrink: int = 1) -> None:
        super().__init__()
        self.width, self.shrink = width, shrink
        self.time = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        self.conv_in = nn.Conv2d(latent_channels + 3 * shrink**2, width, 3, padding=1)
        self.down = FilmBlock(width, width, embedding)
        self.middle_in = FilmBlock(width, 2 * width, embedding)
        self.middle_out = FilmBlock(2 * width, width, embedding)
        self.up = FilmBlock(2 * width, width, embedding)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, latent_channels, 3, padding=1)

    def forward(self, z_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        embedding = self.time(timestep_embedding(t, self.width))
        condition = functional.pixel_unshuffle(condition, self.shrink)
        if condition.shape[-2:] != z_t.shape[-2:]:
            condition = functional.interpolate(condition, size=z_t.shape[-2:], mode="nearest")
        fine = self.down(self.conv_in(torch.cat([z_t, condition], dim=1)), embedding)
        coarse = self.middle_in(functional.avg_pool2d(fine, 2), embedding)
        coarse = functional.interpolate(self.middle_out(coarse, embedding), scale_factor=2, mode="nearest")
        out = self.up(torch.cat([fine, coarse], dim=1), embedding)
        return self.conv_out(functional.silu(self.norm_out(out)))
