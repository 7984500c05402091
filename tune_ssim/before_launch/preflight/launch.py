"""Checks of the planned trials: enough active steps for the guards, settings in force, a usable baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from tune_ssim.base.errors import UserError
from tune_ssim.base.numbers import is_number
from tune_ssim.before_launch.preflight import rules, step_rules
from tune_ssim.before_launch.preflight.images import Seen
from tune_ssim.before_launch.preflight.report import Check, ok, unknown, warn
from tune_ssim.before_launch.preflight.steps import seeded
from tune_ssim.before_launch.preflight.subject import Failure, Subject, Unavailable, call, numbers, time_law
from tune_ssim.guards import Guard, NormRatio
from tune_ssim.records import LOSS, LOSS_FLOW, TOTAL_NORM, TOTAL_NORM_MAIN
from tune_ssim.study.space import GAIN, KNOWN, MAX_T, WARM_UP, WEIGHT, Space, resolve_settings
from tune_ssim.trials.training import Sample, same_setting

ADDED = ("kl_weight", "kl_alpha", "dino_weight", "dino_alpha")  # weights of terms that are never negative
LONG_AFTER = 100  # times the length of a trial
BASELINE_STEPS = 6  # the median of their norms is used
WORK = {"setup": 3, "step": 2 * BASELINE_STEPS}  # of `check_baseline`


def settings_of(space: Space) -> list[dict[str, Any]]:
    """Settings that represent a space: its points, and the ends of every parameter except the gain."""
    settings: list[dict[str, Any]] = []
    for stage in space.stages:
        settings += map(resolve_settings, stage.point_configs())
        for name, domain in stage.parameters.items():
            if name == GAIN:
                continue  # may be given as a norm ratio, which only calibration can turn into a number
            settings += [resolve_settings({**stage.fixed, name: value}) for value in domain.listed]
    return settings


def check_gates(
    task: Any, seen: Seen | None, settings: Sequence[Mapping[str, Any]], steps: int, guards: Sequence[Guard]
) -> Iterator[Check]:
    """Expected active steps for every gate that may be launched."""
    warm_up = call(task, "effective").get(WARM_UP)
    if is_number(warm_up) and warm_up > steps:
        yield step_rules.warm_up(steps / warm_up, steps)
    law = time_law(task)
    batch = seen.batch_size if seen is not None else call(task, "effective").get("batch_size")
    if not isinstance(batch, int):
        raise Unavailable("neither forward() nor effective() says how large a batch is")
    targets = batch * (1.0 if seen is None else seen.eligible)
    in_force = call(task, "effective").get(MAX_T)
    chosen = [setting.get(MAX_T, in_force) for setting in settings if MAX_T in setting or WEIGHT in setting] or [in_force]
    gates = {float(gate) for gate in chosen if gate is not None}
    if not gates:
        raise Unavailable(f"nothing sets {MAX_T}")
    needed = next((guard.window + guard.patience - 1 for guard in guards if isinstance(guard, NormRatio)), 1)
    yield step_rules.gates({gate: 1 - (1 - law.active_fraction(gate)) ** targets for gate in gates}, steps, needed)


def check_law(task: Any, seen: Seen | None) -> Iterator[Check]:
    """Checks the Kolmogorov-Smirnov distance between the drawn times and the declared law."""
    law = time_law(task)
    if seen is None:
        raise Unavailable("no forward pass was seen")
    ordered = sorted(min(max(t, 0.0), 1.0) for t in seen.t.tolist())
    n = len(ordered)
    if not n:
        raise Unavailable("no sample of the first steps is a generation target")
    distance = max(max((i + 1) / n - law.active_fraction(t), law.active_fraction(t) - i / n) for i, t in enumerate(ordered))
    yield step_rules.law_of_t(distance, n)


def check_settings(subject: Subject, base: Mapping[str, Any], settings: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """Checks searched settings that do not belong to the auxiliary losses: each must be accepted, and then be in force."""
    in_force = call(subject.make(base), "effective")
    asked = {name: value for setting in settings for name, value in setting.items() if name not in KNOWN}
    for name, value in asked.items():
        try:
            in_force_now = call(subject.make({**base, name: value}), "effective")
        except UserError as error:
            yield Check(f"parameter/{name}", "bad_setup", f"the space sets {name} to {value!r}: {error}", {}, "change the space")
            continue
        if not same_setting(value, in_force_now.get(name)):
            yield step_rules.parameter(name, value, in_force_now.get(name))
    misspelt = next(name for name in ("ssim_los_weight", "ssim_los_weight_") if name not in in_force)
    try:
        subject.make({**base, misspelt: 1.0})
    except UserError:
        yield ok("parameter/unknown", "the task refuses unknown settings")
    else:
        sentence = f"the task accepts the unknown setting {misspelt!r}: a misspelt parameter would be ignored silently"
        yield warn("parameter/unknown", sentence, "refuse unknown keys in setup() with a ValueError")


def check_last_step(
    subject: Subject, base: Mapping[str, Any], settings: Sequence[Mapping[str, Any]], steps: int
) -> Iterator[Check]:
    """Checks what auxiliary weights add to the loss at the end of a trial, where one may still be warming up."""
    launched = [subject.config, base, *settings]
    asked = {name: value for setting in launched for name, value in setting.items() if name in ADDED and is_number(value)}
    asked = {name: value for name, value in asked.items() if value and name in call(subject.make(base), "effective")}
    for name, value in asked.items():
        try:
            with_it, without = (_losses_at(subject, {**base, name: amount}, steps) for amount in (value, 0.0))
        except (Failure, UserError) as reason:
            raise Unavailable(f"steps after the last one cannot be taken: {reason}") from None
        added = [one - other for one, other in zip(with_it, without, strict=True)]
        if check := step_rules.last_step(name, value, max(added[:2], key=abs), added[2], with_it[0]):
            yield check


def _losses_at(subject: Subject, settings: Mapping[str, Any], steps: int) -> list[float]:
    """The loss in the middle of a trial, at its end, and long after it, with the same weights. What counts steps is known by
    counting the first two."""
    task, counts = subject.unmoved(settings), []
    for _ in range(2):
        call(task, "step")
        counts.append({name: value for name, value in call(task, "state_dict").items() if isinstance(value, int)})
    counters = [name for name, value in counts[0].items() if value == 1 and counts[1].get(name) == 2]
    if not counters:
        raise Unavailable("state_dict() holds no number of the step")
    losses = []
    for n in (max(1, steps // 2), steps, LONG_AFTER * steps):
        call(task, "load_state_dict", {**call(task, "state_dict"), **dict.fromkeys(counters, n - 1)})
        losses.append(numbers(call(task, "step")).get(LOSS, math.nan))
    return losses


def check_seeds(subject: Subject, base: Mapping[str, Any]) -> Iterator[Check]:
    """Checks that another seed gives another batch of step 1."""
    task = subject.unmoved(base)
    if not task.abilities().has("forward") and not task.abilities().training_images:
        yield step_rules.same_step(_difference(subject, base, seed=False), _difference(subject, base, seed=True))
    first, other = (call(subject.make(base, seed), "training_images", 1) for seed in (subject.seed, subject.seed + 1))
    yield step_rules.other_seed(first.shape == other.shape and torch.equal(first, other))


def _difference(subject: Subject, base: Mapping[str, Any], *, seed: bool) -> float:
    """Relative difference of the main loss of step 1 between two instances; seed: with the global generators in the same state."""
    losses = []
    for number in (1, 2):
        task = subject.unmoved(base)
        found = numbers(seeded(task, "step", seed=0 if seed else number))
        losses.append(found.get(LOSS_FLOW, found.get(LOSS, math.nan)))
    return abs(losses[0] - losses[1]) / max(*map(abs, losses), 1e-12)


def check_baseline(subject: Subject, baseline: Mapping[str, Any], limit: float) -> Iterator[Check]:
    """Compares total_norm of the baseline and of the main loss, on the same steps without updates."""
    names = [name for name in ("ssim_loss_weight", "pixel_loss_weight") if name in call(subject.make(baseline), "effective")]
    if not names:
        yield unknown("baseline/norm", "effective() names no auxiliary weight")
        return
    with_loss = _norms(subject, baseline)
    active = [step.get("pixel_active_fraction", 1.0) > 0 for step in with_loss]
    chosen = [i for i, is_active in enumerate(active) if is_active] or list(range(BASELINE_STEPS))
    if all(TOTAL_NORM_MAIN in step for step in with_loss):
        main = [step[TOTAL_NORM_MAIN] for step in with_loss]
    else:
        main = [step[TOTAL_NORM] for step in _norms(subject, {**baseline, **dict.fromkeys(names, 0.0)})]
    yield step_rules.baseline_push(median(with_loss[i][TOTAL_NORM] for i in chosen), median(main[i] for i in chosen), limit)


def _norms(subject: Subject, settings: Mapping[str, Any]) -> list[dict[str, float]]:
    task = subject.unmoved(settings)
    steps = [numbers(call(task, "step")) for _ in range(BASELINE_STEPS)]
    if any(TOTAL_NORM not in step for step in steps):
        raise Unavailable(f"step() records no {TOTAL_NORM}")
    return steps


def check_tokens(sample: Sample) -> Iterator[Check]:
    """Checks generated token ids, if the task generates text."""
    ids, size = sample.token_ids, sample.vocabulary_size
    if ids is not None and size is not None and ids.numel():
        outside = int(((ids < 0) | (ids >= size)).sum())
        yield rules.tokens(ids.numel(), outside, int(ids.min()), int(ids.max()), size)


def check_first_step(sample: Sample, metrics: Mapping[str, float]) -> Iterator[Check]:
    """Checks the first cross-entropy and the label mask, if the task has text, and the values of known trainings."""
    if rules.LOSS_CE in metrics:
        yield rules.caption_loss(metrics[rules.LOSS_CE], sample.vocabulary_size, metrics.get(rules.LABEL_FRACTION))
    yield from rules.fingerprints(metrics)
