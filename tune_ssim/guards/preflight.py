"""Is the set-up sound? What preflight measures at step 0, as verdicts: numbers in, `Check` out. Pure Python.

`bad_setup` means that no setting of the space is to blame and none can help. Every limit below stands between what sound
and what broken set-ups measure; the figures behind it are those of `benchmarks/preflight.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "unknown", "warn", "bad_setup"]
SEVERITY: tuple[Status, ...] = ("ok", "unknown", "warn", "bad_setup")


@dataclass(frozen=True)
class Check:
    """One verdict. name: `subject` or `subject/part`. evidence: the numbers behind the sentence."""

    name: str
    status: Status
    sentence: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All checks of one set-up, in the order in which one would look for a cause."""

    checks: tuple[Check, ...]
    seconds: float = math.nan

    @property
    def status(self) -> Status:
        """The worst; `unknown` only where nothing at all is known."""
        known = [check.status for check in self.checks if check.status != "unknown"]
        return max(known, key=SEVERITY.index, default="unknown")

    @property
    def reason(self) -> str:
        """The first of the worst checks in one line; empty if all is well."""
        if self.status not in ("warn", "bad_setup"):
            return ""
        check = next(check for check in self.checks if check.status == self.status)
        return f"{check.name}: {check.sentence}"

    def of(self, status: Status) -> list[Check]:
        return [check for check in self.checks if check.status == status]

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "reason": self.reason,
            "seconds": self.seconds,
            "checks": [asdict(check) | {"evidence": dict(check.evidence)} for check in self.checks],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`, also after JSON that spells NaN and Infinity as text."""
        checks = tuple(
            Check(**{**check, "evidence": {name: float(value) for name, value in check["evidence"].items()}})
            for check in data["checks"]
        )
        return cls(checks, float(data["seconds"]))


def unknown(name: str, why: str) -> Check:
    return Check(name, "unknown", why)


def setup_failed(message: str) -> Check:
    return Check("setup", "bad_setup", message, remedy="nothing can be launched before the task can be set up")


# -- weights


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
    """A network against the file that it must have been loaded from. holds: another file of the task that it equals instead."""
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
    fresh = norm_parameters > 0 and untrained == norm_parameters
    faults = [
        _some(missing, f"not in {file}"),
        _some(unexpected, f"of {file} not used"),
        _some(mismatched, f"of another shape than in {file}"),
        _some(different, f"with other values than in {file}"),
    ]
    if any(faults):
        what = "; ".join(fault for fault in faults if fault)
        also = f"; it holds {holds} instead" if holds else ", and it looks like a fresh initialisation" if fresh else ""
        sentence = f"{equal_fraction:.1%} of the numbers are the file's{also}: {what}"
        return Check(
            name, "bad_setup", sentence, evidence, f"load {file} strictly, after the network is built and before anything else"
        )
    if fresh_layers:
        sentence = f"all tensors are those of {file}, {_some(fresh_layers, 'of them as a fresh initialisation leaves them')}"
        return Check(name, "bad_setup", sentence, evidence, "was the file written by a network that had not been loaded itself?")
    if fresh:
        sentence = f"all tensors are those of {file}, and not one of {norm_parameters} normalisation parameters was ever trained"
        return Check(name, "warn", sentence, evidence, "is this the file of a trained network?")
    trained = f", trained ({norm_parameters - untrained} of {norm_parameters} normalisation parameters)" if norm_parameters else ""
    if metadata_missing:
        sentence = f"all tensors are those of {file}{trained}; the file does not say its format"
        return Check(name, "warn", sentence, evidence, 'save it with metadata={"format": "pt"}: some loaders refuse it without')
    return Check(name, "ok", f"all tensors are those of {file}{trained}", evidence)


def fresh_weights(part: str) -> Check:
    return Check(f"weights/{part}", "unknown", "starts from no file: there is nothing to compare with")


# Distance between averaged and raw weights over the norm of the raw ones.
MAX_EMA_DISTANCE = 0.65
MAX_AVERAGE_LOSS_RATIO = 2.5


def ema_distance(part: str, of: str, distance: float) -> Check:
    """distance: norm(EMA − raw) / norm(raw) over all parameters of one architecture."""
    name, evidence = f"weights/{part}~{of}", {"distance": distance}
    if not distance <= MAX_EMA_DISTANCE:
        sentence = f"{part} is {distance:.2f} of the weights' norm away from {of}: an average of another model"
        return Check(name, "bad_setup", sentence, evidence, "take both files from the same training")
    return Check(name, "ok", f"{part} is {distance:.3f} of the weights' norm away from {of}", evidence)


def smoke(kind: str, findings: Sequence[str], statistics: Mapping[str, float]) -> Check:
    """The smoke test on the starting weights; `findings` are SmokeTest's words for what is on the wrong side."""
    name = f"smoke/{kind}"
    if findings:
        sentence = f"the {kind} weights are ruined before the first update: {'; '.join(findings[:3])}"
        remedy = "check which weights were loaded, and that images and latents are in the range that the model expects"
        return Check(name, "bad_setup", sentence, statistics, remedy)
    if not statistics:
        return unknown(name, "the samples have nothing by which they could be judged")
    return Check(name, "ok", f"samples of the {kind} weights pass", statistics)


# -- losses

# Main loss over that of the best constant prediction (mean of four or eight batches).
MAX_LOSS_RATIO = 0.9
LOSS_CE, LABEL_FRACTION = (
    "loss_ce",
    "label_fraction",
)  # of a step, where a task has text: cross-entropy; share of labelled positions
MIN_FIRST_CE = 0.1  # SEEDS D2: below it at the first step the question's positions are labelled too
MAX_CE_OF_UNIFORM = 0.9


def main_loss(loss: float, trivial: float) -> Check:
    """trivial: what the best constant prediction of the velocity would have."""
    ratio = loss / trivial if trivial > 0 else math.inf
    evidence = {"loss": loss, "trivial_loss": trivial, "ratio": ratio}
    if not ratio < MAX_LOSS_RATIO:
        sentence = f"the main loss is {loss:.3g}, {ratio:.2f}x that of a predictor that knows nothing"
        remedy = "check the weights, the latents' scale, the range of the images and that each sample meets its own condition"
        return Check("loss/main", "bad_setup", sentence, evidence, remedy)
    return Check("loss/main", "ok", f"the main loss is {loss:.3g}, {ratio:.2f}x that of a predictor that knows nothing", evidence)


def caption_loss(loss: float, vocabulary_size: int | None, label_fraction: float | None) -> Check:
    """The first cross-entropy of a task with text (SEEDS D2), and the share of positions that carry a label."""
    evidence: dict[str, float] = {"loss_ce": loss}
    if vocabulary_size:
        evidence["uniform_loss"] = math.log(vocabulary_size)
    if label_fraction is not None:
        evidence["label_fraction"] = label_fraction
    mask = "set the labels of visual and question positions to -100"
    if label_fraction is not None and not 0 < label_fraction < 1:
        which = "every position carries a label" if label_fraction >= 1 else "no position carries a label"
        return Check("loss/text", "bad_setup", f"{which}: the mask of the labels is wrong", evidence, mask)
    if vocabulary_size and not loss < MAX_CE_OF_UNIFORM * math.log(vocabulary_size):
        sentence = (
            f"the first cross-entropy is {loss:.3g}; guessing among {vocabulary_size} tokens gives {math.log(vocabulary_size):.3g}"
        )
        return Check("loss/text", "bad_setup", sentence, evidence, "check that the language model's weights were loaded")
    if not loss >= MIN_FIRST_CE:
        sentence = f"the first cross-entropy is {loss:.3g}, below {MIN_FIRST_CE}: the model sees what it is asked for"
        return Check("loss/text", "bad_setup", sentence, evidence, mask)
    return Check("loss/text", "ok", f"the first cross-entropy is {loss:.3g}", evidence)


@dataclass(frozen=True)
class Fingerprint:
    """What a known training logs at its first step: with its weights, and without them."""

    healthy: float
    ruined: float
    source: str

    @property
    def limit(self) -> float:
        return math.sqrt(self.healthy * self.ruined)


# By model and the names of its own log. A task whose steps record all the names of one is taken for it.
FINGERPRINTS: Mapping[str, Mapping[str, Fingerprint]] = {
    "BAGEL": {
        "mse": Fingerprint(0.41, 2.0, "FACTS §5: a wrong small model"),
        "ce": Fingerprint(0.55, 11.0, "FACTS §5: weights not loaded, near ln V"),
    }
}


def fingerprints(metrics: Mapping[str, float]) -> list[Check]:
    """The first step's metrics against those of known trainings."""
    found = []
    for model, known in FINGERPRINTS.items():
        if not known.keys() <= metrics.keys():
            continue
        for metric, mark in known.items():
            value = metrics[metric]
            evidence = {metric: value, "healthy": mark.healthy, "ruined": mark.ruined}
            words = f"{metric} is {value:.3g}; {model} starts at {mark.healthy} with its weights and at {mark.ruined} without"
            bad = not value < mark.limit
            found.append(Check(f"loss/{metric}", "bad_setup" if bad else "ok", words, evidence, "check the weights" if bad else ""))
    return found


def tokens(ids: int, below: int, above: int, smallest: int, largest: int, vocabulary_size: int) -> Check:
    """Generated token ids; `below` 0 and `above` the vocabulary are counts (SEEDS B1: such an id decodes to None)."""
    evidence = {"ids": ids, "outside": below + above, "smallest": smallest, "largest": largest, "vocabulary_size": vocabulary_size}
    if below + above:
        lie = f"lie outside the vocabulary [0, {vocabulary_size}): {smallest} to {largest}"
        sentence = f"{below + above} of {ids} generated token ids {lie}"
        return Check("text/tokens", "bad_setup", sentence, evidence, "match tokenizer, vocabulary and the model's output layer")
    return Check("text/tokens", "ok", f"all {ids} generated token ids lie in the vocabulary of {vocabulary_size}", evidence)


# -- images

RANGE_SLACK = 0.01  # beyond [0, 1]: resampling overshoots; the mix-ups overshoot by 1 and more


def image_range(name: str, lowest: float, highest: float, non_finite: int, images: int) -> Check:
    """Of the images called `name`, which must lie in [0, 1]."""
    check, evidence = f"data/{name}", {"min": lowest, "max": highest, "non_finite_images": non_finite, "images": images}
    if non_finite:
        sentence = f"{non_finite} of {images} {name.replace('_', ' ')} have pixels that are not finite"
        return Check(check, "bad_setup", sentence, evidence, "find and repair or drop them")
    if lowest < -RANGE_SLACK or highest > 1 + RANGE_SLACK:
        kind = "[0, 255]" if highest > 2 else "[-1, 1]" if lowest < -0.5 else "neither [0, 1] nor [-1, 1]"
        sentence = f"{name.replace('_', ' ')} lie in [{lowest:.3g}, {highest:.3g}]; [0, 1] is expected, this looks like {kind}"
        return Check(check, "bad_setup", sentence, evidence, "map them to [0, 1] once")
    return Check(check, "ok", f"{images} {name.replace('_', ' ')} lie in [{lowest:.3g}, {highest:.3g}]", evidence)


MAX_CONSTANT = 0.5


def constant_images(constant: int, images: int) -> Check:
    evidence = {"constant": constant, "images": images}
    sentence = f"{constant} of {images} training images are one flat colour"
    remedy = "check the loader: such images teach nothing, and SSIM's gradient is largest on them"
    if constant > MAX_CONSTANT * images:
        return Check("data/constant", "bad_setup", sentence, evidence, remedy)
    if constant:
        return Check("data/constant", "warn", sentence, evidence, remedy)
    return Check("data/constant", "ok", f"none of {images} training images is one flat colour", evidence)


MAX_MAPPING_RATIO = 1.5
MAPPINGS = {
    "half": "[0, 1] is taken for [-1, 1]",
    "double": "[-1, 1] is taken for [0, 1]",
    "inverted": "light and dark are exchanged",
    "channels": "the colour channels are in reverse order",
    "mirrored": "one of them is mirrored",
    "upside_down": "one of them is upside down",
}


def mapping(name: str, what: str, identity: float, others: Mapping[str, float]) -> Check:
    """Two kinds of image that must show the same. identity: mean square between them; others: the same after a known mix-up."""
    best = min(others, key=lambda mix_up: others[mix_up])
    ratio = identity / max(others[best], 1e-12)
    evidence = {"mean_square": identity, **{f"mean_square_{mix_up}": value for mix_up, value in others.items()}, "ratio": ratio}
    if not ratio <= MAX_MAPPING_RATIO:
        sentence = f"{what} fit {ratio:.3g}x better if {MAPPINGS[best]}"
        return Check(f"data/{name}", "bad_setup", sentence, evidence, "say once in which range images are, and map them there")
    return Check(f"data/{name}", "ok", f"{what} agree (mean square {identity:.2g})", evidence)


MIN_OWN_WINS = 0.75
LEAST_IMAGES = 8


def own_partner(name: str, what: str, wins: float, images: int) -> Check:
    """wins: share of the comparisons in which an image is more like its own partner than like another's; chance gives 0.5."""
    check, evidence = f"data/{name}", {"own_wins": wins, "images": images}
    if images < LEAST_IMAGES or math.isnan(wins):
        why = "they are all alike" if math.isnan(wins) else f"there are only {images}"
        return Check(check, "unknown", f"{what} cannot be told from others': {why}", evidence)
    words = f"{what} are more like their own partner than like another's in {wins:.0%} of the comparisons"
    if wins < MIN_OWN_WINS:
        remedy = "check the order of images, conditions and targets in a batch"
        return Check(check, "bad_setup", f"{words}; chance gives 50 %", evidence, remedy)
    return Check(check, "ok", words, evidence)


MAX_PREDICTION_ERROR = 3.5


def prediction_error(predictions: tuple[float, float], reconstructions: tuple[float, float], images: int) -> Check:
    """Of predictions at low t against their targets, and of reconstructions against their references: the mean square, and its
    share of the images' variance. Both are one pass through the decoder away from the truth."""
    ratios = [a / b if b > 0 else math.inf for a, b in zip(predictions, reconstructions, strict=True)]
    evidence = {"ratio": ratios[0], "ratio_of_variance_shares": ratios[1], "images": images}
    if images < LEAST_IMAGES:
        return Check("data/latents", "unknown", f"there are only {images} predictions at low t", evidence)
    words = f"predictions at low t are {min(ratios):.3g}x as far from their targets as reconstructions from theirs"
    if not min(ratios) <= MAX_PREDICTION_ERROR:
        remedy = "scale and shift latents alike where they are encoded for training, decoded and sampled"
        return Check("data/latents", "bad_setup", words, evidence, remedy)
    return Check("data/latents", "ok", words, evidence)


MIN_RECONSTRUCTION_CORRELATION = 0.3
MIN_EXPLAINED = 0.0


def autoencoder(psnr: float, explained: float, correlation: float) -> Check:
    """How well the frozen autoencoder gives the held-out images back. explained: share of the variance within images."""
    evidence = {"psnr": psnr, "explained_variance": explained, "correlation": correlation}
    words = f"reconstructions have {psnr:.1f} dB and correlate {correlation:.2f} with the held-out images"
    if not correlation >= MIN_RECONSTRUCTION_CORRELATION:
        return Check(
            "data/autoencoder", "bad_setup", words, evidence, "check the autoencoder's weights and the range of the images"
        )
    if not explained >= MIN_EXPLAINED:
        sentence = f"{words}; they explain {explained:.0%} of the variance within images"
        remedy = "the autoencoder was not made for such images: no loss behind it can reach their detail"
        return Check("data/autoencoder", "warn", sentence, evidence, remedy)
    return Check("data/autoencoder", "ok", words, evidence)


WATERMARK_IMAGES, WATERMARK_SHARE = 0.5, 0.5


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
    words = f"{images} of {len(shared)} training images have textured patches in common with the {held_out} held-out images"
    if images > WATERMARK_IMAGES * len(shared) and most < WATERMARK_SHARE:
        return Check("data/overlap", "warn", f"{words}, each a few: a watermark or a frame?", evidence, "crop it away")
    if images:
        sentence = f"{words}, up to {most:.0%} of their patches: what is held out is trained on"
        return Check("data/overlap", "bad_setup", sentence, evidence, "split before cropping, by image or with a gap of one crop")
    return Check("data/overlap", "ok", words, evidence)


# -- what a training step really does


MIN_SSIM_COSINE = 0.999
MAX_SSIM_ERROR = 1e-3
MAX_DEVIATION = 0.02
LOOSE_DEVIATION = 0.5
MIN_STEP_COSINE = 0.995


def near(ratio: float) -> bool:
    return abs(ratio - 1) <= MAX_DEVIATION


def ssim_precision(where: str, *, cosine: float, factor: float, error: float, peak: float) -> Check:
    """SSIM's gradient at the decoded images against a float64 reference of the same pair. factor: of its norm; error: of the
    loss; peak: largest element of the reference over its root mean square (SEEDS B5)."""
    evidence = {"cosine": cosine, "factor": factor, "error": error, "peak_over_rms": peak}
    if not (cosine >= MIN_SSIM_COSINE and abs(error) <= MAX_SSIM_ERROR and near(factor)):
        sentence = (
            f"on {where} SSIM is not computed in float32: its gradient has a cosine of {cosine:.3f} to that of float64 and "
            f"{factor:.3g}x its norm, its value is off by {error:.1e}"
        )
        remedy = "compute SSIM in float32, outside autocast, from images that were never rounded"
        return Check("ssim/precision", "bad_setup", sentence, evidence, remedy)
    return Check("ssim/precision", "ok", f"SSIM's value and gradient are those of float64 (cosine {cosine:.7f})", evidence)


def step_gradient(part: str, measured: float, expected: float, cosine: float | None, *, random: bool = False) -> Check:
    """total_norm of a real step against the gradient of its own forward pass. random: that pass comes out otherwise each time."""
    name = f"gradient/{part}"
    factor = measured / expected if expected > 0 else math.inf
    evidence = {"total_norm": measured, "expected": expected, "factor": factor}
    if cosine is not None:
        evidence["cosine"] = cosine
    if random and not near(factor):
        return Check(
            name, "unknown", f"forward() is random beyond (seed, n): a step's {part} gradient cannot be expected", evidence
        )
    if cosine is not None and not cosine >= MIN_STEP_COSINE:
        measures = f"a cosine of {cosine:.3f} to that of its forward pass in float32 and {factor:.3g}x its norm"
        half = "compute SSIM in float32, outside autocast: half precision does this"
        remedy = half if part == "ssim" else "minimise what is reported, and nothing else"
        return Check(name, "bad_setup", f"the {part} gradient of a step has {measures}", evidence, remedy)
    if not near(factor):
        sentence = (
            f"total_norm of a step is {measured:.4g}; the {part} loss of its forward pass gives {expected:.4g}, {factor:.3g}x less"
        )
        sentence = sentence if factor > 1 else sentence.replace(f"{factor:.3g}x less", "more")
        return Check(name, "bad_setup", sentence, evidence, "is the loss scaled, added twice or left out of what is minimised?")
    return Check(name, "ok", f"total_norm of a step is what its {part} loss gives ({measured:.4g})", evidence)


def parameter(
    name: str, asked: Any, in_force: Any, factor: float | None = None, response: str = "", slack: float = MAX_DEVIATION
) -> Check:
    """A parameter that was asked for: what the loss says it uses, and what using it does.

    factor: effect measured over effect expected of a change of this parameter, 1 where it acts as it should."""
    evidence = {key: float(value) for key, value in (("asked", asked), ("in_force", in_force)) if _is_number(value)}
    if factor is not None:
        evidence["factor"] = factor
    check = f"parameter/{name}"
    remedy = f"follow {name} from the configuration to the line that uses it"
    if not same(asked, in_force):
        sentence = f"{name} was set to {_value(asked)} but {_value(in_force)} is in force: it does not reach the training"
        return Check(check, "bad_setup", sentence, evidence, remedy)
    if factor is None:
        return Check(
            check, "unknown", f"{name} is said to be {_value(in_force)}, as asked; no effect of it can be seen here", evidence
        )
    if not abs(factor - 1) <= slack:
        sentence = f"{name} is said to be {_value(in_force)}, as asked, but does not act so: {response}"
        return Check(check, "bad_setup", sentence, evidence, remedy)
    return Check(check, "ok", f"{name} acts as it should", evidence)


def clipping(limit: float | None, before: float, after: float, expected: float | None) -> Check:
    """before: the recorded total_norm; after: of the gradients that the optimiser saw; expected: by the forward pass."""
    name = "parameter/max_grad_norm"
    evidence = {"total_norm": before, "after": after}
    if limit is not None:
        evidence["max_grad_norm"] = limit
    if expected is not None:
        evidence["expected"] = expected
    target = before if limit is None else min(before, limit)
    is_clipped_before = limit is not None and expected is not None and expected > 1.2 * limit and before <= 1.01 * limit
    if is_clipped_before:
        sentence = f"total_norm is recorded after clipping at {limit:g}: {before:.4g}, while the gradient has {expected:.4g}"
        return Check(
            name, "bad_setup", sentence, evidence, "record what clip_grad_norm_ returns: the norm guard is blind otherwise"
        )
    if not abs(after - target) <= MAX_DEVIATION * target:
        said = "no clipping is in force" if limit is None else f"max_grad_norm {limit:g} is in force"
        sentence = f"{said}, but of a total_norm of {before:.4g} the optimiser sees {after:.4g}"
        return Check(name, "bad_setup", sentence, evidence, "follow max_grad_norm from the configuration to the call that clips")
    return Check(name, "ok", f"of a total_norm of {before:.4g} the optimiser sees {after:.4g}", evidence)


def frozen(part: str, *, tensors: int, changed: Sequence[str], with_gradient: Sequence[str], training: Sequence[str]) -> Check:
    """A part that must not learn, after a few real steps. training: BatchNorm and dropout layers left in train mode."""
    name = f"frozen/{part}"
    evidence = {"tensors": tensors, "changed": len(changed), "with_gradient": len(with_gradient), "in_train_mode": len(training)}
    faults = [_some(changed, "changed"), _some(with_gradient, "got a gradient"), _some(training, "are in train mode")]
    if any(faults):
        sentence = f"{part} must be frozen: {'; '.join(fault for fault in faults if fault)}"
        return Check(
            name, "bad_setup", sentence, evidence, f"{part}.requires_grad_(False).eval(), and keep it out of the optimiser"
        )
    return Check(name, "ok", f"{part}: no gradient, and the same hash after real steps", evidence)


def trained(
    *, parameters: int, still: Sequence[str], too_slow: Sequence[str], without_gradient: Sequence[str], learning_rate: float | None
) -> Check:
    """What should learn, after a few real steps: every parameter gets a gradient and moves. too_slow: those of `still` that would
    move at a larger learning rate."""
    stuck = [name for name in still if name not in set(too_slow)]
    evidence = {"parameters": parameters, "still": len(still), "too_slow": len(too_slow), "without_gradient": len(without_gradient)}
    remedy = "check requires_grad, the optimiser's parameter list and the learning rate"
    if learning_rate == 0:
        return Check("trained", "warn", "the learning rate is 0: nothing can learn", evidence, remedy)
    faults = [_some(without_gradient, "get no gradient"), _some(stuck, "do not move")]
    if any(faults):
        return Check(
            "trained", "bad_setup", f"of {parameters} trainable parameters {'; '.join(f for f in faults if f)}", evidence, remedy
        )
    if too_slow:
        sentence = f"of {parameters} trainable parameters {_some(too_slow, 'do not move: rounding swallows updates this small')}"
        return Check("trained", "warn", sentence, evidence, "raise the learning rate, or keep the weights in a finer precision")
    return Check("trained", "ok", f"all {parameters} trainable parameters get a gradient and move", evidence)


def decoder(repeat: float, alone: float) -> Check:
    """Largest difference of the decoded images when decoded again, and when decoded one by one."""
    evidence = {"repeat": repeat, "alone": alone}
    remedy = "put the decoder into eval mode: dropout is random, BatchNorm mixes the images of a batch"
    if not repeat <= MAX_DECODE_DIFFERENCE:
        sentence = f"decoding the same latents twice gives images that differ by {repeat:.2g}"
        return Check("frozen/decoder", "bad_setup", sentence, evidence, remedy)
    if not alone <= MAX_DECODE_DIFFERENCE:
        sentence = f"an image differs by {alone:.2g} when it is decoded without the rest of its batch"
        return Check("frozen/decoder", "bad_setup", sentence, evidence, remedy)
    return Check("frozen/decoder", "ok", "decoding is repeatable and keeps images apart", evidence)


MAX_DECODE_DIFFERENCE = 0.02


MAX_BATCH_DIFFERENCE = 0.01


def same_batches(differences: Mapping[str, float]) -> Check:
    """differences: the main loss of step 1 under changed settings, relative to that under the first; the weights are the same."""
    worst = max(differences, key=lambda name: abs(differences[name]))
    largest = abs(differences[worst])
    evidence = {"largest_difference": largest, "settings": len(differences)}
    if not largest <= MAX_BATCH_DIFFERENCE:
        sentence = f"with {worst} step 1 has another batch (main loss {largest:.1%} apart): trials cannot be compared"
        return Check("batches", "bad_setup", sentence, evidence, "draw the random numbers of step n from (seed, n) alone")
    return Check("batches", "ok", f"step 1 has the same batch under {len(differences)} settings", evidence)


def other_seed(same_batch: bool) -> Check:
    if same_batch:
        sentence = "another seed gives the same batch: repeating a trial with other seeds says nothing about the noise"
        return Check("seeds", "warn", sentence, {}, "draw the random numbers of step n from (seed, n)")
    return Check("seeds", "ok", "another seed gives another batch")


def misspelt_key(accepted: bool, key: str) -> Check:
    if accepted:
        sentence = f"the task accepts the unknown setting {key!r}: a misspelt parameter would be lost without a word"
        return Check("parameter/unknown", "warn", sentence, {}, "refuse unknown keys in setup() with a ValueError")
    return Check("parameter/unknown", "ok", "the task refuses a setting that it does not know")


# -- can the guards judge?


def gates(probabilities: Mapping[float, float], steps: int, needed: int) -> Check:
    """probabilities: for each max_t that may be launched, P(a step is active)."""
    expected = {max_t: steps * p for max_t, p in probabilities.items()}
    evidence = {f"active_steps@{max_t:g}": count for max_t, count in sorted(expected.items())} | {"steps": steps, "needed": needed}
    shy = sorted(max_t for max_t, p in probabilities.items() if chance_of_at_least(needed, steps, p) < MIN_CHANCE)
    never = sorted(max_t for max_t, count in expected.items() if count < needed)
    words = ", ".join(f"{count:.3g} at max_t {max_t:g}" for max_t, count in sorted(expected.items()))
    remedy = "train longer, raise ssim_loss_max_t or the batch size"
    if len(never) == len(expected):
        sentence = f"of {steps} steps these are expected to have an SSIM gradient: {words}; a verdict needs {needed}"
        return Check("gate", "bad_setup", sentence, evidence, remedy)
    if shy:
        sentence = f"of {steps} steps these are expected to have an SSIM gradient: {words}; a verdict needs {needed}"
        return Check("gate", "warn", sentence, evidence, remedy)
    return Check("gate", "ok", f"expected steps with an SSIM gradient: {words}; a verdict needs {needed}", evidence)


MIN_CHANCE = 0.95


def chance_of_at_least(needed: int, steps: int, p: float) -> float:
    """P(at least `needed` of `steps` steps are active), each with probability `p`."""
    if p <= 0:
        return float(needed <= 0)
    if p >= 1:
        return float(needed <= steps)
    logs = (
        math.lgamma(steps + 1) - math.lgamma(k + 1) - math.lgamma(steps - k + 1) + k * math.log(p) + (steps - k) * math.log1p(-p)
        for k in range(min(needed, steps + 1))
    )
    return max(0.0, 1.0 - math.fsum(math.exp(log) for log in logs))


def law_of_t(distance: float, count: int) -> Check:
    """Kolmogorov-Smirnov distance of the times that were drawn to the law that the task declares."""
    probability = min(1.0, 2 * math.exp(-2 * count * distance**2))  # an upper bound (Dvoretzky-Kiefer-Wolfowitz, Massart 1990)
    evidence = {"distance": distance, "p_value": probability, "times": count}
    if not probability >= MIN_LAW_PROBABILITY:
        sentence = f"{count} times drawn are not those of the declared law (distance {distance:.2f}, p = {probability:.1g})"
        return Check("time_law", "bad_setup", sentence, evidence, "declare the law that training draws t from")
    return Check("time_law", "ok", f"{count} times drawn agree with the declared law (p = {probability:.2g})", evidence)


MIN_LAW_PROBABILITY = 1e-6


def baseline_push(norm: float, main_norm: float, limit: float) -> Check:
    """Medians of total_norm under the baseline's settings and of the main loss alone, on the same steps."""
    ratio = norm / main_norm if main_norm > 0 else math.inf
    evidence = {"total_norm": norm, "total_norm_main": main_norm, "ratio": ratio}
    words = f"the baseline's total_norm is {ratio:.3g}x that of the main loss alone"
    if not ratio < limit:
        sentence = f"{words}: a trial at the norm guard's limit of {limit:g} pushes {ratio * limit:.3g}x, so the guard is blind"
        return Check(
            "baseline/norm", "warn", sentence, evidence, "lower the baseline's pixel_loss_weight, or rely on the smoke test"
        )
    return Check("baseline/norm", "ok", words, evidence)


# -- words


def same(asked: Any, found: Any) -> bool:
    if _is_number(asked) and _is_number(found):
        return math.isclose(asked, found, rel_tol=1e-6)
    return bool(asked == found)


def worst_first(checks: Iterable[Check]) -> list[Check]:
    return sorted(checks, key=lambda check: -SEVERITY.index(check.status))


def _value(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else repr(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _some(names: Sequence[str], words: str) -> str:
    """`3 tensors changed (conv.weight, …)`; empty for none."""
    if not names:
        return ""
    shown = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
    return f"{len(names)} {words} ({shown})"


def baseline_samples(findings: Sequence[str], steps: int) -> Check:
    """The smoke test after a few steps of the baseline."""
    if findings:
        sentence = f"{steps} steps of the baseline ruin the samples: {'; '.join(findings)}"
        return Check(
            "baseline/smoke", "bad_setup", sentence, {"steps": steps}, "lower the learning rate or the baseline's pixel_loss_weight"
        )
    return Check("baseline/smoke", "ok", f"samples pass after {steps} steps of the baseline", {"steps": steps})
