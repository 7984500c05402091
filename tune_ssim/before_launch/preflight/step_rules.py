"""The rules of preflight about training steps and planned trials: measurements → verdicts. Pure Python; see `rules`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tune_ssim.base.numbers import is_number
from tune_ssim.before_launch.preflight.report import Check, Status, judge, listed, ok, some, warn
from tune_ssim.trials.training import same_setting

# -- effects of a training step

MIN_SSIM_COSINE = 0.999
MAX_SSIM_ERROR = 1e-3
# Of 14 forms of SSIM (uniform and Gaussian windows of 3 to 15 pixels, padded ones, luminance, two scales, data range 2), compared
# with the reference at the decoded images: cosine 0.59 and more, 0.32x to 1.8x the norm, and the gradient turns up to 1.6x as fast.
# At the weights: 0.46 and more, 0.33x to 2.6x, 2.4x as fast. In half precision it turns 11x and 24x as fast and more. With a data
# range of 255: 0.0004x and 0.04x the norm. With a target beside the crop or of another sample the cosine is 0.17 at the images.
MIN_FORM_COSINE, MAX_INSTABILITY = {"images": 0.4, "weights": 0.3}, {"images": 4.0, "weights": 8.0}
MIN_FORM_FACTOR = 0.1
SAME_DIRECTION = 0.9999  # of a gradient that is only scaled 1 - 1e-7; 0.998 with a Gaussian window of 9 in place of 11
ANOTHER_FORM = "another form of SSIM, which cannot be verified"
HALF_REMEDY = "compute SSIM in float32, outside autocast, from images that were never rounded"
FLIPPED_REMEDY = "minimise 1 - SSIM: check the sign of each loss"
RANGE_REMEDY = "compute SSIM with the data range of its images: 1 for [0, 1], not 255"
MAX_DEVIATION = 0.02
LOOSE_DEVIATION = 0.5  # if the gradient is already wrong: a dropped parameter still shows as a factor of 2 or more
MIN_STEP_COSINE = 0.995
MAX_DECODE_DIFFERENCE = 0.02
MAX_BATCH_DIFFERENCE = 0.01
# Of ten optimisers, with momentum, weight decay, dropout and half precision. First update: its cosine to the negative gradient is
# 0.27 to 1, and the loss changes by -0.76 to -0.19; 0.28 and more if it is climbed. What is new in the second update: a cosine of
# 0.33 and more, and a share of 0.12 and more; 0 and 2e-6 with a stale gradient.
MAX_SLOPE = 1e-3
MIN_DESCENT, MIN_NEW_COSINE, MIN_NEW_SHARE = 0.05, 0.05, 1e-3

MIN_PAIRS = 8  # steps, below which nothing is said about the loss
MIN_RISE = 0.01  # relative; smaller changes of the loss are of no consequence
MAX_TIME_ERROR = 0.02  # of t; it is exact in sound set-ups but for rounding
# Of the gradient at the prediction the share that points away from its error: 1 for each loss that is a function of the error's
# size, weighted or not; about 0.5 if it compares with something else. Its value over the mean square error: squares, absolute
# values, Huber and weighted ones lie between 0.1 and 100.
MIN_AGREEING, MIN_LOSS_SCALE = 0.75, 0.01
TINY_SHARE, MAX_GROWTH = 1e-6, 5.0  # of the loss; of a weight after the last step, of which the trial sees less than a fifth
MAX_ALIKE, MAX_NOISE_MEAN, NOISE_DEVIATION = 0.5, 0.1, (0.8, 1.25)  # by chance 0.1, 0.02 and 0.98 to 1.02
# 0.44 to 1.2 on five photographs, 1.5 if a tenth of the conditions is dropped; 9.4 if they are mirrored.
MAX_TRAINING_RATIO = 3.0


# Rounding alone gives 0. An average that is copied back, or weights that are loaded again, undo the update: about 1.
MAX_OUTSIDE = (0.01, 0.5)  # of an update; above the second it is as large as what is learned
# 1 with an epsilon of 1e-8. At a tenth an update is ten times smaller than its learning rate says.
MIN_DAMPING = (0.5, 0.1)


def near(ratio: float) -> bool:
    return abs(ratio - 1) <= MAX_DEVIATION


def instability(own: float, expected: float) -> float:
    """own, expected: cosines between gradients before and after a small change of what they depend on. About 1 if both turn alike;
    far more if rounding turns the own one."""
    return (1 - own) / max(1 - expected, 1e-6) if math.isfinite(own) else math.inf


def ssim_precision(where: str, *, cosine: float, factor: float, error: float, peak: float, turns: float | None = None) -> Check:
    """SSIM's gradient at the decoded images compared with a float64 reference of the same pair. factor: of its norm; error: of the
    loss; peak: largest element of the reference over its root mean square (SEEDS B5). turns: see `instability`."""
    evidence = {"cosine": cosine, "factor": factor, "error": error, "peak_over_rms": peak}
    if turns is not None:
        evidence["instability"] = turns
    name, compared = "ssim/precision", f"its gradient has a cosine of {cosine:.3f} and {factor:.3g}x the norm"
    if cosine >= MIN_SSIM_COSINE and abs(error) <= MAX_SSIM_ERROR and near(factor):
        return Check(name, "ok", f"SSIM's value and gradient equal those in float64 (cosine {cosine:.7f})", evidence)
    if cosine <= -MIN_SSIM_COSINE:
        sentence = f"on {where} the gradient of the SSIM loss has the opposite sign: it makes images less similar"
        return Check(name, "bad_setup", sentence, evidence, FLIPPED_REMEDY)
    if turns is None or not turns <= MAX_INSTABILITY["images"]:
        sentence = (
            f"on {where} SSIM is not computed in float32: compared with float64 {compared}, and its value is off by {error:.1e}"
        )
        return Check(name, "bad_setup", sentence, evidence, HALF_REMEDY)
    if factor < MIN_FORM_FACTOR:
        sentence = f"on {where} the SSIM loss has {factor:.2g}x the gradient of SSIM on [0, 1]"
        return Check(name, "bad_setup", sentence, evidence, RANGE_REMEDY)
    if cosine >= MIN_FORM_COSINE["images"]:
        return Check(name, "ok", f"SSIM is computed in float32, in another form than Wang et al. 2004: {compared}", evidence)
    sentence = f"on {where} the SSIM loss is no SSIM of images and targets: compared with SSIM {compared}"
    return Check(name, "bad_setup", sentence, evidence, "check which images the loss compares")


def step_gradient(
    part: str,
    measured: float,
    expected: float,
    cosine: float | None,
    *,
    random: bool = False,
    turns: float | None = None,
    explanation: str = "",
    loss_factor: float = 1.0,
) -> Check:
    """total_norm of a real step compared with the gradient of its own forward pass. random: whether that pass differs each time.
    turns: see `instability`; explanation: what the gradient is that of; loss_factor: the recorded loss over the expected one."""
    name = f"gradient/{part}"
    factor = measured / expected if expected > 0 else math.inf
    evidence = {"total_norm": measured, "expected": expected, "factor": factor}
    if cosine is not None:
        evidence["cosine"] = cosine
    if turns is not None:
        evidence["instability"] = turns
    if random and not near(factor):
        sentence = f"forward() depends on more than (seed, n), so the {part} gradient cannot be predicted"
        return Check(name, "unknown", sentence, evidence)
    if cosine is not None and not cosine >= MIN_STEP_COSINE:
        compared = f"a cosine of {cosine:.3f} and {factor:.3g}x the norm, compared with its forward pass in float32"
        status, sentence, remedy = _other_direction(part, cosine, factor, turns, explanation, compared)
        return Check(name, status, sentence, evidence, remedy)
    if part == "ssim" and not near(factor) and near(loss_factor / factor):
        return Check(name, "ok", f"total_norm of a step is {factor:.3g}x that of SSIM, and so is the recorded loss", evidence)
    if part == "ssim" and not near(factor) and cosine is not None and cosine < SAME_DIRECTION and _may_be_a_form(factor, turns):
        sentence = f"the ssim gradient of a step has a cosine of {cosine:.4f} and {factor:.3g}x the norm of SSIM's: {ANOTHER_FORM}"
        return Check(name, "unknown", sentence, evidence)
    expected_only = f"total_norm of a step is {measured:.4g}; the gradient of its {part} loss alone is {expected:.4g}"
    sentence = f"total_norm of a step equals the gradient of its {part} loss ({measured:.4g})" if near(factor) else expected_only
    remedy = "is the loss scaled, added twice or left out of what is minimised?"
    return judge(name, near(factor), sentence, evidence, remedy)


def _other_direction(
    part: str, cosine: float, factor: float, turns: float | None, explanation: str, compared: str
) -> tuple[Status, str, str]:
    """Status, sentence and remedy of a gradient that differs from the expected one by more than its size."""
    if cosine <= -MIN_STEP_COSINE:
        return "bad_setup", f"the {part} gradient of a step has the opposite sign: the loss is maximised", FLIPPED_REMEDY
    if part != "ssim":
        return "bad_setup", f"the {part} gradient of a step has {compared}", "minimise what is reported, and nothing else"
    if explanation:
        return "bad_setup", f"the ssim gradient of a step is that of {explanation}", "check which images the loss compares"
    if factor < MIN_FORM_FACTOR:
        return "bad_setup", f"the ssim gradient of a step is only {factor:.2g}x that of SSIM on [0, 1]", RANGE_REMEDY
    if turns is None or not turns <= MAX_INSTABILITY["weights"]:
        sentence = f"the ssim gradient of a step is not that of SSIM in float32: {compared}"
        return "bad_setup", sentence, HALF_REMEDY
    if cosine <= -MIN_FORM_COSINE["weights"]:
        return "bad_setup", f"the ssim gradient of a step points away from that of SSIM: {compared}", FLIPPED_REMEDY
    if cosine >= MIN_FORM_COSINE["weights"] and _may_be_a_form(factor, turns):
        return "unknown", f"the ssim gradient of a step has {compared}: {ANOTHER_FORM}", ""
    return "bad_setup", f"the ssim gradient of a step is not that of SSIM: {compared}", "check which images the loss compares"


def _may_be_a_form(factor: float, turns: float | None) -> bool:
    """Whether another form of SSIM, in float32, may have a gradient of this size and stability."""
    is_stable = turns is not None and turns <= MAX_INSTABILITY["weights"]
    return is_stable and MIN_FORM_FACTOR <= factor <= 1 / MIN_FORM_FACTOR


def parameter(
    name: str, asked: Any, in_force: Any, factor: float | None = None, response: str = "", slack: float = MAX_DEVIATION
) -> Check:
    """A requested parameter: the value that effective() reports, and its measured effect.

    factor: measured effect of a change of this parameter over the expected effect; 1 if it acts as it should."""
    evidence = {key: float(value) for key, value in (("asked", asked), ("in_force", in_force)) if is_number(value)}
    check, remedy = f"parameter/{name}", f"follow {name} from the configuration to the line that uses it"
    if not same_setting(asked, in_force):
        sentence = f"{name} was set to {_short_repr(asked)} but {_short_repr(in_force)} is in force: it does not reach the training"
        return Check(check, "bad_setup", sentence, evidence, remedy)
    reported = f"effective() reports {name} {_short_repr(in_force)}, as requested"
    if factor is None:
        return Check(check, "unknown", f"{reported}; its effect cannot be measured here", evidence)
    is_sound = abs(factor - 1) <= slack
    sentence = f"{name} has the expected effect" if is_sound else f"{reported}, but it has another effect: {response}"
    return judge(check, is_sound, sentence, evidence | {"factor": factor}, remedy)


def clipping(limit: float | None, before: float, after: float, expected: float | None) -> Check:
    """before: the recorded total_norm; after: of the gradients that the optimiser saw; expected: by the forward pass."""
    known = {"total_norm": before, "after": after, "max_grad_norm": limit, "expected": expected}
    evidence = {key: value for key, value in known.items() if value is not None}
    name, target = "parameter/max_grad_norm", before if limit is None else min(before, limit)
    if not math.isfinite(before):
        return Check(name, "unknown", f"total_norm is {before:.4g}: its clipping cannot be checked", evidence)
    if limit is not None and expected is not None and expected > (1 + LOOSE_DEVIATION) * limit and before <= 1.01 * limit:
        sentence = f"total_norm is recorded after clipping at {limit:g}: it is {before:.4g}, the gradient's norm is {expected:.4g}"
        remedy = "record what clip_grad_norm_ returns: the norm guard is blind otherwise"
        return Check(name, "bad_setup", sentence, evidence, remedy)
    seen = f"total_norm is {before:.4g}, and the optimiser gets {after:.4g}"
    is_sound = abs(after - target) <= MAX_DEVIATION * target
    stated = "no clipping is in force" if limit is None else f"max_grad_norm {limit:g} is in force"
    remedy = "follow max_grad_norm from the configuration to the call that clips"
    return judge(name, is_sound, seen if is_sound else f"{stated}, but {seen}", evidence, remedy)


def frozen(part: str, *, tensors: int, changed: Sequence[str], with_gradient: Sequence[str], training: Sequence[str]) -> Check:
    """A part that must not learn, after a few real steps. training: BatchNorm and dropout layers left in train mode."""
    evidence = {"tensors": tensors, "changed": len(changed), "with_gradient": len(with_gradient), "in_train_mode": len(training)}
    faults = listed(some(changed, "changed"), some(with_gradient, "got a gradient"), some(training, "are in train mode"))
    sentence = f"{part} must be frozen: {faults}" if faults else f"{part}: no gradient, and the same hash after real steps"
    remedy = f"{part}.requires_grad_(False).eval(), and keep it out of the optimiser"
    return judge(f"frozen/{part}", not faults, sentence, evidence, remedy)


def decoder(repeat: float, alone: float, swapped: float) -> Check:
    """Largest difference of two decoded images when decoded again, when decoded one by one, and so but in the other order."""
    evidence = {"repeat": repeat, "alone": alone}
    sentence = "decoding is repeatable, and independent of the other images in the batch"
    if not repeat <= MAX_DECODE_DIFFERENCE:
        sentence = f"decoding the same latents twice gives images that differ by {repeat:.2g}"
    elif not alone <= MAX_DECODE_DIFFERENCE:
        sentence = f"an image differs by {alone:.2g} when it is decoded without the rest of its batch"
    is_sound = repeat <= MAX_DECODE_DIFFERENCE and alone <= MAX_DECODE_DIFFERENCE
    if repeat <= MAX_DECODE_DIFFERENCE < alone and swapped <= MAX_DECODE_DIFFERENCE:
        sentence, remedy = "the decoder returns the images of a batch in another order", "keep the order of its chunks"
        return Check("data/decoder_order", "bad_setup", sentence, evidence, remedy)
    remedy = "put the decoder into eval mode: dropout is random, BatchNorm mixes the images of a batch"
    return judge("frozen/decoder", is_sound, sentence, evidence, remedy)


def trained(
    *, parameters: int, still: Sequence[str], too_slow: Sequence[str], without_gradient: Sequence[str], learning_rate: float | None
) -> Check:
    """What should learn, after a few real steps: every parameter gets a gradient and moves. too_slow: those of `still` that do
    so at a larger learning rate."""
    stuck = [name for name in still if name not in set(too_slow)]
    evidence = {"parameters": parameters, "still": len(still), "too_slow": len(too_slow), "without_gradient": len(without_gradient)}
    of, remedy = f"of {parameters} trainable parameters", "check requires_grad, the optimiser's list and the learning rate"
    if learning_rate == 0:
        return Check("trained", "warn", "the learning rate is 0: nothing can learn", evidence, remedy)
    if faults := listed(some(without_gradient, "get no gradient"), some(stuck, "do not move")):
        return Check("trained", "bad_setup", f"{of} {faults}", evidence, remedy)
    if too_slow:
        sentence = f"{of} {some(too_slow, 'do not move: their updates are lost in rounding')}"
        return Check("trained", "warn", sentence, evidence, "raise the learning rate, or keep the weights in a higher precision")
    return Check("trained", "ok", f"all {parameters} trainable parameters get a gradient and move", evidence)


def outside_updates(moved: float) -> Check:
    """moved: by how much the weights change between two updates, over the length of an update."""
    slight, serious = MAX_OUTSIDE
    sentence = "between two updates the weights stay as they are"
    if moved > slight:
        sentence = f"between two updates something else moves the weights, by {moved:.2g}x the length of an update"
    remedy = "look for what loads or copies weights inside the loop: a checkpoint, or an average that is written back"
    return judge("update/outside", moved <= slight, sentence, {"moved": moved}, remedy, "bad_setup" if moved > serious else "warn")


def damping(share: float) -> Check:
    """share: of an update that the optimiser's epsilon leaves."""
    slight, serious = MIN_DAMPING
    sentence = f"the optimiser's epsilon leaves {share:.2g} of an update"
    remedy = "lower the optimiser's eps (1e-8 by default): it outweighs the root of the gradients' second moment"
    return judge("update/epsilon", share >= slight, sentence, {"share": share}, remedy, "bad_setup" if share < serious else "warn")


