"""Checks that step() and evaluate() return numbers, under the names that guards and rules look for."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from tune_ssim import records
from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.testing.findings import broken, ok, unknown, warn

# Aliases of each metric in trainers and the notes (lower case, without a prefix such as `train/`).
ALIASES: dict[str, tuple[str, ...]] = {
    records.LOSS: ("total_loss", "loss_total", "train_loss", "training_loss", "sum_loss"),
    records.TOTAL_NORM: ("grad_norm", "gradient_norm", "gnorm", "norm", "global_norm", "grad_norm_total", "total_grad_norm"),
    records.ACTIVE_FRACTION: ("active_fraction", "ssim_fraction", "ssim_active", "active", "participation", "ssim_ratio"),
    records.LOSS_SSIM: ("ssim_loss", "ssim"),
    records.LOSS_PIXEL: ("pixel_loss", "l2_loss", "loss_l2"),
    records.LOSS_FLOW: ("flow_loss", "loss_mse", "mse", "mse_loss", "loss_velocity"),
    records.STEP_SKIPPED: ("skipped", "skipped_step", "overflow"),
}
MEANING = {
    records.LOSS: "the weighted sum that is minimised",
    records.TOTAL_NORM: "the L2 norm of the whole gradient before clipping: what clip_grad_norm_ returns",
    records.ACTIVE_FRACTION: "the share of the batch with 0 < t <= ssim_loss_max_t; DecodedLossResult.metrics() has it",
    "ssim": "the mean SSIM of held-out samples",
    "psnr": "the mean PSNR of held-out samples in dB",
}
NEEDED = {
    records.LOSS: "a NaN is not noticed",
    records.TOTAL_NORM: "the norm guard cannot judge, and a trial ends as an error",
    records.ACTIVE_FRACTION: "the norm guard would judge steps without an SSIM gradient too",
    "ssim": "there is no ΔSSIM, so nothing to search for",
    "psnr": "no trial can be called degraded for losing PSNR",
}
HELD_OUT_ALIASES = {"ssim": ("mean_ssim", "ssim_mean", "structural_similarity"), "psnr": ("mean_psnr", "psnr_mean", "psnr_db")}


def check_metrics(metrics: Any) -> Iterator[Check]:
    """Checks the result of one call of step()."""
    yield from _check_kind("step", metrics, "def step(self): … return {'loss': loss.detach(), 'total_norm': norm, …}")
    if not isinstance(metrics, Mapping):
        return
    yield from _check_names("step", metrics, (records.LOSS, records.TOTAL_NORM, records.ACTIVE_FRACTION), ALIASES)
    for name in (records.LOSS_SSIM, records.LOSS_PIXEL, records.LOSS_FLOW, records.STEP_SKIPPED):
        if name not in metrics and (near := _near(name, metrics, ALIASES[name], close=False)):
            yield warn(
                f"step/{name}", f"step() records {near!r}: nothing knows that name", f"rename it {name!r} (tune_ssim.records)"
            )
    yield from _check_ranges(metrics)
    on_graph = [str(name) for name, value in metrics.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    if on_graph:
        yield warn(
            "step/detached",
            f"{', '.join(on_graph)} still hold{'s' if len(on_graph) == 1 else ''} the autograd graph: "
            "with report_every above 1 the memory of that many steps",
            f"return {on_graph[0]}.detach()",
        )


def check_held_out(found: Any) -> Iterator[Check]:
    """Checks the result of one call of evaluate()."""
    yield from _check_kind("evaluate", found, "def evaluate(self): … return {'ssim': …, 'psnr': …}")
    if not isinstance(found, Mapping):
        return
    yield from _check_names("evaluate", found, ("ssim", "psnr"), HELD_OUT_ALIASES)
    for name in ("ssim", "psnr"):
        if (value := _number(found.get(name))) is not None and math.isnan(value):
            yield broken(f"evaluate/{name}", f"{name} is NaN before the training", "look at sample(): are the weights loaded?")
    ssim, psnr = _number(found.get("ssim")), _number(found.get("psnr"))
    if ssim is not None and math.isfinite(ssim) and not -1 <= ssim <= 1:
        yield broken("evaluate/ssim", f"ssim is {ssim:.4g}, outside [-1, 1]", "return the mean SSIM, not a sum or a per cent")
    if psnr is not None and math.isfinite(psnr) and not 0 < psnr < 101:
        yield broken(
            "evaluate/psnr",
            f"psnr is {psnr:.4g}, no number of dB of images in [0, 1]",
            "psnr = -10 * log10(mean square error), with images and references in [0, 1]",
        )
    if not any(str(name).startswith("flow_loss_bins") for name in found):
        yield unknown(
            "evaluate/flow_loss_bins",
            "there is no flow_loss_bins/0 …: a model that got worse at some times alone is not seen",
            "return the held-out flow loss at a few fixed t as flow_loss_bins/0, /1, … if the model is one",
        )


def _check_kind(method: str, found: Any, reads: str) -> Iterator[Check]:
    if not isinstance(found, Mapping):
        yield broken(method, f"{method}() returned {_kind(found)}, not a mapping of names to numbers", f"write {reads}")
        return
    wrong = [f"{name!r} is {_kind(value)}" for name, value in found.items() if _number(value) is None or not isinstance(name, str)]
    if wrong:
        what = "a float or a 0-d tensor" if method == "step" else "a float"
        remedy = f"return {what} under every name; a mean over the batch is .mean(), not a list"
        yield broken(method, f"{method}() returned what is no number: {'; '.join(wrong[:4])}", remedy)
    else:
        yield ok(method, f"{method}() returns {len(found)} numbers: {', '.join(map(str, list(found)[:8]))}")


def _check_names(
    method: str, found: Mapping[Any, Any], needed: Iterable[str], aliases: Mapping[str, tuple[str, ...]]
) -> Iterator[Check]:
    for name in needed:
        if name in found:
            continue
        near = _near(name, found, aliases[name])
        remedy = f"rename {near!r} to {name!r}" if near else f"add {name!r}"
        sentence = f"{method}() returns no {name!r}: {NEEDED[name]}"
        yield broken(f"{method}/{name}", sentence, f"{remedy}: {MEANING[name]}")


def _check_ranges(metrics: Mapping[Any, Any]) -> Iterator[Check]:
    values = {name: number for name, value in metrics.items() if (number := _number(value)) is not None and math.isfinite(number)}
    fraction = values.get(records.ACTIVE_FRACTION, 0.0)
    if not 0 <= fraction <= 1:
        yield broken(
            f"step/{records.ACTIVE_FRACTION}",
            f"{records.ACTIVE_FRACTION} is {fraction:.4g}, outside [0, 1]",
            "divide the number of samples that take part by the size of the batch",
        )
    norm = values.get(records.TOTAL_NORM, 1.0)
    if norm <= 0:
        yield broken(
            f"step/{records.TOTAL_NORM}",
            f"{records.TOTAL_NORM} is {norm:.4g}: there is no gradient where it is measured",
            "measure it between backward() and zero_grad(), over the parameters that train",
        )
    loss = values.get(records.LOSS_SSIM, 0.5)
    if not -1e-6 <= loss <= 2:  # 1 - SSIM of images whose structure is inverted exceeds 1
        yield broken(
            f"step/{records.LOSS_SSIM}",
            f"{records.LOSS_SSIM} is {loss:.4g}, no 1 - SSIM",
            "record the mean of 1 - SSIM over the samples that take part, before its weight",
        )


def _number(value: Any) -> float | None:
    """A metric as a number; None if a record cannot hold it."""
    if isinstance(value, torch.Tensor):
        return float(value.detach()) if value.ndim == 0 and not value.is_complex() else None
    is_number = isinstance(value, numbers.Real) or (getattr(value, "ndim", None) == 0 and hasattr(value, "item"))
    return float(value) if is_number else None


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return "nothing (None)" if value is None else f"a {type(value).__name__}"


def _near(name: str, present: Iterable[Any], aliases: Iterable[str], *, close: bool = True) -> str | None:
    """The key that was probably intended."""
    plain = {
        str(key).lower().replace("train/", "").replace("val/", "").replace("-", "_").replace("/", "_"): str(key) for key in present
    }
    for alias in (name, *aliases):
        if alias in plain:
            return plain[alias]
    found = difflib.get_close_matches(name, plain, n=1, cutoff=0.75) if close else []
    return plain[found[0]] if found and found[0] not in ALIASES else None
