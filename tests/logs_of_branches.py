"""Streams of records as healthy and as ruined trainings make them, for the rule packs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from tune_ssim.records import Record

Values = Callable[[int], float]


def records(steps: int, **metrics: Values) -> list[Record]:
    """`__` in a name stands for `/`."""
    names = {key: key.replace("__", "/") for key in metrics}
    return [Record(step, {names[key]: float(value(step)) for key, value in metrics.items()}) for step in range(steps)]


def changed(base: Mapping[str, Values], **others: Values) -> dict[str, Values]:
    return {**base, **others}


def noisy(level: Values, share: float, seed: int) -> Values:
    """Around `level`, with relative noise."""
    noise = np.random.default_rng(seed).standard_normal(20_000) * share + 1
    return lambda step: level(step) * noise[step]


def falling(first: float, last: float, over: float, share: float = 0.05, seed: int = 0) -> Values:
    return noisy(lambda step: last + (first - last) * math.exp(-step / over), share, seed)


def flat(level: float, share: float = 0.02, seed: int = 0) -> Values:
    return noisy(lambda step: level, share, seed)


def after(step: int, then: Values, before: Values) -> Values:
    return lambda n: then(n) if n >= step else before(n)


def of_heads(name: str, parameters: int, ga: int = 1) -> dict[str, Values]:
    return {
        f"dbg__grad_{name}": falling(0.8, 0.2, 500, 0.1, seed=len(name)),
        f"dbg__{name}_has_grad": lambda step: parameters * ga,
        f"dbg__{name}_trainable": lambda step: parameters,
        f"dbg__update_ratio__{name}": flat(1e-4),
    }


HEALTHY: dict[str, dict[str, Values]] = {
    "flow_dino_kl": {
        "loss": falling(1.5, 0.5, 500),
        "loss_flow": falling(1.0, 0.3, 500),
        "loss_dino": falling(0.1, 0.03, 400),
        "dino_global": falling(0.9, 0.3, 600, 0.03, seed=1),
        "kl_raw": falling(20.0, 8.0, 400, 0.05, seed=2),
        "loss_kl": falling(0.12, 0.05, 400, 0.05, seed=2),
        "dbg__loss_grad__flow": flat(0.2, 0.3),
        "dbg__loss_grad__dino": flat(0.3, 0.3, seed=3),
        "z_init__mean": lambda step: 0.03 * math.sin(step / 17),
        "z_init__var": noisy(lambda step: 0.85, 0.05, 3),
        **of_heads("flow", 40),
        **of_heads("dino_t_head", 12),
        **of_heads("mu_head", 2),
        **of_heads("logvar_head", 2),
    },
    "vae_kl": {
        "loss": falling(0.7, 0.45, 300, 0.03),
        "loss_reconstruction": falling(0.6, 0.3, 300, 0.03, seed=4),
        "kl_raw": falling(20.0, 12.0, 300, 0.05, seed=5),
        "z_init__marginal_kl": falling(0.3, 0.02, 200, 0.1, seed=10),
        **of_heads("decoder", 6),
        **of_heads("encoder", 6),
    },
    "two_stage_vlm": {
        "loss_caption": falling(3.5, 0.7, 900, 0.05, seed=6),
        "loss_proxy": falling(0.5, 0.05, 300, 0.05, seed=7),
        "epoch": lambda step: step // 100,
        "dbg__llm_trainable": lambda step: 0,
        **of_heads("bridge", 4),
    },
    "ssim": {
        "loss": falling(1.0, 0.4, 500),
        "loss_flow": falling(0.9, 0.3, 500),
        "loss_ssim": falling(0.5, 0.3, 500, 0.1, seed=8),
        "total_norm": falling(2.0, 1.0, 500, 0.2, seed=9),
        "ssim_active_fraction": lambda step: float(step % 3 == 0),
    },
}