def descent(cosine: float, slope: float) -> Check:
    """cosine: of the first update to the negative gradient of its step; slope: relative change of the main loss along it."""
    evidence = {"cosine": cosine, "slope": slope}
    is_sound = cosine >= MIN_DESCENT and slope <= MAX_SLOPE
    sentence = "the main loss falls along the first update"
    measured = f"it changes by {slope:+.2g}, and the update has a cosine of {cosine:.2g} to the negative gradient"
    wrong = f"the main loss does not fall along the first update: {measured}"
    remedy = "minimise the loss: check its sign, hooks on gradients, and the optimiser's `maximize`"
    return judge("update/descent", is_sound, sentence if is_sound else wrong, evidence, remedy)


def loss_under_updates(name: str, held: Sequence[float], trained: Sequence[float]) -> Check:
    """The main loss on the same batches, with the weights held and with updates: it need not fall in a few steps, but a loss that
    rises with every update has the wrong sign, or a learning rate that ruins."""
    changes = [after - before for before, after in zip(held, trained, strict=False) if math.isfinite(before + after)]
    if len(changes) < MIN_PAIRS:
        return Check(name, "unknown", f"fewer than {MIN_PAIRS} steps have a loss both with and without updates")
    third = len(changes) // 3
    earlier, late = changes[-2 * third : -third], changes[-third:]
    rise = fmean(late) / max(abs(fmean(filter(math.isfinite, held))), 1e-12)
    is_rising = min(*earlier, *late) > 0 and fmean(late) > fmean(earlier)
    sentence = f"after {len(changes)} steps the main loss of the same batches has changed by {rise:+.2g} (relative)"
    evidence, remedy = (
        {"relative_change": rise, "steps": float(len(changes))},
        "minimise the loss: check its sign, hooks on gradients and the optimiser; or lower the learning rate",
    )
    return judge(name, not (is_rising and rise > MIN_RISE), sentence, evidence, remedy, fault=": it rises with every update")


