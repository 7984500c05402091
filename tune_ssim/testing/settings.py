"""Checks of setup() and effective(), judged by effects with the update switched off."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from tune_ssim.base.errors import UserError
from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.before_launch.preflight.rules import same
from tune_ssim.before_launch.preflight.steps import BLACK_BOX_GAINS, NEUTRAL
from tune_ssim.before_launch.preflight.subject import Failure, call, failure_of
from tune_ssim.records import ACTIVE_FRACTION, LOSS, LOSS_FLOW, LOSS_SSIM, TOTAL_NORM
from tune_ssim.testing.findings import broken, ok, unknown, warn
from tune_ssim.testing.runs import GENERATORS, Run
from tune_ssim.testing.subject import ClassUnderTest, Numbers
from tune_ssim.trials.training import Sample

WEIGHT, MAX_T, GRAD_SCALE, CLIP = "ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale", "max_grad_norm"
TINY = 1e-7  # a weight whose gradient is lost in float32's rounding of any main gradient
FOLLOWS = 0.05  # relative change of total_norm larger than any rounding
ACTIVE_STEPS = 8  # steps searched for one with a sample that passes the gate
PARAMETER = "parameter"
MISSPELT = "ssim_loss_wieght"


def check_setup(subject: ClassUnderTest) -> Iterator[Check]:
    """Checks that setup() accepts the configuration and refuses unknown keys."""
    given, task = dict(subject.config), subject.task_class()
    try:
        task.setup(given, subject.seed, subject.device)
    except ValueError as error:
        yield broken(
            "setup",
            f"setup() refuses the configuration {dict(subject.config)}: {error}",
            "accept 'steps', which every trial sets, or pass check_task(…, config={…}) with what it needs",
        )
        return
    except (Exception, SystemExit) as error:
        found = failure_of(task, "setup", error)
        yield broken("setup", str(found), found.remedy)
        return
    if given != dict(subject.config):
        yield broken("setup/config", "setup() changes the mapping that it is given", "copy it: config = dict(config)")
    yield ok("setup", f"setup() accepts {dict(subject.config)}")
    try:
        subject.make({MISSPELT: 1.0})
    except UserError as refusal:
        sentence = "setup() refuses a key it does not know"
        if MISSPELT in str(refusal):
            yield ok("setup/unknown_key", sentence)
        else:
            remedy = "name the key, and the known ones"
            yield warn("setup/unknown_key", f"{sentence} without naming it: {refusal}", remedy)
    except Failure as error:
        yield broken(
            "setup/unknown_key",
            f"an unknown key ends in {str(error).removeprefix('setup() failed: ')}",
            "raise ValueError for it, naming the key: a study takes anything else for a failure of the training",
        )
    else:
        yield broken(
            "setup/unknown_key",
            f"setup() swallows the unknown key {MISSPELT!r}: a misspelt parameter would be searched in vain",
            "if unknown := set(config) - KNOWN: raise ValueError(f'unknown key {sorted(unknown)[0]!r}')",
        )


def check_effective(subject: ClassUnderTest) -> Iterator[Check]:
    task = subject.make()
    try:
        found = call(task, "effective")
    except Failure as error:
        yield broken("effective", str(error), error.remedy)
        return
    if not isinstance(found, Mapping):
        yield broken("effective", f"effective() returned a {type(found).__name__}", "return a dict of JSON values")
        return
    for name, value in found.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            yield broken(
                f"effective/{name}",
                f"effective() says {name} is a {type(value).__name__}, which JSON cannot hold",
                "float(…), int(…), str(…) or .item() of it",
            )
    wrong = {name: asked for name, asked in subject.config.items() if name in found and not same(asked, found[name])}
    for name, asked in wrong.items():
        yield broken(
            f"effective/{name}",
            f"{name} was set to {asked!r} but effective() says {found[name]!r}",
            f"follow {name} from the configuration to where it is used",
        )
    if refused := [name for name, value in NEUTRAL.items() if name in found and not subject.accepts({name: value})]:
        yield warn(
            "effective/settable",
            f"effective() says {', '.join(refused)}, which setup() refuses: preflight takes what is in force for what can be set",
            "accept them in setup(), or leave them out of effective()",
        )
    if CLIP not in found:
        yield unknown(
            f"effective/{CLIP}",
            f"effective() does not say {CLIP}: a study takes that for no gradient clipping",
            f"say {CLIP}: the limit given to clip_grad_norm_, or None where nothing clips",
        )
    if not wrong:
        yield ok("effective", f"effective() says {len(found)} parameters in JSON values")


def check_still(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    """Checks that the update can be switched off, is on otherwise, and that each step has its own batch."""
    words = ", ".join(f"{name} = {value!r}" for name, value in subject.disable_update.items())
    try:
        task = subject.make(subject.disable_update)
    except UserError as refusal:
        yield unknown(
            "still",
            f"the update cannot be switched off: setup() refuses {words}: {refusal}",
            "accept it, or name the setting that does it: check_task(…, disable_update={…}), and calibration: "
            "{disable_update: {…}}",
        )
        return
    before = _weights(subject, task)
    metrics = subject.steps(task, max(2, run.k))
    moved = _moved(before, _weights(subject, task))
    if not before:
        yield unknown(
            "still",
            f"no weights are visible, so whether {words} leaves them as they are is unknown",
            "give the task trainable_parameters(), or put its weights into state_dict()",
        )
    elif moved:
        yield broken(
            "still",
            f"{len(metrics)} steps with {words} change {moved}: calibration would measure a model that moves",
            "a learning rate of 0 must leave everything as it is: no update outside the optimiser, no weight decay apart from lr, "
            "no floor of a schedule",
        )
    else:
        yield ok("still", f"{words} leaves the weights as they are")
    if all(not subject.difference(metrics[:1], [later]) for later in metrics[1:]):
        yield broken(
            "random/batches",
            f"with {words} all of {len(metrics)} steps record the same numbers: every step sees one batch",
            f"step n needs its own batch, t and noise; {GENERATORS}",
        )
    else:
        yield ok("random/batches", "each step has its own batch")
    task = subject.make()
    before = _weights(subject, task)
    subject.steps(task, 2 * run.k)
    if before and not _moved(before, _weights(subject, task)):
        yield warn(
            "trains",
            f"nothing moves in {2 * run.k} steps",
            "is the learning rate 0 at the start? are the parameters the optimiser's?",
        )


def check_weight(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    """Checks that the auxiliary loss's weight is in force, changes total_norm, and does not change the random numbers."""
    still, count = _still(subject, run)
    try:
        off = _Probe(subject, {**still, WEIGHT: 0.0}, count)
        tiny = _Probe(subject, {**still, WEIGHT: TINY, **_open(subject)}, count)
    except UserError as refusal:
        yield broken(
            WEIGHT,
            f"setup() refuses {WEIGHT}: {refusal}",
            f"accept {WEIGHT}, {MAX_T} and {GRAD_SCALE}: they are what a study searches (tune_ssim.losses.DecodedLoss takes them)",
        )
        return
    yield from _same_batches(off, tiny, subject)
    known = [name for name in (MAX_T, GRAD_SCALE) if subject.accepts({name: 0.5})]
    for name in (MAX_T, GRAD_SCALE):
        if name not in known:
            yield unknown(
                name,
                f"setup() does not know {name}: the bundled spaces set it",
                f"accept it, or leave it out of your own space: {'gates' if name == MAX_T else 'scales'} as DecodedLoss does",
            )
    if not any(name.startswith(f"step/{TOTAL_NORM}") for name in run.broken):
        yield from _force(subject, off, still, count)


