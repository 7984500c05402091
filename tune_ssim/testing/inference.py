"""Checks of sample() and evaluate(): shapes, ranges, repeatability, and no effect on the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tune_ssim.before_launch.preflight.report import Check, broken, ok, warn
from tune_ssim.before_launch.preflight.subject import Failure, call, numbers
from tune_ssim.testing.metrics import check_held_out
from tune_ssim.testing.optional import check_optional
from tune_ssim.testing.runs import LOOKS, Run
from tune_ssim.testing.samples import check_sample
from tune_ssim.testing.subject import ClassUnderTest
from tune_ssim.trials.training import Sample


def check_looking_on(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    """A run with all other methods called between the steps. Its steps must equal those of `run`."""
    task = subject.make()
    looks: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
        ("sample()", lambda: check_samples(subject, task)),
        ("sample(1)", lambda: check_second_draw(subject, task)),
        ("evaluate()", lambda: check_evaluation(subject, task)),
        ("state_dict() or effective()", lambda: _state(subject, task)),
        ("one of the optional methods", lambda: check_optional(task, 2 * LOOKS - 1, run.steps[2 * LOOKS - 2])),
    )
    assert len(looks) == LOOKS
    for n, (what, look) in zip(range(1, 2 * LOOKS, 2), looks, strict=True):
        try:
            yield from look()
        except Failure as error:
            yield broken(what.split("(")[0], str(error), error.remedy)
        difference = subject.difference(run.steps[n - 1 : n + 1], subject.steps(task, 2), n)
        if difference:
            yield broken(
                "untouched",
                f"{what} changes the training: after it {difference}",
                "leave weights, optimiser, batch statistics, train()/eval() mode and generators as they were: use "
                "torch.no_grad(), a separate torch.Generator, and put averaged weights back",
            )
            return
    yield ok("untouched", "sample(), evaluate() and the other methods do not change the training")


def _state(subject: ClassUnderTest, task: Any) -> Iterator[Check]:
    for method in ("state_dict", "effective"):
        if method not in subject.broken_methods:
            call(task, method)
    yield from ()


def check_samples(subject: ClassUnderTest, task: Any) -> Iterator[Check]:
    if "sample" in subject.broken_methods:
        return
    sample = call(task, "sample", 0)
    problems = list(check_sample("sample", sample))
    yield from problems
    if any(problem.status == "broken" for problem in problems):
        return
    if _alike(subject, sample, call(task, "sample", 0)):
        yield ok("sample", f"sample() gives the same images {list(sample.images.shape)} each time, in [0, 1]")
    else:
        remedy = "use fixed inputs, fixed noise from a generator with a constant seed, and the network in eval() mode"
        yield broken("sample/deterministic", "sample(0) gives other images the second time", remedy)


def check_second_draw(subject: ClassUnderTest, task: Any) -> Iterator[Check]:
    """Checks after an update, since a network whose last layer starts at 0 turns any noise into the same image."""
    if "sample" in subject.broken_methods:
        return
    one, other = call(task, "sample", 0), call(task, "sample", 1)
    if isinstance(one, Sample) and isinstance(one.images, torch.Tensor) and _alike(subject, one, other):
        sentence = "sample(1) gives the images of sample(0): repeating a failed smoke test with it proves nothing"
        yield warn("sample/noise", sentence, "let `noise` choose between two fixed draws of the initial noise")


def check_evaluation(subject: ClassUnderTest, task: Any) -> Iterator[Check]:
    if "evaluate" in subject.broken_methods:
        return
    found = call(task, "evaluate")
    yield from check_held_out(found)
    once, again = numbers(found), numbers(call(task, "evaluate"))
    if difference := subject.difference([once], [again]).removeprefix("step 1: "):
        sentence = f"evaluate() gives other numbers the second time ({difference})"
        remedy = "use the same held-out images, noise and t each time: a generator with a constant seed, the network in eval() mode"
        yield broken("evaluate/deterministic", sentence, remedy)
    elif all(math.isfinite(number) for number in once.values()):
        yield ok("evaluate/deterministic", "evaluate() gives the same numbers each time")


def _alike(subject: ClassUnderTest, one: Sample, other: Any) -> bool:
    if not isinstance(other, Sample) or one.images.shape != other.images.shape:
        return False
    return torch.allclose(one.images, other.images, rtol=0, atol=0 if subject.exact else 1e-3, equal_nan=True)
