"""Calibration: predicts how hard every setting of a study will push, from a few batches with the update switched off.

`gram` uses the gradients themselves: one backward pass for the main loss, one for the pixel loss and one for each t-bin of
the SSIM loss, whose mean over participating samples is then known for every gate. It needs a task with `forward`.
`readings` needs only `step()`: it reads total_norm at a few gains for each gate and fits N² = A + 2Bg + Cg².
Both end with real training steps at a setting that was not measured, and report the error of the prediction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.before_launch.batch_gradients import gradients_of
from tune_ssim.before_launch.forecast import Forecast, forecast_space
from tune_ssim.before_launch.preflight.report import Check, warn
from tune_ssim.before_launch.readings import Reader, Reading, read_here
from tune_ssim.guards import NormRatio
from tune_ssim.guards.verdict import Action
from tune_ssim.probes.norm_model import MAIN, SSIM, Array, NormModel, fit
from tune_ssim.study.domains import Choice
from tune_ssim.study.space import GAIN, GRAD_SCALE, MAX_T, WARM_UP, WEIGHT, resolve_settings
from tune_ssim.study.study import Study
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.training import IMAGE_LOSS_KEYS, Training, as_training

HELD = ("ssim_loss_max_t", "ssim_grad_scale", "pixel_loss_weight", "pixel_loss_max_t")
GATES = (0.1, 0.2, 0.3, 0.5, 1.0)  # for the picture: those of the notes (000 §5.1), no gate, and one in between
GRAM_BYTES = 4 * 2**30  # memory for gradients; if they need more, readings are taken
CHECK_STEPS = 3  # training steps to check the model with
# Error of the check. Healthy: float32 4e-7 and less, bf16 autocast 6e-4 by gram and 3e-3 by readings. Faulty: a clamp that cuts
# in 1.2, a grad_scale that does not arrive 5.8 (tests/test_calibrate.py).
CHECK_TOLERANCE = 0.03
UNTOUCHED = 1e-5  # relative change of N²: float32 rounding is 1e-6, and at the gains that are read an active batch shows 1e-2


@dataclass(frozen=True)
class TrainingCheck:
    """Real training steps at one setting, compared with the prediction."""

    setting: Mapping[str, float]
    steps: tuple[int, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def relative_error(self) -> float:
        """The largest factor between the two, minus one."""
        pairs = list(zip(self.predicted, self.measured, strict=True))
        if not all(math.isfinite(norm) and norm > 0 for pair in pairs for norm in pair):
            return math.inf
        return max(max(pair) / min(pair) for pair in pairs) - 1


@dataclass(frozen=True)
class Outliers:
    """Outliers of the gradient that one loss sends into the decoder's output, at weight 1 and per sample: a few pixels may
    dominate the direction while every norm looks harmless (note 001). Medians over batches."""

    rms: float
    peak_over_rms: float
    top_share: float  # of the squared norm, in the largest 1 % of the elements


@dataclass(frozen=True)
class Calibration:
    model: NormModel
    forecast: Forecast
    check: TrainingCheck
    gradient_at_decoder: Mapping[str, Outliers] | None  # `ssim`, `pixel`; None if the task has no `forward`
    dropped: tuple[int, ...] = ()  # batches with a non-finite norm
    why: str = ""  # reason for the method
    wall_s: float = 0.0
    share_of_study: float = 0.0  # of the search's training time
    findings: tuple[Check, ...] = ()  # of the forecast, and `inexact`, `clipped`

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys: the fields above (`check` with its `relative_error`), of the forecast

        - `limit`, `skip_above`, `shares`, `ratios` (of the space, smallest and largest), `baseline_ratio_main`
        - `by_max_t`: `Landmarks` of every gate; `settings`: `Named`, each with its `prediction`

        and `model`, which `NormModel.from_dict` reads again. Non-finite numbers are left to `study_folder.jsonable`."""
        forecasts = self.forecast.to_dict()
        return {
            "method": self.model.method,
            "why": self.why,
            "findings": [{"name": f.name, "sentence": f.sentence, "remedy": f.remedy} for f in self.findings],
            "limit": forecasts["limit"],
            "skip_above": forecasts["max_ratio"],  # the key of the first version
            "shares": forecasts["shares"],
            "ratios": list(self.forecast.widest),
            "baseline_ratio_main": self.model.baseline_ratio_main,
            "by_max_t": forecasts["landmarks"],
            "settings": forecasts["settings"],
            "gradient_at_decoder": self.gradient_at_decoder and {name: asdict(o) for name, o in self.gradient_at_decoder.items()},
            "check": {**asdict(self.check), "relative_error": self.check.relative_error},
            "dropped_batches": list(self.dropped),
            "wall_s": self.wall_s,
            "share_of_study": self.share_of_study,
            "model": self.model.to_dict(),
        }


