"""A small network whose parameters are sharded over the ranks by `fully_shard` (FSDP2), or copied to each by DDP."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tune_ssim.probes import total_norm
from tune_ssim.trials.training import Sample, Training

BATCH = 8


class ShardedTask(Training):
    """`wrap`: fsdp | ddp, over more than one rank. `mark`: rank 1 dies at step 5, once; the file says that it did."""

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.config, self.seed, self.n = dict(config), seed, 0
        self.gain = float(config.get("ssim_loss_weight", 0.0)) * float(config.get("ssim_grad_scale", 1.0))
        torch.manual_seed(3)
        self.teacher = nn.Linear(16, 16)
        self.model: nn.Module = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        self.rank, self.ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        if self.ranks > 1 and config["wrap"] == "fsdp":
            mesh = distributed.init_device_mesh("cpu", (self.ranks,))
            for layer in self.model:  # type: ignore[attr-defined]
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        elif self.ranks > 1:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)

    def step(self) -> dict[str, Any]:
        self.n += 1
        if "mark" in self.config and self.n == 5 and self.rank == 1 and not Path(self.config["mark"]).exists():
            Path(self.config["mark"]).touch()
            os._exit(1)
        x = torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(1000 * self.seed + self.n))[self.rank :: self.ranks]
        made, wanted = self.model(x), self.teacher(x).detach()
        main, extra = (made - wanted).square().mean(), (made - 1.01 * wanted).square().mean()
        self.optimizer.zero_grad()
        (main + self.gain * extra).backward()
        norm = total_norm(self.model.parameters())
        self.optimizer.step()
        return {"loss": main.detach(), "total_norm": norm, "ssim_active_fraction": 1.0}

    def sample(self, noise: int = 0) -> Sample:
        return Sample(torch.rand(2, 3, 8, 8))

    def evaluate(self) -> dict[str, float]:
        with torch.no_grad():
            x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
            error = (self.model(x) - self.teacher(x)).square().mean()
        return {"ssim": 1 - float(error), "psnr": float(-10 * error.log10())}

    def state_dict(self) -> dict[str, Any]:
        whole = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {"model": whole, "n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state["model"], options=StateDictOptions(full_state_dict=True))
        self.n = state["n"]

    def effective(self) -> dict[str, Any]:
        return {"ssim_loss_weight": self.config.get("ssim_loss_weight", 0.0), "lr": self.optimizer.param_groups[0]["lr"]}
