"""A few real steps: what must stay frozen, what must move, and how far the learning rate carries it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from tune_ssim.guards import SmokeTest
from tune_ssim.guards import preflight as rules
from tune_ssim.guards.preflight import Check
from tune_ssim.preflight.networks import findings_of
from tune_ssim.preflight.plain import norm, own_gradient_norms
from tune_ssim.preflight.subject import Subject, Unavailable, call
from tune_ssim.probes import tensor_hashes
from tune_ssim.run_trial import statistics_of
from tune_ssim.tasks.task import Part

STEPS = 3
FASTER = 1000.0  # times the learning rate: more than float32's 24 bits swallow of a small one
SMALL_PUSH = 0.1  # the SSIM gradient of these steps over the main one: it reaches the decoder, and harms nothing


def check_learning(subject: Subject, base: Mapping[str, Any], guard: SmokeTest) -> Iterator[Check]:
    task = subject.make(base)
    settings = {**base, **_small_ssim(task)}
    task = subject.make(settings)
    parts: dict[str, Part] = dict(call(task, "parts")) if hasattr(task, "parts") else {}
    still = {name: part for name, part in parts.items() if not part.trains and part.kind == "raw"}
    hashes = {name: tensor_hashes(part.module.state_dict()) for name, part in still.items()}
    parameters = _named_parameters(task, parts)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    no_gradient, moved, first = set(parameters), set(), None
    with_gradient: dict[str, set[str]] = {name: set() for name in still}
    for n in range(STEPS):
        call(task, "step")
        no_gradient -= {name for name, parameter in parameters.items() if parameter.grad is not None}
        moved |= {name for name, parameter in parameters.items() if not torch.equal(before[name], parameter.detach())}
        for name, part in still.items():
            with_gradient[name] |= {key for key, p in part.module.named_parameters() if p.grad is not None and bool(p.grad.any())}
        if n == 0:  # the size of the first update
            first = norm([parameter.detach() - before[name] for name, parameter in parameters.items()])
    for name, part in still.items():
        after = tensor_hashes(part.module.state_dict())
        yield rules.frozen(
            name,
            tensors=len(after),
            changed=[key for key in after if after[key] != hashes[name].get(key)],
            with_gradient=sorted(with_gradient[name]),
            training=_in_train_mode(part.module),
        )
    rates = [float(value) for value in (call(task, "effective").get(key) for key in subject.disable_update) if value is not None]
    if parameters:
        motionless = [name for name in parameters if name not in moved and name not in no_gradient]
        yield rules.trained(
            parameters=len(parameters),
            still=motionless,
            too_slow=_too_slow(subject, settings, motionless) if motionless else [],
            without_gradient=sorted(no_gradient),
            learning_rate=rates[0] if rates else None,
        )
        frozen_by_hand = [name for name, part in parts.items() if part.trains and not _overlaps(part, parameters)]
        for name in frozen_by_hand:
            yield Check(f"trained/{name}", "bad_setup", f"{name} is to be trained, and none of its parameters is", {}, "")
    else:
        yield rules.unknown("trained", "the task has no trainable_parameters()")
    findings = findings_of(guard, statistics_of(call(task, "sample", 0)))
    yield rules.baseline_samples(findings, STEPS)
    del task
    if parameters and first:
        yield from _learning_rate(subject, settings, first)


def _small_ssim(task: Any) -> dict[str, float]:
    """An SSIM loss that is seen everywhere and pushes next to nothing; nothing where the task does not show its forward pass."""
    if not (hasattr(task, "forward") and hasattr(task, "trainable_parameters") and "ssim_loss_weight" in call(task, "effective")):
        return {}
    main, ssim, _ = own_gradient_norms(call(task, "forward", 1), list(call(task, "trainable_parameters")))
    return {"ssim_loss_weight": SMALL_PUSH * main / ssim, "ssim_loss_max_t": 1.0, "ssim_grad_scale": 1.0} if ssim > 0 else {}


def _too_slow(subject: Subject, settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Which of the parameters that did not move do so at a learning rate that rounding cannot swallow."""
    rates = {key: call(subject.make(settings), "effective").get(key) for key in subject.disable_update}
    task = subject.make({**settings, **{key: FASTER * rate for key, rate in rates.items() if isinstance(rate, (int, float))}})
    parameters = _named_parameters(task, dict(call(task, "parts")) if hasattr(task, "parts") else {})
    before = {name: parameters[name].detach().clone() for name in names}
    call(task, "step")
    return [name for name in names if not torch.equal(before[name], parameters[name].detach())]


def _learning_rate(subject: Subject, settings: Mapping[str, Any], first: float) -> Iterator[Check]:
    """Half the learning rate, half the first update: true of SGD and of AdamW, whose first step is a rate times a sign."""
    for name in subject.disable_update:
        task = subject.make(settings)
        rate = call(task, "effective").get(name)
        if not isinstance(rate, (int, float)) or rate == 0:
            continue
        task = subject.make({**settings, name: rate / 2})
        parameters = list(call(task, "trainable_parameters"))
        before = [parameter.detach().clone() for parameter in parameters]
        call(task, "step")
        half = norm([parameter.detach() - old for old, parameter in zip(before, parameters, strict=True)])
        response = f"the first update is {first:.3g} at {rate:g} and {half:.3g} at {rate / 2:g}"
        yield rules.parameter(name, rate / 2, call(task, "effective").get(name), 2 * half / first, response)


def _named_parameters(task: Any, parts: Mapping[str, Part]) -> dict[str, torch.nn.Parameter]:
    if not hasattr(task, "trainable_parameters"):
        return {}
    names = {id(p): f"{part}.{key}" for part, found in parts.items() for key, p in found.module.named_parameters()}
    listed = list(call(task, "trainable_parameters"))
    return {names.get(id(parameter), f"parameter {index}"): parameter for index, parameter in enumerate(listed)}


def _overlaps(part: Part, parameters: Mapping[str, torch.nn.Parameter]) -> bool:
    mine = {id(parameter) for parameter in part.module.parameters()}
    return any(id(parameter) in mine for parameter in parameters.values())


def _in_train_mode(module: torch.nn.Module) -> list[str]:
    """Layers that behave otherwise in train mode; a dropout of 0 does not."""
    return [
        f"{name or type(layer).__name__}"
        for name, layer in module.named_modules()
        if layer.training and (isinstance(layer, _BatchNorm) or (isinstance(layer, _DropoutNd) and layer.p > 0))
    ]


def check_decoder(task: Any) -> Iterator[Check]:
    """Functional dropout and batch statistics show in what is decoded, wherever they hide."""
    forward = call(task, "forward", 1)
    with torch.no_grad():
        z0 = forward.z0[:2]
        if len(z0) < 2:
            raise Unavailable("a batch of one cannot be decoded apart")
        once, again = forward.decode(z0), forward.decode(z0)
        alone = torch.cat([forward.decode(z0[:1]), forward.decode(z0[1:])])
    yield rules.decoder((once - again).abs().max().item(), (once - alone).abs().max().item())
