"""Preflight: a few seconds of checks before a study, so that no setting is blamed for a broken set-up.

It tests effects, not flags: what a step does, not what its configuration says. It measures a training through the optional
methods of `trials.training.Training`. Checks that need a missing method are `unknown`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from tune_ssim.before_launch.preflight import flow, images, launch, learning, networks, sampling, targets, updates
from tune_ssim.before_launch.preflight import steps as readings
from tune_ssim.before_launch.preflight.cost import BACKWARD, Budget
from tune_ssim.before_launch.preflight.launch import settings_of
from tune_ssim.before_launch.preflight.picture import Album
from tune_ssim.before_launch.preflight.report import Check, Report, unknown
from tune_ssim.before_launch.preflight.subject import Failure, Subject, call, decoder_of, guarded, looked_at, numbers
from tune_ssim.guards import Guard, NormRatio, SmokeTest
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.training import Forward, Training

if TYPE_CHECKING:
    from tune_ssim.study.study import Study

__all__ = ["Album", "preflight_task", "run_preflight", "settings_of"]

DISABLE_UPDATE = {"lr": 0.0}  # required of a task: a learning rate of 0 leaves the weights unchanged


def run_preflight(study: Study, *, device: str | None = None, album: Album | None = None) -> Report:
    """Checks the set-up of a study; album: see `preflight_task`. Raises UserError for an invalid task or configuration."""
    assert study.steps is not None  # only a command may end by itself
    return preflight_task(
        load_task(study.task_path, study.import_path),
        study.task_config,
        study.search.seed,
        steps=study.steps,
        settings=settings_of(study.space),
        baseline=study.baseline_settings,
        guards=study.guard_list,
        disable_update=DISABLE_UPDATE if study.calibration is None else study.calibration.disable_update,
        device=device,
        runs=study.search.trials + study.baseline_seeds,
        max_share=None if study.preflight is None else study.preflight.max_share,
        album=album,
    )


def preflight_task(
    task_class: Callable[[], Any],
    config: Mapping[str, Any],
    seed: int = 0,
    *,
    steps: int = 200,
    settings: Sequence[Mapping[str, Any]] = (),
    baseline: Mapping[str, Any] | None = None,
    guards: Sequence[Guard] = (NormRatio(), SmokeTest()),
    disable_update: Mapping[str, Any] = DISABLE_UPDATE,
    device: str | None = None,
    runs: int = 1,
    max_share: float | None = None,
    album: Album | None = None,
) -> Report:
    """Checks a task with `config`. settings: those that may be launched, on top of `config`; baseline: the baseline's, on top of
    it.

    disable_update: settings under which a step changes nothing. Every measurement has its own instance of the task. max_share: of
    the time of `runs` trainings, which no check may exceed; see `cost.Budget`. album: is filled with what the checks look at."""
    started = time.perf_counter()
    subject = Subject(task_class, {"steps": steps, **config}, seed, device, disable_update)
    checks: list[Check] = []
    begun = started
    budget = Budget(subject, steps, runs, max_share)
    for check in _checks(budget, settings, dict(baseline or {}), guards, album or Album()):
        now = time.perf_counter()
        checks.append(replace(check, seconds=round(now - begun, 3)))
        begun = now
    return Report(tuple(checks), time.perf_counter() - started)


def _checks(
    budget: Budget, settings: Sequence[Mapping[str, Any]], baseline: dict[str, Any], guards: Sequence[Guard], album: Album
) -> Iterator[Check]:
    """Checks in the order in which to look for a cause: what exists, what a step does, what is to be launched."""
    subject = budget.subject
    smoke_test = next((guard for guard in guards if isinstance(guard, SmokeTest)), None)
    limit = next((guard.limit for guard in guards if isinstance(guard, NormRatio)), NormRatio().limit)
    try:
        yield from _start(subject.make(baseline), budget, settings, guards, smoke_test, album)
    except Failure as failure:
        yield Check("setup", "bad_setup", str(failure), remedy="nothing can be launched before the task can be set up")
        return
    yield from guarded("seeds", lambda: launch.check_seeds(subject, baseline))
    yield from budget.checks(
        "parameter", lambda: readings.check_parameters(readings.Probe(subject, baseline, settings)), **readings.WORK
    )
    yield from guarded("parameter/searched", lambda: launch.check_settings(subject, baseline, settings))
    yield from guarded("parameter/last_step", lambda: launch.check_last_step(subject, baseline, settings, budget.steps))
    yield from budget.checks("update", lambda: updates.check_updates(subject, baseline), **updates.WORK)
    yield from budget.checks("trained", lambda: learning.check_learning(subject, baseline, smoke_test), **learning.WORK)
    yield from budget.checks("baseline/norm", lambda: launch.check_baseline(subject, baseline, limit), **launch.WORK)


def _start(
    task: Training,
    budget: Budget,
    settings: Sequence[Mapping[str, Any]],
    guards: Sequence[Guard],
    smoke_test: SmokeTest | None,
    album: Album,
) -> Iterator[Check]:
    """Checks of the task after its set-up. Its only step comes last."""
    sample, batch = budget.timed("sample", lambda: call(task, "sample", 0)), _first_forward(task, budget)
    too_long = budget.refusal("forward", **images.work(batch))
    seen = looked_at(task, images.look) if batch and too_long is None else None
    album.sample, album.seen = sample, seen
    if task.abilities().training_images:
        with contextlib.suppress(Failure):  # reported by its own check
            album.training_images = call(task, "training_images", 1)
    yield Check("setup", "ok", "the task sets up, samples and runs forward" if batch else "the task sets up and samples")
    if too_long is not None:
        yield too_long
    yield from guarded("weights", lambda: networks.check_weights(task))
    yield from guarded("text/tokens", lambda: launch.check_tokens(sample))
    if smoke_test is None:  # as in a training that starts from random weights
        yield unknown("smoke", "the study has switched its smoke test off")
    else:
        yield from budget.checks("smoke", lambda: networks.check_samples(task, smoke_test, sample), sample=1)
    yield from budget.checks("frozen/decoder", lambda: learning.check_decoder(task), forward=1, decode=6)
    yield from guarded("time_law", lambda: launch.check_law(task, seen))
    yield from guarded("data/steps", lambda: images.check_draws(task, seen))
    yield from budget.checks("flow/z0", lambda: flow.check_prediction(task), **flow.work(batch, 1))
    yield from budget.checks("flow/time", lambda: flow.check_time(task), **flow.work(batch, 1 + len(flow.TIMES)))
    yield from budget.checks("flow/t", lambda: flow.check_main_loss(task), forward=(1 + BACKWARD) * flow.STEPS_LOOKED_AT)
    yield from budget.checks("weights/kernels", lambda: flow.check_kernels(task), **flow.work(batch, 1 + len(flow.KERNELS)))
    yield from guarded("flow/noise", lambda: flow.check_noise(seen))
    yield from guarded("data/pairs", lambda: images.check_pairs(sample, seen))
    yield from guarded("flow/held_out", lambda: flow.check_held_out(sample, seen))
    yield from guarded("targets/shift", lambda: targets.check_targets(task, seen))
    yield from budget.checks("targets/round_trip", lambda: targets.check_round_trip(task, {}), step=6)
    yield from budget.checks("sampling", lambda: sampling.check_sampling(task, sample), sample=1)
    yield from guarded("sampling/error", lambda: images.check_samples(sample, seen))
    yield from guarded("data/files", lambda: images.check_data(task))
    yield from guarded("data/training_images", lambda: images.check_training_images(task, budget.steps, sample, seen))
    yield from guarded("loss/main", lambda: images.check_losses(seen))
    yield from budget.checks("ssim/precision", lambda: readings.check_ssim(task), forward=1, decode=batch)
    yield from guarded("gate", lambda: launch.check_gates(task, seen, settings, budget.steps, guards))
    yield from guarded("loss/first_step", lambda: launch.check_first_step(sample, _first_step(task, budget)))


def _first_forward(task: Training, budget: Budget) -> int:
    """The batch size, from a forward pass that is timed; 0 if the task has none."""
    if not task.abilities().forward:
        return 0
    with torch.no_grad():
        forward: Forward = budget.timed("forward", lambda: call(task, "forward", 1))
        budget.timed("decode", lambda: decoder_of(task, forward)(forward.z0[:1]).cpu())
    return len(forward.t)


def _first_step(task: Training, budget: Budget) -> dict[str, float]:
    return budget.timed("step", lambda: numbers(call(task, "step")))
