"""What training and sampling share: images, and the autoencoder with its scaling."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from tune_ssim.tasks.image_folder import FolderImages, load_folder_images


def load_images(folder: Path, resolution: int) -> FolderImages:
    return load_folder_images(folder, crop=resolution, side=2 * resolution)


def load_vae(path: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(path, use_safetensors=True, low_cpu_mem_usage=False)
    return vae.requires_grad_(False).eval()


def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] → scaled latents."""
    shift = vae.config.shift_factor or 0.0
    return (vae.encode(images).latent_dist.mode() - shift) * vae.config.scaling_factor


def latents_to_images(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents → images in about [-1, 1]; in float32, whatever the caller's autocast is."""
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode(latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
