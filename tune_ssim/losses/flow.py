"""Rectified flow (flow matching): the time convention, timestep distributions, and an Euler sampler.

**t = 0 is the clean image and t = 1 is noise**, throughout this project (note 000 §2.3):

    z_t = (1 − t)·z0 + t·noise,   velocity = dz_t/dt = noise − z0,   z0 = z_t − t·velocity
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimeLaw:
    """The distribution of t in training.

    `uniform`: t = u. `shifted_sigmoid_normal`: t = sigmoid(n), n ~ N(0, 1), as in BAGEL. In both cases the timestep shift s
    then moves t towards noise: t ← s·t / (1 + (s − 1)·t); s = 1 leaves t unchanged.
    """

    name: Literal["uniform", "shifted_sigmoid_normal"] = "uniform"
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("uniform", "shifted_sigmoid_normal"):
            raise ValueError(f"timestep law: name={self.name!r}; expected 'uniform' or 'shifted_sigmoid_normal'")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"timestep law: shift={self.shift!r}; expected a finite number > 0")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples `n` timesteps, `[n]` in [0, 1], on the generator's device."""
        device = None if generator is None else generator.device
        if self.name == "uniform":
            t = torch.rand(n, generator=generator, device=device)
        else:
            t = torch.randn(n, generator=generator, device=device).sigmoid()
        return self.shift * t / (1 + (self.shift - 1) * t)

    def active_fraction(self, max_t: float) -> float:
        """`P(0 < t ≤ max_t)`: the fraction of generation targets that pass this gate.

        uniform: `u`; shifted_sigmoid_normal: `Φ(logit u)`; `u = max_t / (s − (s − 1)·max_t)` inverts the shift s. For BAGEL's
        distribution and max_t = 0.1 this is 1.4 %, and only 0.05 % with shift 3. Raises ValueError for max_t outside [0, 1].
        """
        if not 0 <= max_t <= 1:
            raise ValueError(f"timestep law: max_t={max_t!r}; expected a number in [0, 1]")
        if max_t in (0, 1):
            return float(max_t)
        u = max_t / (self.shift - (self.shift - 1) * max_t)
        if self.name == "uniform":
            return u
        return 0.5 * math.erfc(-math.log(u / (1 - u)) / math.sqrt(2))


def noisy_latent(z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`z_t = (1 − t)·z0 + t·noise`. `z0`, `noise`: `[batch, ...]`; `t`: `[batch]`. The result has the shape of `z0`."""
    _check_same("noisy_latent", z0, noise)
    t = _per_sample("noisy_latent", t, z0)
    return (1 - t) * z0 + t * noise


def velocity_target(z0: Tensor, noise: Tensor) -> Tensor:
    """`noise − z0`, the regression target of the network at every t. All shapes are equal."""
    _check_same("velocity_target", z0, noise)
    return noise - z0


def z0_from_velocity(z_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """`z0 = z_t − t·velocity`. `z_t`, `velocity`: `[batch, ...]`; `t`: `[batch]`.

    ∂z0/∂velocity = −t, so the gradient of a loss on z0 shrinks with t and is exactly zero at t = 0.
    """
    _check_same("z0_from_velocity", z_t, velocity)
    return z_t - _per_sample("z0_from_velocity", t, z_t) * velocity


@torch.no_grad()
def euler_sample(velocity_fn: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Integrates `dz/dt = velocity_fn(z, t)` from t = 1 (`noise`, `[batch, ...]`) to t = 0 in equal Euler steps.

    `velocity_fn(z, t)` gets t as `[batch]`. Returns the clean latent, without gradients.
    """
    if steps < 1:
        raise ValueError(f"euler_sample: steps={steps!r}; expected at least 1")
    z = noise
    for i in range(steps):
        t = torch.full((noise.shape[0],), 1 - i / steps, device=noise.device, dtype=noise.dtype)
        z = z - velocity_fn(z, t) / steps
    return z


def _check_same(where: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{where}: shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")


def _per_sample(where: str, t: Tensor, like: Tensor) -> Tensor:
    if t.shape != like.shape[:1]:
        raise ValueError(f"{where}: t has shape {tuple(t.shape)}; expected [{like.shape[0]}], one time a sample")
    return t.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)
