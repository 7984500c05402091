"""The interface of a training (in a study: a task). Seven methods are required."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tune_ssim.base.numbers import is_same
from tune_ssim.base.tensor_file import TensorFile
from tune_ssim.losses import DecodedLoss, DecodedLossResult, TimeLaw

# Prefixes of settings of the image losses, whose push calibration models, and of settings that only measure.
IMAGE_LOSS_KEYS = ("ssim_", "pixel_", "measure_")
# Settings in which a trial may always differ from the baseline: those of the auxiliary losses.
AUXILIARY_KEYS = (*IMAGE_LOSS_KEYS, "kl_", "dino_")

Number = float | torch.Tensor  # 0-d tensors may stay on the device; the trial reads them every `report_every` steps


@dataclass
class Sample:
    """The output of inference on fixed inputs and fixed noise.

    images: `[n, 3, H, W]` in [0, 1] as generated; may contain non-finite pixels.
    references: `[n, 3, H, W]`, the ground truth, or None.
    inputs: `[n, 3, h, w]`, low-resolution inputs that the down-sampled sample should match, or None.
    reconstructions: `[n, 3, H, W]`, the references through the frozen autoencoder (the best possible sample), or None.
    examples: `[m, 3, h, w]`, real images of the same kind, if there is no ground truth. Energy and contrast are compared with
    theirs.
    statistics: further metrics to judge, e.g. `flow_loss_top_bin`.
    token_ids: generated token ids of any shape, for a task that generates text. vocabulary_size: ids must lie in [0, this).
    """

    images: torch.Tensor
    references: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    reconstructions: torch.Tensor | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)
    token_ids: torch.Tensor | None = None
    vocabulary_size: int | None = None
    examples: torch.Tensor | None = None


@dataclass
class Part:
    """A network of the training, in memory.

    trains: False for a frozen network. weights: the safetensors file that it must have been loaded from; None: it starts from
    scratch on purpose. kind: `raw` or `ema`.
    """

    module: torch.nn.Module
    trains: bool
    weights: Path | None = None
    kind: str = "raw"


@dataclass
class Forward:
    """The forward pass of one training step, with its autograd graph: everything up to the losses, no update.

    main: 0-d, the main loss. z0: `[batch, ...]`, the prediction of the clean latent. t: `[batch]`, on the host.
    targets: `[batch, 3, H, W]` in [0, 1]. loss, decode: the same objects that the training step uses.
    velocity_target: the regression target of the network, for comparison with an uninformed predictor.
    clean: `[batch, ...]`, the clean latent that z0 predicts: for `target: roundtrip`, and for preflight.
    is_target, sizes: see `DecodedLoss`; step, parameters too, which only a schedule of the weight needs.
    """

    main: torch.Tensor
    z0: torch.Tensor
    t: torch.Tensor
    targets: torch.Tensor
    loss: DecodedLoss
    decode: Callable[[torch.Tensor], torch.Tensor]
    velocity_target: torch.Tensor | None = None
    is_target: torch.Tensor | None = None
    sizes: Sequence[tuple[int, int]] | None = None
    step: int | None = None
    parameters: Sequence[torch.Tensor] = ()
    clean: torch.Tensor | None = None

    def auxiliary(self, loss: DecodedLoss | None = None, is_target: torch.Tensor | None = None) -> DecodedLossResult:
        """The auxiliary losses with the parameters in force, or for another `loss` or subset of the batch."""
        chosen = self.is_target if is_target is None else is_target
        return (loss or self.loss)(
            self.z0,
            self.t,
            self.targets,
            self.decode,
            is_target=chosen,
            sizes=self.sizes,
            step=self.step,
            main=self.main,
            parameters=self.parameters,
            clean=self.clean,
        )

    def compared_images(self) -> torch.Tensor:
        """`[batch, 3, H, W]` in [0, 1]: what the image losses compare with."""
        if self.loss.target == "raw" or self.clean is None:
            return self.targets
        with torch.no_grad():
            images = self.decode(self.clean).float()
        return (images * 0.5 + 0.5 if self.loss.image_range == "[-1,1]" else images).clamp(0, 1)


@dataclass(frozen=True)
class Abilities:
    """The optional methods that a training has. Preflight and calibration check more with each of them, and report `unknown` for
    what they cannot check. The fields are the names of the methods and of the attribute `time_law`."""

    forward: bool = False
    trainable_parameters: bool = False
    time_law: bool = False
    parts: bool = False
    training_images: bool = False
    sample_ema: bool = False
    fingerprints: bool = False
    left_out: bool = False
    latent_statistics: bool = False

    @classmethod
    def of(cls, training: Training) -> Abilities:
        """Every method that the class of `training` overrides, and `time_law` if it is set."""
        own = {name: getattr(type(training), name, None) for name in OPTIONAL if name != "time_law"}
        found = {name: callable(method) and method is not getattr(Training, name) for name, method in own.items()}
        return cls(**found, time_law=training.time_law is not None)

    def has(self, *names: str) -> bool:
        """Whether the training has all of `names`."""
        return all(asdict(self)[name] for name in names)


OPTIONAL = tuple(field.name for field in fields(Abilities))


NOTHING_NEW: Mapping[str, Number] = MappingProxyType({})
"""What `step` returns if the process that it reads has given no record for a while, and `notice` has something to say."""


class Training(ABC):
    """A training, run step by step. The seven abstract methods are required; everything else has a default.

    The random numbers of step n must depend only on (seed, n, rank), not on the configuration. Trials and baseline then see the
    same batches and noise, and resuming needs no generator state. A learning rate of 0 in the configuration must leave the weights
    unchanged, since updates are switched off in this way. If a training has text, its samples carry `token_ids`, and its steps
    record `loss_ce` and `label_fraction`.

    A training that reads a separate process (see `CommandTask`) returns metrics with their `step`, None from `step` when the
    process has ended without error, and None from `sample` while there is nothing to sample from.
    """

    # -- the contract

    @abstractmethod
    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        """Builds model, data and optimiser from scratch. `device` None: cuda if available, else cpu. `config` always has `steps`,
        the length of the trial, for learning-rate schedules.

        Raises ValueError for an invalid configuration, unknown keys included."""

    @abstractmethod
    def step(self) -> Mapping[str, Number] | None:
        """Takes one optimiser step and returns its metrics under the standard names of `records`."""

    @abstractmethod
    def sample(self, noise: int = 0) -> Sample | None:
        """Runs inference on fixed inputs. `noise` 0 and 1 are two fixed draws. Does not change the training."""

    @abstractmethod
    def evaluate(self) -> Mapping[str, float]:
        """Held-out metrics with fixed noise: `ssim`, `psnr` (dB), …"""

    def per_image(self) -> Mapping[str, Sequence[float]]:
        """Metrics of the last `evaluate`, one number for each held-out image, in the same order in every trial; empty if there are
        none. The confirm phase then also says how sure the improvement is on other images."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors (possibly nested in dicts) and JSON values: everything on which the next step depends."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a result of `state_dict`, after `setup` with the same configuration."""

    @abstractmethod
    def effective(self) -> Mapping[str, Any]:
        """The parameters in force, read where they are used, as JSON values. `max_grad_norm` None means no clipping."""

    # -- optional, for preflight, calibration and provenance

    time_law: TimeLaw | None = None
    """The distribution that t is drawn from."""

    def abilities(self) -> Abilities:
        """Which of the following this training has."""
        return Abilities.of(self)

    def forward(self, n: int) -> Forward:
        """The forward pass of training step n with the current weights."""
        raise NotImplementedError(f"{type(self).__name__} has no forward()")

    def trainable_parameters(self) -> Sequence[torch.nn.Parameter]:
        return []

    def parts(self) -> Mapping[str, Part]:
        """Its networks, by name."""
        return {}

    def training_images(self, n: int) -> torch.Tensor:
        """The images of step n: `[batch, 3, H, W]` in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__} has no training_images()")

    def sample_ema(self, noise: int = 0) -> Sample | None:
        """`sample` with averaged weights; None if there are none."""
        return None

    def fingerprints(self) -> Mapping[str, str]:
        """A hash of each data set, e.g. `data/train`, `data/held_out`."""
        return {}

    def files_seen(self) -> Mapping[str, str]:
        """Name → hash of the code and settings that a separate process was seen to use."""
        return {}

    def left_out(self) -> Mapping[str, str]:
        """Data files that are not used, each with the reason."""
        return {}

    def latent_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Per-channel means and standard deviations of the training images' latents."""
        raise NotImplementedError(f"{type(self).__name__} has no latent_statistics()")

    def ancestry(self) -> tuple[str, ...]:
        """Content ids of the weight files it was loaded from, and of their ancestors."""
        files = [part.weights for part in self.parts().values() if part.weights is not None]
        return tuple(dict.fromkeys(parent for path in files for parent in TensorFile.open(path).ancestry()))

    # -- how it runs; a training in a separate process overrides these

    @property
    def takes_samples(self) -> bool:
        """False if samples arrive in the records, as `smoke/…`."""
        return True

    @property
    def is_paired(self) -> bool:
        """False if its batches cannot be those of the baseline."""
        return True

    @property
    def can_resume(self) -> bool:
        """False if a state cannot be loaded."""
        return True

    @property
    def reports_after_last_step(self) -> bool:
        """True if it is read until it ends, since samples and held-out metrics may follow its last step."""
        return False

    @property
    def effective_after_first_step(self) -> bool:
        """True if `effective` is complete only after the training has reported a step."""
        return False

    def identify(self, name: str, folder: Path) -> None:  # noqa: B027
        """Called before `setup` with the trial's name, and a folder for the training's files."""

    def want_samples_at(self, steps: Sequence[int]) -> None:  # noqa: B027
        """Called after `setup` with the steps at which a training that sends samples should do so."""

    def image(self, step: int) -> bytes | None:
        """A picture (PNG) of samples that the training sent."""
        return None

    def written(self) -> Sequence[tuple[int, Path]]:
        """(step, path) of each checkpoint that the training itself wrote."""
        return []

    def reading_problem(self) -> str:
        """One line about records that could not be parsed; empty if there are none."""
        return ""

    def notice(self) -> str:
        """What the user should know now, while it runs; each notice is returned once."""
        return ""

    def remarks(self) -> Sequence[str]:
        """What the user should know about a training that has ended, a sentence each."""
        return []

    def where_printed(self, name: str) -> str | None:
        """The printed line that shows the setting `name`."""
        return None

    def close(self, verdict: str = "", reason: str = "") -> None:  # noqa: B027
        """Ends what runs outside this process. Called with the verdict as soon as there is one if `reports_after_last_step`, and
        without it when the trial is closed."""


