"""Optimiser steps: the gradient norm before and after clipping, coverage, learning rate, update ratio; updates held off."""

from __future__ import annotations

import functools
import math
import os
import threading
import weakref

from . import clips, files
from .events import guarded
from .modules import all_roots, kind_of, modules_of, tags_of
from .weights import describe_weights

UPDATE_EVERY = 10  # steps between readings of the update ratio; each copies at most UPDATE_ELEMENTS elements
UPDATE_ELEMENTS = 2**15  # as in tune_ssim.probes.GradientTaps
ONLY_MEASURES = 1e6  # programs clip at infinity, 1e9, … to get the norm; a healthy one is below 1e3 (FACTS §1)
HELD_ELEMENTS = 16  # of every tensor, compared after held steps


class Optimiser:
    """What is known of one optimiser. steps: its updates so far, skipped ones included."""

    def __init__(self, index, optimizer) -> None:
        self.index, self.steps = index, 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients: list | None = None  # while updates are held off
        self.before: object = None  # sampled weights before an update
        self.start: list | None = None  # sampled weights before the first update
        self.tags: dict | None = None
        self.is_clipping_told = False

    @property
    def suffix(self) -> str:
        return f"/optimizer{self.index}" if self.index else ""


class Steps:
    def __init__(self, events, settings) -> None:
        self.events, self.hold, self.full = events, bool(settings.get("hold")), settings.get("level") == "full"
        self.files = list(settings.get("weights") or ())
        self.optimisers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self.created = 0  # optimisers so far, also those that are gone
        self.waiting: tuple | None = None  # the last step, whose numbers may still be on their way from the device
        self.lock = threading.RLock()

    @property
    def step(self) -> int:
        return max((one.steps for one in self.optimisers.values()), default=0)

    def of(self, optimizer) -> Optimiser:
        found = self.optimisers.get(optimizer)
        if found is None:
            found = self.optimisers[optimizer] = Optimiser(self.created, optimizer)
            self.created += 1
        return found

    # -- around an update

    def before(self, optimizer, args, kwargs) -> None:
        import torch

        one = self.of(optimizer)
        with torch.no_grad():
            if one.steps == 0:
                self.first_step(one)
            one.steps += 1
            values = self.norms(one, scaled=getattr(optimizer, "grad_scale", None))
            values["lr"] = max((float(group["lr"]) for group in optimizer.param_groups if "lr" in group), default=math.nan)
            self.flush()
            self.waiting = (one, one.steps, values)
            if self.hold:
                one.gradients = [p.grad for p in one.parameters]
                for p in one.parameters:
                    p.grad = None  # every optimiser leaves parameters without a gradient alone, its own state included
            elif one.steps % UPDATE_EVERY == 1:
                one.before = samples_of(one.parameters)

    def after(self, optimizer, args, kwargs) -> None:
        import torch

        one = self.of(optimizer)
        with torch.no_grad():
            if one.gradients is not None:
                for p, gradient in zip(one.parameters, one.gradients):  # noqa: B905  (Python 3.9)
                    p.grad = gradient
                one.gradients = None
                if one.steps & (one.steps - 1) == 0:  # 1, 2, 4, 8, …
                    same = all(torch.equal(a, b) for a, b in zip(one.start or [], held_samples(one.parameters)))  # noqa: B905
                    self.events.write("held", optimizer=one.index, step=one.steps, unchanged=same)
            elif one.before is not None:
                new = samples_of(one.parameters)
                moved = torch.linalg.vector_norm(new - one.before) / (torch.linalg.vector_norm(one.before) + 1e-12)
                if self.waiting is not None and self.waiting[0] is one:
                    self.waiting[2]["update_ratio"] = moved
                one.before = None
        if all(p.device.type == "cpu" for p in one.parameters[:1]):
            self.flush()  # nothing to wait for

    def skipped(self, optimizer) -> None:
        """A GradScaler found an infinite gradient and did not step."""
        one = self.of(optimizer)
        one.steps += 1
        self.flush()
        found = clips.take(one.parameters)
        norm = found[0][1] if found else math.inf
        self.waiting = (one, one.steps, {"total_norm": norm, "step_skipped": 1.0})
        self.flush()

    def flush(self) -> None:
        """Writes the last step. Its numbers are fetched one step late, when a device has them ready."""
        with self.lock:
            waiting, self.waiting = self.waiting, None
        if waiting is not None:
            one, step, values = waiting
            numbers = {name + one.suffix: float(value) for name, value in values.items()}
            self.events.write("step", step=step, optimizer=one.index, values=numbers)

    # -- measurements

    def norms(self, one, scaled):

        clipped = clips.take(one.parameters)
        with_gradient = [p for p in one.parameters if p.grad is not None]
        values = {"grad_coverage": len(with_gradient) / max(1, len(one.parameters))}
        own = {id(p) for p in one.parameters}
        rest = [p for p in with_gradient if not any(id(p) in ids for ids, _, _ in clipped)]
        exact = all(ids <= own for ids, _, _ in clipped) or len(self.optimisers) == 1
        if scaled is not None:  # a fused optimiser unscales by itself
            rest = []
        if not one.is_clipping_told:
            one.is_clipping_told = True
            limits = [limit for _, _, limit in clipped if limit < ONLY_MEASURES]
            self.events.write("clipping", optimizer=one.index, max_norm=min(limits, default=None))
        squares = [norm.double() ** 2 for _, norm, _ in clipped]
        after = [(norm.double() * (limit / (norm.double() + 1e-6)).clamp(max=1.0)) ** 2 for _, norm, limit in clipped]
        if rest:
            if not clipped and any(type(p).__name__ == "FlatParameter" for p in rest):
                self.events.note("FSDP without clip_grad_norm_: the norm over all shards is not known") if one.steps == 1 else None
                return values
            total = norm_of([p.grad for p in rest])
            squares.append(total.double() ** 2)
            after.append(total.double() ** 2)
        if squares and exact:
            device = squares[0].device
            values["total_norm"] = sum(s.to(device) for s in squares).sqrt()
            if clipped:
                values["total_norm_clipped"] = sum(s.to(device) for s in after).sqrt()
        if self.full and one.tags:
            # What is left of a gradient is after clipping; its norm before is larger by the factor that clipping took out.
            factor = (values["total_norm"] / values["total_norm_clipped"]) if clipped and "total_norm" in values else 1.0
            for tag, parameters in one.tags.items():
                got = [p.grad for p in parameters if p.grad is not None]
                values[f"dbg/{tag}_trainable"] = float(len(parameters))
                values[f"dbg/{tag}_has_grad"] = float(len(got))
                values[f"dbg/{tag}_coverage"] = len(got) / max(1, len(parameters))
                if got:
                    values[f"dbg/grad_{tag}"] = norm_of(got) * factor
        return values

    def first_step(self, one) -> None:
        """Before the first update: which parameters train, in which precision, and where their values come from."""
        one.start = held_samples(one.parameters) if self.hold else None
        roots = all_roots()
        modules = modules_of(roots, one.parameters)
        one.tags = tags_of(modules, one.parameters)
        trained = sum(p.numel() for p in one.parameters if p.requires_grad)
        dtypes = {str(p.dtype).replace("torch.", "") for p in one.parameters}
        gradients = {str(p.grad.dtype).replace("torch.", "") for p in one.parameters if p.grad is not None}
        self.events.write(
            "optimizer",
            optimizer=one.index,
            tensors=len(one.parameters),
            elements=trained,
            dtypes=sorted(dtypes),
            gradient_dtypes=sorted(gradients),
            modules=[kind_of(module) for module in modules],
        )
        files.tell(self.events)
        if int(os.environ.get("RANK", 0)) == 0:
            describe_weights(self.events, roots, modules, one.parameters, self.files)


