"""Checks of a few real steps: frozen networks do not change, trained ones do, and samples stay intact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from tune_ssim.base.numbers import is_number
from tune_ssim.before_launch.preflight import rules, step_rules
from tune_ssim.before_launch.preflight.networks import findings_of, nearest
from tune_ssim.before_launch.preflight.optimizers import observed_updates, typical
from tune_ssim.before_launch.preflight.plain import cosine, norm, own_gradient_norms
from tune_ssim.before_launch.preflight.report import Check, unknown
from tune_ssim.before_launch.preflight.sampling import CHANGE
from tune_ssim.before_launch.preflight.subject import Subject, Unavailable, call
from tune_ssim.guards import SmokeTest
from tune_ssim.probes import tensor_hashes
from tune_ssim.trials.sample_check import statistics_of
from tune_ssim.trials.training import Part

STEPS = 3
LATER = 25  # steps: the second of SmokeTest.at
WORK = {"setup": 3, "step": STEPS + 5, "sample": 1}  # of `check_learning`, if all parameters move and the samples pass
FASTER = 1000.0  # factor on the learning rate, larger than the rounding of float32's 24 bits
SMALL_PUSH = 0.1  # SSIM gradient over the main gradient in these steps: it reaches the decoder but does no harm


def check_learning(subject: Subject, base: Mapping[str, Any], guard: SmokeTest | None) -> Iterator[Check]:
    settings = {**base, **_small_ssim(subject, base)}
    task = subject.make(settings)
    parts: dict[str, Part] = dict(call(task, "parts")) if task.abilities().parts else {}
    parameters = _named_parameters(task, parts)
    still = {name: part.module for name, part in parts.items() if not part.trains and part.kind == "raw"}
    hashes = {name: tensor_hashes(module.state_dict()) for name, module in still.items()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with (
        _gradients(parameters) as learning,
        _gradients(_parameters_of(still)) as leaking,
        observed_updates(list(parameters.values())) as observed,
    ):
        updates = []
        for _ in range(STEPS):
            call(task, "step")
            updates.append(norm([parameter.detach() - before[name] for name, parameter in parameters.items()]))
    for part, module in still.items():
        after = tensor_hashes(module.state_dict())
        yield step_rules.frozen(
            part,
            tensors=len(after),
            changed=[name for name in after if after[name] != hashes[part].get(name)],
            with_gradient=[name for owner, name in leaking if owner == part],
            training=_in_train_mode(module),
        )
    if learning:
        yield step_rules.micro_batches(sum(learning.values()), len(learning))
    motionless = [name for name in learning if torch.equal(before[name], parameters[name].detach())]
    rates = {name: call(task, "effective").get(name) for name in subject.disable_update}
    rates = {name: rate for name, rate in rates.items() if is_number(rate)}
    untouched = [name for name, part in parts.items() if part.trains and not _is_among(part, parameters)]
    later = None if guard is None else _samples_later(task, guard)
    averages = _averages(task, parts, parameters) if any(part.kind == "ema" for part in parts.values()) else {}
    everything, unseen = len(parameters), [name for name in parameters if name not in learning]
    del task, parts, parameters, still, before, learning, leaking  # the next measurements need the memory
    if everything:
        yield step_rules.trained(
            parameters=everything,
            still=motionless,
            too_slow=_too_slow(subject, settings, motionless, rates) if motionless else [],
            without_gradient=unseen,
            learning_rate=next(iter(rates.values()), None),
        )
    else:
        yield unknown("trained", "the task has no trainable_parameters()")
    if observed.outside:
        yield step_rules.outside_updates(typical(observed.outside, 0.0))
    if observed.damping:
        yield step_rules.damping(typical(observed.damping, 1.0))
    yield from (step_rules.average(name, share) for name, share in averages.items())
    for name in untouched:
        sentence = f"{name} should be trained, but none of its parameters is trainable"
        yield Check(f"trained/{name}", "bad_setup", sentence, {}, "check trainable_parameters() and the optimiser's list")
    if later is None:
        yield unknown("baseline/smoke", "the study has switched its smoke test off")
    else:
        yield rules.baseline_samples(*later)
    for name, rate in rates.items():
        if everything and rate:
            yield _learning_rate(subject, settings, name, rate, updates[0])


def _samples_later(task: Any, guard: SmokeTest) -> tuple[list[str], int]:
    """Failures of the smoke test after STEPS, and if there are any, after LATER, since a training with a high learning rate may
    recover from bad first steps. Also the number of steps taken."""
    if not findings_of(guard, statistics_of(call(task, "sample", 0))):
        return [], STEPS
    for _ in range(LATER - STEPS):
        call(task, "step")
    return findings_of(guard, statistics_of(call(task, "sample", 0))), LATER


def _averages(task: Any, parts: Mapping[str, Part], parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, float]:
    """For each average, the share of the way to the raw weights that it goes in a step. The raw weights are moved away first, since
    the trace of a small update would be lost in rounding."""
    raw_of = {name: nearest(part.module, parts) for name, part in parts.items() if part.kind == "ema"}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(1 + CHANGE)
    before = {name: [tensor.detach().clone() for tensor in parts[name].module.parameters()] for name in raw_of}
    call(task, "step")
    shares = {}
    for name, raw in raw_of.items():
        if raw is None:
            continue
        moves, ways = (
            [new.detach() - old for new, old in zip(parts[part].module.parameters(), before[name], strict=True)]
            for part in (name, raw[0])
        )
        shares[name] = cosine(moves, ways) * norm(moves) / norm(ways) if norm(moves) and norm(ways) else 0.0
    return shares


@contextlib.contextmanager
def _gradients(parameters: Mapping[Any, torch.nn.Parameter]) -> Iterator[dict[Any, bool]]:
    """The parameters that get a non-zero gradient in the block, in order of arrival, and whether the same one was there already.
    Observed while the gradient is computed, since a step may clear it."""
    seen: dict[Any, bool] = {}

    def see(name: Any, gradient: torch.Tensor) -> None:
        if bool(gradient.any()):
            there = parameters[name].grad
            seen[name] = seen.get(name, False) or (there is not None and torch.equal(there, gradient))

    handles = [p.register_hook(partial(see, name)) for name, p in parameters.items() if p.requires_grad]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _small_ssim(subject: Subject, base: Mapping[str, Any]) -> dict[str, float]:
    """Settings of an SSIM loss that is active everywhere with a tiny push; empty if the task does not show its forward pass."""
    task = subject.make(base)
    if not task.abilities().has("forward", "trainable_parameters") or "ssim_loss_weight" not in call(task, "effective"):
        return {}
    main, ssim, _ = own_gradient_norms(call(task, "forward", 1), list(call(task, "trainable_parameters")))
    return {"ssim_loss_weight": SMALL_PUSH * main / ssim, "ssim_loss_max_t": 1.0, "ssim_grad_scale": 1.0} if ssim > 0 else {}


def _too_slow(subject: Subject, settings: Mapping[str, Any], names: Sequence[str], rates: Mapping[str, float]) -> list[str]:
    """Which of the unchanged parameters change at a learning rate too large to be lost in rounding."""
    task = subject.make({**settings, **{name: FASTER * rate for name, rate in rates.items()}})
    parameters = _named_parameters(task, call(task, "parts") if task.abilities().parts else {})
    before = {name: parameters[name].detach().clone() for name in names}
    call(task, "step")
    return [name for name in names if not torch.equal(before[name], parameters[name].detach())]


def _learning_rate(subject: Subject, settings: Mapping[str, Any], name: str, rate: float, first: float) -> Check:
    """Checks that half the learning rate gives half the first update, as in SGD and in AdamW, whose first step is rate times
    sign."""
    if not first:
        return unknown(f"parameter/{name}", "the first step moved nothing")
    task = subject.make({**settings, name: rate / 2})
    parameters = list(call(task, "trainable_parameters"))
    before = [parameter.detach().clone() for parameter in parameters]
    call(task, "step")
    half = norm([parameter.detach() - old for old, parameter in zip(before, parameters, strict=True)])
    response = f"the first update is {first:.3g} at {rate:g} and {half:.3g} at {rate / 2:g}"
    return step_rules.parameter(name, rate / 2, call(task, "effective").get(name), 2 * half / first, response)


def _parameters_of(modules: Mapping[str, torch.nn.Module]) -> dict[Any, torch.nn.Parameter]:
    return {(part, name): p for part, module in modules.items() for name, p in module.named_parameters()}


def _named_parameters(task: Any, parts: Mapping[str, Part]) -> dict[str, torch.nn.Parameter]:
    if not task.abilities().trainable_parameters:
        return {}
    names = {id(p): f"{part}.{key}" for part, found in parts.items() for key, p in found.module.named_parameters()}
    listed = list(call(task, "trainable_parameters"))
    return {names.get(id(parameter), f"parameter {index}"): parameter for index, parameter in enumerate(listed)}


def _is_among(part: Part, parameters: Mapping[str, torch.nn.Parameter]) -> bool:
    mine = {id(parameter) for parameter in part.module.parameters()}
    return any(id(parameter) in mine for parameter in parameters.values())


def _in_train_mode(module: torch.nn.Module) -> list[str]:
    """Layers that behave differently in train mode, except a dropout of 0."""
    return [
        f"{name or type(layer).__name__}"
        for name, layer in module.named_modules()
        if layer.training and (isinstance(layer, _BatchNorm) or (isinstance(layer, _DropoutNd) and layer.p > 0))
    ]


def check_decoder(task: Any) -> Iterator[Check]:
    """Detects functional dropout and batch statistics from decoded images."""
    forward = call(task, "forward", 1)
    with torch.no_grad():
        z0 = forward.z0[:2]
        if len(z0) < 2:
            raise Unavailable("a batch of one cannot be decoded apart")
        once, again = forward.decode(z0), forward.decode(z0)
        alone = torch.cat([forward.decode(z0[:1]), forward.decode(z0[1:])])
    differences = [(once - other).abs().max().item() for other in (again, alone, alone.flip(0))]
    yield step_rules.decoder(*differences)
