"""Forecast of a search space from a norm model, before launch: which settings are inert, which are deadly, and which are
equivalent. Pure computation on the measurements of `calibrate`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tune_ssim.before_launch.preflight.report import Check, warn
from tune_ssim.losses.schedules import Adaptive
from tune_ssim.probes.norm_model import Array, NormModel, Prediction
from tune_ssim.study.domains import Choice, Domain
from tune_ssim.study.space import GAIN, GRAD_SCALE, MAX_T, TRIPLE, WARM_UP, WEIGHT, Space, Stage, gain_of
from tune_ssim.study.weight_schedule import is_part_of_schedule, schedule_of, schedule_text, schedules_across

INERT = 1e-3  # relative change of total_norm without visible effect; the notes' own gains give 1.000-1.001 (FACTS §1)
BLIND = 10.0  # baseline over main loss: the guard's own measure of what is too much (note 000 §5.2)
LANDMARKS = (1.1, 1.5, 3.0)  # upper ends of the bundled spaces in relative units
NOTES = {"v1": (1.0, 0.3, 1.0), "v2": (0.1, 0.1, 0.1), "v3": (0.1, 0.1, 0.01)}  # weight, max_t, grad_scale (SEEDS A4)
SCAN = 61  # gains evaluated across a range
# Searched settings that cannot change a gradient before the first update.
HARMLESS = ("lr", "max_grad_norm", "steps", "weight_decay", "momentum", "optimizer", "ema_decay")


@dataclass(frozen=True)
class Landmarks:
    """Gains of interest at one gate; None if no gain has that ratio. inert_below: smaller gains change total_norm by less than
    0.1 %."""

    max_t: float
    active_batches: int
    cosine: float
    inert_below: float | None
    gain_for: Mapping[str, float | None]  # keyed by the ratio to the baseline, as text: 1.1, 1.5, 3, the limit


@dataclass(frozen=True)
class Named:
    """A named setting (a note's version, a space's point or schedule) and its prediction; `judgement` in a few words."""

    name: str
    setting: Mapping[str, Any]
    prediction: Prediction
    judgement: str


@dataclass(frozen=True)
class Forecast:
    """limit: the norm guard's, None if it is off. max_ratio: settings whose predicted ratio exceeds it are not launched.

    shares: of the space, weighted as it is sampled: `inert`, `beyond_limit`, `skipped`. widest: its lowest and highest predicted
    ratio. findings: inert · deadly · blind · aliases · clamp · inactive · interpolated · unreachable · other_settings."""

    limit: float | None
    max_ratio: float | None
    shares: Mapping[str, float]
    widest: tuple[float, float]
    landmarks: tuple[Landmarks, ...]
    settings: tuple[Named, ...]
    findings: tuple[Check, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def forecast_space(model: NormModel, space: Space, limit: float | None = None, max_ratio: float | None = None) -> Forecast:
    """limit, max_ratio: see `Forecast`."""
    scans = [scan for stage in space.stages for scan in _scans(model, stage)]
    weights = np.concatenate([np.full(len(scan.gains), 1 / len(scan.gains)) for scan in scans] or [np.zeros(0)])
    changes = np.concatenate([scan.changes for scan in scans] or [np.zeros(0)])
    ratios = np.concatenate([scan.ratios for scan in scans] or [np.zeros(0)])

    def share(chosen: Any) -> float:
        return float(weights[chosen].sum() / weights.sum()) if weights.size else math.nan

    shares = {
        "inert": share(np.abs(changes) < INERT),
        "beyond_limit": share(ratios > limit) if limit is not None else 0.0,
        "skipped": share(ratios > max_ratio) if max_ratio is not None else 0.0,
    }
    return Forecast(
        limit=limit,
        max_ratio=max_ratio,
        shares=shares,
        widest=(float(ratios.min()), float(ratios.max())) if ratios.size else (math.nan, math.nan),
        landmarks=tuple(_landmarks(model, max_t, limit) for max_t in model.max_ts),
        settings=tuple(_named(model, space, limit, max_ratio)),
        findings=tuple(_findings(model, space, scans, limit)),
    )


def predicted(model: NormModel, setting: Mapping[str, Any]) -> Prediction:
    """The prediction for a task's setting, as by `NormModel.predict_setting`. Of a schedule for its largest weight. The gate of the
    pixel loss is that of the calibration, also where it is searched."""
    setting = {name: value for name, value in setting.items() if name != "pixel_loss_max_t"}
    schedule = schedule_of(setting.get(WEIGHT))
    if schedule is None:
        return model.predict_setting(setting)
    if not isinstance(schedule, Adaptive):
        return model.predict_setting({**setting, WEIGHT: max(schedule.weights)})
    full = {GRAD_SCALE: 1.0, "pixel_loss_weight": 0.0, **model.held, **setting}
    max_gain = schedule.max_weight * full[GRAD_SCALE]
    return model.predict_adaptive(schedule.target_ratio, float(full[MAX_T]), float(full["pixel_loss_weight"]), max_gain)


def judgement(model: NormModel, prediction: Prediction, limit: float | None, max_ratio: float | None = None) -> str:
    """A setting's prospects in a few words."""
    if not prediction.active_batches:
        return "no calibrated batch is active"
    alone = model.ratios([0.0], prediction.max_t, prediction.pixel_weight)[0]
    if max_ratio is not None and prediction.ratio > max_ratio:
        return "not launched"
    if limit is not None and prediction.ratio > limit:
        return "beyond the limit"
    return "inert" if abs(prediction.ratio / alone - 1) < INERT else "pushes"


