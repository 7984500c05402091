"""What the bundled trainings share: random streams, clipping, checkpoints, weights. Each has its own losses and its own step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.probes import total_norm
from tune_ssim.trials.training import Training

WEIGHTS = Path(__file__).parent / "weights"


class BundledTraining(Training):
    """`config` has `max_grad_norm`, None for no clipping. stateful: the attributes that a checkpoint holds; None where absent."""

    config: Any
    optimizer: torch.optim.Optimizer
    stateful: tuple[str, ...] = ("optimizer",)

    def begin(self, config: Any, seed: int, device: str | None) -> None:
        """The first lines of `setup`."""
        self.config, self.seed, self.step_count = config, seed, 0
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _generator(self, n: int, stream: int, rank: int = 0, *more: int) -> torch.Generator:
        """The random numbers of step n: independent streams made of (seed, n, rank), never of the configuration."""
        state = np.random.SeedSequence([self.seed, n, rank, stream, *more]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    def clip(self) -> torch.Tensor:
        """Clips the gradient, if the configuration has a limit. Returns its norm before."""
        norm = total_norm(self.trainable_parameters())
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trainable_parameters(), self.config.max_grad_norm, norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        present = {name: getattr(self, name) for name in self.stateful if getattr(self, name) is not None}
        return {**{name: holder.state_dict() for name, holder in present.items()}, "step_count": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.stateful:
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(state[name])
        self.step_count = state["step_count"]

    def effective(self) -> dict[str, Any]:
        """The parameters in force. The learning rate is read from the optimiser."""
        in_force = {"optimizer": type(self.optimizer).__name__.lower(), "lr": self.optimizer.param_groups[0]["lr"]}
        return {**asdict(self.config), **in_force, "device": self.device.type}


def numbers_of(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """0-d tensors as numbers, with one transfer from the device."""
    return dict(zip(metrics, torch.stack([value.double() for value in metrics.values()]).tolist(), strict=True))


def sha256_of(tensors: Iterable[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Loads all tensors of `path`, strictly. A bundled file must have its recorded hash.

    Raises UserError if there is no such file, and BadSetup if its contents do not fit `module`."""
    sums = path.parent / "SHA256SUMS"
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        if sums.exists():
            recorded = {name: digest for digest, name in map(str.split, sums.read_text().splitlines())}
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if recorded.get(path.name, found) != found:
                raise BadSetup(f"{path}: hash {found[:12]}… is not the recorded {recorded[path.name][:12]}…; reinstall")
        tensors = load_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except BadSetup:
        raise
    except Exception as error:  # safetensors raises its own type for anything malformed
        raise BadSetup(f"{path}: not a safetensors file ({error})") from None
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise BadSetup(f"{path}: not the weights of this network: {' '.join(str(error).split())[:400]}") from None
