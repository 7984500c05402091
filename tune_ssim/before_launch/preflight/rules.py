"""The rules of preflight: measurements at step 0 → verdicts. Numbers in, `Check` out; pure Python.

`bad_setup` means that no setting of the space is to blame and none can help. Every limit lies between the measurements of
sound and of broken set-ups: the figures beside it, sound against broken, are those of `benchmarks/preflight.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune_ssim.before_launch.preflight.report import Check, Status, unknown

LOSS_CE = "loss_ce"  # of a step, where a task has text: cross-entropy of its caption
LABEL_FRACTION = "label_fraction"  # of a step, where a task has text: share of the positions that carry a label


def setup_failed(message: str) -> Check:
    return Check("setup", "bad_setup", message, remedy="nothing can be launched before the task can be set up")


# -- weights

MAX_EMA_DISTANCE = 0.65
MAX_AVERAGE_LOSS_RATIO = 2.5


def weights(
    part: str,
    file: str,
    *,
    equal_fraction: float,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    mismatched: Sequence[str] = (),
    different: Sequence[str] = (),
    norm_parameters: int = 0,
    untrained: int = 0,
    fresh_layers: Sequence[str] = (),
    metadata_missing: bool = False,
    holds: str | None = None,
) -> Check:
    """A network against the file that it must have been loaded from, as `probes.compare_with_file` finds it.

    fresh_layers: those whose weights are spread as an initialisation leaves them. holds: another file that it equals instead.
    """
    name = f"weights/{part}"
    evidence = {
        "equal_fraction": equal_fraction,
        "missing": len(missing),
        "unexpected": len(unexpected),
        "mismatched": len(mismatched),
        "different": len(different),
        "norm_parameters": norm_parameters,
        "untrained_norm_parameters": untrained,
        "fresh_layers": len(fresh_layers),
        "metadata_missing": float(metadata_missing),
    }
    is_untrained = norm_parameters > 0 and untrained == norm_parameters
    faults = _list(
        _some(missing, f"not in {file}"),
        _some(unexpected, f"of {file} not used"),
        _some(mismatched, f"of another shape than in {file}"),
        _some(different, f"with other values than in {file}"),
    )
    if faults:
        also = f"; it holds {holds} instead" if holds else ", and it looks like a fresh initialisation" if is_untrained else ""
        sentence = f"{equal_fraction:.1%} of the numbers are the file's{also}: {faults}"
        return Check(name, "bad_setup", sentence, evidence, f"load {file} strictly, and leave the weights alone after that")
    if fresh_layers:
        sentence = f"all tensors are those of {file}, {_some(fresh_layers, 'of them as a fresh initialisation leaves them')}"
        return Check(name, "bad_setup", sentence, evidence, "was the file written by a network that had not been loaded itself?")
    trained = f", trained ({norm_parameters - untrained} of {norm_parameters} normalisation parameters)" if norm_parameters else ""
    sentence = f"all tensors are those of {file}{trained}"
    if is_untrained:  # a network whose norms were frozen all along looks like this too
        return Check(name, "warn", sentence, evidence, "is this the file of a trained network?")
    if metadata_missing:  # SEEDS B2
        sentence += "; the file does not say its format"
        return Check(name, "warn", sentence, evidence, 'save it with metadata={"format": "pt"}: some loaders refuse it without')
    return Check(name, "ok", sentence, evidence)


def fresh_weights(part: str) -> Check:
    return unknown(f"weights/{part}", "starts from no file: there is nothing to compare with")


def ema_distance(part: str, of: str, distance: float) -> Check:
    """distance: norm(EMA − raw) / norm(raw) over all parameters of one architecture."""
    sentence = f"{part} is {distance:.3g} of the weights' norm away from {of}"
    is_sound = distance <= MAX_EMA_DISTANCE
    sentence += "" if is_sound else ": an average of another model"
    return _judge(f"weights/{part}~{of}", is_sound, sentence, {"distance": distance}, "take both files from the same training")


def smoke(kind: str, findings: Sequence[str], statistics: Mapping[str, float]) -> Check:
    """The smoke test on the starting weights; `findings`: the sentences of SmokeTest."""
    name = f"smoke/{kind}"
    if not statistics:
        return unknown(name, "the samples have nothing by which they could be judged")
    if not findings:
        return Check(name, "ok", f"samples of the {kind} weights pass", statistics)
    sentence = f"the {kind} weights are ruined before the first update: {'; '.join(findings[:3])}"
    remedy = "check which weights were loaded, and that images and latents are in the range that the model expects"
    return Check(name, "bad_setup", sentence, statistics, remedy)


def baseline_samples(findings: Sequence[str], steps: int) -> Check:
    """The smoke test after the first steps of the baseline; one that fails and later passes has recovered."""
    remedy = "lower the learning rate or the baseline's pixel_loss_weight"
    words = f"{steps} steps of the baseline ruin the samples: {'; '.join(findings)}"
    sentence = words if findings else f"samples pass after {steps} steps of the baseline"
    return _judge("baseline/smoke", not findings, sentence, {"steps": steps}, remedy)


# -- losses

MAX_LOSS_RATIO = 0.8
MIN_FIRST_CE = 0.1  # SEEDS D2: below it the positions of the question are labelled too
MAX_CE_OF_UNIFORM = 0.9  # FACTS §5: with its weights 0.05 of ln V, without them 0.92 to 1


def main_loss(loss: float, trivial: float) -> Check:
    """trivial: what the best constant prediction of the velocity would have."""
    ratio = loss / trivial if trivial > 0 else math.inf
    evidence = {"loss": loss, "trivial_loss": trivial, "ratio": ratio}
    sentence = f"the main loss is {loss:.3g}, {ratio:.2f}x that of a predictor that knows nothing"
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
    is_sound = loss >= MIN_FIRST_CE
    sentence += "" if is_sound else f", below {MIN_FIRST_CE}: the model sees what it is asked for"
    return _judge("loss/text", is_sound, sentence, evidence, mask)


@dataclass(frozen=True)
class Fingerprint:
    """First-step metrics of a known training, with its weights and without them."""

    healthy: float
    ruined: float

    @property
    def limit(self) -> float:
        return math.sqrt(self.healthy * self.ruined)


# By model, under the names of its own log; a task that records all of a model's names is taken for it. (FACTS §5)
FINGERPRINTS = {
    "BAGEL": {
        "mse": Fingerprint(0.41, 2.0),  # ruined: the wrong, small model
        "ce": Fingerprint(0.55, 11.0),  # ruined: weights not loaded, near ln V
    }
}


def fingerprints(metrics: Mapping[str, float]) -> list[Check]:
    """The first step's metrics against those of known trainings."""
    found = []
    for model, marks in FINGERPRINTS.items():
        for metric, mark in marks.items() if marks.keys() <= metrics.keys() else ():
            value = metrics[metric]
            evidence = {metric: value, "healthy": mark.healthy, "ruined": mark.ruined}
            words = f"{metric} is {value:.3g}; {model} starts at {mark.healthy} with its weights and at {mark.ruined} without"
            found.append(_judge(f"loss/{metric}", value < mark.limit, words, evidence, "check which weights were loaded"))
    return found