def calibrate(study: Study, *, device: str | None = None, reader: Reader | None = None) -> Calibration:
    """Measures and forecasts. reader: takes the readings of a training that runs in other processes.

    Raises BadSetup if nothing can be predicted: gradients are zero or non-finite, or the loss is active in no batch. Raises
    UserError for a task that cannot be measured."""
    if study.calibration is None:
        raise UserError("calibration: null in the study switches it off")
    if not study.has_ssim:
        raise UserError(
            f"calibration: neither task_config nor the space {study.space.name!r} has an SSIM loss whose push could vary"
        )
    started = time.perf_counter()
    probe = _Probe(study, device, reader)
    measured = probe.gram() if probe.why_not_gram is None else probe.readings()
    model = _model(probe, measured)
    check = probe.check(model)
    findings = _own_findings(check)
    if findings and study.space.is_relative:
        raise BadSetup(f"calibration: the space {study.space.name!r} gives its gain as a norm ratio, but {findings[0].sentence}")
    limit, max_ratio = _limits(study, probe, findings)
    prospects = forecast_space(model, study.space, limit, max_ratio)
    wall_s = time.perf_counter() - started
    training_s = probe.step_s * (study.steps or 0) * (study.search.trials + study.baseline_seeds)
    return Calibration(
        model=model,
        forecast=prospects,
        check=check,
        gradient_at_decoder=measured.outliers,
        dropped=tuple(sorted(set(probe.batches) - set(model.batches))),
        why=probe.why_not_gram or "the task shows its forward pass",
        wall_s=wall_s,
        share_of_study=wall_s / training_s if training_s else 0.0,
        findings=(*findings, *prospects.findings),
    )


def gates_of(study: Study, for_picture: bool) -> tuple[float, ...]:
    """The max_t to calibrate: the study's own grid, otherwise every value of the space (for a range, its ends and the middle), and
    with `for_picture` also those of GATES."""
    assert study.calibration is not None
    if study.calibration.grid is not None:
        return tuple(sorted(study.calibration.grid))
    found: set[float] = set(GATES) if for_picture else set()
    for stage in study.space.stages:
        domain = stage.parameters.get(MAX_T)
        if domain is not None:
            values = [float(value) for value in domain.listed if value > 0]
            # The model is interpolated in log max_t, so the middle of a range is the geometric one.
            middle = set() if isinstance(domain, Choice) or len(values) < 2 else {math.sqrt(values[0] * values[1])}
            found |= {*values, *middle}
        elif MAX_T in stage.fixed:
            found.add(stage.fixed[MAX_T])
        found |= {point[MAX_T] for point in stage.points if MAX_T in point}
    return tuple(sorted(found))


@dataclass
class Measured:
    """q `[max_t, batch, 3, 3]`, active `[max_t, batch]`, baseline `[batch]`; peaks `[max_t]`, the largest element of the SSIM
    gradient at the decoder's output for a gain of 1."""

    max_ts: tuple[float, ...]
    q: Array
    active: Any
    baseline: Array
    peaks: Array | None = None
    outliers: Mapping[str, Outliers] | None = None


