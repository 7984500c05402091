"""The weight that an `Adaptive` schedule gives a loss, from the gradients of a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed

from tune_ssim.losses.schedules import Adaptive


def balanced_weight(rule: Adaptive, others: Tensor, loss: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """`target_ratio · ‖∇ others‖ / ‖∇ loss‖`, at most `max_weight`, as a 0-d tensor without a gradient.

    others, loss: 0-d, on their graphs, which are kept. tensors: where both gradients are taken: all trained parameters, those of
    the last layer as in VQGAN, or the network's prediction. Costs a backward pass of each loss down to them; `.grad` is not
    modified. A non-finite norm gives a non-finite weight or loss, never another one.

    In a distributed training all ranks must call this, and get the same weight. Gradients of parameters are averaged over the
    ranks, as DDP does; of a prediction, whose samples differ from rank to rank, the squared norms are. `loss` may be constant on
    a rank without active samples.

    Raises ValueError if `others` does not depend on `tensors`. Parameters that are sharded (`fully_shard`) have no gradient
    outside of a real backward pass: pass the prediction."""
    tensors = list(tensors)
    main, auxiliary = (_norm(one, tensors, where) for one, where in ((others, "the main loss"), (loss, "")))
    return (rule.target_ratio * main / auxiliary.clamp(min=torch.finfo(auxiliary.dtype).tiny)).clamp(max=rule.max_weight)


def any_rank(is_so: bool, device: torch.device) -> bool:
    """Whether it is so on any rank. All ranks must call this."""
    if _ranks() == 1:
        return is_so
    found = torch.tensor(float(is_so), device=device)
    distributed.all_reduce(found)
    return found.item() > 0


def _norm(loss: Tensor, tensors: list[Tensor], required: str) -> Tensor:
    found: list[Tensor | None] = [None] * len(tensors)
    if loss.requires_grad and tensors:
        found = list(torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True))
    if required and all(gradient is None for gradient in found):
        raise ValueError(
            f"an adaptive weight needs {required} to depend on the given tensors: pass the trained parameters, or the network's "
            "prediction where they are sharded"
        )
    pairs = zip(tensors, found, strict=True)
    gradients = [torch.zeros_like(tensor) if gradient is None else gradient for tensor, gradient in pairs]
    flat = torch.cat([gradient.detach().flatten().to(gradients[0].device, torch.float32) for gradient in gradients])
    if (ranks := _ranks()) == 1:
        return torch.linalg.vector_norm(flat)
    if all(tensor.is_leaf for tensor in tensors):
        distributed.all_reduce(flat)
        return torch.linalg.vector_norm(flat / ranks)
    squares = flat.square().sum()
    distributed.all_reduce(squares)
    return squares.sqrt() / ranks


def _ranks() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
