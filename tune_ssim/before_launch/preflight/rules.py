"""The rules of preflight: measurements at step 0 → verdicts. Numbers in, `Check` out; pure Python.

`bad_setup` means that no setting of the space is to blame and none can help. Every limit lies between the measurements of
sound and of broken set-ups that `benchmarks/preflight.py` takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tune_ssim.before_launch.preflight.report import Check, Status, judge, listed, some, unknown

if TYPE_CHECKING:
    from tune_ssim.probes import WeightComparison

LOSS_CE = "loss_ce"  # of a step, if a task has text: cross-entropy of its caption
LABEL_FRACTION = "label_fraction"  # of a step, if a task has text: share of the positions that carry a label


# -- weights

MAX_EMA_DISTANCE = 0.65
MAX_AVERAGE_LOSS_RATIO = 2.5
MAX_LEVELS = 16  # of 4 bits; trained weights hardly repeat a value


def weights(
    part: str,
    file: str,
    found: WeightComparison,
    fresh_layers: Sequence[str] = (),
    holds: str | None = None,
    zeroed_layers: Sequence[str] = (),
    coarse_layers: Sequence[str] = (),
) -> Check:
    """A network compared with the file that it must have been loaded from.

    fresh_layers: those whose weights are distributed as after initialisation; zeroed_layers: those whose weights are zero although
    their bias is not; coarse_layers: those whose weights have a few values only. holds: another file that it equals instead.
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
        "zeroed_layers": len(zeroed_layers),
        "coarse_layers": len(coarse_layers),
        "metadata_missing": float(found.metadata_missing),
    }
    faults = listed(
        some(found.missing, f"not in {file}"),
        some(found.unexpected, f"of {file} not used"),
        some([f"{tensor}: {shapes}" for tensor, shapes in found.mismatched.items()], f"of another shape than in {file}"),
        some(found.different, f"with other values than in {file}"),
    )
    if faults:
        also = f"; it holds {holds} instead" if holds else ", and it looks freshly initialised" if found.fresh else ""
        sentence = f"{found.equal_fraction:.1%} of the numbers equal the file's{also}: {faults}"
        return Check(name, "bad_setup", sentence, evidence, f"load {file} strictly, and do not change the weights after that")
    sentence = f"all tensors equal those of {file}"
    if fresh_layers:
        sentence += f", {some(fresh_layers, 'of them look freshly initialised')}"
        return Check(
            name,
            "bad_setup",
            sentence,
            evidence,
            "check that the file was saved from a trained network, not from a freshly initialised one",
        )
    if zeroed_layers:
        sentence += f", {some(zeroed_layers, 'of them are zero although their bias is not')}"
        return Check(name, "bad_setup", sentence, evidence, "write the file again, from a network that was not changed")
    if coarse_layers:
        sentence += f", {some(coarse_layers, f'of them have at most {MAX_LEVELS} different values')}"
        return Check(name, "bad_setup", sentence, evidence, "use the file from before the weights were quantised")
    if found.fresh:  # also true of a network whose norms were always frozen
        return Check(name, "warn", sentence, evidence, "is this the file of a trained network?")
    sentence += f", trained ({norms - untrained} of {norms} normalisation parameters)" if norms else ""
    remedy = 'save it with metadata={"format": "pt"}: some loaders refuse it without'  # SEEDS B2
    return judge(name, not found.metadata_missing, sentence, evidence, remedy, "warn", fault="; the file does not name its format")


def ema_distance(part: str, of: str, distance: float) -> Check:
    """distance: norm(EMA − raw) / norm(raw) over all parameters of one architecture."""
    sentence, fault = f"the distance of {part} from {of} is {distance:.3g} of the weights' norm", ": an average of another model"
    evidence, remedy = {"distance": distance}, "take both files from the same training"
    return judge(f"weights/{part}~{of}", distance <= MAX_EMA_DISTANCE, sentence, evidence, remedy, fault=fault)


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