class _Probe:
    """Steps under one setting."""

    def __init__(self, subject: ClassUnderTest, settings: Mapping[str, Any], count: int) -> None:
        task = subject.make(settings)
        self.steps: list[Numbers] = subject.steps(task, count)
        found = call(task, "effective") if "effective" not in subject.broken_methods else {}
        self.effective: Mapping[str, Any] = found if isinstance(found, Mapping) else {}


def _same_batches(off: _Probe, tiny: _Probe, subject: ClassUnderTest) -> Iterator[Check]:
    """Checks that a tiny weight does not change the random draws."""
    for n, (a, b) in enumerate(zip(off.steps, tiny.steps, strict=True), 1):
        for name in (LOSS_FLOW, LOSS):
            if name in a and name in b and _apart(a[name], b[name]):
                yield broken(
                    "random/configuration",
                    f"step {n}: {name} is {a[name]:.6g} at {WEIGHT} 0 and {b[name]:.6g} at {TINY:g}: the "
                    "configuration decides which random numbers are drawn, so trials and baseline see other batches",
                    f"{GENERATORS}, and none of the configuration; draw the same numbers whether or not a loss needs them",
                )
                return
    yield ok("random/configuration", f"{WEIGHT} 0 and {TINY:g} see the same batches over {len(off.steps)} steps")


