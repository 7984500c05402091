"""The rules of preflight: measurements at step 0 → verdicts. Numbers in, `Check` out; pure Python.

`bad_setup` means that no setting of the space is to blame and none can help. Every limit lies between the measurements of
sound and of broken set-ups that `benchmarks/preflight.py` takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tune_ssim.base.numbers import is_number
from tune_ssim.before_launch.preflight.report import Check, Status, ok, unknown, warn
from tune_ssim.trials.training import same_setting

if TYPE_CHECKING:
    from tune_ssim.probes import WeightComparison

LOSS_CE = "loss_ce"  # of a step, if a task has text: cross-entropy of its caption
LABEL_FRACTION = "label_fraction"  # of a step, if a task has text: share of the positions that carry a label


# -- weights

MAX_EMA_DISTANCE = 0.65
MAX_AVERAGE_LOSS_RATIO = 2.5


def weights(part: str, file: str, found: WeightComparison, fresh_layers: Sequence[str] = (), holds: str | None = None) -> Check:
    """A network compared with the file that it must have been loaded from.

    fresh_layers: those whose weights are distributed as after initialisation. holds: another file that it equals instead.
    """
    name, untrained, norms = f"weights/{part}", len(found.untrained), found.norm_parameters
    evidence = {
        "equal_fraction": found.equal_fraction,
        "missing": len(found.missing),
        "unexpected": len(found.unexpected),
        "mismatched": len(found.mismatched),
        "different": len(found.different),
        "norm_parameters": norms,
        "untrained_norm_parameters": untrained,
        "fresh_layers": len(fresh_layers),
        "metadata_missing": float(found.metadata_missing),
    }
    faults = _list(
        _some(found.missing, f"not in {file}"),
        _some(found.unexpected, f"of {file} not used"),
        _some([f"{tensor}: {shapes}" for tensor, shapes in found.mismatched.items()], f"of another shape than in {file}"),
        _some(found.different, f"with other values than in {file}"),
    )
    if faults:
        also = f"; it holds {holds} instead" if holds else ", and it looks freshly initialised" if found.fresh else ""
        sentence = f"{found.equal_fraction:.1%} of the numbers equal the file's{also}: {faults}"
        return Check(name, "bad_setup", sentence, evidence, f"load {file} strictly, and do not change the weights after that")
    sentence = f"all tensors equal those of {file}"
    if fresh_layers:
        sentence += f", {_some(fresh_layers, 'of them look freshly initialised')}"
        return Check(name, "bad_setup", sentence, evidence, "was the file written by a network that had not been loaded itself?")
    if found.fresh:  # also true of a network whose norms were always frozen
        return Check(name, "warn", sentence, evidence, "is this the file of a trained network?")
    sentence += f", trained ({norms - untrained} of {norms} normalisation parameters)" if norms else ""
    remedy = 'save it with metadata={"format": "pt"}: some loaders refuse it without'  # SEEDS B2
    return _judge(name, not found.metadata_missing, sentence, evidence, remedy, "warn", fault="; the file does not name its format")


def ema_distance(part: str, of: str, distance: float) -> Check:
    """distance: norm(EMA − raw) / norm(raw) over all parameters of one architecture."""
    sentence, fault = f"the distance of {part} from {of} is {distance:.3g} of the weights' norm", ": an average of another model"
    evidence, remedy = {"distance": distance}, "take both files from the same training"
    return _judge(f"weights/{part}~{of}", distance <= MAX_EMA_DISTANCE, sentence, evidence, remedy, fault=fault)


def smoke(kind: str, findings: Sequence[str], statistics: Mapping[str, float]) -> Check:
    """The smoke test on the starting weights; `findings`: the sentences of SmokeTest."""
    name = f"smoke/{kind}"
    if not statistics:
        return unknown(name, "the samples have no statistics by which they could be judged")
    if not findings:
        return Check(name, "ok", f"samples of the {kind} weights pass", statistics)
    sentence = f"the {kind} weights are ruined before the first update: {'; '.join(findings[:3])}"
    remedy = "check which weights were loaded, and that images and latents are in the range that the model expects"
    return Check(name, "bad_setup", sentence, statistics, remedy)


def baseline_samples(findings: Sequence[str], steps: int) -> Check:
    """The smoke test after the first steps of the baseline; one that fails and later passes has recovered."""
    ruined = f"{steps} steps of the baseline ruin the samples: {'; '.join(findings)}"
    sentence = ruined if findings else f"samples pass after {steps} steps of the baseline"
    remedy = "lower the learning rate or the baseline's pixel_loss_weight"
    return _judge("baseline/smoke", not findings, sentence, {"steps": steps}, remedy)


# -- losses

MAX_LOSS_RATIO = 0.8
MIN_FIRST_CE = 0.1  # SEEDS D2: below it the positions of the question are labelled too
MAX_CE_OF_UNIFORM = 0.9  # FACTS §5: with its weights 0.05 of ln V, without them 0.92 to 1


def main_loss(loss: float, trivial: float) -> Check:
    """trivial: the loss of the best constant prediction of the velocity."""
    ratio = loss / trivial if trivial > 0 else math.inf
    evidence = {"loss": loss, "trivial_loss": trivial, "ratio": ratio}
    sentence = f"the main loss is {loss:.3g}, {ratio:.2f}x that of the best constant prediction"
    remedy = "check the weights, the latents' scale, the range of the images and that each sample meets its own condition"
    return _judge("loss/main", ratio < MAX_LOSS_RATIO, sentence, evidence, remedy)


def caption_loss(loss: float, vocabulary_size: int | None, label_fraction: float | None) -> Check:
    """The first cross-entropy of a task with text (SEEDS D2), and the share of positions that carry a label."""
    evidence = {LOSS_CE: loss}
    mask = "set the labels of visual and question positions to -100"
    if label_fraction is not None:
        evidence[LABEL_FRACTION] = label_fraction
        if not 0 < label_fraction < 1:
            which = "every position carries a label" if label_fraction >= 1 else "no position carries a label"
            return Check("loss/text", "bad_setup", f"{which}: the mask of the labels is wrong", evidence, mask)
    sentence = f"the first cross-entropy is {loss:.3g}"
    if vocabulary_size:
        evidence["uniform"] = math.log(vocabulary_size)
        if not loss < MAX_CE_OF_UNIFORM * evidence["uniform"]:
            sentence += f"; guessing among {vocabulary_size} tokens gives {evidence['uniform']:.3g}"
            return Check("loss/text", "bad_setup", sentence, evidence, "check that the language model's weights were loaded")
    fault = f", below {MIN_FIRST_CE}: the model sees the answer"
    return _judge("loss/text", loss >= MIN_FIRST_CE, sentence, evidence, mask, fault=fault)


# First-step metrics of known trainings, with their weights and without, under the names of their own log. A task that records all
# of a model's names is taken for it. (FACTS §5: 2.0 of the wrong, small model; 11.0 near ln V, weights not loaded)
FINGERPRINTS = {"BAGEL": {"mse": (0.41, 2.0), "ce": (0.55, 11.0)}}


def fingerprints(metrics: Mapping[str, float]) -> list[Check]:
    """The first step's metrics compared with those of known trainings."""
    found = []
    for model, marks in FINGERPRINTS.items():
        for metric, (healthy, ruined) in marks.items() if marks.keys() <= metrics.keys() else ():
            value = metrics[metric]
            evidence = {metric: value, "healthy": healthy, "ruined": ruined}
            sentence = f"{metric} is {value:.3g}; {model} starts at {healthy} with its weights and at {ruined} without"
            is_sound = value < math.sqrt(healthy * ruined)
            found.append(_judge(f"loss/{metric}", is_sound, sentence, evidence, "check which weights were loaded"))
    return found


