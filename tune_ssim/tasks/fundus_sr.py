"""Super-resolution of fundus crops: latent flow matching, fine-tuned through a frozen VAE decoder with pixel and SSIM losses.

    low-resolution input ─┐
    z_t = (1-t) z0 + t ε ─┴─► denoiser ─► velocity ─► z0 prediction ─► frozen decoder ─► x ─► L2 / SSIM
                                              └────► flow-matching loss

t = 0 is clean, t = 1 is noise. Small enough for a CPU, real enough to collapse.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.base.tensor_file import TensorFile
from tune_ssim.losses import DecodedLoss, TimeLaw, euler_sample, noisy_latent, ssim, velocity_target, z0_from_velocity
from tune_ssim.probes import content_id, tensor_hashes, total_norm
from tune_ssim.probes.collapse import high_frequency_energy
from tune_ssim.tasks.bundled import WEIGHTS, BundledTraining, load_weights, numbers_of, sha256_of
from tune_ssim.tasks.diffusers_vae import WEIGHTS_FILE as DIFFUSERS_FILE
from tune_ssim.tasks.diffusers_vae import DiffusersVAE, load_diffusers_vae
from tune_ssim.tasks.fundus_images import CROP, FACTOR, IMAGES, FundusImages, load_fundus_images, low_resolution
from tune_ssim.tasks.fundus_networks import VAE, Denoiser
from tune_ssim.tasks.image_folder import FolderImages, load_folder_images
from tune_ssim.tasks.task_config import NOT_NEGATIVE, POSITIVE, read_config
from tune_ssim.trials.training import Forward, Number, Part, Sample

VAE_FILE, DENOISER_FILE, EMA_FILE = "fundus_vae.safetensors", "fundus_denoiser.safetensors", "fundus_denoiser_ema.safetensors"
PRESETS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.005, "max_grad_norm": None},  # collapses for real within 200 CPU steps
    "adamw_clip": {"optimizer": "adamw", "lr": 2e-4, "max_grad_norm": 1.0},  # closest to note 001 §4.3 (clip 1.0)
    "adamw_hot": {"optimizer": "adamw", "lr": 5e-3, "max_grad_norm": None},  # ruins while the norm looks harmless
}
MADE_FOR = "tune_ssim_vae"  # metadata of a denoiser's file: content id of the VAE whose latents it was trained on
STATISTICS_CROPS = 64  # training crops used to measure the latents' mean and deviation
EULER_STEPS = 12  # fixed: two steps instead of twelve raise SSIM by 0.010
SMOKE_CROPS, EVALUATION_CROPS = 32, 128
FLOW_BINS = 5  # t-bins of the held-out flow loss
IMAGE_STREAM, NOISE_STREAM, LOW_RES_STREAM = 0, 1, 2  # independent random streams of one step


@dataclass(frozen=True)
class FundusConfig:
    """The `task_config` of a study."""

    preset: str = "sgd"  # default of optimizer, lr and max_grad_norm
    optimizer: str | None = None  # sgd | adamw
    lr: float | None = None  # 0 switches the update off
    max_grad_norm: float | None = None  # gradient clipping; null: none; left out: the preset's
    steps: int = 200  # optimiser steps of a trial; read by the trial, not here
    batch_size: int = 8
    image: str | None = None  # see fundus_images.IMAGES; retina if there is no `data`
    data: str | None = None  # a folder of your own images instead; see image_folder
    data_side: int | None = None  # larger images are reduced to this shorter side, in pixels; None: unchanged
    data_errors: str = "skip"  # skip | refuse: images that cannot be read or are smaller than a crop
    crop: int = CROP  # pixels, a multiple of 8
    width: int = 48  # channels of the denoiser; the bundled weights have 48
    t_law: str = "uniform"  # uniform | shifted_sigmoid_normal (BAGEL)
    timestep_shift: float = 1.0  # parameter of the second law
    precision: str = "float32"  # float32 | bf16 | fp16: autocast of the denoiser; the SSIM is float32 always
    ssim_loss_weight: float | Mapping[str, Any] = 0.0  # or a schedule, see losses.schedules
    ssim_loss_max_t: float = 0.3
    ssim_grad_scale: float = 1.0
    ssim_grad_clamp: float | None = None
    ssim_warmup_steps: float = 0.0
    target: str = "raw"  # raw | roundtrip: what both image losses compare with, see DecodedLoss
    pixel_loss_weight: float = 0.0
    pixel_loss_max_t: float = 0.3
    decode_chunk: int = 8  # latents decoded at once
    measure_main_norm: bool = False  # one more backward pass per step, for the norm of the flow loss alone
    pretrained: bool = True  # False: start from random weights
    vae: str | None = None  # folder of a diffusers AutoencoderKL or AutoencoderTiny in place of the bundled VAE
    weights: str | None = None  # folder with files as in the bundled one; fundus_denoiser_ema.safetensors is optional
    finetune_from_ema: bool = False  # start from that third file
    ema_decay: float | None = None  # average the denoiser's weights while training; None: no average

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> FundusConfig:
        preset = config.get("preset", "sgd")
        if preset not in PRESETS:
            raise UserError(f"fundus_sr: preset {preset!r}; valid: {', '.join(PRESETS)}")
        image = {} if config.get("data") else {"image": "retina"}
        made = read_config(
            cls,
            "fundus_sr",
            {**PRESETS[preset], **image, **config},
            choices={
                "optimizer": ("sgd", "adamw"),
                "precision": ("float32", "bf16", "fp16"),
                "t_law": ("uniform", "shifted_sigmoid_normal"),
                "data_errors": ("skip", "refuse"),
                "target": ("raw", "roundtrip"),
                **({"image": IMAGES} if image else {}),
            },
            counts={"steps": 1, "batch_size": 1, "decode_chunk": 1, "data_side": 1},
            multiples={"crop": 8, "width": 8},
            numbers={"lr": NOT_NEGATIVE, **dict.fromkeys(("timestep_shift", "max_grad_norm", "ema_decay"), POSITIVE)},
            optional=("max_grad_norm", "ema_decay", "data_side"),
        )
        if made.data is not None and made.image is not None:
            raise UserError(f"fundus_sr: image {made.image!r} and data {made.data!r}; give one of them")
        for name, value in {"data": made.data, "vae": made.vae, "weights": made.weights}.items():
            if value is not None and (not isinstance(value, str) or not value or "\0" in value):
                raise UserError(f"fundus_sr: {name} must be a folder, got {value!r}")
        if made.ema_decay is not None and made.ema_decay >= 1:
            raise UserError(f"fundus_sr: ema_decay must be below 1, got {made.ema_decay!r}")
        return made


class FundusSR(BundledTraining):
    """Super-resolution fine-tuning; see the module."""

    config: FundusConfig
    stateful = ("model", "ema", "optimizer", "scaler")

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.begin(FundusConfig.from_mapping(config), seed, device)
        self.images = self._load_images()
        self.of_crops: dict[str, list[float]] = {}  # of the last evaluation
        self.fixed: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}  # inputs of inference, by (count, noise)
        torch.manual_seed(seed)  # only for random initial weights
        self.vae, self.model, self.ema = self._load_networks()
        try:
            self.time_law: TimeLaw = TimeLaw(self.config.t_law, self.config.timestep_shift)  # type: ignore[arg-type]
            self.loss = DecodedLoss(
                ssim_loss_weight=self.config.ssim_loss_weight,
                ssim_loss_max_t=self.config.ssim_loss_max_t,
                ssim_grad_scale=self.config.ssim_grad_scale,
                ssim_grad_clamp=self.config.ssim_grad_clamp,
                ssim_warmup_steps=self.config.ssim_warmup_steps,
                pixel_loss_weight=self.config.pixel_loss_weight,
                pixel_loss_max_t=self.config.pixel_loss_max_t,
                chunk_size=self.config.decode_chunk,
                target=self.config.target,  # type: ignore[arg-type]
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"fundus_sr: {error}") from None
        optimizers: dict[str | None, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        self.optimizer = optimizers[self.config.optimizer](self.model.parameters(), lr=self.config.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "fp16")

    def step(self) -> dict[str, Number]:
        self.step_count += 1
        self.model.train()
        forward = self.forward(self.step_count)
        auxiliary = forward.auxiliary()
        loss = forward.main + auxiliary.total

        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, Number] = {}
        if self.config.measure_main_norm:
            self.scaler.scale(forward.main).backward(retain_graph=True)
            metrics["total_norm_main"] = total_norm(self.model.parameters()) / self.scaler.get_scale()
            self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled():
            metrics["step_skipped"] = (~torch.isfinite(norm)).float()
        if self.ema is not None and self.config.ema_decay is not None:
            for average, parameter in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                average.lerp_(parameter.detach(), 1 - self.config.ema_decay)

        metrics |= {"loss": loss.detach(), "loss_flow": forward.main.detach(), "total_norm": norm}
        return {**metrics, **auxiliary.metrics()}

    def forward(self, n: int) -> Forward:
        """The inputs of the losses of step `n`."""
        x0, low, z0, noise, t_host = self._batch(n)
        t = t_host.to(self.device)
        z_t, target = noisy_latent(z0, noise, t), velocity_target(z0, noise)
        with self._autocast():
            velocity = self.model(z_t, t, low)
        velocity = velocity.float()
        z0_predicted = z0_from_velocity(z_t, velocity, t)
        main = functional.mse_loss(velocity, target)
        return Forward(
            main,
            z0_predicted,
            t_host,
            x0,
            self.loss,
            self.vae.decode,
            target,
            step=n,
            parameters=self.trainable_parameters(),
            clean=z0,
        )

    def sample(self, noise: int = 0) -> Sample:
        return self._sample(self.model, noise)

    def sample_ema(self, noise: int = 0) -> Sample | None:
        return None if self.ema is None else self._sample(self.ema, noise)

    def _sample(self, model: Denoiser, noise: int) -> Sample:
        target, low, z0, initial = self._fixed(SMOKE_CROPS, noise)
        t = torch.full((len(z0),), 1 - 0.5 / FLOW_BINS, device=self.device)  # middle of the noisiest bin
        with self._inference():
            flow = self._flow_loss(model, z0, initial, t, low)
            images = self._generate(model, initial, low)
            reconstructions = (self.vae.decode(z0) * 0.5 + 0.5).clamp(0, 1)
        return Sample(images, target, (low + 1) / 2, reconstructions, {"flow_loss_top_bin": flow.item()})

    def evaluate(self) -> dict[str, float]:
        """`ssim`, `psnr` (dB), `high_frequency` (energy over the photographs': below 1 is smooth, above it noise), `flow_loss`, and
        that loss in bins of t."""
        target, low, z0, initial = self._fixed(EVALUATION_CROPS, 0)
        with self._inference():
            images = self._generate(self.model, initial, low)
            error = (images - target).square().mean(dim=(1, 2, 3))
            of_crops = {"ssim": ssim(images, target), "psnr": -10 * torch.log10(error.clamp(min=1e-10))}
            metrics = {name: values.mean() for name, values in of_crops.items()}
            self.of_crops = {name: values.tolist() for name, values in of_crops.items()}
            metrics["high_frequency"] = high_frequency_energy(images) / high_frequency_energy(target)
            bins = {}
            for i in range(FLOW_BINS):
                t = torch.full((len(z0),), (i + 0.5) / FLOW_BINS, device=self.device)
                bins[f"flow_loss_bins/{i}"] = self._flow_loss(self.model, z0, initial, t, low)
            metrics["flow_loss"] = torch.stack(list(bins.values())).mean()
        return numbers_of(metrics | bins)

    def per_image(self) -> dict[str, list[float]]:
        """SSIM and PSNR of each held-out image, the means of its crops."""
        sources = self.images.held_out_sources(EVALUATION_CROPS)
        return {
            name: [fmean(values[k] for k, source in enumerate(sources) if source == image) for image in sorted(set(sources))]
            for name, values in self.of_crops.items()
        }

    def effective(self) -> dict[str, Any]:
        return {**super().effective(), **self.loss.effective()}

    # -- for preflight and calibration

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    def parts(self) -> dict[str, Part]:
        folder = self._weights_folder()
        pretrained = folder if self.config.pretrained else None
        start = EMA_FILE if self.config.finetune_from_ema else DENOISER_FILE
        if isinstance(self.vae, DiffusersVAE):
            vae = Part(self.vae.inner, trains=False, weights=Path(str(self.config.vae)) / DIFFUSERS_FILE)
        else:
            vae = Part(self.vae, trains=False, weights=folder / VAE_FILE)
        parts = {"vae": vae, "denoiser": Part(self.model, trains=True, weights=pretrained and pretrained / start)}
        if self.ema is not None:
            file = pretrained and pretrained / EMA_FILE
            parts["denoiser_ema"] = Part(self.ema, trains=False, weights=file if file and file.exists() else None, kind="ema")
        return parts

    def training_images(self, n: int) -> torch.Tensor:
        """`[batch, 3, crop, crop]` in [0, 1]."""
        return self.images.train_crops(self.config.batch_size, self._generator(n, IMAGE_STREAM))

    def left_out(self) -> dict[str, str]:
        """Data files that are not used, each with the reason."""
        return dict(self.images.left_out) if isinstance(self.images, FolderImages) else {}

    def latent_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of the training images' latents."""
        return measured_latents(self.vae, self.images, self.device)

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the two parts of the data, and of the inputs of inference."""
        start = [tensor for noise in (0, 1) for tensor in self._fixed_inputs(EVALUATION_CROPS, noise)]
        return {**self.images.fingerprints(), "data/evaluation": sha256_of(start)}

    # -- the parts of a step

    def _batch(self, n: int) -> tuple[torch.Tensor, ...]:
        """Batch n, from (seed, n) only: crops in [0, 1], low-resolution inputs in [-1, 1], clean latents, noise, and t
        on the host, where the gate decides."""
        size = self.config.batch_size
        crops, side = self.training_images(n), self.config.crop // FACTOR
        latent_side = self.config.crop // self.vae.factor
        blur_noise = torch.randn(size, 3, side, side, generator=self._generator(n, LOW_RES_STREAM))
        generator = self._generator(n, NOISE_STREAM)
        t = self.time_law.sample(size, generator)
        noise = torch.randn(size, self.vae.latent_channels, latent_side, latent_side, generator=generator)
        crops, blur_noise, noise = (x.to(self.device) for x in (crops, blur_noise, noise))
        with torch.no_grad():
            z0 = self.vae.encode(2 * crops - 1)
        return crops, 2 * low_resolution(crops, blur_noise) - 1, z0, noise, t

    def _generate(self, model: Denoiser, noise: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Samples in [0, 1]; clipped, but a non-finite pixel stays non-finite."""

        def velocity(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with self._autocast():
                return model(z, t, low).float()  # type: ignore[no-any-return]

        return (self.vae.decode(euler_sample(velocity, noise, EULER_STEPS)) * 0.5 + 0.5).clamp(0, 1)

    def _flow_loss(
        self, model: Denoiser, z0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, low: torch.Tensor
    ) -> torch.Tensor:
        with self._autocast():
            velocity = model(noisy_latent(z0, noise, t), t, low)
        return functional.mse_loss(velocity.float(), velocity_target(z0, noise))

    def _fixed(self, count: int, noise: int) -> tuple[torch.Tensor, ...]:
        """Held-out crops, inputs, latents and initial noise: the same in every trial, whatever its seed."""
        if (count, noise) not in self.fixed:
            crops, low, initial = (x.to(self.device) for x in self._fixed_inputs(count, noise))
            with torch.no_grad():
                self.fixed[count, noise] = crops, 2 * low - 1, self.vae.encode(2 * crops - 1), initial
        return self.fixed[count, noise]

    def _fixed_inputs(self, count: int, noise: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Held-out crops in [0, 1], their degraded inputs in [0, 1] and initial latents, on the CPU."""
        crops, side = self.images.held_out_crops(count), self.config.crop // FACTOR
        generator = torch.Generator().manual_seed(20_251_122)  # the same degradation for every `noise`
        low = low_resolution(crops, torch.randn(count, 3, side, side, generator=generator))
        generator.manual_seed(1 + noise)
        latent_side = self.config.crop // self.vae.factor
        return crops, low, torch.randn(count, self.vae.latent_channels, latent_side, latent_side, generator=generator)

    @contextlib.contextmanager
    def _inference(self) -> Any:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def _autocast(self) -> torch.autocast:
        dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32)

    def _weights_folder(self) -> Path:
        return Path(self.config.weights) if self.config.weights else WEIGHTS

    def _load_images(self) -> FundusImages | FolderImages:
        config = self.config
        if config.data is None:
            return load_fundus_images(str(config.image), config.crop)
        return load_folder_images(config.data, config.crop, config.data_side, config.data_errors)

    def _load_networks(self) -> tuple[VAE | DiffusersVAE, Denoiser, Denoiser | None]:
        folder, config = self._weights_folder(), self.config
        if config.vae is None and not (folder / VAE_FILE).exists() and (folder / DENOISER_FILE).exists():
            raise UserError(f"fundus_sr: {folder} holds a denoiser and no {VAE_FILE}; say vae: which one it was trained with")
        vae = load_vae(config.vae or folder / VAE_FILE)
        if config.crop % (2 * vae.factor):
            raise UserError(f"fundus_sr: crop must be a multiple of {2 * vae.factor} with this VAE, got {config.crop}")
        if config.pretrained and config.vae and not config.weights:
            raise UserError(f"fundus_sr: the bundled denoiser knows the bundled VAE's latents only; {_pretrain(config)}")
        vae, model = vae.to(self.device), denoiser_for(vae, config.width)
        if config.pretrained:
            self._load_denoiser(model, vae, folder / (EMA_FILE if config.finetune_from_ema else DENOISER_FILE))
        ema = None
        if config.pretrained and (folder / EMA_FILE).exists():
            ema = denoiser_for(vae, config.width)
            self._load_denoiser(ema, vae, folder / EMA_FILE)
        elif config.ema_decay is not None:
            ema = copy.deepcopy(model)
        if ema is not None:
            ema = ema.to(self.device).requires_grad_(False).eval()
        return vae.requires_grad_(False).eval(), model.to(self.device), ema

    def _load_denoiser(self, model: Denoiser, vae: VAE | DiffusersVAE, path: Path) -> None:
        if path.exists():
            made_for = TensorFile.open(path).metadata.get(MADE_FOR)
            if made_for is not None and made_for != vae_id(vae):
                raise BadSetup(f"{path}: was trained on the latents of another VAE; {_pretrain(self.config)}")
        load_weights(model, path)


def _pretrain(config: FundusConfig) -> str:
    """How to get a denoiser that fits."""
    options = {"data": config.data, "data-side": config.data_side, "vae": config.vae}
    flags = "".join(f" --{name} {value}" for name, value in options.items() if value is not None)
    return (
        f"pretrain one with `python -m tune_ssim.tasks.pretrain_fundus{flags} --crop {config.crop} --width {config.width}"
        f" --out FOLDER` and say weights: FOLDER"
    )


def load_vae(path: str | Path) -> VAE | DiffusersVAE:
    """Loads a VAE from a folder in diffusers' layout, or a file like that of the bundled VAE."""
    if Path(path).suffix != ".safetensors":
        return load_diffusers_vae(path)
    vae = VAE()
    load_weights(vae, Path(path))
    return vae


def denoiser_for(vae: VAE | DiffusersVAE, width: int) -> Denoiser:
    """A denoiser with fresh weights for this VAE's latents."""
    return Denoiser(width, latent_channels=vae.latent_channels, shrink=max(1, vae.factor // FACTOR))


def vae_id(vae: VAE | DiffusersVAE) -> str:
    """Content id of its tensors, including those that standardise the latents."""
    return content_id(tensor_hashes(vae.state_dict()))


def measured_latents(
    vae: VAE | DiffusersVAE, images: FundusImages | FolderImages, device: torch.device
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the training images' latents, as the denoiser gets them."""
    crops = images.train_crops(STATISTICS_CROPS, torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = torch.cat([vae.encode(2 * chunk.to(device) - 1).cpu() for chunk in crops.split(8)])
    return latents.mean(dim=(0, 2, 3)).tolist(), latents.std(dim=(0, 2, 3)).tolist()
