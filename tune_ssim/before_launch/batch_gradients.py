"""Gradients of one batch: of the main loss, of the pixel loss, and of the SSIM loss for all gates.

The SSIM loss is a mean over the samples that take part. So one backward pass per bin of t between two gates is enough for all
gates: the gradient for a gate is the mean over the bins that it lets through, weighted by their sample counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from tune_ssim.losses import DecodedLoss
from tune_ssim.probes.norm_model import Array
from tune_ssim.trials.training import Forward

TOP_SHARE = 0.01  # share of the gradient's elements


@dataclass
class BatchGradients:
    """Behind each gate: q `[max_t, 3, 3]`, rows and columns main, pixel, SSIM; active `[max_t]`, whether a sample passes it;
    peaks `[max_t]`, the largest element of the SSIM gradient at the decoder's output. outliers: by loss, rms, peak over rms
    and the share of the squared norm in the largest 1 % of the elements, per sample."""

    q: Array
    active: NDArray[np.bool_]
    peaks: Array
    outliers: dict[str, tuple[float, float, float]]


def gradients_of(forward: Forward, parameters: Sequence[torch.nn.Parameter], max_ts: Sequence[float]) -> BatchGradients:
    """Q behind each gate from one backward pass for main, one for pixel and one for each t-bin that has samples."""
    ssim_alone = forward.loss.ssim_alone()
    pixel_alone = replace(forward.loss, ssim_loss_weight=0.0, ssim_warmup_steps=0.0, pixel_loss_weight=1.0)
    bins = _bins(forward, max_ts)
    counts = np.asarray([int(mask.sum()) for mask in bins])
    gradients = [_gradient(forward.main, parameters)]
    elements: dict[str, list[torch.Tensor]] = {"ssim": [], "pixel": []}
    largest: list[float] = []  # of each occupied bin, in one sample's own gradient

    def auxiliary(name: str, loss: DecodedLoss, mask: torch.Tensor | None) -> None:
        result = forward.auxiliary(loss, is_target=mask)
        acts = result.decoded is not None and result.decoded.requires_grad
        if result.decoded is not None and acts:
            result.decoded.retain_grad()
        gradients.append(_gradient(result.total, parameters) if acts else [None] * len(parameters))
        if result.decoded is not None and result.decoded.grad is not None:
            # The loss is a mean over the samples that take part, so times their number it is one sample's gradient.
            elements[name].append(result.decoded.grad.detach().float().flatten() * len(result.decoded_index))

    auxiliary("pixel", pixel_alone, None)
    occupied = [k for k, count in enumerate(counts) if count]
    for k in occupied:
        auxiliary("ssim", ssim_alone, bins[k])
        largest.append(float(elements["ssim"][-1].abs().max()) if elements["ssim"] else 0.0)
    products = _dot_products(gradients)

    n = len(max_ts)
    q, active, peaks = np.zeros((n, 3, 3)), np.zeros(n, dtype=bool), np.zeros(n)
    for i in range(n):
        weights = np.zeros((3, len(gradients)))
        weights[0, 0] = weights[1, 1] = 1
        total = counts[: i + 1].sum()
        if total:
            for position, k in enumerate(occupied):
                weights[2, 2 + position] = counts[k] / total if k <= i else 0
            peaks[i] = max(peak for peak, k in zip(largest, occupied, strict=True) if k <= i) / total
        q[i], active[i] = weights @ products @ weights.T, total > 0
    return BatchGradients(q, active, peaks, {name: _outliers(torch.cat(parts)) for name, parts in elements.items() if parts})


def _bins(forward: Forward, max_ts: Sequence[float]) -> list[torch.Tensor]:
    """For each gate the samples that it lets through and the narrower ones do not; compared in the precision of t, as in the
    loss."""
    t = forward.t.detach().cpu()
    edges = torch.tensor(max_ts, dtype=t.dtype)
    member = t > 0
    if forward.is_target is not None:
        member &= forward.is_target.cpu()
    place = torch.bucketize(t, edges)  # edges[k − 1] < t <= edges[k]
    return [member & (place == k) for k in range(len(max_ts))]


def _gradient(loss: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor | None]:
    """Gradients from an ordinary backward pass, which works with activation checkpointing and hooks. Clears `.grad` afterwards."""
    for parameter in parameters:
        parameter.grad = None
    if loss.requires_grad:
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def _dot_products(gradients: Sequence[Sequence[torch.Tensor | None]]) -> Array:
    """`[k, k]` of k gradients, summed in float64."""
    total = np.zeros((len(gradients), len(gradients)))
    for column in zip(*gradients, strict=True):
        present = [k for k, gradient in enumerate(column) if gradient is not None]
        if present:
            rows = torch.stack([gradient.detach().flatten() for gradient in column if gradient is not None]).double()
            total[np.ix_(present, present)] += (rows @ rows.T).cpu().numpy()
    return total


def _outliers(elements: torch.Tensor) -> tuple[float, float, float]:
    """rms, peak / rms, and the share of the squared norm in the largest 1 % of `elements`."""
    squares = elements.square()
    mean = squares.mean()
    top = squares.topk(max(1, round(TOP_SHARE * squares.numel()))).values.sum()
    return float(mean.sqrt()), float((squares.max() / mean).sqrt()), float(top / squares.sum())
