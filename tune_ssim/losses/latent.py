"""Terms on a latent: the KL of a variational encoder and its sample (note 004), alignment with DINO features (note 002)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def kl_to_standard_normal(mu: Tensor, log_var: Tensor, *, free_bits: float = 0.0, max_variance: float | None = None) -> Tensor:
    """`KL(N(mu, exp(log_var)) ‖ N(0, 1)) = −½ Σ (1 + log_var − mu² − exp(log_var))` of each sample, in nats.

    `mu`, `log_var`: `[batch, ...]`. Returns `[batch]`, at least in float32: the **sum** over everything but the batch, as in
    note 004, whose mean over the batch is `kl_raw`. Raises ValueError for shapes that differ or settings out of range.

    `free_bits`: nats that every element of every sample may use for free: below it, it counts as that much and gets no
    gradient (Kingma et al. 2016, there of the batch's mean). 0 changes nothing.

    `max_variance`: above it `exp(log_var)` goes on along its tangent, so the gradient of an element by log_var stays at
    `½ (max_variance − 1)` instead of exploding (note 004 has 10; None is the exact KL). The note clamps the value instead,
    which leaves the gradient −½ there (NaN once exp overflows): the KL *falls* without end as the variance grows, below zero.
    """
    if mu.shape != log_var.shape or mu.ndim < 2:
        got = f"mu {tuple(mu.shape)}, log_var {tuple(log_var.shape)}"
        raise ValueError(f"kl_to_standard_normal: {got}; expected one [batch, ...]")
    if not (math.isfinite(free_bits) and free_bits >= 0):
        raise ValueError(f"kl_to_standard_normal: free_bits={free_bits!r}; expected a finite number >= 0")
    if max_variance is not None and not (math.isfinite(max_variance) and max_variance > 1):
        # At 1 and below the gradient would no longer hold the variance down.
        raise ValueError(f"kl_to_standard_normal: max_variance={max_variance!r}; expected a finite number > 1, or None")
    dtype = torch.promote_types(torch.promote_types(mu.dtype, log_var.dtype), torch.float32)
    mu, log_var = mu.to(dtype), log_var.to(dtype)
    if max_variance is None:
        variance = log_var.exp()
    else:
        limit = math.log(max_variance)
        variance = log_var.clamp(max=limit).exp() + max_variance * (log_var - limit).relu()
    kl = 0.5 * (mu.square() + variance - 1 - log_var)
    if free_bits:
        kl = kl.clamp(min=free_bits)
    return kl.flatten(1).sum(1)


def reparameterise(mu: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
    """`z = mu + exp(½ log_var)·noise`, a sample through which mu and log_var get their gradients. All of one shape.

    `noise` is the caller's, drawn from N(0, 1) by (seed, step, rank), so that trials agree on it."""
    if not mu.shape == log_var.shape == noise.shape:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("mu", mu), ("log_var", log_var), ("noise", noise)))
        raise ValueError(f"reparameterise: shapes differ: {shapes}")
    return mu + (0.5 * log_var).exp() * noise


@torch.no_grad()
def marginal_kl(mu: Tensor, log_var: Tensor) -> Tensor:
    """How far the latents of a batch, taken together, are from the prior: `KL(N(m, v) ‖ N(0, 1)) = ½ (m² + v − 1 − ln v)` in nats,
    with m and v the mean and the variance of an element's posteriors over the batch; the mean over the elements.

    `mu`, `log_var`: `[samples, ...]`, at least two samples. Returns a 0-d tensor, at least in float32: an estimate from which what
    the chance of n samples adds (about 1/n, by the delta method; for two about 0.1 is left) has been taken off, so it may come
    out a little below 0.
    A mean KL of samples is what the latent tells them apart by plus this (Hoffman and Johnson 2016, "ELBO surgery"); of all
    distributions with these means and variances the Gaussian is the closest, so the true one is at least as far away.
    Raises ValueError for shapes that differ or fewer than two samples."""
    if mu.shape != log_var.shape or mu.ndim < 2 or mu.shape[0] < 2:
        got = f"mu {tuple(mu.shape)}, log_var {tuple(log_var.shape)}"
        raise ValueError(f"marginal_kl: {got}; expected one [samples, ...] with at least two samples")
    dtype = torch.promote_types(torch.promote_types(mu.dtype, log_var.dtype), torch.float32)
    n, spread = len(mu), mu.to(dtype).var(0)
    mean, variance = mu.to(dtype).mean(0), spread + log_var.to(dtype).exp().mean(0)
    chance = spread / (2 * n) + (spread / variance).square() / (2 * (n - 1))  # of the mean's square, and of v - ln v
    return (0.5 * (mean.square() + variance - 1 - variance.log()) - chance).mean()


@torch.no_grad()
def active_units(mu: Tensor, *, threshold: float = 0.01) -> Tensor:
    """How many elements of the latent depend on the input: variance of `mu` over the samples above `threshold`.

    `mu`: `[samples, ...]`, at least two samples. Returns a 0-d integer tensor on its device. None left is posterior
    collapse, what note 004 calls a vanishing KL (Burda et al. 2016, whose threshold is the default)."""
    if mu.ndim < 2 or mu.shape[0] < 2:
        raise ValueError(f"active_units: mu is {tuple(mu.shape)}; expected [samples, ...] with at least two samples")
    return (mu.to(torch.promote_types(mu.dtype, torch.float32)).var(0) > threshold).sum()


def dino_alignment(features: Tensor, targets: Tensor) -> Tensor:
    """Mean of `1 − cosine` between features and a frozen encoder's, over a sample's tokens; 0 is aligned, 2 opposite.

    `features`, `targets`: `[batch, dim]` (global) or `[batch, ..., dim]` (patches). Returns `[batch]`, at least in float32.
    No gradient goes into `targets`. A zero vector has cosine 0. Raises ValueError for shapes that differ.
    """
    if features.shape != targets.shape or features.ndim < 2:
        got = f"features {tuple(features.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"dino_alignment: {got}; expected one [batch, ..., dim]")
    dtype = torch.promote_types(torch.promote_types(features.dtype, targets.dtype), torch.float32)
    distance = 1 - functional.cosine_similarity(features.to(dtype), targets.detach().to(dtype), dim=-1)
    return distance.reshape(distance.shape[0], -1).mean(1)  # a global feature has one token