def time_of_noise(apart: float) -> Check:
    """apart: largest difference between a sample's t and the share of noise in what the network gets."""
    sentence = f"t is the share of noise in the network's input to within {apart:.2g}"
    fault, remedy = ": the gates judge another time than the image's", "give the losses the t with which the noise was mixed in"
    return judge("flow/t", apart <= MAX_TIME_ERROR, sentence, {"apart": apart}, remedy, fault=fault)


def main_gradient(agreeing: float, without: int, channels: int, scale: float) -> Check:
    """The gradient of the main loss at the prediction. agreeing: its share that lessens the error; without: channels that get
    none; scale: the main loss over the mean square error."""
    evidence = {"agreeing": agreeing, "channels_without_gradient": without, "scale": scale}
    name, sentence = "loss/main_gradient", f"{agreeing:.0%} of the main loss's gradient lessens the error of the prediction"
    if without:
        fault = f"the main loss has no gradient for {without} of the {channels} channels of the prediction"
        return Check(name, "bad_setup", fault, evidence, "compare the whole prediction with the whole target")
    if scale < MIN_LOSS_SCALE:
        fault = f"the main loss is {scale:.2g}x the mean square error of the prediction: any other loss drowns it"
        return Check(name, "bad_setup", fault, evidence, "is it divided by the number of elements twice?")
    remedy = "compare each prediction with its own target: check broadcasting, and the order of the batch"
    return judge(name, agreeing >= MIN_AGREEING, sentence, evidence, remedy)


