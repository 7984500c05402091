"""Checks of the first updates: they descend, with the gradient of their own step, and samples follow them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tune_ssim.before_launch.preflight import step_rules
from tune_ssim.before_launch.preflight.plain import cosine, norm
from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.before_launch.preflight.sampling import check_weights
from tune_ssim.before_launch.preflight.steps import seeded
from tune_ssim.before_launch.preflight.subject import Subject, Unavailable, call, numbers
from tune_ssim.records import LOSS, LOSS_FLOW, TOTAL_NORM
from tune_ssim.trials.training import Sample

MAX_STEPS = 25  # a GradScaler or a warm-up may leave the first steps without an update
BLACK_BOX_STEPS = 24  # of a task that does not show its forward pass
FAR = 1e-3  # of the norm of the weights; the loss is compared there
WORK = {"setup": 2, "step": 4, "forward": 2, "sample": 3}  # of `check_updates`, if the first two steps change the weights
WEIGHTS = ("ssim_loss_weight", "pixel_loss_weight")

Vector = Sequence[Tensor]


def check_updates(subject: Subject, base: Mapping[str, Any]) -> Iterator[Check]:
    """Follows the main loss alone to its second update."""
    known = call(subject.make(base), "effective")
    task = subject.make({**base, **{name: 0.0 for name in WEIGHTS if name in known}})
    if not task.abilities().has("forward", "trainable_parameters"):
        yield step_rules.loss_under_updates(
            "update/descent", *(_losses(made) for made in (subject.unmoved(base), subject.make(base)))
        )
    if not task.abilities().trainable_parameters:
        raise Unavailable("the task has no trainable_parameters()")
    parameters = [p for p in call(task, "trainable_parameters") if p.requires_grad]
    start: Sample = call(task, "sample", 0)
    if task.abilities().forward:
        yield from _check_gradients(task, parameters)
    yield from check_weights(task, parameters, start)


def _losses(task: Any) -> list[float]:
    """The main loss of the first steps, as recorded."""
    steps = [numbers(call(task, "step")) for _ in range(BLACK_BOX_STEPS)]
    return [step.get(LOSS_FLOW, step.get(LOSS, math.nan)) for step in steps]


def _check_gradients(task: Any, parameters: list[torch.nn.Parameter]) -> Iterator[Check]:
    slope = 0.0
    gradients: list[Vector] = []
    moves: list[Vector] = []
    recorded: list[float | None] = []
    kept: Vector = []  # gradients that the step before leaves behind, clipped or not
    for n in range(1, MAX_STEPS + 1):
        found = torch.autograd.grad(call(task, "forward", n).main, parameters, allow_unused=True)
        before = [p.detach().clone() for p in parameters]
        kept = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        recorded.append(numbers(call(task, "step")).get(TOTAL_NORM))
        move = [p.detach() - old for p, old in zip(parameters, before, strict=True)]
        if norm(move) > 0:
            if not moves:
                slope = _slope(task, n, parameters, before, move)
            gradients.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)])
            moves.append(move)
        if len(moves) == 2:
            break
    else:
        raise Unavailable(f"fewer than two of the first {MAX_STEPS} steps change the weights")
    descent = step_rules.descent(-cosine(moves[0], gradients[0]), slope)
    yield descent
    if descent.status != "ok":
        return
    first, second = gradients
    last = moves[1]
    both = norm([a + b for a, b in zip(kept if norm(kept) else first, second, strict=True)])
    span: list[Vector] = [first, _without(moves[0], [first])]
    own, left = _without(second, span), _without(last, span)
    yield step_rules.freshness(
        share=norm(left) / norm(last),
        cosine=-cosine(left, own),
        total_norm=recorded[-1],
        expected=norm(second),
        accumulated=both,
    )


def _slope(task: Any, n: int, parameters: Sequence[Tensor], before: Vector, move: Vector) -> float:
    """Relative change of step n's main loss along the update, from as far behind it. Unlike a gradient it sees no hooks."""
    scale = FAR * norm(before) / norm(move)
    after = [p.detach().clone() for p in parameters]
    losses = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            for parameter, old, step in zip(parameters, before, move, strict=True):
                parameter.copy_(old + sign * scale * step)
            losses.append(seeded(task, "forward", n).main.item())
        for parameter, new in zip(parameters, after, strict=True):
            parameter.copy_(new)
    return (losses[0] - losses[1]) / sum(losses) * 2


def _without(vector: Vector, span: Sequence[Vector]) -> Vector:
    """The vector without its part in the span of orthogonal vectors."""
    for other in span:
        size = sum((b.double().square().sum().item() for b in other), 0.0)
        product = sum(((a.double() * b.double()).sum().item() for a, b in zip(vector, other, strict=True)), 0.0)
        if size > 0:
            vector = [a.double() - product / size * b.double() for a, b in zip(vector, other, strict=True)]
    return vector
