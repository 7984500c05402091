"""Unconditional latent flow matching with diffusers' UNet2DModel and AutoencoderKL, and an SSIM loss on decoded predictions.

    python train.py --train_data_dir images --pretrained_vae vae --output_dir out --ssim_loss_weight 1

In the manner of diffusers' own examples: flags, checkpoint-N folders, a log of JSON lines. One device, no accelerate. Lines marked
(SSIM) are all that the loss needs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import encode, latents_to_images, load_images, load_vae
from diffusers import UNet2DModel
from torch.nn import functional

from tune_ssim.losses import DecodedLoss, noisy_latent, velocity_target, z0_from_velocity


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="see README.md")
    add = parser.add_argument
    add("--train_data_dir", type=Path, required=True, help="folder of images")
    add("--pretrained_vae", type=Path, required=True, help="AutoencoderKL, as save_pretrained leaves it")
    add("--pretrained_unet", type=Path, help="UNet2DModel to fine-tune; default: a new one of --unet_channels")
    add("--unet_channels", type=int, nargs="+", default=[64, 128, 128])
    add("--output_dir", type=Path, default=Path("out"))
    add("--resolution", type=int, default=64)
    add("--train_batch_size", type=int, default=8)
    add("--max_train_steps", type=int, default=1000)
    add("--learning_rate", type=float, default=1e-4)
    add("--max_grad_norm", type=float, default=1.0)
    add("--mixed_precision", choices=["no", "bf16"], default="no")
    add("--seed", type=int, default=0)
    add("--checkpointing_steps", type=int, default=500)
    add("--resume_from_checkpoint", help="a checkpoint-N folder, or `latest`")
    add("--ssim_loss_weight", type=float, default=0.0)  # (SSIM) five flags
    add("--ssim_loss_max_t", type=float, default=0.3)
    add("--ssim_grad_scale", type=float, default=1.0)
    add("--pixel_loss_weight", type=float, default=0.0)
    add("--pixel_loss_max_t", type=float, default=0.3)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print(json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    vae = load_vae(args.pretrained_vae).to(device)
    images = load_images(args.train_data_dir, args.resolution)
    unet, first = start(args, vae.config.latent_channels)
    unet = unet.to(device).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
    if first:
        optimizer.load_state_dict(torch.load(checkpoint_of(args) / "optimizer.pt", map_location=device, weights_only=True))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate
    decoded_loss = DecodedLoss(  # (SSIM)
        ssim_loss_weight=args.ssim_loss_weight,
        ssim_loss_max_t=args.ssim_loss_max_t,
        ssim_grad_scale=args.ssim_grad_scale,
        pixel_loss_weight=args.pixel_loss_weight,
        pixel_loss_max_t=args.pixel_loss_max_t,
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16")

    with (args.output_dir / "log.jsonl").open("a", buffering=1) as log:
        for step in range(first + 1, args.max_train_steps + 1):
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # of seed and step alone: trials are comparable
            x = images.train_crops(args.train_batch_size, generator).to(device)
            with torch.no_grad():
                z0 = encode(vae, 2 * x - 1)
            noise = torch.randn(z0.shape, generator=generator).to(device)
            t = torch.rand(len(x), generator=generator).to(device)  # 0 is clean, 1 is noise
            z_t = noisy_latent(z0, noise, t)
            with autocast:
                velocity = unet(z_t, 1000 * t).sample
            velocity = velocity.float()
            loss_flow = functional.mse_loss(velocity, velocity_target(z0, noise))
            z0_predicted = z0_from_velocity(z_t, velocity, t)  # (SSIM) three lines
            auxiliary = decoded_loss(z0_predicted, t, x, lambda z: latents_to_images(vae, z))
            loss = loss_flow + auxiliary.total

            optimizer.zero_grad()
            loss.backward()
            total_norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
            optimizer.step()

            record = {"loss": loss.detach(), "loss_flow": loss_flow.detach(), "total_norm": total_norm}
            record |= auxiliary.metrics()  # (SSIM)
            log.write(json.dumps({"step": step, **{name: float(value) for name, value in record.items()}}) + "\n")
            if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                save(args.output_dir / f"checkpoint-{step}", unet, optimizer)


def checkpoint_of(args: argparse.Namespace) -> Path:
    """The one to go on from. Raises SystemExit where there is none."""
    if args.resume_from_checkpoint != "latest":
        return Path(args.resume_from_checkpoint)
    found = sorted(args.output_dir.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]))
    if not found:
        raise SystemExit(f"no checkpoint in {args.output_dir}")
    return found[-1]


def start(args: argparse.Namespace, channels: int) -> tuple[UNet2DModel, int]:
    """The network, and the step that it has reached."""
    if args.resume_from_checkpoint:
        path = checkpoint_of(args)
        return UNet2DModel.from_pretrained(path / "unet", low_cpu_mem_usage=False), int(path.name.rpartition("-")[2])
    if args.pretrained_unet:
        return UNet2DModel.from_pretrained(args.pretrained_unet, low_cpu_mem_usage=False), 0
    levels = len(args.unet_channels)
    made = UNet2DModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=args.unet_channels,
        down_block_types=["DownBlock2D"] * levels,
        up_block_types=["UpBlock2D"] * levels,
        layers_per_block=1,
        norm_num_groups=8,
    )
    return made, 0


def save(folder: Path, unet: UNet2DModel, optimizer: torch.optim.Optimizer) -> None:
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unet.save_pretrained(unfinished / "unet")
    torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
    unfinished.rename(folder)


if __name__ == "__main__":
    main()
