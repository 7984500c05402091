"""Set-ups that were written after the checks of `effect_defects` and their limits: two or more of each kind, and sound ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fundus_defects
import torch
from effect_defects import (
    altered,
    blurred,
    flowing,
    gaussian,
    sampling,
    ssim_with,
    targeting,
    uniform,
)
from fundus_defects import HEALTHY, Case, after_loading, bundled, defect, folder_with, stepping, variant
from torch import Tensor
from torch.nn import functional

from tune_ssim.losses import noisy_latent, velocity_target
from tune_ssim.tasks.fundus_sr import DENOISER_FILE, FundusSR
from tune_ssim.trials.training import Forward, Sample

BEFORE = set(fundus_defects.DEFECTS), set(HEALTHY)


def with_optimizer(make: Callable[..., torch.optim.Optimizer], factor: float = 1.0) -> type:
    """Another optimiser, with the configured learning rate times `factor`."""

    def change(task: FundusSR) -> None:
        task.optimizer = make(task.model.parameters(), lr=factor * task.config.lr)

    def effective(self: FundusSR) -> dict[str, Any]:
        return {**FundusSR.effective(self), "lr": self.config.lr}

    return variant(setup=after_loading(change).setup, effective=effective)


# -- sampling


@defect("inference keeps its first images")
def _(folder: Path) -> Case:
    def sample(self: FundusSR, noise: int = 0) -> Sample:
        kept = self.__dict__.setdefault("kept", {})
        if noise not in kept:
            kept[noise] = FundusSR.sample(self, noise)
        return kept[noise]

    return Case(variant(sample=sample), blamed=("sampling",))


@defect("inference mixes the truth in")
def _(folder: Path) -> Case:
    return Case(sampling(lambda task, noise, found: 0.8 * found.references + 0.2 * found.images), blamed=("sampling",))


@defect("inference returns the enlarged inputs")
def _(folder: Path) -> Case:
    enlarge = lambda found: functional.interpolate(found.inputs, size=found.images.shape[-1], mode="bicubic").clamp(0, 1)  # noqa: E731
    return Case(sampling(lambda task, noise, found: enlarge(found)), blamed=("sampling", "smoke/raw"))


@defect("inference runs with dropout")
def _(folder: Path) -> Case:
    def sample(self: FundusSR, noise: int = 0) -> Sample:
        handle = self.model.up.register_forward_hook(lambda module, inputs, output: functional.dropout(output, 0.2))
        try:
            return FundusSR.sample(self, noise)
        finally:
            handle.remove()

    return Case(variant(sample=sample), blamed=("sampling",))


# -- targets


@defect("the targets are 3 rows up and 2 columns beside the crop")
def _(folder: Path) -> Case:
    return Case(targeting(lambda crops, low: crops.roll((-3, 2), (-2, -1))), blamed=("targets/shift",))


@defect("the targets come from another crop of the same place, 6 pixels lower")
def _(folder: Path) -> Case:
    return Case(targeting(lambda crops, low: functional.pad(crops, (0, 0, 0, 6), "reflect")[..., 6:, :]), blamed=("targets/shift",))


@defect("the targets were at half resolution")
def _(folder: Path) -> Case:
    def half(crops: Tensor, low: Tensor) -> Tensor:
        small = functional.avg_pool2d(crops, 2)
        return functional.interpolate(small, size=crops.shape[-1], mode="bicubic").clamp(0, 1)

    return Case(targeting(half), blamed=("targets/sharpness",))


@defect("the targets are blurred a little")
def _(folder: Path) -> Case:
    return Case(targeting(lambda crops, low: blurred(crops, 0.7)), blamed=("targets/sharpness",))


@defect("the targets are too bright")
def _(folder: Path) -> Case:
    return Case(targeting(lambda crops, low: crops ** (1 / 2.2)), blamed=("data/predictions",))


# -- leakage


def _recoloured(images: Tensor) -> Tensor:
    return images * torch.tensor([0.9, 1.0, 0.7]).view(1, 3, 1, 1) + 0.03


def _a_quarter(self: FundusSR, count: int, noise: int) -> tuple[Tensor, Tensor, Tensor]:
    crops, low, initial = FundusSR._fixed_inputs(self, count, noise)
    copies = 0.85 * self.images.train_crops(count, torch.Generator().manual_seed(1))[: count // 4]
    return torch.cat([copies, crops[count // 4 :]]), torch.cat([functional.avg_pool2d(copies, 4), low[count // 4 :]]), initial


@defect("the held-out images are training images in other colours")
def _(folder: Path) -> Case:
    return Case(altered(_recoloured), blamed=("data/overlap",))


@defect("the held-out images are training images, blurred")
def _(folder: Path) -> Case:
    return Case(altered(lambda images: blurred(images, 0.8)), blamed=("data/overlap",))


@defect("a quarter of the held-out images are training images, darkened")
def _(folder: Path) -> Case:
    return Case(variant(_fixed_inputs=_a_quarter), blamed=("data/overlap",))


# -- updates


@defect("AdamW climbs")
def _(folder: Path) -> Case:
    return Case(with_optimizer(partial(torch.optim.AdamW, maximize=True), 0.04), blamed=("update",))


@defect("a hook turns every gradient round")
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        for parameter in task.model.parameters():
            parameter.register_hook(lambda gradient: -gradient)

    return Case(after_loading(change), blamed=("update", "gradient/main"))


@defect("AdamW gets gradients that are one step old")
def _(folder: Path) -> Case:
    class Old(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            parameters = [p for group in self.param_groups for p in group["params"]]
            now = [p.grad for p in parameters]
            for parameter, old in zip(parameters, getattr(self, "old", now), strict=True):
                parameter.grad = old
            self.old = [gradient.clone() for gradient in now]
            return super().step(closure)

    return Case(with_optimizer(Old, 0.04), blamed=("update",))


@defect("gradients are never cleared")
def _(folder: Path) -> Case:
    class Piling(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            pass

    return Case(
        with_optimizer(Piling),
        {"measure_main_norm": False},
        blamed=("update",),
        baseline={**fundus_defects.BASELINE, "measure_main_norm": False},
    )


# -- z0 and the time


def predicting(z0: Callable[[Tensor, Tensor, Tensor], Tensor]) -> type:
    """z0 from (z_t, velocity, t) in another way."""

    def forward(self: FundusSR, n: int) -> Forward:
        found = FundusSR.forward(self, n)
        _, low, latent, noise, t = self._batch(n)
        z_t = noisy_latent(latent, noise, t)
        velocity = self.model(z_t, t, low).float()
        return replace(
            found, main=functional.mse_loss(velocity, velocity_target(latent, noise)), z0=z0(z_t, velocity, t[:, None, None, None])
        )

    return variant(forward=forward)


@defect("z0 forgets t")
def _(folder: Path) -> Case:
    return Case(predicting(lambda z_t, velocity, t: z_t - velocity), blamed=("flow/z0", "data/predictions"))


@defect("z0 takes the other end of the path")
def _(folder: Path) -> Case:
    return Case(predicting(lambda z_t, velocity, t: z_t + (1 - t) * velocity), blamed=("flow/z0", "data/predictions"))


for _name, _told in {"the t of another sample": lambda t: t.roll(1), "t = 0": torch.zeros_like, "t / 2": lambda t: t / 2}.items():

    @defect(f"the network is told {_name}")
    def _(folder: Path, told: Any = _told) -> Case:
        return Case(flowing(told=told), blamed=("flow/time",))


# -- one layer


@defect("one layer is zero in memory")
def _(folder: Path) -> Case:
    return Case(after_loading(lambda task: task.model.middle_out.conv_in.weight.zero_()), blamed=("weights/denoiser",))


@defect("the first layer is shuffled in the file")
def _(folder: Path) -> Case:
    tensors = bundled(DENOISER_FILE)
    name = next(name for name in tensors if name.endswith("conv_in.weight"))
    tensors[name] = tensors[name].flatten().flip(0).view(tensors[name].shape).clone()
    return Case(config=folder_with(folder, denoiser=tensors), blamed=("weights/", "loss/", "flow/", "smoke/"))


@defect("another layer is zero in the file")
def _(folder: Path) -> Case:
    tensors = bundled(DENOISER_FILE)
    tensors["up.conv_in.weight"] = torch.zeros_like(tensors["up.conv_in.weight"])
    return Case(config=folder_with(folder, denoiser=tensors), blamed=("weights/", "loss/", "flow/", "smoke/"))


# -- batches


@defect("the steps alternate between two batches")
def _(folder: Path) -> Case:
    return Case(
        variant(_generator=lambda self, n, stream, rank=0: FundusSR._generator(self, n % 2, stream, rank)), blamed=("data/steps",)
    )


@defect("the noise is the same at every step, t is not")
def _(folder: Path) -> Case:
    def batch(self: FundusSR, n: int) -> tuple[Tensor, ...]:
        crops, low, z0, noise, t = FundusSR._batch(self, n)
        return crops, low, z0, torch.randn(noise.shape, generator=torch.Generator().manual_seed(7)), t

    return Case(variant(_batch=batch), blamed=("data/steps",))


@defect("the noise is not seeded")
def _(folder: Path) -> Case:
    def batch(self: FundusSR, n: int) -> tuple[Tensor, ...]:
        crops, low, z0, noise, t = FundusSR._batch(self, n)
        return crops, low, z0, torch.randn_like(noise), t

    return Case(variant(_batch=batch), blamed=("data/steps",))


# -- the way from the loss to the parameters


@defect("z0 is made from a detached velocity")
def _(folder: Path) -> Case:
    return Case(stepping(detach=True), blamed=("parameter/ssim_loss_weight", "gradient/ssim"))


@defect("z0 goes through NumPy")
def _(folder: Path) -> Case:
    def forward(self: FundusSR, n: int) -> Forward:
        found = FundusSR.forward(self, n)
        return replace(found, z0=torch.from_numpy(found.z0.detach().numpy()))

    return Case(variant(forward=forward), blamed=("parameter/ssim_loss_weight",))


@defect("the decoder's images are detached")
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        plain = task.vae.decode
        task.vae.decode = lambda z: plain(z).detach()

    return Case(after_loading(change), blamed=("parameter/ssim_loss_weight",))


# -- SSIM


@defect("SSIM of one's own compares with targets 5 pixels lower")
def _(folder: Path) -> Case:
    plain = ssim_with(gaussian(11, 1.5))
    return Case(stepping(lambda x, y: plain(x, y.roll(5, -2))), blamed=("gradient/ssim",))


@defect("SSIM of one's own with a uniform window in bfloat16")
def _(folder: Path) -> Case:
    plain = ssim_with(uniform(7))
    return Case(stepping(lambda x, y: plain(x.bfloat16(), y.bfloat16()).float()), blamed=("gradient/ssim",))


@defect("SSIM of one's own is minimised instead of 1 - SSIM")
def _(folder: Path) -> Case:
    plain = ssim_with(uniform(11))
    return Case(stepping(lambda x, y: 2 - plain(x, y)), blamed=("gradient/ssim",))


# -- sound


def _round_trip(self: FundusSR, n: int) -> Forward:
    found = FundusSR.forward(self, n)
    with torch.no_grad():
        return replace(found, targets=(self.vae.decode(found.clean) * 0.5 + 0.5).clamp(0, 1))


def _averaged_samples(self: FundusSR, noise: int = 0) -> Sample:
    return self._sample(self.ema, noise)


def _rounded_times(self: FundusSR, n: int) -> tuple[Tensor, ...]:
    crops, low, z0, noise, t = FundusSR._batch(self, n)
    return crops, low, z0, noise, ((t * 1000).round() / 1000).clamp(1e-3, 1)


def _luminance(x: Tensor, y: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return ssim_with(gaussian(11, 1.5))((x * weights).sum(1, keepdim=True), (y * weights).sum(1, keepdim=True))


class WarmedUp(torch.optim.SGD):
    """The learning rate rises over ten steps, from 0."""

    def step(self, closure: Any = None) -> Any:
        self.taken = getattr(self, "taken", -1) + 1
        rate = self.param_groups[0]["lr"]
        self.param_groups[0]["lr"] = rate * min(1.0, self.taken / 10)
        found = super().step(closure)
        self.param_groups[0]["lr"] = rate
        return found


HEALTHY["own SSIM, uniform window of 7"] = Case(stepping(ssim_with(uniform(7))))
HEALTHY["own SSIM, uniform window of 11"] = Case(stepping(ssim_with(uniform(11))))
HEALTHY["own SSIM, Gaussian window of 7, sigma 1"] = Case(stepping(ssim_with(gaussian(7, 1.0))))
HEALTHY["own SSIM, padded with zeros"] = Case(stepping(ssim_with(gaussian(11, 1.5, "zeros"))))
HEALTHY["own SSIM of the luminance"] = Case(stepping(_luminance))
HEALTHY["SGD with momentum"] = Case(with_optimizer(partial(torch.optim.SGD, momentum=0.9, nesterov=True), 0.4))
HEALTHY["Adafactor"] = Case(with_optimizer(torch.optim.Adafactor, 0.2))
HEALTHY["RMSprop in bf16"] = Case(with_optimizer(torch.optim.RMSprop, 0.02), {"precision": "bf16"})
HEALTHY["AdamW with a strong decay"] = Case(with_optimizer(partial(torch.optim.AdamW, weight_decay=0.5), 0.02))
HEALTHY["a warm-up from a learning rate of 0"] = Case(with_optimizer(WarmedUp))
HEALTHY["round-trip targets"] = Case(variant(forward=_round_trip))
HEALTHY["samples of averaged weights"] = Case(variant(sample=_averaged_samples), {"ema_decay": 0.9})
HEALTHY["times in thousandths"] = Case(variant(_batch=_rounded_times))

HELD_APART = (set(fundus_defects.DEFECTS) | set(HEALTHY)) - BEFORE[0] - BEFORE[1]
