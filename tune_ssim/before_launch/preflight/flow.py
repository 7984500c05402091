"""Checks of the prediction: what z0 is made of, which time the network is told, its noise, and its loss on held-out images."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tune_ssim.before_launch.preflight import rules, step_rules
from tune_ssim.before_launch.preflight.images import TOP_BIN, Seen
from tune_ssim.before_launch.preflight.plain import unit
from tune_ssim.before_launch.preflight.report import Check, unknown
from tune_ssim.before_launch.preflight.subject import Unavailable, call
from tune_ssim.before_launch.preflight.targets import EMPTY, detail
from tune_ssim.trials.training import Forward, Sample

MAX_NOISE_CORRELATION = 0.15  # with the clean latents, by chance 0.02 of 4 batches of 8; 0.3 and more of other mixtures
MIN_ERRORS = 8  # samples near t = 1 that are compared
SAMPLES = 32  # training samples that are decoded, or predicted again with another time
# Times that a network may be told by mistake, from the t of a sample. Each network knows one of them.
TIMES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "t": lambda t: t,
    "1 - t": lambda t: 1 - t,
    "1000 t": lambda t: 1000 * t,
    "1000 (1 - t)": lambda t: 1000 * (1 - t),
}
# Of square kernels: as stored by frameworks whose kernels have width before height, or whose convolutions do not mirror them.
KERNELS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda kernel: kernel.transpose(-1, -2),
    "rotated by half a turn": lambda kernel: kernel.flip(-1, -2),
}
MAX_UNEXPLAINED = 0.5  # share of the target's variance; epsilon taken for v leaves 0.73
STEPS_LOOKED_AT = 4  # for the gradient of the main loss
EXACT = 1e-3  # relative error that rounding, of float32 or bfloat16 inputs, explains


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
    module = _trained(task)
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


def check_kernels(task: Any) -> Iterator[Check]:
    """Checks that the network predicts best with its kernels as they are, and not as another framework stores them."""
    kernels = [
        layer.weight
        for layer in _trained(task).modules()
        if isinstance(layer, torch.nn.modules.conv._ConvNd) and layer.weight.ndim > 3 and len({*layer.kernel_size}) == 1
    ]
    own, trivial, losses, count = 0.0, 0.0, dict.fromkeys(KERNELS, 0.0), 0
    with torch.no_grad():
        for n in range(1, SAMPLES + 1):
            forward: Forward = call(task, "forward", n)
            if forward.velocity_target is None:
                raise Unavailable("the forward pass does not say what the network should predict")
            trivial += forward.velocity_target.float().var(unbiased=False).item()
            own, count = own + forward.main.item(), count + len(forward.t)
            for name, change in KERNELS.items():
                with _changed(kernels, change):
                    losses[name] += call(task, "forward", n).main.item()
            if count >= SAMPLES:
                break
    yield rules.kernels(own, losses, trivial)


@contextlib.contextmanager
def _changed(kernels: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    kept = [kernel.clone() for kernel in kernels]
    try:
        for kernel, old in zip(kernels, kept, strict=True):
            kernel.copy_(change(old))
        yield
    finally:
        for kernel, old in zip(kernels, kept, strict=True):
            kernel.copy_(old)


def check_main_loss(task: Any) -> Iterator[Check]:
    """Compares the gradient of the main loss at the network's output with the output's error, and the time of a sample with the
    share of noise in the network's input."""
    module, calls = _trained(task), []
    handle = module.register_forward_hook(lambda _, given, made: calls.append((given, made)))
    error = variance = main = agreeing = pushed = apart = 0.0
    channels, count = torch.zeros(()), 0
    try:
        while count < STEPS_LOOKED_AT:
            calls.clear()
            count += 1
            forward: Forward = call(task, "forward", count)
            target = forward.velocity_target
            given, output = calls[-1] if calls else ((), None)
            if target is None or not isinstance(output, Tensor) or output.shape != target.shape or not output.requires_grad:
                raise Unavailable("the output of the trained network is not what forward() says that it should predict")
            (gradient,) = torch.autograd.grad(forward.main, output, allow_unused=True)
            if gradient is None:
                raise Unavailable("the main loss is not made of the trained network's output")
            off = (output.detach() - target).double()
            error, main = error + off.square().mean().item() / STEPS_LOOKED_AT, main + forward.main.item() / STEPS_LOOKED_AT
            variance += target.double().var(unbiased=False).item() / STEPS_LOOKED_AT
            weight = gradient.double().abs()
            pushed, agreeing = pushed + weight.sum().item(), agreeing + weight[gradient * off > 0].sum().item()
            channels = channels + weight.transpose(0, 1).flatten(1).sum(dim=1).cpu()
            apart = max(apart, _time_error(forward, given))
    finally:
        handle.remove()
    if not math.isnan(apart):
        yield step_rules.time_of_noise(apart)
    if not error < MAX_UNEXPLAINED * variance:
        raise Unavailable("the network's output predicts little of what it should, so its errors say nothing about the loss")
    yield step_rules.main_gradient(
        agreeing / max(pushed, 1e-30), int((channels == 0).sum()), len(channels), main / max(error, 1e-30)
    )