def tokens(ids: int, outside: int, smallest: int, largest: int, vocabulary_size: int) -> Check:
    """Generated token ids: how many, and how many of them lie outside the vocabulary (SEEDS B1: such an id decodes to None)."""
    evidence = {"ids": ids, "outside": outside, "smallest": smallest, "largest": largest, "vocabulary_size": vocabulary_size}
    sentence = f"of {ids} generated token ids {outside} lie outside the vocabulary [0, {vocabulary_size}): {smallest} to {largest}"
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
        sentence = f"{non_finite} of {images} {label} have pixels that are not finite"
        return Check(check, "bad_setup", sentence, evidence, "repair or drop them")
    is_sound = lowest >= -RANGE_SLACK and highest <= 1 + RANGE_SLACK
    kind = "[0, 255]" if highest > 2 else "[-1, 1]" if lowest < -0.5 else "neither [0, 1] nor [-1, 1]"
    sentence = f"{images} {label} lie in [{lowest:.3g}, {highest:.3g}]"
    sentence += "" if is_sound else f"; [0, 1] is expected, this looks like {kind}"
    return _judge(check, is_sound, sentence, evidence, "map them to [0, 1] once")


def constant_images(constant: int, images: int) -> Check:
    sentence = f"{constant} of {images} training images are one flat colour"
    remedy = "check the loader: such images teach nothing"
    worst: Status = "bad_setup" if constant >= MAX_CONSTANT * images else "warn"
    return _judge("data/constant", not constant, sentence, {"constant": constant, "images": images}, remedy, worst)


