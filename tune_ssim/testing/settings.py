"""Checks of setup() and effective(), and of settings by their effects, with preflight's own checks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tune_ssim.base.errors import UserError
from tune_ssim.before_launch.preflight import step_rules
from tune_ssim.before_launch.preflight.report import Check, broken, ok, unknown, warn
from tune_ssim.before_launch.preflight.steps import LARGE, MAIN_ALONE, NEUTRAL, Probe, check_parameters, read
from tune_ssim.before_launch.preflight.subject import Failure, call, failure_of
from tune_ssim.records import LOSS, LOSS_SSIM
from tune_ssim.testing.runs import GENERATORS, Run
from tune_ssim.testing.subject import ClassUnderTest
from tune_ssim.trials.checkpoint import tensors_of
from tune_ssim.trials.training import same_setting

WEIGHT, MAX_T, GRAD_SCALE, CLIP = "ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale", "max_grad_norm"
MISSPELT = "ssim_loss_wieght"
NOT_WEIGHTS = re.compile(r"/state/|/param_groups/|/running_(mean|var)$")  # in a state: the optimiser's, and batch statistics
CLIPPING = "step/total_norm/clipping"
# Names of preflight's checks in this suite, and what to look for in the code of a class.
NAMES = {"parameter/max_grad_norm": CLIPPING, "batches": "random/configuration", f"parameter/{WEIGHT}": f"{WEIGHT}/felt"}
REMEDIES = {
    CLIPPING: "norm = torch.nn.utils.clip_grad_norm_(parameters, limit) returns the norm before clipping: record that",
    "random/configuration": f"{GENERATORS}, not of the configuration; draw the same numbers whether or not a loss needs them",
    f"{WEIGHT}/felt": (
        f"does {WEIGHT} reach the loss? is the loss added to what backward() is called on? is the prediction or the decoder "
        "detached, or inside no_grad()?"
    ),
}


def check_setup(subject: ClassUnderTest) -> Iterator[Check]:
    """Checks that setup() accepts the configuration and refuses unknown keys."""
    given, task = dict(subject.config), subject.task_class()
    try:
        task.setup(given, subject.seed, subject.device)
    except ValueError as error:
        remedy = "accept 'steps', which every trial sets, or pass what it needs: check_task(…, config={…})"
        yield broken("setup", f"setup() refuses the configuration {dict(subject.config)}: {error}", remedy)
        return
    except (Exception, SystemExit) as error:
        found = failure_of(task, "setup", error)
        yield broken("setup", str(found), found.remedy)
        return
    if given != dict(subject.config):
        yield broken("setup/config", "setup() changes the mapping that it is given", "copy it: config = dict(config)")
    yield ok("setup", f"setup() accepts {dict(subject.config)}")
    name = "setup/unknown_key"
    try:
        subject.make({MISSPELT: 1.0})
    except UserError as refusal:
        if MISSPELT in str(refusal):
            yield ok(name, "setup() refuses an unknown key")
        else:
            yield warn(name, f"setup() refuses an unknown key without naming it: {refusal}", "name the key, and the known ones")
    except Failure as error:
        remedy = "raise ValueError that names the key: a study takes anything else for a failure of the training"
        yield broken(name, f"an unknown key ends in {str(error).removeprefix('setup() failed: ')}", remedy)
    else:
        sentence = f"setup() accepts the unknown key {MISSPELT!r}: searching a misspelt parameter would do nothing"
        yield broken(name, sentence, "if unknown := set(config) - KNOWN: raise ValueError(f'unknown key {sorted(unknown)[0]!r}')")


def check_effective(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    """Checks that effective() reports the settings in force: those of the configuration, and a weight."""
    if "effective" in subject.broken_methods:
        return
    weight = {WEIGHT: 0.5} if subject.accepts({WEIGHT: 0.5}) else {}
    found = call(subject.make(weight), "effective")
    if not isinstance(found, Mapping):
        yield broken("effective", f"effective() returned a {type(found).__name__}", "return a dict of JSON values")
        return
    wrong = []
    for name, value in found.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            sentence = f"effective() returns a {type(value).__name__} as {name}, which JSON cannot hold"
            wrong.append(broken(f"effective/{name}", sentence, "return float(…), int(…), str(…) or .item() of it"))
    asked = {**subject.config, **weight}
    for name in (name for name in asked if name in found and not same_setting(asked[name], found[name])):
        sentence = f"{name} was set to {asked[name]!r} but effective() says {found[name]!r}"
        wrong.append(broken(f"effective/{name}", sentence, f"read {name} where it is used; does it arrive there from setup()?"))
    if weight and WEIGHT not in found:
        sentence = f"effective() does not report {WEIGHT}: nobody can see whether the searched value is in force"
        remedy = "report it as it is used: **loss.effective() of a DecodedLoss"
        wrong.append(broken(f"effective/{WEIGHT}", sentence, remedy))
    yield from wrong
    if refused := [name for name, value in NEUTRAL.items() if name in found and not subject.accepts({name: value})]:
        sentence = f"effective() reports {', '.join(refused)}, which setup() refuses: preflight tries to set what is in force"
        yield warn("effective/settable", sentence, "accept them in setup(), or leave them out of effective()")
    if CLIP not in found:
        sentence = f"effective() does not report {CLIP}: a study assumes that there is no gradient clipping"
        remedy = f"report {CLIP}: the limit given to clip_grad_norm_, or None without clipping"
        yield unknown(f"effective/{CLIP}", sentence, remedy)
    if not wrong:
        yield ok("effective", f"effective() reports {len(found)} parameters as JSON values")


def check_still(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    """Checks that the update can be switched off, is on otherwise, and that each step has its own batch."""
    switch = ", ".join(f"{name} = {value!r}" for name, value in subject.disable_update.items())
    try:
        task = subject.make(subject.disable_update)
    except UserError as refusal:
        yield unknown(
            "still",
            f"the update cannot be switched off: setup() refuses {switch}: {refusal}",
            "accept it, or name the setting that does it: check_task(…, disable_update={…}), calibration: {disable_update: {…}}",
        )
        return
    before = _weights(subject, task)
    metrics = subject.steps(task, max(2, run.k))
    moved = _moved(before, _weights(subject, task))
    if not before:
        remedy = "implement trainable_parameters(), or add the weights to state_dict()"
        yield unknown("still", f"no weights are visible, so it is unknown whether {switch} leaves them unchanged", remedy)
    elif moved:
        yield broken(
            "still",
            f"{len(metrics)} steps with {switch} change {moved}: calibration would measure a moving model",
            "a learning rate of 0 must leave everything unchanged: no update outside the optimiser, no weight decay apart from lr, "
            "no lower limit in a schedule",
        )
    else:
        yield ok("still", f"{switch} leaves the weights unchanged")
    if all(not subject.difference(metrics[:1], [later]) for later in metrics[1:]):
        sentence = f"with {switch} all of {len(metrics)} steps record the same numbers: every step sees one batch"
        yield broken("random/batches", sentence, f"step n needs its own batch, t and noise; {GENERATORS}")
    else:
        yield ok("random/batches", "each step has its own batch")
    task = subject.make()
    before = _weights(subject, task)
    subject.steps(task, 2 * run.k)
    if before and not _moved(before, _weights(subject, task)):
        remedy = "is the learning rate 0 at the start? does the optimiser have the parameters?"
        yield warn("trains", f"nothing moves in {2 * run.k} steps", remedy)


def check_clipping(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    """Checks that total_norm is measured before clipping: it exceeds a low limit, or one that is in force and cannot be set."""
    if not _can_be_read(subject, run):
        return
    if unlimited := next(({CLIP: limit} for limit in (None, 1e9) if subject.accepts({CLIP: limit})), None):
        norm: float | None = read(subject, unlimited).total_norm
        limit: Any = norm / 10 if norm and math.isfinite(norm) else 1e-3
        clipped = read(subject, {CLIP: limit})
    else:
        clipped = read(subject, {})
        limit = clipped.effective.get(CLIP)
        norm = None if clipped.expected is None else clipped.expected.total_norm
    if not isinstance(limit, (int, float)) or norm is None:
        return
    if clipped.after is None and unlimited and not _limit_acts(subject, unlimited, {CLIP: limit}):
        sentence = f"total_norm is {norm:.4g} with and without a {CLIP} of {limit:.4g}, which changes no weight either"
        yield unknown(CLIPPING, f"{sentence}: whether it is measured before clipping cannot be seen", REMEDIES[CLIPPING])
        return
    after = min(clipped.total_norm, limit) if clipped.after is None else clipped.after
    yield _renamed(step_rules.clipping(limit, clipped.total_norm, after, norm))


def _limit_acts(subject: ClassUnderTest, unlimited: Mapping[str, Any], limited: Mapping[str, Any]) -> bool:
    """Whether two updates differ with a limit on the gradient's norm. Two, since Adam's first ignores the gradient's size."""
    after = []
    for settings in (unlimited, limited):
        task = subject.make(settings)
        subject.steps(task, 2)
        after.append(_weights(subject, task))
    return bool(_moved(*after))