def skip_sentence(prediction: Prediction, max_ratio: float, limit: float) -> str:
    """Why a setting was not launched."""
    return (
        f"total_norm predicted {prediction.ratio:.3g}x the baseline's at step 0, "
        f"beyond {max_ratio:g} ({max_ratio / limit:g}x the norm guard's limit {limit:g})"
    )


def gain_at(model: NormModel, ratio: float, setting: Mapping[str, Any]) -> float:
    """The gain at which `setting` (its gate, its pixel loss) has the predicted norm ratio. Raises ValueError, see `gain_for`."""
    full = {"pixel_loss_weight": 0.0, **model.held, **setting}
    return model.gain_for(ratio, float(full[MAX_T]), float(full["pixel_loss_weight"]))


def inert_below(model: NormModel, max_t: float, pixel_weight: float = 0.0) -> float | None:
    """The smallest gain that changes total_norm by 0.1 % in either direction for a gate; None if no gain does."""
    top = _gain_or_none(model, 3 * model.predict_gain(0.0, max_t, pixel_weight).ratio, max_t, pixel_weight)
    if top is None:
        return None
    gains = np.geomspace(top * 1e-8, top, 801)  # 100 per decade: accurate to a few percent
    changes = model.ratios(gains, max_t, pixel_weight) / model.ratios([0.0], max_t, pixel_weight)[0] - 1
    return float(gains[np.flatnonzero(np.abs(changes) >= INERT)[0]])


# -- a space seen through the model


@dataclass(frozen=True)
class Scan:
    """One gate and pixel weight of a stage: the gains in its range and their predictions."""

    max_t: float
    pixel_weight: float
    gains: Array
    ratios: Array
    changes: Array  # relative change of total_norm against the same without SSIM


def gains_of(model: NormModel, stage: Stage) -> Iterator[tuple[float, float, Array]]:
    """(max_t, pixel weight, gains) of every gate of a stage that a calibrated sample passes."""
    for max_t in _values(stage, model, MAX_T):
        if max_t is None or not model.predict_gain(0.0, max_t).active_batches:
            continue
        for pixel_weight in _values(stage, model, "pixel_loss_weight"):
            yield max_t, pixel_weight or 0.0, _gains(model, stage, max_t, pixel_weight or 0.0)


def _scans(model: NormModel, stage: Stage) -> Iterator[Scan]:
    """Without the gains at which a clamp acts, since nothing is known about them."""
    for max_t, pixel_weight, gains in gains_of(model, stage):
        gains = gains[[not model.predict_gain(float(gain), max_t).clamped for gain in gains]] if model.has_clamp else gains
        if gains.size:
            scheduled = _predictions_of_schedules(model, stage, max_t, pixel_weight)
            ratios = np.asarray([one.ratio for one in scheduled]) if scheduled else model.ratios(gains, max_t, pixel_weight)
            alone = model.ratios([0.0], max_t, pixel_weight)[0]
            yield Scan(max_t, pixel_weight, gains, ratios, ratios / alone - 1)


def _values(stage: Stage, model: NormModel, name: str) -> Sequence[float | None]:
    """Values of a setting: choices, or the calibrated values and ends of a range, or its fixed value."""
    domain = stage.parameters.get(name)
    if domain is None:
        return [stage.fixed.get(name, model.held.get(name))]
    calibrated = [value for value in model.max_ts if value in domain] if name == MAX_T else []
    return sorted({*map(float, domain.listed), *calibrated})


