"""A variational autoencoder on patches of real photographs, and the weight of its KL term (note 004).

    patch ─► encoder ─► mu, log_var ─► z = mu + exp(½ log_var) ε ─► decoder ─► binary cross-entropy ─┐
                             └───────────► KL(N(mu, exp(log_var)) ‖ N(0, 1)) ───────► · alpha ───────┴─► loss

The cross-entropy is the mean over the 256 pixels, the KL a sum over the 16 latents, so alpha = 1/256 makes the loss the
negative ELBO. Trained from random weights, since alpha acts from the first step on. Without it the latent diverges from its
prior; if it is too large the posterior collapses within a few hundred steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tune_ssim.losses import ssim
from tune_ssim.losses.latent import active_units, kl_to_standard_normal, marginal_kl, reparameterise
from tune_ssim.losses.schedules import Constant, CyclicalLinear, Linear, Schedule
from tune_ssim.probes import GradientTaps
from tune_ssim.tasks.bundled import BundledTraining, numbers_of
from tune_ssim.tasks.photo_patches import PATCH, load_photo_patches
from tune_ssim.tasks.task_config import NOT_NEGATIVE, POSITIVE, read_config
from tune_ssim.trials.training import Number, Part, Sample

LATENTS, WIDTH = 16, 128
SMOKE_PATCHES, EVALUATION_PATCHES = 48, 240  # the same number from each of the twelve photographs
PATCH_STREAM, NOISE_STREAM = 0, 1  # independent random streams of one step
SCHEDULES = ("constant", "linear", "slow_linear", "cyclical")
# Shares of the trial at which alpha reaches its full value. Note 004: `min(0.01, epoch / 1000)` rises for ten epochs, `min(0.01,
# step / 100000)` for a thousand steps; the annealer over 3,000,000 steps restarts repeatedly, here as often as in Fu et al. 2019.
LINEAR_SHARE, SLOW_LINEAR_SHARE, CYCLES = 0.1, 0.5, 4


@dataclass(frozen=True)
class VAEConfig:
    """The `task_config` of a study."""

    steps: int = 600  # optimiser steps of a trial: the schedules of alpha are shares of it
    batch_size: int = 64
    lr: float = 1e-3  # 0 switches the update off
    beta1: float = 0.5  # of Adam; note 004 started from 0.9
    max_grad_norm: float | None = None  # gradient clipping; None: off
    kl_alpha: float = 1e-3  # weight of the KL, at the end of its schedule
    kl_schedule: str = "constant"  # constant | linear | slow_linear | cyclical
    kl_max_variance: float | None = 10.0  # bound of exp(log_var) in the KL (note 004); None: off
    measure_every: int = 5  # steps between readings of the gradients of each part

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> VAEConfig:
        return read_config(
            cls,
            "vae_kl",
            config,
            choices={"kl_schedule": SCHEDULES},
            counts={"steps": 1, "batch_size": 2, "measure_every": 1},  # the variance over a batch needs two
            numbers={
                "lr": NOT_NEGATIVE,
                "beta1": (0, 0.9999),
                "max_grad_norm": POSITIVE,
                "kl_alpha": NOT_NEGATIVE,
                "kl_max_variance": (1.001, math.inf),
            },
            optional=("max_grad_norm", "kl_max_variance"),
        )

    def schedule(self) -> Schedule:
        """The schedule of alpha, by step."""
        if self.kl_schedule == "constant":
            return Constant(self.kl_alpha)
        if self.kl_schedule == "cyclical":
            return CyclicalLinear(0.0, self.kl_alpha, self.steps, min(CYCLES, self.steps))
        share = LINEAR_SHARE if self.kl_schedule == "linear" else SLOW_LINEAR_SHARE
        return Linear(0.0, self.kl_alpha, max(1, round(share * self.steps)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(PATCH * PATCH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.mu_head, self.logvar_head = nn.Linear(WIDTH, LATENTS), nn.Linear(WIDTH, LATENTS)

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[n, 1, 16, 16]` → mu and log_var, `[n, 16]`."""
        hidden = self.body(patches.flatten(1))
        return self.mu_head(hidden), self.logvar_head(hidden)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(LATENTS, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, PATCH * PATCH)
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """`[n, 16]` → logits, `[n, 1, 16, 16]`."""
        return self.body(z).view(-1, 1, PATCH, PATCH)  # type: ignore[no-any-return]


