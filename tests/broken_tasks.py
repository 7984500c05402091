"""One honest task, small enough to be checked in a fraction of a second, and variants of it with one fault each."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tune_ssim.losses import DecodedLoss, TimeLaw, ssim
from tune_ssim.trials.training import Forward, Part, Sample, Task

LOSS = {
    "ssim_loss_weight": 0.0,
    "ssim_loss_max_t": 0.5,
    "ssim_grad_scale": 1.0,
    "ssim_grad_clamp": None,
    "pixel_loss_weight": 0.0,
    "pixel_loss_max_t": 0.5,
}
DEFAULTS = {"steps": 10, "lr": 0.05, "batch_size": 4, "max_grad_norm": None, **LOSS}
SIZE = 12  # pixels; the SSIM's window has 11


class Honest:
    """Predicts a clean picture from a noisy one. Everything that the suite asks for, nothing else."""

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.check_keys(config)
        self.config = {**DEFAULTS, **config}
        self.seed, self.n = seed, 0
        torch.manual_seed(seed)
        self.network = self.build()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=self.config["lr"], momentum=0.9)
        self.loss = DecodedLoss(**{name: self.config[name] for name in LOSS}, image_range="[0,1]")
        self.time_law = TimeLaw()

    def check_keys(self, config: Mapping[str, Any]) -> None:
        if unknown := set(config) - set(DEFAULTS):
            raise ValueError(f"unknown key {sorted(unknown)[0]!r}")

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1))

    def generator(self, n: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, n]).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))

    def batch(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures, t and noise."""
        generator, count = self.generator(n), self.config["batch_size"]
        pictures = smooth(torch.rand(count, 3, 3, 3, generator=generator))
        t = self.time_law.sample(count, generator)
        return pictures, t, torch.randn(pictures.shape, generator=generator)

    def forward(self, n: int) -> Forward:
        pictures, t, noise = self.batch(n)
        predicted = self.network(torch.lerp(pictures, noise, t[:, None, None, None]))
        return Forward(functional.mse_loss(predicted, pictures), predicted, t, pictures, self.loss, lambda x: x)

    def step(self) -> dict[str, Any]:
        self.n += 1
        forward = self.forward(self.n)
        auxiliary = forward.auxiliary()
        loss = forward.main + auxiliary.total
        self.optimizer.zero_grad()
        loss.backward()
        norm = self.clip()
        self.optimizer.step()
        return {"loss": loss.detach(), "loss_flow": forward.main.detach(), "total_norm": norm, **auxiliary.metrics()}

    def clip(self) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(self.network.parameters(), self.config["max_grad_norm"] or math.inf)

    def held_out(self) -> torch.Tensor:
        return smooth(torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(99)))

    @torch.no_grad()
    def sample(self, noise: int = 0) -> Sample:
        pictures = self.held_out()
        start = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(noise))
        return Sample(self.network(torch.lerp(pictures, start, 0.3)).clamp(0, 1), pictures, functional.avg_pool2d(pictures, 2))

    def evaluate(self) -> dict[str, Any]:
        images, pictures = self.sample().images, self.held_out()
        error = (images - pictures).square().mean()
        return {"ssim": float(ssim(images, pictures).mean()), "psnr": float(-10 * error.log10()), "flow_loss_bins/0": float(error)}

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.n = state["n"]

    def effective(self) -> dict[str, Any]:
        return {**self.config, **self.loss.effective(), "lr": self.optimizer.param_groups[0]["lr"]}

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def parts(self) -> dict[str, Part]:
        return {"network": Part(self.network, trains=True)}

    def training_images(self, n: int) -> torch.Tensor:
        return self.batch(n)[0]

    def fingerprints(self) -> dict[str, str]:
        return {"data/held_out": str(float(self.held_out().sum()))}


