"""Checks of the starting weights: against their files, and by the samples they give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tune_ssim.base.errors import BadSetup
from tune_ssim.before_launch.preflight import rules
from tune_ssim.before_launch.preflight.report import Check, unknown
from tune_ssim.before_launch.preflight.subject import call
from tune_ssim.guards import SmokeTest
from tune_ssim.probes import compare_with_file
from tune_ssim.records import SMOKE, Record
from tune_ssim.trials.sample_check import statistics_of
from tune_ssim.trials.training import Part, Sample

MIN_WEIGHTS = 256  # fewest weights of a layer to judge it by


def check_weights(task: Any) -> Iterator[Check]:
    """Compares each network with its file, and averaged weights with raw ones."""
    parts: dict[str, Part] = dict(call(task, "parts"))
    for name, part in parts.items():
        if part.weights is None:
            yield unknown(f"weights/{name}", "starts without a file, so there is nothing to compare with")
            continue
        try:
            found = compare_with_file(part.module, part.weights)
        except BadSetup as error:
            yield Check(f"weights/{name}", "bad_setup", str(error))
            continue
        holds = None if found.equal else _holds(part, parts)
        layers = fresh_layers(part.module), holds, zeroed_layers(part.module), coarse_layers(part.module)
        yield rules.weights(name, part.weights.name, found, *layers)
    for name, part in parts.items():
        if part.kind == "ema" and (closest := nearest(part.module, parts)) is not None:
            yield rules.ema_distance(name, *closest)


def fresh_layers(module: torch.nn.Module) -> list[str]:
    """Linear and convolutional layers with weights as torch initialises them: uniform within ±1/√fan_in.

    Training leaves that interval: each of the bundled networks' 29 layers has an element outside it, by at least 16 %."""
    found = []
    for name, layer in module.named_modules():
        if not isinstance(layer, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)) or layer.weight.numel() < MIN_WEIGHTS:
            continue
        with torch.no_grad():
            scaled = layer.weight.detach().double() * layer.weight[0].numel() ** 0.5
            spread = scaled.std().item() * 3**0.5  # 1 for a uniform distribution over [-1, 1]
            if scaled.abs().max() <= 1 + 1e-3 and abs(spread - 1) < 5 / layer.weight.numel() ** 0.5:
                found.append(f"{name}.weight")
    return found


def zeroed_layers(module: torch.nn.Module) -> list[str]:
    """Layers whose weights are all zero although their bias is not. In a layer that is initialised with zeros and never trained,
    the bias is zero too."""
    return [
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))
        and layer.bias is not None
        and not layer.weight.any()
        and layer.bias.any()
    ]


def coarse_layers(module: torch.nn.Module) -> list[str]:
    """Layers that learn and whose weights have a few values, but more than the two of a mask. A fixed filter may have few."""
    sizes = {
        f"{name}.weight": len(layer.weight.detach().flatten()[: 16 * MIN_WEIGHTS].unique())
        for name, layer in module.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))
        and layer.weight.requires_grad
        and layer.weight.numel() >= MIN_WEIGHTS
    }
    return [name for name, size in sizes.items() if 2 < size <= rules.MAX_LEVELS]


def _holds(part: Part, parts: dict[str, Part]) -> str | None:
    """The file of another part with the same weights, since raw and averaged weights are easily swapped."""
    for other in parts.values():
        if other.weights is None or other.weights == part.weights or not other.weights.exists():
            continue
        if compare_with_file(part.module, other.weights).equal:
            return other.weights.name
    return None


def nearest(average: torch.nn.Module, parts: Mapping[str, Part]) -> tuple[str, float] | None:
    """The closest raw part of the same architecture for an average, and the distance relative to the norm of its weights."""
    mine, distances = dict(average.named_parameters()), {}
    for name, part in parts.items():
        theirs = dict(part.module.named_parameters())
        if part.kind != "raw" or {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in mine.items()}:
            continue
        with torch.no_grad():
            apart = sum((mine[key].double() - value.double()).square().sum().item() for key, value in theirs.items())
            size = sum(value.double().square().sum().item() for value in theirs.values())
        distances[name] = (apart / size) ** 0.5 if size else math.nan
    return min(distances.items(), key=lambda item: item[1], default=None)


def check_samples(task: Any, guard: SmokeTest, raw: Sample) -> Iterator[Check]:
    """Runs the smoke test on the starting weights, raw and averaged, since one may be ruined while the other is fine."""
    of_raw = statistics_of(raw)
    found = findings_of(guard, of_raw)
    averaged: Sample | None = call(task, "sample_ema", 0) if task.abilities().sample_ema else None
    if averaged is None:
        yield rules.smoke("raw", found, of_raw)
        if not task.abilities().sample_ema:
            yield unknown("smoke/ema", "the task has no sample_ema()")
        return
    of_average = statistics_of(averaged)
    found_average = findings_of(guard, of_average)
    # In addition, one set of weights must not be worse than the other by more than averaging explains.
    mutual = replace(guard, max_flow_loss_ratio=rules.MAX_AVERAGE_LOSS_RATIO)
    if not found and not found_average:
        found = [finding.words for finding in mutual.findings(of_raw, of_average)]
        found_average = [finding.words for finding in mutual.findings(of_average, of_raw)]
    yield rules.smoke("raw", found, of_raw)
    yield rules.smoke("ema", found_average, of_average)


def findings_of(guard: SmokeTest, statistics: dict[str, float]) -> list[str]:
    """The guard's findings about these statistics, as those of the first samples of a trial."""
    record = Record(0, {SMOKE + name: value for name, value in statistics.items()})
    _, violation = guard.update(guard.init(), record)
    return [] if violation is None else [violation.sentence.split(": ", 1)[-1]]