def _gains(model: NormModel, stage: Stage, max_t: float, pixel_weight: float) -> Array:
    domain = stage.parameters.get(GAIN)
    if scheduled := _predictions_of_schedules(model, stage, max_t, pixel_weight):
        return np.asarray([one.gain for one in scheduled])
    if domain is None:
        defaults = {WEIGHT: 0.0, GRAD_SCALE: 1.0, **model.held, **stage.fixed}
        weights, scales = (
            _points(stage.parameters[name]) if name in stage.parameters else float(defaults[name]) for name in (WEIGHT, GRAD_SCALE)
        )
        return np.unique(np.outer(weights, scales))
    if domain.unit is None:
        return _points(domain)
    found = (_gain_or_none(model, float(ratio), max_t, pixel_weight) for ratio in _points(domain))
    return np.asarray([gain for gain in found if gain is not None])


def _predictions_of_schedules(
    model: NormModel, stage: Stage, max_t: float, pixel_weight: float, count: int = SCAN
) -> list[Prediction]:
    """The predictions for schedules across a stage, with `count` values of a searched number; empty if its weight is a number."""
    scale = stage.fixed.get(GRAD_SCALE, model.held.get(GRAD_SCALE, 1.0))
    common = {MAX_T: max_t, GRAD_SCALE: scale, "pixel_loss_weight": pixel_weight}
    return [predicted(model, {**common, WEIGHT: one}) for one in schedules_across(stage.parameters, stage.fixed, count)]


def _points(domain: Domain) -> Array:
    """Values across a range as it is sampled, ends included; or the choices."""
    return np.asarray(domain.grid(SCAN), dtype=float)


def _landmarks(model: NormModel, max_t: float, limit: float | None) -> Landmarks:
    at_rest = model.predict_gain(0.0, max_t, model.held.get("pixel_loss_weight", 0.0))
    wanted = [*LANDMARKS, *([limit] if limit is not None else [])]
    inert = inert_below(model, max_t, at_rest.pixel_weight)
    gains = {f"{ratio:g}": _gain_or_none(model, ratio, max_t, at_rest.pixel_weight) for ratio in wanted}
    return Landmarks(max_t, at_rest.active_batches, at_rest.cosine, inert, gains)


def _gain_or_none(model: NormModel, ratio: float, max_t: float, pixel_weight: float) -> float | None:
    try:
        return model.gain_for(ratio, max_t, pixel_weight)
    except ValueError:
        return None


def _named(model: NormModel, space: Space, limit: float | None, max_ratio: float | None) -> Iterator[Named]:
    settings: dict[str, dict[str, Any]] = {name: dict(zip(TRIPLE, triple, strict=True)) for name, triple in NOTES.items()}
    for stage in space.stages:
        for index, point in enumerate(stage.point_configs(), 1):
            is_new = not any(all(point.get(key) == other[key] for key in TRIPLE) for other in settings.values())
            if set(TRIPLE) <= set(point) and is_new:
                settings[f"{stage.name} point {index}" if len(space.stages) > 1 else f"point {index}"] = point
    for stage in space.stages:
        gate = max((gate for gate in _values(stage, model, MAX_T) if gate is not None), default=model.max_ts[-1])
        for weight in schedules_across(stage.parameters, stage.fixed, 2):
            settings[schedule_text(weight)] = {WEIGHT: weight, MAX_T: gate, GRAD_SCALE: stage.fixed.get(GRAD_SCALE, 1.0)}
    for name, setting in settings.items():
        prediction = predicted(model, setting)
        yield Named(name, setting, prediction, judgement(model, prediction, limit, max_ratio))


# -- findings


