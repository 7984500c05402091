"""Further broken set-ups of the bundled task, of kinds that show only in their effects, and further sound ones."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fundus_defects import (
    Case,
    _patched,
    after_loading,
    bundled,
    defect,
    folder_with,
    stepping,
    variant,
)
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tune_ssim.losses import noisy_latent, velocity_target, z0_from_velocity
from tune_ssim.tasks.fundus_images import low_resolution
from tune_ssim.tasks.fundus_sr import DENOISER_FILE, FundusSR
from tune_ssim.trials.training import Forward, Sample

# -- sampling


def sampling(change: Callable[[FundusSR, int, Sample], Tensor]) -> type:
    """Inference returns other images than those of its network."""

    def sample(self: FundusSR, noise: int = 0) -> Sample:
        found = FundusSR.sample(self, noise)
        return replace(found, images=change(self, noise, found))

    return variant(sample=sample)


@defect("inference returns the truth")
def _(folder: Path) -> Case:
    return Case(sampling(lambda task, noise, found: found.references), blamed=("sampling",))


@defect("inference returns the reconstructions")
def _(folder: Path) -> Case:
    return Case(sampling(lambda task, noise, found: found.reconstructions), blamed=("sampling",))


@defect("inference uses a stale copy of the weights")
def _(folder: Path) -> Case:
    def setup(self: FundusSR, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        FundusSR.setup(self, config, seed, device)
        self.copy = copy.deepcopy(self.model)

    return Case(variant(setup=setup, sample=lambda self, noise=0: self._sample(self.copy, noise)), blamed=("sampling",))


@defect("inference draws new noise every time")
def _(folder: Path) -> Case:
    def sample(self: FundusSR, noise: int = 0) -> Sample:
        self.draws = getattr(self, "draws", 0) + 1
        self.fixed = {}
        return self._sample(self.model, 100 * self.draws + noise)

    return Case(variant(sample=sample), blamed=("sampling",))


# -- the target of the image losses


def targeting(change: Callable[[Tensor, Tensor], Tensor]) -> type:
    """The image losses get another target: a function of the crops and of the low-resolution inputs in [0, 1]."""

    def forward(self: FundusSR, n: int) -> Forward:
        found = FundusSR.forward(self, n)
        low = (self._batch(n)[1] + 1) / 2
        return replace(found, targets=change(found.targets, low))

    return variant(forward=forward)


def blurred(images: Tensor, sigma: float) -> Tensor:
    offsets = torch.arange(-8, 9, dtype=images.dtype)
    taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
    taps = (taps / taps.sum()).expand(3, 1, -1)
    padded = functional.pad(images, (8, 8, 8, 8), "reflect")
    return functional.conv2d(functional.conv2d(padded, taps[..., None, :], groups=3), taps[..., :, None], groups=3)


def enlarged(low: Tensor, size: int) -> Tensor:
    return functional.interpolate(low, size=size, mode="bilinear", align_corners=False).clamp(0, 1)


for _shift in (1, 2, 4, 8):

    @defect(f"the targets are {_shift} pixels beside the crop")
    def _(folder: Path, shift: int = _shift) -> Case:
        return Case(targeting(lambda crops, low: crops.roll(shift, -1)), blamed=("targets/shift",))


@defect("the targets are the low-resolution inputs, enlarged")
def _(folder: Path) -> Case:
    return Case(targeting(lambda crops, low: enlarged(low, crops.shape[-1])), blamed=("targets/sharpness",))


@defect("the targets are blurred")
def _(folder: Path) -> Case:
    return Case(targeting(lambda crops, low: blurred(crops, 1.0)), blamed=("targets/sharpness",))


@defect("the targets are in linear light")
def _(folder: Path) -> Case:
    return Case(targeting(lambda crops, low: crops**2.2), blamed=("data/predictions",))


# -- held-out images that are trained on, altered


def altered(change: Callable[[Tensor], Tensor]) -> type:
    """The held-out images are crops of the training images, altered."""

    def fixed_inputs(self: FundusSR, count: int, noise: int) -> tuple[Tensor, Tensor, Tensor]:
        _, _, initial = FundusSR._fixed_inputs(self, count, noise)
        crops = change(self.images.train_crops(count, torch.Generator().manual_seed(1))).clamp(0, 1)
        generator = torch.Generator().manual_seed(2)
        side = crops.shape[-1] // 4
        return crops, low_resolution(crops, torch.randn(count, 3, side, side, generator=generator)), initial

    return variant(_fixed_inputs=fixed_inputs)


def noisy(images: Tensor, deviation: float) -> Tensor:
    return images + deviation * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))


def jpeg(images: Tensor, quality: int) -> Tensor:
    found = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(file, "JPEG", quality=quality)
        pixels = torch.frombuffer(bytearray(Image.open(file).convert("RGB").tobytes()), dtype=torch.uint8)
        found.append(pixels.view(*image.shape[1:], 3).permute(2, 0, 1).float() / 255)
    return torch.stack(found)


def half_a_pixel(images: Tensor) -> Tensor:
    return (images + images.roll(1, -1)) / 2


for _name, _change in {
    "darkened": lambda x: 0.8 * x,
    "with noise": lambda x: noisy(x, 0.02),
    "with another gamma": lambda x: x**0.8,
    "as JPEG": lambda x: jpeg(x, 75),
    "half a pixel aside": half_a_pixel,
}.items():

    @defect(f"the held-out images are training images {_name}")
    def _(folder: Path, change: Any = _change) -> Case:
        return Case(altered(change), blamed=("data/overlap",))


# -- the update


@defect("the gradient is ascended")
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        task.optimizer = torch.optim.SGD(task.model.parameters(), lr=task.config.lr, maximize=True)

    return Case(after_loading(change), blamed=("update",))


class OneStepOld(torch.optim.SGD):
    """Applies the gradient of the step before."""

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        now = [p.grad for p in parameters]
        for parameter, old in zip(parameters, getattr(self, "old", now), strict=True):
            parameter.grad = old
        self.old = [g.clone() for g in now]
        found = super().step(closure)
        for parameter, gradient in zip(parameters, now, strict=True):
            parameter.grad = gradient
        return found


@defect("the gradients are one step old")
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        task.optimizer = OneStepOld(task.model.parameters(), lr=task.config.lr)

    return Case(after_loading(change), blamed=("update",))


# -- z0 and the time


def flowing(*, told: Callable[[Tensor], Tensor] = lambda t: t, sign: float = 1.0) -> type:
    """A forward pass of one's own: the network is told another time, or z0 is taken with another sign."""

    def forward(self: FundusSR, n: int) -> Forward:
        found = FundusSR.forward(self, n)
        _, low, z0, noise, t = self._batch(n)
        z_t, target = noisy_latent(z0, noise, t), velocity_target(z0, noise)
        velocity = self.model(z_t, told(t), low).float()
        predicted = z0_from_velocity(z_t, sign * velocity, t)
        return replace(found, main=functional.mse_loss(velocity, target), z0=predicted)

    return variant(forward=forward)