def last_step(name: str, value: Any, last: float, later: float, loss: float) -> Check | None:
    """What the weight `name` adds to the loss at the end of a trial, and long after it; None if that is nothing."""
    evidence, check = {"last": last, "later": later}, f"parameter/{name}"
    if last < -TINY_SHARE * abs(loss):
        sentence = f"{name} {_short_repr(value)} lowers the loss by {-last:.3g} at the last step: its term has the wrong sign"
        return Check(check, "bad_setup", sentence, evidence, FLIPPED_REMEDY)
    if later > MAX_GROWTH * max(last, 0.0) and later > TINY_SHARE * abs(loss):
        sentence = f"{name} {_short_repr(value)} adds {last:.2g} to the loss at the last step, and {later:.2g} long after it"
        return Check(check, "bad_setup", f"{sentence}: its warm-up is longer than the trial", evidence, "shorten the warm-up")
    return None


def micro_batches(repeated: int, parameters: int) -> Check:
    """repeated: of the parameters that learn, those to which a step adds the same gradient again."""
    remedy = "draw each micro-batch from its own random numbers"
    sentence, fault = "what a step adds to a gradient", " is the same again: its micro-batches are the same"
    if repeated < parameters:
        return Check("data/micro_batches", "ok", f"{sentence} is new", {"repeated": repeated})
    return Check("data/micro_batches", "bad_setup", sentence + fault, {"repeated": repeated}, remedy)


