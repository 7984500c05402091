"""Structural similarity (SSIM) as a training loss.

With a Gaussian window `w` and local moments over each fully covered (valid) window:

    μx = w∗x,  σx² = w∗x² − μx²,  σxy = w∗xy − μxμy
    SSIM = (2μxμy + C1)(2σxy + C2) / ((μx² + μy² + C1)(σx² + σy² + C2)),   C1 = (k1·L)², C2 = (k2·L)²

(Wang, Bovik, Sheikh, Simoncelli 2004; population covariance, as in scikit-image's
`structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.)

Differs from the textbook version in three ways, each for a measured reason:

* **Always float32 or better.** In bfloat16 σ² = w∗x² − μx² suffers from cancellation: denominators reach zero and the
  gradient is garbage, while the loss value still looks normal. Half-precision inputs are therefore cast to float32,
  autocast is disabled inside, and no operation is affected by TF32 or a reduced
  `torch.set_float32_matmul_precision`.
* **Moments about the image mean.** Subtracting a constant does not change σ² and σxy, but it reduces their rounding
  error. On flat patches at level 0.98 (amplitude 1e-3) the float32 gradient is off by 1e-7 of its norm instead of 3e-4,
  and the value by 3e-8 instead of 3e-5.
* **The gradient is computed in the forward pass.** It is linear in the incoming gradient of each sample, so the backward
  pass needs only one image-sized tensor (autograd keeps about a dozen). Only σx² + σy² is needed, not σx² and σy²
  separately: four filtered maps forward, three backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Outputs per block of the banded matrix product, and pixels per chunk on a CPU: enough to keep all threads busy, few enough
# to bound the working memory (about 20 maps of that size). Both affect only speed.
_BLOCK = 64
_CPU_PIXELS = 1 << 18


def ssim(
    x: Tensor,
    y: Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """Mean SSIM of each sample over channels and valid windows.

    `x`, `y`: `[batch, channel, height, width]`, floating point, nominally in `[0, data_range]`; height and width at least
    `window_size`. Returns `[batch]` in [−1, 1]: float64 if an input is float64, else float32. Differentiable once with
    respect to `x` and `y`. A non-finite pixel makes the value of its sample NaN. Raises ValueError for mismatched shapes,
    a wrong number of dimensions, images smaller than the window, integer inputs or settings out of range.
    Defaults: Wang et al. 2004.
    """
    _check_images(x, y, window_size)
    _check_settings(window_size, sigma, data_range, k1, k2)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    taps = _gaussian_taps(window_size, sigma)
    value: Tensor = _Ssim.apply(x.to(dtype), y.to(dtype), taps, (k1 * data_range) ** 2, (k2 * data_range) ** 2)
    return value


def ssim_loss(
    x: Tensor,
    y: Tensor,
    *,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """`1 − SSIM` of each sample, with its *value* clamped to [0, 1] (note 000 §1.3).

    Same arguments and errors as `ssim`. Returns `[batch]`.

    The clamp is straight-through: it bounds the logged value, while the gradient is that of `1 − SSIM`. An ordinary clamp
    would give zero gradient to every sample with negative SSIM. Those are the worst samples, and the log would not show it.
    """
    similarity = ssim(x, y, window_size=window_size, sigma=sigma, data_range=data_range, k1=k1, k2=k2)
    loss: Tensor = _ClampValue.apply(1 - similarity)
    return loss


class _ClampValue(torch.autograd.Function):
    """Clamp to [0, 1] forward, identity backward. NaN stays NaN."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class _Ssim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, taps: tuple[float, ...], c1: float, c2: float) -> Tensor:
        need_x, need_y = ctx.needs_input_grad[:2]
        batch, channels, height, width = x.shape
        planes = batch * channels
        x, y = x.reshape(planes, height, width), y.reshape(planes, height, width)
        value = x.new_empty(planes)
        grad_x = torch.empty_like(x) if need_x else None
        grad_y = torch.empty_like(y) if need_y else None
        chunk = max(1, _CPU_PIXELS // (height * width)) if x.device.type == "cpu" else max(1, planes)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, planes, chunk):
                part = slice(start, start + chunk)
                value[part] = _planes(
                    x[part],
                    y[part],
                    taps,
                    c1,
                    c2,
                    None if grad_x is None else grad_x[part],
                    None if grad_y is None else grad_y[part],
                )
        ctx.save_for_backward(grad_x, grad_y)
        ctx.shape = (batch, channels, height, width)
        return value.view(batch, channels).mean(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # a second derivative would silently be wrong: `grad_x` is a constant here
            raise RuntimeError("ssim is differentiable once; backward was called with create_graph=True")
        per_channel = (grad / ctx.shape[1]).view(-1, 1, 1, 1)
        grad_x, grad_y = (None if g is None else g.view(ctx.shape) * per_channel for g in ctx.saved_tensors)
        return grad_x, grad_y, None, None, None


def _planes(
    x: Tensor, y: Tensor, taps: tuple[float, ...], c1: float, c2: float, grad_x: Tensor | None, grad_y: Tensor | None
) -> Tensor:
    """Mean SSIM of each plane, `[planes, height, width]` → `[planes]`. Writes the gradients into `grad_x` and `grad_y`."""
    mean_x, mean_y = x.mean((1, 2), keepdim=True), y.mean((1, 2), keepdim=True)
    moments = x.new_empty(4, *x.shape)
    x, y = torch.sub(x, mean_x, out=moments[0]), torch.sub(y, mean_y, out=moments[1])
    torch.mul(x, x, out=moments[2]).addcmul_(y, y)
    torch.mul(x, y, out=moments[3])
    mx, my, power, product = _filter(moments, taps)  # about the mean of each plane

    # s = σx² + σy² ≥ 0 and |2σxy| ≤ s in exact arithmetic. The clamps only remove rounding errors, so the derivatives below
    # are those of the unclamped formula.
    s = power.addcmul_(mx, mx, value=-1).addcmul_(my, my, value=-1).clamp_(min=0)
    v = product.addcmul_(mx, my, value=-1).mul_(2)
    v = torch.clamp(v, -s, s)
    ux, uy = mx + mean_x, my + mean_y
    b1 = torch.mul(ux, ux).addcmul_(uy, uy).add_(c1)
    luminance = torch.mul(ux, uy).mul_(2).add_(c1).div_(b1)
    b2 = s.add_(c2)
    structure = v.add_(c2).div_(b2)
    similarity = luminance * structure
    value = similarity.mean((1, 2))
    if grad_x is None and grad_y is None:
        return value

    # With e = w∗(x²+y²), c = w∗xy:  ∂/∂e = −SSIM/b2,  ∂/∂c = 2·luminance/b2,
    # ∂/∂μx = 2[(uy − ux·luminance)·structure/b1 − my·luminance/b2 + mx·SSIM/b2], and the same with x and y exchanged.
    # The filter is symmetric, so its transpose is the same filter on maps padded with window−1 zeros.
    border = len(taps) - 1
    n, height, width = similarity.shape
    wanted = 2 + (grad_x is not None) + (grad_y is not None)
    padded = x.new_zeros(wanted, n, height + 2 * border, width + 2 * border)
    inner = padded[..., border : border + height, border : border + width]
    structure.div_(b1)
    de = torch.div(similarity, b2)
    dc = torch.div(luminance, b2)
    inner[0] = de
    inner[1] = dc
    for i, (own_u, own_m, other_u, other_m) in enumerate(((ux, mx, uy, my), (uy, my, ux, mx))):
        if (grad_x, grad_y)[i] is not None:
            slope = torch.addcmul(other_u, own_u, luminance, value=-1).mul_(structure)
            inner[2 if i == 0 else wanted - 1] = slope.addcmul_(other_m, dc, value=-1).addcmul_(own_m, de)
    back = _filter(padded, taps).mul_(2 / (height * width))
    for i, (grad, own, other) in enumerate(((grad_x, x, y), (grad_y, y, x))):
        if grad is not None:
            torch.addcmul(back[2 if i == 0 else wanted - 1], other, back[1], out=grad).addcmul_(own, back[0], value=-1)
    return value


def _filter(maps: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Separable symmetric filter over the last two dimensions, valid windows only."""
    lead, (height, width) = maps.shape[:-2], maps.shape[-2:]
    maps = maps.reshape(-1, height, width)
    if _matmul_is_exact(maps):
        filtered = _filter_by_blocks(maps, taps)
    else:
        filtered = _filter_by_shifts(_filter_by_shifts(maps, taps, 2), taps, 1)
    return filtered.view(*lead, *filtered.shape[-2:])


def _matmul_is_exact(maps: Tensor) -> bool:
    # With reduced precision settings, matrix products (TF32 on CUDA, bfloat16 on CPUs with AMX: error 2e-2) and convolutions
    # round their inputs to 8–11 bits, which this module must avoid. On other devices than a CPU the product is not faster.
    if maps.device.type != "cpu":
        return False
    if maps.dtype == torch.float64:
        return True
    # torch >= 2.9 has this newer setting, which follows the older one; reading the older one raises once both were used.
    newer_setting = getattr(torch.backends.mkldnn, "matmul", None)
    if newer_setting is not None:
        return newer_setting.fp32_precision in ("ieee", "none")
    return torch.get_float32_matmul_precision() == "highest"


def _filter_by_blocks(maps: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Filters by blockwise products with a banded matrix: 5–15 times as fast as a one-channel convolution on a CPU."""
    n, height, width = maps.shape
    k = len(taps)
    out_height, out_width = height - k + 1, width - k + 1
    block = maps.new_zeros(_BLOCK, _BLOCK + k - 1)  # row i holds the taps at columns i … i+k−1
    block.as_strided((_BLOCK, k), (_BLOCK + k, 1)).copy_(maps.new_tensor(taps))
    flat = maps.reshape(n * height, width)
    rows = maps.new_empty(n * height, out_width)
    for i in range(0, out_width, _BLOCK):
        length = min(_BLOCK, out_width - i)
        torch.mm(flat[:, i : i + length + k - 1], block[:length, : length + k - 1].t(), out=rows[:, i : i + length])
    rows = rows.view(n, height, out_width)
    out = maps.new_empty(n, out_height, out_width)
    for i in range(0, out_height, _BLOCK):
        length = min(_BLOCK, out_height - i)
        out[:, i : i + length] = torch.matmul(block[:length, : length + k - 1], rows[:, i : i + length + k - 1])
    return out


def _filter_by_shifts(maps: Tensor, taps: tuple[float, ...], dim: int) -> Tensor:
    """Filters by a weighted sum of shifted views: elementwise operations only, so full precision on every device."""
    k = len(taps)
    length = maps.shape[dim] - k + 1
    out = maps.narrow(dim, 0, length) * taps[0]
    for i in range(1, k):
        out.add_(maps.narrow(dim, i, length), alpha=taps[i])
    return out


def _gaussian_taps(window_size: int, sigma: float) -> tuple[float, ...]:
    centre = window_size // 2
    weights = [math.exp(-0.5 * ((i - centre) / sigma) ** 2) for i in range(window_size)]
    total = math.fsum(weights)
    return tuple(w / total for w in weights)


def _check_images(x: Tensor, y: Tensor, window_size: int) -> None:
    for name, image in (("x", x), ("y", y)):
        if not image.is_floating_point():
            raise ValueError(f"ssim: {name} has dtype {image.dtype}; expected a floating dtype with values in [0, data_range]")
    if x.shape != y.shape:
        raise ValueError(f"ssim: shapes differ: x is {tuple(x.shape)}, y is {tuple(y.shape)}")
    if x.ndim != 4:
        raise ValueError(f"ssim: got {x.ndim} dimensions {tuple(x.shape)}; expected [batch, channel, height, width]")
    if x.device != y.device:
        raise ValueError(f"ssim: x is on {x.device}, y on {y.device}; expected one device")
    if x.shape[1] == 0:
        raise ValueError(f"ssim: got {tuple(x.shape)}, no channel; expected at least one")
    if min(x.shape[2:]) < window_size:
        raise ValueError(
            f"ssim: images of {x.shape[2]}×{x.shape[3]} are smaller than the window; expected at least "
            f"{window_size}×{window_size} (or a smaller odd window_size)"
        )


def _check_settings(window_size: int, sigma: float, data_range: float, k1: float, k2: float) -> None:
    if not isinstance(window_size, int) or window_size < 3 or window_size % 2 == 0:
        raise ValueError(f"ssim: window_size={window_size!r}; expected an odd integer >= 3")
    for name, number in (("sigma", sigma), ("data_range", data_range), ("k1", k1), ("k2", k2)):
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"ssim: {name}={number!r}; expected a finite number > 0")
