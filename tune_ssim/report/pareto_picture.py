"""The Pareto front of a study: every trial in the plane of two objectives."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.report.heat_map import DPI, INK
from tune_ssim.results.trial_text import format_setting, metric_label
from tune_ssim.study.objective import Goal, Objective
from tune_ssim.trials.summary import TrialSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = 5.0  # inches
NAME_SIZE = (170, 22)  # pixels
SAFE, FRONT, DEGRADED = "#a9cbea", "#123f70", "#b5343c"


def draw_front(summaries: Sequence[TrialSummary], front: Sequence[TrialSummary], objective: Objective, study: str = "") -> bytes:
    """PNG with a panel for each objective after the first, over the first. `front`: see `pareto_front`. `study`: its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL * len(objective.also) + 1.2, PANEL), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(objective.also), squeeze=False)[0]
    for axes, goal in zip(panels, objective.also, strict=True):
        _draw_panel(axes, summaries, front, objective, goal)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=4, frameon=False, fontsize=8.5, labelcolor=INK)
    figure.suptitle(f"{study + ': ' if study else ''}Pareto front", x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_panel(
    axes: Axes, summaries: Sequence[TrialSummary], front: Sequence[TrialSummary], objective: Objective, goal: Goal
) -> None:
    searched = [summary for summary in summaries if summary.role is Role.SEARCH]
    safe = [summary for summary in searched if summary.verdict is Verdict.SAFE and summary not in front]
    degraded = [summary for summary in searched if summary.verdict is Verdict.DEGRADED]
    baselines = [summary for summary in summaries if summary.role is Role.BASELINE]
    for found, label, marker, colour, size in (
        (safe, "safe", "o", SAFE, 36),
        (degraded, "degraded", "x", DEGRADED, 30),
        (baselines, "baseline", "+", INK, 60),
        (front, "Pareto front", "D", FRONT, 40),
    ):
        if found:
            axes.scatter(*_places(found, objective, goal), label=label, marker=marker, color=colour, s=size)
    _name_settings(axes, front, objective, goal)
    for name, one in (("x", objective), ("y", goal)):
        words = "more" if one.direction == "maximize" else "less"
        getattr(axes, f"set_{name}label")(f"{metric_label(one.name)} ({words} is better)", color=INK)
    axes.tick_params(colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e7eb", lw=0.6)
    axes.set_axisbelow(True)


def _name_settings(axes: Axes, front: Sequence[TrialSummary], objective: Objective, goal: Goal) -> None:
    """Writes the settings beside their marks, except where a name would cover another."""
    places = np.column_stack(_places(front, objective, goal))
    pixels = axes.transData.transform(places)
    named: list[int] = []
    for index, summary in enumerate(front):
        if all(np.any(np.abs(pixels[index] - pixels[other]) > NAME_SIZE) for other in named):
            named.append(index)
            words = format_setting(summary.config)
            axes.annotate(words, places[index], xytext=(6, 5), textcoords="offset points", fontsize=8, color=INK)


def _places(summaries: Sequence[TrialSummary], objective: Objective, goal: Goal) -> tuple[list[float], list[float]]:
    return [_coordinate(one, objective) for one in summaries], [_coordinate(one, goal) for one in summaries]


def _coordinate(summary: TrialSummary, goal: Goal) -> float:
    """NaN, which is not drawn, unless it is finite. A baseline differs from itself by nothing."""
    value = 0.0 if goal.is_delta and summary.role is Role.BASELINE else summary.metric(goal.name)
    return value if math.isfinite(value) else math.nan