class VAEKL(BundledTraining):
    """See `trials.training.Training` for the contract.

    Metrics of a step: loss = loss_reconstruction + loss_kl; loss_kl = alpha · kl_raw; kl_raw in nats, a mean over the batch;
    active_units: how many of the 16 latents depend on the patch (Burda et al. 2016); z_init/marginal_kl: how far all latents
    together are from the prior."""

    config: VAEConfig
    stateful = ("encoder", "decoder", "optimizer")

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.begin(VAEConfig.from_mapping(config), seed, device)
        self.patches = load_photo_patches()
        torch.manual_seed(seed)
        self.encoder, self.decoder = Encoder().to(self.device), Decoder().to(self.device)
        self.alpha = self.config.schedule()
        betas = (self.config.beta1, 0.999)
        self.optimizer = torch.optim.Adam(self.trainable_parameters(), lr=self.config.lr, betas=betas)
        tagged: dict[str, nn.Module] = {
            "encoder": self.encoder.body,
            "mu_head": self.encoder.mu_head,
            "logvar_head": self.encoder.logvar_head,
            "decoder": self.decoder,
        }
        self.taps = GradientTaps(tagged, every=self.config.measure_every)

    def step(self) -> dict[str, Number]:
        self.step_count += 1
        alpha = self.alpha(self.step_count)
        patches, noise = self._batch(self.step_count)
        mu, log_var = self.encoder(patches)
        logits = self.decoder(reparameterise(mu, log_var, noise))
        reconstruction = functional.binary_cross_entropy_with_logits(logits, patches)
        kl = kl_to_standard_normal(mu, log_var, max_variance=self.config.kl_max_variance).mean()
        loss = reconstruction + alpha * kl

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = self.clip()
        readings = self.taps.read(self.step_count)
        self.optimizer.step()
        return {
            "loss": loss.detach(),
            "loss_reconstruction": reconstruction.detach(),
            "loss_kl": alpha * kl.detach(),
            "kl_raw": kl.detach(),
            "alpha": alpha,
            "active_units": active_units(mu),
            "z_init/mean": mu.detach().mean(),
            "z_init/var": (mu.detach().var(dim=0) + log_var.detach().exp().mean(dim=0)).mean(),
            "z_init/marginal_kl": marginal_kl(mu, log_var),
            "total_norm": norm,
            **readings,
        }

    def sample(self, noise: int = 0) -> Sample:
        """Held-out patches through the autoencoder, with a fixed draw of the posterior."""
        patches, _ = self.patches.held_out_batch(SMOKE_PATCHES)
        generator = torch.Generator().manual_seed(20_250_318 + noise)
        drawn = torch.randn(SMOKE_PATCHES, LATENTS, generator=generator).to(self.device)
        with torch.no_grad():
            mu, log_var = self.encoder(patches.to(self.device))
            images = self.decoder(reparameterise(mu, log_var, drawn)).sigmoid()
        return Sample(images.expand(-1, 3, -1, -1), patches.to(self.device).expand(-1, 3, -1, -1))

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics: `elbo` in nats per patch (the exact KL, one fixed draw), its two parts, and the mean's
        reconstruction."""
        patches, _ = self.patches.held_out_batch(EVALUATION_PATCHES)
        generator = torch.Generator().manual_seed(20_250_320)
        patches, drawn = (x.to(self.device) for x in (patches, torch.randn(EVALUATION_PATCHES, LATENTS, generator=generator)))
        with torch.no_grad():
            mu, log_var = self.encoder(patches)
            logits = self.decoder(reparameterise(mu, log_var, drawn))
            reconstruction = functional.binary_cross_entropy_with_logits(logits, patches)
            kl = kl_to_standard_normal(mu, log_var).mean()
            images = self.decoder(mu).sigmoid()
            error = (images - patches).square().mean(dim=(1, 2, 3))
            found = {
                "elbo": -(PATCH * PATCH * reconstruction + kl),
                "loss_reconstruction": reconstruction,
                "kl_raw": kl,
                "active_units": active_units(mu),
                "psnr": (-10 * torch.log10(error.clamp(min=1e-10))).mean(),
                "ssim": ssim(images, patches).mean(),
            }
        return numbers_of(found)

    def effective(self) -> dict[str, Any]:
        beta1 = self.optimizer.param_groups[0]["betas"][0]
        return {**super().effective(), "beta1": beta1, "kl_alpha": self.alpha(self.config.steps)}

    # -- for preflight

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.decoder.parameters()]

    def parts(self) -> dict[str, Part]:
        return {"encoder": Part(self.encoder, trains=True), "decoder": Part(self.decoder, trains=True)}

    def training_images(self, n: int) -> torch.Tensor:
        """`[batch, 3, 16, 16]` in [0, 1]."""
        return self._batch(n)[0].cpu().expand(-1, 3, -1, -1)

    def fingerprints(self) -> dict[str, str]:
        return self.patches.fingerprints()

    # -- the parts of a step

    def _batch(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch n, from (seed, n) only: patches `[batch, 1, 16, 16]` and the noise of their latents."""
        patches, _ = self.patches.train_batch(self.config.batch_size, self._generator(n, PATCH_STREAM))
        noise = torch.randn(self.config.batch_size, LATENTS, generator=self._generator(n, NOISE_STREAM))
        return patches.to(self.device), noise.to(self.device)