def smooth(coarse: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(coarse, size=SIZE, mode="bilinear")


@dataclass(frozen=True)
class Fault:
    """found: the finding that must be broken (or `status`). words: in its sentence or remedy."""

    task: Any
    found: str
    words: tuple[str, ...]
    status: str = "broken"


FAULTS: dict[str, Fault] = {}


def fault(found: str, *words: str, status: str = "broken") -> Callable[[Any], Any]:
    def keep(task: Any) -> Any:
        FAULTS[task.__name__] = Fault(task, found, words, status)
        return task

    return keep


def renamed(metrics: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in metrics.items()}


# -- what is there


@fault("class", "without arguments")
class NeedsArguments(Honest):
    def __init__(self, path: str) -> None:
        self.path = path


@fault("method/sample", "rename generate()")
class OtherName(Honest):
    sample: Any = None

    def generate(self, noise: int = 0) -> Sample:
        return Honest.sample(self, noise)


NOT_INHERITED = ("evaluate", "__dict__", "__weakref__")
# The `...` of the protocol are no methods.
fault("method/evaluate", "there is no evaluate()")(
    type(
        "InheritsTheProtocol",
        (Task,),
        {name: part for name, part in vars(Honest).items() if name not in ("evaluate", "__dict__", "__weakref__")},
    )
)


@fault("method/setup", "def setup(self, config, seed, device=None)")
class SetupWithoutDevice(Honest):
    def setup(self, config: Mapping[str, Any], seed: int) -> None:
        Honest.setup(self, config, seed)


@fault("method/sample", "def sample(self, noise=0)")
class SampleWithoutNoise(Honest):
    def sample(self) -> Sample:
        return Honest.sample(self)


@fault("method/step", "generator")
class StepYields(Honest):
    def step(self) -> Any:
        yield Honest.step(self)


@fault("method/evaluate", "not a method")
class EvaluateIsAProperty(Honest):
    @property
    def evaluate(self) -> dict[str, Any]:
        return Honest.evaluate(self)


# -- what it is set up with


@fault("setup", "resolution")
class NeedsAKey(Honest):
    def check_keys(self, config: Mapping[str, Any]) -> None:
        if "resolution" not in config:
            raise ValueError("resolution is missing")


@fault("setup", "broken_tasks.py", "KeyError")
class SetupFails(Honest):
    def check_keys(self, config: Mapping[str, Any]) -> None:
        config["resolution"]


@fault("setup", "SystemExit")
class SetupExits(Honest):
    def check_keys(self, config: Mapping[str, Any]) -> None:
        raise SystemExit(2)


@fault("setup/unknown_key", "accepts the unknown key", "raise ValueError")
class SwallowsKeys(Honest):
    def check_keys(self, config: Mapping[str, Any]) -> None:
        pass


@fault("setup/unknown_key", "raise ValueError", "TypeError")
class RefusesByTypeError(Honest):
    def check_keys(self, config: Mapping[str, Any]) -> None:
        (lambda **known: None)(**config) if set(config) <= set(DEFAULTS) else dict(1)  # type: ignore[call-overload]


@fault("setup/config", "copy it")
class ChangesItsConfig(Honest):
    def check_keys(self, config: Mapping[str, Any]) -> None:
        Honest.check_keys(self, config)
        config["lr"] = config.get("lr", 0.05)  # type: ignore[index]


@fault("setup/afresh", "afresh")
class KeepsItsNetwork(Honest):
    def build(self) -> nn.Module:
        return getattr(self, "network", None) or Honest.build(self)


@fault("ssim_loss_weight", "accept ssim_loss_weight")
class KnowsNoWeight(Honest):
    def check_keys(self, config: Mapping[str, Any]) -> None:
        if unknown := set(config) - {"steps", "lr", "batch_size"}:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r}")


# -- what a step returns


@fault("step", "nothing (None)")
class StepReturnsNothing(Honest):
    def step(self) -> Any:
        Honest.step(self)


@fault("step", "'loss' is a tensor of shape [4]")
class LossPerSample(Honest):
    def step(self) -> dict[str, Any]:
        return {**Honest.step(self), "loss": torch.ones(4)}


@fault("step", "'note' is a str")
class TextAmongNumbers(Honest):
    def step(self) -> dict[str, Any]:
        return {**Honest.step(self), "note": "fine"}


@fault("step/total_norm", "rename 'grad_norm' to 'total_norm'")
class CallsItGradNorm(Honest):
    def step(self) -> dict[str, Any]:
        return renamed(Honest.step(self), "total_norm", "grad_norm")


@fault("step/loss", "rename 'train/loss' to 'loss'")
class PrefixesItsLoss(Honest):
    def step(self) -> dict[str, Any]:
        return renamed(Honest.step(self), "loss", "train/loss")