def freshness(share: float, cosine: float, total_norm: float | None, expected: float, accumulated: float) -> Check:
    """What is new in the second update, that is, not in the span of the first gradient and update. share: of the update's norm;
    cosine: to what is new in the second gradient, negative. total_norm: as recorded; expected: norm of the second gradient;
    accumulated: norm of both gradients' sum."""
    evidence = {"share": share, "cosine": cosine, "expected": expected, "accumulated": accumulated}
    name = "update/fresh"
    if total_norm is not None:
        evidence["total_norm"] = total_norm
        if near(total_norm / accumulated) and not near(total_norm / expected) and not near(accumulated / expected):
            sentence = f"total_norm of the second update is that of two steps' gradients ({total_norm:.4g}, not {expected:.4g})"
            return Check(name, "bad_setup", sentence, evidence, "call optimizer.zero_grad() before each backward pass")
    is_sound = share >= MIN_NEW_SHARE and cosine >= MIN_NEW_COSINE
    sentence = "the second update follows the gradient of its own step"
    wrong = "the second update contains nothing of its own step's gradient: it follows that of an earlier step"
    remedy = "call backward() before optimizer.step(), on the loss of the same step"
    return judge(name, is_sound, sentence if is_sound else wrong, evidence, remedy)


def noise(mean: float, deviation: float, alike: float) -> Check:
    """alike: lowest correlation between the noise of two images of one batch."""
    evidence = {"mean": mean, "deviation": deviation, "alike": alike}
    sentence = f"the noise has mean {mean:.2g} and deviation {deviation:.2g}, and each image its own"
    if alike > MAX_ALIKE:
        sentence = f"the images of a batch have the same noise (correlation {alike:.2g})"
        return Check("flow/noise", "bad_setup", sentence, evidence, "draw the noise with the shape of the whole batch")
    remedy = "inference starts from noise with mean 0 and deviation 1, so train with it: torch.randn, not torch.rand"
    if abs(mean) > MAX_NOISE_MEAN:
        return Check("flow/noise", "bad_setup", f"the noise has mean {mean:.2g}", evidence, remedy)
    low, high = NOISE_DEVIATION
    return judge(
        "flow/noise", low <= deviation <= high, sentence, evidence, remedy, "warn", fault="; inference starts from deviation 1?"
    )