@dataclass(frozen=True)
class _FirstGain:
    """A reading at a gain that changes the norm visibly. active: `[batch]`. has_effect: False if no gain does."""

    gain: float
    reading: Reading
    active: Any
    has_effect: bool


class _Probe:
    """Sets up the study's task repeatedly, with its update switched off."""

    def __init__(self, study: Study, device: str | None, reader: Reader | None) -> None:
        assert study.calibration is not None
        self.study, self.device, self.options = study, device, study.calibration
        self.task_class = load_task(study.task_path, study.import_path)
        self.batches = tuple(range(1, self.options.batches + 1))
        baseline = study.baseline_settings
        others = {key: value for key, value in baseline.items() if not key.startswith(IMAGE_LOSS_KEYS)}
        # A trial as the search would launch it, except for the auxiliary loss, which each reading sets.
        fixed = resolve_settings(study.space.stages[0].fixed)
        self.base = {**study.task_config, **others, **fixed, **self.options.disable_update}
        if WARM_UP in self.base:
            self.base[WARM_UP] = 0.0  # what is predicted is the full weight
        self.baseline_config = {**study.task_config, **baseline, **self.options.disable_update}
        self.step_s = 0.0
        self.reader = reader or partial(read_here, self.set_up, self.options.disable_update)
        named = {name for stage in study.space.stages for name in (*stage.parameters, *stage.fixed)} | set(self.base)
        gate = {MAX_T: 1.0} if MAX_T in named and MAX_T not in self.base else {}
        self.task: Training | None = self.set_up({**self.base, **gate, WEIGHT: 1.0})
        self.effective = dict(self.task.effective())
        self.known = named | set(self.effective) | ({GRAD_SCALE} if GAIN in named else set())  # other settings it may refuse
        self.held = {name: float(self.effective[name]) for name in HELD if self.effective.get(name) is not None}
        self.why_not_gram = self._why_not_gram(self.task)
        self.max_ts = gates_of(study, for_picture=self.why_not_gram is None) or (self.held.get(MAX_T, 1.0),)
        if self.why_not_gram is not None:
            self.task = None  # one at a time in memory

    def set_up(self, config: Mapping[str, Any]) -> Training:
        task = as_training(self.task_class())
        try:
            task.setup(config, self.study.search.seed, self.device)
        except ValueError as error:
            off = ", ".join(f"{name}: {value}" for name, value in self.options.disable_update.items())
            # A gain in units of the norm ratio needs the calibration.
            other = "" if self.study.space.is_relative else ", or leave the calibration out with `calibration: null`"
            raise UserError(
                f"calibration: the task refuses to be set up ({error}); say in calibration.disable_update (now {{{off}}}) "
                f"how its update is switched off{other}"
            ) from None
        return task

    def _why_not_gram(self, task: Training) -> str | None:
        """The reason to take readings of total_norm; None if the gradients are available."""
        if self.options.method == "first_step" and not isinstance(task, CommandTask):
            raise UserError("calibration.method: first_step is for commands; a task in Python is read with its update switched off")
        if self.options.method in ("readings", "first_step"):
            return "calibration.method says so"
        reason = _no_gram(task, len(GATES) + 2)
        if self.options.method == "gram" and reason is not None:
            raise UserError(f"calibration.method: gram: {reason}")
        return reason

    # -- readings of total_norm

    def read(self, config: Mapping[str, Any], steps: int | None = None) -> Reading:
        return self.read_all([config], steps)[0]

    def read_all(self, configs: Sequence[Mapping[str, Any]], steps: int | None = None) -> list[Reading]:
        """Readings of the first steps at each configuration."""
        found = self.reader(configs, steps or len(self.batches))
        self.step_s = found[-1].step_s
        if found[-1].max_grad_norm is not None:
            self.effective["max_grad_norm"] = found[-1].max_grad_norm
        return found

    def at(self, gain: float, max_t: float, pixel_weight: float = 0.0, grad_scale: float | None = None) -> dict[str, Any]:
        """A configuration, without settings that the task does not have."""
        scale = grad_scale or self.held.get(GRAD_SCALE, 1.0) or 1.0
        setting = {MAX_T: max_t, GRAD_SCALE: scale, "pixel_loss_weight": pixel_weight}
        return {**self.base, WEIGHT: gain / scale, **{name: value for name, value in setting.items() if name in self.known}}

    def readings(self) -> Measured:
        """One reading without auxiliary loss, two for each gate, and one more for each if the pixel loss takes part. Readings that
        do not depend on others are requested together, since a reader may take them side by side."""
        widest, narrower = self.max_ts[-1], self.max_ts[:-1]
        pixel_weights = _pixel_weights(self.study, self.held)
        fixed = [self.baseline_config, self.at(0.0, widest), *(self.at(0.0, widest, weight) for weight in pixel_weights)]
        baseline, alone, *with_pixel = (reading.norms for reading in self.read_all(fixed))
        self._require_gradient(alone)
        # From the widest gate, where most batches are active; its gain is where the search for the others' begins.
        found = {widest: self._first_gain(widest, alone, _usual_gain(self.study))}
        start = found[widest].gain
        first = dict(zip(narrower, self.read_all([self.at(start, max_t) for max_t in narrower]), strict=True)) if narrower else {}
        found |= {max_t: self._first_gain(max_t, alone, start, first[max_t]) for max_t in narrower}
        second = [(max_t, (0.0, 4 * one.gain)) for max_t, one in found.items() if one.has_effect]
        second += [(max_t, (weight, one.gain)) for max_t, one in found.items() if one.has_effect for weight in pixel_weights[:1]]
        readings = self.read_all([self.at(gain, max_t, weight) for max_t, (weight, gain) in second]) if second else []
        q = []
        for max_t in self.max_ts:
            one = found[max_t]
            if not one.has_effect:
                q.append(_without_ssim(alone))
                continue
            taken = {(0.0, 0.0): alone, **{(w, 0.0): norms for w, norms in zip(pixel_weights, with_pixel, strict=True)}}
            taken[0.0, one.gain] = one.reading.norms
            taken |= {setting: reading.norms for (own, setting), reading in zip(second, readings, strict=True) if own == max_t}
            q.append(fit(list(taken), np.stack(list(taken.values()))))
        active = np.stack([found[max_t].active for max_t in self.max_ts])
        return Measured(self.max_ts, np.stack(q), active, baseline)

    def _first_gain(self, max_t: float, alone: Array, gain: float, reading: Reading | None = None) -> _FirstGain:
        """A reading at a gain that about doubles N², searched upwards from `gain`, where `reading` may have been taken. Without
        effect if no gain up to 1e12 has one.

        A batch is active according to its reported fraction. If none is reported, or only that of one process, the norm decides,
        so that all processes agree."""
        while True:
            reading = reading or self.read(self.at(gain, max_t))
            with np.errstate(invalid="ignore", divide="ignore"):
                added = np.nan_to_num(np.abs(reading.norms**2 / alone**2 - 1), nan=math.inf)
            by_norm = _spread() or bool(np.isnan(reading.active_fraction).any())
            active = added > UNTOUCHED if by_norm else reading.active_fraction > 0
            typical = float(np.median(added[active])) if active.any() else 0.0
            if 1e-2 <= typical <= 1e4:
                return _FirstGain(gain, reading, active, True)
            if not active.any() and not by_norm:
                return _FirstGain(1.0, reading, active, False)
            gain = gain / 100 if typical > 1e4 else gain * min(1e3, math.sqrt(1 / max(typical, 1e-7)))
            if not 1e-12 < gain < 1e12:
                return _FirstGain(1.0, reading, active, False)
            reading = None

    # -- gram: from the gradients

    def gram(self) -> Measured:
        task: Any = self.task
        parameters = [p for p in task.trainable_parameters() if p.requires_grad]
        gradients = [gradients_of(task.forward(n), parameters, self.max_ts) for n in self.batches]
        self.task = task = None
        outliers = {
            name: Outliers(*(float(np.median(column)) for column in zip(*found, strict=True)))
            for name in ("ssim", "pixel")
            if (found := [one.outliers[name] for one in gradients if name in one.outliers])
        }
        q = np.stack([one.q for one in gradients], axis=1)
        return Measured(
            self.max_ts,
            q,
            np.stack([one.active for one in gradients], axis=1),
            self.read(self.baseline_config).norms,
            np.max([one.peaks for one in gradients], axis=0),
            outliers,
        )

    # -- check of the prediction

    def check(self, model: NormModel) -> TrainingCheck:
        """A few training steps with the gain split differently from the measurement. This reveals a dropped parameter, a clamp,
        or an update that is not switched off."""
        widest = next(max_t for i, max_t in reversed(list(enumerate(model.max_ts))) if model.active[i].any())
        i = model.max_ts.index(widest)
        gain = float(np.median(np.sqrt(model.q[i, model.active[i], MAIN, MAIN] / model.q[i, model.active[i], SSIM, SSIM])))
        scale = 0.1 if self.held.get(GRAD_SCALE, 1.0) != 0.1 else 1.0
        if GRAD_SCALE not in self.known:
            scale, gain = 1.0, 3 * gain
        positions = [k for k in range(len(model.batches)) if model.active[i, k]][:CHECK_STEPS]
        last = model.batches[positions[-1]]
        norms = self.read(self.at(gain, widest, grad_scale=scale), steps=last).norms
        v = np.array([1.0, gain])
        predicted = [float(np.sqrt(v @ model.q[i, k][np.ix_([MAIN, SSIM], [MAIN, SSIM])] @ v)) for k in positions]
        steps = tuple(model.batches[k] for k in positions)
        setting = {WEIGHT: gain / scale, MAX_T: widest, GRAD_SCALE: scale}
        return TrainingCheck(setting, steps, tuple(predicted), tuple(float(norms[n - 1]) for n in steps))

    def _require_gradient(self, norms: Array) -> None:
        if not np.isfinite(norms).any():
            raise BadSetup(f"calibration: total_norm of the main loss is not finite on any of {len(norms)} batches")
        if not (norms[np.isfinite(norms)] > 0).any():
            raise BadSetup("calibration: the main loss sends no gradient to the trainable parameters")