def tokens(ids: int, outside: int, smallest: int, largest: int, vocabulary_size: int) -> Check:
    """Generated token ids: how many, and how many of them lie outside the vocabulary (SEEDS B1: such an id decodes to None)."""
    evidence = {"ids": ids, "outside": outside, "smallest": smallest, "largest": largest, "vocabulary_size": vocabulary_size}
    sentence = f"{outside} of {ids} generated token ids are outside the vocabulary [0, {vocabulary_size}): {smallest} to {largest}"
    return _judge("text/tokens", not outside, sentence, evidence, "match tokenizer, vocabulary and the model's output layer")


# -- images

RANGE_SLACK = 0.01  # resampling overshoots [0, 1] a little; the known mix-ups by 1 and more
MAX_CONSTANT = 0.5  # share of the images; 0 in sound set-ups
MAX_MAPPING_RATIO = 1.5
MIN_IMAGES = 8  # with fewer pairs no decision is possible
MIN_OWN_WINS = 0.8
MAX_LATENT_RATIO = 1.0
MIN_RECONSTRUCTION_CORRELATION = 0.3
MIN_EXPLAINED = 0.0
NAMED_FILES = 20  # files named in a sentence
# Of a channel of latents. Bundled VAE on its own photograph: deviations 0.88 to 0.95, means up to 0.12; on tissue sections, which
# it was not trained on, 1.7 to 2.7 and 5.6.
STD_RANGE, MAX_LATENT_MEAN = (1 / 3, 3.0), 2.0
FRAME_IMAGES, FRAME_SHARE = 0.5, 0.5  # a few patches shared by most images are a frame or a watermark, not an overlap

