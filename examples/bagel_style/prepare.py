"""What a study of `train.py` starts from: `python prepare.py --out data` (the bundled weights; a minute of the language head).

start/{model,ema}.safetensors   the checkpoint to fine-tune      references/*.png   held-out crops, the truth of the samples
vae.safetensors                 the frozen autoencoder           inputs/*.png       their low-resolution versions
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from model import SmallBagel, crop_tokens, save_model
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from tune_ssim.tasks.fundus_images import load_fundus_images, low_resolution
from tune_ssim.tasks.fundus_sr import DENOISER_FILE, VAE_FILE, WEIGHTS

HELD_OUT = 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--language_steps", type=int, default=300)
    args = parser.parse_args()
    for name in ("start", "references", "inputs"):
        (args.out / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(WEIGHTS / VAE_FILE, args.out / "vae.safetensors")

    torch.manual_seed(0)
    images, model = load_fundus_images(), SmallBagel()
    model.denoiser.load_state_dict(load_file(WEIGHTS / DENOISER_FILE))
    optimizer = torch.optim.AdamW(model.language.parameters(), lr=1e-3)
    for step in range(args.language_steps):
        crops = images.train_crops(32, torch.Generator().manual_seed(step))
        logits = model.language(2 * low_resolution(crops) - 1).view(32, 4, -1)
        loss = functional.cross_entropy(logits.flatten(0, 1), crop_tokens(crops).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name in ("model", "ema"):
        save_model(model, args.out / "start" / f"{name}.safetensors")

    crops = images.held_out_crops(HELD_OUT)
    for name, pictures in (("references", crops), ("inputs", low_resolution(crops))):
        for index, picture in enumerate(pictures):
            pixels = (picture.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
            Image.fromarray(pixels).save(args.out / name / f"{index:03d}.png")


if __name__ == "__main__":
    main()
