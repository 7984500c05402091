"""Draws a checked log: the curves that the rules use, stacked, with the alerts marked."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tune_ssim.guards.curves import Curve
from tune_ssim.guards.log_report import Alert, LogReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, ROW, DPI = 9.6, 1.35, 125  # inches; 1200 pixels wide
MAX_PANELS = 8
MAX_MARKS = 12  # alerts marked in one panel
LANES, LANE_HEIGHT = 4, 0.18  # rows of labels in a panel, and the share of its height that each takes
LETTER_WIDTH = 0.0078  # width of a letter in a label, as a share of the panel's width
INK, GREY, LINE, CLOUD = "#1d2733", "#51606f", "#2a67a3", "#a9cbea"
COLOURS = {"warn": "#e08a1e", "probe": "#2a67a3", "prune": "#b5343c", "abort": "#7a1f5c"}
SMOOTHING_PARTS = 40  # a noisy curve is drawn through the medians of this many parts


def draw_check(report: LogReport) -> bytes:
    """The report as a PNG image."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = _panels(report)
    figure = Figure(figsize=(WIDTH, 1.2 + ROW * max(1, len(panels))), dpi=DPI, layout="constrained")
    rows: Sequence[Axes] = list(figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0])
    first, last = report.steps or (0, 1)
    for axes, (metric, curve, alerts) in zip(rows, panels, strict=False):
        _draw(axes, metric, curve)
        _mark(axes, alerts[:MAX_MARKS], curve, first, max(last, first + 1))
    margin = 0.01 * max(last - first, 1)
    rows[-1].set_xlim(first - margin, last + margin)
    if report.ended is not None:
        for axes in rows:
            axes.axvline(report.ended.step, color=COLOURS[report.ended.action], lw=1.2, ls="--", zorder=1)
    rows[-1].set_xlabel("step", color=INK)
    plain = {"healthy": "no alert", "unknown": "nothing could be judged", "does_not_work": "a branch does not work"}
    verdict = plain.get(report.verdict, _count(report))
    figure.suptitle(f"{_shorten_start(report.log)}: {verdict}", x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    words = "; ".join(f"{branch.branch} {branch.verdict}" for branch in report.branches)
    alarmed = {alert.violation.metric for alert in report.alerts} & set(report.curves) - {metric for metric, _, _ in panels}
    if alarmed:
        words += f"; {len(alarmed)} more metrics with alerts are not shown"
    rows[0].set_title(words or f"{report.records} records", loc="left", fontsize=9, color=GREY)
    actions = [action for action in COLOURS if any(alert.violation.action == action for alert in report.alerts)]
    if actions:
        handles = [Line2D([], [], marker="v", ls="", color=COLOURS[action], label=action) for action in actions]
        if report.ended is not None:
            handles.append(Line2D([], [], ls="--", color=COLOURS[report.ended.action], label="a live trial would have ended here"))
        figure.legend(handles=handles, loc="outside lower right", ncols=5, frameon=False, fontsize=8.5, labelcolor=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _panels(report: LogReport) -> list[tuple[str, Curve, list[Alert]]]:
    """At most MAX_PANELS curves, in the order of the rules: those with alerts (the most severe first), then the losses of the
    branches, then others."""
    alerts: dict[str, list[Alert]] = {}
    for alert in sorted(report.alerts, key=lambda alert: -alert.violation.action.severity):
        alerts.setdefault(alert.violation.metric, []).append(alert)
    names = [name for pack in report.packs for branch in pack.branches.values() for name in (branch.loss, *branch.gradient)]
    wanted = dict.fromkeys([*alerts, *names, *(key for key in report.curves if isinstance(key, str))])
    drawn = [name for name in wanted if name in report.curves and (name in alerts or _varies(report.curves[name]))]
    chosen = drawn[:MAX_PANELS]
    order = {name: index for index, name in enumerate(key for key in report.curves if isinstance(key, str))}
    return [(name, report.curves[name], alerts.get(name, [])) for name in sorted(chosen, key=lambda name: order[name])]


def _varies(curve: Curve) -> bool:
    mean = np.asarray(curve.mean)
    finite = mean[np.isfinite(mean)]
    return bool(finite.size and finite.max() > finite.min())


def _draw(axes: Axes, metric: str, curve: Curve) -> None:
    steps, mean = np.asarray(curve.steps), np.asarray(curve.mean)
    axes.fill_between(steps, curve.low, curve.high, color=CLOUD, lw=0, alpha=0.6)
    noisy = len(steps) > 2 * SMOOTHING_PARTS
    gaps = np.where(np.asarray(curve.broken) > 0, np.nan, mean)  # the line stops at non-finite values
    axes.plot(steps, gaps, color=CLOUD if noisy else LINE, lw=0.8 if noisy else 1.3)
    if noisy:
        parts = np.array_split(np.arange(len(steps)), SMOOTHING_PARTS)
        middle = [float(np.median(gaps[part])) for part in parts]  # NaN if one is in the part
        axes.plot([steps[part].mean() for part in parts], middle, color=LINE, lw=1.6)
    finite = mean[np.isfinite(mean)]
    positive = finite[finite > 0]
    if positive.size == finite.size > 0 and positive.max() / positive.min() > 100:
        axes.set_yscale("log")
    axes.set_ylabel(_shorten_middle(metric, 20), color=INK, fontsize=8.5, rotation=0, ha="right", va="center")
    axes.tick_params(colors=GREY, labelsize=7.5, length=2.5)
    axes.margins(y=0.12)
    axes.grid(axis="y", color="#e6ebf0", lw=0.6)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _mark(axes: Axes, alerts: Sequence[Alert], curve: Curve, first: int, last: int) -> None:
    """Marks each alert with a line and a triangle. Alerts of one step share a label; labels that would overlap are stacked."""
    at: dict[int, list[Alert]] = {}
    for alert in alerts:
        at.setdefault(alert.violation.step, []).append(alert)
    ends = [-1.0] * LANES  # right end of the last label in each lane, as a share of the width
    for step in sorted(at):
        names = ", ".join(alert.violation.guard.split("/")[-1] for alert in at[step])
        colour = COLOURS[at[step][0].violation.action]  # the most severe comes first
        label, place = f"{names}, step {step}", (step - first) / (last - first)
        width = LETTER_WIDTH * len(label)
        left = place + width > 1
        begin = place - width if left else place
        lane = next((k for k, end in enumerate(ends) if end <= begin), LANES - 1)
        ends[lane] = begin + width
        axes.axvline(step, color=colour, lw=0.9, alpha=0.5)
        index = min(int(np.searchsorted(curve.steps, step)), len(curve.steps) - 1)
        height = float(curve.mean[index])
        seen = bool(np.isfinite(height))  # a non-finite value is marked at the bottom of the panel
        axes.plot(
            [step], [height if seen else 0.08], "v", color=colour, ms=6.5, mec="white", mew=0.7, zorder=5,
            transform=axes.transData if seen else axes.get_xaxis_transform(),
        )  # fmt: skip
        axes.annotate(
            label, (step, 0.98 - LANE_HEIGHT * lane), xycoords=("data", "axes fraction"),
            xytext=(-4 if left else 4, 0), textcoords="offset points", ha="right" if left else "left", va="top",
            fontsize=7.5, color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}, zorder=6,
        )  # fmt: skip


def _count(report: LogReport) -> str:
    count = sum(alert.times for alert in report.alerts)
    return f"{count} alert{'s' if count > 1 else ''}"


def _shorten_middle(text: str, max_length: int) -> str:
    """Shortens in the middle, since names differ at their ends: `dbg/update…o/mu_head`."""
    half = (max_length - 1) // 2
    return text if len(text) <= max_length else f"{text[:half]}…{text[-half:]}"


def _shorten_start(text: str, max_length: int = 60) -> str:
    return text if len(text) <= max_length else "…" + text[1 - max_length :]
