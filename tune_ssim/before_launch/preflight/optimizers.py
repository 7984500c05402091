"""What the optimisers of a training get and do, seen from PyTorch's hooks around every `Optimizer.step`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tune_ssim.before_launch.preflight.plain import norm


@dataclass
class Updates:
    """gradients: before the first update, as the optimiser got them. outside: for each update but the first, how far the weights
    had moved since the one before, over the length of that one. damping: for each update of an optimiser with an epsilon, the
    median of root / (root + epsilon) over the second moments that are not zero: 1, or far less if epsilon outweighs them."""

    gradients: list[Tensor | None] | None = None
    outside: list[float] = field(default_factory=list)
    damping: list[float] = field(default_factory=list)


@contextlib.contextmanager
def observed_updates(parameters: Sequence[Tensor]) -> Iterator[Updates]:
    """Observes the updates in the block. parameters: those watched; if empty, those of the first optimiser that steps. An optimiser
    that wraps another one counts as one update, or as several that touch."""
    found, watched = Updates(), list(parameters)
    before, after = list[Tensor](), list[Tensor]()

    def copies() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in watched]

    def pre(optimizer: Any, *_: Any) -> None:
        nonlocal before
        if not watched:
            watched.extend(parameter for group in optimizer.param_groups for parameter in group["params"])
        if found.gradients is None:
            scale = getattr(optimizer, "grad_scale", None)  # of a GradScaler, if the optimiser's own kernel removes it
            found.gradients = [None if p.grad is None else p.grad.detach() / (1 if scale is None else scale) for p in watched]
        now = copies()
        if after:
            length = norm([a - b for a, b in zip(after, before, strict=True)])
            moved = norm([a - b for a, b in zip(now, after, strict=True)])
            if length:
                found.outside.append(moved / length)
        before = now

    def post(optimizer: Any, *_: Any) -> None:
        nonlocal after
        after = copies()
        roots = [
            (state["exp_avg_sq"].sqrt(), group["eps"])
            for group in optimizer.param_groups
            if group.get("eps")
            for state in (optimizer.state.get(p, {}) for p in group["params"])
            if isinstance(state.get("exp_avg_sq"), Tensor) and not group.get("amsgrad")
        ]
        steps = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
        decay = [group["betas"][1] for group in optimizer.param_groups if "betas" in group]
        if roots and steps and decay:
            correction = (1 - decay[0] ** max(steps[0], 1.0)) ** 0.5  # Kingma & Ba 2015: of the second moment
            shares = torch.cat([(r / (r + eps * correction))[r > 0].flatten() for r, eps in roots])
            if len(shares):
                found.damping.append(shares.median().item())

    hooks = [register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def typical(values: Sequence[float], otherwise: float) -> float:
    return median(values) if values else otherwise