MIX_UPS = {
    "half": "[0, 1] is taken for [-1, 1]",
    "double": "[-1, 1] is taken for [0, 1]",
    "inverted": "light and dark are exchanged",
    "channels": "the colour channels are in reverse order",
    "mirrored": "one of them is mirrored",
    "upside_down": "one of them is upside down",
}


def image_range(name: str, lowest: float, highest: float, non_finite: int, images: int) -> Check:
    """The range of the images called `name`, which must be [0, 1]; `non_finite` of them have a pixel that is not finite."""
    evidence = {"min": lowest, "max": highest, "non_finite_images": non_finite, "images": images}
    check, label = f"data/{name}", name.replace("_", " ")
    if non_finite:
        sentence = f"{non_finite} of {images} {label} have non-finite pixels"
        return Check(check, "bad_setup", sentence, evidence, "repair or drop them")
    is_sound = lowest >= -RANGE_SLACK and highest <= 1 + RANGE_SLACK
    kind = "[0, 255]" if highest > 2 else "[-1, 1]" if lowest < -0.5 else "neither [0, 1] nor [-1, 1]"
    sentence, fault = f"{images} {label} are in [{lowest:.3g}, {highest:.3g}]", f"; expected [0, 1], this looks like {kind}"
    return _judge(check, is_sound, sentence, evidence, "map them to [0, 1] once", fault=fault)


def constant_images(constant: int, images: int) -> Check:
    sentence = f"{constant} of {images} training images are one flat colour"
    worst: Status = "bad_setup" if constant >= MAX_CONSTANT * images else "warn"
    remedy = "check the loader: nothing can be learned from such images"
    return _judge("data/constant", not constant, sentence, {"constant": constant, "images": images}, remedy, worst)


def mapping(name: str, what: str, identity: float, mixed_up: Mapping[str, float]) -> Check:
    """Two kinds of image that must match. identity: mean square between them; mixed_up: the same after each mix-up."""
    best = min(mixed_up, key=lambda mix_up: mixed_up[mix_up])
    ratio = identity / max(mixed_up[best], 1e-12)
    evidence = {"mean_square": identity, **{f"mean_square_{key}": value for key, value in mixed_up.items()}, "ratio": ratio}
    is_sound = ratio <= MAX_MAPPING_RATIO
    sentence = f"{what} agree (mean square {identity:.2g})" if is_sound else f"{what} match {ratio:.3g}x better if {MIX_UPS[best]}"
    return _judge(f"data/{name}", is_sound, sentence, evidence, "choose one layout of images, and convert them to it once")


def own_partner(name: str, what: str, wins: float, images: int) -> Check:
    """wins: share of the comparisons in which an image is more like its own partner than like another's; chance gives 0.5."""
    check, evidence = f"data/{name}", {"own_wins": wins, "images": images}
    if images < MIN_IMAGES or math.isnan(wins):
        why = "they are all alike" if math.isnan(wins) else f"there are only {images}"
        return Check(check, "unknown", f"{what} cannot be distinguished from others': {why}", evidence)
    sentence = f"{what} are more like their own partner than like another's in {wins:.0%} of the comparisons"
    remedy = "check the order of images, conditions and targets in a batch"
    return _judge(check, wins >= MIN_OWN_WINS, sentence, evidence, remedy, fault="; chance gives 50 %")