def held_out_loss(training: float, held_out: float, more_detail: float) -> Check:
    """Flow loss near t = 1: third quartile of training samples, since some may have no condition on purpose; mean of held-out ones.
    more_detail: fine detail of the training images over
    that of the held-out ones, at least 1: it cannot be predicted."""
    ratio = training / max(held_out * more_detail, 1e-12)
    evidence = {"training": training, "held_out": held_out, "more_detail": more_detail, "ratio": ratio}
    sentence = f"near t = 1 the flow loss of training samples is {ratio:.2g}x that of held-out ones"
    remedy = "give the network its condition in training as in inference: of the same image, in the same place and range"
    fault = ": the network does not get in training what it gets in inference"
    return judge("flow/held_out", ratio <= MAX_TRAINING_RATIO, sentence, evidence, remedy, fault=fault)


def average(part: str, share: float) -> Check:
    """share: of the way from averaged to raw weights that the average goes in a step, which is 1 - decay."""
    name, evidence = f"average/{part}", {"share": share}
    if share == 0:
        return Check(name, "unknown", f"{part} does not move in a step: it is kept as loaded, or averaged later", evidence)
    is_sound = -MAX_DEVIATION <= share <= 1 + MAX_DEVIATION
    sentence = f"{part} goes {share:.2g} of the way to the weights in a step"
    return judge(
        name,
        is_sound,
        sentence,
        evidence,
        "average = decay * average + (1 - decay) * weights, with 0 < decay < 1",
        fault=": away from them, or beyond",
    )


