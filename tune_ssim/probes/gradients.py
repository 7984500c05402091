"""What the optimiser is about to see: norms of gradients that may be sharded over ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tune_ssim.base.errors import UserError


@torch.no_grad()
def total_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together, before clipping, as a 0-d tensor on their device (no synchronisation).

    Parameters without a gradient count as zero; without any gradient the norm is 0. At least in float32, also of bfloat16
    gradients. Where parameters are sharded (DTensor: `fully_shard`, tensor parallelism) it is the norm over all ranks, and
    every rank has to call this; under DDP all ranks hold the same gradient, and so the same norm. Raises UserError for FSDP1's flat
    parameters, of whose gradient a rank knows only its part."""
    parameters = list(parameters)
    return joint_norm(parameters, [parameter.grad for parameter in parameters])


def loss_norms(losses: Mapping[str, Tensor], parameters: Iterable[Tensor]) -> dict[str, Tensor]:
    """L2 norm of the gradient of each loss alone: `dbg/loss_grad/<name>` → 0-d tensor. Call it before `backward()`.

    Who pushes a shared backbone, and how hard? Hooks cannot tell, since there the gradients have been added up. This costs **one
    more backward pass for each loss** and one copy of the gradient at a time, and it keeps the graph (`retain_graph`), so do it
    at a cadence: `if taps.due: metrics |= loss_norms(...)`. Far cheaper: hand over the backbone's last activation instead of
    its parameters, then only the heads are run through. `.grad` is not touched; a loss that does not depend on `parameters`
    gets 0. The norms are this rank's, of these losses (one micro-batch), and scaled if the losses are.

    Raises UserError for a loss of more than one number, and for parameters that are sharded (their gradients exist only inside a
    real backward pass). Re-entrant activation checkpointing does not allow it: torch raises a RuntimeError then; use
    `use_reentrant=False`.
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
    """`‖Δθ‖ / (‖θ‖ + eps)` of one step, all tensors together: how far the parameters moved (note 002 §4). A 0-d tensor.

    `before`: copies made before `optimizer.step()`, one whole copy of the parameters: `[p.detach().clone() for p in ...]`.
    `after`: the parameters. `GradientTaps` does it at a cadence, with a part of each large parameter. Sharded parameters
    as in `total_norm`. Raises ValueError for lists that do not match."""
    before, after = list(before), list(after)
    if [p.shape for p in before] != [p.shape for p in after]:
        raise ValueError(f"update_ratio: {len(before)} tensors before and {len(after)} after do not have the same shapes")
    old = [local_part(p.detach()) for p in before]
    if not old:
        return torch.zeros(())
    moved = torch._foreach_sub([local_part(p.detach()) for p in after], old)
    return joint_norm(after, moved) / (joint_norm(after, old) + eps)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; importing their module for it would cost every process half a second."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a sharded tensor; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def sharding(tensor: Tensor) -> tuple[Any, tuple[bool, ...]] | None:
    """The mesh of ranks, and along which of its dimensions each rank holds a part (else a copy); None: an ordinary tensor."""
    if not is_sharded(tensor):
        return None
    return tensor.device_mesh, tuple(placement.is_shard() for placement in tensor.placements)  # type: ignore[attr-defined]


def joint_norm(owners: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> Tensor:
    """L2 norm of `tensors` together, over all ranks that hold a part of an owner. `tensors[i]` belongs to the parameter
    `owners[i]`: sharded like it, or this rank's part, or None."""
    whole: list[Tensor] = []
    # Every rank must join in every sum over ranks, so these go by the owner: a gradient may be missing on this rank alone.
    parts: dict[tuple[Any, tuple[bool, ...]], list[Tensor]] = {}
    may_be_flat = "torch.distributed.fsdp" in sys.modules
    if not may_be_flat and "torch.distributed.tensor" not in sys.modules:
        return _norm([tensor for tensor in tensors if tensor is not None])  # called in every step: nothing can be sharded
    for owner, tensor in zip(owners, tensors, strict=True):
        where = sharding(owner)
        if where is not None:
            held = parts.setdefault(where, [])
            if tensor is not None:
                if is_sharded(tensor):
                    tensor = tensor.redistribute(placements=owner.placements)  # type: ignore[attr-defined]  # as a rule nothing
                held.append(local_part(tensor))
        elif tensor is not None:
            if may_be_flat and hasattr(owner, "_fsdp_flattened"):  # how torch itself marks them
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

    # Ranks that hold copies (HSDP) must not count twice. In float64: the square of a large norm overflows float32.
    placements = [Partial() if sharded else Replicate() for sharded in is_shard]
    local = norm.double().square().to(mesh.device_type)
    return DTensor.from_local(local, mesh, placements, run_check=False).full_tensor().sqrt().to(norm.dtype)
