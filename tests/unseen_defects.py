"""Set-ups written without reading the checks: kinds of defects that no check was tuned on, and sound set-ups of other shapes.

On the bundled task, on `examples/own_task`, and on the small diffusion trainer of `small_diffusion`. The result of their first run,
before any check was changed because of it, is in `benchmarks/results/preflight_unseen_first_run.json`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fundus_defects
import torch
from effect_defects import altered, gaussian, sampling, ssim_with, targeting, uniform
from fundus_defects import HEALTHY, Case, after_loading, defect, stepping, variant
from held_apart_defects import with_optimizer
from small_diffusion import SmallDiffusion, random_numbers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tune_ssim.losses import noisy_latent, scale_gradient, velocity_target, z0_from_velocity
from tune_ssim.probes import total_norm
from tune_ssim.tasks.flow_dino_kl import FlowDinoKL
from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.tasks.vae_kl import VAEKL
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.training import Forward, Part, Sample

OWN_TASK = Path(__file__).parents[1] / "examples" / "own_task"
MyTask: Any = load_task("task:MyTask", str(OWN_TASK))
BEFORE = set(fundus_defects.DEFECTS), set(HEALTHY)
OWN_BASELINE = {"pixel_loss_weight": 0.05, "pixel_loss_max_t": 0.3}


def small(predicts: str = "epsilon", **changes: Any) -> type:
    """The small diffusion trainer with attributes and methods replaced."""
    return type("Small", (SmallDiffusion,), {"predicts": predicts, **changes})


def own(**changes: Any) -> type:
    return type("Own", (MyTask,), changes)


def batches(change: Callable[..., tuple[Tensor, ...]]) -> type:
    """Training batches (crops, low, z0, noise, t) changed; inference is not."""
    return variant(_batch=lambda self, n: change(self, *FundusSR._batch(self, n)))


# -- the path from image to noise and back


@defect("z0 divides by alpha squared (DDPM)")
def _(folder: Path) -> Case:
    def clean_from(self: SmallDiffusion, x_t: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return (x_t - sigma * predicted) / alpha**2

    return Case(small(clean_from=clean_from), blamed=("flow/z0", "data/", "smoke/"))


@defect("training mixes with another schedule than that of the weights (DDPM)")
def _(folder: Path) -> Case:
    def alpha_sigma(self: SmallDiffusion, t: Tensor) -> tuple[Tensor, Tensor]:
        beta = t.view(-1, 1, 1, 1) ** 3
        return (1 - beta).sqrt(), beta.sqrt()

    return Case(small(alpha_sigma=alpha_sigma), blamed=("loss/main", "flow/", "smoke/", "data/"))


@defect("inference takes a v prediction for an epsilon prediction")
def _(folder: Path) -> Case:
    def generate(self: SmallDiffusion, x_t: Tensor, coarse: Tensor) -> Tensor:
        self.predicts = "epsilon"
        try:
            return SmallDiffusion.generate(self, x_t, coarse)
        finally:
            self.predicts = "v"

    return Case(small("v", generate=generate), blamed=("smoke/", "sampling"))


@defect("training takes an epsilon prediction for one of x0")
def _(folder: Path) -> Case:
    def setup(self: SmallDiffusion, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        SmallDiffusion.setup(self, config, seed, device)
        self.network.predicts = "epsilon"

    return Case(small("x0", setup=setup), blamed=("weights/", "loss/main", "flow/", "smoke/", "data/"))


@defect("the velocity target has the wrong sign")
def _(folder: Path) -> Case:
    def forward(self: FundusSR, n: int) -> Forward:
        found = FundusSR.forward(self, n)
        _, low, z0, noise, t = self._batch(n)
        velocity = self.model(noisy_latent(z0, noise, t), t, low).float()
        target = z0 - noise
        return replace(found, main=functional.mse_loss(velocity, target), velocity_target=target)

    return Case(variant(forward=forward), blamed=("loss/main", "flow/"))


@defect("the noise is the same for all images of a batch")
def _(folder: Path) -> Case:
    return Case(
        batches(lambda self, crops, low, z0, noise, t: (crops, low, z0, noise[:1].expand_as(noise).clone(), t)),
        blamed=("data/", "flow/"),
    )


@defect("the noise is uniform in [0, 1]")
def _(folder: Path) -> Case:
    def change(self: FundusSR, crops: Tensor, low: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return crops, low, z0, torch.special.ndtr(noise), t

    return Case(batches(change), blamed=("loss/main", "flow/", "data/"))


@defect("the noise is half as strong in training")
def _(folder: Path) -> Case:
    return Case(
        batches(lambda self, crops, low, z0, noise, t: (crops, low, z0, 0.5 * noise, t)), blamed=("loss/main", "flow/", "data/")
    )


@defect("the images of the loss are decoded without the latents' deviation")
def _(folder: Path) -> Case:
    def forward(self: FundusSR, n: int) -> Forward:
        return replace(FundusSR.forward(self, n), decode=lambda z: self.vae.decoder(z))

    return Case(variant(forward=forward), blamed=("data/", "flow/", "latents"))


# -- batches and conditions


@defect("the condition is empty in training")
def _(folder: Path) -> Case:
    return Case(
        batches(lambda self, crops, low, z0, noise, t: (crops, torch.zeros_like(low), z0, noise, t)),
        blamed=("data/inputs", "loss/main", "flow/"),
    )


@defect("the condition is mirrored in training")
def _(folder: Path) -> Case:
    return Case(
        batches(lambda self, crops, low, z0, noise, t: (crops, low.flip(-1), z0, noise, t)),
        blamed=("data/inputs", "loss/main", "flow/", "data/"),
    )


@defect("all images of a batch are the same crop")
def _(folder: Path) -> Case:
    def training_images(self: FundusSR, n: int) -> Tensor:
        crops = FundusSR.training_images(self, n)
        return crops[:1].expand_as(crops).clone()

    return Case(variant(training_images=training_images), blamed=("data/",))


@defect("the targets have 8 grey levels")
def _(folder: Path) -> Case:
    return Case(targeting(lambda crops, low: (crops * 7).round() / 7), blamed=("targets/", "data/"))


@defect("the targets are too grey")
def _(folder: Path) -> Case:
    return Case(targeting(lambda crops, low: crops.mean(1, keepdim=True).expand_as(crops)), blamed=("data/", "targets/"))


@defect("the held-out images are training images, enlarged by a quarter")
def _(folder: Path) -> Case:
    def enlarged(images: Tensor) -> Tensor:
        size = images.shape[-1]
        found = functional.interpolate(images, scale_factor=1.25, mode="bilinear", align_corners=False)
        return found[..., :size, :size]

    return Case(altered(enlarged), blamed=("data/overlap",))


# -- inference


@defect("inference ignores its noise")
def _(folder: Path) -> Case:
    def inputs(self: SmallDiffusion, noise: int) -> tuple[Tensor, Tensor, Tensor]:
        images, coarse, start = SmallDiffusion.inputs(self, 0)
        return images, coarse, torch.zeros_like(start)

    return Case(small("velocity", inputs=inputs), blamed=("sampling", "smoke/"))


@defect("inference makes one image for all inputs")
def _(folder: Path) -> Case:
    return Case(sampling(lambda task, noise, found: found.images[:1].expand_as(found.images)), blamed=("sampling", "smoke/"))


@defect("inference leaves the averaged weights in the network")
def _(folder: Path) -> Case:
    def sample(self: FundusSR, noise: int = 0) -> Sample:
        self.model.load_state_dict(self.ema.state_dict())
        return FundusSR.sample(self, noise)

    return Case(variant(sample=sample), {"ema_decay": 0.999}, blamed=("sampling", "weights/", "update"))


@defect("inference stops half-way")
def _(folder: Path) -> Case:
    def generate(self: FundusSR, model: nn.Module, noise: Tensor, low: Tensor) -> Tensor:
        z = noise
        for i in range(6):
            t = torch.full((len(z),), 1 - i / 12)
            z = z - model(z, t, low).float() / 12
        return (self.vae.decode(z) * 0.5 + 0.5).clamp(0, 1)

    return Case(variant(_generate=generate), blamed=("smoke/", "sampling"))


# -- updates


@defect("the learning rate's schedule is at its end from the first step")
def _(folder: Path) -> Case:
    def step(self: FundusSR) -> dict[str, Any]:
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.param_groups[0]["lr"] = 0.0
        try:
            return FundusSR.step(self)
        finally:
            self.optimizer.param_groups[0]["lr"] = rate

    return Case(variant(step=step), blamed=("update", "parameter/lr", "sampling", "trained", "weights/"))


@defect("micro-batches are added up, not averaged")
def _(folder: Path) -> Case:
    return Case(small(micro_batches=4, share=lambda self, loss: loss), blamed=("gradient/",))


@defect("the average of the weights never moves")
def _(folder: Path) -> Case:
    def step(self: FundusSR) -> dict[str, Any]:
        kept = copy.deepcopy(self.ema.state_dict())
        try:
            return FundusSR.step(self)
        finally:
            self.ema.load_state_dict(kept)

    return Case(
        variant(step=step), {"ema_decay": 0.9}, blamed=("update", "sampling", "weights/denoiser_ema", "smoke/ema", "average/")
    )


@defect("the average of the weights is pushed away from them")
def _(folder: Path) -> Case:
    return Case(small(ema_decay=1.5), blamed=("update", "sampling", "weights/denoiser_ema", "smoke/ema", "average/"))


@defect("a parameter group has learning rate 0")
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        first = list(task.model.middle_in.parameters()) + list(task.model.middle_out.parameters())
        others = [p for p in task.model.parameters() if not any(p is q for q in first)]
        task.optimizer = torch.optim.SGD([{"params": others}, {"params": first, "lr": 0.0}], lr=task.config.lr)

    return Case(after_loading(change), blamed=("update", "parts", "frozen", "trained", "gradient/", "weights/"))


@defect("half of the network runs under no_grad")
def _(folder: Path) -> Case:
    def change(task: FundusSR) -> None:
        plain = task.model.down.forward
        task.model.down.forward = lambda x, embedding: plain(x, embedding).detach()

    return Case(after_loading(change), blamed=("update", "parts", "frozen", "trained", "gradient/"))


@defect("weights held in bfloat16 lose the updates")
def _(folder: Path) -> Case:
    def step(self: FundusSR) -> dict[str, Any]:
        found = FundusSR.step(self)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.bfloat16())
        return found

    return Case(variant(step=step), {"lr": 5e-5}, blamed=("update", "weights/", "parameter/lr", "sampling"))


@defect("weight decay shrinks the network to nothing")
def _(folder: Path) -> Case:
    return Case(
        with_optimizer(partial(torch.optim.AdamW, weight_decay=2000.0), 0.04), blamed=("baseline/", "update", "smoke/", "sampling")
    )


@defect("every element of the gradient is clipped, not its norm")
def _(folder: Path) -> Case:
    def clip(self: FundusSR) -> Tensor:
        norm = total_norm(self.trainable_parameters())
        nn.utils.clip_grad_value_(self.trainable_parameters(), self.config.max_grad_norm or math.inf)
        return norm

    return Case(variant(clip=clip), {"preset": "adamw_clip"}, blamed=("parameter/max_grad_norm", "gradient/", "update"))


@defect("total_norm is the norm's square")
def _(folder: Path) -> Case:
    def step(self: FundusSR) -> dict[str, Any]:
        found = FundusSR.step(self)
        return {**found, "total_norm": found["total_norm"] ** 2}

    return Case(variant(step=step), blamed=("gradient/", "norm", "baseline/norm"))


@defect("total_norm is that of the last layer")
def _(folder: Path) -> Case:
    def clip(self: FundusSR) -> Tensor:
        return total_norm(self.model.conv_out.parameters())

    return Case(variant(clip=clip), blamed=("gradient/", "norm", "baseline/norm"))


# -- the SSIM


def own_ssim_step(similarity: Callable[..., Tensor], gate: Callable[[Tensor, float], Tensor]) -> type:
    """A step with an SSIM of its own: (decoded images, targets, size of the batch) → 0-d, and a gate of its own."""

    def step(self: FundusSR) -> dict[str, Any]:
        self.step_count += 1
        forward, loss = self.forward(self.step_count), self.loss
        active = gate(forward.t, loss.ssim_loss_max_t).nonzero().flatten()
        others = replace(loss, ssim_loss_weight=0.0)
        total = forward.main + forward.auxiliary(others).total
        if loss.ssim_loss_weight and len(active):
            x = scale_gradient(forward.decode(forward.z0[active]), loss.ssim_grad_scale)
            x = (x * 0.5 + 0.5).clamp(0, 1)
            total = total + loss.ssim_loss_weight * similarity(x, forward.targets[active], len(forward.t))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = self.clip()
        self.optimizer.step()
        fraction = len(active) / len(forward.t)
        return {"loss": total.detach(), "loss_flow": forward.main.detach(), "total_norm": norm, "ssim_active_fraction": fraction}

    return variant(step=step)


def _gate(t: Tensor, max_t: float) -> Tensor:
    return (t > 0) & (t <= torch.tensor(max_t))


PLAIN = ssim_with(gaussian(11, 1.5))


@defect("SSIM compares the prediction with itself")
def _(folder: Path) -> Case:
    return Case(
        own_ssim_step(lambda x, y, batch: (1 - PLAIN(x, x.detach())).mean(), _gate), blamed=("gradient/ssim", "parameter/ssim")
    )


@defect("SSIM is divided by the batch instead of the active images")
def _(folder: Path) -> Case:
    return Case(
        own_ssim_step(lambda x, y, batch: (1 - PLAIN(x, y)).sum() / batch, _gate),
        blamed=("gradient/ssim", "parameter/ssim_loss_max_t"),
    )


@defect("the gate compares thousandths with max_t")
def _(folder: Path) -> Case:
    return Case(
        own_ssim_step(lambda x, y, batch: (1 - PLAIN(x, y)).mean(), lambda t, max_t: (1000 * t).round() <= max_t),
        blamed=("gate", "gradient/ssim", "parameter/ssim"),
    )


@defect("SSIM gets the latents in place of the images")
def _(folder: Path) -> Case:
    def forward(self: FundusSR, n: int) -> Forward:
        crop = self.config.crop
        return replace(
            FundusSR.forward(self, n), decode=lambda z: functional.interpolate(z[:, :3], size=(crop, crop), mode="bilinear")
        )

    return Case(variant(forward=forward), blamed=("data/", "flow/z0", "targets/"))


# -- examples/own_task


@defect("own task: samples are the references")
def _(folder: Path) -> Case:
    def sample(self: MyTask, noise: int = 0) -> Sample:
        return Sample(self.held_out.clone(), references=self.held_out)

    return Case(own(sample=sample), baseline=OWN_BASELINE, blamed=("sampling",))


@defect("own task: the weight of SSIM is lost")
def _(folder: Path) -> Case:
    def setup(self: MyTask, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        MyTask.setup(self, config, seed, device)
        self.loss = replace(self.loss, ssim_loss_weight=0.0)

    def effective(self: MyTask) -> dict[str, Any]:
        return {**MyTask.effective(self), "ssim_loss_weight": self.config["ssim_loss_weight"]}

    return Case(own(setup=setup, effective=effective), baseline=OWN_BASELINE, blamed=("parameter/ssim",))


@defect("own task: the seed is not used")
def _(folder: Path) -> Case:
    def step(self: MyTask) -> dict[str, Any]:
        self.seed = int(torch.randint(10**6, (1,), generator=None))
        return MyTask.step(self)

    return Case(own(step=step), baseline=OWN_BASELINE, blamed=("seeds/same", "batches"))


@defect("own task: the optimiser climbs")
def _(folder: Path) -> Case:
    def setup(self: MyTask, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        MyTask.setup(self, config, seed, device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.config["lr"], maximize=True)

    return Case(own(setup=setup), baseline=OWN_BASELINE, blamed=("update", "baseline/"))


# -- sound: windows and SSIMs


def sound(name: str, task: type = FundusSR, config: Mapping[str, Any] | None = None, **others: Any) -> None:
    assert name not in HEALTHY
    HEALTHY[name] = Case(task, config or {}, **others)


def _two_scales(x: Tensor, y: Tensor) -> Tensor:
    halves = (functional.avg_pool2d(image, 2) for image in (x, y))
    return 0.5 * PLAIN(x, y) + 0.5 * ssim_with(gaussian(7, 1.0))(*halves)


for _side in (5, 9):
    sound(f"own SSIM, uniform window of {_side}", stepping(ssim_with(uniform(_side))))
for _side, _sigma in ((5, 0.8), (9, 1.5), (11, 2.5)):
    sound(f"own SSIM, Gaussian window of {_side}, sigma {_sigma}", stepping(ssim_with(gaussian(_side, _sigma))))
sound("own SSIM at two scales", stepping(_two_scales))
sound("own SSIM in float64", stepping(lambda x, y: PLAIN(x.double(), y.double()).float()))
sound("own SSIM, denoiser in bf16", stepping(PLAIN), {"precision": "bf16"})
sound("own SSIM and gate, AdamW, clipped", own_ssim_step(lambda x, y, n: (1 - PLAIN(x, y)).mean(), _gate), {"preset": "adamw_clip"})


# -- sound: losses and laws of t


def losing(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> type:
    """Another main loss of (velocity, its target, t)."""

    def forward(self: FundusSR, n: int) -> Forward:
        found = FundusSR.forward(self, n)
        _, low, z0, noise, t = self._batch(n)
        z_t = noisy_latent(z0, noise, t)
        with self._autocast():
            velocity = self.model(z_t, t, low)
        velocity = velocity.float()
        return replace(found, main=loss(velocity, velocity_target(z0, noise), t), z0=z0_from_velocity(z_t, velocity, t))

    return variant(forward=forward)


def with_times(times: Callable[[FundusSR, Tensor], Tensor]) -> type:
    """Another law of t, not declared; from the uniform one."""
    changed = batches(lambda self, crops, low, z0, noise, t: (crops, low, z0, noise, times(self, t)))

    def setup(self: FundusSR, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        FundusSR.setup(self, config, seed, device)
        self.drawn, self.time_law = self.time_law, None

    def batch(self: FundusSR, n: int) -> tuple[Tensor, ...]:
        self.time_law = self.drawn
        try:
            return changed._batch(self, n)
        finally:
            self.time_law = None

    return variant(setup=setup, _batch=batch)


sound("main loss L1", losing(lambda v, target, t: functional.l1_loss(v, target)))
sound("main loss Huber", losing(lambda v, target, t: functional.huber_loss(v, target, delta=0.5)))
sound("main loss weighted by t", losing(lambda v, target, t: ((v - target).square().mean((1, 2, 3)) * (0.5 + t)).mean()))
sound(
    "logit-normal t, not declared",
    with_times(lambda task, t: torch.sigmoid(-0.5 + 0.8 * torch.special.ndtri(t.clamp(1e-4, 1 - 1e-4)))),
)
sound("cosine law of t, not declared", with_times(lambda task, t: (1 - torch.cos(math.pi * t)) / 2))
sound("t in 50 levels", with_times(lambda task, t: ((t * 50).ceil() / 50).clamp(0.02, 1)))
sound("stratified t", with_times(lambda task, t: (torch.arange(len(t)) + t) / len(t)))
sound("one t for the whole batch", with_times(lambda task, t: t[:1].expand(len(t)).clone()))
sound("t is never below 0.02", with_times(lambda task, t: 0.02 + 0.98 * t))


def _offset(self: FundusSR, crops: Tensor, low: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    shift = torch.randn(*noise.shape[:2], 1, 1, generator=random_numbers(self.seed, int(1e6 * t[0])))
    return crops, low, z0, noise + 0.1 * shift, t


sound("offset noise", batches(_offset))


def _without_condition(self: FundusSR, crops: Tensor, low: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    dropped = (1000 * t).frac() < 0.1
    return crops, torch.where(dropped[:, None, None, None], torch.zeros_like(low), low), z0, noise, t


sound("a tenth of the conditions is dropped", batches(_without_condition))


def _brighter(self: FundusSR, n: int) -> Tensor:
    crops = FundusSR.training_images(self, n)
    factors = 0.9 + 0.2 * torch.rand(len(crops), 1, 1, 1, generator=random_numbers(self.seed, n, 9))
    return (crops * factors).clamp(0, 1)


sound("brightness is augmented", variant(training_images=_brighter))


# -- sound: optimisers and schedules


class Lion(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                first, second = group["betas"]
                p.add_(torch.sign(average * first + p.grad * (1 - first)), alpha=-group["lr"])
                average.mul_(second).add_(p.grad, alpha=1 - second)


class Scheduled(torch.optim.AdamW):
    """A cosine schedule of 200 steps."""

    def step(self, closure: Any = None) -> Any:
        self.taken = getattr(self, "taken", -1) + 1
        rate = self.param_groups[0]["lr"]
        self.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * min(1.0, self.taken / 200))) / 2
        found = super().step(closure)
        self.param_groups[0]["lr"] = rate
        return found


def _grouped(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    listed = list(parameters)
    matrices, vectors = [p for p in listed if p.ndim > 1], [p for p in listed if p.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=lr)


sound("Lion", with_optimizer(Lion, 0.01))
sound("NAdam", with_optimizer(torch.optim.NAdam, 0.04))
sound("RAdam", with_optimizer(torch.optim.RAdam, 0.04))
sound("Adagrad", with_optimizer(torch.optim.Adagrad, 0.04))
sound("AdamW, cosine schedule", with_optimizer(Scheduled, 0.04))
sound("AdamW, no decay of norms and biases", with_optimizer(_grouped, 0.04))
sound(
    "AdamW, beta2 0.95, bf16, averaged",
    with_optimizer(partial(torch.optim.AdamW, betas=(0.9, 0.95)), 0.04),
    {"precision": "bf16", "ema_decay": 0.9999},
)


# -- sound: what is trained, and how


def _freeze_time_embedding(task: FundusSR) -> None:
    task.model.time.requires_grad_(False)
    task.model.conv_in.requires_grad_(False)


def _only_trainable(self: FundusSR) -> list[nn.Parameter]:
    return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


sound("first layers are frozen", variant(setup=after_loading(_freeze_time_embedding).setup, trainable_parameters=_only_trainable))


class Adapters(nn.Module):
    """A low-rank path beside each 3 × 3 convolution, 0 at first; the convolutions keep their names and tensors."""

    def __init__(self, network: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.paths = nn.ModuleList()
        for module in [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]:
            path = nn.Sequential(
                nn.Conv2d(module.in_channels, rank, 3, padding=1, bias=False), nn.Conv2d(rank, module.out_channels, 1, bias=False)
            )
            nn.init.zeros_(path[1].weight)
            self.paths.append(path)
            module.register_forward_hook(lambda module, inputs, output, path=path: output + path(inputs[0]))


def _adapted(self: FundusSR, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
    FundusSR.setup(self, config, seed, device)
    self.model.requires_grad_(False)
    torch.manual_seed(seed)
    self.adapters = Adapters(self.model)
    self.optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=self.config.lr)


def _adapted_parts(self: FundusSR) -> dict[str, Part]:
    found = FundusSR.parts(self)
    return {**found, "denoiser": replace(found["denoiser"], trains=False), "adapters": Part(self.adapters, trains=True)}


def _adapted_step(self: FundusSR) -> dict[str, Any]:
    self.step_count += 1
    forward = self.forward(self.step_count)
    auxiliary = forward.auxiliary()
    loss = forward.main + auxiliary.total
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = self.clip()
    self.optimizer.step()
    return {"loss": loss.detach(), "loss_flow": forward.main.detach(), "total_norm": norm, **auxiliary.metrics()}


sound(
    "low-rank adapters",
    variant(
        setup=_adapted,
        parts=_adapted_parts,
        trainable_parameters=lambda self: list(self.adapters.parameters()),
        step=_adapted_step,
    ),
    {"preset": "adamw_clip"},
    baseline=OWN_BASELINE,
)


def _checkpointed(task: FundusSR) -> None:
    plain = task.model.up.forward
    task.model.up.forward = lambda x, embedding: checkpoint(plain, x, embedding, use_reentrant=False)


sound("gradient checkpointing", after_loading(_checkpointed))
sound("channels last", after_loading(lambda task: task.model.to(memory_format=torch.channels_last)))


# -- sound: the small trainer and the other tasks

for _predicts in ("epsilon", "x0", "v", "velocity"):
    sound(f"small diffusion, {_predicts}", small(_predicts))
sound("small diffusion, velocity, SGD", small("velocity"), {"preset": "sgd", "lr": 1e-3})
sound("small diffusion, 2 micro-batches", small("v", micro_batches=2))
sound("small diffusion, averaged", small("velocity", ema_decay=0.99))
sound("small diffusion, gray", small("v", gray=True))
sound("small diffusion, crops of 32 × 48", small("epsilon", ratio=1.5))
sound("small diffusion, bf16", small("velocity", precision=torch.bfloat16))
sound("small diffusion, batch 1", small("velocity"), {"batch_size": 1})
sound(
    "small diffusion, Huber and logit-normal t",
    small(
        "v",
        main_loss=lambda self, predicted, target, t: functional.huber_loss(predicted, target),
        draw_times=lambda self, count, generator: torch.randn(count, generator=generator).sigmoid().clamp(1e-3, 0.98),
    ),
)
sound("own task", MyTask, baseline=OWN_BASELINE)
sound("own task, batch 2, not clipped", MyTask, {"batch_size": 2, "max_grad_norm": None}, baseline=OWN_BASELINE)
sound("bundled VAE with KL", VAEKL, settings=[{"kl_alpha": 1e-2}], baseline={}, smoke_test=False)
sound("bundled flow with DINO and KL", FlowDinoKL, settings=[{"kl_weight": 1e-2}], baseline={}, smoke_test=False)

UNSEEN = (set(fundus_defects.DEFECTS) | set(HEALTHY)) - BEFORE[0] - BEFORE[1]