def _model(probe: _Probe, measured: Measured) -> NormModel:
    """Keeps batches with finite numbers only. Raises BadSetup if too few are left for a prediction."""
    main = np.sqrt(measured.q[0, :, MAIN, MAIN])
    probe._require_gradient(main)
    entries = measured.q[:, :, [MAIN, MAIN, SSIM], [MAIN, SSIM, SSIM]]
    usable = np.isfinite(entries).all(axis=(0, 2)) & np.isfinite(measured.baseline)
    count = len(probe.batches)
    if not usable.any():
        raise BadSetup(f"calibration: on each of {count} batches the baseline's total_norm or the SSIM gradient is not finite")
    if not (measured.baseline[usable] > 0).any():
        raise BadSetup("calibration: the baseline's gradient is zero: nothing can be compared with it")
    active = measured.active & usable
    if not active.any():
        raise BadSetup(
            f"calibration: no sample of {count} batches has 0 < t <= {measured.max_ts[-1]:g}: the SSIM loss never acts; raise "
            "calibration.batches, the batch size or ssim_loss_max_t"
        )
    if not (measured.q[active][:, SSIM, SSIM] > 0).any():
        raise BadSetup("calibration: the SSIM loss sends no gradient to the trainable parameters; is its path to them detached?")
    clamp_gain: tuple[float, ...] = ()
    if (clamp := probe.effective.get("ssim_grad_clamp")) is not None:
        # Without a measured peak the clamp may act at any gain.
        peaks = measured.peaks if measured.peaks is not None else np.full(len(measured.max_ts), math.inf)
        clamp_gain = tuple(float(clamp) / float(peak) if peak > 0 else math.inf for peak in peaks)
    return NormModel(
        max_ts=measured.max_ts,
        q=measured.q[:, usable],
        active=active[:, usable],
        baseline=measured.baseline[usable],
        batches=tuple(n for n, ok in zip(probe.batches, usable, strict=True) if ok),
        method="gram" if probe.why_not_gram is None else "readings",
        held=probe.held,
        clamp_gain=clamp_gain,
    )