def mapping(name: str, what: str, identity: float, mixed_up: Mapping[str, float]) -> Check:
    """Two kinds of image that must match. identity: mean square between them; mixed_up: the same after each mix-up."""
    best = min(mixed_up, key=lambda mix_up: mixed_up[mix_up])
    ratio = identity / max(mixed_up[best], 1e-12)
    evidence = {"mean_square": identity, **{f"mean_square_{key}": value for key, value in mixed_up.items()}, "ratio": ratio}
    is_sound = ratio <= MAX_MAPPING_RATIO
    sentence = f"{what} agree (mean square {identity:.2g})" if is_sound else f"{what} fit {ratio:.3g}x better if {MIX_UPS[best]}"
    return _judge(f"data/{name}", is_sound, sentence, evidence, "decide once how images are laid out, and map them there")


def own_partner(name: str, what: str, wins: float, images: int) -> Check:
    """wins: share of the comparisons in which an image is more like its own partner than like another's; chance gives 0.5."""
    check, evidence = f"data/{name}", {"own_wins": wins, "images": images}
    if images < MIN_IMAGES or math.isnan(wins):
        why = "they are all alike" if math.isnan(wins) else f"there are only {images}"
        return Check(check, "unknown", f"{what} cannot be distinguished from others': {why}", evidence)
    is_sound = wins >= MIN_OWN_WINS
    sentence = f"{what} are more like their own partner than like another's in {wins:.0%} of the comparisons"
    sentence += "" if is_sound else "; chance gives 50 %"
    return _judge(check, is_sound, sentence, evidence, "check the order of images, conditions and targets in a batch")


def latent_scale(error: float, rescaled: Mapping[float, float], explained: float | None, images: int) -> Check:
    """error: mean square between decoded predictions at low t and their targets; rescaled: the same of latents that many times
    as large. explained: as in `autoencoder`; one that cannot give these images back says nothing certain."""
    best = min(rescaled, key=lambda scale: rescaled[scale])
    ratio = error / max(rescaled[best], 1e-12)
    evidence = {"mean_square": error, **{f"mean_square@{scale:g}": value for scale, value in rescaled.items()}, "ratio": ratio}
    if images < MIN_IMAGES:
        return Check("data/latents", "unknown", f"there are only {images} predictions at low t", evidence)
    is_sound = ratio <= MAX_LATENT_RATIO
    sentence = f"predictions at low t fit their targets best as they are (mean square {error:.2g})"
    sentence = (
        sentence
        if is_sound
        else f"predictions at low t would fit their targets {ratio:.3g}x better with latents {best:g}x as large"
    )
    remedy = "scale latents alike where they are encoded for training, decoded and sampled; t = 0 is clean"
    certain = explained is not None and explained >= MIN_EXPLAINED
    return _judge("data/latents", is_sound, sentence, evidence, remedy, "bad_setup" if certain else "warn")


def autoencoder(psnr: float, explained: float, correlation: float) -> Check:
    """How well the frozen autoencoder reconstructs the held-out images. explained: share of the variance within images."""
    evidence = {"psnr": psnr, "explained_variance": explained, "correlation": correlation}
    sentence = f"reconstructions have {psnr:.1f} dB and correlate {correlation:.2f} with the held-out images"
    if not correlation >= MIN_RECONSTRUCTION_CORRELATION:
        return Check("data/autoencoder", "bad_setup", sentence, evidence, "check the autoencoder's weights and the images' range")
    is_good = explained >= MIN_EXPLAINED
    sentence += "" if is_good else f"; one flat colour each would be nearer ({explained:.0%} of the variance is explained)"
    remedy = "the autoencoder was not made for such images: no loss behind it can reach their detail"
    return _judge("data/autoencoder", is_good, sentence, evidence, remedy, "warn")