Task = Training
CONTRACT = ("setup", "step", "sample", "evaluate", "state_dict", "load_state_dict", "effective")


def training_class(found: type) -> type[Training]:
    """`found` if it inherits from `Training`; otherwise a subclass of it that adds the defaults of `Training`."""
    if issubclass(found, Training):
        return found
    place = {"__module__": found.__module__, "__qualname__": found.__qualname__, "__doc__": found.__doc__}
    return type(found.__name__, (found, Training), place)


def as_training(task: Any) -> Training:
    """`task` itself. If its class has the seven methods without inheriting from `Training`, the defaults are added."""
    if not isinstance(task, Training):
        task.__class__ = training_class(type(task))
    return task  # type: ignore[no-any-return]


def same_setting(asked: Any, found: Any) -> bool:
    """Whether two values of a setting are equal, numbers up to the rounding of float32. What is asked of a schedule may leave out
    numbers that have a default."""
    if isinstance(asked, Mapping) and isinstance(found, Mapping):
        return all(name in found and same_setting(value, found[name]) for name, value in asked.items())
    return is_same(asked, found, 1e-6)


def missing_methods(found: type) -> list[str]:
    """Required methods that the class lacks."""
    own = {name: getattr(found, name, None) for name in CONTRACT}
    return [name for name, method in own.items() if not callable(method) or method is getattr(Training, name)]
