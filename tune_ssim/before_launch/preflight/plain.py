"""The expected gradient of a step, computed independently of the tested code.

SSIM from its definition, in float64, differentiated by autograd; the gate, the gradient's scale and clamp and the pixel loss
as `losses.DecodedLoss` documents them. Slow and simple: a check that calls the tested code could not fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tune_ssim.losses.schedules import Adaptive, Constant, read_schedule
from tune_ssim.trials.training import Forward

Sizes = Sequence[tuple[int, int]]  # true (height, width) of each padded image
WINDOW, SIGMA, C1, C2 = 11, 1.5, 0.01**2, 0.03**2  # Wang et al. 2004, and what a DecodedLoss uses


@dataclass(frozen=True)
class Setting:
    """The auxiliary losses' parameters, with the names of a configuration. Those that a task lacks have no effect."""

    ssim_loss_weight: float = 0.0
    ssim_loss_max_t: float = 1.0
    ssim_grad_scale: float = 1.0
    ssim_grad_clamp: float | None = None
    pixel_loss_weight: float = 0.0
    pixel_loss_max_t: float = 1.0


@dataclass(frozen=True)
class Expected:
    """Expected records of a step: total_norm, and the values of the active losses. peak: the largest element of the SSIM gradient
    at the decoder's output."""

    gradients: Sequence[Tensor | None]
    total_norm: float
    loss_main: float
    loss_ssim: float | None
    loss_pixel: float | None
    active_fraction: float
    peak: float


def plain_ssim(x: Tensor, y: Tensor) -> Tensor:
    """`[n, c, h, w]` twice → `[n]`, in the precision of `x`."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    taps = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    taps = taps / taps.sum()

    def mean(z: Tensor) -> Tensor:
        planes = z.reshape(-1, 1, z.shape[-2], z.shape[-1])
        filtered = functional.conv2d(functional.conv2d(planes, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
        return filtered.reshape(z.shape[0], z.shape[1], *filtered.shape[-2:])

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    similarity = (2 * mx * my + C1) * (2 * cov + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    return similarity.mean(dim=(1, 2, 3))


def unit(images: Tensor, image_range: str) -> Tensor:
    """A decoder's output in [0, 1]."""
    return (images * 0.5 + 0.5 if image_range == "[-1,1]" else images).clamp(0, 1)


def ssim_gradient(decoded: Tensor, targets: Tensor, image_range: str, sizes: Sizes | None = None) -> tuple[float, Tensor]:
    """Mean of 1 − SSIM over the samples, in float64, and its gradient at `decoded`."""
    return _gradient(decoded, targets, image_range, sizes, lambda x, y: 1 - plain_ssim(x, y))


def pixel_gradient(decoded: Tensor, targets: Tensor, image_range: str, sizes: Sizes | None = None) -> tuple[float, Tensor]:
    """Mean square over the samples, in float64, and its gradient at `decoded`."""
    return _gradient(decoded, targets, image_range, sizes, lambda x, y: (x - y).square().flatten(1).mean(1))


def _gradient(
    decoded: Tensor, targets: Tensor, image_range: str, sizes: Sizes | None, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, Tensor]:
    """Works sample by sample, since float64 maps for a whole batch of large images would not fit into memory."""
    total, gradient = 0.0, torch.zeros_like(decoded, dtype=torch.float64)
    for i in range(len(decoded)):
        height, width = decoded.shape[-2:] if sizes is None else sizes[i]
        leaf = decoded[i : i + 1, :, :height, :width].detach().double().requires_grad_()
        with torch.enable_grad():
            value = loss(unit(leaf, image_range), targets[i : i + 1, :, :height, :width].double()).sum() / len(decoded)
        (gradient[i : i + 1, :, :height, :width],) = torch.autograd.grad(value, leaf)
        total += value.item()
    return total, gradient


