"""Checks of the prediction: what z0 is made of, and which time the network is told."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tune_ssim.before_launch.preflight import rules
from tune_ssim.before_launch.preflight.plain import unit
from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.before_launch.preflight.subject import Unavailable, call
from tune_ssim.trials.training import Forward

SAMPLES = 32  # training samples that are decoded, or predicted again with another time
# Times that a network may be told by mistake, from the t of a sample. Each network knows one of them.
TIMES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "t": lambda t: t,
    "1 - t": lambda t: 1 - t,
    "1000 t": lambda t: 1000 * t,
    "1000 (1 - t)": lambda t: 1000 * (1 - t),
}


def work(batch: int, passes: int) -> dict[str, float]:
    """What a check here needs, with `passes` forward passes for each step that it looks at."""
    steps = min(SAMPLES, math.ceil(SAMPLES / max(1, batch)))
    return {"forward": steps * passes, "decode": 2 * steps * batch if passes == 1 else 0}


def check_prediction(task: Any) -> Iterator[Check]:
    """Checks how z0 is made: it must be closer to the clean latent than z_t is, and than it is with the velocity's sign changed,
    which is about z0 - 2 t v* of a trained network."""
    own, mended, count = 0.0, 0.0, 0
    distance: list[float] = []  # from the clean latent, over that of z_t, squared
    with torch.no_grad():
        for n in range(1, SAMPLES + 1):
            forward: Forward = call(task, "forward", n)
            if forward.velocity_target is None or forward.velocity_target.shape != forward.z0.shape:
                raise Unavailable("the forward pass does not show the velocity that the network should predict")
            t = forward.t.to(forward.z0.device).view(-1, *[1] * (forward.z0.ndim - 1))
            errors = [
                (unit(forward.decode(z0).float(), forward.loss.image_range) - forward.targets).square().mean().item()
                for z0 in (forward.z0, forward.z0 - 2 * t * forward.velocity_target)
            ]
            if forward.clean is not None:
                trivial = (t * forward.velocity_target).square().mean().item()
                distance.append((forward.z0 - forward.clean).square().mean().item() / max(trivial, 1e-12))
            own, mended, count = own + errors[0], mended + errors[1], count + len(t)
            if count >= SAMPLES:
                break
    yield rules.prediction(own, mended, max(distance, default=None))


def check_time(task: Any) -> Iterator[Check]:
    """Checks that the network predicts best when it is told the time that it is told, and not another one."""
    module = next((part.module for part in call(task, "parts").values() if part.trains and part.kind == "raw"), None)
    if module is None:
        raise Unavailable("no part of the task is trained")
    own, losses, count = 0.0, dict.fromkeys(TIMES, 0.0), 0
    with torch.no_grad():
        for n in range(1, SAMPLES + 1):
            forward: Forward = call(task, "forward", n)
            own += forward.main.item()
            for name, time in TIMES.items():
                with _telling(module, time(forward.t)) as told:
                    losses[name] += call(task, "forward", n).main.item()
                if not told:
                    raise Unavailable("the trained network takes no time: no argument has one number for each sample")
            count += len(forward.t)
            if count >= SAMPLES:
                break
    yield rules.told_time(own, losses)


@contextlib.contextmanager
def _telling(module: torch.nn.Module, time: Tensor) -> Iterator[list[str]]:
    """Replaces the time that `module` is called with. The list is filled when that happens."""
    done: list[str] = []

    def is_time(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.numel() == len(value) == len(time)

    def tell(value: Tensor) -> Tensor:
        done.append("told")
        return time.to(value).view_as(value)

    def replace(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for place, value in enumerate(arguments):
            if is_time(value):
                return (*arguments[:place], tell(value), *arguments[place + 1 :]), named
        for name, value in named.items():
            if is_time(value):
                return arguments, {**named, name: tell(value)}
        return arguments, named

    handle = module.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield done
    finally:
        handle.remove()
