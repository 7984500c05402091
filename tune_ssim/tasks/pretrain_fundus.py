"""Makes the bundled weights again from nothing: `python -m tune_ssim.tasks.pretrain_fundus --out DIR` (about 5 CPU minutes).

First the VAE (reconstruction + a light KL), then the denoiser on flow matching alone: no pixel loss and no
SSIM loss, so that a study starts from a model that has never seen the loss it tunes. Seeds are fixed; two
machines differ in the last bits, so the hashes in `weights/SHA256SUMS` name the shipped files, not the recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional

from tune_ssim.tasks.fundus_images import CROP, FACTOR, load_fundus_images, low_resolution
from tune_ssim.tasks.fundus_networks import VAE, Denoiser

VAE_STEPS, VAE_BATCH, VAE_LR = 900, 16, 1e-3
# Of the sum over a latent's elements, against a mean square: a posterior as wide as real latent autoencoders have, which the
# decoder must tolerate by smoothing. Tried: 1e-6 for 3000 steps reconstructs better (0.934 against 0.879 SSIM held out) and
# leaves an SSIM loss nothing to gain behind the frozen decoder; 1e-4 does not reconstruct.
KL_WEIGHT = 1e-5
FLOW_STEPS, FLOW_BATCH, FLOW_LR = 2500, 16, 1e-3
EMA_DECAY = 0.999  # of the denoiser's weights; the averaged ones are shipped


def train_vae(steps: int = VAE_STEPS, seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    images, vae = load_fundus_images(), VAE()
    optimizer = torch.optim.Adam(vae.parameters(), lr=VAE_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_LR, total_steps=steps)
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        target = 2 * images.train_crops(VAE_BATCH, generator) - 1
        mean, log_var = vae.moments(target)
        log_var = log_var.clamp(-20, 10)
        latent = mean + torch.exp(0.5 * log_var) * torch.randn(mean.shape, generator=generator)
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
    latents = vae.moments(2 * images.train_crops(2048, torch.Generator().manual_seed(seed)) - 1)[0]
    vae.latent_mean.copy_(latents.mean(dim=(0, 2, 3), keepdim=True))
    vae.latent_std.copy_(latents.std(dim=(0, 2, 3), keepdim=True))
    return vae


def train_denoiser(vae: VAE, steps: int = FLOW_STEPS, seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    images, model = load_fundus_images(), Denoiser()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=FLOW_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FLOW_LR, total_steps=steps)
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        crops = images.train_crops(FLOW_BATCH, generator)
        noise_low = torch.randn(FLOW_BATCH, 3, CROP // FACTOR, CROP // FACTOR, generator=generator)
        condition = 2 * low_resolution(crops, noise_low) - 1
        z0 = vae.encode(2 * crops - 1)
        noise = torch.randn(z0.shape, generator=generator)
        t = torch.rand(FLOW_BATCH, generator=generator)
        t_image = t[:, None, None, None]
        velocity = model((1 - t_image) * z0 + t_image * noise, t, condition)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the two safetensors files and SHA256SUMS")
    parser.add_argument("--vae", type=Path, help="train the denoiser on this VAE instead of a new one")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--flow-steps", type=int, default=FLOW_STEPS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.vae:
        from safetensors.torch import load_file

        vae = VAE().requires_grad_(False)
        vae.load_state_dict(load_file(arguments.vae))
    else:
        vae = train_vae(arguments.vae_steps)
    vae_path, denoiser_path = arguments.out / "fundus_vae.safetensors", arguments.out / "fundus_denoiser.safetensors"
    save_file(vae.state_dict(), vae_path, metadata={"format": "pt", "made_by": "tune_ssim.tasks.pretrain_fundus"})
    denoiser = train_denoiser(vae, arguments.flow_steps)
    save_file(denoiser.state_dict(), denoiser_path, metadata={"format": "pt", "made_by": "tune_ssim.tasks.pretrain_fundus"})
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in (vae_path, denoiser_path)]
    (arguments.out / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