def samples(again: float, distances: Mapping[str, float], floor: float | None) -> Check:
    """Root mean squares: again: between samples of the same weights and noise; distances: between samples and what they are
    compared with; floor: between reconstructions and references, where that is the best an autoencoder can do."""
    evidence = {"again": again, **{f"from_{name}": value for name, value in distances.items()}}
    if floor is not None:
        evidence["floor"] = floor
    name = "sampling/repeatable"
    if not again <= MAX_SAMPLE_DIFFERENCE:
        sentence = f"sample() gives other images each time: they differ by {again:.2g} (root mean square)"
        return Check(name, "bad_setup", sentence, evidence, "draw its noise from a fixed seed, and switch dropout off")
    limits = {
        "references": max(GREY_LEVEL / 4, MIN_FROM_REFERENCES * (floor or 0.0)),
        "reconstructions": MIN_FROM_RECONSTRUCTIONS * (floor or 0.0),
    }
    for of, value in distances.items():
        if value < limits[of]:
            sentence = f"samples differ by only {value:.2g} (root mean square) from the {of}: no model generated them"
            return Check("sampling/generated", "bad_setup", sentence, evidence, "return what the network generates from noise")
    return Check(name, "ok", "samples repeat, and are no copies of the references", evidence)


def samples_follow(is_so: bool) -> Check:
    remedy = "sample with the weights that are trained: not with a copy of them, nor with images kept from an earlier call"
    sentence = "samples change with the weights" if is_so else "samples stay the same, bit for bit, when the weights change"
    return judge("sampling/weights", is_so, sentence, {}, remedy)


def baseline_samples(findings: Sequence[str], steps: int) -> Check:
    """The smoke test after the first steps of the baseline; one that fails and later passes has recovered."""
    ruined = f"{steps} steps of the baseline ruin the samples: {'; '.join(findings)}"
    sentence = ruined if findings else f"samples pass after {steps} steps of the baseline"
    remedy = "lower the learning rate or the baseline's pixel_loss_weight"
    return judge("baseline/smoke", not findings, sentence, {"steps": steps}, remedy)


GREY_LEVEL = 1 / 255
MAX_SAMPLE_DIFFERENCE = GREY_LEVEL / 4  # 0 in sound set-ups on a CPU; 0.011 with new noise, 0.002 with dropout
# Distance of samples over that between reconstructions and references. From the references 1.09 and more in sound set-ups, 1 of
# reconstructions; from the reconstructions 0.26 and more; 0 of copies.
MIN_FROM_REFERENCES, MIN_FROM_RECONSTRUCTIONS = 0.7, 0.1

MAX_SAMPLE_ERROR = 10.0  # 2 in theory, 0.85 to 4.0 in sound set-ups; 640 and more of broken ones

# -- losses

MAX_LOSS_RATIO = 0.8
MAX_TIME_RATIO = 1.25  # with dropout up to 1.02 in sound set-ups, from 2.0 if the network is told a constant
MAX_SIGN_RATIO = 3.0  # up to 1.3 on images that the autoencoder was not trained on, or with an untrained network; else 0.24
MAX_Z0_DISTANCE = 2.0  # 1 for an untrained network, 4 with the wrong sign
MIN_FIRST_CE = 0.1  # SEEDS D2: below it the positions of the question are labelled too
MAX_CE_OF_UNIFORM = 0.9  # FACTS §5: with its weights 0.05 of ln V, without them 0.92 to 1


def main_loss(loss: float, trivial: float) -> Check:
    """trivial: the loss of the best constant prediction of the velocity."""
    ratio = loss / trivial if trivial > 0 else math.inf
    evidence = {"loss": loss, "trivial_loss": trivial, "ratio": ratio}
    sentence = f"the main loss is {loss:.3g}, {ratio:.2f}x that of the best constant prediction"
    remedy = "check the weights, the latents' scale, the range of the images and that each sample meets its own condition"
    return judge("loss/main", ratio < MAX_LOSS_RATIO, sentence, evidence, remedy)


