"""Losses on a latent: the KL term and sampling of a variational encoder (note 004), and DINO alignment (note 002)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def kl_to_standard_normal(mu: Tensor, log_var: Tensor, *, max_variance: float | None = None) -> Tensor:
    """Per-sample `KL(N(mu, exp(log_var)) ‖ N(0, 1)) = −½ Σ (1 + log_var − mu² − exp(log_var))`, in nats.

    `mu`, `log_var`: `[batch, ...]`. Returns `[batch]`, in float32 or better: the **sum** over all dimensions but the batch, as
    in note 004, whose `kl_raw` is the mean of this over the batch. Raises ValueError for mismatched shapes or settings out
    of range.

    `max_variance`: above it `exp(log_var)` is continued linearly, so the gradient of an element with respect to log_var stays
    at `½ (max_variance − 1)` instead of exploding (note 004 uses 10; None is the exact KL). The note clamps the value instead.
    That leaves a gradient of −½ (NaN once exp overflows), so the KL *decreases* without bound as the variance grows.
    """
    if mu.shape != log_var.shape or mu.ndim < 2:
        got = f"mu {tuple(mu.shape)}, log_var {tuple(log_var.shape)}"
        raise ValueError(f"kl_to_standard_normal: {got}; expected one [batch, ...]")
    if max_variance is not None and not (math.isfinite(max_variance) and max_variance > 1):
        # With a limit of 1 or less the gradient would no longer push a large variance down.
        raise ValueError(f"kl_to_standard_normal: max_variance={max_variance!r}; expected a finite number > 1, or None")
    dtype = torch.promote_types(torch.promote_types(mu.dtype, log_var.dtype), torch.float32)
    mu, log_var = mu.to(dtype), log_var.to(dtype)
    if max_variance is None:
        variance = log_var.exp()
    else:
        limit = math.log(max_variance)
        variance = log_var.clamp(max=limit).exp() + max_variance * (log_var - limit).relu()
    return (0.5 * (mu.square() + variance - 1 - log_var)).flatten(1).sum(1)


def reparameterise(mu: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
    """`z = mu + exp(½ log_var)·noise`, differentiable with respect to mu and log_var. All tensors have the same shape.

    `noise` ~ N(0, 1) comes from the caller, seeded by (seed, step, rank) so that all trials use the same noise."""
    if not mu.shape == log_var.shape == noise.shape:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("mu", mu), ("log_var", log_var), ("noise", noise)))
        raise ValueError(f"reparameterise: shapes differ: {shapes}")
    return mu + (0.5 * log_var).exp() * noise


@torch.no_grad()
def marginal_kl(mu: Tensor, log_var: Tensor) -> Tensor:
    """Distance of the aggregate posterior from the prior: `KL(N(m, v) ‖ N(0, 1)) = ½ (m² + v − 1 − ln v)` in nats, averaged over
    elements. m and v are the mean and variance of an element's posteriors over the batch.

    `mu`, `log_var`: `[samples, ...]`, at least two samples. Returns a 0-d tensor in float32 or better. The finite-sample bias
    of about 1/n is subtracted (delta method; for two samples about 0.1 remains), so the estimate can be slightly below 0.
    The mean per-sample KL is the mutual information of input and latent plus this term (Hoffman and Johnson 2016, "ELBO
    surgery"). Among distributions with these means and variances the Gaussian is the closest to the prior, so the true
    distance is at least this large. Raises ValueError for mismatched shapes or fewer than two samples."""
    if mu.shape != log_var.shape or mu.ndim < 2 or mu.shape[0] < 2:
        got = f"mu {tuple(mu.shape)}, log_var {tuple(log_var.shape)}"
        raise ValueError(f"marginal_kl: {got}; expected one [samples, ...] with at least two samples")
    dtype = torch.promote_types(torch.promote_types(mu.dtype, log_var.dtype), torch.float32)
    n, spread = len(mu), mu.to(dtype).var(0)
    mean, variance = mu.to(dtype).mean(0), spread + log_var.to(dtype).exp().mean(0)
    bias = spread / (2 * n) + (spread / variance).square() / (2 * (n - 1))  # of m², and of v − ln v
    return (0.5 * (mean.square() + variance - 1 - variance.log()) - bias).mean()


@torch.no_grad()
def active_units(mu: Tensor, *, threshold: float = 0.01) -> Tensor:
    """Number of latent elements that depend on the input: the variance of `mu` over the samples exceeds `threshold`.

    `mu`: `[samples, ...]`, at least two samples. Returns a 0-d integer tensor on its device. Zero active units means
    posterior collapse, which note 004 calls a vanishing KL. The default threshold is from Burda et al. 2016."""
    if mu.ndim < 2 or mu.shape[0] < 2:
        raise ValueError(f"active_units: mu is {tuple(mu.shape)}; expected [samples, ...] with at least two samples")
    return (mu.to(torch.promote_types(mu.dtype, torch.float32)).var(0) > threshold).sum()


def dino_alignment(features: Tensor, targets: Tensor) -> Tensor:
    """Mean of `1 − cosine` over a sample's tokens, between features and those of a frozen encoder; 0 is aligned, 2 opposite.

    `features`, `targets`: `[batch, dim]` (global) or `[batch, ..., dim]` (patches). Returns `[batch]`, in float32 or better.
    `targets` gets no gradient. A zero vector has cosine 0. Raises ValueError for mismatched shapes.
    """
    if features.shape != targets.shape or features.ndim < 2:
        got = f"features {tuple(features.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"dino_alignment: {got}; expected one [batch, ..., dim]")
    dtype = torch.promote_types(torch.promote_types(features.dtype, targets.dtype), torch.float32)
    distance = 1 - functional.cosine_similarity(features.to(dtype), targets.detach().to(dtype), dim=-1)
    return distance.reshape(distance.shape[0], -1).mean(1)  # a global feature has one token
