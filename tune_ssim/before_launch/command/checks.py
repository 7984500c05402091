"""Checks of a command by effects: what its starts show, compared with what was asked of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from tune_ssim.before_launch.calibration import TrainingCheck
from tune_ssim.before_launch.command.starts import Start, significant_digits
from tune_ssim.before_launch.command.startup_output import startup_checks
from tune_ssim.before_launch.preflight import rules, step_rules
from tune_ssim.before_launch.preflight.report import Check, unknown, warn
from tune_ssim.guards import Guard
from tune_ssim.guards.guard import without_metric
from tune_ssim.probes.norm_model import MAIN, SSIM, Array, NormModel
from tune_ssim.records import LOSS, LOSS_FLOW, SMOKE, TOTAL_NORM
from tune_ssim.study.space import MAX_T, WEIGHT
from tune_ssim.trials.training import same_setting

# Two starts with the same seed differ by what the kernels leave to chance: 0 on CPUs, 3e-3 in bf16 (tests/test_calibrate.py).
# Another batch differs by tens of percent (FACTS §1).
SAME_BATCH = 0.01
MIN_DIGITS = 6  # of a printed total_norm, for the cross term of the norm model (FACTS §7)
LOSS_LIKE = re.compile(r"loss|mse|\bce\b|nll", re.IGNORECASE)  # names of metrics that a batch decides, unlike times and rates


def check_start(start: Start, guards: Sequence[Guard], objective: str) -> Iterator[Check]:
    """The first start with the baseline's settings: whether it ran, what was read, what the guards can judge, what it said."""
    if start.failure:
        yield Check("start", "bad_setup", start.failure, {}, "run the command by hand with the same settings")
        return
    names = sorted({name for record in start.records for name in record.values})
    seconds = {"first_record_s": start.first_record_s, "step_s": start.step_s}
    sentence = f"the command ran {len(start.records)} steps, the first of them after {start.first_record_s:.1f} s"
    yield Check("start", "ok", sentence, seconds)
    yield _records(start, names)
    yield _total_norm(start)
    yield _guards(guards, names)
    yield _objective(objective, names)
    if start.checkpoints:
        yield Check("checkpoints", "ok", f"checkpoints found at steps {', '.join(map(str, start.checkpoints))}")
    yield from start.samples or ()
    yield from startup_checks(start.output)
    yield from _settings(start)
    if start.records:
        yield from rules.fingerprints(start.records[0].values)


def _records(start: Start, names: Sequence[str]) -> Check:
    steps = [record.step for record in start.records]
    evidence = {"steps": float(len(steps)), "metrics": float(len(names))}
    sentence = f"steps {steps[0]} to {steps[-1]}, metrics {', '.join(names)}"
    apart = [later - earlier for earlier, later in itertools.pairwise(steps)]
    if apart and median(apart) > 1:
        sentence += f"; one record every {median(apart):g} steps"
    if start.reading:
        return Check("records", "warn", f"{sentence}; not read: {start.reading}", evidence, "see `records` in docs/own_command.md")
    return Check("records", "ok", sentence, evidence)


def _guards(guards: Sequence[Guard], names: Sequence[str]) -> Check:
    """Guards whose metrics have not appeared. Samples come later, and the total_norm has its own check."""
    blind = without_metric(guards, names)
    blind = {name: missing for name, missing in blind.items() if missing[0] != TOTAL_NORM and not missing[0].startswith(SMOKE)}
    evidence = {"guards": float(len(guards)), "without_metric": float(len(blind))}
    if not blind:
        return Check("guards", "ok", f"{', '.join(guard.name for guard in guards)}: their metrics are there", evidence)
    sentence = "; ".join(f"{name} has no {', '.join(missing)} to judge" for name, missing in blind.items())
    return Check("guards", "warn", sentence, evidence, "print these metrics, or switch the guard off in `guards`")


def _objective(objective: str, names: Sequence[str]) -> Check:
    metric = objective.removeprefix("delta_")
    if metric in names:
        return Check("objective", "ok", f"{objective}: {metric} is among the metrics")
    return unknown("objective", f"{objective}: {metric} is none of the training's metrics; it must come from an evaluation")