def prediction(error: float, mended: float, distance: float | None) -> Check:
    """error, mended: mean squares between decoded predictions and their targets, as they are and with the velocity's sign changed.
    distance: of z0 from the clean latent over that of z_t, squared; None if the clean latent is not shown."""
    ratio = error / max(mended, 1e-12)
    evidence = {"mean_square": error, "mean_square_mended": mended, "ratio": ratio}
    if distance is not None:
        evidence["distance"] = distance
    sentence, is_sound = "z0 is made with the velocity's sign, and is near the clean latent", True
    if not ratio <= MAX_SIGN_RATIO:
        sentence, is_sound = f"z0 matches its target {ratio:.3g}x better if the velocity's sign is changed", False
    elif distance is not None and not distance <= MAX_Z0_DISTANCE:
        sentence, is_sound = f"z0 is {distance**0.5:.3g}x as far from the clean latent as the noisy latent is", False
    remedy = "with t = 0 clean and velocity = noise - latent: z0 = z_t - t * velocity"
    return judge("flow/z0", is_sound, sentence, evidence, remedy)


def told_time(loss: float, others: Mapping[str, float]) -> Check:
    """loss: main loss with the time that the network is told; others: with other times."""
    best = min(others, key=lambda name: others[name])
    ratio = loss / max(others[best], 1e-12)
    evidence = {"loss": loss, **{f"loss@{name}": value for name, value in others.items()}, "ratio": ratio}
    is_sound = ratio <= MAX_TIME_RATIO
    sentence = "the network predicts best with the time that it is told"
    wrong = f"the main loss is {ratio:.3g}x lower if the network is told {best}"
    remedy = "tell the network the same time, in the same units, in training, in inference and when it was pretrained"
    return judge("flow/time", is_sound, sentence if is_sound else wrong, evidence, remedy)


def kernels(loss: float, others: Mapping[str, float], trivial: float) -> Check:
    """loss: main loss with the network's kernels; others: with changed ones; trivial: of the best constant prediction."""
    best = min(others, key=lambda name: others[name])
    ratio = loss / max(others[best], 1e-12)
    evidence = {"loss": loss, **{f"loss@{name}": value for name, value in others.items()}, "trivial": trivial, "ratio": ratio}
    is_sound = ratio <= MAX_TIME_RATIO or not others[best] < MAX_LOSS_RATIO * trivial  # no better than chance in either way
    sentence = (
        "the network predicts best with its kernels as they are" if is_sound else f"kernels {best} predict {ratio:.3g}x better"
    )
    remedy = "convert the kernels to the layout [out, in, height, width]"
    return judge("weights/kernels", is_sound, sentence, evidence, remedy)


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
    return judge("loss/text", loss >= MIN_FIRST_CE, sentence, evidence, mask, fault=fault)


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
            found.append(judge(f"loss/{metric}", is_sound, sentence, evidence, "check which weights were loaded"))
    return found


def tokens(ids: int, outside: int, smallest: int, largest: int, vocabulary_size: int) -> Check:
    """Generated token ids: how many, and how many of them lie outside the vocabulary (SEEDS B1: such an id decodes to None)."""
    evidence = {"ids": ids, "outside": outside, "smallest": smallest, "largest": largest, "vocabulary_size": vocabulary_size}
    sentence = f"{outside} of {ids} generated token ids are outside the vocabulary [0, {vocabulary_size}): {smallest} to {largest}"
    return judge("text/tokens", not outside, sentence, evidence, "match tokenizer, vocabulary and the model's output layer")


# -- images

