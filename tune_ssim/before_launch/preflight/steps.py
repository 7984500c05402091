"""Checks of training steps: compares their gradients, with the update switched off, with those of their forward pass.

A parameter is judged by its effect: when the setting changes, total_norm must follow. The gain of the base setting is so large that
SSIM dominates the gradient. It would ruin a training, but nothing is updated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from tune_ssim.before_launch.preflight import step_rules
from tune_ssim.before_launch.preflight.optimizers import observed_updates
from tune_ssim.before_launch.preflight.plain import (
    Expected,
    Setting,
    cosine,
    expected,
    norm,
    own_gradient_norms,
    setting_of,
    ssim_gradient,
    weight_at,
)
from tune_ssim.before_launch.preflight.report import SEVERITY, Check, unknown
from tune_ssim.before_launch.preflight.subject import Subject, Unavailable, call, numbers
from tune_ssim.records import ACTIVE_FRACTION, LOSS, LOSS_FLOW, LOSS_SSIM, STEP_SKIPPED, TOTAL_NORM
from tune_ssim.study.space import GRAD_CLAMP, GRAD_SCALE, WARM_UP, WEIGHT
from tune_ssim.trials.training import Forward, same_setting

DOMINANCE = 30.0  # auxiliary gradient of a reading over the main one: changes are visible, and float32 is still precise enough
MAX_SKIPPED = 25  # steps that a GradScaler may skip before its scale fits: 65536 = 2^16, and DOMINANCE below that
SAME_LOSS = 1e-4  # relative difference of a loss that only rounding explains
MAX_SHIFT = 8  # pixels by which targets may be moved
SSIM_NUDGE = 2e-4  # of decoded images in [-1, 1], a fortieth of a grey level
NUDGE = 1e-3  # of the weights' mean magnitude; a gradient in half precision turns by its rounding noise
TINY = 1e-7  # a weight whose gradient is lost in float32's rounding of any main gradient
# Of `check_parameters`: up to ten readings, each a step and its gradient once more, after one forward pass with three gradients.
WORK = {"setup": 11, "step": 23}
MAIN_ALONE, LARGE = "the main loss alone", "a large ssim_loss_weight"  # names of readings
HUGE = 1e4  # with a data range of 255 SSIM has 0.0004x its gradient
BLACK_BOX_GAINS = (1e2, 1e4, 1e6)  # tried in turn on a task without a forward pass, until total_norm follows
LOSSES = {"ssim": ("ssim_loss_weight", "ssim_loss_max_t"), "pixel": ("pixel_loss_weight", "pixel_loss_max_t")}
NEUTRAL: dict[str, float | None] = asdict(Setting())


Gradients = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Reading:
    """One step without an update: its record, and the expected record (None without a forward pass)."""

    settings: Mapping[str, Any]
    effective: Mapping[str, Any]
    metrics: Mapping[str, float]
    n: int  # number of the step
    moved: bool  # whether the weights changed although the update is off
    after: float | None  # norm of the gradients that the optimiser saw; None if they are gone
    cosine: float | None  # cosine of those gradients to the expected ones
    expected: Expected | None
    random: bool = False  # whether forward(n) differs each time, so no value can be expected
    gate: float | None = None  # max_t that explains a reading not explained by its setting
    turns: float | None = None  # how much faster than expected the gradient turns when the weights change a little
    explanation: str = ""  # what else than its own targets the SSIM loss compares with

    @property
    def total_norm(self) -> float:
        return self.metrics[TOTAL_NORM]

    @property
    def main_loss(self) -> float | None:
        """The main loss of step 1, from the forward pass, else as recorded; None if it is not known."""
        if self.n > 1:
            return None
        if self.expected is not None:
            return self.expected.loss_main
        is_alone = self.settings.get("ssim_loss_weight", 0.0) <= TINY
        found = self.metrics.get(LOSS_FLOW, self.metrics.get(LOSS) if is_alone else None)
        return found if found and math.isfinite(found) else None

    @property
    def agreement(self) -> float:
        """total_norm over its expected value."""
        assert self.expected is not None
        return self.total_norm / self.expected.total_norm if self.expected.total_norm else math.inf


def read(subject: Subject, settings: Mapping[str, Any]) -> Reading:
    """The first step that is not skipped, under `settings`."""
    task = subject.unmoved(settings)
    parameters = list(call(task, "trainable_parameters")) if task.abilities().trainable_parameters else []
    before = [parameter.detach().clone() for parameter in parameters]
    n = 0
    while True:
        n += 1
        with observed_updates(parameters) as updates:
            metrics = numbers(seeded(task, "step"))
        if not metrics.get(STEP_SKIPPED) or n == MAX_SKIPPED:
            break
    if TOTAL_NORM not in metrics:
        raise Unavailable(f"step() records no {TOTAL_NORM}")
    moved = any(not torch.equal(old, new.detach()) for old, new in zip(before, parameters, strict=True))
    if moved:  # by an update that is not switched off, or a non-finite gradient: 0 x NaN is NaN
        with torch.no_grad():
            for old, new in zip(before, parameters, strict=True):
                new.copy_(old)
    gradients = [parameter.grad for parameter in parameters]
    are_there = any(gradient is not None for gradient in gradients)
    if are_there and updates.gradients is not None:
        gradients = updates.gradients  # an optimiser may change them
    reading = Reading(
        settings=settings,
        effective=dict(call(task, "effective")),
        metrics=metrics,
        n=n,
        moved=moved,
        after=norm(gradients) if are_there else None,
        cosine=None,
        expected=None,
    )
    if not (parameters and task.abilities().forward):
        return reading
    forward, setting = seeded(task, "forward", n), setting_of({**subject.config, **settings})
    warmup = {**subject.config, **settings}.get(WARM_UP) or 0.0
    weight = weight_at(setting.ssim_loss_weight, n, warmup, forward, setting, parameters)
    setting = replace(setting, ssim_loss_weight=weight)
    found = expected(forward, setting, parameters)
    reading = replace(reading, expected=_numbers_of(found), cosine=cosine(gradients, found.gradients) if are_there else None)
    if not step_rules.near(reading.agreement) or (reading.cosine is not None and not reading.cosine >= step_rules.MIN_STEP_COSINE):
        with torch.no_grad():
            again = seeded(task, "forward", n, seed=1).main.item()
        if not step_rules.near(again / found.loss_main):
            return replace(reading, random=True)
        reading = _with_micro_batches(reading, forward, setting, parameters, gradients if are_there else None)
        if not step_rules.near(reading.agreement):
            reading = _with_gate(reading, forward, setting, parameters, gradients if are_there else None)
        if are_there and reading.gate is None and setting.ssim_loss_weight > TINY:
            nudged = _nudged_gradients(subject, settings, n, setting)
            turns = [cosine(a, b) for a, b in zip((gradients, found.gradients), nudged, strict=True)]
            explanation = _explanation(forward, setting, parameters, gradients, reading)
            reading = replace(reading, turns=step_rules.instability(*turns), explanation=explanation)
    return reading


def _explanation(forward: Forward, setting: Setting, parameters: Sequence[Any], gradients: Gradients, reading: Reading) -> str:
    """The wrong targets that the gradient fits, in words; empty if none does. Tried are those that fit the recorded loss."""
    assert reading.expected is not None
    recorded, own = reading.metrics.get(LOSS_SSIM), reading.expected.loss_ssim
    if recorded is None or own is None or abs(recorded / own - 1) < SAME_LOSS:
        return ""
    rows, columns = forward.targets.ndim - 2, forward.targets.ndim - 1
    images = forward.compared_images()
    wrong = {"targets of other samples": images.roll(1, 0), "mirrored targets": images.flip(columns)}
    for pixels in (*range(-MAX_SHIFT, 0), *range(1, MAX_SHIFT + 1)):
        for axis, direction in ((rows, "down"), (columns, "right")):
            wrong[f"targets moved {pixels} pixels {direction}"] = images.roll(pixels, axis)
    for words, targets in wrong.items():
        found = expected(replace(forward, targets=targets, clean=None), setting, parameters)
        is_near = found.loss_ssim and step_rules.near(recorded / found.loss_ssim)
        if is_near and cosine(gradients, found.gradients) >= step_rules.MIN_STEP_COSINE:
            return words
    return ""


def _nudged_gradients(subject: Subject, settings: Mapping[str, Any], n: int, setting: Setting) -> tuple[Gradients, Gradients]:
    """The gradient of step `n` and the expected one, with weights that differ a little."""
    task = subject.unmoved(settings)
    parameters = list(call(task, "trainable_parameters"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(NUDGE * parameter.abs().mean() * noise)
    for _ in range(n):
        seeded(task, "step")
    return [p.grad for p in parameters], expected(seeded(task, "forward", n), setting, parameters).gradients


def seeded(task: Any, method: str, *arguments: Any, seed: int = 0) -> Any:
    """Dropout in the trained network draws from the global generators: the same in a step and in its forward pass."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        return call(task, method, *arguments)


