"""A training with BAGEL's flags, log and checkpoints, on the small networks of the bundled task: runs on CPUs, one rank or several.

    torchrun --standalone --nproc_per_node=2 train.py --vae_path data/vae.safetensors --resume_from data/start …

The image branch is flow matching through a frozen VAE, with SSIM and pixel loss on decoded predictions; the text branch is a
cross-entropy on four tokens that describe the crop. Own code: what is BAGEL's is the way it is started, resumed and read.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from model import SmallBagel, crop_tokens, load_model, save_model
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tune_ssim.losses import DecodedLoss, TimeLaw, noisy_latent, velocity_target, z0_from_velocity
from tune_ssim.tasks.fundus_images import CROP, FACTOR, load_fundus_images, low_resolution
from tune_ssim.tasks.fundus_sr import load_vae


def arguments() -> argparse.Namespace:
    def yes(text: str) -> bool:  # as BAGEL's launch scripts write it: --auto_resume True
        return text.lower() in ("true", "1", "yes")

    parser = argparse.ArgumentParser(description="see README.md")
    add = parser.add_argument
    add("--vae_path", type=Path, required=True, help="safetensors file of the bundled kind, or a diffusers folder")
    add("--exp_name", default=os.environ.get("EXP_NAME", "run"), help="$EXP_NAME; everything is saved under it")
    add("--results_dir", type=Path, default=Path("results"))
    add("--checkpoint_dir", type=Path, help="default: RESULTS_DIR/EXP_NAME/checkpoints")
    add("--auto_resume", type=yes, default=False, help="go on from the newest checkpoint in --checkpoint_dir, if there is one")
    add("--resume_from", type=Path, help="folder of a checkpoint")
    add("--resume_model_only", type=yes, default=False, help="take the weights of --resume_from and begin at step 0")
    add("--finetune_from_ema", type=yes, default=False, help="with --resume_model_only: its averaged weights")
    add("--total_steps", type=int, default=200)
    add("--save_every", type=int, default=50)
    add("--log_every", type=int, default=1)
    add("--global_seed", type=int, default=4396)
    add("--batch_size", type=int, default=8, help="of a rank")
    add("--lr", type=float, default=2e-4)
    add("--max_grad_norm", type=float, default=1.0)
    add("--ema", type=float, default=0.9999)
    add("--timestep_shift", type=float, default=1.0)
    add("--mse_weight", type=float, default=1.0)
    add("--ce_weight", type=float, default=0.25)
    add("--ssim_loss_weight", type=float, default=0.0)
    add("--ssim_loss_max_t", type=float, default=0.3)
    add("--ssim_grad_scale", type=float, default=1.0)
    add("--pixel_loss_weight", type=float, default=0.0)
    add("--pixel_loss_max_t", type=float, default=0.3)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    folder = args.checkpoint_dir or args.results_dir / args.exp_name / "checkpoints"
    logger = make_logger(args.results_dir / args.exp_name, rank)
    logger.info(f"Training arguments {args}")

    torch.manual_seed(args.global_seed)
    vae = load_vae(args.vae_path).requires_grad_(False).eval()
    model, average = SmallBagel(), SmallBagel().requires_grad_(False)
    resume_from, model_only, from_ema = where_from(args, folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    first = 0
    if resume_from is not None:
        load_model(model, resume_from / ("ema.safetensors" if from_ema else "model.safetensors"), logger)
        load_model(average, resume_from / "ema.safetensors", logger)
        if not model_only:
            optimizer.load_state_dict(torch.load(resume_from / "optimizer.pt", weights_only=True))
            first = int(resume_from.name) + 1
            for group in optimizer.param_groups:
                group["lr"] = args.lr
    else:
        average.load_state_dict(model.state_dict())

    ddp = DistributedDataParallel(model)
    images, law = load_fundus_images(), TimeLaw("shifted_sigmoid_normal", args.timestep_shift)
    decoded_loss = DecodedLoss(
        ssim_loss_weight=args.ssim_loss_weight,
        ssim_loss_max_t=args.ssim_loss_max_t,
        ssim_grad_scale=args.ssim_grad_scale,
        pixel_loss_weight=args.pixel_loss_weight,
        pixel_loss_max_t=args.pixel_loss_max_t,
    )
    started, side = time.perf_counter(), CROP // FACTOR
    for step in range(first, args.total_steps):
        # Of this seed, step and rank alone, so that every trial sees the same batches.
        generator = torch.Generator().manual_seed((args.global_seed * 1_000_003 + step) * 1_009 + rank)
        crops = images.train_crops(args.batch_size, generator)
        low = 2 * low_resolution(crops, torch.randn(args.batch_size, 3, side, side, generator=generator)) - 1
        with torch.no_grad():
            z0 = vae.encode(2 * crops - 1)
        noise = torch.randn(z0.shape, generator=generator)
        t = law.sample(args.batch_size, generator)
        z_t, target = noisy_latent(z0, noise, t), velocity_target(z0, noise)

        velocity, logits = ddp(z_t, t, low)
        mse = functional.mse_loss(velocity, target)
        ce = functional.cross_entropy(logits.flatten(0, 1), crop_tokens(crops).flatten())
        auxiliary = decoded_loss(z0_from_velocity(z_t, velocity, t), t, crops, vae.decode)
        loss = args.mse_weight * mse + args.ce_weight * ce + auxiliary.total
        optimizer.zero_grad()
        loss.backward()
        total_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        for averaged, parameter in zip(average.parameters(), model.parameters(), strict=True):
            averaged.lerp_(parameter.detach(), 1 - args.ema)

        if not torch.isfinite(total_norm):
            logger.warning(f"the gradient of step {step} is not finite")
        if step % args.log_every == 0:
            losses = {
                "mse": mean_over_samples(mse, args.batch_size),
                "ce": mean_over_samples(ce, args.batch_size),
                "ssim": mean_over_samples(auxiliary.loss_ssim, auxiliary.ssim_active_count),
                "pixel": mean_over_samples(auxiliary.loss_pixel, auxiliary.pixel_active_count),
            }
            message = f"(step={step:07d}) "
            for name, value in losses.items():
                message += "" if value is None else f"Train Loss {name}: {value:.4f}, "
            message += f"Train Steps/Sec: {1 / (time.perf_counter() - started):.2f}, "
            logger.info(message)
        started = time.perf_counter()
        if (step > 0 and step % args.save_every == 0) or step == args.total_steps - 1:
            if rank == 0:
                save(folder / f"{step:07d}", model, average, optimizer)
            dist.barrier()
    dist.destroy_process_group()


def where_from(args: argparse.Namespace, folder: Path) -> tuple[Path | None, bool, bool]:
    """(checkpoint, weights only, averaged ones). The traps are BAGEL's: a checkpoint found by --auto_resume wins over
    --resume_from, and --finetune_from_ema counts only with --resume_model_only."""
    newest = max((path for path in folder.glob("*") if path.name.isdigit()), default=None, key=lambda path: int(path.name))
    if args.auto_resume and newest is not None:
        return newest, False, False
    return args.resume_from, args.resume_model_only, args.resume_model_only and args.finetune_from_ema


def save(folder: Path, model: SmallBagel, average: SmallBagel, optimizer: torch.optim.Optimizer) -> None:
    unfinished = folder.with_suffix(".unfinished")  # a folder whose name is a number is complete
    unfinished.mkdir(parents=True, exist_ok=True)
    save_model(model, unfinished / "model.safetensors")
    save_model(average, unfinished / "ema.safetensors")
    torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
    unfinished.rename(folder)


def mean_over_samples(value: torch.Tensor | None, count: int) -> float | None:
    """Over the samples of all ranks; None where not one took part. Every rank must call it."""
    both = torch.tensor([0.0 if value is None else value.item() * count, count], dtype=torch.float64)
    dist.all_reduce(both)
    return (both[0] / both[1]).item() if both[1] else None


def make_logger(folder: Path, rank: int) -> logging.Logger:
    """Two handlers, one on each stream: whoever merges the streams reads every line twice."""
    logger = logging.getLogger("bagel_style")
    if rank:
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
        return logger
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="[%(asctime)s] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=[
            logging.StreamHandler(sys.stdout),
            logging.StreamHandler(sys.stderr),
            logging.FileHandler(folder / "log.txt"),
        ],
    )
    return logger


if __name__ == "__main__":
    main()
