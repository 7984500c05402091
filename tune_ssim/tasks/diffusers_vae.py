"""A user's autoencoder in the format of the diffusers library: a folder with config.json and a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tune_ssim.base.errors import BadSetup, UserError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
CLASSES = ("AutoencoderKL", "AutoencoderTiny")
CHUNK = 8  # images per chunk, as in DecodedLoss
PROBE = 64  # side of the image that is encoded to find channels and reduction


class DiffusersVAE(nn.Module):
    """Image in [-1, 1] `[n, 3, H, W]` ↔ latent `[n, latent_channels, H/factor, W/factor]`, float32.

    Latents are standardised by the numbers of config.json, as diffusers' pipelines do: (z − shift_factor) · scaling_factor, or
    (z − latents_mean) · scaling_factor / latents_std. `latent_mean`, `latent_std`: the same as one mean and deviation a channel,
    `[1, channels, 1, 1]`.
    """

    latent_mean: torch.Tensor
    latent_std: torch.Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        with torch.no_grad():
            latent = self._moment(torch.zeros(1, 3, PROBE, PROBE))
        self.latent_channels, self.factor = latent.shape[1], PROBE // latent.shape[2]
        config: Any = inner.config
        scale = torch.tensor(1.0 if config.scaling_factor is None else float(config.scaling_factor))
        mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * self.latent_channels
        std = config.get("latents_std") or [1.0] * self.latent_channels
        self.register_buffer("latent_mean", torch.tensor(mean).float().view(1, -1, 1, 1))
        self.register_buffer("latent_std", torch.tensor(std).float().view(1, -1, 1, 1) / scale)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The standardised latent: the posterior's mean, if there is a posterior."""
        return (_in_chunks(self._moment, images) - self.latent_mean) / self.latent_std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents → images in about [-1, 1] (not clipped)."""
        return _in_chunks(self._image, latents * self.latent_std + self.latent_mean)

    def _image(self, latents: torch.Tensor) -> torch.Tensor:
        return self.inner.decode(latents).sample  # type: ignore[operator, no-any-return]

    def _moment(self, images: torch.Tensor) -> torch.Tensor:
        found: Any = self.inner.encode(images)  # type: ignore[operator]
        return found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents  # type: ignore[no-any-return]


def _in_chunks(function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    """Runs in small batches if no gradient is needed, since an evaluation's 128 images could fill the memory with a real VAE."""
    if torch.is_grad_enabled():
        return function(batch)
    return torch.cat([function(chunk) for chunk in batch.split(CHUNK)])


def load_diffusers_vae(folder: str | Path) -> DiffusersVAE:
    """Loads one of `CLASSES` from a local folder. Pickled weights (.bin) are not read; nothing is downloaded.

    Raises UserError for any other folder or if diffusers is missing, BadSetup for weights that do not fit."""
    folder = Path(folder)
    settings = _settings(folder)
    name = settings.get("_class_name")
    if name not in CLASSES:
        raise UserError(f"vae: {folder / CONFIG_FILE}: _class_name {name!r}; valid: {', '.join(CLASSES)}")
    if not (folder / WEIGHTS_FILE).is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".ckpt", ".safetensors"))
        hint = f"; there is {', '.join(others)}: save it again with save_pretrained(…, safe_serialization=True)" if others else ""
        raise UserError(f"vae: {folder}: no {WEIGHTS_FILE}{hint}")
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"vae: needs the diffusers library ({error}): pip install 'tune-ssim[diffusers]'") from None
    try:
        # low_cpu_mem_usage needs a further library and warns at every load unless it is switched off.
        inner, info = getattr(diffusers, name).from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True,
            torch_dtype=torch.float32,
        )  # fmt: skip
    except Exception as error:  # diffusers, safetensors and torch raise various kinds
        raise BadSetup(f"vae: {folder}: {' '.join(str(error).split())[:300]}") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            names = ", ".join(map(str, info[what][:3]))
            raise BadSetup(f"vae: {folder / WEIGHTS_FILE}: {len(info[what])} {what.replace('_', ' ')}: {names}")
    try:
        return DiffusersVAE(inner)
    except Exception as error:
        raise UserError(f"vae: {folder}: cannot encode RGB images: {' '.join(str(error).split())[:200]}") from None


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        inside = f"; {folder / 'vae'} has one" if (folder / "vae" / CONFIG_FILE).is_file() else ""
        raise UserError(f"vae: {folder}: {'no ' + CONFIG_FILE + inside if folder.is_dir() else 'no such folder'}")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"vae: {path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"vae: {path}: must be a mapping")
    return found