def latent_scale(error: float, rescaled: Mapping[float, float], explained: float | None, images: int) -> Check:
    """error: mean square between decoded predictions at low t and their targets; rescaled: the same for latents multiplied by each
    factor. explained: as in `autoencoder`; if it cannot reconstruct these images, the result is uncertain."""
    best = min(rescaled, key=lambda scale: rescaled[scale])
    ratio = error / max(rescaled[best], 1e-12)
    evidence = {"mean_square": error, **{f"mean_square@{scale:g}": value for scale, value in rescaled.items()}, "ratio": ratio}
    if images < MIN_IMAGES:
        return Check("data/latents", "unknown", f"there are only {images} predictions at low t", evidence)
    is_sound = ratio <= MAX_LATENT_RATIO
    better = f"predictions at low t would match their targets {ratio:.3g}x better with latents {best:g}x as large"
    sentence = f"predictions at low t match their targets best at their own scale (mean square {error:.2g})" if is_sound else better
    remedy = "scale latents alike where they are encoded for training, decoded and sampled; t = 0 is clean"
    is_certain = explained is not None and explained >= MIN_EXPLAINED
    return _judge("data/latents", is_sound, sentence, evidence, remedy, "bad_setup" if is_certain else "warn")


def autoencoder(psnr: float, explained: float, correlation: float) -> Check:
    """How well the frozen autoencoder reconstructs the held-out images. explained: share of the variance within images."""
    evidence = {"psnr": psnr, "explained_variance": explained, "correlation": correlation}
    sentence = f"reconstructions have {psnr:.1f} dB and correlate {correlation:.2f} with the held-out images"
    if not correlation >= MIN_RECONSTRUCTION_CORRELATION:
        return Check("data/autoencoder", "bad_setup", sentence, evidence, "check the autoencoder's weights and the images' range")
    fault = f"; a flat colour for each would be closer ({explained:.0%} of the variance is explained)"
    remedy = "the autoencoder was not made for such images: no loss behind it can recover their detail"
    return _judge("data/autoencoder", explained >= MIN_EXPLAINED, sentence, evidence, remedy, "warn", fault=fault)


def left_out(files: Mapping[str, str]) -> Check:
    """files: those that are not used, with the reason."""
    named = "; ".join(f"{name} ({why})" for name, why in list(files.items())[:NAMED_FILES])
    more = f"; and {len(files) - NAMED_FILES} more" if len(files) > NAMED_FILES else ""
    sentence = f"{len(files)} {'file' if len(files) == 1 else 'files'} of the data left out: {named}{more}"
    return Check("data/files", "warn", sentence, {"files": len(files)}, "remove or replace them")