def _total_norm(start: Start) -> Check:
    norms = start.values(TOTAL_NORM)
    found = int(np.count_nonzero(~np.isnan(norms)))
    evidence = {"steps": float(len(norms)), "with_total_norm": float(found)}
    if not found:
        sentence = "no gradient norm was printed or observed: the norm guard cannot judge"
        remedy = "print what clip_grad_norm_ returns as total_norm, or switch the guard off with `guards: {norm_ratio: null}`"
        return Check(TOTAL_NORM, "warn", sentence, evidence, remedy)
    digits = significant_digits(norms.tolist())
    source = "observed" if start.held is not None else "printed"
    return Check(TOTAL_NORM, "ok", f"{source} at {found} of {len(norms)} steps", evidence | {"digits": float(digits)})


def digits_finding(starts: Sequence[Start]) -> Iterator[Check]:
    """What the digits of a printed total_norm leave unknown."""
    digits = significant_digits([norm for start in starts for norm in start.values(TOTAL_NORM)])
    if digits < MIN_DIGITS:
        sentence = (
            f"total_norm is printed with {digits} significant digits: predictions are no better than {10 ** (1 - digits):.0e}, and "
            "the angle between the two gradients is not known where one of them is much larger"
        )
        yield warn("digits", sentence, f"print at least {MIN_DIGITS} digits, e.g. {{total_norm:.8g}}")


def _settings(start: Start) -> Iterator[Check]:
    """Settings that the program echoes differently from how they were given."""
    for name, asked in start.job.config.items():
        found = start.settings.get(name, asked)
        if not same_setting(asked, found):
            yield step_rules.parameter(name, asked, found)


def check_seeds(first: Start, again: Start, other: Start) -> Iterator[Check]:
    """The same seed must give the same batches, and another seed others. All three with the weights held."""
    same = difference(first, again)
    if same is None:
        yield unknown("seeds/same", "two starts have no loss and no total_norm in common")
        return
    evidence = {"largest_difference": same}
    if same <= SAME_BATCH:
        words = "the same numbers" if same == 0 else f"numbers that differ by {same:.1e}"
        yield Check("seeds/same", "ok", f"two starts with the same seed give {words}: trials are compared in pairs", evidence)
    else:
        sentence = f"two starts with the same seed differ by {same:.1%}: trials and baseline see different batches, unpaired"
        remedy = "seed the model, the noise and the order of the data with {seed}, on every rank and in every data worker"
        yield Check("seeds/same", "warn", sentence, evidence, remedy)
    unequal = difference(first, other)
    if unequal is None or same > SAME_BATCH:
        yield unknown("seeds/other", "randomness does not come from the seed alone")
    else:
        yield step_rules.other_seed(unequal <= max(10 * same, 1e-6))


def difference(one: Start, other: Start) -> float | None:
    """The largest relative difference of a loss or the total_norm between two starts, medians over steps; None without any."""
    names = {name for record in (*one.records, *other.records) for name in record.values}
    found = []
    for name in names:
        if name != TOTAL_NORM and not LOSS_LIKE.search(name):
            continue
        a, b = one.values(name), other.values(name)
        count = min(len(a), len(b))
        both = np.isfinite(a[:count]) & np.isfinite(b[:count])
        if both.any():
            found.append(float(np.median(_relative(a[:count][both], b[:count][both]))))
    return max(found, default=None)


def _relative(a: Array, b: Array) -> Array:
    scale = np.maximum(np.abs(a), np.abs(b))
    result: Array = np.divide(np.abs(a - b), scale, out=np.zeros_like(scale), where=scale > 0)
    return result


def check_held(start: Start, trained: Start | None) -> Check:
    """Whether the updates were off, on which every other comparison stands. trained: the same start with updates, where a
    setting switches them off."""
    if start.held is not None:
        if start.held:
            return Check("update_off", "ok", f"the weights are unchanged after {len(start.records)} held steps")
        return Check(
            "update_off", "bad_setup", "the weights changed although weight updates were disabled", {}, "report this program"
        )
    if trained is None:
        return unknown("update_off", "the program could not be observed: only the first step of a start is before an update")
    if difference(start, trained) == 0:
        sentence = (
            f"{len(start.records)} steps with calibration.update_off give the same numbers as without it: it disables nothing"
        )
        return Check("update_off", "bad_setup", sentence, {}, "name a setting that keeps the weights as they are")
    return Check("update_off", "ok", "with calibration.update_off the steps differ from those that train")


