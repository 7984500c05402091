"""Pretrains the networks of the bundled task: `python -m tune_ssim.tasks.pretrain_fundus --out FOLDER` (about 5 CPU minutes).

First the VAE (reconstruction + a light KL), then the denoiser on flow matching alone: no pixel loss and no
SSIM loss, so that a study starts from a model that was never trained with the loss it tunes. Without further flags it reproduces
the bundled weights; `--data FOLDER` takes your own images, `--vae PATH` your own VAE, which stays frozen. Seeds are fixed, but
machines differ in the last bits, so the hashes in `weights/SHA256SUMS` identify the shipped files, not the recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch.nn import functional

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.tasks.diffusers_vae import DiffusersVAE
from tune_ssim.tasks.fundus_images import CROP, FACTOR, FundusImages, load_fundus_images, low_resolution
from tune_ssim.tasks.fundus_networks import VAE, Denoiser
from tune_ssim.tasks.fundus_sr import DENOISER_FILE, MADE_FOR, VAE_FILE, FundusSR, denoiser_for, load_vae, vae_id
from tune_ssim.tasks.image_folder import FolderImages, load_folder_images, words

VAE_STEPS, VAE_BATCH, VAE_LR = 900, 16, 1e-3
# Weight of the KL, a sum over a latent's elements, against a mean square. It gives a posterior as wide as in real latent
# autoencoders, which makes the decoder smooth. Tried: 1e-6 for 3000 steps reconstructs better (0.934 against 0.879 SSIM held out)
# and leaves an SSIM loss nothing to gain behind the frozen decoder; 1e-4 does not reconstruct.
KL_WEIGHT = 1e-5
FLOW_STEPS, FLOW_BATCH, FLOW_LR = 2500, 16, 1e-3
EMA_DECAY = 0.999  # for the denoiser's weights; the averaged ones are shipped

Images = FundusImages | FolderImages


def train_vae(images: Images, steps: int = VAE_STEPS, seed: int = 0, device: torch.device | None = None) -> VAE:
    torch.manual_seed(seed)
    vae = VAE().to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=VAE_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_LR, total_steps=steps)
    for step in _progress("VAE", steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        target = 2 * images.train_crops(VAE_BATCH, generator).to(device) - 1
        mean, log_var = vae.moments(target)
        log_var = log_var.clamp(-20, 10)
        latent = mean + torch.exp(0.5 * log_var) * torch.randn(mean.shape, generator=generator).to(device)
        prediction = vae.decoder(latent)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(dim=(1, 2, 3)).mean()
        loss = functional.mse_loss(prediction, target) + 0.1 * functional.l1_loss(prediction, target) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(json.dumps({"stage": "vae", "step": step, "loss": round(loss.item(), 6), "kl": round(kl.item(), 1)}))
    vae.requires_grad_(False)
    crops = images.train_crops(2048, torch.Generator().manual_seed(seed)).to(device)
    latents = torch.cat([vae.moments(2 * chunk - 1)[0] for chunk in crops.split(256)])
    vae.latent_mean.copy_(latents.mean(dim=(0, 2, 3), keepdim=True))
    vae.latent_std.copy_(latents.std(dim=(0, 2, 3), keepdim=True))
    return vae


def train_denoiser(
    images: Images,
    vae: VAE | DiffusersVAE,
    steps: int = FLOW_STEPS,
    seed: int = 0,
    width: int = 48,
    device: torch.device | None = None,
) -> Denoiser:
    torch.manual_seed(seed)
    model, side = denoiser_for(vae, width).to(device), images.crop // FACTOR
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=FLOW_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FLOW_LR, total_steps=steps)
    for step in _progress("denoiser", steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        crops = images.train_crops(FLOW_BATCH, generator)
        condition = 2 * low_resolution(crops, torch.randn(FLOW_BATCH, 3, side, side, generator=generator)) - 1
        with torch.no_grad():
            z0 = vae.encode(2 * crops.to(device) - 1)
        noise = torch.randn(z0.shape, generator=generator).to(device)
        t = torch.rand(FLOW_BATCH, generator=generator).to(device)
        t_image = t[:, None, None, None]
        velocity = model((1 - t_image) * z0 + t_image * noise, t, condition.to(device))
        loss = functional.mse_loss(velocity, noise - z0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        if step % 250 == 0 or step == steps - 1:
            print(json.dumps({"stage": "denoiser", "step": step, "loss_flow": round(loss.item(), 5)}))
    model.load_state_dict(average)
    return model


def _progress(what: str, steps: int) -> Iterator[int]:
    """Shows progress on stderr, so that stdout has JSON lines only."""
    console = Console(stderr=True)
    yield from track(range(steps), description=f"pretraining the {what}", console=console, disable=not console.is_terminal)


def pretrain(arguments: argparse.Namespace) -> None:
    """Raises UserError for data or a VAE that cannot be used."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images: Images = load_fundus_images("retina", arguments.crop)
    if arguments.data:
        images = load_folder_images(arguments.data, arguments.crop, arguments.data_side)
        if images.left_out:
            print(f"left out: {words(images.left_out)}", file=sys.stderr)
    vae = load_vae(arguments.vae).to(device).requires_grad_(False).eval() if arguments.vae else None
    if vae is not None and arguments.crop % (2 * vae.factor):
        raise UserError(f"--crop must be a multiple of {2 * vae.factor} with this VAE, got {arguments.crop}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if vae is None:
        vae = train_vae(images, arguments.vae_steps, device=device)
    made: list[Path] = []
    if isinstance(vae, VAE):
        made.append(_save(vae, arguments.out / VAE_FILE))
    denoiser = train_denoiser(images, vae, arguments.flow_steps, width=arguments.width, device=device)
    made.append(_save(denoiser, arguments.out / DENOISER_FILE, {MADE_FOR: vae_id(vae)}))
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in made]
    (arguments.out / "SHA256SUMS").write_text("".join(sums))
    _say(arguments, vae)


