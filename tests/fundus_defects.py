"""Broken set-ups of the bundled task, one fault each, and sound variations of it. Preflight must tell them apart.

A fault sits where it would in a user's code: in a file, the loader, the batch, the forward pass, the loss, the step, inference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tune_ssim.before_launch.preflight.plain import plain_ssim
from tune_ssim.losses import decoded, noisy_latent, velocity_target, z0_from_velocity
from tune_ssim.probes import total_norm
from tune_ssim.tasks.fundus_images import FundusImages, _origins
from tune_ssim.tasks.fundus_networks import VAE, Denoiser
from tune_ssim.tasks.fundus_sr import DENOISER_FILE, EMA_FILE, PRESETS, VAE_FILE, WEIGHTS, FundusSR
from tune_ssim.trials.training import Forward, Sample

BASELINE = {"ssim_loss_weight": 0.0, "pixel_loss_weight": 0.05, "pixel_loss_max_t": 0.3, "measure_main_norm": True}
GATES = [{"ssim_loss_max_t": max_t} for max_t in (0.1, 0.2, 0.3, 1.0)]


@dataclass
class Case:
    """What preflight is given. blamed: checks of which one must say bad_setup (beginnings of names)."""

    task: type = FundusSR
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: list[dict[str, Any]] = field(default_factory=lambda: list(GATES))
    baseline: Mapping[str, Any] = field(default_factory=lambda: dict(BASELINE))
    steps: int = 200
    blamed: tuple[str, ...] = ()
    smoke_test: bool = True  # False: the study has switched it off, as one that starts from random weights does


Make = Callable[[Path], "contextlib.AbstractContextManager[Case] | Case"]
DEFECTS: dict[str, tuple[bool, Make]] = {}  # name → (listed in the issue, how it is made in a folder)
HEALTHY: dict[str, Case] = {}


def defect(name: str, *, listed: bool = False) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        assert name not in DEFECTS
        DEFECTS[name] = (listed, make)
        return make

    return keep


@contextlib.contextmanager
def case(name: str, folder: Path) -> Iterator[Case]:
    """The defect `name`, in force inside the block."""
    made = DEFECTS[name][1](folder)
    if isinstance(made, Case):
        yield made
    else:
        with made as found:
            yield found


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def variant(**methods: Any) -> type:
    return type("Variant", (FundusSR,), methods)


def fresh(width: int = 48, seed: int = 11) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(width)


def bundled(name: str) -> dict[str, Tensor]:
    return load_file(WEIGHTS / name)


def folder_with(folder: Path, **files: Mapping[str, Tensor]) -> dict[str, str]:
    """A weights folder: the bundled files, but for those given as `vae`, `denoiser`, `ema`."""
    contents = {"vae": bundled(VAE_FILE), "denoiser": bundled(DENOISER_FILE), **files}
    folder.mkdir(parents=True, exist_ok=True)
    for key, name in (("vae", VAE_FILE), ("denoiser", DENOISER_FILE), ("ema", EMA_FILE)):
        if key in contents:
            save_file(dict(contents[key]), folder / name, metadata={"format": "pt"})
    return {"weights": str(folder)}


def after_loading(change: Callable[[FundusSR], None]) -> type:
    """The task with its networks changed in memory, after they were loaded."""

    def setup(self: FundusSR, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        FundusSR.setup(self, config, seed, device)
        with torch.no_grad():
            change(self)

    return variant(setup=setup)


def tolerant_loader(tensors: Mapping[str, Tensor]) -> type:
    """A loader that takes what fits of `tensors` and says nothing about the rest."""

    def load_networks(self: FundusSR) -> tuple[VAE, Denoiser, Denoiser | None]:
        vae, model = VAE(), fresh(self.config.width, self.seed)
        vae.load_state_dict(bundled(VAE_FILE))
        mine = model.state_dict()
        fitting = {k: v for k, v in tensors.items() if k in mine and mine[k].shape == v.shape}
        model.load_state_dict(fitting, strict=False)
        return vae.requires_grad_(False).eval(), model, None

    return variant(_load_networks=load_networks)


# -- weights


@defect("random weights, never loaded", listed=True)
def _(folder: Path) -> Case:
    return Case(tolerant_loader({}), blamed=("weights/denoiser",))


@defect("random weights, said to be on purpose", listed=True)
def _(folder: Path) -> Case:
    return Case(config={"pretrained": False}, blamed=("smoke/raw", "loss/main"))


@defect("random weights in the file", listed=True)
def _(folder: Path) -> Case:
    return Case(config=folder_with(folder, denoiser=fresh().state_dict()), blamed=("weights/denoiser", "smoke/raw", "loss/main"))


@defect("weights of another architecture", listed=True)
def _(folder: Path) -> Case:
    return Case(config=folder_with(folder, denoiser=fresh(32).state_dict()), blamed=("setup",))


@defect("weights of another architecture, tolerant loader", listed=True)
def _(folder: Path) -> Case:
    other = fresh(32).state_dict()
    return Case(tolerant_loader(other), folder_with(folder, denoiser=other), blamed=("weights/denoiser",))


@defect("weights whose names changed, tolerant loader", listed=True)
def _(folder: Path) -> Case:
    other = {name.replace("middle", "centre"): value for name, value in bundled(DENOISER_FILE).items()}
    return Case(tolerant_loader(other), folder_with(folder, denoiser=other), blamed=("weights/denoiser",))


@defect("half the tensors missing", listed=True)
def _(folder: Path) -> Case:
    half = dict(list(bundled(DENOISER_FILE).items())[::2])
    return Case(config=folder_with(folder, denoiser=half), blamed=("setup",))


@defect("half the tensors missing, tolerant loader", listed=True)
def _(folder: Path) -> Case:
    half = dict(list(bundled(DENOISER_FILE).items())[::2])
    return Case(tolerant_loader(half), folder_with(folder, denoiser=half), blamed=("weights/denoiser",))


@defect("truncated file")
def _(folder: Path) -> Case:
    config = folder_with(folder)
    (folder / DENOISER_FILE).write_bytes((WEIGHTS / DENOISER_FILE).read_bytes()[:100_000])
    return Case(config=config, blamed=("setup",))


@defect("the EMA is random, the raw weights are fine", listed=True)
def _(folder: Path) -> Case:
    return Case(config=folder_with(folder, ema=fresh().state_dict()), blamed=("smoke/ema", "weights/denoiser_ema"))


@defect("the EMA is noise on the raw weights", listed=True)
def _(folder: Path) -> Case:
    generator = torch.Generator().manual_seed(3)
    noisy = {
        k: v + 0.5 * v.std().nan_to_num() * torch.randn(v.shape, generator=generator) for k, v in bundled(DENOISER_FILE).items()
    }
    return Case(config=folder_with(folder, ema=noisy), blamed=("smoke/ema", "weights/denoiser_ema"))


@defect("the EMA is all zeros", listed=True)
def _(folder: Path) -> Case:
    zeros = {name: torch.zeros_like(value) for name, value in bundled(DENOISER_FILE).items()}
    return Case(config=folder_with(folder, ema=zeros), blamed=("smoke/ema", "weights/denoiser_ema"))


@defect("the raw weights are random, the EMA is fine", listed=True)
def _(folder: Path) -> Case:
    return Case(
        config=folder_with(folder, denoiser=fresh().state_dict(), ema=bundled(DENOISER_FILE)),
        blamed=("weights/denoiser", "smoke/raw"),
    )


@defect("the raw weights hold NaN")
def _(folder: Path) -> Case:
    broken = bundled(DENOISER_FILE)
    broken["conv_out.bias"] = broken["conv_out.bias"].clone().fill_(float("nan"))
    return Case(config=folder_with(folder, denoiser=broken), blamed=("smoke/raw", "loss/main", "setup/inference"))


@defect("the EMA was loaded for the raw weights")
def _(folder: Path) -> Case:
    shifted = {name: value * 1.01 for name, value in bundled(DENOISER_FILE).items()}

    def change(task: FundusSR) -> None:
        assert task.ema is not None
        task.model.load_state_dict(task.ema.state_dict())

    return Case(after_loading(change), folder_with(folder, ema=shifted), blamed=("weights/denoiser",))


@defect("the EMA is of another model that samples as well")
def _(folder: Path) -> Case:
    return Case(config=folder_with(folder, ema=shuffled_channels(bundled(DENOISER_FILE))), blamed=("weights/denoiser_ema~",))


def shuffled_channels(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function from other weights: hidden channels change places within the groups of their normalisation."""
    generator, found = torch.Generator().manual_seed(9), dict(tensors)
    for block in ("down", "middle_in", "middle_out", "up"):
        width = len(tensors[f"{block}.norm_out.weight"])
        group = width // 8
        order = torch.cat([start + torch.randperm(group, generator=generator) for start in range(0, width, group)])
        for name in ("conv_in.weight", "conv_in.bias", "norm_out.weight", "norm_out.bias"):
            found[f"{block}.{name}"] = tensors[f"{block}.{name}"][order]
        for name in ("film.weight", "film.bias"):
            found[f"{block}.{name}"] = tensors[f"{block}.{name}"][torch.cat([order, width + order])]
        found[f"{block}.conv_out.weight"] = tensors[f"{block}.conv_out.weight"][:, order].contiguous()
    return found


