"""Checks that step() and evaluate() return numbers, under the names that guards and rules look for."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from tune_ssim import records
from tune_ssim.before_launch.preflight.report import Check, broken, ok, unknown, warn

# Required metrics: what is lost without them, and what they are.
OF_A_STEP = {
    records.LOSS: ("a NaN is not noticed", "the weighted sum that is minimised"),
    records.TOTAL_NORM: (
        "the norm guard cannot judge, and a trial ends as an error",
        "the L2 norm of the whole gradient before clipping: what clip_grad_norm_ returns",
    ),
    records.ACTIVE_FRACTION: (
        "the norm guard would judge steps without an SSIM gradient too",
        "the share of the batch with 0 < t <= ssim_loss_max_t; DecodedLossResult.metrics() has it",
    ),
}
HELD_OUT = {
    "ssim": ("there is no ΔSSIM, so nothing to search for", "the mean SSIM of held-out samples"),
    "psnr": ("no trial can be called degraded for losing PSNR", "the mean PSNR of held-out samples in dB"),
}
# Names of the metrics in trainers and the notes (lower case, without a prefix such as `train/`).
ALIASES: dict[str, tuple[str, ...]] = {
    records.LOSS: ("total_loss", "loss_total", "train_loss", "training_loss", "sum_loss"),
    records.TOTAL_NORM: ("grad_norm", "gradient_norm", "gnorm", "norm", "global_norm", "grad_norm_total", "total_grad_norm"),
    records.ACTIVE_FRACTION: ("active_fraction", "ssim_fraction", "ssim_active", "active", "participation", "ssim_ratio"),
    records.LOSS_SSIM: ("ssim_loss", "ssim"),
    records.LOSS_PIXEL: ("pixel_loss", "l2_loss", "loss_l2"),
    records.LOSS_FLOW: ("flow_loss", "loss_mse", "mse", "mse_loss", "loss_velocity"),
    records.STEP_SKIPPED: ("skipped", "skipped_step", "overflow"),
    "ssim": ("mean_ssim", "ssim_mean", "structural_similarity"),
    "psnr": ("mean_psnr", "psnr_mean", "psnr_db"),
}


def check_metrics(metrics: Any) -> Iterator[Check]:
    """Checks the result of one call of step()."""
    yield from _check_kind("step", metrics, "a float or a 0-d tensor", "{'loss': loss.detach(), 'total_norm': norm, …}")
    if not isinstance(metrics, Mapping):
        return
    yield from _check_names("step", metrics, OF_A_STEP)
    for name in (records.LOSS_SSIM, records.LOSS_PIXEL, records.LOSS_FLOW, records.STEP_SKIPPED):
        if name not in metrics and (near := _near(name, metrics, cutoff=1.0)):
            remedy = f"rename it {name!r} (tune_ssim.records)"
            yield warn(f"step/{name}", f"step() records {near!r}, a name that is not read", remedy)
    yield from _check_ranges(metrics)
    on_graph = [str(name) for name, value in metrics.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    if on_graph:
        sentence = f"still on the autograd graph: {', '.join(on_graph)}; with report_every above 1 it keeps that many steps' memory"
        yield warn("step/detached", sentence, f"return {on_graph[0]}.detach()")


def check_held_out(found: Any) -> Iterator[Check]:
    """Checks the result of one call of evaluate()."""
    yield from _check_kind("evaluate", found, "a float", "{'ssim': …, 'psnr': …}")
    if not isinstance(found, Mapping):
        return
    yield from _check_names("evaluate", found, HELD_OUT)
    ssim, psnr = (math.inf if (value := _number(found.get(name))) is None else value for name in HELD_OUT)
    for name, value in (("ssim", ssim), ("psnr", psnr)):
        if math.isnan(value):
            yield broken(f"evaluate/{name}", f"{name} is NaN before the training", "look at sample(): are the weights loaded?")
    if math.isfinite(ssim) and not -1 <= ssim <= 1:
        yield broken("evaluate/ssim", f"ssim is {ssim:.4g}, outside [-1, 1]", "return the mean SSIM, not a sum or a per cent")
    if math.isfinite(psnr) and not 0 < psnr < 101:
        remedy = "psnr = -10 * log10(mean square error), with images and references in [0, 1]"
        yield broken("evaluate/psnr", f"psnr is {psnr:.4g}, not a PSNR in dB of images in [0, 1]", remedy)
    if not any(str(name).startswith("flow_loss_bins") for name in found):
        yield unknown(
            "evaluate/flow_loss_bins",
            "there is no flow_loss_bins/0, …: a model that got worse at some t only is not noticed",
            "for a flow model, return the held-out flow loss at a few fixed t as flow_loss_bins/0, /1, …",
        )


def _check_kind(method: str, found: Any, value_kind: str, example: str) -> Iterator[Check]:
    if not isinstance(found, Mapping):
        sentence = f"{method}() returned {describe_kind(found)}, not a mapping of names to numbers"
        yield broken(method, sentence, f"write def {method}(self): … return {example}")
        return
    wrong = [
        f"{name!r} is {describe_kind(value)}"
        for name, value in found.items()
        if not isinstance(name, str) or _number(value) is None
    ]
    if wrong:
        remedy = f"return {value_kind} under every name; a mean over the batch is .mean(), not a list"
        yield broken(method, f"{method}() returned values that are not numbers: {'; '.join(wrong[:4])}", remedy)
    else:
        yield ok(method, f"{method}() returns {len(found)} numbers: {', '.join(map(str, list(found)[:8]))}")


def _check_names(method: str, found: Mapping[Any, Any], required: Mapping[str, tuple[str, str]]) -> Iterator[Check]:
    for name, (lost, meaning) in required.items():
        if name not in found:
            near = _near(name, found, cutoff=0.75)
            remedy = f"rename {near!r} to {name!r}" if near else f"add {name!r}"
            yield broken(f"{method}/{name}", f"{method}() returns no {name!r}: {lost}", f"{remedy}: {meaning}")


def _check_ranges(metrics: Mapping[Any, Any]) -> Iterator[Check]:
    values = {name: number for name, value in metrics.items() if (number := _number(value)) is not None and math.isfinite(number)}
    fraction, norm = values.get(records.ACTIVE_FRACTION, 0.0), values.get(records.TOTAL_NORM, 1.0)
    if not 0 <= fraction <= 1:
        sentence = f"{records.ACTIVE_FRACTION} is {fraction:.4g}, outside [0, 1]"
        yield broken(f"step/{records.ACTIVE_FRACTION}", sentence, "divide the number of active samples by the batch size")
    if norm <= 0:
        sentence = f"{records.TOTAL_NORM} is {norm:.4g}: there is no gradient where it is measured"
        remedy = "measure it between backward() and zero_grad(), over the parameters that train"
        yield broken(f"step/{records.TOTAL_NORM}", sentence, remedy)
    loss = values.get(records.LOSS_SSIM, 0.5)
    if not -1e-6 <= loss <= 2:  # 1 - SSIM of images whose structure is inverted exceeds 1
        sentence = f"{records.LOSS_SSIM} is {loss:.4g}, which 1 - SSIM cannot be"
        remedy = "record the mean of 1 - SSIM over the active samples, before its weight"
        yield broken(f"step/{records.LOSS_SSIM}", sentence, remedy)


def _number(value: Any) -> float | None:
    """A metric as a number; None if a record cannot hold it."""
    if isinstance(value, torch.Tensor):
        return float(value.detach()) if value.ndim == 0 and not value.is_complex() else None
    is_number = isinstance(value, numbers.Real) or (getattr(value, "ndim", None) == 0 and hasattr(value, "item"))
    return float(value) if is_number else None


def describe_kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return "nothing (None)" if value is None else f"a {type(value).__name__}"


def _near(name: str, present: Iterable[Any], cutoff: float) -> str | None:
    """The key that was probably intended. cutoff: least similarity of one that is not a known alias."""
    prefixes = str.maketrans("-/", "__")
    plain = {str(key).lower().replace("train/", "").replace("val/", "").translate(prefixes): str(key) for key in present}
    known = [plain[alias] for alias in (name, *ALIASES[name]) if alias in plain]
    similar = [key for key in difflib.get_close_matches(name, plain, n=1, cutoff=cutoff) if key not in ALIASES]
    return next(iter([*known, *(plain[key] for key in similar)]), None)