@fault("step/ssim_active_fraction", "rename 'active_fraction'")
class CallsItActiveFraction(Honest):
    def step(self) -> dict[str, Any]:
        return renamed(Honest.step(self), "ssim_active_fraction", "active_fraction")


@fault("step/ssim_active_fraction", "outside [0, 1]")
class CountsActiveSamples(Honest):
    def step(self) -> dict[str, Any]:
        return {**Honest.step(self), "ssim_active_fraction": 3.0}


@fault("step/total_norm", "between backward() and zero_grad()")
class NormAfterZeroGrad(Honest):
    def clip(self) -> torch.Tensor:
        return torch.zeros(())


@fault("step/detached", "loss.detach()", status="warn")
class KeepsTheGraph(Honest):
    def step(self) -> dict[str, Any]:
        metrics = Honest.step(self)
        return {**metrics, "loss": metrics["loss"] + 0 * self.network[0].weight.sum()}


@fault("step", "step() failed", "broken_tasks.py", "mend")
class StepFails(Honest):
    def step(self) -> dict[str, Any]:
        raise RuntimeError("shapes do not match")


@fault("step/total_norm/clipping", "after clipping", "clip_grad_norm_")
class NormAfterClipping(Honest):
    def clip(self) -> torch.Tensor:
        Honest.clip(self)
        return nn.utils.get_total_norm([p.grad for p in self.network.parameters()])


@fault("step/total_norm/clipping", "after clipping at 0.001", "clip_grad_norm_")
class FixedClipping(Honest):
    def check_keys(self, config: Mapping[str, Any]) -> None:
        if unknown := set(config) - set(DEFAULTS) | set(config) & {"max_grad_norm"}:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r}")

    def clip(self) -> torch.Tensor:
        nn.utils.clip_grad_norm_(self.network.parameters(), 0.001)
        return nn.utils.get_total_norm([p.grad for p in self.network.parameters()])

    def effective(self) -> dict[str, Any]:
        return {**Honest.effective(self), "max_grad_norm": 0.001}


@fault("step/loss_ssim", "before its weight")
class WeightedLossSsim(Honest):
    def step(self) -> dict[str, Any]:
        metrics = Honest.step(self)
        if "loss_ssim" in metrics:
            metrics["loss_ssim"] = metrics["loss_ssim"] * self.config["ssim_loss_weight"]
        return metrics


@fault("step/loss_ssim", "rename it 'loss_ssim'", status="warn")
class CallsItSsimLoss(Honest):
    def step(self) -> dict[str, Any]:
        return {**Honest.step(self), "ssim_loss": 0.4}


# -- random numbers