@defect("one layer is random in memory")
def _(folder: Path) -> Case:
    return Case(after_loading(lambda task: task.model.middle_in.conv_in.reset_parameters()), blamed=("weights/denoiser",))


@defect("one layer is random in the file")
def _(folder: Path) -> Case:
    model = fresh()
    random = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("up.conv_in")}
    return Case(config=folder_with(folder, denoiser={**bundled(DENOISER_FILE), **random}), blamed=("weights/denoiser",))


@defect("the autoencoder is random")
def _(folder: Path) -> Case:
    return Case(after_loading(lambda task: task.vae.load_state_dict(VAE().state_dict())), blamed=("weights/vae",))


@defect("the autoencoder's file is random")
def _(folder: Path) -> Case:
    torch.manual_seed(5)
    random = {**VAE().state_dict(), **{k: v for k, v in bundled(VAE_FILE).items() if k.startswith("latent")}}
    return Case(config=folder_with(folder, vae=random), blamed=("weights/vae", "data/autoencoder", "loss/main"))


@defect("the latents' standard deviation is 1 in memory")
def _(folder: Path) -> Case:
    return Case(after_loading(lambda task: task.vae.latent_std.fill_(1.0)), blamed=("weights/vae",))


@defect("latents are twice as large in training")
def _(folder: Path) -> Case:
    def batch(self: FundusSR, n: int) -> tuple[Tensor, ...]:
        crops, low, z0, noise, t = FundusSR._batch(self, n)
        return crops, low, 2 * z0, noise, t

    return Case(variant(_batch=batch), blamed=("data/", "loss/main"))