def _save(module: torch.nn.Module, path: Path, metadata: dict[str, str] | None = None) -> Path:
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt", "made_by": "tune_ssim.tasks.pretrain_fundus", **(metadata or {})})
    return path


def _say(arguments: argparse.Namespace, vae: VAE | DiffusersVAE) -> None:
    """Held-out quality, and the settings that a study needs to use these weights."""
    needed = {"data": arguments.data, "data_side": arguments.data_side, "weights": arguments.out.absolute()}
    needed |= {"vae": arguments.vae} if isinstance(vae, DiffusersVAE) else {}
    needed |= {"crop": arguments.crop} if arguments.crop != CROP else {}
    needed |= {"width": arguments.width} if arguments.width != 48 else {}
    config = {name: str(value) if isinstance(value, Path) else value for name, value in needed.items() if value is not None}
    task = FundusSR()
    task.setup(config, 0)
    found, sample = task.evaluate(), task.sample()
    assert sample.references is not None and sample.reconstructions is not None
    error = (sample.reconstructions - sample.references).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    reconstructed = (-10 * torch.log10(error)).mean().item()
    means, deviations = task.latent_statistics()
    print(
        json.dumps(
            {
                "stage": "held out", "ssim": round(found["ssim"], 4), "psnr": round(found["psnr"], 2),
                "autoencoder_psnr": round(reconstructed, 2),
                "latent_mean": [round(x, 3) for x in means], "latent_std": [round(x, 3) for x in deviations],
            }
        )
    )  # fmt: skip
    print("task_config:", *(f"  {name}: {value}" for name, value in config.items()), sep="\n", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the safetensors files: a study's `weights`")
    parser.add_argument("--data", type=Path, help="folder of images, in place of the bundled photograph")
    parser.add_argument("--data-side", type=int, help="reduce the shorter side of larger images to this many pixels")
    parser.add_argument("--vae", type=Path, help="train the denoiser on this VAE: a diffusers folder or a file of the bundled kind")
    parser.add_argument("--crop", type=int, default=CROP, help=f"pixels; default {CROP}")
    parser.add_argument("--width", type=int, default=48, help="channels of the denoiser; default 48")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--flow-steps", type=int, default=FLOW_STEPS)
    try:
        pretrain(parser.parse_args())
    except BadSetup as error:
        print(f"bad set-up: {error}", file=sys.stderr)
        raise SystemExit(3) from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