@defect("z0 has the wrong sign of the velocity")
def _(folder: Path) -> Case:
    return Case(flowing(sign=-1.0), blamed=("flow/z0", "data/predictions"))


for _name, _told in {
    "1 - t": lambda t: 1 - t,
    "1000 t": lambda t: 1000 * t,
    "always 0.5": lambda t: torch.full_like(t, 0.5),
}.items():

    @defect(f"the network is told {_name}")
    def _(folder: Path, told: Any = _told) -> Case:
        return Case(flowing(told=told), blamed=("flow/",))


# -- one layer


def _shuffled(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    weight = tensors[name]
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(4))
    return {**tensors, name: weight.flatten()[order].view(weight.shape).clone()}


@defect("one layer is shuffled in memory")
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        task.model.load_state_dict(_shuffled(task.model.state_dict(), "up.conv_in.weight"))

    return Case(after_loading(change), blamed=("weights/denoiser",))


@defect("one layer is shuffled in the file")
def _(folder: Path) -> Case:
    return Case(
        config=folder_with(folder, denoiser=_shuffled(bundled(DENOISER_FILE), "up.conv_in.weight")),
        blamed=("weights/", "loss/", "flow/"),
    )


@defect("one layer is zero in the file")
def _(folder: Path) -> Case:
    tensors = bundled(DENOISER_FILE)
    tensors["middle_in.conv_out.weight"] = torch.zeros_like(tensors["middle_in.conv_out.weight"])
    return Case(config=folder_with(folder, denoiser=tensors), blamed=("weights/", "loss/", "flow/"))