RANGE_SLACK = 0.01  # resampling overshoots [0, 1] a little; the known mix-ups by 1 and more
# Share of the images: 0 in most sound set-ups, 0.01 in crops of photographs with a flat sky or an empty border.
FEW_CONSTANT, MAX_CONSTANT = 0.05, 0.5
MAX_MAPPING_RATIO = 1.5
MIN_IMAGES = 8  # with fewer pairs no decision is possible
MIN_OWN_WINS = 0.8
MAX_LATENT_RATIO = 1.0
MIN_RECONSTRUCTION_CORRELATION = 0.3
MIN_EXPLAINED = 0.0
# Detail of targets: correlation with that of the images that they must show. Equal images 1; predictions through the bundled
# autoencoder 0.27 to 0.46, and up to 1.07x more at another place; one pixel aside of the training images 1.75x more, four of
# predictions 1.35x. Less is a matter of chance.
MIN_TARGET_CORRELATION, MIN_SHIFT_RATIO = 0.2, 1.2
# Energy of fine detail, over that of predictions 1.8 to 70; 0.64 if targets are enlarged and 0.36 if blurred. Over that of the
# training images 1, 0.06 and 0.03.
MIN_DETAIL = {"training images": 0.5, "predictions at low t": 0.8}
MAX_RAW_SHARE, MAX_RAW_PUSH = 0.5, 1.0  # half of the push, and as hard as the main loss
MAX_ROUND_TRIP = 0.1  # 0 of the autoencoder's own output, 0.8 and more of anything else
NAMED_FILES = 20  # files named in a sentence
# Of a channel of latents. Bundled VAE on its own photograph: deviations 0.88 to 0.95, means up to 0.12; on tissue sections, which
# it was not trained on, 1.7 to 2.7 and 5.6.
STD_RANGE, MAX_LATENT_MEAN = (1 / 3, 3.0), 2.0
# Disjoint crops of seven photographs, of 24 to 96 pixels, agree by chance up to 7.7 standard errors. Of images of the same crops,
# darker, with another gamma, as JPEG, with noise or half a pixel aside, the best of 32 agrees by 9.5 to 82.
MAX_CHANCE_AGREEMENT, MAX_OF_ONE = 8.6, 12.0  # standard errors of two images, or of one
FRAME_IMAGES, FRAME_SHARE = 0.5, 0.5  # a few patches shared by most images are a frame or a watermark, not an overlap