# -- parameters that are lost on their way


def losing(name: str, *, echo: bool) -> type:
    """`name` keeps its default; with `echo`, effective() repeats what was asked for."""

    def setup(self: FundusSR, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.asked = dict(config)
        FundusSR.setup(self, {key: value for key, value in config.items() if key != name}, seed, device)

    def effective(self: FundusSR) -> dict[str, Any]:
        return FundusSR.effective(self) | ({name: self.asked[name]} if name in self.asked else {})

    return variant(setup=setup, **({"effective": effective} if echo else {}))


for _name in (
    "ssim_loss_weight",
    "ssim_loss_max_t",
    "ssim_grad_scale",
    "pixel_loss_weight",
    "pixel_loss_max_t",
    "ssim_grad_clamp",
    "lr",
):
    for _echo in (False, True):

        @defect(f"{_name} is dropped{', and echoed' if _echo else ''}", listed=True)
        def _(folder: Path, name: str = _name, echo: bool = _echo) -> Case:
            return Case(losing(name, echo=echo), {"lr": 0.01, "ssim_grad_clamp": 0.01}, blamed=(f"parameter/{name}",))


@defect("batch_size is dropped, and echoed")
def _(folder: Path) -> Case:
    return Case(losing("batch_size", echo=True), {"batch_size": 4}, blamed=("parameter/batch_size",))


@defect("max_grad_norm is dropped, and echoed")
def _(folder: Path) -> Case:
    return Case(losing("max_grad_norm", echo=True), {"max_grad_norm": 0.5}, blamed=("parameter/max_grad_norm",))


@defect("grad_scale is echoed but not applied", listed=True)
def _(folder: Path) -> Any:
    return _patched("scale_gradient", lambda x, scale: x, ("parameter/ssim_grad_scale",))


@defect("grad_scale is applied twice")
def _(folder: Path) -> Any:
    once = decoded.scale_gradient
    return _patched("scale_gradient", lambda x, scale: once(once(x, scale), scale), ("parameter/ssim_grad_scale",))


@defect("the root of grad_scale is applied")
def _(folder: Path) -> Any:
    once = decoded.scale_gradient
    return _patched("scale_gradient", lambda x, scale: once(x, scale**0.5), ("parameter/ssim_grad_scale",))


@contextlib.contextmanager
def _patched(name: str, value: Any, blamed: tuple[str, ...]) -> Iterator[Case]:
    with replaced(decoded, name, value):
        yield Case(blamed=blamed)


@defect("the gate of max_t is ignored")
def _(folder: Path) -> Any:
    return _replaced_gate(lambda self, max_t: list(range(len(self.t))), ("parameter/ssim_loss_max_t",))


@defect("the gate of max_t is upside down")
def _(folder: Path) -> Any:
    return _replaced_gate(
        lambda self, max_t: (self.t >= max_t).nonzero().flatten().tolist(), ("parameter/ssim_loss_max_t", "gradient/ssim")
    )


@contextlib.contextmanager
def _replaced_gate(samples: Callable[[Any, float], list[int]], blamed: tuple[str, ...]) -> Iterator[Case]:
    with replaced(decoded._Gate, "samples", samples):
        yield Case(blamed=blamed)


# -- steps of one's own, written out with a fault in them


def stepping(ssim: Callable[[Tensor, Tensor], Tensor] | None = None, **faults: Any) -> type:
    """A task whose step() computes the losses itself instead of asking `forward.loss`."""

    def step(self: FundusSR) -> dict[str, Any]:
        self.step_count += 1
        forward = self.forward(self.step_count)
        loss, config = self.loss, self.config
        active = ((forward.t > 0) & (forward.t <= torch.tensor(loss.ssim_loss_max_t))).nonzero().flatten()
        total, numbers = forward.main * faults.get("main", 1.0), {"ssim_active_fraction": len(active) / len(forward.t)}
        z0 = forward.z0.detach() if faults.get("detach") else forward.z0
        if loss.ssim_loss_weight and len(active):
            x = forward.decode(z0[active])
            if loss.ssim_grad_clamp is not None:
                x = decoded.clamp_gradient(x, loss.ssim_grad_clamp)
            x = decoded.scale_gradient(x, loss.ssim_grad_scale)
            x = (x * 0.5 + 0.5).clamp(0, 1)
            similarity = (1 - (ssim or plain_ssim)(x, forward.targets[active])).mean()
            numbers["loss_ssim"] = similarity.detach()
            total = total + faults.get("ssim", 1.0) * loss.ssim_loss_weight * similarity
        below = ((forward.t > 0) & (forward.t <= torch.tensor(loss.pixel_loss_max_t))).nonzero().flatten()
        if loss.pixel_loss_weight and len(below):
            x = (forward.decode(z0[below]) * 0.5 + 0.5).clamp(0, 1)
            total = total + loss.pixel_loss_weight * (x - forward.targets[below]).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = total_norm(self.model.parameters())
        if config.max_grad_norm is not None and not faults.get("no_clip"):
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), config.max_grad_norm, norm)
        if faults.get("norm_after_clip"):
            norm = total_norm(self.model.parameters())
        self.optimizer.step()
        return {"loss": total.detach(), "loss_flow": forward.main.detach(), "total_norm": norm, **numbers}

    return variant(step=step)