def _with_micro_batches(
    reading: Reading, forward: Forward, setting: Setting, parameters: Sequence[Any], gradients: Gradients | None
) -> Reading:
    """The reading with the number of accumulated micro-batches that explains it, if there is one: each divides its image losses by
    its own active images. Micro-batches of one are left out: a loss that is divided by the whole batch looks the same."""
    batch, whole = len(forward.t), list(range(len(forward.t)))
    for count in (n for n in range(2, batch // 2 + 1) if batch % n == 0):
        size = batch // count
        parts = [expected(_rows(forward, whole[i : i + size]), setting, parameters) for i in range(0, batch, size)]
        # The main loss of a batch is in each part, so that it is in their mean once.
        mean = [None if rows[0] is None else sum(rows) / count for rows in zip(*(part.gradients for part in parts), strict=True)]
        found = replace(expected(forward, setting, parameters), gradients=mean, total_norm=norm(mean))
        alike = cosine(gradients, mean) if gradients is not None else 1.0
        if step_rules.near(reading.total_norm / found.total_norm) and alike >= step_rules.MIN_STEP_COSINE:
            return replace(reading, expected=_numbers_of(found), cosine=alike)
    return reading


def _rows(forward: Forward, rows: list[int]) -> Forward:
    """The forward pass of these samples, with the main loss of all."""
    return replace(
        forward,
        z0=forward.z0[rows],
        t=forward.t[rows],
        targets=forward.targets[rows],
        is_target=None if forward.is_target is None else forward.is_target[rows],
        sizes=None if forward.sizes is None else [forward.sizes[row] for row in rows],
        clean=None if forward.clean is None else forward.clean[rows],
    )


def _with_gate(
    reading: Reading, forward: Forward, setting: Setting, parameters: Sequence[Any], gradients: Gradients | None
) -> Reading:
    """The reading with the max_t that explains it, if there is one. The loss then acts, but with another gate than requested."""
    times = sorted({t for t in forward.t.tolist() if t > 0})
    for weight, gate in LOSSES.values():
        if not getattr(setting, weight):
            continue
        for below, t in enumerate(times):
            found = expected(forward, replace(setting, **{gate: t}), parameters)
            alike = cosine(gradients, found.gradients) if gradients is not None else 1.0
            if step_rules.near(reading.total_norm / found.total_norm) and alike >= step_rules.MIN_STEP_COSINE:
                middle = (t + times[below + 1]) / 2 if below + 1 < len(times) else t
                return replace(reading, expected=_numbers_of(found), cosine=alike, gate=middle)
    return reading


def _numbers_of(found: Expected) -> Expected:
    """`found` without its gradients, since many readings are kept and each would be as large as the model."""
    return replace(found, gradients=())


def check_ssim(task: Any) -> Iterator[Check]:
    """Checks the loss object alone, on the step's decoded images and on flat bright patches, where half precision cancels."""
    with torch.no_grad():
        forward: Forward = call(task, "forward", 1)
        decoded = forward.decode(forward.z0).float()
    loss = replace(forward.loss.ssim_alone(), target="raw")
    bright = torch.full((2, *forward.targets.shape[1:]), 0.98)
    noisy = bright + 0.001 * torch.randn(bright.shape, generator=torch.Generator().manual_seed(0))
    flat = 2 * noisy - 1 if loss.image_range == "[-1,1]" else noisy
    cases = {
        "the decoded images of step 1": (decoded, forward.compared_images(), forward.sizes),
        "flat bright patches": (flat.to(decoded.device), bright.to(decoded.device), None),
    }
    checks = []
    for where, (images, targets, sizes) in cases.items():
        nudge = SSIM_NUDGE * torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).to(images)
        mine = [_loss_gradient(loss, x, targets, sizes) for x in (images, images + nudge)]
        theirs = [ssim_gradient(x, targets, loss.image_range, sizes) for x in (images, images + nudge)]
        if mine[0] is None or mine[1] is None:
            yield step_rules.parameter("ssim_loss_max_t", 1.0, 1.0, 0.0, "a sample at t = 0.5 takes no part")
            return
        value, reference = theirs[0]
        size = norm([reference])
        checks.append(
            step_rules.ssim_precision(
                where,
                cosine=cosine([mine[0][1]], [reference]),
                factor=norm([mine[0][1]]) / size if size else math.inf,
                error=mine[0][0] - min(max(value, 0.0), 1.0),
                peak=(reference.abs().max() * reference.numel() ** 0.5).item() / size if size else math.nan,
                turns=step_rules.instability(*(cosine([a[1]], [b[1]]) for a, b in (mine, theirs))),  # type: ignore[index]
            )
        )
    yield max(checks, key=lambda check: SEVERITY.index(check.status))


def _loss_gradient(loss: Any, images: torch.Tensor, targets: torch.Tensor, sizes: Any) -> tuple[float, torch.Tensor] | None:
    """The SSIM loss of decoded images, and its gradient there; None if no sample takes part."""
    leaf = images.clone().requires_grad_()
    result = loss(leaf, torch.full((len(leaf),), 0.5), targets, lambda x: x, sizes=sizes)
    if result.loss_ssim is None:
        return None
    (gradient,) = torch.autograd.grad(result.total, leaf)
    return result.loss_ssim.item(), gradient


def check_parameters(probe: Probe) -> Iterator[Check]:
    """Checks every auxiliary parameter by its effect, the other settings by `effective()`."""
    main = probe.read(MAIN_ALONE)
    if main.total_norm == 0:
        raise Unavailable(f"the main loss has no gradient in step {main.n}")
    yield from _switched_off(main, probe.subject)
    if main.expected is not None:
        yield step_rules.step_gradient("main", main.total_norm, main.expected.total_norm, main.cosine, random=main.random)
    yield from _loss(probe, "ssim", main)
    if probe.weights is not None:
        yield from _loss(probe, "pixel", main)
    else:
        probe.read("a tiny ssim_loss_weight", ssim_loss_weight=TINY)
    yield from _changing_weights(probe)
    yield from _others(probe)
    yield _batches(probe)


class Probe:
    """Takes readings, each named by what is special about its setting. settings: those that may be launched."""

    def __init__(self, subject: Subject, base: Mapping[str, Any], settings: Sequence[Mapping[str, Any]] = ()) -> None:
        self.subject, self.base = subject, {**base, **({WARM_UP: 0.0} if subject.config.get(WARM_UP) else {})}
        self.launched = [subject.config, base, *settings]
        task = subject.unmoved(base)
        effective = call(task, "effective")
        self.known = {name for name in NEUTRAL if name in effective}
        if "ssim_loss_weight" not in self.known:
            raise Unavailable("effective() does not name ssim_loss_weight")
        self.readings: dict[str, Reading] = {}
        self.times: list[float] = []
        self.cut = ""  # where the image losses are cut off from the network, in words
        self.weights: dict[str, float] | None = None  # weights at which each auxiliary gradient is DOMINANCE times the main one
        if task.abilities().has("forward", "trainable_parameters"):
            forward: Forward = call(task, "forward", 1)
            self.times = forward.t.tolist()
            main, *own = own_gradient_norms(forward, list(call(task, "trainable_parameters")))
            if not forward.z0.requires_grad:
                self.cut = "; the prediction z0 is detached from the network"
            elif not any(own):
                self.cut = "; decode() cuts the graph, as under no_grad"
            self.weights = {loss: DOMINANCE * main / size if size else 1.0 for loss, size in zip(LOSSES, own, strict=True)}

    def is_launched(self, name: str) -> bool:
        """Whether a setting that may be launched has it."""
        return any(setting.get(name) for setting in self.launched)

    def read(self, what: str, **changes: Any) -> Reading:
        chosen = {name: value for name, value in {**NEUTRAL, **changes}.items() if name in self.known or name == WARM_UP}
        self.readings[what] = read(self.subject, {**self.base, **chosen})
        return self.readings[what]


def _switched_off(main: Reading, subject: Subject) -> Iterator[Check]:
    if main.moved:
        names = ", ".join(f"{name} = {value!r}" for name, value in subject.disable_update.items())
        name = next(iter(subject.disable_update))
        sentence = f"a step changes the weights although {names}: {name} does not reach the optimiser"
        yield Check(f"parameter/{name}", "bad_setup", sentence, {}, f"follow {name} from the configuration to the optimiser")


def _loss(probe: Probe, loss: str, main: Reading) -> Iterator[Check]:
    """Checks that one auxiliary loss acts, with the gradient of its forward pass, and so does each of its parameters."""
    weight_name, gate_name = LOSSES[loss]
    if weight_name not in probe.known:
        return
    full = _strong(probe, loss, main)
    weight = full.settings[weight_name]
    if full.metrics.get(ACTIVE_FRACTION) == 0 and gate_name not in probe.known:
        yield unknown(f"parameter/{weight_name}", f"no sample of step {full.n} is active, and {gate_name} cannot be set")
        return
    if _batches(probe).status == "bad_setup":
        return  # nothing can be compared; `check_parameters` reports it at the end
    if loss == "ssim":
        clipping = _clipping(full)
        yield clipping
        if clipping.status == "bad_setup" and full.after is not None and full.total_norm < 1.01 * full.after:
            return  # total_norm says nothing about the gradient
    if step_rules.near(full.total_norm / main.total_norm):
        if (tiny := _tiny(probe, loss, weight, main)) is not None:
            yield tiny
            return
        response = f"it never reaches the gradient: total_norm is {full.total_norm:.4g} at weight {weight:.3g} and at 0{probe.cut}"
        yield step_rules.parameter(weight_name, weight, full.effective[weight_name], 0.0, response)
        return
    if full.gate is not None:
        response = f"total_norm is {full.total_norm:.4g}, as if it were {full.gate:.2g}"
        yield step_rules.parameter(gate_name, 1.0, full.effective[gate_name], 0.0, response)
    elif full.expected is not None:
        recorded, wanted = full.metrics.get(LOSS_SSIM), full.expected.loss_ssim
        yield step_rules.step_gradient(
            loss,
            full.total_norm,
            full.expected.total_norm,
            full.cosine,
            random=full.random,
            turns=full.turns,
            explanation=full.explanation,
            loss_factor=recorded / wanted if recorded and wanted else 1.0,
        )
    sound = full.expected is None or (step_rules.near(full.agreement) and full.gate is None)
    slack = step_rules.MAX_DEVIATION if sound else step_rules.LOOSE_DEVIATION  # a wrong gradient does not scale exactly
    double = probe.read(f"twice the {weight_name}", **{weight_name: 2 * weight})
    response = f"total_norm goes from {full.total_norm:.4g} to {double.total_norm:.4g} when it doubles"
    yield step_rules.parameter(weight_name, 2 * weight, double.effective[weight_name], _change(double, full, 2.0), response, slack)
    if loss == "ssim" and GRAD_SCALE in probe.known:
        alias = probe.read(f"another {GRAD_SCALE}", **{weight_name: 10 * weight, GRAD_SCALE: 0.1})
        gains = f"at weight {weight:.3g} x scale 1 and {alias.total_norm:.4g} at {10 * weight:.3g} x 0.1"
        response = f"total_norm is {full.total_norm:.4g} {gains}"
        yield step_rules.parameter(GRAD_SCALE, 0.1, alias.effective[GRAD_SCALE], _change(alias, full, 1.0), response, slack)
    if loss == "ssim" and probe.is_launched(GRAD_CLAMP) and sound and full.expected is not None and full.expected.peak > 0:
        limit = full.expected.peak / 100
        clamped = probe.read(f"another {GRAD_CLAMP}", **{weight_name: weight, GRAD_CLAMP: limit})
        assert clamped.expected is not None
        response = f"total_norm is {clamped.total_norm:.4g} with it; the clamped gradient gives {clamped.expected.total_norm:.4g}"
        yield step_rules.parameter(GRAD_CLAMP, limit, clamped.effective[GRAD_CLAMP], clamped.agreement, response)
    if gate_name in probe.known and full.gate is None:
        yield _gate(probe, loss, weight, main, full if sound else None)


def _tiny(probe: Probe, loss: str, weight: float, main: Reading) -> Check | None:
    """The finding about a loss that acts only at a far larger weight; None if it does not act there either."""
    if loss != "ssim" or probe.weights is None:
        return None
    huge = probe.read("a huge ssim_loss_weight", ssim_loss_weight=HUGE * weight)
    if huge.expected is None or not huge.total_norm > 2 * main.total_norm:
        return None
    return step_rules.step_gradient("ssim", huge.total_norm, huge.expected.total_norm, huge.cosine)


def _changing_weights(probe: Probe) -> Iterator[Check]:
    """Checks a warm-up and the schedules of the weight, where the study names them: the first step must have their weight."""
    weight = 1.0 if probe.weights is None else probe.weights["ssim"]
    asked: dict[str, tuple[str, dict[str, Any]]] = {}
    if probe.is_launched(WARM_UP):
        asked["a warm-up"] = (WARM_UP, {WEIGHT: weight, WARM_UP: 4.0})
    for setting in probe.launched:
        weight_setting = setting.get(WEIGHT)
        for kind, written in weight_setting.items() if isinstance(weight_setting, Mapping) else ():
            # With other numbers, so that the loss dominates: its own might be too small to be seen in one step.
            own = {"target_ratio": DOMINANCE} | dict.fromkeys(("value", "start", "end"), weight)
            changed = {name: own.get(name, value) for name, value in written.items()}
            asked.setdefault(f"a weight that is {kind}", (f"{WEIGHT}.{kind}", {WEIGHT: {kind: changed}}))
    for what, (name, changes) in asked.items():
        reading = probe.read(what, **changes)
        name_in_force = name.split(".")[0]
        found = None if reading.expected is None else reading.agreement
        wanted = "" if reading.expected is None else f"; the first step's weight gives {reading.expected.total_norm:.4g}"
        response = f"total_norm is {reading.total_norm:.4g}{wanted}"
        yield step_rules.parameter(name, changes[name_in_force], reading.effective.get(name_in_force), found, response)


def _strong(probe: Probe, loss: str, main: Reading) -> Reading:
    """A reading in which this loss dominates the gradient."""
    weight_name = LOSSES[loss][0]
    if probe.weights is not None:
        return probe.read(f"a large {weight_name}", **{weight_name: probe.weights[loss]})
    for weight in BLACK_BOX_GAINS:
        reading = probe.read(f"a large {weight_name}", **{weight_name: weight})
        if reading.total_norm > 0.5 * DOMINANCE * main.total_norm:
            break
    return reading


def _gate(probe: Probe, loss: str, weight: float, main: Reading, full: Reading | None) -> Check:
    """Checks that a gate below every t of the step leaves only the main loss, and that one in between passes the lower t."""
    weight_name, name = LOSSES[loss]
    times = sorted({t for t in probe.times if t > 0})
    if not times:
        reading = probe.read(f"another {name}", **{weight_name: weight, name: 0.5})
        return step_rules.parameter(name, 0.5, reading.effective[name])
    shut_at, middle = times[0] / 2, len(times) // 2
    shut = probe.read(f"another {name}", **{weight_name: weight, name: shut_at})
    if shut.n == main.n:
        norms = f"total_norm is {shut.total_norm:.4g}; the main loss has {main.total_norm:.4g}"
        response = f"no sample has t <= {shut_at:.3g}, yet {norms}"
        check = step_rules.parameter(name, shut_at, shut.effective[name], shut.total_norm / main.total_norm, response)
        if check.status != "ok" or full is None or len(times) < 2:
            return check
    half = (times[middle - 1] + times[middle]) / 2
    partly = probe.read(f"{name} amid the times", **{weight_name: weight, name: half})
    assert partly.expected is not None
    recorded, share = partly.metrics.get(ACTIVE_FRACTION), partly.expected.active_fraction
    if loss == "ssim" and recorded is not None and abs(recorded - share) > 1e-6:
        response = f"at {half:.3g} a share of {recorded:g} of the batch is recorded as active; {share:g} lies below it"
        return step_rules.parameter(name, half, partly.effective[name], recorded / share if share else math.inf, response)
    response = f"at {half:.3g} total_norm is {partly.total_norm:.4g}; the samples below it give {partly.expected.total_norm:.4g}"
    if 0 < share < 1 and step_rules.near(partly.agreement / share):
        response += ", divided by their number and not by that of the batch"
    return step_rules.parameter(name, half, partly.effective[name], partly.agreement, response)


def _change(reading: Reading, base: Reading, ratio: float) -> float:
    """The change of total_norm over its expected change. A fault common to both readings cancels."""
    if reading.expected is not None and base.expected is not None and base.gate is None:
        return reading.agreement / base.agreement
    return reading.total_norm / base.total_norm / ratio


def _clipping(reading: Reading) -> Check:
    if "max_grad_norm" not in reading.effective:
        return unknown("parameter/max_grad_norm", "effective() does not name max_grad_norm")
    if reading.after is None:
        return unknown("parameter/max_grad_norm", "the gradients are gone after a step")
    limit = reading.effective["max_grad_norm"]
    wanted = None if reading.expected is None else reading.expected.total_norm
    return step_rules.clipping(limit, reading.total_norm, reading.after, wanted)


def _others(probe: Probe) -> Iterator[Check]:
    """Checks that settings without a measurable effect are at least in `effective()`."""
    reading = next(iter(probe.readings.values()))
    asked, stated = {**probe.subject.config, **reading.settings}, reading.effective
    if "batch_size" in asked and probe.times:
        factor, response = len(probe.times) / asked["batch_size"], f"a step has {len(probe.times)} samples"
        yield step_rules.parameter("batch_size", asked["batch_size"], stated.get("batch_size"), factor, response)
    done = {*probe.known, "max_grad_norm", "batch_size", *probe.subject.disable_update}
    names = [name for name in asked if name in stated and name not in done]
    wrong = [name for name in names if not same_setting(asked[name], stated[name])]
    for name in wrong:
        yield step_rules.parameter(name, asked[name], stated[name])
    if not wrong:
        yield Check("parameter/others", "ok", f"{len(names)} further settings are in force as asked", {"settings": len(names)})


def _batches(probe: Probe) -> Check:
    """The main loss of step 1 under each setting."""
    first = {name: loss for name, reading in probe.readings.items() if (loss := reading.main_loss) is not None}
    if len(first) < 2:
        return unknown("batches", "fewer than two settings show the main loss of step 1")
    base = next(iter(first.values()))
    return step_rules.same_batches({name: value / base - 1 for name, value in first.items()})