MIX_UPS = {
    "half": "[0, 1] is taken for [-1, 1]",
    "double": "[-1, 1] is taken for [0, 1]",
    "inverted": "light and dark are exchanged",
    "linear": "the first are in linear light, the second in sRGB",
    "encoded": "the first are in sRGB, the second in linear light",
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
    return judge(check, is_sound, sentence, evidence, "map them to [0, 1] once", fault=fault)


def distinct_references(distinct: int, images: int) -> Check:
    sentence = f"{distinct} of the {images} held-out images are different ones"
    worst: Status = "bad_setup" if 2 * distinct <= images else "warn"
    remedy = "check the sampler of the held-out images: metrics over copies are those of fewer images"
    return judge(
        "data/held_out",
        images - distinct <= max(1, FEW_CONSTANT * images),
        sentence,
        {"distinct": distinct, "images": images},
        remedy,
        worst,
    )


def constant_images(constant: int, images: int) -> Check:
    sentence = f"{constant} of {images} training images are one flat colour"
    worst: Status = "bad_setup" if constant >= MAX_CONSTANT * images else "warn"
    remedy = "check the loader: nothing can be learned from such images"
    return judge(
        "data/constant", constant <= FEW_CONSTANT * images, sentence, {"constant": constant, "images": images}, remedy, worst
    )


def mapping(name: str, what: str, identity: float, mixed_up: Mapping[str, float]) -> Check:
    """Two kinds of image that must match. identity: mean square between them; mixed_up: the same after each mix-up."""
    best = min(mixed_up, key=lambda mix_up: mixed_up[mix_up])
    ratio = identity / max(mixed_up[best], 1e-12)
    evidence = {"mean_square": identity, **{f"mean_square_{key}": value for key, value in mixed_up.items()}, "ratio": ratio}
    is_sound = ratio <= MAX_MAPPING_RATIO
    sentence = f"{what} agree (mean square {identity:.2g})" if is_sound else f"{what} match {ratio:.3g}x better if {MIX_UPS[best]}"
    return judge(f"data/{name}", is_sound, sentence, evidence, "choose one layout of images, and convert them to it once")


def sample_error(samples: float, one_step: float) -> Check:
    """Mean squares over the variance of the references: of samples, and of what the network predicts in one step near t = 1. A
    sample of the right distribution has twice the error of the best prediction (its variance once more)."""
    ratio = samples / max(one_step, 1e-12)
    sentence = f"samples are {ratio:.2g}x as far (mean square) from their references as one-step predictions near t = 1 are"
    evidence, fault = {"samples": samples, "one_step": one_step, "ratio": ratio}, ": inference is not what is trained"
    remedy = "give the network in inference what it gets in training: condition, range, time, and the same formula for z0"
    return judge("sampling/error", ratio <= MAX_SAMPLE_ERROR, sentence, evidence, remedy, fault=fault)


def own_partner(name: str, what: str, wins: float, images: int) -> Check:
    """wins: share of the comparisons in which an image is more like its own partner than like another's; chance gives 0.5."""
    check, evidence = f"data/{name}", {"own_wins": wins, "images": images}
    if images < MIN_IMAGES or math.isnan(wins):
        why = "they are all alike" if math.isnan(wins) else f"there are only {images}"
        return Check(check, "unknown", f"{what} cannot be distinguished from others': {why}", evidence)
    sentence = f"{what} are more like their own partner than like another's in {wins:.0%} of the comparisons"
    remedy = "check the order of images, conditions and targets in a batch"
    return judge(check, wins >= MIN_OWN_WINS, sentence, evidence, remedy, fault="; chance gives 50 %")


def draws(differing: Sequence[str], shared: Sequence[str], repeated: bool = False) -> Check:
    """differing: what one step draws differently when it is repeated; shared: what two steps draw alike. repeated: whether all
    images of a batch are the same, which may be on purpose."""
    evidence = {"differing": len(differing), "shared": len(shared)}
    remedy = "draw the random numbers of step n from (seed, n), and nothing else"
    if differing:
        sentence = f"step 1 has other {' and other '.join(differing)} each time: trials and baseline cannot see the same"
        return Check("data/steps", "bad_setup", sentence, evidence, remedy)
    if repeated and not shared:
        sentence = "all images of a batch are the same: a step learns from one image"
        return Check("data/steps", "warn", sentence, evidence, "draw each image of a batch anew, unless this is on purpose")
    sentence = "each step has its own images, noise and t, the same each time"
    fault = f"two of the first steps have the same {' and '.join(shared)}"
    return judge("data/steps", not shared, fault if shared else sentence, evidence, remedy)


def target_shift(of: str, rows: int, columns: int, best: float, here: float) -> Check:
    """Shift of the targets against the images called `of` that their details tell; best, here: correlations with and without."""
    evidence = {"rows": rows, "columns": columns, "correlation": here, "best_correlation": best, "ratio": best / max(here, 1e-3)}
    is_exact = of == "training images"
    is_far = is_exact or max(abs(rows), abs(columns)) > 1  # an autoencoder may shift by a pixel
    is_sound = not (rows or columns) or not is_far or best < MIN_TARGET_CORRELATION or evidence["ratio"] < MIN_SHIFT_RATIO
    shift = f"{abs(rows)} rows {'down' if rows > 0 else 'up'} and {abs(columns)} columns {'right' if columns > 0 else 'left'}"
    sentence = f"targets lie on the {of}" if is_sound else f"targets match the {of} best if they are moved back by {shift}"
    remedy = "cut the crop and the target of the image losses at one place"
    return judge("targets/shift", is_sound, sentence, evidence, remedy)


def target_sharpness(of: str, detail: float, round_trip: float | None = None) -> Check:
    """detail: fine detail of the targets over that of the images called `of`. round_trip: mean square between the targets and what
    the autoencoder makes of those images, over what it loses of them; 0 if the targets are its output."""
    evidence = {"detail": detail} if round_trip is None else {"detail": detail, "round_trip": round_trip}
    is_sound = detail >= MIN_DETAIL[of] or (round_trip is not None and round_trip < MAX_ROUND_TRIP)
    sentence = f"targets have {detail:.2g}x the fine detail of the {of}"
    remedy = "take the targets from the images at full resolution, before any blur"
    return judge("targets/sharpness", is_sound, sentence, evidence, remedy, fault=": are they blurred, or enlarged?")


def target_difference(difference: float, round_trip: float | None) -> Check:
    """difference: root mean square between targets and training images; round_trip: as in `target_sharpness`."""
    is_sound = difference <= GREY_LEVEL or (round_trip is not None and round_trip < MAX_ROUND_TRIP)
    sentence = f"targets differ from the training images by {difference:.2g} (root mean square)"
    remedy = "take the targets from the images that are encoded, unless they are changed on purpose"
    return judge(
        "targets/equal",
        is_sound,
        sentence,
        {"difference": difference},
        remedy,
        "warn",
        fault=": neither they nor the autoencoder's output",
    )


def round_trip(target: str, share: float, push: float) -> Check:
    """target: of the image losses. share: SSIM gradient against raw targets at a perfect prediction, over that at the prediction.
    push: gradient of the baseline's pixel loss at a perfect prediction, over that of the main loss."""
    evidence = {"share": share, "push": push}
    left = f"at a perfect prediction SSIM against raw targets keeps {share:.2g}x its gradient"
    fits = "roundtrip" if share > MAX_RAW_SHARE else "raw"
    why = "most of it would undo what the autoencoder loses" if fits == "roundtrip" else "the autoencoder loses little"
    sentence = f"{left}: {why}; `target: {target}` is in force, `{fits}` follows the main loss"
    remedy = "set target: roundtrip, or lower the baseline's pixel_loss_weight"
    fault = f"; the baseline's pixel loss pulls there {push:.2g}x as hard as the main loss"
    return judge("targets/round_trip", target != "raw" or push <= MAX_RAW_PUSH, sentence, evidence, remedy, "warn", fault=fault)


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
    return judge("data/latents", is_sound, sentence, evidence, remedy, "bad_setup" if is_certain else "warn")


def autoencoder(psnr: float, explained: float, correlation: float) -> Check:
    """How well the frozen autoencoder reconstructs the held-out images. explained: share of the variance within images."""
    evidence = {"psnr": psnr, "explained_variance": explained, "correlation": correlation}
    sentence = f"reconstructions have {psnr:.1f} dB and correlate {correlation:.2f} with the held-out images"
    if not correlation >= MIN_RECONSTRUCTION_CORRELATION:
        return Check("data/autoencoder", "bad_setup", sentence, evidence, "check the autoencoder's weights and the images' range")
    fault = f"; a flat colour for each would be closer ({explained:.0%} of the variance is explained)"
    remedy = "the autoencoder was not made for such images: no loss behind it can recover their detail"
    return judge("data/autoencoder", explained >= MIN_EXPLAINED, sentence, evidence, remedy, "warn", fault=fault)


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
    return judge("latents/statistics", is_sound, sentence, evidence, remedy, "warn", fault=fault)


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
    return judge("data/overlap", not images, sentence, evidence, "split before cropping: by image, or one crop apart", fault=fault)


def altered_overlap(scores: Sequence[float], held_out: int) -> Check:
    """scores: of held-out images, standard errors by which they agree with a training image around their most similar patch."""
    copies, best = sum(score > MAX_CHANCE_AGREEMENT for score in scores), max(scores, default=0.0)
    sentence = f"{copies} of {held_out} held-out images show the same as a training image, altered"
    remedy = "split before cropping and before any other processing: by image, or one crop apart"
    is_sound = copies < 2 and best <= MAX_OF_ONE
    # One match may be chance: crops of 32 x 24 pixels of one photograph gave one of 12.6.
    worst: Status = "bad_setup" if copies > 1 else "warn"
    return judge("data/overlap_altered", is_sound, sentence, {"copies": copies, "best_score": best}, remedy, worst)