def same_batches(differences: Mapping[str, float]) -> Check:
    """differences: the main loss of step 1 under changed settings, relative to that under the first; the weights are the same."""
    worst = max(differences, key=lambda name: abs(differences[name]))
    largest = abs(differences[worst])
    is_sound = largest <= MAX_BATCH_DIFFERENCE
    other = f"with {worst} step 1 has another batch (its main loss differs by {largest:.1%}): trials cannot be compared"
    sentence = f"step 1 has the same batch under {len(differences)} settings" if is_sound else other
    evidence = {"largest_difference": largest, "settings": len(differences)}
    return judge("batches", is_sound, sentence, evidence, "draw the random numbers of step n from (seed, n) alone")


def same_step(difference: float, seeded: float) -> Check:
    """Relative differences of the main loss of step 1 when it is repeated, and when the global generators are seeded alike too."""
    evidence = {"difference": difference, "difference_if_seeded": seeded}
    remedy = "draw the random numbers of step n from (seed, n), and nothing else"
    if not math.isfinite(difference):
        return Check("seeds/same", "unknown", "step() records no main loss to compare", evidence)
    sentence = f"step 1 gives a different main loss when repeated (by {difference:.1%}): trials cannot be paired with the baseline"
    if difference > MAX_BATCH_DIFFERENCE:  # if only the global generator differs, it may be dropout
        return Check("seeds/same", "bad_setup" if seeded > MAX_BATCH_DIFFERENCE else "warn", sentence, evidence, remedy)
    return Check("seeds/same", "ok", "step 1 is the same each time", evidence)


def other_seed(is_same_batch: bool) -> Check:
    if is_same_batch:
        sentence = "another seed gives the same batch: repeating a trial with other seeds does not measure the noise"
        return warn("seeds", sentence, "draw the random numbers of step n from (seed, n)")
    return ok("seeds", "another seed gives another batch")


