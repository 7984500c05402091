"""Held-out images, noised half-way and restored by a checkpoint: pictures for the smoke test, or numbers as a line of JSON.

    python sample.py --unet out/checkpoint-500/unet --pretrained_vae vae --train_data_dir images --out samples [--noise 1]
    python sample.py --unet … --pretrained_vae vae --train_data_dir images --references references
    python sample.py --unet … --pretrained_vae vae --train_data_dir images --evaluate

An unconditional model's samples have no truth to be compared with. Half-way noise leaves enough of the image to say whether the
model restores or ruins it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import encode, latents_to_images, load_images, load_vae
from diffusers import UNet2DModel
from PIL import Image

from tune_ssim.losses import noisy_latent, ssim

NOISED_TO, EULER_STEPS, IMAGES = 0.5, 6, 16


def write(images: torch.Tensor, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images.nan_to_num(0)):  # a file can hold no NaN
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(folder / f"{index:03d}.png")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--unet", type=Path)
    parser.add_argument("--pretrained_vae", type=Path, required=True)
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--noise", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--references", type=Path, help="write the held-out images themselves here")
    parser.add_argument("--evaluate", action="store_true")
    args = parser.parse_args()
    truth = load_images(args.train_data_dir, args.resolution).held_out_crops(IMAGES)
    if args.references is not None:
        write(truth, args.references)
    if args.unet is None:
        return
    vae, unet = load_vae(args.pretrained_vae), UNet2DModel.from_pretrained(args.unet, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        z0 = encode(vae, 2 * truth - 1)
        noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1 + args.noise))
        z = noisy_latent(z0, noise, torch.full((len(z0),), NOISED_TO))
        for i in range(EULER_STEPS):
            t = NOISED_TO * (1 - i / EULER_STEPS)
            z = z - NOISED_TO / EULER_STEPS * unet(z, torch.full((len(z),), 1000 * t)).sample
        images = (latents_to_images(vae, z) * 0.5 + 0.5).clamp(0, 1)
    if args.out is not None:
        write(images, args.out)
    if args.evaluate:
        error = (images - truth).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        print(json.dumps({"ssim": ssim(images, truth).mean().item(), "psnr": (-10 * torch.log10(error)).mean().item()}))


if __name__ == "__main__":
    main()
