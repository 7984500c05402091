"""Gradient norms before clipping, as the program's own clipping returns them."""

from __future__ import annotations

import functools

from .events import guarded

PENDING: list = []  # norms of clip calls since the last optimiser step: (ids of the parameters, norm, max_norm)


def install(events, module) -> None:
    """Wraps `torch.nn.utils.clip_grad_norm_` in its defining module, before others import it from there."""
    original = module.clip_grad_norm_

    @functools.wraps(original)
    def clip_grad_norm_(parameters, max_norm, *args, **kwargs):
        import torch

        if not isinstance(parameters, torch.Tensor):
            parameters = list(parameters)  # a generator can be read only once
        total = original(parameters, max_norm, *args, **kwargs)
        owners = [parameters] if isinstance(parameters, torch.Tensor) else parameters
        norm_type = kwargs.get("norm_type", args[0] if args else 2.0)
        _keep(owners, total, max_norm, norm_type)
        return total

    _keep = guarded(events)(_remember)
    module.clip_grad_norm_ = clip_grad_norm_
    events.write("hooked", name="torch.nn.utils.clip_grad_norm_")


def install_fsdp(events, module) -> None:
    """Wraps the method of FullyShardedDataParallel, which returns the norm over all shards."""
    original = module.FullyShardedDataParallel.clip_grad_norm_

    @functools.wraps(original)
    def clip_grad_norm_(self, max_norm, norm_type=2.0):
        total = original(self, max_norm, norm_type)
        _keep(list(self.parameters()), total, max_norm, norm_type)
        return total

    _keep = guarded(events)(_remember)
    module.FullyShardedDataParallel.clip_grad_norm_ = clip_grad_norm_
    events.write("hooked", name="FullyShardedDataParallel.clip_grad_norm_")


def _remember(parameters, total, max_norm, norm_type) -> None:
    if float(norm_type) == 2.0:
        if hasattr(total, "full_tensor"):  # FSDP2: a collective, which every rank runs here
            total = total.full_tensor()
        ids = frozenset(id(p) for p in parameters)
        # A program may clip and then not step, e.g. after a NaN: its next clipping counts.
        PENDING[:] = [clip for clip in PENDING if not clip[0] & ids]
        PENDING.append((ids, total.detach().clone(), float(max_norm)))


def take(parameters):
    """Removes and returns the clip calls that had any of `parameters`: (ids, norm, max_norm)."""
    wanted = {id(p) for p in parameters}
    found = [clip for clip in PENDING if clip[0] & wanted]
    PENDING[:] = [clip for clip in PENDING if not clip[0] & wanted]
    return found
