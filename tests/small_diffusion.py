"""A small pixel-space diffusion trainer in the style of public ones: super-resolution, fine-tuned from weights of its own.

    coarse image ─┐
    x_t = α x + σ ε ─► U-Net ─► epsilon | x0 | v | velocity ─► x prediction ─► SSIM / L2

`predicts` says what the network is trained for: `epsilon`, `x0`, `v` with the cosine law α = cos(πt/2), σ = sin(πt/2), sampled with
DDIM, or `velocity` with the straight path of flow matching, sampled with Euler steps. Everything that sets these trainings apart is
a class attribute or a small method, for variations to replace.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from skimage import data
from torch import Tensor, nn
from torch.nn import functional

from tune_ssim.losses import DecodedLoss, TimeLaw, ssim
from tune_ssim.probes import total_norm
from tune_ssim.tasks.fundus_networks import Denoiser
from tune_ssim.trials.training import Forward, Part, Sample, Training

LOSS = {
    "ssim_loss_weight": 0.0,
    "ssim_loss_max_t": 0.3,
    "ssim_grad_scale": 1.0,
    "ssim_grad_clamp": None,
    "pixel_loss_weight": 0.0,
    "pixel_loss_max_t": 0.3,
}
DEFAULTS = {
    "steps": 200,
    "lr": 1e-4,
    "batch_size": 8,
    "crop": 32,
    "max_grad_norm": 1.0,
    "preset": "adamw_clip",
    "t_law": "uniform",
    "timestep_shift": 1.0,
    "measure_main_norm": False,
}
LAST_T = 0.98  # above it an epsilon prediction says nothing about the image
DETAIL = 0.1  # deviation of an image from its enlarged coarse one, in [-1, 1]
SAMPLING_TIMES = (LAST_T, 0.75, 0.5, 0.25, 0.0)
WEIGHTS = Path(tempfile.gettempdir()) / f"tune_ssim_small_diffusion_{os.getuid()}"


@lru_cache
def photograph(part: str) -> Tensor:
    """`[3, H, W]` in [0, 1]: the upper 70 % of a photograph of scikit-image to `train` on, the rest `held_out`."""
    pixels = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1).float() / 255
    return pixels[:, :358] if part == "train" else pixels[:, 358:]


def random_numbers(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def cut(photo: Tensor, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    rows = torch.randint(photo.shape[1] - size[0], (count,), generator=generator).tolist()
    columns = torch.randint(photo.shape[2] - size[1], (count,), generator=generator).tolist()
    return torch.stack([photo[:, r : r + size[0], c : c + size[1]] for r, c in zip(rows, columns, strict=True)])


def per_sample(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)


def schedule(predicts: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of image and noise at time t."""
    if predicts == "velocity":
        return per_sample(1 - t), per_sample(t)
    return per_sample(torch.cos(math.pi / 2 * t)), per_sample(torch.sin(math.pi / 2 * t))


