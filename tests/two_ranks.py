"""The bundled task on two processes, as somebody's launcher would run it: own batches, averaged gradients, the global norm.

    python two_ranks.py RANK RENDEZVOUS_FILE STUDY_FILE

calibrates the study and prints, on rank 0, what it found and what real steps say, as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tune_ssim.tasks.fundus_sr import FundusSR


class TwoRanks(FundusSR):
    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        super().setup(config, seed, device)
        self.model = DistributedDataParallel(self.model)  # averages the gradients of the ranks in every backward pass

    def step(self) -> dict[str, Any]:
        metrics = super().step()
        fraction = torch.tensor(float(metrics["ssim_active_fraction"]))
        distributed.all_reduce(fraction)
        return {**metrics, "ssim_active_fraction": fraction / distributed.get_world_size()}

    def _generator(self, n: int, stream: int, rank: int = 0) -> torch.Generator:
        return super()._generator(n, stream, distributed.get_rank())


def main(rank: int, rendezvous: str, study_file: str) -> None:
    from tune_ssim.before_launch.calibration import calibrate
    from tune_ssim.study.study import load_study

    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    study = load_study(Path(study_file))
    found = calibrate(study)
    errors = []
    for weight, max_t, scale in ((300.0, 0.3, 0.1), (5.0, 1.0, 1.0), (2000.0, 1.0, 0.1)):
        task = TwoRanks()
        setting = {"ssim_loss_weight": weight, "ssim_loss_max_t": max_t, "ssim_grad_scale": scale}
        task.setup({**study.task_config, **setting, "lr": 0.0}, study.search.seed)
        model, gate = found.model, found.model.max_ts.index(max_t)
        for k, n in enumerate(model.batches[:3]):
            assert n == k + 1
            v = torch.tensor([1.0, 0.0, weight * scale], dtype=torch.float64)
            predicted = (v @ torch.from_numpy(model.q[gate, k]).nan_to_num() @ v).sqrt().item()
            errors.append(abs(predicted / float(task.step()["total_norm"]) - 1))
    if rank == 0:
        told = {"method": found.model.method, "why": found.why, "check": found.check.relative_error, "errors": errors}
        print(json.dumps({**told, "ratio": found.model.predict_gain(30, 1.0).ratio}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