def latent_statistics(mean: Sequence[float], std: Sequence[float]) -> Check:
    """mean, std: of each channel of the training images' latents, as the network gets them."""
    evidence = {"mean": sum(mean) / len(mean), "std_lowest": min(std), "std_highest": max(std)}
    largest, typical = max(mean, key=abs), sorted(std)[len(std) // 2]
    is_sound = STD_RANGE[0] <= min(std) and max(std) <= STD_RANGE[1] and abs(largest) <= MAX_LATENT_MEAN
    spread = f"{min(std):.2g} to {max(std):.2g}"
    sentence = f"latents of the training images have standard deviations from {spread} and means up to {largest:.2g}"
    remedy = (
        f"scaling_factor and shift_factor of the VAE do not suit these images: latents {1 / max(typical, 1e-12):.3g}x as large "
        "would have unit deviation; a denoiser must be trained with the same numbers"
    )
    fault = "; flow matching from unit noise expects about 1 and 0"
    return _judge("latents/statistics", is_sound, sentence, evidence, remedy, "warn", fault=fault)


def overlap(shared: Sequence[int], patches: Sequence[int], held_out: int) -> Check:
    """For each training image, how many of its textured `patches` are `shared` with the held-out images."""
    images = sum(1 for count in shared if count)
    most = max((count / of for count, of in zip(shared, patches, strict=True) if of), default=0.0)
    evidence = {
        "shared_patches": sum(shared), "patches": sum(patches), "images_that_share": images, "largest_share": most,
        "training_images": len(shared), "held_out_images": held_out,
    }  # fmt: skip
    if not sum(patches):
        return Check("data/overlap", "unknown", "the training images have no texture by which to find them again", evidence)
    sentence = f"{images} of {len(shared)} training images have textured patches in common with the {held_out} held-out images"
    if images > FRAME_IMAGES * len(shared) and most < FRAME_SHARE:
        return Check("data/overlap", "warn", f"{sentence}, a few each: a frame or a watermark?", evidence, "crop it away")
    fault = f", up to {most:.0%} of their patches: held-out images are trained on"
    return _judge("data/overlap", not images, sentence, evidence, "split before cropping: by image, or one crop apart", fault=fault)


# -- effects of a training step

MIN_SSIM_COSINE = 0.999
MAX_SSIM_ERROR = 1e-3
MAX_DEVIATION = 0.02
LOOSE_DEVIATION = 0.5  # if the gradient is already wrong: a dropped parameter still shows as a factor of 2 or more
MIN_STEP_COSINE = 0.995
MAX_DECODE_DIFFERENCE = 0.02
MAX_BATCH_DIFFERENCE = 0.01


def near(ratio: float) -> bool:
    return abs(ratio - 1) <= MAX_DEVIATION


def ssim_precision(where: str, *, cosine: float, factor: float, error: float, peak: float) -> Check:
    """SSIM's gradient at the decoded images compared with a float64 reference of the same pair. factor: of its norm; error: of the
    loss; peak: largest element of the reference over its root mean square (SEEDS B5)."""
    evidence = {"cosine": cosine, "factor": factor, "error": error, "peak_over_rms": peak}
    if cosine >= MIN_SSIM_COSINE and abs(error) <= MAX_SSIM_ERROR and near(factor):
        return Check("ssim/precision", "ok", f"SSIM's value and gradient equal those in float64 (cosine {cosine:.7f})", evidence)
    sentence = (
        f"on {where} SSIM is not computed in float32: compared with float64 its gradient has a cosine of {cosine:.3f} and "
        f"{factor:.3g}x the norm, and its value is off by {error:.1e}"
    )
    remedy = "compute SSIM in float32, outside autocast, from images that were never rounded"
    return Check("ssim/precision", "bad_setup", sentence, evidence, remedy)


def step_gradient(part: str, measured: float, expected: float, cosine: float | None, *, random: bool = False) -> Check:
    """total_norm of a real step compared with the gradient of its own forward pass. random: whether that pass differs each time."""
    name = f"gradient/{part}"
    factor = measured / expected if expected > 0 else math.inf
    evidence = {"total_norm": measured, "expected": expected, "factor": factor}
    if cosine is not None:
        evidence["cosine"] = cosine
    if random and not near(factor):
        sentence = f"forward() depends on more than (seed, n), so the {part} gradient cannot be predicted"
        return Check(name, "unknown", sentence, evidence)
    if cosine is not None and not cosine >= MIN_STEP_COSINE:
        sentence = f"compared with its forward pass in float32 the {part} gradient of a step has a cosine of {cosine:.3f} and "
        sentence += f"{factor:.3g}x the norm"
        half = "compute SSIM in float32, outside autocast: half precision does this"
        remedy = half if part == "ssim" else "minimise what is reported, and nothing else"
        return Check(name, "bad_setup", sentence, evidence, remedy)
    expected_only = f"total_norm of a step is {measured:.4g}; the gradient of its {part} loss alone is {expected:.4g}"
    sentence = f"total_norm of a step equals the gradient of its {part} loss ({measured:.4g})" if near(factor) else expected_only
    remedy = "is the loss scaled, added twice or left out of what is minimised?"
    return _judge(name, near(factor), sentence, evidence, remedy)


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
    return _judge(check, is_sound, sentence, evidence | {"factor": factor}, remedy)


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
    return _judge(name, is_sound, seen if is_sound else f"{stated}, but {seen}", evidence, remedy)


def frozen(part: str, *, tensors: int, changed: Sequence[str], with_gradient: Sequence[str], training: Sequence[str]) -> Check:
    """A part that must not learn, after a few real steps. training: BatchNorm and dropout layers left in train mode."""
    evidence = {"tensors": tensors, "changed": len(changed), "with_gradient": len(with_gradient), "in_train_mode": len(training)}
    faults = _list(_some(changed, "changed"), _some(with_gradient, "got a gradient"), _some(training, "are in train mode"))
    sentence = f"{part} must be frozen: {faults}" if faults else f"{part}: no gradient, and the same hash after real steps"
    remedy = f"{part}.requires_grad_(False).eval(), and keep it out of the optimiser"
    return _judge(f"frozen/{part}", not faults, sentence, evidence, remedy)


def decoder(repeat: float, alone: float) -> Check:
    """Largest difference of the decoded images when decoded again, and when decoded one by one."""
    evidence = {"repeat": repeat, "alone": alone}
    sentence = "decoding is repeatable, and independent of the other images in the batch"
    if not repeat <= MAX_DECODE_DIFFERENCE:
        sentence = f"decoding the same latents twice gives images that differ by {repeat:.2g}"
    elif not alone <= MAX_DECODE_DIFFERENCE:
        sentence = f"an image differs by {alone:.2g} when it is decoded without the rest of its batch"
    is_sound = repeat <= MAX_DECODE_DIFFERENCE and alone <= MAX_DECODE_DIFFERENCE
    remedy = "put the decoder into eval mode: dropout is random, BatchNorm mixes the images of a batch"
    return _judge("frozen/decoder", is_sound, sentence, evidence, remedy)


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
    if faults := _list(_some(without_gradient, "get no gradient"), _some(stuck, "do not move")):
        return Check("trained", "bad_setup", f"{of} {faults}", evidence, remedy)
    if too_slow:
        sentence = f"{of} {_some(too_slow, 'do not move: their updates are lost in rounding')}"
        return Check("trained", "warn", sentence, evidence, "raise the learning rate, or keep the weights in a higher precision")
    return Check("trained", "ok", f"all {parameters} trainable parameters get a gradient and move", evidence)


def same_batches(differences: Mapping[str, float]) -> Check:
    """differences: the main loss of step 1 under changed settings, relative to that under the first; the weights are the same."""
    worst = max(differences, key=lambda name: abs(differences[name]))
    largest = abs(differences[worst])
    is_sound = largest <= MAX_BATCH_DIFFERENCE
    other = f"with {worst} step 1 has another batch (its main loss differs by {largest:.1%}): trials cannot be compared"
    sentence = f"step 1 has the same batch under {len(differences)} settings" if is_sound else other
    evidence = {"largest_difference": largest, "settings": len(differences)}
    return _judge("batches", is_sound, sentence, evidence, "draw the random numbers of step n from (seed, n) alone")


def other_seed(is_same_batch: bool) -> Check:
    if is_same_batch:
        sentence = "another seed gives the same batch: repeating a trial with other seeds does not measure the noise"
        return warn("seeds", sentence, "draw the random numbers of step n from (seed, n)")
    return ok("seeds", "another seed gives another batch")


# -- whether the guards can judge

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
    return _judge("gate", is_sure, sentence, evidence, remedy, "warn" if can_be_judged else "bad_setup")


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
    sentence = f"{count} times drawn {'agree' if is_sound else 'do not agree'} with the declared law (p = {probability:.2g})"
    return _judge("time_law", is_sound, sentence, evidence, "declare the law that training draws t from")


def baseline_push(norm: float, main_norm: float, limit: float) -> Check:
    """Medians of total_norm under the baseline's settings and of the main loss alone, on the same steps. limit: the guard's."""
    ratio = norm / main_norm if main_norm > 0 else math.inf
    evidence = {"total_norm": norm, "total_norm_main": main_norm, "ratio": ratio}
    sentence = f"the baseline's total_norm is {ratio:.3g}x that of the main loss alone"
    fault = f": a trial at the norm guard's limit of {limit:g} has {ratio * limit:.3g}x, which the guard does not notice"
    remedy = "lower the baseline's pixel_loss_weight, or rely on the smoke test"
    return _judge("baseline/norm", ratio < limit, sentence, evidence, remedy, "warn", fault=fault)


# -- sentences


def _judge(
    name: str,
    is_sound: bool,
    sentence: str,
    evidence: Mapping[str, float],
    remedy: str,
    otherwise: Status = "bad_setup",
    *,
    fault: str = "",
) -> Check:
    """`ok`, or the status `otherwise` with the remedy, and `fault` added to the sentence."""
    if is_sound:
        return Check(name, "ok", sentence, evidence)
    return Check(name, otherwise, sentence + fault, evidence, remedy)


def _some(names: Sequence[str], words: str) -> str:
    """`3 changed (conv.weight, …)`; empty for none."""
    listed = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
    return f"{len(names)} {words} ({listed})" if names else ""


def _list(*clauses: str) -> str:
    return "; ".join(clause for clause in clauses if clause)


def _short_repr(value: Any) -> str:
    return f"{value:.4g}" if is_number(value) else repr(value)