def target_of(predicts: str, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = schedule(predicts, t)
    return {"epsilon": noise, "x0": x, "v": alpha * noise - sigma * x, "velocity": noise - x}[predicts]


class Preconditioned(nn.Module):
    """A U-Net whose output is scaled as in EDM (Karras et al. 2022), around the enlarged coarse image."""

    def __init__(self, predicts: str) -> None:
        super().__init__()
        self.predicts = predicts
        self.body = Denoiser(16, latent_channels=3)
        nn.init.zeros_(self.body.conv_out.weight)
        nn.init.zeros_(self.body.conv_out.bias)

    def forward(self, x_t: Tensor, t: Tensor, coarse: Tensor) -> Tensor:
        alpha, sigma = schedule(self.predicts, t)
        noise_level, large = sigma / alpha, functional.interpolate(coarse, scale_factor=4, mode="bilinear")
        total = DETAIL**2 + noise_level**2
        x = (DETAIL**2 * x_t / alpha + noise_level**2 * large) / total
        x = x + DETAIL * noise_level / total.sqrt() * self.body(x_t, t, coarse).float()
        return target_of(self.predicts, x, (x_t - alpha * x) / sigma, t)


class SmallDiffusion(Training):
    predicts = "epsilon"
    ratio = 1.0  # width of a crop over its height
    gray = False
    precision = torch.float32
    ema_decay: float | None = None
    micro_batches = 1

    # -- what variations replace

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return schedule(self.predicts, t)

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict."""
        return target_of(self.predicts, x, noise, t)

    def clean_from(self, x_t: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        """The prediction of the clean image, in [-1, 1]."""
        alpha, sigma = self.alpha_sigma(t)
        if self.predicts == "epsilon":
            return (x_t - sigma * predicted) / alpha
        if self.predicts == "x0":
            return predicted
        return alpha * x_t - sigma * predicted if self.predicts == "v" else x_t - sigma * predicted

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return self.law.sample(count, generator).clamp(1e-3, LAST_T)

    def main_loss(self, predicted: Tensor, target: Tensor, t: Tensor) -> Tensor:
        return functional.mse_loss(predicted, target)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        kind = torch.optim.SGD if self.config["preset"] == "sgd" else torch.optim.AdamW
        return kind(parameters, lr=self.config["lr"])

    def training_images(self, n: int) -> Tensor:
        height = self.config["crop"]
        size = height, int(self.ratio * height)
        return self.colour(cut(photograph("train"), self.config["batch_size"], size, random_numbers(self.seed, n, 0)))

    # -- the contract

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        known = {**DEFAULTS, **LOSS}
        if unknown := sorted(set(config) - set(known)):
            raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(known)}")
        self.config, self.seed, self.n = {**known, **config}, seed, 0
        self.law = TimeLaw(self.config["t_law"], self.config["timestep_shift"])
        self.loss = DecodedLoss(**{name: self.config[name] for name in LOSS})
        self.network = Preconditioned(self.predicts)
        self.network.load_state_dict(load_file(pretrained(self.predicts)))
        self.average = copy.deepcopy(self.network).requires_grad_(False) if self.ema_decay is not None else None
        self.optimizer = self.make_optimizer(self.trainable_parameters())
        self.held_out: dict[int, tuple[Tensor, ...]] = {}

    def batch(self, n: int) -> tuple[Tensor, ...]:
        """Images in [-1, 1], coarse ones, noise and t of step n."""
        generator = random_numbers(self.seed, n, 1)
        x = 2 * self.training_images(n) - 1
        t = self.draw_times(len(x), generator)
        return x, functional.avg_pool2d(x, 4), torch.randn(x.shape, generator=generator), t

    def run(self, x_t: Tensor, t: Tensor, coarse: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision is torch.bfloat16):
            return self.network(x_t, t, coarse).float()

    def forward(self, n: int) -> Forward:
        return self.forward_of(*self.batch(n))

    def forward_of(self, x: Tensor, coarse: Tensor, noise: Tensor, t: Tensor) -> Forward:
        alpha, sigma = self.alpha_sigma(t)
        x_t, target = alpha * x + sigma * noise, self.target(x, noise, t)
        predicted = self.run(x_t, t, coarse)
        clean = self.clean_from(x_t, predicted, t)
        main = self.main_loss(predicted, target, t)
        return Forward(main, clean, t, x * 0.5 + 0.5, self.loss, lambda z: z, target, clean=x)

    def step(self) -> dict[str, Any]:
        self.n += 1
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, Any] = {"loss": 0.0, "loss_flow": 0.0, "ssim_active_fraction": 0.0}
        chunks = [tensor.chunk(self.micro_batches) for tensor in self.batch(self.n)]
        if self.config["measure_main_norm"]:
            for micro in zip(*chunks, strict=True):
                (self.forward_of(*micro).main / self.micro_batches).backward()
            metrics["total_norm_main"] = total_norm(self.trainable_parameters())
            self.optimizer.zero_grad(set_to_none=True)
        for micro in zip(*chunks, strict=True):
            forward = self.forward_of(*micro)
            auxiliary = forward.auxiliary()
            loss = self.share(forward.main + auxiliary.total)
            loss.backward()
            metrics["loss"] += loss.detach()
            metrics["loss_flow"] += forward.main.detach() / self.micro_batches
            metrics["ssim_active_fraction"] += auxiliary.ssim_active_fraction / self.micro_batches
        limit = self.config["max_grad_norm"] or math.inf
        metrics["total_norm"] = nn.utils.clip_grad_norm_(self.trainable_parameters(), limit)
        self.optimizer.step()
        if self.average is not None:
            for average, parameter in zip(self.average.parameters(), self.network.parameters(), strict=True):
                average.lerp_(parameter.detach(), 1 - float(self.ema_decay))
        return metrics

    def share(self, loss: Tensor) -> Tensor:
        """What one micro-batch adds to the loss of the step."""
        return loss / self.micro_batches

    def sample(self, noise: int = 0) -> Sample:
        return self._sample(self.network, noise)

    def sample_ema(self, noise: int = 0) -> Sample | None:
        return None if self.average is None else self._sample(self.average, noise)

    def evaluate(self) -> dict[str, float]:
        found = self.sample()
        error = (found.images - found.references).square().mean(dim=(1, 2, 3))
        return {"ssim": ssim(found.images, found.references).mean().item(), "psnr": -10 * error.log10().mean().item()}

    def state_dict(self) -> dict[str, Any]:
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "n": self.n, **average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.n = state["n"]

    def effective(self) -> dict[str, Any]:
        return {**self.config, **self.loss.effective(), "lr": self.optimizer.param_groups[0]["lr"]}

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def parts(self) -> dict[str, Part]:
        found = {"denoiser": Part(self.network, trains=True, weights=pretrained(self.predicts))}
        if self.average is not None:
            found["denoiser_ema"] = Part(self.average, trains=False, kind="ema")
        return found

    # -- inference

    def colour(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous() if self.gray else images

    def inputs(self, noise: int) -> tuple[Tensor, Tensor, Tensor]:
        """Held-out crops in [0, 1], coarse ones in [-1, 1], and the noise to start from."""
        if noise not in self.held_out:
            height = self.config["crop"]
            images = self.colour(cut(photograph("held_out"), 32, (height, int(self.ratio * height)), random_numbers(7)))
            start = torch.randn(images.shape, generator=random_numbers(8, noise))
            self.held_out[noise] = images, functional.avg_pool2d(2 * images - 1, 4), start
        return self.held_out[noise]

    @torch.no_grad()
    def _sample(self, network: nn.Module, noise: int) -> Sample:
        images, coarse, x_t = self.inputs(noise)
        trained, training = self.network, self.network.training
        self.network = network.eval()
        try:
            generated = self.generate(x_t, coarse)
        finally:
            self.network = trained.train(training)
        return Sample((generated * 0.5 + 0.5).clamp(0, 1), images, coarse * 0.5 + 0.5)

    def generate(self, x_t: Tensor, coarse: Tensor) -> Tensor:
        """DDIM without new noise; on the straight path this is the Euler method."""
        for now, following in pairwise(SAMPLING_TIMES):
            t = torch.full((len(x_t),), now)
            clean = self.clean_from(x_t, self.run(x_t, t, coarse), t).clamp(-1, 1)
            alpha, sigma = self.alpha_sigma(t)
            noise = (x_t - alpha * clean) / sigma
            alpha, sigma = self.alpha_sigma(torch.full((len(x_t),), following))
            x_t = alpha * clean + sigma * noise
        return x_t


def pretrained(predicts: str) -> Path:
    """Weights after 400 steps of AdamW, trained once on a machine. Those of a path serve all predictions on it."""
    path = WEIGHTS / ("straight.safetensors" if predicts == "velocity" else "cosine.safetensors")
    if not path.exists():
        torch.manual_seed(3)
        network = Preconditioned(predicts)
        task = type("Pretraining", (SmallDiffusion,), {"predicts": predicts})()
        task.config, task.seed, task.law, task.network = {**DEFAULTS, **LOSS}, 3, TimeLaw(), network
        task.loss = DecodedLoss(ssim_loss_weight=0.0, ssim_loss_max_t=0.3)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=400)
        for n in range(400):
            optimizer.zero_grad()
            task.forward(n).main.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        WEIGHTS.mkdir(mode=0o700, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file(network.state_dict(), unfinished, metadata={"format": "pt"})
        unfinished.rename(path)
    return path
