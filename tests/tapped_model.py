"""A backbone with two branches, and what autograd itself says about its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.backbone = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh())
        self.flow = nn.Sequential(nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 6))
        self.head = nn.Linear(10, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, run: Callable[..., Tensor] = lambda part, x: part(x)) -> dict[str, Tensor]:
        """`run(part, x)` calls a part of the model: a checkpoint, for example."""
        hidden = run(self.backbone, x)
        flow, head = run(self.flow, hidden), run(self.head, hidden)
        return {"loss_flow": (flow - x).square().mean(), "loss_head": head.cos().mean()}

    def loss(self, x: Tensor, **more: Callable[..., Tensor]) -> Tensor:
        return torch.stack(list(self(x, **more).values())).sum()

    def tags(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "flow": self.flow, "head": self.head}


def batch(number: int, rank: int = 0) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * number + rank))


def autograd_norms(loss: Tensor, tags: Mapping[str, Iterable[nn.Parameter] | nn.Module]) -> dict[str, float]:
    """Of each tag, by `torch.autograd.grad` in one pass over all parameters that are not frozen. The graph stays."""
    by_tag = {tag: list(part.parameters() if isinstance(part, nn.Module) else part) for tag, part in tags.items()}
    parameters = list({id(p): p for part in by_tag.values() for p in part if p.requires_grad}.values())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    squares = {id(p): 0.0 if g is None else g.double().square().sum().item() for p, g in zip(parameters, gradients, strict=True)}
    return {tag: sum(squares.get(id(p), 0.0) for p in part) ** 0.5 for tag, part in by_tag.items()}