def _own_findings(check: TrainingCheck) -> list[Check]:
    if check.relative_error <= CHECK_TOLERANCE:
        return []
    where = ", ".join(f"{name}={value:.4g}" for name, value in check.setting.items())
    sentence = f"training steps at {where} have a total_norm {check.relative_error:.2%} away from the prediction: it does not hold"
    remedy = "look for a clamp, a parameter that does not arrive, or randomness that does not come from (seed, step)"
    return [warn("inexact", sentence, remedy)]


def _limits(study: Study, probe: _Probe, findings: list[Check]) -> tuple[float | None, float | None]:
    """The norm guard's limit, and the ratio above which settings are not launched: None if the prediction does not hold, and None
    under clipping, where a high norm is no evidence of harm (FACTS §2)."""
    guard = study.guards.get("norm_ratio")
    if not isinstance(guard, NormRatio):
        return None, None
    factor = study.search.skip_beyond
    if factor is None or findings:
        return guard.limit, None
    if replace(guard, clipped=probe.effective.get("max_grad_norm") is not None).action is not Action.PRUNE:
        sentence = "a norm above the limit ends no trial here (gradient clipping, or on_excess): nothing is skipped for it"
        findings.append(warn("clipped", sentence))
        return guard.limit, None
    return guard.limit, factor * guard.limit


