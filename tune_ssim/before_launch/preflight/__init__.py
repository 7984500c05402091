"""Preflight: a few seconds of checks before a study, so that no setting is blamed for a broken set-up.

It tests effects, not flags: what a step does, not what its configuration says. It measures a training through the optional
methods of `trials.training.Training`. Checks that need a missing method are `unknown`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tune_ssim.before_launch.preflight import flow, images, launch, learning, networks, sampling, targets, updates
from tune_ssim.before_launch.preflight import steps as readings
from tune_ssim.before_launch.preflight.launch import settings_of
from tune_ssim.before_launch.preflight.report import Check, Report, unknown
from tune_ssim.before_launch.preflight.subject import Failure, Subject, call, guarded, numbers
from tune_ssim.guards import Guard, NormRatio, SmokeTest
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.training import Training

if TYPE_CHECKING:
    from tune_ssim.study.study import Study

__all__ = ["preflight_task", "run_preflight", "settings_of"]

DISABLE_UPDATE = {"lr": 0.0}  # required of a task: a learning rate of 0 leaves the weights unchanged


def run_preflight(study: Study, *, device: str | None = None) -> Report:
    """Checks the set-up of a study. Raises UserError for an invalid task or configuration."""
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
) -> Report:
    """Checks a task with `config`. settings: those that may be launched, on top of `config`; baseline: the baseline's, on top of
    it.

    disable_update: settings under which a step changes nothing. Every measurement has its own instance of the task."""
    started = time.perf_counter()
    subject = Subject(task_class, {"steps": steps, **config}, seed, device, disable_update)
    checks: list[Check] = []
    begun = started
    for check in _checks(subject, steps, settings, dict(baseline or {}), guards):
        now = time.perf_counter()
        checks.append(replace(check, seconds=round(now - begun, 3)))
        begun = now
    return Report(tuple(checks), time.perf_counter() - started)


def _checks(
    subject: Subject, steps: int, settings: Sequence[Mapping[str, Any]], baseline: dict[str, Any], guards: Sequence[Guard]
) -> Iterator[Check]:
    """Checks in the order in which to look for a cause: what exists, what a step does, what is to be launched."""
    smoke_test = next((guard for guard in guards if isinstance(guard, SmokeTest)), None)
    limit = next((guard.limit for guard in guards if isinstance(guard, NormRatio)), NormRatio().limit)
    try:
        yield from _start(subject.make(baseline), steps, settings, guards, smoke_test)
    except Failure as failure:
        yield Check("setup", "bad_setup", str(failure), remedy="nothing can be launched before the task can be set up")
        return
    yield from guarded("parameter", lambda: readings.check_parameters(readings.Probe(subject, baseline, settings)))
    yield from guarded("parameter/searched", lambda: launch.check_settings(subject, baseline, settings))
    yield from guarded("seeds", lambda: launch.check_seeds(subject, baseline))
    yield from guarded("update", lambda: updates.check_updates(subject, baseline))
    yield from guarded("trained", lambda: learning.check_learning(subject, baseline, smoke_test))
    yield from guarded("baseline/norm", lambda: launch.check_baseline(subject, baseline, limit))


def _start(
    task: Training, steps: int, settings: Sequence[Mapping[str, Any]], guards: Sequence[Guard], smoke_test: SmokeTest | None
) -> Iterator[Check]:
    """Checks of the task after its set-up. Its only step comes last."""
    sample, seen = call(task, "sample", 0), images.look(task) if task.abilities().forward else None
    yield Check("setup", "ok", "the task sets up, samples and runs forward" if seen else "the task sets up and samples")
    yield from guarded("weights", lambda: networks.check_weights(task))
    yield from guarded("text/tokens", lambda: launch.check_tokens(sample))
    if smoke_test is None:  # as in a training that starts from random weights
        yield unknown("smoke", "the study has switched its smoke test off")
    else:
        yield from guarded("smoke", lambda: networks.check_samples(task, smoke_test, sample))
    yield from guarded("frozen/decoder", lambda: learning.check_decoder(task))
    yield from guarded("data/steps", lambda: images.check_draws(task, seen))
    yield from guarded("flow/z0", lambda: flow.check_prediction(task))
    yield from guarded("flow/time", lambda: flow.check_time(task))
    yield from guarded("data/pairs", lambda: images.check_pairs(sample, seen))
    yield from guarded("targets/shift", lambda: targets.check_targets(task, seen))
    yield from guarded("targets/round_trip", lambda: targets.check_round_trip(task, {}))
    yield from guarded("sampling", lambda: sampling.check_sampling(task, sample))
    yield from guarded("data/files", lambda: images.check_data(task))
    yield from guarded("data/training_images", lambda: images.check_training_images(task, steps, sample, seen))
    yield from guarded("loss/main", lambda: images.check_losses(seen))
    yield from guarded("ssim/precision", lambda: readings.check_ssim(task))
    yield from guarded("time_law", lambda: launch.check_law(task, seen))
    yield from guarded("gate", lambda: launch.check_gates(task, seen, settings, steps, guards))
    yield from guarded("loss/first_step", lambda: launch.check_first_step(sample, numbers(call(task, "step"))))
