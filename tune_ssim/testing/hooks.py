"""Checks of the optional methods, used by preflight and calibration: they must agree with the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.before_launch.preflight.subject import call, guarded
from tune_ssim.losses import DecodedLoss, TimeLaw
from tune_ssim.records import LOSS
from tune_ssim.testing.findings import broken, ok, unknown
from tune_ssim.testing.samples import check_sample
from tune_ssim.testing.subject import Numbers
from tune_ssim.trials.training import Forward, Part, Training

OPTIONAL = ("forward", "trainable_parameters", "time_law", "parts", "training_images", "fingerprints")


def check_hooks(task: Training, n: int, step: Numbers) -> Iterator[Check]:
    """Checks before step `n`. `step`: metrics of the same step in another run."""
    present = [name for name in OPTIONAL if task.abilities().has(name)]
    parameters: list[Any] = []
    if "trainable_parameters" in present:
        yield from _agrees("trainable_parameters", lambda: _parameters(task, parameters))
    if "forward" in present:
        yield from _agrees("forward", lambda: _forward(task, n, step, "training_images" in present))
    if "time_law" in present and not isinstance(task.time_law, TimeLaw):
        kind = type(task.time_law).__name__
        yield broken("time_law", f"time_law is a {kind}", "self.time_law = tune_ssim.losses.TimeLaw(…), and draw t with it")
    if "parts" in present:
        yield from _agrees("parts", lambda: _parts(task, parameters))
    if "fingerprints" in present:
        yield from _agrees("fingerprints", lambda: _fingerprints(task))
    if task.abilities().sample_ema:
        averaged = call(task, "sample_ema", 0)
        if averaged is not None:
            yield from check_sample("sample_ema", averaged)
    if absent := [name for name in OPTIONAL if name not in present]:
        sentence = f"not there: {', '.join(absent)}; preflight calls unknown what they would show"
        yield unknown("optional", sentence, "add them as tune_ssim.Training describes them, if they are at hand")


def _agrees(name: str, checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    yield from list(guarded(name, checks, "broken")) or [ok(name, f"{name}() agrees with the rest")]


def _parameters(task: Training, parameters: list[Any]) -> Iterator[Check]:
    found = call(task, "trainable_parameters")
    listed = list(found) if hasattr(found, "__iter__") else []
    if not listed or not all(isinstance(p, torch.Tensor) and p.requires_grad for p in listed):
        yield broken(
            "trainable_parameters",
            "trainable_parameters() gives no list of parameters that require a gradient",
            "return [p for p in self.model.parameters() if p.requires_grad]",
        )
        return
    parameters.extend(listed)


def _forward(task: Training, n: int, step: Numbers, has_images: bool) -> Iterator[Check]:
    forward = call(task, "forward", n)
    if not isinstance(forward, Forward):
        yield broken("forward", f"forward({n}) returned a {type(forward).__name__}", "return tune_ssim.trials.training.Forward(…)")
        return
    is_scalar = isinstance(forward.main, torch.Tensor) and forward.main.ndim == 0
    shapes = {
        "main, a 0-d tensor on the graph": is_scalar and forward.main.requires_grad,
        "z0, a tensor on the graph": isinstance(forward.z0, torch.Tensor) and forward.z0.requires_grad,
        "t, [batch] on the host": isinstance(forward.t, torch.Tensor) and forward.t.ndim == 1 and forward.t.device.type == "cpu",
        "targets, [batch, 3, height, width]": isinstance(forward.targets, torch.Tensor) and forward.targets.ndim == 4,
        "loss, a DecodedLoss": isinstance(forward.loss, DecodedLoss),
    }
    if wrong := [what for what, is_so in shapes.items() if not is_so]:
        yield broken("forward", f"forward({n}) lacks {'; '.join(wrong)}", "see tune_ssim.trials.training.Forward")
        return
    low, high = float(forward.targets.min()), float(forward.targets.max())
    if low < -1e-4 or high > 1 + 1e-4:
        yield broken("forward/targets", f"targets lie in [{low:.3g}, {high:.3g}]", "give the images in [0, 1]")
    if not bool(((forward.t >= 0) & (forward.t <= 1)).all()):
        yield broken("forward/t", "t lies outside [0, 1]", "t = 0 is clean, t = 1 is noise; divide by the number of timesteps")
        return
    again = call(task, "forward", n)
    main, repeated = float(forward.main.detach()), float(again.main.detach())
    if not math.isclose(main, repeated, rel_tol=1e-5):
        yield unknown(
            "forward/repeatable",
            f"forward({n}) gives {main:.6g} and then {repeated:.6g}: dropout, or the batch is not that of step n",
            "draw the batch of step n from (seed, n)",
        )
    else:
        with torch.no_grad():
            total = main + float(forward.auxiliary().total)
        if LOSS in step and not math.isclose(total, step[LOSS], rel_tol=1e-3, abs_tol=1e-7):
            yield broken(
                "forward/loss",
                f"forward({n}) makes a loss of {total:.6g}, and step {n} minimised {step[LOSS]:.6g}",
                "step() must minimise forward(n).main + forward(n).auxiliary().total: call forward(n) in step()",
            )
    if has_images:
        images = call(task, "training_images", n)
        is_batch = isinstance(images, torch.Tensor) and images.shape == forward.targets.shape
        if not is_batch or not torch.allclose(images.cpu().float(), forward.targets.detach().cpu().float(), atol=1e-3):
            yield broken(
                "training_images",
                f"training_images({n}) are not the targets of forward({n})",
                "return the images of step n in [0, 1], as the loss compares with them",
            )


def _parts(task: Training, parameters: list[Any]) -> Iterator[Check]:
    parts = call(task, "parts")
    if not isinstance(parts, Mapping) or not all(isinstance(part, Part) for part in parts.values()):
        yield broken("parts", "parts() gives no mapping of names to Part", "return {'name': Part(module, trains=…), …}")
        return
    trained = {id(parameter) for parameter in parameters}
    for name, part in parts.items():
        theirs = [id(parameter) in trained for parameter in part.module.parameters()]
        if parameters and theirs and part.trains != any(theirs):
            stated = "trains" if part.trains else "is frozen"
            yield broken(
                f"parts/{name}",
                f"parts() says {name} {stated}, and {sum(theirs)} of its {len(theirs)} parameters are among trainable_parameters()",
                "say trains=True of what the optimiser updates, and of nothing else",
            )
        if part.weights is not None and not part.weights.is_file():
            yield broken(f"parts/{name}", f"there is no file {part.weights}", "give the safetensors file that was loaded, or None")


def _fingerprints(task: Training) -> Iterator[Check]:
    found, again = call(task, "fingerprints"), call(task, "fingerprints")
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        yield broken("fingerprints", "fingerprints() gives no mapping of names to texts", "return {'data/train': sha256, …}")
    elif dict(found) != dict(again):
        yield broken("fingerprints", "fingerprints() differ the second time", "hash the data itself; hash() of a text is random")