@defect("the SSIM loss is cut off from the network")
def _(folder: Path) -> Case:
    return Case(stepping(detach=True), blamed=("gradient/ssim", "parameter/ssim_loss_weight"))


@defect("the SSIM loss is added eight times")
def _(folder: Path) -> Case:
    return Case(
        stepping(ssim=8.0) if False else stepping(None, ssim_factor=8.0) if False else _eightfold(), blamed=("gradient/ssim",)
    )


def _eightfold() -> type:
    return stepping(lambda x, y: 8 * plain_ssim(x, y))


@defect("the main loss is halved behind the log")
def _(folder: Path) -> Case:
    return Case(stepping(main=0.5), blamed=("gradient/main",))


@defect("the gradient is not clipped although max_grad_norm is set")
def _(folder: Path) -> Case:
    return Case(stepping(no_clip=True), {"preset": "adamw_clip"}, blamed=("parameter/max_grad_norm",))


@defect("total_norm is recorded after clipping")
def _(folder: Path) -> Case:
    return Case(stepping(norm_after_clip=True), {"preset": "adamw_clip"}, blamed=("parameter/max_grad_norm", "gradient/"))


# -- SSIM in half precision


def rounded(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: plain_ssim(x.to(dtype), y.to(dtype)).float()


def under_autocast(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return plain_ssim(x, y).float()


for _kind, _ssim in {
    "bfloat16": rounded(torch.bfloat16), "float16": rounded(torch.float16), "autocast": under_autocast,
}.items():  # fmt: skip

    @defect(f"SSIM in {_kind}, inside the loss", listed=True)
    def _(folder: Path, ssim: Any = _ssim) -> Any:
        return _patched("ssim_loss", lambda x, y: (1 - ssim(x, y)).clamp(0, 1), ("ssim/precision",))

    @defect(f"SSIM in {_kind}, inside the step", listed=True)
    def _(folder: Path, ssim: Any = _ssim) -> Case:
        return Case(stepping(ssim), blamed=("gradient/ssim",))


@defect("images rounded to bfloat16 before SSIM")
def _(folder: Path) -> Any:
    return _patched("ssim_loss", lambda x, y: 1 - plain_ssim(x.bfloat16().float(), y.bfloat16().float()), ("ssim/precision",))


# -- what must be frozen, what must learn


@defect("the autoencoder is trained", listed=True)
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        task.vae.requires_grad_(True)
        task.optimizer.add_param_group({"params": list(task.vae.decoder.parameters())})

    return Case(after_loading(change), blamed=("frozen/vae",))


@defect("the autoencoder gets a gradient", listed=True)
def _(folder: Path) -> Case:
    return Case(after_loading(lambda task: task.vae.requires_grad_(True)), blamed=("frozen/vae",))


@defect("the autoencoder decays in the optimiser", listed=True)
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        task.vae.requires_grad_(True)
        task.optimizer = torch.optim.AdamW([*task.model.parameters(), *task.vae.parameters()], lr=task.config.lr)

    return Case(after_loading(change), {"preset": "adamw_clip"}, blamed=("frozen/vae",))


@defect("the decoder's buffer drifts", listed=True)
def _(folder: Path) -> Case:
    def step(self: FundusSR) -> Any:
        self.vae.latent_mean.mul_(1.001)
        return FundusSR.step(self)

    return Case(variant(step=step), blamed=("frozen/vae",))


def with_layer(layer: nn.Module) -> type:
    """The decoder with a further layer, left in train mode."""

    def change(task: FundusSR) -> None:
        task.vae.decoder.extra = layer.train()

    return after_loading(change)


@defect("dropout in the frozen decoder")
def _(folder: Path) -> Case:
    return Case(with_layer(nn.Dropout(0.1)), blamed=("frozen/",))


@defect("BatchNorm in train mode in the frozen decoder")
def _(folder: Path) -> Case:
    return Case(with_layer(nn.BatchNorm2d(3)), blamed=("frozen/",))


@defect("functional dropout in decode()")
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        plain = task.vae.decode
        task.vae.decode = lambda z: nn.functional.dropout(plain(z), 0.1)

    return Case(after_loading(change), blamed=("frozen/decoder",))


@defect("part of the denoiser is frozen")
def _(folder: Path) -> Case:
    return Case(after_loading(lambda task: task.model.middle_in.requires_grad_(False)), blamed=("trained",))


@defect("part of the denoiser is not in the optimiser")
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        task.optimizer = torch.optim.SGD(task.model.up.parameters(), lr=task.config.lr)

    return Case(after_loading(change), blamed=("trained",))


@defect("the optimiser holds another copy of the weights")
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        task.model = Denoiser()
        task.model.load_state_dict(bundled(DENOISER_FILE))

    return Case(after_loading(change), blamed=("trained",))


# -- images


def batches(change: Callable[..., tuple[Tensor, ...]]) -> type:
    return variant(_batch=lambda self, n: change(self, *FundusSR._batch(self, n)))


def imaging(change: Callable[[FundusImages], FundusImages]) -> type:
    def setup(self: FundusSR, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        FundusSR.setup(self, config, seed, device)
        self.images = change(self.images)

    return variant(setup=setup)


@defect("training images in [-1, 1] taken for [0, 1]", listed=True)
def _(folder: Path) -> Case:
    return Case(
        imaging(lambda images: replace(images, train=2 * images.train - 1)), blamed=("data/training_images", "data/targets")
    )


@defect("the encoder gets [0, 1] for [-1, 1]", listed=True)
def _(folder: Path) -> Case:
    def batch(self: FundusSR, crops: Tensor, low: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return crops, low, self.vae.encode(crops), noise, t

    return Case(batches(batch), blamed=("data/predictions", "loss/main"))


@defect("the loss takes [-1, 1] for [0, 1]", listed=True)
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        task.loss = replace(task.loss, image_range="[0,1]")

    return Case(after_loading(change), blamed=("data/predictions",))


@defect("targets in [-1, 1]", listed=True)
def _(folder: Path) -> Case:
    def forward(self: FundusSR, n: int) -> Forward:
        found = FundusSR.forward(self, n)
        return replace(found, targets=2 * found.targets - 1)

    return Case(variant(forward=forward), blamed=("data/targets",))


@defect("held-out images in [-1, 1]", listed=True)
def _(folder: Path) -> Case:
    def sample(self: FundusSR, noise: int = 0) -> Sample:
        found = FundusSR.sample(self, noise)
        return replace(found, references=2 * found.references - 1)

    return Case(variant(sample=sample), blamed=("data/references",))


@defect("inference decodes to [0, 1] twice", listed=True)
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        plain = task.vae.decode
        task.vae.decode = lambda z: plain(z) * 0.5 + 0.5

    return Case(after_loading(change), blamed=("data/reconstructions", "data/predictions"))


@defect("training images in [0, 255]")
def _(folder: Path) -> Case:
    return Case(imaging(lambda images: replace(images, train=255 * images.train)), blamed=("data/training_images", "data/targets"))


@defect("all images in [0, 255]")
def _(folder: Path) -> Case:
    return Case(
        imaging(lambda images: replace(images, train=255 * images.train, held_out=255 * images.held_out)), blamed=("data/",)
    )


@defect("NaN in one training image")
def _(folder: Path) -> Case:
    def training_images(self: FundusSR, n: int) -> Tensor:
        images = FundusSR.training_images(self, n)
        if n == 37:
            images[3, 1, 5, 5] = float("nan")
        return images

    return Case(variant(training_images=training_images), blamed=("data/training_images",))


@defect("NaN in a pixel of the photograph")
def _(folder: Path) -> Case:
    def spoil(images: FundusImages) -> FundusImages:
        train = images.train.clone()
        train[0, 200, 300] = float("nan")
        return replace(images, train=train)

    return Case(imaging(spoil), blamed=("data/training_images",))


@defect("most training images are one flat colour")
def _(folder: Path) -> Case:
    def training_images(self: FundusSR, n: int) -> Tensor:
        images = FundusSR.training_images(self, n)
        images[2:] = images[2:].mean(dim=(2, 3), keepdim=True)
        return images

    return Case(variant(training_images=training_images), blamed=("data/constant",))


@defect("targets are shuffled within the batch")
def _(folder: Path) -> Case:
    return Case(batches(lambda self, crops, low, z0, noise, t: (crops.roll(1, 0), low, z0, noise, t)), blamed=("data/",))


@defect("latents are shuffled within the batch")
def _(folder: Path) -> Case:
    return Case(
        batches(lambda self, crops, low, z0, noise, t: (crops, low, z0.roll(1, 0), noise, t)), blamed=("data/", "loss/main")
    )


@defect("low-resolution inputs are exchanged in training")
def _(folder: Path) -> Case:
    return Case(
        batches(lambda self, crops, low, z0, noise, t: (crops, low.roll(1, 0), z0, noise, t)), blamed=("loss/main", "data/")
    )


@defect("low-resolution inputs are exchanged in inference")
def _(folder: Path) -> Case:
    def fixed_inputs(self: FundusSR, count: int, noise: int) -> tuple[Tensor, Tensor, Tensor]:
        crops, low, initial = FundusSR._fixed_inputs(self, count, noise)
        return crops, low.roll(1, 0), initial

    return Case(variant(_fixed_inputs=fixed_inputs), blamed=("data/inputs",))


@defect("latents are half as large in training")
def _(folder: Path) -> Case:
    return Case(batches(lambda self, crops, low, z0, noise, t: (crops, low, 0.5 * z0, noise, t)), blamed=("data/", "loss/main"))


@defect("only the targets are mirrored")
def _(folder: Path) -> Case:
    return Case(batches(lambda self, crops, low, z0, noise, t: (crops.flip(-1), low, z0, noise, t)), blamed=("data/",))


@defect("targets have their channels reversed")
def _(folder: Path) -> Case:
    return Case(batches(lambda self, crops, low, z0, noise, t: (crops.flip(1), low, z0, noise, t)), blamed=("data/",))


@defect("time runs the other way")
def _(folder: Path) -> Case:
    def forward(self: FundusSR, n: int) -> Forward:
        x0, low, z0, noise, t_host = self._batch(n)
        t = t_host.to(self.device)
        z_t, target = noisy_latent(z0, noise, 1 - t), velocity_target(z0, noise)
        velocity = self.model(z_t, t, low).float()
        predicted = z0_from_velocity(z_t, velocity, t)
        return Forward(nn.functional.mse_loss(velocity, target), predicted, t_host, x0, self.loss, self.vae.decode, target)

    return Case(variant(forward=forward), blamed=("loss/main", "data/"))


def overlapping(rows: int | None, *, mirrored: bool = False) -> type:
    """The training part reaches `rows` rows into the held-out part; None: all of it."""

    def reach(images: FundusImages) -> FundusImages:
        taken = images.held_out if rows is None else images.held_out[:, :rows]
        train = torch.cat([images.train, taken.flip(-1) if mirrored else taken], dim=1)
        return replace(images, train=train, train_origins=_origins(train, images.crop))

    return imaging(reach)


for _rows in (None, 96, 64, 48, 24):

    @defect(f"training reaches {'over all' if _rows is None else f'{_rows} rows into'} the held-out part", listed=True)
    def _(folder: Path, rows: int | None = _rows) -> Case:
        return Case(overlapping(rows), blamed=("data/overlap",))


@defect("training sees the held-out part mirrored", listed=True)
def _(folder: Path) -> Case:
    return Case(overlapping(None, mirrored=True), blamed=("data/overlap",))


@defect("the held-out images are training images", listed=True)
def _(folder: Path) -> Case:
    return Case(variant(_fixed_inputs=lambda self, count, noise: _from_training(self, count, noise)), blamed=("data/overlap",))


def _from_training(task: FundusSR, count: int, noise: int) -> tuple[Tensor, Tensor, Tensor]:
    _, _, initial = FundusSR._fixed_inputs(task, count, noise)
    crops = task.images.train_crops(count, torch.Generator().manual_seed(1))
    return crops, nn.functional.avg_pool2d(crops, 4), initial


# -- gates, times, text


@defect("max_t so small that no step is active", listed=True)
def _(folder: Path) -> Case:
    return Case(settings=[{"ssim_loss_max_t": 1e-4}], blamed=("gate",))


@defect("max_t small under a law of t that avoids it", listed=True)
def _(folder: Path) -> Case:
    law = {"t_law": "shifted_sigmoid_normal", "timestep_shift": 3.0}
    return Case(config=law, settings=[{"ssim_loss_max_t": 0.05}, {"ssim_loss_max_t": 0.1}], blamed=("gate",))


@defect("too few steps for any verdict", listed=True)
def _(folder: Path) -> Case:
    return Case(steps=8, blamed=("gate",))


@defect("the declared law of t is not the one used")
def _(folder: Path) -> Case:
    def setup(self: FundusSR, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        FundusSR.setup(self, config, seed, device)
        true = self.time_law

        class Declared(type(true)):  # type: ignore[misc]
            def sample(self, n: int, generator: Any = None, **others: Any) -> Tensor:
                return 0.5 + 0.5 * torch.rand(n, generator=generator)

        self.time_law = Declared(true.name, true.shift)

    return Case(variant(setup=setup), blamed=("time_law",))


@defect("the batch depends on the setting")
def _(folder: Path) -> Case:
    def generator(self: FundusSR, n: int, stream: int, rank: int = 0) -> torch.Generator:
        return FundusSR._generator(self, n + int(100 * self.config.ssim_loss_weight), stream, rank)

    return Case(variant(_generator=generator), blamed=("batches",))


def writing(ids: Callable[[int], Tensor], **metrics: float) -> type:
    """A task that makes text too."""

    def sample(self: FundusSR, noise: int = 0) -> Sample:
        return replace(FundusSR.sample(self, noise), token_ids=ids(1000), vocabulary_size=1000)

    def step(self: FundusSR) -> dict[str, Any]:
        return {**FundusSR.step(self), **metrics}

    return variant(sample=sample, step=step)


@defect("token ids beyond the vocabulary", listed=True)
def _(folder: Path) -> Case:
    return Case(writing(lambda size: torch.arange(0, size + 24)), blamed=("text/tokens",))


@defect("one token id is the vocabulary's size", listed=True)
def _(folder: Path) -> Case:
    return Case(writing(lambda size: torch.tensor([[5, 7, size], [1, 2, 3]])), blamed=("text/tokens",))


@defect("token ids below 0", listed=True)
def _(folder: Path) -> Case:
    return Case(writing(lambda size: torch.tensor([-100, 5, 6])), blamed=("text/tokens",))


@defect("the language model was not loaded")
def _(folder: Path) -> Case:
    return Case(writing(lambda size: torch.arange(9), loss_ce=6.9), blamed=("loss/text",))


@defect("the questions are labelled")
def _(folder: Path) -> Case:
    return Case(writing(lambda size: torch.arange(9), loss_ce=0.03), blamed=("loss/text",))


@defect("no position is masked")
def _(folder: Path) -> Case:
    return Case(writing(lambda size: torch.arange(9), loss_ce=2.0, label_fraction=1.0), blamed=("loss/text",))


@defect("BAGEL without its weights")
def _(folder: Path) -> Case:
    return Case(writing(lambda size: torch.arange(9), mse=2.0, ce=11.5), blamed=("loss/mse", "loss/ce"))


@defect("the space holds a value that the task refuses")
def _(folder: Path) -> Case:
    return Case(settings=[*GATES, {"optimizer": "adam"}], blamed=("parameter/optimizer",))


@defect("a searched setting is dropped")
def _(folder: Path) -> Case:
    return Case(losing("decode_chunk", echo=False), settings=[*GATES, {"decode_chunk": 3}], blamed=("parameter/decode_chunk",))


@defect("the learning rate ruins the baseline")
def _(folder: Path) -> Case:
    return Case(config={"lr": 50.0}, blamed=("baseline/smoke",))


# -- sound set-ups


def _healthy(name: str, config: Mapping[str, Any] | None = None, **others: Any) -> None:
    HEALTHY[name] = Case(config=config or {}, **others)


_healthy("as bundled")
for _preset in PRESETS:
    _healthy(f"preset {_preset}", {"preset": _preset})
for _crop in (24, 32, 40, 64, 96):
    _healthy(f"crop {_crop}", {"crop": _crop})
for _batch in (1, 2, 4, 16):
    _healthy(f"batch {_batch}", {"batch_size": _batch})
for _shift in (1.0, 3.0, 0.3):
    _healthy(
        f"BAGEL's law of t, shift {_shift:g}",
        {"t_law": "shifted_sigmoid_normal", "timestep_shift": _shift},
        settings=[*GATES, {"ssim_loss_max_t": 0.5}],
    )
_healthy("uniform t, shift 2", {"timestep_shift": 2.0})
for _precision in ("bf16", "fp16"):
    _healthy(f"autocast {_precision}", {"precision": _precision})
_healthy("bf16, AdamW, clipped", {"precision": "bf16", "preset": "adamw_clip"})
_healthy("weights averaged while training", {"ema_decay": 0.99})
_healthy("adamw_hot and averaged", {"preset": "adamw_hot", "ema_decay": 0.9})
for _image in ("immunohistochemistry", "astronaut", "coffee", "chelsea"):
    _healthy(f"image {_image}", {"image": _image})
_healthy("image astronaut, crop 32, batch 4", {"image": "astronaut", "crop": 32, "batch_size": 4})
_healthy("image microaneurysms, crop 24", {"image": "microaneurysms", "crop": 24})
_healthy("pixel and SSIM mixed", {"pixel_loss_weight": 0.05, "pixel_loss_max_t": 1.0})
_healthy("note 001's baseline: pixel weight 10000", baseline={**BASELINE, "pixel_loss_weight": 10000.0, "pixel_loss_max_t": 0.2})
_healthy("a ruinous gain", settings=[{"ssim_loss_weight": 1e6, "ssim_loss_max_t": 1.0}])
_healthy("a clamp on the gradient", {"ssim_grad_clamp": 1e-6})
_healthy("decoded one at a time", {"decode_chunk": 1})
_healthy("lr of the notes", {"lr": 2.5e-6, "max_grad_norm": 1.0})
_healthy("no baseline settings", baseline={})


def _with_dropout(task: FundusSR) -> None:
    """As a hook: the network has the same tensors as before."""
    task.model.up.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.1, module.training))


def _only_the_last_block(task: FundusSR) -> None:
    task.model.requires_grad_(False)
    task.model.up.requires_grad_(True)


def _partly_conditioning(self: FundusSR, n: int) -> Forward:
    found = FundusSR.forward(self, n)
    return replace(found, is_target=torch.arange(len(found.t)) % 4 != 3)


HEALTHY["dropout in the trained network"] = Case(after_loading(_with_dropout))
HEALTHY["only the last block is trained"] = Case(
    variant(
        setup=after_loading(_only_the_last_block).setup,
        trainable_parameters=lambda self: [p for p in self.model.parameters() if p.requires_grad],
    )
)
HEALTHY["a quarter of the batch is conditioning"] = Case(variant(forward=_partly_conditioning))
HEALTHY["SSIM of one's own in float32"] = Case(stepping())
HEALTHY["text as it should be"] = Case(writing(lambda size: torch.arange(size), loss_ce=1.7, label_fraction=0.4, mse=0.41, ce=0.55))
