"""The small task as somebody's script that knows nothing of tune_ssim: flags in, a text log, checkpoints, a file of samples out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_task import SmallTask


def train(options: argparse.Namespace) -> None:
    task = SmallTask()
    task.setup({"steps": options.steps, "ssim_loss_weight": options.ssim_loss_weight, "fault": options.fault}, options.seed)
    print(f"Namespace(ssim_loss_weight={task.gain}, steps={options.steps})")
    start = 0
    if options.resume:
        task.x, task.n = load_file(options.resume)["x"], int(Path(options.resume).stem)
        start = task.n
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for step in range(start + 1, options.steps + 1):
        found = {name: float(value) for name, value in task.step().items()}
        if step % options.save_every == 0:
            save_file({"x": task.x}, out / f"{step:05d}.safetensors")
        line = f"[12:00:00] (step={step:07d}) Train Loss: {found['loss']:.17g}, Grad Norm: {found['total_norm']:.17g},"
        print(line)
        print(line, file=sys.stderr)  # as if two loggers wrote it


def sample(options: argparse.Namespace) -> None:
    import numpy as np
    from PIL import Image

    task = SmallTask()
    task.setup({}, 0)
    images = task.x if options.checkpoint == "start" else load_file(options.checkpoint)["x"]
    found = task.target if options.truth else images.clamp(0, 1)
    for index, image in enumerate(found):
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        Path(options.out).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels)).save(Path(options.out) / f"{index}.png")


def evaluate(options: argparse.Namespace) -> None:
    task = SmallTask()
    task.setup({}, 0)
    task.x = load_file(options.checkpoint)["x"]
    print(json.dumps(task.evaluate()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["train", "sample", "evaluate"])
    parser.add_argument("--ssim_loss_weight", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", default="none")
    parser.add_argument("--save_every", type=int, default=10)
    parser.add_argument("--resume", default="")
    parser.add_argument("--checkpoint", default="start")
    parser.add_argument("--truth", action="store_true")
    parser.add_argument("--out", default="out")
    chosen = parser.parse_args()
    {"train": train, "sample": sample, "evaluate": evaluate}[chosen.what](chosen)