def expected(forward: Forward, setting: Setting, parameters: Sequence[torch.nn.Parameter]) -> Expected:
    """The gradient of main + auxiliary losses at `parameters`; the graph of `forward` is kept."""
    image_range = forward.loss.image_range
    for_ssim = _active(forward, setting.ssim_loss_max_t) if setting.ssim_loss_weight else []
    for_pixel = _active(forward, setting.pixel_loss_max_t) if setting.pixel_loss_weight else []
    outputs, seeds = [forward.main], [torch.ones_like(forward.main)]
    loss_ssim, loss_pixel, peak = None, None, 0.0
    if index := sorted({*for_ssim, *for_pixel}):
        targets = forward.compared_images()
        decoded = torch.cat([forward.decode(chunk) for chunk in forward.z0[index].split(forward.loss.chunk_size)])
        seed = torch.zeros_like(decoded, dtype=torch.float64)
        if for_ssim:
            rows = [index.index(sample) for sample in for_ssim]
            loss_ssim, gradient = ssim_gradient(decoded[rows], targets[for_ssim], image_range, _sizes(forward, for_ssim))
            gradient = gradient * setting.ssim_loss_weight * setting.ssim_grad_scale
            if setting.ssim_grad_clamp is not None:
                gradient = gradient.clamp(-setting.ssim_grad_clamp, setting.ssim_grad_clamp)
            seed[rows] += gradient
            peak = gradient.abs().max().item()
        if for_pixel:
            rows = [index.index(sample) for sample in for_pixel]
            loss_pixel, gradient = pixel_gradient(decoded[rows], targets[for_pixel], image_range, _sizes(forward, for_pixel))
            seed[rows] += gradient * setting.pixel_loss_weight
        if decoded.requires_grad:  # otherwise the prediction is detached, and the auxiliary losses send no gradient
            outputs.append(decoded)
            seeds.append(seed.to(decoded.dtype))
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    found = iter(torch.autograd.grad(outputs, learning, seeds, retain_graph=True, allow_unused=True))
    gradients = [next(found) if parameter.requires_grad else None for parameter in parameters]
    fraction = len(for_ssim) / max(1, len(forward.t))
    return Expected(gradients, norm(gradients), forward.main.item(), loss_ssim, loss_pixel, fraction, peak)


def weight_at(weight: Any, step: int, warmup_steps: float, forward: Forward, setting: Setting, parameters: Sequence[Any]) -> float:
    """The number that a weight as in a configuration is at this step. setting: the other parameters of the losses."""
    share = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    schedule = read_schedule(weight) if isinstance(weight, Mapping) else Constant(weight)
    if not isinstance(schedule, Adaptive):
        return share * schedule(step)
    rest = expected(forward, replace(setting, ssim_loss_weight=0.0), parameters).gradients
    both = expected(forward, replace(setting, ssim_loss_weight=1.0), parameters).gradients
    ssim = norm(_difference(both, rest))
    return share * min(schedule.max_weight, schedule.target_ratio * norm(rest) / ssim) if ssim else 0.0


def own_gradient_norms(forward: Forward, parameters: Sequence[torch.nn.Parameter]) -> tuple[float, float, float]:
    """Gradient norms of the main, the SSIM and the pixel loss, each alone with weight 1 and open gate."""
    main = expected(forward, Setting(), parameters).gradients
    sizes = []
    for setting in (Setting(ssim_loss_weight=1.0), Setting(pixel_loss_weight=1.0)):
        sizes.append(norm(_difference(expected(forward, setting, parameters).gradients, main)))
    return norm(main), sizes[0], sizes[1]


def _difference(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [a if b is None else b if a is None else a - b for a, b in zip(one, other, strict=True)]


def norm(gradients: Sequence[Tensor | None]) -> float:
    return sum(g.double().square().sum().item() for g in gradients if g is not None) ** 0.5


def cosine(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
    """The cosine of two gradients of the same parameters; NaN if one is zero or not finite."""
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    product = sum((a * b).sum().item() for a, b in pairs)
    norms = norm(one) * norm(other)
    return product / norms if norms > 0 else float("nan")


def setting_of(config: Mapping[str, Any]) -> Setting:
    """The auxiliary losses' part of a configuration."""
    return Setting(**{name: config[name] for name in Setting.__dataclass_fields__ if name in config})


def _active(forward: Forward, max_t: float) -> list[int]:
    t = forward.t.cpu()
    active = (t > 0) & (t <= torch.tensor(max_t, dtype=t.dtype))  # in the precision of t, as in the loss
    if forward.is_target is not None:
        active &= forward.is_target.cpu()
    return [int(sample) for sample in active.nonzero().flatten()]


def _sizes(forward: Forward, samples: list[int]) -> Sizes | None:
    return None if forward.sizes is None else [forward.sizes[sample] for sample in samples]