def check_batches(start: Start, has_noise: bool) -> Check:
    """Whether each step draws its own images, noise and t: with the weights held, a batch that returns has the same loss.

    has_noise: the study is about a diffusion model, where nothing returns."""
    names = {name for record in start.records for name in record.values if name == TOTAL_NORM or LOSS_LIKE.search(name)}
    columns = [values for name in sorted(names) if np.isfinite(values := start.values(name)).all() and len(values)]
    if not columns or len(columns[0]) < step_rules.MIN_PAIRS or significant_digits(np.concatenate(columns).tolist()) < MIN_DIGITS:
        return unknown("data/steps", f"too few steps or digits of a loss or a {TOTAL_NORM}")
    numbers = np.stack(columns)
    period = next((k for k in range(1, numbers.shape[1] // 2 + 1) if np.array_equal(numbers[:, k:], numbers[:, :-k])), None)
    if period is None:
        return Check("data/steps", "ok", f"{numbers.shape[1]} held steps have their own numbers each: each has its own batch")
    when = "at every step" if period == 1 else f"every {period} steps"
    sentence = f"with the weights held, the same numbers return {when}: the same images, noise and t"
    remedy = "draw new noise and t at every step, and shuffle the data"
    return Check("data/steps", "bad_setup" if has_noise else "warn", sentence, {"period": float(period)}, remedy)


def check_updates(held: Start, trained: Start) -> Check:
    """What the updates do to the loss: the same batches, with the weights held and with the baseline's updates."""
    if trained.failure:
        return Check(
            "update", "bad_setup", f"with updates: {trained.failure}", {}, "run the command by hand with the same settings"
        )
    if difference(held, trained) == 0 and significant_digits(trained.values(TOTAL_NORM).tolist()) >= MIN_DIGITS:
        sentence = f"{len(trained.records)} steps give the same numbers with and without updates: nothing is trained"
        remedy = "check the learning rate, the optimiser's parameters and that step() is called"
        return Check("update", "bad_setup", sentence, {}, remedy)
    name = LOSS_FLOW if np.isfinite(trained.values(LOSS_FLOW)).any() else LOSS
    return step_rules.loss_under_updates("update", held.values(name).tolist(), trained.values(name).tolist())


def check_weight(starts: Sequence[Start]) -> Check | None:
    """A fault if starts that differ in the weight of the SSIM loss alone have the same total_norm on every batch."""
    by_rest: dict[str, list[Start]] = {}
    for start in starts:
        rest = {name: value for name, value in start.job.config.items() if name not in (WEIGHT, MAX_T)}
        by_rest.setdefault(replace(start.job, config=rest).key, []).append(start)
    for group in by_rest.values():
        weights = sorted({start.job.config.get(WEIGHT, 0.0) for start in group})
        norms = [start.values(TOTAL_NORM) for start in group]
        if len(weights) > 1 and all(np.array_equal(one, norms[0], equal_nan=True) for one in norms):
            sentence = f"{WEIGHT} {weights[0]:g} and {weights[-1]:.3g} give the same total_norm on {len(norms[0])} batches"
            remedy = f"follow {WEIGHT} from the command line to the loss that is minimised; is its gradient detached?"
            return Check(f"parameter/{WEIGHT}", "bad_setup", f"{sentence}: it does not reach the loss", {}, remedy)
    return None


def check_effects(model: NormModel, check: TrainingCheck) -> Iterator[Check]:
    """Whether weight, gate and gradient scale act on total_norm as they should. check: with the gain split differently."""
    q, active = model.q, model.active
    strongest = float(np.median(q[active][:, SSIM, SSIM])) if active.any() else 0.0
    if strongest > 0:
        gain = float(np.sqrt(np.median(q[active][:, MAIN, MAIN]) / strongest))
        evidence = {"gain_for_equal_norms": gain}
        yield Check(
            "parameter/ssim_loss_weight", "ok", f"it acts: the SSIM gradient equals the main one at gain {gain:.3g}", evidence
        )
    if len(model.max_ts) > 1:
        yield _gate_effect(model)
    if check.setting["ssim_grad_scale"] != model.held.get("ssim_grad_scale", 1.0):
        yield _scale_effect(model, check)


def _gate_effect(model: NormModel) -> Check:
    name, evidence = "parameter/ssim_loss_max_t", {"gates": float(len(model.max_ts))}
    widest = model.q[-1, :, SSIM, SSIM]
    changed = [bool(np.any(_relative(model.q[i, :, SSIM, SSIM], widest) > SAME_BATCH)) for i in range(len(model.max_ts) - 1)]
    if any(changed):
        return Check(name, "ok", "it acts: another gate gives another SSIM gradient", evidence)
    gates = ", ".join(f"{max_t:g}" for max_t in model.max_ts)
    sentence = f"max_t {gates} give the same total_norm on {len(model.batches)} batches: it does not reach the loss"
    return Check(name, "bad_setup", sentence, evidence, "follow ssim_loss_max_t from the command line to the mask of the loss")


def _scale_effect(model: NormModel, check: TrainingCheck) -> Check:
    """The measured norms against two predictions: with the gradient scale, and as if it were not applied."""
    name, setting = "parameter/ssim_grad_scale", check.setting
    scale, weight = setting["ssim_grad_scale"], setting["ssim_loss_weight"]
    held = model.held.get("ssim_grad_scale", 1.0)
    gate = model.max_ts.index(setting["ssim_loss_max_t"])
    positions = [model.batches.index(step) for step in check.steps]

    def error(gain: float) -> float:
        v = np.array([1.0, gain])
        norms = [float(np.sqrt(v @ model.q[gate, k][np.ix_([MAIN, SSIM], [MAIN, SSIM])] @ v)) for k in positions]
        return median(max(a / b, b / a) - 1 for a, b in zip(norms, check.measured, strict=True))

    with_scale, without = error(weight * scale), error(weight * held)
    evidence = {"error": with_scale, "error_if_not_applied": without, "asked": scale}
    if with_scale <= SAME_BATCH:
        return Check(name, "ok", f"it acts: weight {weight:.3g} at scale {scale:g} pushes like their product", evidence)
    if without <= SAME_BATCH:
        sentence = f"ssim_grad_scale {scale:g} pushes like {held:g}: it is not applied to the gradient"
        return Check(name, "bad_setup", sentence, evidence, "scale the gradient of the decoder's output, not only the log")
    sentence = f"weight {weight:.3g} at scale {scale:g} does not push like their product: total_norm is off by {with_scale:.1%}"
    return Check(name, "warn", sentence, evidence, "a clamp, or a scale that acts elsewhere: search the weight alone")


def check_setting(name: str, one: Start, other: Start) -> Check:
    """A searched setting that is not of the auxiliary loss, at both ends of its range, with updates: something must change."""
    check = f"parameter/{name}"
    ends = [start.job.config.get(name) for start in (one, other)]
    found = difference(one, other)
    if found is None:
        return unknown(check, "two starts have no loss and no total_norm in common")
    evidence = {"largest_difference": found}
    if found > 0:
        return Check(check, "ok", f"it acts: {ends[0]} and {ends[1]} give other numbers", evidence)
    sentence = f"{name} {ends[0]} and {ends[1]} give the same numbers over {len(one.records)} steps: it does not reach the training"
    return Check(check, "bad_setup", sentence, evidence, f"follow {name} from the command line to the line that uses it")


def check_baseline(model: NormModel, limit: float) -> Check:
    """The baseline's total_norm against that of the main loss alone, on the same batches. limit: the norm guard's."""
    return step_rules.baseline_push(
        float(np.median(model.baseline)), float(np.median(model.baseline)) / model.baseline_ratio_main, limit
    )
