"""Gradient norms before the optimiser step, including gradients that are sharded over ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tune_ssim.base.errors import UserError


@torch.no_grad()
def total_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Global L2 norm of all gradients, as a 0-d tensor on their device (no synchronisation). Call it before clipping.

    Parameters without a gradient count as zero; with no gradients at all the norm is 0. Computed in float32 or better, also
    for bfloat16 gradients. For sharded parameters (DTensor: `fully_shard`, tensor parallelism) it is the norm over all ranks,
    and every rank must call this. Under DDP all ranks have the same gradient and the same norm. Raises UserError for FSDP1's
    flat parameters, because a rank has only its part of their gradient."""
    parameters = list(parameters)
    return joint_norm(parameters, [parameter.grad for parameter in parameters])


def loss_norms(losses: Mapping[str, Tensor], parameters: Iterable[Tensor]) -> dict[str, Tensor]:
    """L2 norm of the gradient of each loss separately: `dbg/loss_grad/<name>` → 0-d tensor. Call it before `backward()`.

    Shows how strongly each loss drives a shared backbone; hooks see only the sum of the gradients. Costs **one extra backward
    pass per loss** and memory for one copy of the gradient, and keeps the graph (`retain_graph`), so call it only every few
    steps: `if taps.due: metrics |= loss_norms(...)`. It is much cheaper to pass the backbone's last activation instead of its
    parameters: then only the heads run backward. `.grad` is not modified. A loss that does not depend on `parameters` gets 0.
    The norms are those of this rank and micro-batch, and are scaled if the losses are scaled.

    Raises UserError for a loss with more than one element, and for sharded parameters (their gradients exist only inside a real
    backward pass). With re-entrant activation checkpointing torch raises a RuntimeError; use `use_reentrant=False`.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if any(is_sharded(parameter) for parameter in parameters):
        raise UserError("loss_norms: got sharded parameters; hand over the backbone's last activation instead")
    found = {}
    for name, loss in losses.items():
        if loss.numel() != 1:
            raise UserError(f"loss_norms: {name!r} has shape {tuple(loss.shape)}; a gradient is of one number: reduce it first")
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        if loss.requires_grad and parameters:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found[f"dbg/loss_grad/{name}"] = joint_norm(parameters, gradients)
    return found


@torch.no_grad()
def update_ratio(before: Iterable[Tensor], after: Iterable[Tensor], *, eps: float = 1e-12) -> Tensor:
    """`‖Δθ‖ / (‖θ‖ + eps)` of one optimiser step over all tensors together, as a 0-d tensor (note 002 §4).

    `before`: a full copy of the parameters from before `optimizer.step()`: `[p.detach().clone() for p in ...]`.
    `after`: the parameters. `GradientTaps` measures this periodically on a sample of each large parameter. Sharded parameters
    are treated as in `total_norm`. Raises ValueError if the shapes do not match."""
    before, after = list(before), list(after)
    if [p.shape for p in before] != [p.shape for p in after]:
        raise ValueError(f"update_ratio: {len(before)} tensors before and {len(after)} after do not have the same shapes")
    old = [local_part(p.detach()) for p in before]
    if not old:
        return torch.zeros(())
    moved = torch._foreach_sub([local_part(p.detach()) for p in after], old)
    return joint_norm(after, moved) / (joint_norm(after, old) + eps)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Does not import the DTensor module, which would cost every process half a second."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def sharding(tensor: Tensor) -> tuple[Any, tuple[bool, ...]] | None:
    """The device mesh, and for each mesh dimension whether ranks hold shards (else replicas); None for an ordinary tensor."""
    if not is_sharded(tensor):
        return None
    return tensor.device_mesh, tuple(placement.is_shard() for placement in tensor.placements)  # type: ignore[attr-defined]


def joint_norm(owners: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> Tensor:
    """Global L2 norm of `tensors`, over all ranks that hold shards. `tensors[i]` belongs to the parameter `owners[i]`: it is
    sharded in the same way, or is this rank's shard, or None."""
    whole: list[Tensor] = []
    # All ranks must take part in each reduction. Group by owner, because a gradient may be missing on this rank only.
    parts: dict[tuple[Any, tuple[bool, ...]], list[Tensor]] = {}
    may_be_flat = "torch.distributed.fsdp" in sys.modules
    if not may_be_flat and "torch.distributed.tensor" not in sys.modules:
        return _norm([tensor for tensor in tensors if tensor is not None])  # fast path for every step: nothing can be sharded
    for owner, tensor in zip(owners, tensors, strict=True):
        where = sharding(owner)
        if where is not None:
            held = parts.setdefault(where, [])
            if tensor is not None:
                if is_sharded(tensor):
                    tensor = tensor.redistribute(placements=owner.placements)  # type: ignore[attr-defined]  # usually a no-op
                held.append(local_part(tensor))
        elif tensor is not None:
            if may_be_flat and hasattr(owner, "_fsdp_flattened"):  # the mark that torch itself uses
                raise UserError(
                    "parameters are sharded by FullyShardedDataParallel, and this rank's gradients are a part of the whole; use "
                    "fully_shard (FSDP2), or for the total norm what its clip_grad_norm_ returns"
                )
            whole.append(tensor)
    norms = [_norm(whole)] if whole or not parts else []
    norms += [_norm_over_ranks(_norm(held), mesh, is_shard) for (mesh, is_shard), held in parts.items()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _norm(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    if any(tensor.is_sparse for tensor in tensors):
        tensors = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    if len({tensor.dtype for tensor in tensors}) == len({tensor.device for tensor in tensors}) == 1:
        return torch.linalg.vector_norm(torch.stack(_norms(tensors)))
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    norms = [norm for group in by_kind.values() for norm in _norms(group)]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(tensors, 2, dtype=torch.promote_types(tensors[0].dtype, torch.float32)))


def _norm_over_ranks(norm: Tensor, mesh: Any, is_shard: tuple[bool, ...]) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    # Replicas (HSDP) must not count twice. In float64, because the square of a large norm overflows float32.
    placements = [Partial() if sharded else Replicate() for sharded in is_shard]
    local = norm.double().square().to(mesh.device_type)
    return DTensor.from_local(local, mesh, placements, run_check=False).full_tensor().sqrt().to(norm.dtype)
