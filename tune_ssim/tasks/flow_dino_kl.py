"""Flow matching from a latent encoded from a condition, with a KL term and a semantic target (note 002).

    condition ─► encoder ─► mu, log_var ─► z = mu + exp(½ log_var) ε ─┬─► DINO head ─► 1 − cosine to frozen features ─► · dino_alpha
                                │                                     └─► z_t = (1−t) x + t z ─► flow ─► velocity ─► loss_flow
                                └─► KL(N(mu, exp(log_var)) ‖ N(0, 1)) ─► · kl_weight

The flow starts at the latent z (t = 1) instead of at noise, and ends at the patch x (t = 0). The condition replaces a caption: the
photograph's subject and the patch's sixteen coarse grey levels. Every branch reaches the encoder, so each can ruin the others. The
metrics show this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tune_ssim.losses import euler_sample, noisy_latent, velocity_target
from tune_ssim.losses.latent import dino_alignment, kl_to_standard_normal, reparameterise
from tune_ssim.losses.schedules import Constant, Linear, Schedule
from tune_ssim.probes import GradientTaps, loss_norms
from tune_ssim.tasks.bundled import WEIGHTS, BundledTraining, load_weights, numbers_of
from tune_ssim.tasks.patch_features import FEATURES_FILE, PatchFeatures, load_named_network
from tune_ssim.tasks.photo_patches import PATCH, SUBJECTS, load_photo_patches
from tune_ssim.tasks.task_config import NOT_NEGATIVE, POSITIVE, read_config
from tune_ssim.trials.training import Number, Part, Sample

PIXELS, COARSE, WIDTH = PATCH * PATCH, 4, 256
GREY, CONTRAST = 0.53, 0.3  # mean and standard deviation of the training patches: x = (patch - GREY) / CONTRAST
EULER_STEPS = 8
SMOKE_PATCHES, EVALUATION_PATCHES = 48, 240  # the same number from each of the twelve photographs
PATCH_STREAM, NOISE_STREAM = 0, 1  # independent random streams of one step
BRANCHES = ("flow", "dino", "kl")
TAGS = ("flow", "dino_t_head", "mu_head", "logvar_head")  # names of note 002 §0


@dataclass(frozen=True)
class FlowConfig:
    """The `task_config` of a study."""

    steps: int = 400  # optimiser steps of a trial
    batch_size: int = 32  # patches of one micro-batch
    accumulation: int = 2  # micro-batches of one optimiser step (note 002: GA)
    lr: float = 1e-3  # of AdamW; 0 switches the update off
    max_grad_norm: float | None = None  # gradient clipping; None: off
    # Measured on 300 steps: a variance of z of 0.18 at 0.001, 0.47 at 0.006, 0.74 at 0.02, where the flow is poor.
    kl_weight: float = 6e-3
    kl_max_variance: float | None = 10.0  # bound of exp(log_var) in the KL (note 004); None: off
    dino_alpha: float = 1.0  # weight of the semantic target, once it is warm
    dino_warmup: float = 0.25  # share of the trial over which it rises from 0 (note 002 §1.1); 0: full from the first step
    dino_network: str | None = None  # module:function of a larger network; None: the bundled one
    measure_every: int = 5  # steps between readings of the gradients of each part
    ablate: str | None = None  # flow | dino | kl: this branch is left out of the loss but still measured

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> FlowConfig:
        return read_config(
            cls,
            "flow_dino_kl",
            config,
            choices={"ablate": (None, *BRANCHES)},
            counts={"steps": 1, "batch_size": 2, "accumulation": 1, "measure_every": 1},
            numbers={
                "lr": NOT_NEGATIVE,
                "max_grad_norm": POSITIVE,
                "kl_weight": NOT_NEGATIVE,
                "kl_max_variance": (1.001, math.inf),
                "dino_alpha": NOT_NEGATIVE,
                "dino_warmup": (0, 1),
            },
            optional=("max_grad_norm", "kl_max_variance"),
        )

    def dino_schedule(self) -> Schedule:
        steps = round(self.dino_warmup * self.steps)
        return Linear(0.0, self.dino_alpha, steps) if steps else Constant(self.dino_alpha)


class Networks(nn.Module):
    """All trained networks: the condition's encoder with its two heads, the flow, and the head of the semantic branch."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(COARSE * COARSE + len(SUBJECTS), WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()
        )
        self.mu_head, self.logvar_head = nn.Linear(WIDTH, PIXELS), nn.Linear(WIDTH, PIXELS)
        self.flow = nn.Sequential(
            nn.Linear(PIXELS + 16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, PIXELS)
        )
        self.dino_t_head = nn.Sequential(nn.Linear(PIXELS, WIDTH), nn.SiLU(), nn.Linear(WIDTH, features))

    def encode(self, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[n, 28]` → mu and log_var, `[n, 256]`."""
        hidden = self.encoder(condition)
        return self.mu_head(hidden), self.logvar_head(hidden)

    def velocity(self, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """`[n, 256]` and `[n]` → `[n, 256]`."""
        phases = t[:, None] * torch.pi * torch.arange(1, 9, device=t.device)
        return self.flow(torch.cat([z_t, phases.sin(), phases.cos()], dim=1))  # type: ignore[no-any-return]


class FlowDinoKL(BundledTraining):
    """See `trials.training.Training` for the contract.

    Metrics of a step, means over its micro-batches: loss = loss_flow + loss_dino + loss_kl; loss_dino = alpha · dino_global
    and loss_kl = kl_weight · kl_raw as they enter the loss, so 0 if a branch is left out; dino_global: 1 − cosine;
    kl_raw: nats; z_init/mean and z_init/var: of the sampled latent. Every `measure_every` steps `dbg/loss_grad/flow` and
    `dbg/loss_grad/dino`: how hard each pushes the latent, in the first micro-batch, the weight included."""

    config: FlowConfig
    stateful = ("networks", "optimizer")

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.begin(FlowConfig.from_mapping(config), seed, device)
        self.patches = load_photo_patches()
        self.features = self._load_features().to(self.device)
        torch.manual_seed(seed)
        with torch.no_grad():
            size = self.features(torch.rand(2, 3, PATCH, PATCH, device=self.device)).shape[1]
        self.networks = Networks(size).to(self.device)
        self.dino_alpha = self.config.dino_schedule()
        self.optimizer = torch.optim.AdamW(self.networks.parameters(), lr=self.config.lr)
        tagged = {name: self.networks.get_submodule(name) for name in TAGS}
        self.taps = GradientTaps(tagged, every=self.config.measure_every, accumulation=self.config.accumulation)

    def step(self) -> dict[str, Number]:
        self.step_count += 1
        self.optimizer.zero_grad(set_to_none=True)
        seen: list[dict[str, torch.Tensor]] = []
        pushes: dict[str, torch.Tensor] = {}
        for micro in range(self.config.accumulation):
            found, latent = self._losses(self.step_count, micro)
            if self.taps.due and micro == 0:
                pushes |= loss_norms({"flow": found["loss_flow"], "dino": found["loss_dino"]}, [latent])
            (found["loss"] / self.config.accumulation).backward()
            seen.append({name: value.detach() for name, value in found.items()})
        norm = self.clip()
        readings = self.taps.read(self.step_count)
        self.optimizer.step()
        means = {name: torch.stack([found[name] for found in seen]).mean() for name in seen[0]}
        return {**means, "dino_alpha": self.dino_alpha(self.step_count), "total_norm": norm, **readings, **pushes}

    def _losses(self, n: int, micro: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The losses of micro-batch `micro` of step n, on the graph, and the latent that all branches share."""
        patches, condition, noise, t = self._batch(n, micro)
        mu, log_var = self.networks.encode(condition)
        z = reparameterise(mu, log_var, noise)
        x = _to_latent(patches)
        flow = functional.mse_loss(self.networks.velocity(noisy_latent(x, z, t), t), velocity_target(x, z))
        with torch.no_grad():
            targets = self.features(patches.expand(-1, 3, -1, -1))
        dino = dino_alignment(self.networks.dino_t_head(z), targets).mean()
        kl = kl_to_standard_normal(mu, log_var, max_variance=self.config.kl_max_variance).mean()
        terms = {"flow": flow, "dino": self.dino_alpha(n) * dino, "kl": self.config.kl_weight * kl}
        if self.config.ablate is not None:
            terms[self.config.ablate] = 0.0 * terms[self.config.ablate].detach()
        found = {
            "loss": terms["flow"] + terms["dino"] + terms["kl"],
            "loss_flow": flow,
            "loss_dino": terms["dino"],
            "loss_kl": terms["kl"],
            "dino_global": dino,
            "kl_raw": kl,
            "z_init/mean": z.mean(),
            "z_init/var": z.var(),
        }
        return found, z

    def sample(self, noise: int = 0) -> Sample:
        """Patches that the flow generates from held-out conditions."""
        patches, _ = self.patches.held_out_batch(SMOKE_PATCHES)
        images = self._generate(SMOKE_PATCHES, noise)
        return Sample(images.expand(-1, 3, -1, -1), patches.to(self.device).expand(-1, 3, -1, -1))

    def evaluate(self) -> dict[str, float]:
        """Held-out losses with fixed noise, and `alignment`: the cosine between the features of generated patches and of the
        patches of the same conditions, after subtracting the training patches' mean feature."""
        patches, subjects = self.patches.held_out_batch(EVALUATION_PATCHES)
        patches = patches.to(self.device)
        generator = torch.Generator().manual_seed(20_251_101)
        noise = torch.randn(EVALUATION_PATCHES, PIXELS, generator=generator).to(self.device)
        t = ((torch.arange(EVALUATION_PATCHES) * 7 % 16 + 0.5) / 16).to(self.device)  # sixteen times, spread over the subjects
        with torch.no_grad():
            mu, log_var = self.networks.encode(_condition(patches, subjects.to(self.device)))
            z, x = reparameterise(mu, log_var, noise), _to_latent(patches)
            images = self._generate(EVALUATION_PATCHES, 0)
            usual = self._features_of(self.patches.train_batch(960, torch.Generator().manual_seed(0))[0]).mean(dim=0)
            truth, made = self._features_of(patches) - usual, self._features_of(images) - usual
            found = {
                "alignment": functional.cosine_similarity(made, truth, dim=1).mean(),
                "loss_flow": functional.mse_loss(self.networks.velocity(noisy_latent(x, z, t), t), velocity_target(x, z)),
                "dino_global": dino_alignment(self.networks.dino_t_head(z), self._features_of(patches)).mean(),
                "kl_raw": kl_to_standard_normal(mu, log_var).mean(),
                "z_mean": z.mean(),
                "z_var": z.var(),
                "psnr": (-10 * torch.log10((images - patches).square().mean(dim=(1, 2, 3)).clamp(min=1e-10))).mean(),
            }
        return numbers_of(found)

    def effective(self) -> dict[str, Any]:
        return {**super().effective(), "dino_alpha": self.dino_alpha(self.config.steps)}

    # -- for preflight

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.networks.parameters())

    def parts(self) -> dict[str, Part]:
        bundled = WEIGHTS / FEATURES_FILE if self.config.dino_network is None else None
        parts = {name: Part(self.networks.get_submodule(name), trains=True) for name in ("encoder", *TAGS)}
        return {**parts, "dino": Part(self.features, trains=False, weights=bundled)}

    def training_images(self, n: int) -> torch.Tensor:
        """`[accumulation · batch, 3, 16, 16]` in [0, 1]."""
        micros = [self._batch(n, micro)[0] for micro in range(self.config.accumulation)]
        return torch.cat(micros).cpu().expand(-1, 3, -1, -1)

    def fingerprints(self) -> dict[str, str]:
        return self.patches.fingerprints()

    # -- the parts of a step

    def _batch(self, n: int, micro: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The batch, from (seed, n, micro) only: patches `[batch, 1, 16, 16]`, conditions, the latents' noise, and t."""
        size = self.config.batch_size
        patches, subjects = self.patches.train_batch(size, self._generator(n, PATCH_STREAM, 0, micro))
        generator = self._generator(n, NOISE_STREAM, 0, micro)
        noise, t = torch.randn(size, PIXELS, generator=generator), torch.rand(size, generator=generator)
        return patches.to(self.device), _condition(patches, subjects).to(self.device), noise.to(self.device), t.to(self.device)

    def _generate(self, count: int, noise: int) -> torch.Tensor:
        """`[count, 1, 16, 16]` in [0, 1], from the conditions of held-out patches; a non-finite pixel stays non-finite."""
        patches, subjects = self.patches.held_out_batch(count)
        drawn = torch.randn(count, PIXELS, generator=torch.Generator().manual_seed(20_251_102 + noise))
        with torch.no_grad():
            mu, log_var = self.networks.encode(_condition(patches, subjects).to(self.device))
            z = reparameterise(mu, log_var, drawn.to(self.device))
            return (euler_sample(self.networks.velocity, z, EULER_STEPS) * CONTRAST + GREY).clamp(0, 1).view(-1, 1, PATCH, PATCH)

    def _features_of(self, patches: torch.Tensor) -> torch.Tensor:
        return self.features(patches.to(self.device).expand(-1, 3, -1, -1))  # type: ignore[no-any-return]

    def _load_features(self) -> nn.Module:
        if self.config.dino_network is not None:
            return load_named_network(self.config.dino_network)
        features = PatchFeatures()
        load_weights(features, WEIGHTS / FEATURES_FILE)
        return features.requires_grad_(False).eval()


def _to_latent(patches: torch.Tensor) -> torch.Tensor:
    return ((patches - GREY) / CONTRAST).flatten(1)


def _condition(patches: torch.Tensor, subjects: torch.Tensor) -> torch.Tensor:
    """`[n, 28]`: the coarse grey levels, then the subject."""
    coarse = _to_latent(functional.adaptive_avg_pool2d(patches, COARSE))
    return torch.cat([coarse, functional.one_hot(subjects, len(SUBJECTS)).to(coarse)], dim=1)
