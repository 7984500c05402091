"""What the optimiser is about to see."""

from __future__ import annotations

from collections.abc import Iterable

import torch


@torch.no_grad()
def total_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """L2 norm of all gradients together, before clipping, as a 0-d tensor on their device (no synchronisation).

    Parameters without a gradient count as zero; without any gradient the norm is 0."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm(gradients)