def _findings(model: NormModel, space: Space, scans: list[Scan], limit: float | None) -> Iterator[Check]:
    if model.baseline_ratio_main >= BLIND:
        yield warn(
            "blind",
            f"the baseline itself pushes {model.baseline_ratio_main:.3g}x the main loss: the norm guard compares with that, so a "
            f"setting may push {model.baseline_ratio_main * (limit or BLIND):.3g}x the main loss before it fires",
            "lower the baseline's pixel_loss_weight, or lower guards.norm_ratio.limit accordingly",
        )
    if scans:
        strongest = max(scans, key=lambda scan: np.abs(scan.changes).max())
        change = float(np.abs(strongest.changes).max())
        if change < INERT and not model.has_clamp:
            gain = strongest.gains[np.abs(strongest.changes).argmax()]
            start = _gain_or_none(model, 1.1, strongest.max_t, strongest.pixel_weight)
            yield warn(
                "inert",
                f"the whole space changes total_norm by < {INERT:.1%} (at most {change:.2g}, at gain {gain:.3g} @ "
                f"{strongest.max_t:g}): no setting in it does anything to this model",
                f"a ratio of 1.1 begins at gain {start:.3g} @ {strongest.max_t:g}; search from there, or take "
                "`--space moderate`, whose gain is given by its effect (unit: norm_ratio)"
                if start is not None
                else "",
            )
        weakest = min(scans, key=lambda scan: scan.ratios.min())
        least = float(weakest.ratios.min())
        if limit is not None and least > limit and not model.has_clamp:
            gain = weakest.gains[weakest.ratios.argmin()]
            yield warn(
                "deadly",
                f"the predicted ratio of every setting exceeds the norm guard's limit {limit:g}: the mildest, gain {gain:.3g} @ "
                f"{weakest.max_t:g}, has {least:.3g}x the baseline's total_norm",
                "lower the gain, or use `unit: norm_ratio`",
            )
    yield from _aliases(model, space)
    yield from _clamp(model)
    gates = {gate for stage in space.stages for gate in _values(stage, model, MAX_T) if gate is not None}
    idle = [gate for gate in sorted(gates) if not model.predict_gain(0.0, gate).active_batches]
    if idle:
        yield warn("inactive", f"max_t {_list(idle)}: {model.inactive_words(max(idle))}; nothing is known there")
    between = [stage for stage in space.stages if not isinstance(stage.parameters.get(MAX_T, Choice((1.0,))), Choice)]
    if between or any(not model.is_calibrated(gate) for gate in gates):
        yield warn(
            "interpolated",
            f"{MAX_T} is searched between the calibrated values {_list(model.max_ts)}: numbers in between are interpolated",
        )
    yield from _unreachable(model, space)
    known = {GAIN, *TRIPLE, "pixel_loss_weight", WARM_UP, *HARMLESS}
    others = [name for name in sorted(space.parameter_names) if name not in known and not is_part_of_schedule(name)]
    if others:
        yield warn("other_settings", f"{', '.join(others)} searched too: the numbers are those of the study's own value")


def _aliases(model: NormModel, space: Space) -> Iterator[Check]:
    """Settings that differ only in how their gain is split. With a clamp at the decoder's output the gradient is not proportional
    to the gain, so nothing is called an alias."""
    if model.has_clamp:
        return
    for stage in space.stages:
        if WEIGHT in stage.parameters and GRAD_SCALE in stage.parameters:
            yield warn(
                "aliases",
                f"{WEIGHT} and {GRAD_SCALE} are both searched ({stage.name}): only their product acts, so the search has one "
                "dimension too many",
                "search `gain` and fix ssim_grad_scale",
            )
    groups: dict[str, dict[str, None]] = {}
    for stage in space.stages:
        for point in stage.point_configs():
            if set(TRIPLE) <= set(point):
                rest = sorted((key, value) for key, value in point.items() if key not in (WEIGHT, GRAD_SCALE))
                triple = "({})".format(", ".join(f"{point[key]:g}" for key in TRIPLE))
                groups.setdefault(f"{gain_of(point):.9g} {rest}", {})[triple] = None
    for group in groups.values():
        if len(group) > 1:
            yield warn("aliases", f"points {' and '.join(group)} are one setting: the same gain behind the same gate")


def _clamp(model: NormModel) -> Iterator[Check]:
    if model.has_clamp:
        first = min(model.clamp_gain)
        where = model.max_ts[model.clamp_gain.index(first)]
        yield warn(
            "clamp",
            f"ssim_grad_clamp cuts in from gain {first:.3g} (@ {where:g}) on: there the gradient is no longer proportional to the "
            "gain, the numbers are those without the clamp, and settings of equal gain are not taken for aliases",
        )


def _unreachable(model: NormModel, space: Space) -> Iterator[Check]:
    for stage in space.stages:
        domain = stage.parameters.get(GAIN)
        if domain is None or domain.unit is None:
            continue
        for max_t in _values(stage, model, MAX_T):
            for pixel_weight in _values(stage, model, "pixel_loss_weight"):
                try:
                    if max_t is not None:
                        model.gain_for(float(_points(domain).min()), max_t, pixel_weight or 0.0)
                except ValueError as error:
                    yield warn("unreachable", f"{stage.name}: {error}", "raise the lower end of the range")


def _list(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
