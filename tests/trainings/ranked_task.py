"""The small task over ranks: each sees a part of the noise, gradients are averaged, as DDP does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from small_task import SmallTask
from torch import distributed

from tune_ssim.trials.training import Part


class RankedTask(SmallTask):
    """`fault` besides SmallTask's: own_norm | die_at_5 (rank 1, once: `mark` names a file)."""

    def step(self) -> dict[str, Any]:
        if self.fault == "die_at_5" and self.n == 4 and rank() == 1 and not Path(self.config["mark"]).exists():
            Path(self.config["mark"]).touch()
            os._exit(1)
        before = self.x.clone()
        found = super().step()
        gradient = (before - self.x) / float(self.config.get("lr", 0.1))
        if distributed.is_initialized():
            distributed.all_reduce(gradient)
            gradient /= distributed.get_world_size()
        self.x = before - float(self.config.get("lr", 0.1)) * gradient
        found["total_norm"] = gradient.norm() * (1 + rank() if self.fault == "own_norm" else 1)
        found["rank"] = float(rank())
        return found


class LoadedTask(RankedTask):
    """Started from the weights in the file `mark`."""

    def parts(self) -> dict[str, Part]:
        return {"network": Part(torch.nn.Linear(2, 2), trains=True, weights=Path(self.config["mark"]))}

    def fingerprints(self) -> dict[str, str]:
        return {"data/rank": str(rank())}


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0