def _force(subject: ClassUnderTest, off: _Probe, still: Mapping[str, Any], count: int) -> Iterator[Check]:
    """Raises the weight until total_norm follows, then checks the recorded values."""
    on, gain, at = off, 0.0, None
    for gain in BLACK_BOX_GAINS:
        on = _Probe(subject, {**still, WEIGHT: gain, **_open(subject)}, max(count, ACTIVE_STEPS if still else 1))
        base = _Probe(subject, {**still, WEIGHT: 0.0}, len(on.steps)) if len(off.steps) < len(on.steps) else off
        off = base
        at = next((n for n, (a, b) in enumerate(zip(off.steps, on.steps, strict=False)) if _follows(a, b)), None)
        if at is not None:
            break
    stated = on.effective.get(WEIGHT)
    if WEIGHT not in on.effective:
        yield broken(
            f"effective/{WEIGHT}",
            f"effective() does not say {WEIGHT}: whether what is searched arrives cannot be seen",
            "say it, read where it is used: **loss.effective() of a DecodedLoss",
        )
    elif not same(gain, stated) or not same(0.0, off.effective.get(WEIGHT)):
        yield broken(
            f"effective/{WEIGHT}",
            f"{WEIGHT} was set to {gain:g}, and effective() says {stated!r}",
            f"follow {WEIGHT} from setup() to the loss; effective() must read it where it is used",
        )
    if not any(step.get(ACTIVE_FRACTION, 1.0) > 0 for step in on.steps):
        gated = MAX_T not in _open(subject)
        yield (unknown if gated else broken)(
            f"{WEIGHT}/felt",
            f"at {WEIGHT} {gain:g}{'' if gated else f' and {MAX_T} 1'} no sample takes part in {len(on.steps)} steps "
            f"({ACTIVE_FRACTION} 0), whatever effective() says",
            f"does {WEIGHT} reach the loss? is the gate the right way round? t = 0 is clean, and 0 < t <= max_t takes part",
        )
    elif at is None:
        yield broken(
            f"{WEIGHT}/felt",
            f"total_norm does not follow {WEIGHT}: it is the same at 0 and at {gain:g}, whatever effective() says",
            "is the loss added to what backward() is called on? is the decoder inside no_grad() or detached? is the "
            "norm taken before clipping?",
        )
    else:
        a, b = off.steps[at][TOTAL_NORM], on.steps[at][TOTAL_NORM]
        yield ok(f"{WEIGHT}/felt", f"total_norm follows {WEIGHT}: {a:.4g} at 0, {b:.4g} at {gain:g}")
        yield from _unweighted(off.steps[at], on.steps[at], gain, at + 1)


def _unweighted(off: Numbers, on: Numbers, gain: float, n: int) -> Iterator[Check]:
    """Checks that loss_ssim is recorded unweighted, and that loss is the weighted sum."""
    if LOSS_SSIM not in on or LOSS not in on or LOSS not in off:
        return
    added, recorded = on[LOSS] - off[LOSS], on[LOSS_SSIM]
    if math.isclose(added, gain * recorded, rel_tol=0.02):
        yield ok(f"step/{LOSS_SSIM}", f"{LOSS} is the weighted sum, {LOSS_SSIM} comes before its weight")
    elif math.isclose(added, recorded, rel_tol=0.02):
        yield broken(
            f"step/{LOSS_SSIM}", f"step {n}: {LOSS_SSIM} {recorded:.4g} includes its weight {gain:g}", "record it before its weight"
        )
    else:
        yield warn(
            f"step/{LOSS_SSIM}",
            f"step {n}: {WEIGHT} {gain:g} adds {added:.4g} to {LOSS}, where {LOSS_SSIM} is {recorded:.4g}",
            f"{LOSS} is the weighted sum that is minimised, {LOSS_SSIM} the mean over the samples that take part, "
            "before its weight",
        )


