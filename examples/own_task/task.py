"""The training of `plain_loop.py` as a task of tune_ssim, with an SSIM loss whose weight is to be found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from plain_loop import Network, cut, mix, photographs, pixelate, sharpen
from torch import nn
from torch.nn import functional

from tune_ssim import Sample, Training
from tune_ssim.losses import DecodedLoss, ssim

DEFAULTS = {"steps": 200, "lr": 1e-3, "batch_size": 8, "max_grad_norm": 1.0}
LOSS = {
    "ssim_loss_weight": 0.0,
    "ssim_loss_max_t": 0.3,
    "ssim_grad_scale": 1.0,
    "ssim_grad_clamp": None,
    "pixel_loss_weight": 0.0,
    "pixel_loss_max_t": 0.3,
}


class MyTask(Training):
    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        known = {**DEFAULTS, **LOSS}
        if unknown := sorted(set(config) - set(known)):
            raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(known)}")
        self.config = {**known, **config}
        self.seed, self.n = seed, 0
        self.photograph, self.held_out = photographs()  # this one stays on the CPU, whatever the device
        torch.manual_seed(seed)
        self.network = Network()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.config["lr"])
        self.loss = DecodedLoss(**{name: self.config[name] for name in LOSS}, image_range="[0,1]")

    def step(self) -> dict[str, float | torch.Tensor]:
        self.n += 1
        generator = random_numbers(self.seed, self.n)  # of this step, whatever the configuration: the same in every trial
        batch_size = self.config["batch_size"]
        images = cut(self.photograph, batch_size, generator)
        t, noise = torch.rand(batch_size, generator=generator), torch.randn(images.shape, generator=generator)
        predicted = self.network(mix(images, noise, t), t, pixelate(images))
        main = functional.mse_loss(predicted, images)
        auxiliary = self.loss(predicted, t, images, decode=lambda x: x)  # a latent model gives its VAE's decode here
        loss = main + auxiliary.total

        self.optimizer.zero_grad()
        loss.backward()
        limit = self.config["max_grad_norm"] or math.inf
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), limit)  # as it was before clipping
        self.optimizer.step()
        return {"loss": loss.detach(), "loss_flow": main.detach(), "total_norm": norm, **auxiliary.metrics()}

    def sample(self, noise: int = 0) -> Sample:
        start = torch.randn(self.held_out.shape, generator=random_numbers(0, noise))
        return Sample(sharpen(self.network, pixelate(self.held_out), start), references=self.held_out)

    def evaluate(self) -> dict[str, float]:
        images = self.sample().images
        error = (images - self.held_out).square().mean(dim=(1, 2, 3))
        return {"ssim": ssim(images, self.held_out).mean().item(), "psnr": -10 * error.log10().mean().item()}

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.n = state["n"]

    def effective(self) -> dict[str, Any]:
        return {**self.config, **self.loss.effective(), "lr": self.optimizer.param_groups[0]["lr"]}


def random_numbers(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
