"""Gradient norm and coverage of tagged modules in the real backward pass, to see whether every branch works (note 002 §3).

    taps = GradientTaps({"flow": model.transformer, "dino_head": model.dino_head}, every=16, accumulation=4)
    for step in range(steps):
        for batch in micro_batches(4):
            loss_of(model, batch).backward()
        metrics |= taps.read()              # before optimizer.step()
        optimizer.step()

A branch works if its loss falls, its gradient is not zero, and its coverage is 1."""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward
from torch.utils.hooks import RemovableHandle

from tune_ssim.base.errors import UserError
from tune_ssim.probes.gradients import is_sharded, joint_norm, local_part, sharding, total_norm

EPS = 1e-12  # in update_ratio, for a module that is still all zeros
_RUN_BACKWARD, _APPLY = _engine_run_backward.__code__, BackwardCFunction.apply.__code__  # code of a backward pass and of a node


class GradientTaps:
    """Gradient norm, coverage and update ratio of tagged modules, measured every few steps.

    `modules`: tag → a module, or parameters. Parameters are looked up at every reading, so layers may be frozen, unfrozen,
    replaced, or shared between tags. `every`: steps between readings; the first step is read too. `accumulation`: backward
    passes per optimiser step. `scaler`: a GradScaler whose scale is removed from gradients that are still scaled.
    `update_elements`: compare about this many evenly spaced elements per tag before and after a step; None: all elements,
    which keeps a full copy of the parameters from one reading to the next; 0: no update ratio.

    A reading has, for each tag:

    - `dbg/grad_<tag>`: L2 norm of the gradient that the optimiser will use: all micro-batches, all ranks, and after clipping
      if `read` is called after it. A 0-d tensor; nothing here synchronises with the device.
    - `dbg/<tag>_trainable`: number of parameters (tensors) that are not frozen.
    - `dbg/<tag>_has_grad`: number of gradients received by them on this rank, summed over the backward passes.
    - `dbg/<tag>_coverage`: has_grad / trainable / accumulation. 1 is correct. Less: a part is detached or frozen, or there were
      fewer micro-batches than `accumulation`. More: an optimiser step was missed. 0: no gradient arrived.
    - `dbg/update_ratio/<tag>`: ‖Δθ‖ / (‖θ‖ + 1e-12) of the previous step. It is known only after the step, so the next reading
      reports it, one step late as in the note.

    Hooks exist only during steps that are read, and only on parameters, so no graph breaks and other steps have no overhead.
    With sharded parameters every rank must call `read`. Optimisers that remove the gradients from `.grad` (DeepSpeed ZeRO 2
    and 3, an optimiser inside the backward pass) cannot be read: UserError.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module | Iterable[torch.nn.Parameter]],
        *,
        every: int = 16,
        accumulation: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        update_elements: int | None = 1 << 15,  # 0.4 % off for normal updates, 128 KiB a tag
    ) -> None:
        for name, number in (("every", every), ("accumulation", accumulation)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise UserError(f"GradientTaps: {name}={number!r}; expected an integer >= 1")
        if update_elements is not None and (not isinstance(update_elements, int) or update_elements < 0):
            raise UserError(f"GradientTaps: update_elements={update_elements!r}; expected an integer >= 0, or None for all")
        if not modules:
            raise UserError("GradientTaps: no modules; expected a mapping such as {'flow': model.transformer}")
        self.every, self.accumulation, self.scaler, self.update_elements = every, accumulation, scaler, update_elements
        self.step = 0  # optimiser steps so far
        self._tagged: dict[str, torch.nn.Module | list[torch.nn.Parameter]] = {}
        for tag, tagged in modules.items():
            self._tagged[tag] = _checked(tag, tagged)
        self._hooks: dict[Hashable, RemovableHandle] = {}
        self._arrived: dict[int, _Arrivals] = {}  # by id of the parameter
        self._passes = _BackwardPasses()
        self._before: dict[str, tuple[list[torch.nn.Parameter], list[tuple[Tensor, Tensor]]]] = {}
        if self.due:
            self._arm()

    @property
    def due(self) -> bool:
        """Whether the next `read()` returns a reading: at the first step and at every multiple of `every`."""
        return self.step == 0 or (self.step + 1) % self.every == 0

    def read(self, step: int | None = None) -> dict[str, float | Tensor]:
        """Call once per optimiser step, after the last backward pass and before `optimizer.step()`. Steps count from 1; `step`
        overrides the count, for a resumed training.

        Returns 0-d tensors and numbers; empty in most steps. Raises UserError if gradients arrived but were already cleared."""
        due = self.due if step is None else step == 1 or step % self.every == 0
        if step is not None and step != self.step + 1:
            self._before = {}  # the copy belongs to another step
        self.step = self.step + 1 if step is None else step
        found = self._update_ratios() if self._before else {}
        if due:
            factor = self._unscale()
            for tag in self._tagged:
                parameters = self._parameters(tag)
                found |= self._reading(tag, parameters, factor)
                if self.update_elements != 0:
                    self._before[tag] = parameters, _sample(parameters, self.update_elements)
        if self._hooks:
            self._disarm()
        if self.due:
            self._arm()
        return found

    def close(self) -> None:
        """Removes the hooks. A later `read()` would set them again."""
        self._disarm()
        self._before = {}

    def _parameters(self, tag: str) -> list[torch.nn.Parameter]:
        tagged = self._tagged[tag]
        return list(tagged.parameters()) if isinstance(tagged, torch.nn.Module) else tagged

    @torch.no_grad()
    def _reading(self, tag: str, parameters: list[torch.nn.Parameter], factor: Tensor | None) -> dict[str, float | Tensor]:
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        norm = total_norm(parameters)
        found: dict[str, float | Tensor] = {f"dbg/grad_{tag}": norm if factor is None else norm * factor.to(norm.device)}
        found[f"dbg/{tag}_trainable"] = float(len(trainable))
        if any(id(parameter) not in self._arrived for parameter in trainable):
            return found  # unfrozen or replaced since the hooks were set; the next reading will count it
        arrived = sum(self._arrived[id(parameter)].passes for parameter in trainable)
        if arrived and all(parameter.grad is None for parameter in trainable):
            raise UserError(
                f"GradientTaps: gradients arrived at {tag!r} and are gone; call read() after the last backward() and before "
                "optimizer.step() and zero_grad() (an optimiser that keeps gradients elsewhere cannot be read)"
            )
        found[f"dbg/{tag}_has_grad"] = float(arrived)
        found[f"dbg/{tag}_coverage"] = arrived / len(trainable) / self.accumulation if trainable else 0.0
        return found

    @torch.no_grad()
    def _update_ratios(self) -> dict[str, float | Tensor]:
        found: dict[str, float | Tensor] = {}
        for tag, (parameters, before) in self._before.items():
            after = _sample(parameters, self.update_elements)
            owners, old, new = [p for p, _ in before], [part for _, part in before], [part for _, part in after]
            if [part.shape for part in old] == [part.shape for part in new]:  # else the data of a parameter were replaced
                moved = joint_norm(owners, torch._foreach_sub(new, old))
                found[f"dbg/update_ratio/{tag}"] = moved / (joint_norm(owners, old) + EPS)
        self._before = {}
        return found

    def _unscale(self) -> Tensor | None:
        """The factor that unscales the gradients; None if they are not scaled."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        stages = [state["stage"].name for state in self.scaler._per_optimizer_states.values()]
        if "UNSCALED" in stages:
            return None
        scale = self.scaler._get_scale_async()  # get_scale() would synchronise with the device
        return None if scale is None else scale.reciprocal()

    def _arm(self) -> None:
        self._passes = _BackwardPasses()
        for tag, tagged in self._tagged.items():
            for parameter in self._parameters(tag):
                if parameter.requires_grad and id(parameter) not in self._arrived:
                    self._arrived[id(parameter)] = _Arrivals(parameter)
                    count = partial(self._count, id(parameter))
                    self._hooks[id(parameter)] = parameter.register_post_accumulate_grad_hook(count)
            if isinstance(tagged, torch.nn.Module) and "torch.distributed.tensor" in sys.modules:
                for module in tagged.modules():
                    shards = {
                        name: id(p) for name, p in module.named_parameters(recurse=False) if p.requires_grad and is_sharded(p)
                    }
                    if shards and module not in self._hooks:
                        self._hooks[module] = module.register_forward_pre_hook(partial(self._follow, shards))

    def _disarm(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks, self._arrived = {}, {}

    def _count(self, key: int, _: Tensor) -> None:
        arrived, number = self._arrived[key], self._passes.number()
        if arrived.latest != number:
            arrived.passes += 1
            arrived.latest = number

    def _follow(self, shards: Mapping[str, int], module: torch.nn.Module, _: Any) -> None:
        """Moves hooks from shards to the unsharded parameters that `fully_shard` uses while a module runs. Those get a gradient
        in every backward pass, shards only in passes that reduce gradients (`set_requires_gradient_sync`)."""
        for name, parameter in module.named_parameters(recurse=False):
            key = shards.get(name)
            if key is not None and not is_sharded(parameter) and parameter.requires_grad and id(parameter) not in self._hooks:
                if key in self._hooks:
                    self._hooks.pop(key).remove()
                self._hooks[id(parameter)] = parameter.register_post_accumulate_grad_hook(partial(self._count, key))


@dataclass
class _Arrivals:
    parameter: torch.nn.Parameter  # keeps a reference, so that its id is not reused
    passes: int = 0  # backward passes in which a gradient arrived
    latest: int = 0  # number of the latest of these passes


class _BackwardPasses:
    """Numbers the backward passes in which hooks fire.

    Re-entrant checkpointing runs an inner backward pass for each checkpointed segment. It belongs to the outer pass whose custom
    node runs it. Within one pass, nodes run in decreasing order of creation.
    """

    def __init__(self) -> None:
        self.count = 0
        self._latest = -1  # id of the latest autograd graph task
        self._outer: int | None = None  # id of the current outer pass, once a hook fired directly in it
        self._node: int | None = None  # sequence number of the custom node of the latest inner pass
        self._inner = -1  # id of the latest inner pass

    def number(self) -> int:
        task = torch._C._current_graph_task_id()
        if task != self._latest:
            self._latest = task
            node = _enclosing_node()
            if node is None:
                if task != self._outer and not (self._outer is None and self._inner > task):
                    self._begin()
                self._outer = task
            else:
                if self.count == 0 or (self._node is not None and node > self._node):
                    self._begin()
                self._node, self._inner = node, task
        return self.count

    def _begin(self) -> None:
        self.count += 1
        self._outer, self._node, self._inner = None, None, -1


def _enclosing_node() -> int | None:
    """Sequence number of the outermost custom node that started a backward pass; None if there is none."""
    frame, inside, node = sys._getframe(1), False, None
    while frame is not None:
        if frame.f_code is _RUN_BACKWARD:
            inside = True
        elif frame.f_code is _APPLY and inside:
            node = frame.f_locals["self"]._sequence_nr()
        frame = frame.f_back  # type: ignore[assignment]
    return node


def _checked(tag: str, tagged: Any) -> torch.nn.Module | list[torch.nn.Parameter]:
    where = f"GradientTaps: {tag!r}"
    if not isinstance(tag, str) or not tag:
        raise UserError(f"{where}; a tag must be a name")
    if isinstance(tagged, torch.nn.Module):
        if next(tagged.parameters(), None) is None:
            raise UserError(f"{where}: {type(tagged).__name__} has no parameters")
        return tagged
    parameters: list[Any] = [tagged] if isinstance(tagged, Tensor) else list(tagged) if isinstance(tagged, Iterable) else [tagged]
    for parameter in parameters:
        if not isinstance(parameter, torch.nn.Parameter):
            raise UserError(f"{where}: got {type(parameter).__name__}; expected a module, or parameters")
    if not parameters:
        raise UserError(f"{where}: no parameters")
    return list(dict.fromkeys(parameters))


@torch.no_grad()
def _sample(parameters: list[torch.nn.Parameter], elements: int | None) -> list[tuple[Tensor, Tensor]]:
    """Copies of about `elements` elements, evenly spaced over all parameters: (a parameter, copy `[n]`) for each combination of
    device, dtype and sharding. The sampling rate is the same for all, so a ratio of norms needs no weights."""
    step = 1
    if elements is not None:
        sizes = [parameter.numel() for parameter in parameters if parameter.numel()]
        step = max(1, -(-sum(sizes) // elements))
        while step > 1 and any(
            math.gcd(step, size) > 1 for size in sizes
        ):  # a common factor with a row length would always skip the same columns
            step += 1
    kinds: dict[Any, tuple[Tensor, list[Tensor]]] = {}
    for parameter in parameters:
        part = local_part(parameter.detach())
        if not part.is_contiguous():
            part = part.permute(sorted(range(part.ndim), key=part.stride, reverse=True))  # memory order
        kind = (part.device, part.dtype, sharding(parameter))
        kinds.setdefault(kind, (parameter, []))[1].append(part.reshape(-1)[::step])
    return [(parameter, torch.cat(parts)) for parameter, parts in kinds.values()]