def check_clipping(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    """Checks that total_norm is measured before clipping, so does not depend on the limit."""
    name = f"step/{TOTAL_NORM}/clipping"
    still, _ = _still(subject, run)
    try:
        free = _without_clipping(subject, still)
        norm = free.steps[0].get(TOTAL_NORM, math.nan)
        limit = norm / 10 if math.isfinite(norm) and norm > 0 else 1e-3
        clipped = _Probe(subject, {**still, CLIP: limit}, 1)
    except UserError:
        yield from _fixed_clipping(subject, run, name)
        return
    found = clipped.steps[0].get(TOTAL_NORM, math.nan)
    if math.isclose(found, norm, rel_tol=1e-3):
        yield ok(name, f"{TOTAL_NORM} is read before clipping: {norm:.4g} with and without a limit of {limit:.3g}")
    elif found <= 1.01 * limit:
        yield _after_clipping(name, f"{TOTAL_NORM} is {norm:.4g} without clipping and {found:.4g} with {CLIP} {limit:.3g}")
    elif not math.isnan(found):
        yield broken(
            name,
            f"{TOTAL_NORM} is {norm:.4g} without clipping and {found:.4g} with {CLIP} {limit:.3g}",
            "the first step must have the same gradient whatever the limit",
        )


def _without_clipping(subject: ClassUnderTest, still: Mapping[str, Any]) -> _Probe:
    """Steps without clipping: max_grad_norm None, or if the task refuses that, a very high limit."""
    try:
        return _Probe(subject, {**still, CLIP: None}, 1)
    except (UserError, Failure):
        return _Probe(subject, {**still, CLIP: 1e9}, 1)


def _fixed_clipping(subject: ClassUnderTest, run: Run, name: str) -> Iterator[Check]:
    """Checks a limit that is not a setting: with a strong push total_norm must exceed it."""
    limit = _Probe(subject, {}, 1).effective.get(CLIP)
    if not isinstance(limit, (int, float)) or isinstance(limit, bool):
        return
    still, count = _still(subject, run)
    norms = [step.get(TOTAL_NORM, 0.0) for step in run.steps]
    if max(norms) <= 1.01 * limit:
        try:
            norms += [
                s.get(TOTAL_NORM, 0.0)
                for s in _Probe(subject, {**still, WEIGHT: BLACK_BOX_GAINS[-1], **_open(subject)}, count).steps
            ]
        except UserError:
            pass
    if max(norms) > 1.01 * limit:
        yield ok(name, f"{TOTAL_NORM} exceeds {CLIP} {limit:g}: it is read before clipping")
    elif max(norms) > 0.99 * limit:
        yield _after_clipping(name, f"{TOTAL_NORM} never exceeds {CLIP} {limit:g}, whatever pushes")
    else:
        yield unknown(name, f"no step came near {CLIP} {limit:g}", f"accept {CLIP} in setup(), so that it can be looked at")


def _after_clipping(name: str, sentence: str) -> Check:
    return broken(
        name,
        f"{sentence}: it is measured after clipping, and hides every push",
        "norm = torch.nn.utils.clip_grad_norm_(parameters, limit) returns the norm before clipping: record that",
    )


def _still(subject: ClassUnderTest, run: Run) -> tuple[Mapping[str, Any], int]:
    """Settings with the update off, and the number of comparable steps (one if it cannot be switched off)."""
    return (subject.disable_update, run.k) if subject.accepts(subject.disable_update) else ({}, 1)


def _open(subject: ClassUnderTest) -> dict[str, float]:
    """Settings without gate and attenuation, as far as the task has them."""
    return {name: 1.0 for name in (MAX_T, GRAD_SCALE) if subject.accepts({name: 1.0})}


def _apart(a: float, b: float) -> bool:
    return math.isfinite(a) and math.isfinite(b) and not math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)


def _follows(off: Numbers, on: Numbers) -> bool:
    a, b = off.get(TOTAL_NORM, math.nan), on.get(TOTAL_NORM, math.nan)
    return not math.isclose(a, b, rel_tol=FOLLOWS) and not (math.isnan(a) and math.isnan(b))


def _weights(subject: ClassUnderTest, task: Any) -> dict[str, torch.Tensor]:
    """The tensors that must not change, by name: the parameters if the task shows them, else the tensors of its state, else the
    output of inference. Empty if there are none."""
    if task.abilities().trainable_parameters:
        found = call(task, "trainable_parameters")
        listed = list(found) if isinstance(found, Iterable) else []
        if parameters := {f"{PARAMETER} {i}": p.detach().clone() for i, p in enumerate(listed) if isinstance(p, torch.Tensor)}:
            return parameters
    if "state_dict" not in subject.broken_methods:
        with contextlib.suppress(Failure):  # reported elsewhere
            if tensors := dict(_state_tensors(call(task, "state_dict"), "")):
                return tensors
    if "sample" in subject.broken_methods:
        return {}
    sample = call(task, "sample", 0)
    return {"samples": sample.images.detach().clone()} if isinstance(sample, Sample) else {}


def _state_tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a nested state that only an update may change: no optimiser state, running statistics or generators."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not name.endswith(("/running_mean", "/running_var")):
            yield name, value.detach().clone()
    elif isinstance(value, Mapping):
        if {"state", "param_groups"} <= value.keys():
            return
        for key, item in value.items():
            yield from _state_tensors(item, f"{name}/{str(key).replace('.', '/')}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _state_tensors(item, f"{name}/{index}")


def _moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> str:
    moved = [name for name, old in before.items() if name not in after or not _stayed(name, old, after[name])]
    if moved == ["samples"]:
        return "the samples"
    of = "trainable parameters" if any(name.startswith(PARAMETER) for name in before) else "tensors of state_dict()"
    return f"{len(moved)} of {len(before)} {of}" if moved else ""


def _stayed(name: str, old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether a tensor is unchanged. Averaged weights in a state may change by rounding."""
    if name.startswith(PARAMETER) or name == "samples":
        return torch.equal(old, new)
    return old.shape == new.shape and torch.allclose(old, new, rtol=1e-5, atol=0.0, equal_nan=True)