@fault("random/repeatable", "global random generators")
class GlobalNoise(Honest):
    def batch(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pictures, t, noise = Honest.batch(self, n)
        return pictures, t, torch.randn_like(noise)


@fault("random/repeatable", "global random generators")
class PythonsRandom(Honest):
    def batch(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pictures, t, noise = Honest.batch(self, n)
        return pictures.flip(-1) if random.random() < 0.5 else pictures, t, noise


@fault("random/repeatable", "global random generators")
class UnseededStart(Honest):
    def build(self) -> nn.Module:
        torch.manual_seed(random.getrandbits(32))
        return Honest.build(self)


@fault("random/repeatable", "the second time")
class ForgetsNothing(Honest):
    """A loader on the class goes on where the last instance left it."""

    drawn: ClassVar[list[int]] = []

    def batch(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.drawn.append(n)
        return Honest.batch(self, len(self.drawn))


@fault("random/configuration", "trials cannot be compared", "whether or not a loss needs them")
class WeightSeedsTheBatch(Honest):
    def generator(self, n: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * n + self.seed + int(self.config["ssim_loss_weight"] > 0))


@fault("random/configuration", "trials cannot be compared", "whether or not a loss needs them")
class DrawsMoreWithSsim(Honest):
    """The SSIM loss takes numbers of the step's generator before the batch does."""

    def generator(self, n: int) -> torch.Generator:
        generator = Honest.generator(self, n)
        if self.config["ssim_loss_weight"] > 0:
            torch.rand(3, generator=generator)
        return generator


class BlackBox(Honest):
    """Shows no forward pass."""

    forward: Any = None

    def step(self) -> dict[str, Any]:
        self.forward = partial(Honest.forward, self)  # of the instance; abilities are those of the class
        return Honest.step(self)


@fault("random/configuration", "trials cannot be compared")
class WeightSeedsTheBatchOfABlackBox(BlackBox):
    generator = WeightSeedsTheBatch.generator


@fault("ssim_loss_weight/felt", "has another effect")
class WeightlessBlackBox(BlackBox):
    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        Honest.setup(self, config, seed, device)
        self.loss = replace(self.loss, ssim_loss_weight=0.0)

    def effective(self) -> dict[str, Any]:
        return {**Honest.effective(self), "ssim_loss_weight": self.config["ssim_loss_weight"]}


@fault("step/total_norm/clipping", "after clipping")
class BlackBoxAfterClipping(BlackBox):
    clip = NormAfterClipping.clip


@fault("random/seed", "no noise at all")
class IgnoresTheSeed(Honest):
    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        Honest.setup(self, config, 0, device)


@fault("random/batches", "every step sees one batch")
class OneBatch(Honest):
    def generator(self, n: int) -> torch.Generator:
        return Honest.generator(self, 0)


# -- the update


@fault("still", "lr = 0.0", "trainable parameters")
class LearningRateHasAFloor(Honest):
    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        Honest.setup(self, {**config, "lr": max(config.get("lr", 0.05), 1e-4)}, seed, device)


@fault("still", "disable_update", status="unknown")
class KnowsNoLearningRate(Honest):
    def check_keys(self, config: Mapping[str, Any]) -> None:
        if unknown := set(config) - set(DEFAULTS) | set(config) & {"lr"}:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r}")


@fault("trains", "nothing moves", status="warn")
class ForgetsToStep(Honest):
    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        Honest.setup(self, config, seed, device)
        self.optimizer.step = lambda: None  # type: ignore[method-assign,assignment]


# -- the checkpoint


@fault("state_dict/resume", "self.n")
class ForgetsTheStep(Honest):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        Honest.load_state_dict(self, {**state, "n": 0})


@fault("state_dict/resume", "self.optimizer")
class ForgetsMomentum(Honest):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.n = state["n"]


@fault("state_dict", "pickle", "/network")
class StoresTheModule(Honest):
    def state_dict(self) -> dict[str, Any]:
        return {**Honest.state_dict(self), "network": self.network}


@fault("state_dict", "no tensor")
class StoresNothing(Honest):
    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}


@fault("state_dict/resume", "load_state_dict() failed", "KeyError")
class LoadsAnotherKey(Honest):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])


# -- inference


@fault("sample", "return tune_ssim.Sample")
class ReturnsATensor(Honest):
    def sample(self, noise: int = 0) -> Any:
        return Honest.sample(self, noise).images

    def evaluate(self) -> dict[str, Any]:
        return {"ssim": 0.5, "psnr": 20.0}


@fault("sample/images", "map [-1, 1] to [0, 1]")
class SamplesInMinusOne(Honest):
    def sample(self, noise: int = 0) -> Sample:
        found = Honest.sample(self, noise)
        return Sample(2 * found.images - 1, found.references, found.inputs)

    def evaluate(self) -> dict[str, Any]:
        return {"ssim": 0.5, "psnr": 20.0}


@fault("sample/images", "channels last", "permute")
class ChannelsLast(Honest):
    def sample(self, noise: int = 0) -> Sample:
        return Sample(Honest.sample(self, noise).images.permute(0, 2, 3, 1))

    def evaluate(self) -> dict[str, Any]:
        return {"ssim": 0.5, "psnr": 20.0}


@fault("sample/references", "the same crops in the same size")
class SmallerReferences(Honest):
    def sample(self, noise: int = 0) -> Sample:
        found = Honest.sample(self, noise)
        return Sample(found.images, found.references[..., :-1, :-1])


@fault("sample/token_ids", "must be a tensor of integers", "return a tensor of integers")
class TokensAsNumbers(Honest):
    def sample(self, noise: int = 0) -> Sample:
        return replace(Honest.sample(self, noise), token_ids=torch.zeros(4), vocabulary_size=9)


@fault("sample/deterministic", "other images the second time")
class OtherNoiseEachTime(Honest):
    def sample(self, noise: int = 0) -> Sample:
        return Honest.sample(self, random.randrange(2**31))


