"""Checks of the optional methods, used by preflight and calibration: they must agree with the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from tune_ssim.before_launch.preflight.report import Check, broken, ok, unknown
from tune_ssim.before_launch.preflight.subject import call, guarded
from tune_ssim.losses import DecodedLoss, TimeLaw
from tune_ssim.records import LOSS
from tune_ssim.testing.samples import check_sample
from tune_ssim.testing.subject import Numbers
from tune_ssim.trials.training import Forward, Part, Training

OPTIONAL = ("forward", "trainable_parameters", "time_law", "parts", "training_images", "fingerprints")


def check_optional(task: Training, n: int, step: Numbers) -> Iterator[Check]:
    """Checks before step `n`. `step`: metrics of the same step in another run."""
    checks: dict[str, Callable[[], Iterator[Check]]] = {
        "trainable_parameters": lambda: _parameters(task),
        "forward": lambda: _forward(task, n, step),
        "parts": lambda: _parts(task),
        "fingerprints": lambda: _fingerprints(task),
    }
    for name, check in checks.items():
        if task.abilities().has(name):
            yield from list(guarded(name, check, "broken")) or [ok(name, f"{name}() agrees with the rest")]
    if task.time_law is not None and not isinstance(task.time_law, TimeLaw):
        remedy = "self.time_law = tune_ssim.losses.TimeLaw(…), and draw t with it"
        yield broken("time_law", f"time_law is a {type(task.time_law).__name__}", remedy)
    if task.abilities().sample_ema and (averaged := call(task, "sample_ema", 0)) is not None:
        yield from check_sample("sample_ema", averaged)
    if absent := [name for name in OPTIONAL if not task.abilities().has(name)]:
        sentence = f"not implemented: {', '.join(absent)}; preflight reports unknown for what they would show"
        yield unknown("optional", sentence, "add them as tune_ssim.Training describes them, if you can")


def _parameters(task: Training) -> Iterator[Check]:
    listed = _listed(task)
    if not listed or not all(isinstance(p, torch.Tensor) and p.requires_grad for p in listed):
        sentence = "trainable_parameters() does not return a list of parameters that require a gradient"
        yield broken("trainable_parameters", sentence, "return [p for p in self.model.parameters() if p.requires_grad]")


def _listed(task: Training) -> list[Any]:
    found = call(task, "trainable_parameters") if task.abilities().trainable_parameters else ()
    return list(found) if hasattr(found, "__iter__") else []


def _forward(task: Training, n: int, step: Numbers) -> Iterator[Check]:
    forward = call(task, "forward", n)
    if not isinstance(forward, Forward):
        remedy = "return tune_ssim.trials.training.Forward(…)"
        yield broken("forward", f"forward({n}) returned a {type(forward).__name__}", remedy)
        return
    main, z0, t, targets = (
        tensor if isinstance(tensor, torch.Tensor) else None for tensor in (forward.main, forward.z0, forward.t, forward.targets)
    )
    fields = {
        "main, a 0-d tensor on the graph": main is not None and main.ndim == 0 and main.requires_grad,
        "z0, a tensor on the graph": z0 is not None and z0.requires_grad,
        "t, [batch] on the host": t is not None and t.ndim == 1 and t.device.type == "cpu",
        "targets, [batch, 3, height, width]": targets is not None and targets.ndim == 4,
        "loss, a DecodedLoss": isinstance(forward.loss, DecodedLoss),
    }
    if wrong := [what for what, is_right in fields.items() if not is_right]:
        yield broken("forward", f"forward({n}) lacks {'; '.join(wrong)}", "see tune_ssim.trials.training.Forward")
        return
    low, high = float(forward.targets.min()), float(forward.targets.max())
    if low < -1e-4 or high > 1 + 1e-4:
        yield broken("forward/targets", f"targets are in [{low:.3g}, {high:.3g}]", "return images in [0, 1]")
    if not bool(((forward.t >= 0) & (forward.t <= 1)).all()):
        yield broken("forward/t", "t is outside [0, 1]", "t = 0 is clean, t = 1 is noise; divide by the number of timesteps")
        return
    yield from _loss_of_step(task, n, forward, step)
    if task.abilities().training_images:
        images = call(task, "training_images", n)
        is_batch = isinstance(images, torch.Tensor) and images.shape == forward.targets.shape
        if not is_batch or not torch.allclose(images.cpu().float(), forward.targets.detach().cpu().float(), atol=1e-3):
            sentence = f"training_images({n}) are not the targets of forward({n})"
            yield broken("training_images", sentence, "return the images of step n in [0, 1], as the loss compares with them")


def _loss_of_step(task: Training, n: int, forward: Forward, step: Numbers) -> Iterator[Check]:
    main, repeated = float(forward.main.detach()), float(call(task, "forward", n).main.detach())
    if not math.isclose(main, repeated, rel_tol=1e-5):
        sentence = f"forward({n}) gives {main:.6g} and then {repeated:.6g}: dropout, or the batch is not that of step n"
        yield unknown("forward/repeatable", sentence, "draw the batch of step n from (seed, n)")
        return
    with torch.no_grad():
        total = main + float(forward.auxiliary().total)
    if LOSS in step and not math.isclose(total, step[LOSS], rel_tol=1e-3, abs_tol=1e-7):
        yield broken(
            "forward/loss",
            f"the losses of forward({n}) add up to {total:.6g}, but step {n} minimised {step[LOSS]:.6g}",
            "step() must minimise forward(n).main + forward(n).auxiliary().total: call forward(n) in step()",
        )


def _parts(task: Training) -> Iterator[Check]:
    parts = call(task, "parts")
    if not isinstance(parts, Mapping) or not all(isinstance(part, Part) for part in parts.values()):
        remedy = "return {'name': Part(module, trains=…), …}"
        yield broken("parts", "parts() does not return a mapping of names to Part", remedy)
        return
    trained = {id(parameter) for parameter in _listed(task)}
    for name, part in parts.items():
        theirs = [id(parameter) in trained for parameter in part.module.parameters()]
        if trained and theirs and part.trains != any(theirs):
            stated = "trains" if part.trains else "is frozen"
            sentence = f"parts() says {name} {stated}, but trainable_parameters() has {sum(theirs)} of its {len(theirs)} parameters"
            yield broken(f"parts/{name}", sentence, "set trains=True for what the optimiser updates, and for nothing else")
        if part.weights is not None and not part.weights.is_file():
            remedy = "give the safetensors file that was loaded, or None"
            yield broken(f"parts/{name}", f"there is no file {part.weights}", remedy)


def _fingerprints(task: Training) -> Iterator[Check]:
    found, again = call(task, "fingerprints"), call(task, "fingerprints")
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        remedy = "return {'data/train': sha256, …}"
        yield broken("fingerprints", "fingerprints() does not return a mapping of names to texts", remedy)
    elif dict(found) != dict(again):
        yield broken("fingerprints", "fingerprints() differ the second time", "hash the data itself; hash() of a text is random")