def norm_of(gradients):
    """The L2 norm of all gradients together, in float32, over all shards of DTensors."""
    import torch

    whole = [g._values() if g.is_sparse else g for g in gradients]
    device = whole[0].device
    parts = []
    for gradient in (
        torch._foreach_norm(whole) if all(not g.is_sparse for g in gradients) else [torch.linalg.vector_norm(g) for g in whole]
    ):
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        parts.append(full.to(device, torch.float32))
    return torch.linalg.vector_norm(torch.stack(parts))


def local(tensor):
    """The part of a DTensor on this rank, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def samples_of(parameters):
    """Evenly spread elements of all parameters, in float32: `[n]`, n at most UPDATE_ELEMENTS or one of each."""
    import torch

    tensors = [local(p.detach()).reshape(-1) for p in parameters if local(p.detach()).numel()]
    total = sum(t.numel() for t in tensors)
    stride = max(1, total // UPDATE_ELEMENTS)
    return torch.cat([t[::stride].float().cpu() for t in tensors]) if tensors else torch.zeros(1)


def held_samples(parameters):
    found = []
    for p in parameters:
        flat = local(p.detach()).reshape(-1)
        found.append(flat[:: max(1, flat.numel() // HELD_ELEMENTS)].clone())
    return found


CURRENT: list = []  # the Steps of this process, for the scaler's hook


def install(events, settings) -> Steps:
    import atexit

    import torch.optim.optimizer as module

    steps = Steps(events, settings)
    CURRENT.append(steps)
    module.register_optimizer_step_pre_hook(guarded(events)(steps.before))
    module.register_optimizer_step_post_hook(guarded(events)(steps.after))
    atexit.register(guarded(events)(steps.flush))
    events.write("hooked", name="torch.optim")
    return steps


def install_scaler(events, module) -> None:
    """A step that a GradScaler leaves out is counted, as the program counts it."""
    original = module.GradScaler._maybe_opt_step

    @functools.wraps(original)
    def _maybe_opt_step(self, optimizer, *args, **kwargs):
        before = _steps(optimizer)
        result = original(self, optimizer, *args, **kwargs)
        _after(optimizer, before)
        return result

    @guarded(events)
    def _steps(optimizer):
        return CURRENT[0].of(optimizer).steps if CURRENT else None

    @guarded(events)
    def _after(optimizer, before) -> None:
        if CURRENT and before is not None and CURRENT[0].of(optimizer).steps == before:
            CURRENT[0].skipped(optimizer)

    module.GradScaler._maybe_opt_step = _maybe_opt_step