@fault("sample/noise", "sample(1) gives the images of sample(0)", status="warn")
class OneNoise(Honest):
    def sample(self, noise: int = 0) -> Sample:
        return Honest.sample(self, 0)


@fault("untouched", "sample()", "changes the training")
class SamplingMovesWeights(Honest):
    def sample(self, noise: int = 0) -> Sample:
        with torch.no_grad():
            self.network[2].bias += 0.01
        return Honest.sample(self, noise)


@fault("untouched", "evaluate() changes the training")
class EvaluationStaysInEvalMode(Honest):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1))

    def sample(self, noise: int = 0) -> Sample:
        was = self.network.training
        self.network.eval()
        found = Honest.sample(self, noise)
        self.network.train(was)
        return found

    def evaluate(self) -> dict[str, Any]:
        self.network.eval()
        return Honest.evaluate(self)


@fault("evaluate/ssim", "rename 'SSIM' to 'ssim'")
class UpperCaseSsim(Honest):
    def evaluate(self) -> dict[str, Any]:
        return renamed(Honest.evaluate(self), "ssim", "SSIM")


@fault("evaluate/psnr", "add 'psnr'")
class NoPsnr(Honest):
    def evaluate(self) -> dict[str, Any]:
        return {"ssim": Honest.evaluate(self)["ssim"]}


@fault("evaluate/deterministic", "the second time")
class NoisyEvaluation(Honest):
    def evaluate(self) -> dict[str, Any]:
        return {**Honest.evaluate(self), "psnr": 20 + random.random()}


# -- what is in force


@fault("ssim_loss_weight/felt", "does ssim_loss_weight reach the loss?")
class EchoesItsConfig(Honest):
    """The weight never reaches the loss, and effective() repeats what was asked for (note 001)."""

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        Honest.setup(self, {**config, "ssim_loss_weight": 0.0}, seed, device)
        self.asked = dict(config)

    def effective(self) -> dict[str, Any]:
        return {**Honest.effective(self), **self.asked}


@fault("effective/ssim_loss_weight", "says 0.1")
class OwnDefaultInForce(Honest):
    def effective(self) -> dict[str, Any]:
        return {**Honest.effective(self), "ssim_loss_weight": 0.1}


@fault("effective/ssim_loss_weight", "does not report ssim_loss_weight")
class SilentAboutTheWeight(Honest):
    def effective(self) -> dict[str, Any]:
        return {name: value for name, value in Honest.effective(self).items() if name != "ssim_loss_weight"}


@fault("effective/lr", "which JSON cannot hold")
class TensorInForce(Honest):
    def effective(self) -> dict[str, Any]:
        return {**Honest.effective(self), "lr": torch.tensor(self.config["lr"])}


@fault("ssim_loss_weight/felt", "has another effect", "detached")
class DetachedPrediction(Honest):
    def forward(self, n: int) -> Forward:
        found = Honest.forward(self, n)
        found.z0 = found.z0.detach()
        return found


@fault("effective/settable", "reports ssim_grad_clamp", status="warn")
class RefusesWhatItSays(Honest):
    def check_keys(self, config: Mapping[str, Any]) -> None:
        if unknown := set(config) - set(DEFAULTS) | set(config) & {"ssim_grad_clamp"}:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r}")


# -- the optional methods


@fault("forward/loss", "step 9 minimised")
class AnotherForward(Honest):
    def forward(self, n: int) -> Forward:
        found = Honest.forward(self, n)
        scale = 1.0 if n == self.n else 3.0  # only step() itself gets the true one
        found.main = found.main * scale
        return found


@fault("training_images", "not the targets of forward(9)")
class OtherTrainingImages(Honest):
    def training_images(self, n: int) -> torch.Tensor:
        return 1 - Honest.training_images(self, n)


@fault("parts/network", "says network is frozen")
class CallsItFrozen(Honest):
    def parts(self) -> dict[str, Part]:
        return {"network": Part(self.network, trains=False)}


@fault("fingerprints", "differ the second time")
class RandomFingerprint(Honest):
    def fingerprints(self) -> dict[str, str]:
        return {"data/train": str(random.random())}


@fault("untouched", "one of the optional methods changes the training")
class ForwardDropsMomentum(Honest):
    def training_images(self, n: int) -> torch.Tensor:
        with contextlib.suppress(KeyError):
            self.optimizer.state.clear()
        return Honest.training_images(self, n)