def left_out(files: Mapping[str, str]) -> Check:
    """files: those that are not used, with the reason."""
    named = "; ".join(f"{name} ({why})" for name, why in list(files.items())[:NAMED_FILES])
    more = f"; and {len(files) - NAMED_FILES} more" if len(files) > NAMED_FILES else ""
    sentence = f"{len(files)} {'file' if len(files) == 1 else 'files'} of the data left out: {named}{more}"
    return Check("data/files", "warn", sentence, {"files": len(files)}, "remove them, or replace them by sound ones")


def latent_statistics(mean: Sequence[float], std: Sequence[float]) -> Check:
    """mean, std: of each channel of the training images' latents, as the network gets them."""
    evidence = {"mean": sum(mean) / len(mean), "std_lowest": min(std), "std_highest": max(std)}
    largest = max(mean, key=abs)
    spread = f"{min(std):.2g} to {max(std):.2g}"
    sentence = f"latents of the training images have standard deviations from {spread} and means up to {largest:.2g}"
    is_sound = STD_RANGE[0] <= min(std) and max(std) <= STD_RANGE[1] and abs(largest) <= MAX_LATENT_MEAN
    typical = sorted(std)[len(std) // 2]
    sentence += "" if is_sound else "; flow matching from unit noise expects about 1 and 0"
    remedy = f"scaling_factor and shift_factor of the VAE do not suit these images: latents {1 / max(typical, 1e-12):.3g}x as large"
    remedy += " would have unit deviation; a denoiser must be trained with the same numbers"
    return _judge("latents/statistics", is_sound, sentence, evidence, remedy, "warn")


def overlap(shared: Sequence[int], patches: Sequence[int], held_out: int) -> Check:
    """For each training image, how many of its textured `patches` are `shared` with the held-out images."""
    images = sum(1 for count in shared if count)
    most = max((count / of for count, of in zip(shared, patches, strict=True) if of), default=0.0)
    evidence = {
        "shared_patches": sum(shared), "patches": sum(patches), "images_that_share": images, "largest_share": most,
        "training_images": len(shared), "held_out_images": held_out,
    }  # fmt: skip
    if not sum(patches):
        return Check("data/overlap", "unknown", "the training images have no texture by which they could be found again", evidence)
    sentence = f"{images} of {len(shared)} training images have textured patches in common with the {held_out} held-out images"
    if images > FRAME_IMAGES * len(shared) and most < FRAME_SHARE:
        return Check("data/overlap", "warn", f"{sentence}, each a few: a frame or a watermark?", evidence, "crop it away")
    sentence += f", up to {most:.0%} of their patches: what is held out is trained on" if images else ""
    return _judge("data/overlap", not images, sentence, evidence, "split before cropping: by image, or with a gap of one crop")


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
    """SSIM's gradient at the decoded images against a float64 reference of the same pair. factor: of its norm; error: of the
    loss; peak: largest element of the reference over its root mean square (SEEDS B5)."""
    evidence = {"cosine": cosine, "factor": factor, "error": error, "peak_over_rms": peak}
    if cosine >= MIN_SSIM_COSINE and abs(error) <= MAX_SSIM_ERROR and near(factor):
        return Check("ssim/precision", "ok", f"SSIM's value and gradient are those of float64 (cosine {cosine:.7f})", evidence)
    sentence = (
        f"on {where} SSIM is not computed in float32: its gradient has a cosine of {cosine:.3f} to that of float64 and "
        f"{factor:.3g}x its norm, its value is off by {error:.1e}"
    )
    remedy = "compute SSIM in float32, outside autocast, from images that were never rounded"
    return Check("ssim/precision", "bad_setup", sentence, evidence, remedy)


def step_gradient(part: str, measured: float, expected: float, cosine: float | None, *, random: bool = False) -> Check:
    """total_norm of a real step against the gradient of its own forward pass. random: whether that pass differs each time."""
    name = f"gradient/{part}"
    factor = measured / expected if expected > 0 else math.inf
    evidence = {"total_norm": measured, "expected": expected, "factor": factor}
    if cosine is not None:
        evidence["cosine"] = cosine
    if random and not near(factor):
        return Check(name, "unknown", f"forward() depends on more than (seed, n): no {part} gradient can be expected", evidence)
    if cosine is not None and not cosine >= MIN_STEP_COSINE:
        measures = f"a cosine of {cosine:.3f} to that of its forward pass in float32 and {factor:.3g}x its norm"
        half = "compute SSIM in float32, outside autocast: half precision does this"
        remedy = half if part == "ssim" else "minimise what is reported, and nothing else"
        return Check(name, "bad_setup", f"the {part} gradient of a step has {measures}", evidence, remedy)
    sentence = f"total_norm of a step is {measured:.4g}; with its {part} loss alone behind it, it would be {expected:.4g}"
    words = f"total_norm of a step is what its {part} loss gives ({measured:.4g})"
    remedy = "is the loss scaled, added twice or left out of what is minimised?"
    return _judge(name, near(factor), words if near(factor) else sentence, evidence, remedy)


def parameter(
    name: str, asked: Any, in_force: Any, factor: float | None = None, response: str = "", slack: float = MAX_DEVIATION
) -> Check:
    """A requested parameter: the value that effective() reports, and its measured effect.

    factor: effect measured over effect expected of a change of this parameter; 1 if it acts as it should."""
    evidence = {key: float(value) for key, value in (("asked", asked), ("in_force", in_force)) if _is_number(value)}
    check, remedy = f"parameter/{name}", f"follow {name} from the configuration to the line that uses it"
    if not same(asked, in_force):
        sentence = f"{name} was set to {_short_repr(asked)} but {_short_repr(in_force)} is in force: it does not reach the training"
        return Check(check, "bad_setup", sentence, evidence, remedy)
    reported = f"effective() reports {name} {_short_repr(in_force)}, as asked"
    if factor is None:
        return Check(check, "unknown", f"{reported}; its effect cannot be measured here", evidence)
    is_sound = abs(factor - 1) <= slack
    sentence = f"{name} acts as it should" if is_sound else f"{reported}, but it does not act so: {response}"
    return _judge(check, is_sound, sentence, evidence | {"factor": factor}, remedy)


def clipping(limit: float | None, before: float, after: float, expected: float | None) -> Check:
    """before: the recorded total_norm; after: of the gradients that the optimiser saw; expected: by the forward pass."""
    known = {"total_norm": before, "after": after, "max_grad_norm": limit, "expected": expected}
    evidence = {key: value for key, value in known.items() if value is not None}
    name, target = "parameter/max_grad_norm", before if limit is None else min(before, limit)
    if not math.isfinite(before):
        return Check(name, "unknown", f"total_norm is {before:.4g}: its clipping cannot be checked", evidence)
    if limit is not None and expected is not None and expected > (1 + LOOSE_DEVIATION) * limit and before <= 1.01 * limit:
        sentence = f"total_norm is recorded after clipping at {limit:g}: {before:.4g}, while the gradient has {expected:.4g}"
        remedy = "record what clip_grad_norm_ returns: the norm guard is blind otherwise"
        return Check(name, "bad_setup", sentence, evidence, remedy)
    sees = f"of a total_norm of {before:.4g} the optimiser sees {after:.4g}"
    is_sound = abs(after - target) <= MAX_DEVIATION * target
    stated = "no clipping is in force" if limit is None else f"max_grad_norm {limit:g} is in force"
    remedy = "follow max_grad_norm from the configuration to the call that clips"
    return _judge(name, is_sound, sees if is_sound else f"{stated}, but {sees}", evidence, remedy)


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
    if not repeat <= MAX_DECODE_DIFFERENCE:
        sentence = f"decoding the same latents twice gives images that differ by {repeat:.2g}"
    elif not alone <= MAX_DECODE_DIFFERENCE:
        sentence = f"an image differs by {alone:.2g} when it is decoded without the rest of its batch"
    else:
        return Check("frozen/decoder", "ok", "decoding is repeatable and keeps images apart", evidence)
    remedy = "put the decoder into eval mode: dropout is random, BatchNorm mixes the images of a batch"
    return Check("frozen/decoder", "bad_setup", sentence, evidence, remedy)


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
        sentence = f"{of} {_some(too_slow, 'do not move: rounding swallows updates this small')}"
        return Check("trained", "warn", sentence, evidence, "raise the learning rate, or keep the weights in a finer precision")
    return Check("trained", "ok", f"all {parameters} trainable parameters get a gradient and move", evidence)


def untrained_part(part: str) -> Check:
    sentence = f"{part} is to be trained, and none of its parameters is among the trainable ones"
    return Check(f"trained/{part}", "bad_setup", sentence, {}, "check trainable_parameters() and the optimiser's list")


def same_batches(differences: Mapping[str, float]) -> Check:
    """differences: the main loss of step 1 under changed settings, relative to that under the first; the weights are the same."""
    worst = max(differences, key=lambda name: abs(differences[name]))
    largest = abs(differences[worst])
    is_sound = largest <= MAX_BATCH_DIFFERENCE
    other = f"with {worst} step 1 has another batch (main loss {largest:.1%} apart): trials cannot be compared"
    sentence = f"step 1 has the same batch under {len(differences)} settings" if is_sound else other
    evidence = {"largest_difference": largest, "settings": len(differences)}
    return _judge("batches", is_sound, sentence, evidence, "draw the random numbers of step n from (seed, n) alone")


def other_seed(is_same_batch: bool) -> Check:
    same_words = "another seed gives the same batch: repeating a trial with other seeds says nothing about the noise"
    sentence = same_words if is_same_batch else "another seed gives another batch"
    return _judge("seeds", not is_same_batch, sentence, {}, "draw the random numbers of step n from (seed, n)", "warn")


def misspelt_key(is_accepted: bool, key: str) -> Check:
    accepts = f"the task accepts the unknown setting {key!r}: a misspelt parameter would be lost without a word"
    sentence = accepts if is_accepted else "the task refuses a setting that it does not know"
    return _judge("parameter/unknown", not is_accepted, sentence, {}, "refuse unknown keys in setup() with a ValueError", "warn")


# -- whether the guards can judge

MIN_CHANCE = 0.95  # probability of enough active steps for a verdict
MIN_LAW_PROBABILITY = 1e-6


def gates(probabilities: Mapping[float, float], steps: int, needed: int) -> Check:
    """probabilities: for each max_t that may be launched, P(a step is active)."""
    expected = {max_t: steps * p for max_t, p in sorted(probabilities.items())}
    evidence = {f"active_steps@{max_t:g}": count for max_t, count in expected.items()} | {"steps": steps, "needed": needed}
    words = ", ".join(f"{count:.3g} at max_t {max_t:g}" for max_t, count in expected.items())
    sentence = f"of {steps} steps these are expected to have an SSIM gradient: {words}; a verdict needs {needed}"
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
    is_sound = ratio < limit
    sentence = f"the baseline's total_norm is {ratio:.3g}x that of the main loss alone"
    sentence += "" if is_sound else f": a trial at the norm guard's limit of {limit:g} pushes {ratio * limit:.3g}x, it is blind"
    remedy = "lower the baseline's pixel_loss_weight, or rely on the smoke test"
    evidence = {"total_norm": norm, "total_norm_main": main_norm, "ratio": ratio}
    return _judge("baseline/norm", is_sound, sentence, evidence, remedy, "warn")


# -- sentences


def same(asked: Any, found: Any) -> bool:
    if _is_number(asked) and _is_number(found):
        return math.isclose(asked, found, rel_tol=1e-6)
    return bool(asked == found)


def _judge(
    name: str, is_sound: bool, sentence: str, evidence: Mapping[str, float], remedy: str, otherwise: Status = "bad_setup"
) -> Check:
    return Check(name, "ok" if is_sound else otherwise, sentence, evidence, "" if is_sound else remedy)


def _some(names: Sequence[str], words: str) -> str:
    """`3 changed (conv.weight, …)`; empty for none."""
    listed = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
    return f"{len(names)} {words} ({listed})" if names else ""


def _list(*clauses: str) -> str:
    return "; ".join(clause for clause in clauses if clause)


def _short_repr(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else repr(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
