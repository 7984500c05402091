"""A second set written without reading the checks: further kinds of defects, and sound set-ups of further shapes.

On all bundled tasks of images, on `examples/own_task`, and on the small diffusion trainer of `small_diffusion`. The result of their
first run, before any check was changed because of it, is in `benchmarks/results/preflight_unseen_2_first_run.json`. A comment in
each defect says why it spoils the experiment.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import fundus_defects
import torch
from effect_defects import gaussian, ssim_with, uniform
from fundus_defects import HEALTHY, Case, after_loading, bundled, defect, folder_with, replaced, stepping, variant
from held_apart_defects import with_optimizer
from safetensors.torch import load_file, save_file
from small_diffusion import DEFAULTS, LOSS, SAMPLING_TIMES, WEIGHTS, Preconditioned, SmallDiffusion, random_numbers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from unseen_defects import (
    OWN_BASELINE,
    PLAIN,
    Adapters,
    MyTask,
    _adapted_parts,
    _adapted_step,
    _only_trainable,
    batches,
    losing,
    own,
    small,
    sound,
    with_times,
)

from tune_ssim.losses import DecodedLoss, TimeLaw, euler_sample, noisy_latent, velocity_target, z0_from_velocity
from tune_ssim.losses.schedules import Linear
from tune_ssim.probes import total_norm
from tune_ssim.tasks import vae_kl
from tune_ssim.tasks.flow_dino_kl import FlowDinoKL
from tune_ssim.tasks.fundus_sr import DENOISER_FILE, FundusSR
from tune_ssim.tasks.vae_kl import VAEKL
from tune_ssim.trials.training import Forward, Sample

BEFORE = set(fundus_defects.DEFECTS), set(HEALTHY)
OWN: Any = MyTask.step.__globals__  # the functions of its training loop
KL = {"settings": [{"kl_alpha": 1e-2}], "baseline": {}, "smoke_test": False}
FLOW = {"settings": [{"kl_weight": 1e-2}], "baseline": {}, "smoke_test": False}


def images(change: Callable[[FundusSR, Tensor, int], Tensor]) -> type:
    """The loader returns other training images; everything in training is made of them."""
    return variant(training_images=lambda self, n: change(self, FundusSR.training_images(self, n), n))


def updating(update: Callable[[FundusSR, Tensor], Tensor]) -> type:
    """Another order within the step: `update` gets the loss, changes the weights, and returns the norm to record."""

    def step(self: FundusSR) -> dict[str, Any]:
        self.step_count += 1
        self.model.train()
        forward = self.forward(self.step_count)
        auxiliary = forward.auxiliary()
        loss, metrics = forward.main + auxiliary.total, {}
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.measure_main_norm:
            forward.main.backward(retain_graph=True)
            metrics["total_norm_main"] = total_norm(self.model.parameters())
            self.optimizer.zero_grad(set_to_none=True)
        norm = update(self, loss)
        metrics |= {"loss": loss.detach(), "loss_flow": forward.main.detach(), "total_norm": norm}
        return {**metrics, **auxiliary.metrics()}

    return variant(step=step)


def changed_forward(change: Callable[[FundusSR, Forward, tuple[Tensor, ...]], Forward]) -> type:
    """The forward pass reports something else: (task, what it found, the batch) → Forward."""
    return variant(forward=lambda self, n: change(self, FundusSR.forward(self, n), self._batch(n)))


def drawn(task: FundusSR, t: Tensor, *shape: int) -> Tensor:
    """Uniform random numbers of the step whose times are `t`."""
    return torch.rand(shape, generator=random_numbers(task.seed, int(1e6 * t[0]), 5))


# -- images and conditions


@defect("the condition is cut 8 pixels beside the target")
def _(folder: Path) -> Case:
    # The pair is not registered: the network learns to displace what it sees.
    return Case(
        batches(lambda self, crops, low, z0, noise, t: (crops, low.roll(2, -1), z0, noise, t)),
        blamed=("data/", "loss/main", "flow/"),
    )


@defect("the condition is BGR in training")
def _(folder: Path) -> Case:
    # One reader is OpenCV's, the other PIL's: training and inference see other colours.
    return Case(
        batches(lambda self, crops, low, z0, noise, t: (crops, low.flip(1), z0, noise, t)), blamed=("data/", "loss/main", "flow/")
    )


@defect("the condition is in [0, 1] in training")
def _(folder: Path) -> Case:
    # The weights know [-1, 1], and inference gives it.
    return Case(
        batches(lambda self, crops, low, z0, noise, t: (crops, (low + 1) / 2, z0, noise, t)),
        blamed=("data/", "loss/main", "flow/"),
    )


@defect("the condition's contrast is augmented, the image's is not")
def _(folder: Path) -> Case:
    # A random contrast of the input alone: the right colours cannot be told any more.
    def change(self: FundusSR, crops: Tensor, low: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        factors = 0.2 + 1.6 * drawn(self, t, len(low), 1, 1, 1)
        return crops, (low * factors).clamp(-1, 1), z0, noise, t

    return Case(batches(change), blamed=("data/", "loss/main", "flow/"))


@defect("nine in ten conditions are dropped")
def _(folder: Path) -> Case:
    # The rate of classifier-free guidance is taken for the share to keep.
    def change(self: FundusSR, crops: Tensor, low: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        dropped = (1000 * t).frac() < 0.9
        return crops, torch.where(dropped[:, None, None, None], torch.zeros_like(low), low), z0, noise, t

    return Case(batches(change), blamed=("data/", "loss/main", "flow/"))


@defect("the encoder gets BGR")
def _(folder: Path) -> Case:
    # Latents of images in other colours than the targets and conditions.
    def change(self: FundusSR, crops: Tensor, low: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return crops, low, self.vae.encode(2 * crops.flip(1) - 1), noise, t

    return Case(batches(change), blamed=("data/", "loss/main", "flow/"))


@defect("training images are reshaped where they should be permuted")
def _(folder: Path) -> Case:
    # NHWC read as NCHW: stripes of mixed colours.
    return Case(
        images(lambda self, x, n: x.permute(0, 2, 3, 1).contiguous().view(x.shape)), blamed=("data/", "loss/main", "targets/")
    )


@defect("training images are negatives")
def _(folder: Path) -> Case:
    # A TIFF whose white is 0: the fine-tune unlearns the images that it is judged on.
    return Case(images(lambda self, x, n: 1 - x), blamed=("data/", "loss/main", "targets/"))


@defect("half of every training image is padding")
def _(folder: Path) -> Case:
    # Padded to a square, and neither masked nor cropped in any loss.
    def change(self: FundusSR, x: Tensor, n: int) -> Tensor:
        return torch.cat([x[..., : x.shape[-1] // 2], torch.zeros_like(x[..., x.shape[-1] // 2 :])], dim=-1)

    return Case(images(change), blamed=("data/", "loss/main", "targets/"))


@defect("a quarter of every target is erased")
def _(folder: Path) -> Case:
    # Random erasing reaches the image losses' targets only.
    def change(self: FundusSR, crops: Tensor, low: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        half, erased = crops.shape[-1] // 2, crops.clone()
        for row, (top, left) in enumerate((drawn(self, t, len(crops), 2) * half).long().tolist()):
            erased[row, :, top : top + half, left : left + half] = 0.0
        return erased, low, z0, noise, t

    return Case(batches(change), blamed=("data/", "targets/"))


@defect("all held-out images are one crop")
def _(folder: Path) -> Case:
    # The sampler of the validation set never advances: every metric is that of one image.
    def fixed_inputs(self: FundusSR, count: int, noise: int) -> tuple[Tensor, Tensor, Tensor]:
        crops, low, initial = FundusSR._fixed_inputs(self, count, noise)
        return crops[:1].repeat(count, 1, 1, 1), low[:1].repeat(count, 1, 1, 1), initial

    return Case(variant(_fixed_inputs=fixed_inputs), blamed=("data/", "sampling", "smoke/"))


# -- latents, noise and time


@defect("latents are mixed, targets are not")
def _(folder: Path) -> Case:
    # MixUp in the latent space only: double exposures under the condition and the target of one image.
    return Case(
        batches(lambda self, crops, low, z0, noise, t: (crops, low, 0.5 * z0 + 0.5 * z0.roll(1, 0), noise, t)),
        blamed=("data/", "loss/main", "flow/"),
    )


@defect("latents come from a cache of the first batch")
def _(folder: Path) -> Case:
    # The cache's key lacks the index: always the same latents, under other conditions.
    def batch(self: FundusSR, n: int) -> tuple[Tensor, ...]:
        crops, low, _, noise, t = FundusSR._batch(self, n)
        return crops, low, FundusSR._batch(self, 1)[2], noise, t

    return Case(variant(_batch=batch), blamed=("data/", "loss/main", "flow/"))


@defect("the posterior is sampled with its log-variance for a deviation")
def _(folder: Path) -> Case:
    # As much noise as image in the clean latents.
    def change(self: FundusSR, crops: Tensor, low: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            mean, log_var = self.vae.moments(2 * crops - 1)
        z = mean + log_var * torch.special.ndtri(drawn(self, t, *mean.shape).clamp(1e-6, 1 - 1e-6))
        return crops, low, (z - self.vae.latent_mean) / self.vae.latent_std, noise, t

    return Case(batches(change), blamed=("data/", "loss/main", "flow/"))


@defect("latents are encoded from noisy images")
def _(folder: Path) -> Case:
    # The noise of the degradation was added before the image was copied.
    def change(self: FundusSR, crops: Tensor, low: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        added = torch.special.ndtri(drawn(self, t, *crops.shape).clamp(1e-6, 1 - 1e-6))
        with torch.no_grad():
            return crops, low, self.vae.encode(2 * crops - 1 + 0.5 * added), noise, t

    return Case(batches(change), blamed=("data/", "loss/main", "flow/"))


@defect("no noise is added")
def _(folder: Path) -> Case:
    # The network gets clean latents and has to guess the noise.
    def forward(self: FundusSR, n: int) -> Forward:
        found = FundusSR.forward(self, n)
        _, low, z0, noise, t = self._batch(n)
        velocity = self.model(z0, t, low).float()
        main = functional.mse_loss(velocity, velocity_target(z0, noise))
        return replace(found, main=main, z0=z0_from_velocity(z0, velocity, t))

    return Case(variant(forward=forward), blamed=("loss/main", "flow/", "data/"))


@defect("the time is cut to an integer")
def _(folder: Path) -> Case:
    # t.long() of numbers below 1: t is 0 always, nothing is denoised, and no gate ever opens.
    return Case(
        batches(lambda self, crops, low, z0, noise, t: (crops, low, z0, noise, t.long().float())),
        blamed=("time_law", "gate", "flow/", "loss/main"),
    )


@defect("the gate gets t before its shift")
def _(folder: Path) -> Case:
    # max_t then means another share of noise than the one that the decoded images have.
    def change(self: FundusSR, found: Forward, batch: tuple[Tensor, ...]) -> Forward:
        s = self.time_law.shift
        return replace(found, t=found.t / (s - (s - 1) * found.t))

    return Case(changed_forward(change), {"timestep_shift": 3.0}, blamed=("time_law", "gate", "flow/", "parameter/ssim_loss_max_t"))


@defect("the gate gets t / 10")
def _(folder: Path) -> Case:
    # Every image passes, pure noise included: max_t searches nothing.
    return Case(
        changed_forward(lambda self, found, batch: replace(found, t=found.t / 10)),
        blamed=("time_law", "gate", "flow/", "parameter/ssim_loss_max_t"),
    )


# -- losses


@defect("the main loss is a sum")
def _(folder: Path) -> Case:
    # Thousands of times the gradient that the learning rate was made for.
    return Case(
        losing(lambda v, target, t: functional.mse_loss(v, target, reduction="sum")),
        blamed=("loss/main", "gradient/main", "baseline/", "update", "smoke/"),
    )


@defect("the main loss is divided by the number of pixels twice (small)")
def _(folder: Path) -> Case:
    # Any weight of an image loss drowns it; a searched weight means nothing for other trainings.
    return Case(
        small(main_loss=lambda self, predicted, target, t: functional.mse_loss(predicted, target) / predicted[0].numel()),
        blamed=("loss/main", "gradient/main", "baseline/", "norm"),
    )


@defect("the main loss has one channel")
def _(folder: Path) -> Case:
    # v[:, 0] for v[0]: three of four latent channels are never trained and drift.
    return Case(
        losing(lambda v, target, t: functional.mse_loss(v[:, 0], target[:, 0])),
        blamed=("loss/main", "gradient/main", "flow/", "trained", "parts", "update"),
    )


@defect("the main loss compares with the batch's mean")
def _(folder: Path) -> Case:
    # keepdim and broadcasting: every image is pulled to the average of all.
    return Case(
        losing(lambda v, target, t: (v - target.mean(0, keepdim=True)).square().mean()),
        blamed=("loss/main", "flow/", "gradient/main", "data/"),
    )


@defect("the main loss is weighted by 1 / t², without a limit")
def _(folder: Path) -> Case:
    # Min-SNR without the minimum: single images with small t outweigh all others.
    return Case(
        losing(lambda v, target, t: ((v - target).square().mean((1, 2, 3)) / t.clamp(min=1e-5) ** 2).mean()),
        blamed=("loss/main", "gradient/main", "baseline/", "norm", "update"),
    )


@defect("every image is marked as conditioning")
def _(folder: Path) -> Case:
    # The mask is upside down: no image loss is ever active.
    return Case(
        changed_forward(lambda self, found, batch: replace(found, is_target=torch.zeros(len(found.t), dtype=torch.bool))),
        blamed=("gate", "parameter/ssim", "gradient/ssim"),
    )


@defect("the true sizes are those of the latents")
def _(folder: Path) -> Case:
    # Images and targets are cropped to a sixteenth of their area before every image loss.
    def change(self: FundusSR, found: Forward, batch: tuple[Tensor, ...]) -> Forward:
        side = max(11, self.config.crop // self.vae.factor)
        return replace(found, sizes=[(side, side)] * len(found.t))

    return Case(changed_forward(change), blamed=("data/", "sizes", "targets/", "gradient/ssim", "ssim/"))


@defect("the round trip is that of noisy latents")
def _(folder: Path) -> Case:
    # The target of SSIM is the noisy image: the loss teaches to keep the noise.
    def change(self: FundusSR, found: Forward, batch: tuple[Tensor, ...]) -> Forward:
        return replace(found, clean=noisy_latent(batch[2], batch[3], batch[4]))

    return Case(changed_forward(change), {"target": "roundtrip"}, blamed=("data/", "targets/", "flow/"))


@defect("SSIM is warmed up for a million steps")
def _(folder: Path) -> Case:
    # Its weight is 0.02 % at the end of the trial: whatever is searched has no effect.
    return Case(config={"ssim_warmup_steps": 1e6}, blamed=("parameter/ssim", "gate", "gradient/ssim", "ssim", "warm"))


@defect("the weights of the two image losses are exchanged")
def _(folder: Path) -> Case:
    # Positional arguments in the wrong order; the log repeats what was asked for.
    def setup(self: FundusSR, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        FundusSR.setup(self, config, seed, device)
        self.loss = replace(
            self.loss, ssim_loss_weight=self.config.pixel_loss_weight, pixel_loss_weight=self.config.ssim_loss_weight
        )

    def effective(self: FundusSR) -> dict[str, Any]:
        asked = {name: getattr(self.config, name) for name in ("ssim_loss_weight", "pixel_loss_weight")}
        return {**FundusSR.effective(self), **asked}

    return Case(
        variant(setup=setup, effective=effective),
        blamed=("parameter/ssim_loss_weight", "parameter/pixel_loss_weight", "gradient/ssim", "gradient/pixel"),
    )


# -- the step


@defect("gradients are cleared between backward and step")
def _(folder: Path) -> Case:
    # The loss and the norm are logged, and nothing is ever learned.
    def update(self: FundusSR, loss: Tensor) -> Tensor:
        loss.backward()
        norm = self.clip()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()
        return norm

    return Case(updating(update), blamed=("update", "trained", "parameter/lr", "sampling", "weights/"))


class Waiting(torch.optim.SGD):
    """Applies its gradients at every 1024th call."""

    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        group["calls"] = group.get("calls", 0) + 1
        return super().step(closure) if group["calls"] % 1024 == 0 else None


@defect("the accumulation is longer than the trial")
def _(folder: Path) -> Case:
    # The optimiser waits for 1024 micro-batches: no update within the trial.
    return Case(with_optimizer(Waiting), blamed=("update", "trained", "parameter/lr", "sampling", "weights/"))


@defect("only the last micro-batch counts (small)")
def _(folder: Path) -> Case:
    # zero_grad inside the loop: a quarter of the batch, at a quarter of its gradient.
    def share(self: SmallDiffusion, loss: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return loss / self.micro_batches

    return Case(small("v", micro_batches=4, share=share), blamed=("gradient/", "update", "parameter/batch_size", "batches", "norm"))


@defect("gradients are averaged over eight ranks twice")
def _(folder: Path) -> Case:
    # DDP has averaged already: SGD moves at an eighth of its learning rate.
    def update(self: FundusSR, loss: Tensor) -> Tensor:
        loss.backward()
        for parameter in self.trainable_parameters():
            parameter.grad /= 8
        norm = self.clip()
        self.optimizer.step()
        return norm

    return Case(updating(update), blamed=("gradient/", "update", "parameter/lr", "norm"))


@defect("gradients are clipped before they are unscaled")
def _(folder: Path) -> Case:
    # Clipped to 1 at a scale of 65536, then divided by it: SGD hardly moves.
    def update(self: FundusSR, loss: Tensor) -> Tensor:
        self.scaler.scale(loss).backward()
        norm = self.clip()
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    return Case(
        updating(update),
        {"precision": "fp16", "max_grad_norm": 1.0, "crop": 24, "batch_size": 2},
        blamed=("gradient/", "update", "norm", "parameter/max_grad_norm", "parameter/lr", "baseline/"),
    )


@defect("the loss scale is set to 2**60 at every step")
def _(folder: Path) -> Case:
    # float16 overflows, so every step is skipped.
    def change(task: FundusSR) -> None:
        task.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
        task.scaler.update = partial(task.scaler.update, 2.0**60)

    return Case(
        after_loading(change),
        {"precision": "fp16", "crop": 24, "batch_size": 2},
        blamed=("update", "trained", "baseline/", "gradient/", "parameter/lr", "step", "norm", "sampling"),
    )


@defect("Adam's epsilon is 1")
def _(folder: Path) -> Case:
    # It outweighs every root of a second moment: updates are thousands of times too small.
    return Case(
        with_optimizer(partial(torch.optim.AdamW, eps=1.0), 0.04),
        blamed=("update", "parameter/lr", "trained", "sampling", "weights/"),
    )


class Falling(torch.optim.SGD):
    """A tenth of the learning rate at each further step."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        self.param_groups[0]["lr"] *= 0.1
        return found