def _time_error(forward: Forward, given: Sequence[Any]) -> float:
    """The largest difference between t and the share of noise in the network's input; NaN unless it is (1 - t) clean + t noise."""
    clean, target = forward.clean, forward.velocity_target
    z_t = next((x for x in given if isinstance(x, Tensor) and clean is not None and x.shape == clean.shape), None)
    if clean is None or target is None or z_t is None or target.shape != clean.shape:
        return math.nan
    z, x = z_t.detach().double().flatten(1), clean.double().flatten(1)
    noise = target.double().flatten(1) + x
    ways = torch.stack([x, noise], dim=2)
    shares = torch.linalg.lstsq(ways, z[..., None]).solution
    is_path = (ways @ shares - z[..., None]).square().mean() < EXACT * z.square().mean() and (shares.sum(1) - 1).abs().max() < EXACT
    return (shares[:, 1, 0].cpu() - forward.t.double()).abs().max().item() if is_path else math.nan


def _trained(task: Any) -> torch.nn.Module:
    module = next((part.module for part in call(task, "parts").values() if part.trains and part.kind == "raw"), None)
    if module is None:
        raise Unavailable("no part of the task is trained")
    return module


def check_noise(seen: Seen | None) -> Iterator[Check]:
    """Checks that the noise has mean 0 and deviation 1, and that each image of a batch has its own."""
    if seen is None or not seen.pairs:
        raise Unavailable("the forward pass does not show the clean latents and what the network should predict")
    steps = _noise(seen.pairs)
    if not steps:
        raise Unavailable("what the network should predict is not made of noise and the clean latents alone")
    values = torch.cat([noise.flatten() for noise in steps])
    yield step_rules.noise(values.mean().item(), values.std().item(), min((_alike(noise) for noise in steps), default=0.0))


def _noise(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The noise of some steps: of velocity = noise - clean, of noise, or of velocity = clean - noise, whichever does not depend on
    the clean latents."""
    clean = torch.cat([latents.flatten() for _, latents in pairs])
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [lambda a, b: a + b, lambda a, b: a, lambda a, b: b - a]
    for way in ways:
        found = [way(target, latents) for target, latents in pairs]
        values = torch.cat([noise.flatten() for noise in found])
        correlation = torch.corrcoef(torch.stack([values, clean]))[0, 1].item()
        if abs(correlation) < MAX_NOISE_CORRELATION:  # NaN of a constant is not
            return found
    return []


def _alike(noise: Tensor) -> float:
    """The lowest correlation between the noise of two images of a batch; 0 of fewer than three, which may share it on purpose."""
    if len(noise) < 3:
        return 0.0
    rows = functional.normalize(noise.flatten(1) - noise.flatten(1).mean(dim=1, keepdim=True), dim=1)
    return (rows @ rows.T).min().item()


def check_held_out(sample: Sample, seen: Seen | None) -> Iterator[Check]:
    """Compares the flow loss near t = 1, where only the condition says what the image is, with that of held-out images."""
    held_out = sample.statistics.get("flow_loss_top_bin")
    if seen is None or sample.references is None or held_out is None:
        raise Unavailable("the samples do not tell the flow loss of held-out images, as flow_loss_top_bin")
    errors = seen.flow[seen.flow[:, 0] > TOP_BIN][:, 1]
    if len(errors) < MIN_ERRORS:
        yield unknown("flow/held_out", f"only {len(errors)} of the first samples have t > {TOP_BIN:g}")
        return
    more_detail = max(1.0, detail(seen.all_targets) / max(detail(sample.references.float().cpu()), EMPTY))
    yield step_rules.held_out_loss(errors.quantile(0.75).item(), held_out, more_detail)


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
