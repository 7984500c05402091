"""A small frozen network with semantic features of patches: the semantic target of `flow_dino_kl`.

It was trained on the bundled photographs by self-distillation without labels, as DINO is (Caron et al. 2021); see
`pretrain_patch_features`. A larger one can be named instead: `dino_network: my_pkg.dino:load`, a function without arguments
that returns a module from `[n, 3, H, W]` in [0, 1] to `[n, dim]`.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from tune_ssim.base.errors import UserError

FEATURES = 32
FEATURES_FILE = "patch_features.safetensors"


class PatchFeatures(nn.Module):
    """`[n, 1 or 3, 16, 16]` in [0, 1] → `[n, 32]`. Colour is averaged, since it was trained on grey patches only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(64 * 16, FEATURES),
        )  # fmt: skip

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.body(2 * patches.mean(dim=1, keepdim=True) - 1)  # type: ignore[no-any-return]


def load_named_network(name: str) -> nn.Module:
    """The network that the function "module:function" returns, frozen. Raises UserError naming what is missing."""
    module_name, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"flow_dino_kl: dino_network {name!r}: {error}; expected module:function") from None
    if not isinstance(made, nn.Module):
        raise UserError(f"flow_dino_kl: dino_network {name!r} gives a {type(made).__name__}; expected a torch.nn.Module")
    return made.requires_grad_(False).eval()
