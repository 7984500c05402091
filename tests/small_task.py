"""A task small enough for hundreds of trials: SGD pulls a picture towards a target, an auxiliary pull of strength
`ssim_loss_weight` pushes it. Too hard a push overshoots and diverges: the norm grows and the picture turns to noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from tune_ssim.base.errors import UserError
from tune_ssim.trials.training import Sample, Training

KNOWN = {
    "steps",
    "lr",
    "ssim_loss_weight",
    "ssim_loss_max_t",
    "ssim_grad_scale",
    "pixel_loss_weight",
    "fault",
    "max_grad_norm",
    "mark",
}


class SmallTask(Training):
    """`fault`: none | nan_at_5 | raise_at_5 | ruined_start | no_norm | drops_weight | slow_odd | raise_when_strong."""

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        if unknown := set(config) - KNOWN:
            raise UserError(f"small task: unknown key {sorted(unknown)[0]!r}")
        self.config, self.seed, self.n = dict(config), seed, 0
        self.fault = config.get("fault", "none")
        self.gain = float(config.get("ssim_loss_weight", 0.0)) * float(config.get("ssim_grad_scale", 1.0))
        generator = torch.Generator().manual_seed(5)
        self.target = torch.nn.functional.interpolate(
            torch.rand(1, 3, 4, 4, generator=generator), size=16, mode="bilinear", align_corners=True
        )
        self.x = (
            torch.randn(1, 3, 16, 16, generator=generator) * 3 if self.fault == "ruined_start" else self.target + 0.05
        ).clone()

    def step(self) -> dict[str, float | torch.Tensor]:
        self.n += 1
        if self.fault == "raise_at_5" and self.n == 5:
            raise RuntimeError("the training broke")
        if self.fault == "raise_when_strong" and self.gain > 500:
            raise RuntimeError("the loss exploded")
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.n)
        noise = 0.01 * torch.randn(self.x.shape, generator=generator)
        gradient = 2 * (self.x - self.target) + noise + self.gain * 0.1 * (self.x - self.target * 1.01)
        norm = gradient.norm()
        if (limit := self.config.get("max_grad_norm")) is not None:
            gradient = gradient * min(1.0, limit / float(norm))
        self.x = self.x - float(self.config.get("lr", 0.1)) * gradient
        loss = (self.x - self.target).square().mean()
        if self.fault == "nan_at_5" and self.n >= 5:
            loss = loss * math.nan
        metrics: dict[str, float | torch.Tensor] = {"loss": loss, "ssim_active_fraction": 1.0}
        return metrics if self.fault == "no_norm" else metrics | {"total_norm": norm}

    def sample(self, noise: int = 0) -> Sample:
        return Sample(self.x.clamp(0, 1), self.target, torch.nn.functional.avg_pool2d(self.target, 4), self.target)

    def evaluate(self) -> dict[str, float]:
        """`ssim`: agreement with the brighter picture that the auxiliary pull aims at, so that it rises with the gain."""
        error, wanted = (float((self.x - factor * self.target).square().mean()) for factor in (1.0, 1.01))
        return {"ssim": 1 - 1000 * wanted, "psnr": -10 * math.log10(max(error, 1e-12)) if math.isfinite(error) else -math.inf}

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x, "n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.x, self.n = state["x"], state["n"]

    def effective(self) -> dict[str, Any]:
        found = {
            "lr": 0.1,
            "max_grad_norm": None,
            **{name: value for name, value in self.config.items() if name not in ("fault", "mark")},
        }
        if self.fault == "drops_weight":
            found["ssim_loss_weight"] = 0.0
        return found
