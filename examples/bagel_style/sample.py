"""Inference with a checkpoint of `train.py`: samples and tokens as files, or held-out numbers as one line of JSON.

python sample.py --checkpoint results/run/checkpoints/0000050 --data data --out samples [--noise 1] [--ema]
python sample.py --checkpoint … --data data --evaluate
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from model import SmallBagel, load_model
from PIL import Image

from tune_ssim.losses import euler_sample, ssim
from tune_ssim.tasks.fundus_sr import EULER_STEPS, load_vae


def read(folder: Path) -> torch.Tensor:
    pictures = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with model.safetensors and ema.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py made")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--noise", type=int, default=0)
    parser.add_argument("--ema", action="store_true", help="the averaged weights; these hide a collapse for thousands of steps")
    parser.add_argument("--evaluate", action="store_true")
    args = parser.parse_args()
    vae, model = load_vae(args.data / "vae.safetensors").requires_grad_(False), SmallBagel().requires_grad_(False).eval()
    load_model(model, args.checkpoint / ("ema.safetensors" if args.ema else "model.safetensors"), logging.getLogger())
    low = 2 * read(args.data / "inputs") - 1
    noise = torch.randn(len(low), 4, *low.shape[-2:], generator=torch.Generator().manual_seed(1 + args.noise))
    images = (vae.decode(euler_sample(lambda z, t: model(z, t, low)[0], noise, EULER_STEPS)) * 0.5 + 0.5).clamp(0, 1)
    if args.evaluate:
        truth = read(args.data / "references")
        error = (images - truth).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        print(json.dumps({"ssim": ssim(images, truth).mean().item(), "psnr": (-10 * torch.log10(error)).mean().item()}))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(images.nan_to_num(0)):  # a file can hold no NaN; black is no better
            pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
            Image.fromarray(pixels).save(args.out / f"{index:03d}.png")
        tokens = model(noise, torch.ones(len(low)), low)[1].argmax(dim=-1)
        (args.out / "tokens.json").write_text(json.dumps(tokens.tolist()))


if __name__ == "__main__":
    main()