# -- the task


def _no_gram(task: Any, gradients: int) -> str | None:
    if not task.abilities().has("forward", "trainable_parameters"):
        return "the task has no forward() and trainable_parameters()"
    if _spread():
        return "the gradient is spread over several processes"
    size = sum(p.numel() * p.element_size() for p in task.trainable_parameters() if p.requires_grad)
    if size * gradients > GRAM_BYTES:
        return f"{gradients} gradients of {size / 2**30:.1f} GiB do not fit in {GRAM_BYTES / 2**30:g} GiB"
    return None


def _spread() -> bool:
    """Whether the training has several processes."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _without_ssim(main_norms: Array) -> Array:
    q = np.full((len(main_norms), 3, 3), np.nan)
    q[:, MAIN, MAIN], q[:, MAIN, SSIM], q[:, SSIM, MAIN], q[:, SSIM, SSIM] = main_norms**2, 0, 0, 0
    return q


def _usual_gain(study: Study) -> float:
    """The middle of the gains that the study searches, to begin with; 1 if it gives none as numbers."""
    for stage in study.space.stages:
        domain = stage.parameters.get(GAIN) or stage.parameters.get(WEIGHT)
        if domain is not None and domain.unit is None:
            values = [float(value) for value in domain.listed if value > 0]
            return math.exp(sum(map(math.log, values)) / len(values)) if values else 1.0
    return 1.0


def _pixel_weights(study: Study, held: Mapping[str, float]) -> list[float]:
    """Two weights to read at if trials have a pixel loss, otherwise none."""
    found = {held.get("pixel_loss_weight", 0.0)}
    for stage in study.space.stages:
        domain = stage.parameters.get("pixel_loss_weight")
        if domain is not None:
            found |= set(map(float, domain.upper_values))
        found.add(float(stage.fixed.get("pixel_loss_weight", 0.0)))
    largest = max(found)
    return [largest, 2 * largest] if largest > 0 else []
