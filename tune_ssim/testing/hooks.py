"""What a task may have beside the contract, so that preflight and calibration see deeper: if it is there, it must be true."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tune_ssim.losses import DecodedLoss, TimeLaw
from tune_ssim.records import LOSS
from tune_ssim.testing.findings import Finding
from tune_ssim.testing.subject import Fault, Numbers, Subject
from tune_ssim.trials.training import Forward, Part

OPTIONAL = ("forward", "trainable_parameters", "time_law", "parts", "training_images", "fingerprints")


def check_hooks(subject: Subject, task: Any, n: int, step: Numbers) -> Iterator[Finding]:
    """Before step `n` of a training, whose numbers were `step` in another run."""
    present = [name for name in OPTIONAL if task.abilities().has(name)]
    parameters: list[Any] = []
    if "trainable_parameters" in present:
        yield from _guarded(subject, "trainable_parameters", lambda: _parameters(subject, task, parameters))
    if "forward" in present:
        yield from _guarded(subject, "forward", lambda: _forward(subject, task, n, step, "training_images" in present))
    if "time_law" in present and not isinstance(task.time_law, TimeLaw):
        kind = type(task.time_law).__name__
        yield Finding(
            "time_law", "broken", f"time_law is a {kind}", "self.time_law = tune_ssim.losses.TimeLaw(…), and draw t with it"
        )
    if "parts" in present:
        yield from _guarded(subject, "parts", lambda: _parts(subject, task, parameters))
    if "fingerprints" in present:
        yield from _guarded(subject, "fingerprints", lambda: _fingerprints(subject, task))
    if task.abilities().sample_ema:
        from tune_ssim.testing.inference import check_sample

        averaged = subject.call(task, "sample_ema", 0)
        if averaged is not None:
            yield from check_sample("sample_ema", averaged)
    if absent := [name for name in OPTIONAL if name not in present]:
        sentence = f"not there: {', '.join(absent)}; preflight calls unknown what they would show"
        yield Finding("optional", "unknown", sentence, "add them as tune_ssim.Task describes them, if they are at hand")


def _guarded(subject: Subject, name: str, check: Any) -> Iterator[Finding]:
    try:
        found = list(check())
    except Fault as error:
        yield Finding(name, "broken", str(error), error.remedy)
        return
    yield from found or [Finding(name, "ok", f"{name}{'' if name == 'time_law' else '()'} agrees with the rest")]


def _parameters(subject: Subject, task: Any, parameters: list[Any]) -> Iterator[Finding]:
    found = subject.call(task, "trainable_parameters")
    listed = list(found) if hasattr(found, "__iter__") else []
    if not listed or not all(isinstance(p, torch.Tensor) and p.requires_grad for p in listed):
        yield Finding(
            "trainable_parameters",
            "broken",
            "trainable_parameters() gives no list of parameters that require a gradient",
            "return [p for p in self.model.parameters() if p.requires_grad]",
        )
        return
    parameters.extend(listed)


def _forward(subject: Subject, task: Any, n: int, step: Numbers, has_images: bool) -> Iterator[Finding]:
    forward = subject.call(task, "forward", n)
    if not isinstance(forward, Forward):
        yield Finding(
            "forward", "broken", f"forward({n}) returned a {type(forward).__name__}", "return tune_ssim.trials.training.Forward(…)"
        )
        return
    shapes = {
        "main, a 0-d tensor on the graph": isinstance(forward.main, torch.Tensor)
        and forward.main.ndim == 0
        and forward.main.requires_grad,
        "z0, a tensor on the graph": isinstance(forward.z0, torch.Tensor) and forward.z0.requires_grad,
        "t, [batch] on the host": isinstance(forward.t, torch.Tensor) and forward.t.ndim == 1 and forward.t.device.type == "cpu",
        "targets, [batch, 3, height, width]": isinstance(forward.targets, torch.Tensor) and forward.targets.ndim == 4,
        "loss, a DecodedLoss": isinstance(forward.loss, DecodedLoss),
    }
    if wrong := [what for what, is_so in shapes.items() if not is_so]:
        yield Finding("forward", "broken", f"forward({n}) lacks {'; '.join(wrong)}", "see tune_ssim.trials.training.Forward")
        return
    low, high = float(forward.targets.min()), float(forward.targets.max())
    if low < -1e-4 or high > 1 + 1e-4:
        yield Finding("forward/targets", "broken", f"targets lie in [{low:.3g}, {high:.3g}]", "give the images in [0, 1]")
    if not bool(((forward.t >= 0) & (forward.t <= 1)).all()):
        yield Finding(
            "forward/t", "broken", "t lies outside [0, 1]", "t = 0 is clean, t = 1 is noise; divide by the number of timesteps"
        )
        return
    again = subject.call(task, "forward", n)
    main, repeated = float(forward.main.detach()), float(again.main.detach())
    if not math.isclose(main, repeated, rel_tol=1e-5):
        yield Finding(
            "forward/repeatable",
            "unknown",
            f"forward({n}) gives {main:.6g} and then {repeated:.6g}: dropout, or the batch is not that of step n",
            "draw the batch of step n from (seed, n)",
        )
    else:
        with torch.no_grad():
            total = main + float(forward.auxiliary().total)
        if LOSS in step and not math.isclose(total, step[LOSS], rel_tol=1e-3, abs_tol=1e-7):
            yield Finding(
                "forward/loss",
                "broken",
                f"forward({n}) makes a loss of {total:.6g}, and step {n} minimised {step[LOSS]:.6g}",
                "step() must minimise forward(n).main + forward(n).auxiliary().total: call forward(n) in step()",
            )
    if has_images:
        images = subject.call(task, "training_images", n)
        shown = isinstance(images, torch.Tensor) and images.shape == forward.targets.shape
        if not shown or not torch.allclose(images.cpu().float(), forward.targets.detach().cpu().float(), atol=1e-3):
            yield Finding(
                "training_images",
                "broken",
                f"training_images({n}) are not the targets of forward({n})",
                "return the images of step n in [0, 1], as the loss compares with them",
            )


def _parts(subject: Subject, task: Any, parameters: list[Any]) -> Iterator[Finding]:
    parts = subject.call(task, "parts")
    if not isinstance(parts, Mapping) or not all(isinstance(part, Part) for part in parts.values()):
        yield Finding("parts", "broken", "parts() gives no mapping of names to Part", "return {'name': Part(module, trains=…), …}")
        return
    trained = {id(parameter) for parameter in parameters}
    for name, part in parts.items():
        theirs = [id(parameter) in trained for parameter in part.module.parameters()]
        if parameters and theirs and part.trains != any(theirs):
            said = "trains" if part.trains else "is frozen"
            yield Finding(
                f"parts/{name}",
                "broken",
                f"parts() says {name} {said}, and {sum(theirs)} of its {len(theirs)} parameters are among trainable_parameters()",
                "say trains=True of what the optimiser updates, and of nothing else",
            )
        if part.weights is not None and not part.weights.is_file():
            yield Finding(
                f"parts/{name}", "broken", f"there is no file {part.weights}", "give the safetensors file that was loaded, or None"
            )


def _fingerprints(subject: Subject, task: Any) -> Iterator[Finding]:
    found, again = subject.call(task, "fingerprints"), subject.call(task, "fingerprints")
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        yield Finding(
            "fingerprints", "broken", "fingerprints() gives no mapping of names to texts", "return {'data/train': sha256, …}"
        )
    elif dict(found) != dict(again):
        yield Finding(
            "fingerprints", "broken", "fingerprints() differ the second time", "hash the data itself; hash() of a text is random"
        )
