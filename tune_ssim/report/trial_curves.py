"""Small curves of trials, and the intervals of the confirm phase, as SVG."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tune_ssim.base.numbers import as_float
from tune_ssim.records import LOSS, LOSS_FLOW, TOTAL_NORM
from tune_ssim.results.trial_text import metric_label
from tune_ssim.study.objective import Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 100  # of a curve; each is the largest value of its steps, so that no peak is lost
SIZE, CONFIRM_SIZE = (2.1, 0.62), (6.4, 1.0)  # inches
LINE, BASELINE, LIMIT, INK = "#2a78c8", "#8a97a5", "#c8323c", "#7b8794"  # readable on white and on black


@dataclass
class Curves:
    """Steps, and by metric the values at them; NaN where a step has none."""

    steps: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: float, record: Mapping[str, Any]) -> None:
        values = {name: record.get(name) for name in (LOSS, LOSS_FLOW, TOTAL_NORM)}
        numbers = {name: math.nan if value is None else as_float(value) for name, value in values.items()}
        self.steps.append(step)
        for name, number in numbers.items():
            self.values.setdefault(name, []).append(number)

    @property
    def loss(self) -> str:
        """The main loss, where it is recorded by itself: unlike the total it is on the baseline's scale."""
        return LOSS_FLOW if np.isfinite(self.values.get(LOSS_FLOW, [])).any() else LOSS

    def reduced(self, name: str) -> tuple[list[float], list[float]]:
        """At most POINTS steps with finite values, and the largest value of each part."""
        steps, values = np.asarray(self.steps), np.asarray(self.values.get(name, []))
        kept = np.isfinite(values) if len(values) else np.zeros(len(steps), bool)
        steps, values = steps[kept], values[kept] if len(values) else values
        parts = [part for part in np.array_split(np.arange(len(steps)), min(POINTS, max(len(steps), 1))) if len(part)]
        return [float(steps[part[-1]]) for part in parts], [float(values[part].max()) for part in parts]


def curves_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Curves]:
    """Trial → its recorded loss and gradient norm. Lines of another shape are left out."""
    found: dict[str, Curves] = {}
    for event in events:
        if event.get("event") != "records":
            continue
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            curves = found.setdefault(str(event["trial_id"]), Curves())
            for step, record in event["records"]:
                curves.add(float(step), record)
    return found


def draw_curves(own: Curves, baseline: Curves | None, limit: float | None) -> str:
    """SVG: the main loss, and total_norm on a logarithmic axis, over those of the baseline.

    limit: a norm ratio, drawn at that multiple of the baseline's norm."""
    figure = _figure(SIZE)
    for left, name in ((0.02, own.loss), (0.52, TOTAL_NORM)):
        axes = figure.add_axes((left, 0.05, 0.46, 0.9))
        axes.set_axis_off()
        # Logarithms instead of a logarithmic axis, which takes ten times as long to draw.
        scale = np.log10 if name == TOTAL_NORM else np.asarray
        (steps, values), (_, reference) = own.reduced(name), baseline.reduced(name) if baseline else ([], [])
        if name == TOTAL_NORM and min([*values, *reference], default=0.0) <= 0:
            scale = np.asarray
        if baseline and reference:
            axes.plot(baseline.reduced(name)[0], scale(reference), color=BASELINE, lw=1)
            if name == TOTAL_NORM and limit is not None:
                axes.axhline(float(scale(limit * np.median(reference))), color=LIMIT, lw=0.9, ls="--")
        axes.plot(steps, scale(values), color=LINE, lw=1.1)
    return _svg(figure)


def draw_confirmation(proof: Mapping[str, Any], objective: Objective) -> str:
    """SVG: the improvement with each seed of the confirm phase, and the confidence interval of its mean; empty without one."""
    found = proof["comparison"].get(objective.delta)
    if not found or not found["interval"]:
        return ""
    figure = _figure(CONFIRM_SIZE)
    axes = figure.add_axes((0.03, 0.5, 0.94, 0.45))
    low, high = found["interval"]
    axes.plot([low, high], [0, 0], color=LINE, lw=6, alpha=0.35, solid_capstyle="butt")
    axes.plot(found["mean"], 0, "D", color=LINE, ms=7)
    values = list(found["by_seed"].values())
    axes.plot(values, [0] * len(values), "|", color=INK, ms=16, mew=1.5, ls="")
    least = proof.get("min_improvement") or 0.0
    axes.axvline(0, color=INK, lw=0.8)
    axes.axvline(least, color=LIMIT, lw=1, ls="--")
    axes.set(yticks=[], ylim=(-1, 1))
    label = f"{metric_label(objective.delta)}: bars: each seed; diamond and band: mean and interval; dashed: the least that counts"
    axes.set_xlabel(label, color=INK, fontsize=8)
    axes.tick_params(colors=INK, labelsize=8)
    for name, side in axes.spines.items():
        side.set_visible(name == "bottom")
        side.set_color(INK)
    return _svg(figure)


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    figure.patch.set_alpha(0)
    return figure


def _svg(figure: Figure) -> str:
    """The `<svg>` element alone, with a transparent background, text as text, and no date."""
    from matplotlib import rc_context

    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tune_ssim", "path.simplify": True}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    found = re.search(r"<svg.*</svg>", buffer.getvalue(), re.S)
    assert found is not None
    return found.group()