# -- batches


@defect("every step has the same images")
def _(folder: Path) -> Case:
    return Case(variant(training_images=lambda self, n: FundusSR.training_images(self, 1)), blamed=("data/steps",))


def _fixed_noise(self: FundusSR, n: int, stream: int, rank: int = 0) -> torch.Generator:
    return FundusSR._generator(self, n if stream == 0 else 1, stream, rank)


@defect("every step has the same noise and t")
def _(folder: Path) -> Case:
    return Case(variant(_generator=_fixed_noise), blamed=("data/steps",))


@defect("the loader is not seeded")
def _(folder: Path) -> Case:
    def training_images(self: FundusSR, n: int) -> Tensor:
        return self.images.train_crops(self.config.batch_size, torch.Generator().manual_seed(int(torch.randint(2**31, ()))))

    return Case(variant(training_images=training_images), blamed=("data/steps",))


# -- the way from the loss to the parameters


@defect("z0 is detached")
def _(folder: Path) -> Case:
    def forward(self: FundusSR, n: int) -> Forward:
        found = FundusSR.forward(self, n)
        return replace(found, z0=found.z0.detach())

    return Case(variant(forward=forward), blamed=("parameter/ssim_loss_weight",))


@defect("the decoder runs under no_grad")
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        task.vae.decode = torch.no_grad()(task.vae.decode)

    return Case(after_loading(change), blamed=("parameter/ssim_loss_weight",))


# -- an SSIM of one's own


def ssim_with(filtered: Callable[[Tensor], Tensor], data_range: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """SSIM with another filter or data range: `[n, c, h, w]` twice → `[n]`."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        mx, my = filtered(x), filtered(y)
        vx, vy, cov = filtered(x * x) - mx * mx, filtered(y * y) - my * my, filtered(x * y) - mx * my
        found = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        return found.mean(dim=(1, 2, 3))

    return similarity


def gaussian(side: int, sigma: float, padding: str = "") -> Callable[[Tensor], Tensor]:
    def filtered(x: Tensor) -> Tensor:
        offsets = torch.arange(side, dtype=x.dtype) - (side - 1) / 2
        taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
        taps = taps / taps.sum()
        kernel = (taps[:, None] * taps).expand(x.shape[1], 1, side, side)
        if padding == "zeros":
            return functional.conv2d(x, kernel, padding=side // 2, groups=x.shape[1])
        if padding:
            x = functional.pad(x, (side // 2,) * 4, padding)
        return functional.conv2d(x, kernel, groups=x.shape[1])

    return filtered


def uniform(side: int) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.avg_pool2d(x, side, 1)


@defect("the sign of SSIM is flipped in the loss")
def _(folder: Path) -> Any:
    return _patched("ssim_loss", lambda x, y: ssim_with(gaussian(11, 1.5))(x, y), ("ssim/",))


@defect("the sign of SSIM is flipped in the step")
def _(folder: Path) -> Case:
    plain = ssim_with(gaussian(11, 1.5))
    return Case(stepping(lambda x, y: 2 - plain(x, y)), blamed=("gradient/ssim",))


@defect("the data range of SSIM is 255, in the loss")
def _(folder: Path) -> Any:
    wide = ssim_with(gaussian(11, 1.5), 255.0)
    return _patched("ssim_loss", lambda x, y: 1 - wide(x, y), ("ssim/",))


@defect("the data range of SSIM is 255, in the step")
def _(folder: Path) -> Case:
    return Case(stepping(ssim_with(gaussian(11, 1.5), 255.0)), blamed=("gradient/ssim",))
