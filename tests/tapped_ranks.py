"""Taps on two processes: DDP, `fully_shard`, parameters sharded by hand. Each rank has batches of its own.

    python tapped_ranks.py RANK RENDEZVOUS_FILE

prints one JSON line: for each setting what the taps of this rank say, and what autograd says on the batches of both ranks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch
from tapped_model import Branches, autograd_norms, batch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tune_ssim.losses import DecodedLoss
from tune_ssim.probes import GradientTaps, loss_norms, total_norm, update_ratio

ACCUMULATION, LR = 3, 0.1


class LossOf(nn.Module):
    """DDP and `fully_shard` want the whole computation behind `forward`."""

    def __init__(self, model: nn.Module, run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.model, self.run = model, {} if run is None else {"run": run}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.loss(x, **self.run) / ACCUMULATION


def observe(wrapped: nn.Module, model: Branches, synchronise: Callable[[bool], Any], reference: Branches) -> dict[str, Any]:
    """Two optimiser steps; the readings of both, and what they had to be."""
    tags = {**model.tags(), "all": model}  # modules within modules
    taps = GradientTaps(tags, every=1, accumulation=ACCUMULATION, update_elements=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    result: dict[str, Any] = {"found": [], "norms": [], "updates": []}
    for step in range(2):
        for k in range(ACCUMULATION):
            with synchronise(k == ACCUMULATION - 1):
                wrapped(batch(ACCUMULATION * step + k, distributed.get_rank())).backward()
        reading = {**taps.read(), "total": total_norm(model.parameters())}
        result["found"].append({name: float(value) for name, value in reading.items()})
        optimizer.step()
        optimizer.zero_grad()

        losses = [reference.loss(batch(ACCUMULATION * step + k, rank)) for k in range(ACCUMULATION) for rank in (0, 1)]
        loss, everything = sum(losses) / len(losses), list(reference.parameters())
        result["norms"].append(autograd_norms(loss, {**reference.tags(), "total": everything}))
        before = {tag: [p.detach().clone() for p in part.parameters()] for tag, part in reference.tags().items()}
        for parameter, gradient in zip(everything, torch.autograd.grad(loss, everything), strict=True):
            parameter.data.add_(gradient, alpha=-LR)
        after = {tag: list(part.parameters()) for tag, part in reference.tags().items()}
        result["updates"].append({tag: float(update_ratio(before[tag], after[tag])) for tag in before})
    return result


def data_parallel(**options: Any) -> dict[str, Any]:
    model = Branches()
    run = options.pop("run", None)
    wrapped = DistributedDataParallel(LossOf(model, run), **options)
    # With a static graph DDP reduces in every pass: there is no no_sync().
    return observe(wrapped, model, lambda last: nullcontext() if last or options else wrapped.no_sync(), Branches())


def checkpointed(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(part, x.requires_grad_() if x.is_leaf else x, use_reentrant=True)


def sharded(reduce_always: bool) -> dict[str, Any]:
    model = Branches()
    wrapped = LossOf(model)
    mesh = init_device_mesh("cpu", (2,))
    for part in (model.flow, wrapped):  # one unit of its own, the rest in the root's
        fully_shard(part, mesh=mesh)

    def synchronise(last: bool) -> Any:
        wrapped.set_requires_gradient_sync(last or reduce_always)
        return nullcontext()

    return observe(wrapped, model, synchronise, Branches())


def by_hand() -> dict[str, float]:
    """Shards, copies and ordinary tensors in one model, an odd number of rows, and a gradient that is missing on one rank."""
    line, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator) for shape in ((5, 4), (3,), (6,), (1, 7), (4, 3))]
    kinds: list[Any] = [[Shard(0)], [Replicate()], None, [Shard(0)], [Replicate(), Shard(1)]]
    parameters = []
    for tensor, kind in zip(whole, kinds, strict=True):
        mesh = grid if kind is not None and len(kind) == 2 else line
        parameter = nn.Parameter(tensor if kind is None else distribute_tensor(tensor, mesh, kind))
        gradient = 2 * tensor
        parameter.grad = gradient if kind is None else distribute_tensor(gradient, mesh, kind)
        parameters.append(parameter)
    found = {"norm": float(total_norm(parameters)), "expected": 2 * torch.cat([t.flatten() for t in whole]).norm().item()}
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.25)
    found["update"] = float(update_ratio(before, parameters))
    if distributed.get_rank() == 1:
        parameters[3].grad = None
    found["missing"] = float(total_norm(parameters))  # rank 0 holds the only row of the last one
    tensor_parallel = nn.Parameter(distribute_tensor(whole[0], line, [Shard(1)]))
    taps = GradientTaps({"all": [tensor_parallel]})
    (tensor_parallel * tensor_parallel).sum().full_tensor().backward()
    reading = taps.read()
    found["real pass"] = float(reading["dbg/grad_all"]) / (2 * whole[0].norm().item())
    found["coverage"] = float(reading["dbg/all_coverage"])
    try:
        loss_norms({"a": parameters[0].sum()}, parameters)
    except ValueError as error:
        found["refused"] = float("sharded" in str(error))
    return found


def adaptive(of_prediction: bool) -> dict[str, float]:
    """Under DDP: the gradient of the SSIM loss over that of the main loss, both averaged over the ranks. Only rank 0 has an active
    sample. of_prediction: the weight is chosen at the network's prediction."""
    rank, generator = distributed.get_rank(), torch.Generator().manual_seed(distributed.get_rank())
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 3, padding=1)
    model, x = DistributedDataParallel(network), torch.rand(2, 3, 16, 16, generator=generator)
    loss = DecodedLoss({"adaptive": {"target_ratio": 0.5}}, 0.3, image_range="[0,1]")
    z0, t = model(x), torch.tensor([0.2, 0.9]) if rank == 0 else torch.tensor([0.8, 0.9])
    main = (z0 - x).square().mean()
    where = [z0] if of_prediction else list(network.parameters())
    result = loss(z0, t, x, lambda z: z, step=1, main=main, parameters=where)
    gradients = {}
    for name, term in (("main", main), ("ssim", result.total)):
        found = torch.autograd.grad(term, where, retain_graph=True, allow_unused=True)
        gradients[name] = torch.cat(
            [(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(where, found, strict=True)]
        )
        if of_prediction:  # the samples of the ranks are parts of one batch
            everything = [torch.zeros_like(gradients[name]) for _ in range(2)]
            distributed.all_gather(everything, gradients[name])
            gradients[name] = torch.cat(everything)
        else:
            distributed.all_reduce(gradients[name])
    (main + result.total).backward()
    return {"ratio": float(gradients["ssim"].norm() / gradients["main"].norm()), "norm": float(total_norm(network.parameters()))}


def flat() -> str:
    """What is said of FSDP1."""
    model = Branches()
    wrapped = FullyShardedDataParallel(LossOf(model), use_orig_params=True, device_id=torch.device("cpu"))
    taps = GradientTaps(model.tags())
    wrapped(batch(0)).backward()
    try:
        taps.read()
    except ValueError as error:
        return str(error)
    return "nothing"


def main(rank: int, rendezvous: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    told = {
        "ddp": data_parallel(),
        "ddp, re-entrant checkpoints": data_parallel(run=checkpointed, static_graph=True),
        "fully_shard": sharded(reduce_always=False),
        "fully_shard, reduced in every pass": sharded(reduce_always=True),
        "by hand": by_hand(),
        "flat": flat(),
        "adaptive": [adaptive(False), adaptive(True)],
    }
    print(json.dumps(told), flush=True)
    distributed.destroy_process_group()
    os._exit(
        0
    )  # torch's own threads may abort the interpreter while it shuts down ("terminate called without an active exception")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
