"""Is every branch working? What arrives at each tagged module in the real backward pass (note 002 §3).

    taps = GradientTaps({"flow": model.transformer, "dino_head": model.dino_head}, every=16, accumulation=4)
    for step in range(steps):
        for batch in micro_batches(4):
            loss_of(model, batch).backward()
        metrics |= taps.read()              # before optimizer.step(): what the optimiser is about to see
        optimizer.step()

A branch works when its loss falls, its gradient is not zero and its coverage is 1, all at once."""

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

EPS = 1e-12  # in update_ratio: a module that is still all zeros
_RUN_BACKWARD, _APPLY = _engine_run_backward.__code__, BackwardCFunction.apply.__code__  # frames in which a pass, a node runs


class GradientTaps:
    """Gradient norm, coverage and update ratio of tagged modules, at a cadence.

    `modules`: tag → a module, or parameters. They are looked up anew for every reading, so layers may be frozen, unfrozen,
    replaced, shared between tags. `every`: steps between readings; the first step is read too. `accumulation`: backward
    passes in one optimiser step. `scaler`: a GradScaler whose scale is to be taken out where it is still in.
    `update_elements`: of each tag about so many elements at most, evenly spread, are compared before and after a step;
    None: all of them, and so a whole copy of the parameters from this step's reading to the next; 0: no update ratio.

    A reading has, for each tag:

    - `dbg/grad_<tag>`: L2 norm of the gradient as the optimiser is about to see it: of all micro-batches, over all ranks,
      after clipping if `read` stands after it. A 0-d tensor; nothing here waits for the device.
    - `dbg/<tag>_trainable`: parameters (tensors) that are not frozen.
    - `dbg/<tag>_has_grad`: how often a gradient arrived at one of them, on this rank, added up over the backward passes.
    - `dbg/<tag>_coverage`: has_grad / trainable / accumulation. 1 is right; less: a part is detached or frozen, or fewer
      micro-batches than said; more: an optimiser step that comes late; 0: nothing arrived.
    - `dbg/update_ratio/<tag>`: ‖Δθ‖ / (‖θ‖ + 1e-12) of the step before. It is known once the step is done, so the reading
      after has it: one step late, as in the note.

    Hooks exist only during a step that will be read, on the parameters alone, so no graph is broken; other steps pay nothing.
    On sharded parameters every rank has to read. Optimisers that take the gradients away from `.grad` (DeepSpeed ZeRO 2 and 3, an
    optimiser inside the backward pass) leave nothing to read: UserError.
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
        self.step = 0  # optimiser steps that were read or passed over
        self._tagged: dict[str, torch.nn.Module | list[torch.nn.Parameter]] = {}
        for tag, tagged in modules.items():
            self._tagged[tag] = _checked(tag, tagged)
        self._hooks: dict[Hashable, RemovableHandle] = {}
        self._arrived: dict[int, _Arrivals] = {}  # by the id of the parameter
        self._passes = _BackwardPasses()
        self._before: dict[str, tuple[list[torch.nn.Parameter], list[tuple[Tensor, Tensor]]]] = {}
        if self.due:
            self._arm()

    @property
    def due(self) -> bool:
        """Whether the next `read()` will have something: the first step, and each that `every` divides."""
        return self.step == 0 or (self.step + 1) % self.every == 0

    def read(self, step: int | None = None) -> dict[str, float | Tensor]:
        """Once an optimiser step, after its last backward pass and before `optimizer.step()`. Steps are counted from 1;
        `step` overrules the count, for a training that was resumed.

        Returns 0-d tensors and numbers, nothing in most steps. Raises UserError where gradients came and are gone."""
        due = self.due if step is None else step == 1 or step % self.every == 0
        if step is not None and step != self.step + 1:
            self._before = {}  # what was copied belongs to another step
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
        """Takes the hooks away; a later `read()` would set them again."""
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
            return found  # thawed or replaced since the hooks were set: the next reading counts
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
            if [part.shape for part in old] == [part.shape for part in new]:  # else a parameter's data were exchanged
                moved = joint_norm(owners, torch._foreach_sub(new, old))
                found[f"dbg/update_ratio/{tag}"] = moved / (joint_norm(owners, old) + EPS)
        self._before = {}
        return found

    def _unscale(self) -> Tensor | None:
        """What takes the scale out of the gradients; None if it is not in them."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        stages = [state["stage"].name for state in self.scaler._per_optimizer_states.values()]
        if "UNSCALED" in stages:
            return None
        scale = self.scaler._get_scale_async()  # get_scale() would wait for the device
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
        """`fully_shard` puts whole parameters in the place of the shards while a module runs. These get a gradient in every
        backward pass, the shards only in those that reduce it (`set_requires_gradient_sync`)."""
        for name, parameter in module.named_parameters(recurse=False):
            key = shards.get(name)
            if key is not None and not is_sharded(parameter) and parameter.requires_grad and id(parameter) not in self._hooks:
                if key in self._hooks:
                    self._hooks.pop(key).remove()
                self._hooks[id(parameter)] = parameter.register_post_accumulate_grad_hook(partial(self._count, key))


@dataclass
class _Arrivals:
    parameter: torch.nn.Parameter  # held, so that no other can get its id
    passes: int = 0  # in which a gradient arrived
    latest: int = 0  # number of the latest


class _BackwardPasses:
    """Numbers the backward passes in which hooks fire.

    Re-entrant checkpointing runs a backward pass for each checkpointed segment inside the pass that `loss.backward()` began. Such
    an inner pass belongs to the one whose custom node runs it, and within one pass nodes come in falling order of creation.
    """

    def __init__(self) -> None:
        self.count = 0
        self._latest = -1  # id of the engine's task that was seen last
        self._outer: int | None = None  # id of the current pass, once a hook fired in it itself
        self._node: int | None = None  # the custom node of the latest inner pass, in order of creation
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
    """Sequence number of the outermost custom node within which a backward pass was begun; None outside of any."""
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
    """Copies of about `elements` elements at most, `[n]`, evenly spread over all parameters, for each kind of them (one of
    the kind, copy). All at one rate, so that a ratio of norms needs no weights."""
    step = 1
    if elements is not None:
        sizes = [parameter.numel() for parameter in parameters if parameter.numel()]
        step = max(1, -(-sum(sizes) // elements))
        while step > 1 and any(math.gcd(step, size) > 1 for size in sizes):  # a common factor with a row would skip columns
            step += 1
    kinds: dict[Any, tuple[Tensor, list[Tensor]]] = {}
    for parameter in parameters:
        part = local_part(parameter.detach())
        if not part.is_contiguous():
            part = part.permute(sorted(range(part.ndim), key=part.stride, reverse=True))  # as it lies in memory
        kind = (part.device, part.dtype, sharding(parameter))
        kinds.setdefault(kind, (parameter, []))[1].append(part.reshape(-1)[::step])
    return [(parameter, torch.cat(parts)) for parameter, parts in kinds.values()]