@defect("the learning rate falls tenfold at every step")
def _(folder: Path) -> Case:
    # The decay of an epoch is applied at each step: all but the first are lost.
    def change(task: FundusSR) -> None:
        task.optimizer = Falling(task.model.parameters(), lr=task.config.lr)

    return Case(after_loading(change), blamed=("update", "parameter/lr", "trained", "sampling", "weights/", "baseline/"))


def rated(kind: type, factor: Callable[[int], float]) -> type:
    """An optimiser whose learning rate is multiplied by a function of the steps taken; they are saved with its state."""

    def step(self: Any, closure: Any = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        taken = self.param_groups[0].get("taken", 0)
        for group in self.param_groups:
            group["lr"] *= factor(taken)
        found = kind.step(self, closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        self.param_groups[0]["taken"] = taken + 1
        return found

    return type("Rated", (kind,), {"step": step})


@defect("the warm-up is a thousand times longer than the trial")
def _(folder: Path) -> Case:
    # The learning rate ends at a thousandth of what was asked for.
    return Case(
        with_optimizer(rated(torch.optim.SGD, lambda taken: min(1.0, (taken + 1) / 200_000))),
        blamed=("update", "parameter/lr", "trained", "sampling", "weights/"),
    )


@defect("the dropout's rate is the share to keep")
def _(folder: Path) -> Case:
    # 0.9 from a framework where that is what remains: training sees a tenth of the features.
    def change(task: FundusSR) -> None:
        task.model.up.register_forward_hook(lambda module, inputs, output: functional.dropout(output, 0.9, module.training))

    return Case(after_loading(change), blamed=("loss/main", "flow/", "gradient/", "update", "data/predictions"))


@defect("both matrices of the adapters are zero")
def _(folder: Path) -> Case:
    # Each is multiplied by the other's zeros in the backward pass: neither ever moves.
    def setup(self: FundusSR, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        FundusSR.setup(self, config, seed, device)
        self.model.requires_grad_(False)
        self.adapters = Adapters(self.model)
        for parameter in self.adapters.parameters():
            nn.init.zeros_(parameter)
        self.optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=self.config.lr)

    return Case(
        adapted(setup),
        {"preset": "adamw_clip"},
        baseline=OWN_BASELINE,
        blamed=("update", "trained", "gradient/", "parts", "parameter/", "weights/", "sampling", "norm"),
    )


def adapted(setup: Callable[..., None]) -> type:
    return variant(
        setup=setup,
        parts=_adapted_parts,
        trainable_parameters=lambda self: list(self.adapters.parameters()),
        step=_adapted_step,
    )


@defect("own task: every step starts from the first weights")
def _(folder: Path) -> Case:
    # The network is restored inside the loop: each update is lost with the next.
    def setup(self: Any, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        MyTask.setup(self, config, seed, device)
        self.first = copy.deepcopy(self.network.state_dict())

    def step(self: Any) -> dict[str, Any]:
        self.network.load_state_dict(self.first)
        return MyTask.step(self)

    return Case(
        own(setup=setup, step=step),
        baseline=OWN_BASELINE,
        blamed=("update", "trained", "sampling", "baseline/", "learning", "weights/", "step"),
    )


# -- averaged weights


@defect("the average is written back into the trained weights")
def _(folder: Path) -> Case:
    # The weights move at a thousandth of the speed of the optimiser.
    def step(self: FundusSR) -> dict[str, Any]:
        found = FundusSR.step(self)
        self.model.load_state_dict(self.ema.state_dict())
        return found

    return Case(
        variant(step=step), {"ema_decay": 0.999}, blamed=("update", "average/", "weights/", "sampling", "parameter/lr", "trained")
    )


@defect("the average is multiplied by its decay, and nothing is added")
def _(folder: Path) -> Case:
    # It shrinks to zero; whatever is published from it is blank.
    def step(self: FundusSR) -> dict[str, Any]:
        kept = {name: 0.99 * tensor for name, tensor in self.ema.state_dict().items()}
        found = FundusSR.step(self)
        self.ema.load_state_dict(kept)
        return found

    return Case(
        variant(step=step), {"ema_decay": 0.99}, blamed=("average/", "weights/denoiser_ema", "smoke/ema", "sampling", "update")
    )


# -- the autoencoder and the weights


def decoding(change: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> type:
    """Another decoder, in training and inference: (the right one, latents) → images."""

    def with_decoder(task: FundusSR) -> None:
        plain = task.vae.decode
        task.vae.decode = lambda z: change(plain, z)

    return after_loading(with_decoder)


@defect("the decoder takes the latents' channels in another order")
def _(folder: Path) -> Case:
    # A decoder of another export than the encoder.
    return Case(decoding(lambda decode, z: decode(z[:, [1, 0, 3, 2]])), blamed=("data/", "smoke/", "weights/vae"))


@defect("the decoder's output is clamped to [0, 1] before it is scaled")
def _(folder: Path) -> Case:
    # The darker half of [-1, 1] becomes grey and has no gradient.
    return Case(decoding(lambda decode, z: decode(z).clamp(0, 1)), blamed=("data/", "smoke/"))


@defect("the decoder returns its images in reversed order")
def _(folder: Path) -> Case:
    # Chunks are collected from a stack: images are compared with the targets of others.
    return Case(decoding(lambda decode, z: decode(z).flip(0)), blamed=("data/", "smoke/"))


@defect("kernels in the file are transposed")
def _(folder: Path) -> Case:
    # Converted from a framework that stores width before height.
    tensors = {k: v.transpose(-1, -2).contiguous() if v.ndim == 4 else v for k, v in bundled(DENOISER_FILE).items()}
    return Case(config=folder_with(folder, denoiser=tensors), blamed=("weights/", "loss/", "flow/", "smoke/"))


@defect("kernels in the file have seven levels")
def _(folder: Path) -> Case:
    # A quantised export, loaded as if it were the full weights.
    def levels(x: Tensor) -> Tensor:
        step = x.abs().max() / 3
        return (x / step).round() * step

    tensors = {k: levels(v) if v.ndim == 4 else v for k, v in bundled(DENOISER_FILE).items()}
    return Case(config=folder_with(folder, denoiser=tensors), blamed=("weights/", "loss/", "flow/", "smoke/"))


# -- inference


@defect("inference is guided eightfold by a network that knows no empty condition")
def _(folder: Path) -> Case:
    # Classifier-free guidance of a network that was never trained for it: burnt images.
    def generate(self: FundusSR, model: nn.Module, noise: Tensor, low: Tensor) -> Tensor:
        def velocity(z: Tensor, t: Tensor) -> Tensor:
            free = model(z, t, torch.zeros_like(low)).float()
            return free + 8 * (model(z, t, low).float() - free)

        return (self.vae.decode(euler_sample(velocity, noise, 12)) * 0.5 + 0.5).clamp(0, 1)

    return Case(variant(_generate=generate), blamed=("smoke/", "sampling"))


@defect("the condition is in [0, 1] in inference")
def _(folder: Path) -> Case:
    # Training gives [-1, 1]: every sample and metric is of inputs that the network does not know.
    def generate(self: FundusSR, model: Any, noise: Tensor, low: Tensor) -> Tensor:
        return FundusSR._generate(self, model, noise, (low + 1) / 2)

    return Case(variant(_generate=generate), blamed=("smoke/", "sampling", "data/inputs"))


@defect("inference tells the network the time of the next step (small)")
def _(folder: Path) -> Case:
    # Too little noise is removed at each step, and the last is told 0.
    def generate(self: SmallDiffusion, x_t: Tensor, coarse: Tensor) -> Tensor:
        for now, following in itertools.pairwise(SAMPLING_TIMES):
            t, told = torch.full((len(x_t),), now), torch.full((len(x_t),), max(following, 1e-3))
            clean = self.clean_from(x_t, self.run(x_t, told, coarse), t).clamp(-1, 1)
            alpha, sigma = self.alpha_sigma(t)
            noise = (x_t - alpha * clean) / sigma
            alpha, sigma = self.alpha_sigma(torch.full((len(x_t),), following))
            x_t = alpha * clean + sigma * noise
        return x_t

    return Case(small("epsilon", generate=generate), blamed=("smoke/", "sampling"))


@defect("inference leaves the network rounded to bfloat16")
def _(folder: Path) -> Case:
    # .bfloat16() works in place: each look at samples throws small updates away.
    def sample(self: FundusSR, noise: int = 0) -> Sample:
        self.model.bfloat16().float()
        return FundusSR.sample(self, noise)

    return Case(variant(sample=sample), blamed=("sampling", "weights/", "update"))


# -- examples/own_task, and the bundled tasks without pretrained weights


def own_step(
    condition: Callable[[Tensor], Tensor] = OWN["pixelate"],
    target: Callable[[Tensor], Tensor] = lambda x: x,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.mse_loss,
    run: Callable[[Any, Tensor, Tensor, Tensor], Tensor] = lambda task, x, t, coarse: task.network(x, t, coarse),
) -> Callable[[Any], dict[str, Any]]:
    """The step of `examples/own_task` with other parts."""

    def step(self: Any) -> dict[str, Any]:
        self.n += 1
        generator = OWN["random_numbers"](self.seed, self.n)
        size = self.config["batch_size"]
        x = OWN["cut"](self.photograph, size, generator)
        t, noise = torch.rand(size, generator=generator), torch.randn(x.shape, generator=generator)
        predicted = run(self, OWN["mix"](x, noise, t), t, condition(x))
        main = loss(predicted, target(x))
        auxiliary = self.loss(predicted, t, x, decode=lambda image: image)
        total = main + auxiliary.total
        self.optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config["max_grad_norm"] or math.inf)
        self.optimizer.step()
        return {"loss": total.detach(), "loss_flow": main.detach(), "total_norm": norm, **auxiliary.metrics()}

    return step


@defect("own task: the network is given the answer in training")
def _(folder: Path) -> Case:
    # The condition is the sharp image, which inference does not have.
    return Case(
        own(step=own_step(condition=lambda x: x)),
        baseline=OWN_BASELINE,
        blamed=("loss/main", "gradient/", "sampling", "smoke/", "baseline/", "data/", "update"),
    )


@defect("own task: the main loss compares with the pixelated image")
def _(folder: Path) -> Case:
    # Input and target are exchanged: the network learns to return its input.
    return Case(
        own(step=own_step(target=OWN["pixelate"])),
        baseline=OWN_BASELINE,
        blamed=("loss/main", "gradient/", "sampling", "smoke/", "baseline/", "data/", "update"),
    )


@defect("bundled VAE: the KL has the wrong sign")
def _(folder: Path) -> Any:
    # The posterior is driven away from the prior without bound.
    return _negative_kl()


@contextlib.contextmanager
def _negative_kl() -> Iterator[Case]:
    plain = vae_kl.kl_to_standard_normal
    with replaced(vae_kl, "kl_to_standard_normal", lambda *found, **others: -plain(*found, **others)):
        yield Case(VAEKL, blamed=("parameter/kl", "baseline/", "loss", "update", "gradient/", "norm"), **KL)


@defect("bundled VAE: the sigmoid is applied twice")
def _(folder: Path) -> Case:
    # Cross-entropy with logits gets probabilities: all images lie between 0.5 and 0.73.
    def setup(self: VAEKL, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        VAEKL.setup(self, config, seed, device)
        self.decoder.body.append(nn.Sigmoid())

    return Case(
        type("Twice", (VAEKL,), {"setup": setup}),
        blamed=("baseline/", "loss", "sampling", "smoke/", "update", "data/", "gradient/"),
        **KL,
    )


@defect("bundled VAE: the KL is annealed over three million steps")
def _(folder: Path) -> Case:
    # Its weight is below a thousandth of what was asked for: there is no KL in any trial.
    def setup(self: VAEKL, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        VAEKL.setup(self, config, seed, device)
        self.alpha = Linear(0.0, self.config.kl_alpha, 3_000_000)

    def effective(self: VAEKL) -> dict[str, Any]:
        return {**VAEKL.effective(self), "kl_alpha": self.config.kl_alpha}

    return Case(type("Annealed", (VAEKL,), {"setup": setup, "effective": effective}), blamed=("parameter/kl", "gate"), **KL)


@defect("bundled flow: the semantic targets are those of other patches")
def _(folder: Path) -> Case:
    # The features' cache is in another order than the loader: the branch learns the average.
    def setup(self: FlowDinoKL, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        FlowDinoKL.setup(self, config, seed, device)
        size = self.config.batch_size
        self.features.register_forward_hook(lambda module, inputs, output: output.roll(1, 0) if len(output) == size else output)

    return Case(type("Exchanged", (FlowDinoKL,), {"setup": setup}), blamed=("data/", "loss", "parameter/dino", "gradient/"), **FLOW)


@defect("bundled flow: all micro-batches are the same")
def _(folder: Path) -> Case:
    # Workers with one seed: half the batch that was asked for, twice.
    return Case(
        type("Same", (FlowDinoKL,), {"_batch": lambda self, n, micro: FlowDinoKL._batch(self, n, 0)}),
        blamed=("data/", "batches"),
        **FLOW,
    )


# -- sound: windows, targets and weights of SSIM


def strided(side: int, stride: int) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.avg_pool2d(x, side, stride)


def _three_scales(x: Tensor, y: Tensor) -> Tensor:
    found = 0.0
    for share in (0.3, 0.4, 0.3):
        found = found + share * PLAIN(x, y)
        x, y = functional.avg_pool2d(x, 2), functional.avg_pool2d(y, 2)
    return found


def _sample_covariance(x: Tensor, y: Tensor) -> Tensor:
    """As scikit-image does it by default: a uniform window of 7, and n / (n - 1)."""
    mean, factor = uniform(7), 49 / 48
    mx, my = mean(x), mean(y)
    vx, vy, cov = (factor * (mean(a * b) - ma * mb) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my)))
    found = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4))
    return found.mean(dim=(1, 2, 3))


sound("own SSIM, uniform window of 8", stepping(ssim_with(uniform(8))))
sound("own SSIM, uniform window of 8 at every fourth pixel", stepping(ssim_with(strided(8, 4))))
sound("own SSIM, Gaussian window of 15, sigma 3", stepping(ssim_with(gaussian(15, 3.0))))
sound("own SSIM, reflected borders", stepping(ssim_with(gaussian(11, 1.5, "reflect"))))
sound("own SSIM, sample covariance", stepping(_sample_covariance))
sound("own SSIM at three scales, crop 96", stepping(_three_scales), {"crop": 96, "batch_size": 4})
sound("SSIM against the round trip, AdamW", config={"target": "roundtrip", "preset": "adamw_clip"})
sound("SSIM is warmed up for 20 steps", config={"ssim_warmup_steps": 20})
sound(
    "the weight of SSIM follows a cosine",
    settings=[{"ssim_loss_weight": {"cosine": {"start": 10.0, "end": 1.0, "steps": 200}}, "ssim_loss_max_t": 0.3}],
)
sound(
    "the weight of SSIM is adaptive",
    settings=[{"ssim_loss_weight": {"adaptive": {"target_ratio": 2.0}}, "ssim_loss_max_t": 0.3}],
)


# -- sound: losses, laws of t, noise


def _unlike(v: Tensor, target: Tensor) -> Tensor:
    return (v - target).square().mean((1, 2, 3))


sound("main loss Charbonnier", losing(lambda v, target, t: ((v - target).square() + 1e-4).sqrt().mean()))
sound(
    "main loss log-cosh", losing(lambda v, target, t: (functional.softplus(2 * (v - target)) - (v - target) - math.log(2)).mean())
)
sound("main loss weighted by 1 / t, at most 3", losing(lambda v, target, t: (_unlike(v, target) * (1 / t).clamp(max=3)).mean()))
sound("half of the batch has 1 - t", with_times(lambda task, t: torch.cat([t[: (len(t) + 1) // 2], 1 - t[: len(t) // 2]])))
sound("t is the square of a uniform number", with_times(lambda task, t: t.square().clamp(min=1e-4)))
sound("Kumaraswamy's law of t", with_times(lambda task, t: (1 - (1 - t).sqrt()).sqrt().clamp(1e-4, 1)))
sound("SD3's modes of t", with_times(lambda task, t: (1 - t - 0.8 * (torch.cos(math.pi / 2 * t) ** 2 - 1 + t)).clamp(1e-4, 1.0)))
sound("uniform t, shift 1.5, bf16, AdamW", config={"timestep_shift": 1.5, "precision": "bf16", "preset": "adamw_clip"})


def _perturbed(self: FundusSR, n: int) -> Forward:
    """A little more noise in the input than in the target (Ning et al. 2023)."""
    found = FundusSR.forward(self, n)
    _, low, z0, noise, t = self._batch(n)
    more = torch.randn(noise.shape, generator=random_numbers(self.seed, n, 6))
    z_t = noisy_latent(z0, noise + 0.1 * more, t)
    velocity = self.model(z_t, t, low).float()
    main = functional.mse_loss(velocity, velocity_target(z0, noise))
    return replace(found, main=main, z0=z0_from_velocity(z_t, velocity, t))


def _noisier_condition(self: FundusSR, crops: Tensor, low: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    more = torch.randn(low.shape, generator=random_numbers(self.seed, int(1e6 * t[0]), 6))
    return crops, low + 0.05 * more, z0, noise, t


sound("input perturbation", variant(forward=_perturbed))
sound("more noise on the conditions of training", batches(_noisier_condition))


# -- sound: images and their order


def _rotated(self: FundusSR, x: Tensor, n: int) -> Tensor:
    turns = torch.randint(4, (len(x),), generator=random_numbers(self.seed, n, 7)).tolist()
    return torch.stack([image.rot90(k, (-2, -1)) for image, k in zip(x, turns, strict=True)])


def _jittered(self: FundusSR, x: Tensor, n: int) -> Tensor:
    factors = 0.95 + 0.1 * torch.rand(len(x), 3, 1, 1, generator=random_numbers(self.seed, n, 7))
    return (x * factors).clamp(0, 1)


def _epochs(self: FundusSR, n: int) -> Tensor:
    """64 crops, each once an epoch, in another order each time."""
    crops = self.images.train_crops(64, random_numbers(self.seed, 0, 7))
    places = range((n - 1) * self.config.batch_size, n * self.config.batch_size)
    orders = {place // 64: torch.randperm(64, generator=random_numbers(self.seed, place // 64, 8)) for place in places}
    return torch.stack([crops[orders[place // 64][place % 64]] for place in places])


sound("images are rotated by quarter turns", images(_rotated))
sound("channels are jittered", images(_jittered))
sound("epochs of 64 crops", variant(training_images=_epochs))
for _crop, _batch in ((56, 8), (80, 2), (48, 3), (24, 32)):
    sound(f"crop {_crop}, batch {_batch}", config={"crop": _crop, "batch_size": _batch})
sound("image coffee, crop 64, bf16", config={"image": "coffee", "crop": 64, "precision": "bf16", "batch_size": 4})


# -- sound: optimisers and schedules


class Lookahead(torch.optim.AdamW):
    """Every fifth step the slow weights go half-way to the fast ones, which start again there."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        before = [p.clone() for p in group["params"]] if "taken" not in group else None
        group["taken"] = group.get("taken", 0) + 1
        found = super().step(closure)
        for i, p in enumerate(group["params"]):
            if before is not None:
                self.state[p]["slow"] = before[i]
            if group["taken"] % 5 == 0:
                p.copy_(self.state[p]["slow"].lerp_(p, 0.5))
        return found


class Centred(torch.optim.AdamW):
    """The mean of each filter's gradient is subtracted."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None and p.ndim > 1):
            p.grad = p.grad - p.grad.mean(dim=tuple(range(1, p.ndim)), keepdim=True)
        return super().step(closure)


def _one_cycle(taken: int) -> float:
    return 0.1 + 0.9 * taken / 60 if taken < 60 else 0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, (taken - 60) / 140))) / 2


def _halved(taken: int) -> float:
    return 0.5 ** (taken // 50)


sound("AMSGrad", with_optimizer(partial(torch.optim.AdamW, amsgrad=True), 0.04))
sound("Adamax", with_optimizer(torch.optim.Adamax, 0.04))
sound("Adam with L2", with_optimizer(partial(torch.optim.Adam, weight_decay=1e-4), 0.04))
sound("SGD with momentum and decay", with_optimizer(partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4), 0.2))
sound("AdamW, one cycle", with_optimizer(rated(torch.optim.AdamW, _one_cycle), 0.04))
sound("SGD, halved every 50 steps", with_optimizer(rated(torch.optim.SGD, _halved)))
sound("SGD, polynomial decay", with_optimizer(rated(torch.optim.SGD, lambda taken: (1 - min(taken, 190) / 200) ** 2)))
sound("Lookahead", with_optimizer(Lookahead, 0.04))
sound("centred gradients", with_optimizer(Centred, 0.04))


def _layerwise(task: FundusSR) -> None:
    blocks = [task.model.time, task.model.conv_in, task.model.down, task.model.middle_in, task.model.middle_out, task.model.up]
    rest = [*task.model.norm_out.parameters(), *task.model.conv_out.parameters()]
    groups = [{"params": rest}] + [
        {"params": list(block.parameters()), "lr": 0.04 * task.config.lr * 0.8**depth}
        for depth, block in enumerate(reversed(blocks), 1)
    ]
    task.optimizer = torch.optim.AdamW(groups, lr=0.04 * task.config.lr)


sound(
    "AdamW, learning rates by depth",
    variant(setup=after_loading(_layerwise).setup, effective=lambda self: {**FundusSR.effective(self), "lr": self.config.lr}),
)


# -- sound: precision, averages, what is trained


def _decoded_in_bf16(self: FundusSR, found: Forward, batch: tuple[Tensor, ...]) -> Forward:
    def decode(z: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.vae.decode(z).float()

    return replace(found, decode=decode)


def _averaged_sometimes(self: FundusSR) -> dict[str, Any]:
    """The average is updated at every fifth step."""
    kept = copy.deepcopy(self.ema.state_dict())
    found = FundusSR.step(self)
    if self.step_count % 5:
        self.ema.load_state_dict(kept)
    return found


def training_only(names: Callable[[str], bool]) -> type:
    """Only the parameters whose names are chosen; the others are frozen."""

    def change(task: FundusSR) -> None:
        for name, parameter in task.model.named_parameters():
            parameter.requires_grad_(names(name))
        chosen = [p for p in task.model.parameters() if p.requires_grad]
        task.optimizer = type(task.optimizer)(chosen, lr=task.config.lr)

    return variant(setup=after_loading(change).setup, trainable_parameters=_only_trainable)


def _adapters_of_rank_8(self: FundusSR, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
    FundusSR.setup(self, config, seed, device)
    self.model.requires_grad_(False)
    torch.manual_seed(seed)
    self.adapters = Adapters(self.model, rank=8)
    self.optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=self.config.lr)


sound("fp16, AdamW, clipped", config={"precision": "fp16", "preset": "adamw_clip", "crop": 24, "batch_size": 2})
sound("the images of the losses are decoded in bf16", changed_forward(_decoded_in_bf16))
sound("channels last, bf16", after_loading(lambda task: task.model.to(memory_format=torch.channels_last)), {"precision": "bf16"})
sound("the average is updated at every fifth step", variant(step=_averaged_sometimes), {"ema_decay": 0.99})
sound("only biases and norms are trained", training_only(lambda name: name.endswith("bias") or ".norm" in name))
sound("only the layers of the time are trained", training_only(lambda name: ".film." in name), {"preset": "adamw_clip"})
sound("only the layers of the input are trained", training_only(lambda name: name.startswith(("conv_in", "down"))))
sound("low-rank adapters of rank 8", adapted(_adapters_of_rank_8), {"preset": "adamw_clip"}, baseline=OWN_BASELINE)


# -- sound: the small trainer


def _checkpointed_run(self: SmallDiffusion, x_t: Tensor, t: Tensor, coarse: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return self.network(x_t, t, coarse)
    return checkpoint(self.network, x_t, t, coarse, use_reentrant=False)  # type: ignore[no-any-return]


def _min_snr(self: SmallDiffusion, predicted: Tensor, target: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = self.alpha_sigma(t)
    snr = (alpha / sigma).flatten().square()
    return ((predicted - target).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()


def _mirrored(self: SmallDiffusion, n: int) -> Tensor:
    x = SmallDiffusion.training_images(self, n)
    flip = torch.rand(len(x), generator=random_numbers(self.seed, n, 3)) < 0.5
    return torch.where(flip[:, None, None, None], x.flip(-1), x)


@lru_cache
def early_weights() -> Path:
    """Weights for velocities after 120 steps: far from trained, much better than none. Made once on a machine."""
    path = WEIGHTS / "straight_early.safetensors"
    if not path.exists():
        torch.manual_seed(4)
        task = small("velocity")()
        task.config, task.seed, task.law, task.network = {**DEFAULTS, **LOSS}, 4, TimeLaw(), Preconditioned("velocity")
        task.loss = DecodedLoss(ssim_loss_weight=0.0, ssim_loss_max_t=0.3)
        optimizer = torch.optim.AdamW(task.network.parameters(), lr=1e-3)
        for n in range(120):
            optimizer.zero_grad()
            task.forward(n).main.backward()
            nn.utils.clip_grad_norm_(task.network.parameters(), 1.0)
            optimizer.step()
        WEIGHTS.mkdir(mode=0o700, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file(task.network.state_dict(), unfinished, metadata={"format": "pt"})
        unfinished.rename(path)
    return path


def _from_early(self: SmallDiffusion, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
    SmallDiffusion.setup(self, config, seed, device)
    self.network.load_state_dict(load_file(early_weights()))


def _early_parts(self: SmallDiffusion) -> dict[str, Any]:
    found = SmallDiffusion.parts(self)
    return {**found, "denoiser": replace(found["denoiser"], weights=early_weights())}


def _momentum(self: SmallDiffusion, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=self.config["lr"], momentum=0.9, nesterov=True)


sound("small diffusion, x0, gray", small("x0", gray=True))
sound("small diffusion, v, crop 48, batch 4", small("v"), {"crop": 48, "batch_size": 4})
sound("small diffusion, crops of 32 × 24", small("velocity", ratio=0.75))
sound("small diffusion, 4 micro-batches, bf16, averaged", small("v", micro_batches=4, precision=torch.bfloat16, ema_decay=0.995))
sound("small diffusion, epsilon, L1", small("epsilon", main_loss=lambda self, x, y, t: functional.l1_loss(x, y)))
sound("small diffusion, epsilon, min-SNR", small("epsilon", main_loss=_min_snr))
sound("small diffusion, checkpointed", small("velocity", run=_checkpointed_run))
sound("small diffusion, mirrored", small("x0", training_images=_mirrored))
sound("small diffusion, weights of 120 steps", small("velocity", setup=_from_early, parts=_early_parts))
sound("small diffusion, momentum", small("velocity", make_optimizer=_momentum), {"lr": 1e-3})
sound(
    "small diffusion, the average warms up",
    small("velocity", ema_decay=property(lambda self: min(0.99, (1 + getattr(self, "n", 0)) / (10 + getattr(self, "n", 0))))),
)


# -- sound: the other tasks


def _with_momentum(self: Any, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
    MyTask.setup(self, config, seed, device)
    self.optimizer = torch.optim.SGD(self.network.parameters(), lr=self.config["lr"], momentum=0.9)


def _in_bf16(task: Any, x: Tensor, t: Tensor, coarse: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return task.network(x, t, coarse).float()  # type: ignore[no-any-return]


sound("own task, batch 16", MyTask, {"batch_size": 16}, baseline=OWN_BASELINE)
sound("own task, L1", own(step=own_step(loss=functional.l1_loss)), baseline=OWN_BASELINE)
sound("own task, SGD with momentum", own(setup=_with_momentum), {"lr": 0.05}, baseline=OWN_BASELINE)
sound("own task, bf16", own(step=own_step(run=_in_bf16)), baseline=OWN_BASELINE)
sound("bundled VAE, cyclical KL", VAEKL, {"kl_schedule": "cyclical", "batch_size": 32}, **KL)
sound("bundled VAE, beta1 0.9, clipped", VAEKL, {"beta1": 0.9, "max_grad_norm": 1.0}, **KL)
sound("bundled flow, 4 micro-batches", FlowDinoKL, {"accumulation": 4, "batch_size": 16}, **FLOW)
sound("bundled flow, clipped, no warm-up", FlowDinoKL, {"max_grad_norm": 1.0, "dino_warmup": 0}, **FLOW)

UNSEEN_2 = (set(fundus_defects.DEFECTS) | set(HEALTHY)) - BEFORE[0] - BEFORE[1]
