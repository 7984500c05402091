"""The heat map of a calibration: predicted norm ratio over gain and max_t, with the search space and the notes' settings."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tune_ssim.base.files import number
from tune_ssim.before_launch.forecast import LANDMARKS, NOTES, gains_of, inert_below
from tune_ssim.guards.verdict import Verdict
from tune_ssim.probes.norm_model import Array, NormModel
from tune_ssim.study.space import Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, DPI = 9.6, 5.4, 125  # inches; 1200 × 675 pixels
COLUMNS, ROWS = 360, 120
MAX_COLOUR = 100.0  # larger ratios get the last colour
COLOUR_STOPS = [(0.0, "#f4f6f8"), (0.06, "#e3eedd"), (0.25, "#f7e3a1"), (0.5, "#f0994d"), (0.75, "#b5343c"), (1.0, "#3d1028")]
INK, LIMIT = "#1d2733", "#8e1024"
# verdict → marker, colour
TRIAL_MARKS = {
    Verdict.SAFE: ("o", "#1a7f37"),
    Verdict.DEGRADED: ("v", "#b07d12"),
    Verdict.STOPPED: ("s", "#51606f"),
    Verdict.PRUNED: ("X", "#8e1024"),
}
STAGE_COLOURS = ["#a9cbea", "#7fb0dd", "#4f8cc4", "#2a67a3", "#123f70"]  # later stages are darker


def draw_heat_map(
    calibration: Mapping[str, Any], space: Space, study: str = "", trials: Sequence[tuple[Verdict, float, float]] = ()
) -> bytes:
    """PNG of `Calibration.to_dict()`, also after a JSON round trip.

    `study`: its name, for the title. trials: verdict, gain and max_t of those to be drawn, in place of the settings that the
    calibration names."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure

    model = NormModel.from_dict(calibration["model"])
    pixel_weight = next((s.fixed["pixel_loss_weight"] for s in space.stages if "pixel_loss_weight" in s.fixed), None)
    pixel_weight = float(model.held.get("pixel_loss_weight", 0.0) if pixel_weight is None else pixel_weight)
    limit, max_ratio = calibration["limit"], calibration["skip_above"]
    gates = np.geomspace(*_gate_range(model), ROWS)
    segments = list(_segments(model, space))
    gains = np.geomspace(*_gain_range(model, calibration, segments, pixel_weight), COLUMNS)
    ratios = np.stack([model.ratios(gains, float(gate), pixel_weight) for gate in gates])

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("norm_ratio", COLOUR_STOPS)
    mesh = axes.pcolormesh(
        gains,
        gates,
        np.clip(ratios, 1, MAX_COLOUR),
        cmap=colours,
        norm=LogNorm(1, MAX_COLOUR),
        shading="gouraud",
        rasterized=True,
    )
    _draw_contours(axes, gains, gates, ratios, limit, max_ratio)
    _draw_inert_zone(axes, model, gains, gates, pixel_weight)
    _draw_space(axes, space, segments)
    if trials:
        _draw_trials(axes, trials)
    else:
        _draw_settings(axes, calibration["settings"])

    axes.set(xscale="log", yscale="log", xlim=(gains[0], gains[-1]), ylim=(gates[0], gates[-1]))
    axes.set_xlabel("gain = ssim_loss_weight · ssim_grad_scale", color=INK)
    figure.legend(loc="outside lower right", ncols=6, frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.6)
    axes.set_ylabel("ssim_loss_max_t", color=INK)
    marked = [gate for gate in model.max_ts if gates[0] <= gate <= gates[-1]]
    axes.set_yticks(marked, [f"{gate:g}" for gate in marked])
    axes.minorticks_off()
    axes.tick_params(colors=INK, length=3)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, fraction=0.035, aspect=28, extend="max")
    ticks = [1, 1.5, 3, 10, 30, MAX_COLOUR]
    bar.set_ticks(ticks, labels=[f"{tick:g}×" for tick in ticks])
    bar.minorticks_off()
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=INK, length=0)
    how = f"measured on {len(model.batches)} batches, by {'the gradients' if model.method == 'gram' else 'total_norm readings'}"
    figure.suptitle("How hard each setting pushes at step 0", x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    axes.set_title(
        f"{study + ': ' if study else ''}predicted total_norm over the pixel-loss baseline's; {how}",
        loc="left", fontsize=9, color="#51606f",
    )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _gate_range(model: NormModel) -> tuple[float, float]:
    """The calibrated gates that had active batches, with a margin."""
    usable = [gate for gate, active in zip(model.max_ts, model.active, strict=True) if active.any()]
    return min(usable) / 1.12, max(usable) * 1.12


def _gain_range(model: NormModel, calibration: Mapping[str, Any], segments: list[Any], pixel_weight: float) -> tuple[float, float]:
    """The range of gains: covers all that are drawn, and the gain at 1.5 times the limit."""
    drawn = [gain for _, _, gains in segments for gain in (gains[0], gains[-1])]
    drawn += [number(named["prediction"]["gain"]) for named in calibration["settings"]]
    for gate, active in zip(model.max_ts, model.active, strict=True):
        if active.any():
            try:
                drawn.append(
                    model.gain_for(1.5 * max(calibration["limit"] or 10.0, calibration["skip_above"] or 0), gate, pixel_weight)
                )
            except ValueError:
                continue
    positive = [gain for gain in drawn if gain > 0]
    return min(positive, default=1e-3) / 3, max(positive, default=1e3) * 2


def _segments(model: NormModel, space: Space) -> Iterator[tuple[str, float, Array]]:
    """(stage, max_t, the gains searched there) for every max_t that a stage names."""
    for stage in space.stages:
        for max_t, _, gains in gains_of(model, stage):
            if gains.size and gains.max() > 0:
                yield stage.name, max_t, np.sort(gains[gains > 0])


def _draw_contours(axes: Axes, gains: Array, gates: Array, ratios: Array, limit: float | None, max_ratio: float | None) -> None:
    from matplotlib import patheffects

    halo = [patheffects.withStroke(linewidth=2.5, foreground="white", alpha=0.75)]
    lines: list[tuple[float, str, str, float, str]] = [(ratio, f"{ratio:g}×", INK, 0.7, "-") for ratio in LANDMARKS]
    if limit is not None:
        lines.append((limit, f"guard's limit {limit:g}×", LIMIT, 2.0, "-"))
    if max_ratio is not None:
        lines.append((max_ratio, f"not launched above {max_ratio:g}×", LIMIT, 1.3, "--"))
    for ratio, words, colour, width, style in lines:
        if not np.nanmin(ratios) < ratio < np.nanmax(ratios):
            continue
        drawn = axes.contour(gains, gates, ratios, [ratio], colors=colour, linewidths=width, linestyles=style)
        row = int(0.62 * len(gates))
        column = int(np.argmin(np.abs(np.log(ratios[row]) - np.log(ratio))))
        for label in axes.clabel(drawn, fmt=lambda _, words=words: words, fontsize=8, manual=[(gains[column], gates[row])]):
            label.set(color=colour, path_effects=halo)


def _draw_inert_zone(axes: Axes, model: NormModel, gains: Array, gates: Array, pixel_weight: float) -> None:
    """Draws the edge below which a setting changes the norm by less than 0.1 %, interpolated between the calibrated gates."""
    usable = [gate for gate, active in zip(model.max_ts, model.active, strict=True) if active.any()]
    found = [inert_below(model, gate, pixel_weight) for gate in usable]
    edges = [gains[-1] if gain is None else gain for gain in found]
    edge = np.exp(np.interp(np.log(gates), np.log(usable), np.log(edges)))
    axes.fill_betweenx(gates, gains[0], edge, facecolor="none", edgecolor="#bcc7d1", hatch="///", linewidth=0)
    axes.plot(edge, gates, color="#7d8b99", lw=1, ls=":")
    place = (float(np.sqrt(gains[0] * np.median(edges))), float(gates[int(0.66 * len(gates))]))
    box = {"facecolor": COLOUR_STOPS[0][1], "edgecolor": "none", "pad": 2.5}
    axes.text(*place, "inert\n< 0.1 %", ha="center", va="center", fontsize=9, color="#51606f", bbox=box)


def _draw_space(axes: Axes, space: Space, segments: list[tuple[str, float, Array]]) -> None:
    """Draws the gains that each stage searches at each max_t; later stages are darker."""
    stages = [stage.name for stage in space.stages]
    for index, name in enumerate(stages):
        colour = STAGE_COLOURS[round((index + 1) * (len(STAGE_COLOURS) - 1) / len(stages))]
        words = f"space {name}" if len(stages) == 1 else name
        shift = 1 + 0.03 * (index - (len(stages) - 1) / 2)  # stages with the same gate are drawn next to each other
        for stage, gate, gains in segments:
            if stage == name:
                ends, height = [gains[0], gains[-1]], [gate * shift] * 2
                axes.plot(ends, height, "|-", color=colour, lw=2.2, ms=8, mew=2, solid_capstyle="butt", label=words)
                words = "_"  # one legend entry per stage


def _draw_trials(axes: Axes, trials: Sequence[tuple[Verdict, float, float]]) -> None:
    for verdict, (marker, colour) in TRIAL_MARKS.items():
        gains = [gain for found, gain, _ in trials if found is verdict]
        gates = [max_t for found, _, max_t in trials if found is verdict]
        if gains:
            look: dict[str, Any] = {"marker": marker, "c": colour, "edgecolors": "white", "linewidths": 0.9}
            axes.scatter(gains, gates, s=64, zorder=6, label=verdict, **look)


def _draw_settings(axes: Axes, settings: list[Mapping[str, Any]]) -> None:
    """Draws the settings that the table names: the notes' versions, and the points of the space."""
    from matplotlib import patheffects

    halo = [patheffects.withStroke(linewidth=2.5, foreground="white", alpha=0.8)]
    labels = {True: "the notes' versions", False: "settings of the space"}
    for named in settings:
        setting, is_note = named["setting"], named["name"] in NOTES
        place = (number(named["prediction"]["gain"]), setting["ssim_loss_max_t"])
        look: dict[str, Any] = (
            {"ms": 7.5, "mfc": "white", "mec": INK} if is_note else {"ms": 5.5, "mfc": STAGE_COLOURS[-1], "mec": "white"}
        )
        axes.plot(
            *place, "o" if is_note else "D", mew=1.6 if is_note else 0.8, zorder=5, ls="", label=labels.pop(is_note, "_"), **look
        )
        if is_note:
            words = f"{named['name']}  {number(named['prediction']['ratio']):.3g}×"
            offset: dict[str, Any] = {"xytext": (7, 5), "textcoords": "offset points", "zorder": 6, "path_effects": halo}
            axes.annotate(words, place, fontsize=8.5, color=INK, fontweight="bold", **offset)