def check_weight(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    """Checks by preflight's readings that the settings of the auxiliary losses act, and change no random numbers."""
    if not subject.accepts({WEIGHT: 0.0}):
        remedy = f"accept {WEIGHT}, {MAX_T} and {GRAD_SCALE}, which a study searches (tune_ssim.losses.DecodedLoss takes them)"
        yield broken(WEIGHT, f"setup() refuses {WEIGHT}", remedy)
        return
    for name in (MAX_T, GRAD_SCALE):
        if not subject.accepts({name: 0.5}):
            remedy = f"accept it, or leave it out of your own space: it {'gates' if name == MAX_T else 'scales'} as in DecodedLoss"
            yield unknown(name, f"setup() does not know {name}, which the bundled spaces set", remedy)
    if not _can_be_read(subject, run):
        return
    probe = Probe(subject, {})
    probe.known = {name for name in probe.known if subject.accepts({name: NEUTRAL[name]})}
    for check in check_parameters(probe):
        if check.name not in [f"parameter/{name}" for name in subject.disable_update]:  # see check_still
            yield _renamed(check)
            if check.status == "bad_setup":
                return  # others may follow from it
    off, on = probe.readings[MAIN_ALONE], probe.readings[LARGE]
    yield from _unweighted(off.metrics, on.metrics, on.settings[WEIGHT])


def _can_be_read(subject: ClassUnderTest, run: Run) -> bool:
    """Whether steps can be compared with what effective() reports."""
    consequences = ("effective", "step/total_norm")
    return "effective" not in subject.broken_methods and not any(name.startswith(consequences) for name in run.broken)


def _renamed(check: Check) -> Check:
    """One of preflight's checks as a check of this suite."""
    name = NAMES.get(check.name, check.name)
    if check.status != "bad_setup":
        return replace(check, name=name)
    return replace(check, name=name, status="broken", remedy=REMEDIES.get(name, check.remedy))


def _unweighted(off: Mapping[str, float], on: Mapping[str, float], weight: float) -> Iterator[Check]:
    """Checks that loss_ssim is recorded unweighted, and that loss is the weighted sum."""
    if LOSS_SSIM not in on or LOSS not in on or LOSS not in off:
        return
    name, added, recorded = f"step/{LOSS_SSIM}", on[LOSS] - off[LOSS], on[LOSS_SSIM]
    if math.isclose(added, weight * recorded, rel_tol=0.02):
        yield ok(name, f"{LOSS} is the weighted sum, {LOSS_SSIM} is recorded before its weight")
    elif math.isclose(added, recorded, rel_tol=0.02):
        yield broken(name, f"{LOSS_SSIM} {recorded:.4g} includes its weight {weight:g}", "record it before its weight")
    else:
        sentence = f"{WEIGHT} {weight:g} adds {added:.4g} to {LOSS}, but {LOSS_SSIM} is {recorded:.4g}"
        remedy = f"{LOSS} is the weighted sum that is minimised, {LOSS_SSIM} the mean over the active samples, before its weight"
        yield warn(name, sentence, remedy)


def _weights(subject: ClassUnderTest, task: Any) -> dict[str, torch.Tensor]:
    """Copies of the tensors that only an update may change: the parameters if the task shows them, else tensors of its state."""
    if task.abilities().trainable_parameters:
        found = call(task, "trainable_parameters")
        listed = [p for p in found if isinstance(p, torch.Tensor)] if hasattr(found, "__iter__") else []
        if listed:
            return {f"parameter {i}": parameter.detach().clone() for i, parameter in enumerate(listed)}
    try:
        state = {} if "state_dict" in subject.broken_methods else tensors_of(call(task, "state_dict"))
    except (Failure, TypeError, AttributeError):  # reported elsewhere
        return {}
    weights = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and not NOT_WEIGHTS.search(name)}
    return {name: tensor.clone() for name, tensor in weights.items()}


def _moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> str:
    """Which tensors have changed. Averaged weights in a state may change by rounding."""
    of_state = any(name.startswith("/") for name in before)
    tolerance = 1e-5 if of_state else 0.0
    moved = [name for name, old in before.items() if not _is_close(old, after.get(name), tolerance)]
    kind = "tensors of state_dict()" if of_state else "trainable parameters"
    return f"{len(moved)} of {len(before)} {kind}" if moved else ""


def _is_close(old: torch.Tensor, new: torch.Tensor | None, tolerance: float) -> bool:
    return new is not None and old.shape == new.shape and torch.allclose(old, new, rtol=tolerance, atol=0.0, equal_nan=True)