# -- whether the guards can judge

MIN_WARM = 0.1  # below it no setting of a search over two decades acts as one of its own
MIN_CHANCE = 0.95  # probability of enough active steps for a verdict
MIN_LAW_PROBABILITY = 1e-6


def gates(probabilities: Mapping[float, float], steps: int, needed: int) -> Check:
    """probabilities: for each max_t that may be launched, P(a step is active)."""
    expected = {max_t: steps * p for max_t, p in sorted(probabilities.items())}
    evidence = {f"active_steps@{max_t:g}": count for max_t, count in expected.items()} | {"steps": steps, "needed": needed}
    counts = ", ".join(f"{count:.3g} at max_t {max_t:g}" for max_t, count in expected.items())
    sentence = f"expected number of steps with an SSIM gradient: {counts}, of {steps} steps; a verdict needs {needed}"
    can_be_judged = any(count >= needed for count in expected.values())
    is_sure = all(chance_of_at_least(needed, steps, p) >= MIN_CHANCE for p in probabilities.values())
    remedy = "train longer, raise ssim_loss_max_t or the batch size"
    return judge("gate", is_sure, sentence, evidence, remedy, "warn" if can_be_judged else "bad_setup")


def warm_up(share: float, steps: int) -> Check:
    """share: of ssim_loss_weight that is reached at the last of `steps`."""
    sentence = f"ssim_loss_weight is still warmed up when the trial ends: {share:.2g} of it after {steps} steps"
    remedy = "shorten the warm-up, or train longer: settings are compared at weights that they never reach"
    return Check("gate/warm_up", "bad_setup" if share < MIN_WARM else "warn", sentence, {"share": share}, remedy)


def chance_of_at_least(needed: int, steps: int, p: float) -> float:
    """P(at least `needed` of `steps` steps are active), each with probability `p`."""
    if not 0 < p < 1:
        return float(needed <= steps * p)
    logs = (
        math.lgamma(steps + 1) - math.lgamma(k + 1) - math.lgamma(steps - k + 1) + k * math.log(p) + (steps - k) * math.log1p(-p)
        for k in range(min(needed, steps + 1))
    )
    return max(0.0, 1.0 - math.fsum(math.exp(log) for log in logs))


def law_of_t(distance: float, count: int) -> Check:
    """Kolmogorov-Smirnov distance of the times that were drawn to the law that the task declares."""
    probability = min(1.0, 2 * math.exp(-2 * count * distance**2))  # at most (Dvoretzky, Kiefer, Wolfowitz 1956; Massart 1990)
    evidence = {"distance": distance, "p_value": probability, "times": count}
    is_sound = probability >= MIN_LAW_PROBABILITY
    sentence = (
        f"{count} sampled timesteps {'follow' if is_sound else 'do not follow'} the declared distribution (p = {probability:.2g})"
    )
    return judge("time_law", is_sound, sentence, evidence, "declare the distribution from which training samples t")


def baseline_push(norm: float, main_norm: float, limit: float) -> Check:
    """Medians of total_norm under the baseline's settings and of the main loss alone, on the same steps. limit: the guard's."""
    if main_norm == 0:
        remedy = "check what the main loss compares: the prediction is its own target, or does not depend on the weights"
        return Check("baseline/norm", "bad_setup", "the main loss alone has no gradient", {"total_norm_main": 0.0}, remedy)
    ratio = norm / main_norm
    evidence = {"total_norm": norm, "total_norm_main": main_norm, "ratio": ratio}
    sentence = f"the baseline's total_norm is {ratio:.3g}x that of the main loss alone"
    fault = f": a trial at the norm guard's limit of {limit:g} has {ratio * limit:.3g}x, which the guard does not notice"
    remedy = "lower the baseline's pixel_loss_weight, or rely on the smoke test"
    return judge("baseline/norm", ratio < limit, sentence, evidence, remedy, "warn", fault=fault)


def _short_repr(value: Any) -> str:
    return f"{value:.4g}" if is_number(value) else repr(value)
