"""Checks of images: their range, their pairing, and whether held-out images are trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tune_ssim.before_launch.preflight import rules
from tune_ssim.before_launch.preflight.leakage import altered_copies, shared_patches
from tune_ssim.before_launch.preflight.plain import unit
from tune_ssim.before_launch.preflight.report import Check, unknown
from tune_ssim.before_launch.preflight.subject import Unavailable, call, decoder_of
from tune_ssim.trials.training import Forward, Sample

SAMPLES = 64  # training samples whose predictions are checked
MIN_FORWARDS = 4  # steps whose random numbers are compared with each other
ROUND_TRIPS = 16  # clean latents that are decoded
MAX_FORWARDS = 32  # forward passes for these samples
TOP_BIN = 0.8  # samples above this t are compared with held-out ones
LOW_T = 0.3  # up to this t the predicted clean image is close to the true one whatever the network predicts
SCALES = (0.5, 2.0)  # scales of the latents that a wrong scaling factor may cause
SMALL_SIDE = 12  # pixels; averages away detail that an autoencoder loses before images are compared
PIXEL_BUDGET = 4_000_000  # training pixels checked: 1700 crops of 48 x 48


@dataclass
class Seen:
    """Results of the forward passes of the first steps."""

    main: float  # main loss, mean over the passes
    trivial: float | None  # the same of the best constant velocity
    t: Tensor  # [n], of the generation targets
    decoded: Tensor  # [m, 3, H, W] in [0, 1]: predictions at t <= LOW_T
    rescaled: Mapping[float, Tensor]  # the same, decoded from latents multiplied by SCALES
    targets: Tensor  # of the same samples
    all_targets: Tensor  # of all samples
    batch_size: int
    eligible: float  # share of the samples that are generation targets
    round_trip: Tensor | None  # the first clean latents decoded, in [0, 1]; None if the task does not show them
    again: tuple[str, ...]  # what differs when the forward pass of one step is repeated
    shared: tuple[str, ...]  # what two steps have in common that each step should draw anew
    pairs: tuple[tuple[Tensor, Tensor], ...]  # what the network should predict, and the clean latents, of the first steps
    latent_sized: bool  # whether the `sizes` of all images are those of the latents, and the images are larger
    repeated: bool  # whether each step has one image, over and over
    noisy: tuple[Tensor, Tensor]  # predictions at t > TOP_BIN and their clean latents, decoded to [0, 1]
    flow: Tensor  # [k, 2]: t of a sample and the mean square error of its velocity; empty if the clean latents are not shown


def work(batch: int) -> dict[str, float]:
    """What `look` needs; of t as in a uniform law."""
    forwards = min(MAX_FORWARDS, max(MIN_FORWARDS, math.ceil(SAMPLES / max(1, batch))))
    return {"forward": forwards + 1, "decode": (LOW_T * (1 + len(SCALES)) + 2 * (1 - TOP_BIN)) * forwards * batch + ROUND_TRIPS}


def look(task: Any) -> Seen:
    main, trivial, times, targets, everything = [], [], [], [], []
    round_trips: list[Tensor] = []
    noisy: list[tuple[Tensor, ...]] = []
    draws: list[dict[str, Tensor]] = []
    flow, pairs = [torch.zeros(0, 2)], []
    decoded: dict[float, list[Tensor]] = {scale: [] for scale in (1.0, *SCALES)}
    batch_size, samples, latent_sized = 0, 0, True
    with torch.no_grad():
        for n in range(1, MAX_FORWARDS + 1):
            forward: Forward = call(task, "forward", n)
            decode = decoder_of(task, forward)
            draws.append(_draws(forward) if len(draws) < MIN_FORWARDS else {})
            t, is_target = forward.t.cpu(), torch.ones(len(forward.t), dtype=torch.bool)
            if forward.is_target is not None:
                is_target = forward.is_target.cpu()
            main.append(forward.main.item())
            latent, image = tuple(forward.z0.shape[-2:]), tuple(forward.targets.shape[-2:])
            latent_sized &= latent != image and forward.sizes is not None and {*map(tuple, forward.sizes)} == {latent}
            if forward.velocity_target is not None and forward.clean is not None and n <= MIN_FORWARDS:
                pairs.append((forward.velocity_target.float().cpu(), forward.clean.float().cpu()))
            if forward.velocity_target is not None:
                trivial.append(forward.velocity_target.float().var(unbiased=False).item())
            times.append(t[is_target])
            everything.append(forward.targets.float().cpu())
            flow.append(_flow_errors(forward, t))
            low = (t <= LOW_T) & (t > 0) & is_target
            if low.any():
                for scale, images in decoded.items():
                    images.append(unit(decode(scale * forward.z0[low]).float(), forward.loss.image_range).cpu())
                targets.append(everything[-1][low])
            if forward.clean is not None and (high := (t > TOP_BIN) & is_target).any():
                pair = (unit(decode(z[high]).float(), forward.loss.image_range).cpu() for z in (forward.z0, forward.clean))
                noisy.append(tuple(pair))
            if forward.clean is not None and sum(len(images) for images in round_trips) < ROUND_TRIPS:
                round_trips.append(unit(decode(forward.clean).float(), forward.loss.image_range).cpu())
            batch_size, samples = len(t), samples + len(t)
            if samples >= SAMPLES and n >= MIN_FORWARDS:
                break
        again = _draws(call(task, "forward", 1))
    empty = everything[0][:0]
    return Seen(
        main=sum(main) / len(main),
        trivial=sum(trivial) / len(trivial) if trivial else None,
        t=torch.cat(times),
        decoded=torch.cat([empty, *decoded[1.0]]),
        rescaled={scale: torch.cat([empty, *decoded[scale]]) for scale in SCALES},
        targets=torch.cat([empty, *targets]),
        all_targets=torch.cat(everything),
        batch_size=batch_size,
        eligible=len(torch.cat(times)) / samples,
        round_trip=torch.cat(round_trips) if round_trips else None,
        again=tuple(name for name, value in again.items() if not _same(value, draws[0][name])),
        pairs=tuple(pairs),
        latent_sized=latent_sized,
        repeated=batch_size > 2
        and all(_same(draw["images"], draw["images"][:1].expand_as(draw["images"])) for draw in draws if draw),
        noisy=(torch.cat([empty, *(images for images, _ in noisy)]), torch.cat([empty, *(images for _, images in noisy)])),
        flow=torch.cat(flow),
        shared=tuple(name for name in again if any(_same(a[name], b[name]) for a, b in combinations(draws[:MIN_FORWARDS], 2))),
    )


def _flow_errors(forward: Forward, t: Tensor) -> Tensor:
    """`[batch, 2]`: t, and the mean square error of the velocity, which is that of z0 over t squared."""
    if forward.clean is None:
        return torch.zeros(0, 2)
    error = (forward.z0 - forward.clean).float().square().flatten(1).mean(dim=1).cpu() / t.square().clamp(min=1e-6)
    return torch.stack([t.float(), error], dim=1)


def _draws(forward: Forward) -> dict[str, Tensor]:
    """What a step draws at random, by name."""
    found = {"images": forward.targets, "t": forward.t}
    if forward.clean is not None and forward.velocity_target is not None:
        found["noise"] = forward.velocity_target + forward.clean
    elif forward.velocity_target is not None:
        found["noise and images"] = forward.velocity_target
    return {name: value.detach().float().cpu() for name, value in found.items()}


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two draws are equal but for rounding, which depends on the device."""
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-3)


def check_draws(task: Any, seen: Seen | None) -> Iterator[Check]:
    """Checks that a step draws the same numbers each time, and others than another step."""
    if seen is not None:
        yield rules.draws(seen.again, seen.shared, seen.repeated)
        return
    first, again, second = (call(task, "training_images", n) for n in (1, 1, 2))
    yield rules.draws([] if _same(first, again) else ["images"], ["images"] if _same(first, second) else [])


def check_losses(seen: Seen | None) -> Iterator[Check]:
    if seen is None:
        raise Unavailable("no forward pass was seen")
    if seen.trivial is None:
        yield unknown("loss/main", "the forward pass does not say what the network should predict")
    else:
        yield rules.main_loss(seen.main, seen.trivial)


def check_pairs(sample: Sample, seen: Seen | None) -> Iterator[Check]:
    """Checks pairs that must show the same image: decoded and target, reconstruction and reference, input and reference."""
    if seen is not None:
        yield _range("targets", seen.all_targets)
    if sample.references is not None:
        yield _range("references", sample.references)
    pairs: list[tuple[str, str, Tensor | None, Tensor | None]] = [
        ("inputs", "inputs and references", sample.inputs, sample.references),
        ("reconstructions", "reconstructions and references", sample.reconstructions, sample.references),
    ]
    if seen is not None:
        pairs.append(("predictions", "predictions at low t and targets", seen.decoded, seen.targets))
    for name, what, images, targets in pairs:
        if images is None or targets is None or not len(images):
            yield unknown(f"data/{name}", "there are none to compare")
            continue
        x, y = _small(images, targets)
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            yield rules.image_range(name, float("nan"), float("nan"), int((~torch.isfinite(x)).flatten(1).any(1).sum()), len(x))
            continue
        yield from _check_pair(name, what, x, y)
    explained = None
    if sample.reconstructions is not None and sample.references is not None:
        psnr, explained, correlation = _quality(sample.reconstructions.float().cpu(), sample.references.float().cpu())
        yield rules.autoencoder(psnr, explained, correlation)
    if seen is not None and len(seen.targets):
        errors = {scale: _mean_square(*_small(images, seen.targets)) for scale, images in seen.rescaled.items()}
        yield rules.latent_scale(_mean_square(*_small(seen.decoded, seen.targets)), errors, explained, len(seen.targets))


def check_samples(sample: Sample, seen: Seen | None) -> Iterator[Check]:
    """Compares the error of samples with that of one-step predictions near t = 1, where inputs say what the samples show: a caption
    leaves too much open. Both without what an autoencoder loses."""
    truth = sample.reconstructions
    if truth is None and seen is not None and sample.references is not None and seen.pairs:
        in_pixels = seen.pairs[0][1].shape[1:] == sample.references.shape[1:]
        truth = sample.references if in_pixels else None
    if seen is None or sample.inputs is None or truth is None or truth.shape != sample.images.shape:
        raise Unavailable("the samples have no inputs, or nothing that they should be")
    if len(seen.noisy[0]) < rules.MIN_IMAGES:
        raise Unavailable(f"only {len(seen.noisy[0])} of the first samples have t > {TOP_BIN:g} and a clean latent")
    pairs = (sample.images.float().cpu(), truth.float().cpu()), seen.noisy
    yield rules.sample_error(*(_mean_square(x, y) / y.var().clamp(min=1e-6).item() for x, y in pairs))


def check_data(task: Any) -> Iterator[Check]:
    """Files of the data that are left out, and the statistics of the latents."""
    if task.abilities().left_out and (files := call(task, "left_out")):
        yield rules.left_out(files)
    if task.abilities().latent_statistics:
        yield rules.latent_statistics(*call(task, "latent_statistics"))


def check_training_images(task: Any, steps: int, sample: Sample, seen: Seen | None) -> Iterator[Check]:
    """Checks of the training images that the trial will see, as many as fit into the budget."""
    batches, pixels = [], 0
    for n in range(1, steps + 1):
        batch = call(task, "training_images", n).float().cpu()
        batches.append(batch)
        pixels += batch[:, 0].numel()
        if pixels >= PIXEL_BUDGET:
            break
    images = torch.cat(batches)
    yield _range("training_images", images)
    finite = images[torch.isfinite(images).flatten(1).all(1)]
    spread = finite.amax(dim=(2, 3)) - finite.amin(dim=(2, 3))
    yield rules.constant_images(int((spread.amax(dim=1) < 1 / 255).sum()), len(images))
    if seen is not None and len(seen.all_targets) <= len(images) and seen.all_targets.shape[1:] == images.shape[1:]:
        x, y = _small(images[: len(seen.all_targets)], seen.all_targets)
        yield from _check_pair("batch", "training images and targets", x, y)
    if sample.references is None:
        raise Unavailable("the samples have no references to look for")
    references = sample.references.float().cpu()
    exact = rules.overlap(*shared_patches(finite, references), len(references))
    yield exact
    if exact.status == "ok":
        scores = [match.score for match in altered_copies(finite, references)]
        yield rules.altered_overlap(scores, len(references))


def _check_pair(name: str, what: str, x: Tensor, y: Tensor) -> Iterator[Check]:
    yield rules.mapping(name, what, *_mappings(x, y))
    yield rules.own_partner(f"{name}_order", what, _own_partner(x, y), len(x))


def _range(name: str, images: Tensor) -> Check:
    bad = (~torch.isfinite(images)).flatten(1).any(1)
    good = images[~bad]
    lowest, highest = (good.min().item(), good.max().item()) if len(good) else (float("nan"), float("nan"))
    return rules.image_range(name, lowest, highest, int(bad.sum()), len(images))


def _small(*images: Tensor) -> list[Tensor]:
    """Averages all down to one size."""
    side = min(SMALL_SIDE, *(size for image in images for size in image.shape[-2:]))
    return [functional.adaptive_avg_pool2d(image.detach().float().cpu(), side) for image in images]


def _mappings(x: Tensor, y: Tensor) -> tuple[float, dict[str, float]]:
    """Mean square between `x` and `y`, and between `x` and `y` after each known mix-up."""
    mixed = {
        "half": y * 0.5 + 0.5,
        "double": (2 * y - 1).clamp(0, 1),
        "inverted": 1 - y,
        "linear": y.clamp(min=0) ** 2.2,
        "encoded": y.clamp(min=0) ** (1 / 2.2),
        "channels": y.flip(1),
        "mirrored": y.flip(3),
        "upside_down": y.flip(2),
    }
    return _mean_square(x, y), {name: _mean_square(x, image) for name, image in mixed.items()}


def _own_partner(x: Tensor, y: Tensor) -> float:
    """Share of comparisons in which `x[i]` is more similar to `y[i]` than to `y[j]`; NaN if all images are alike. Similarity is
    correlation after removing the mean image, that is, what all have in common."""
    a, b = ((image - image.mean(dim=0)).flatten(1) for image in (x, y))
    n = len(a)
    if n < 2 or b.abs().mean() < 1 / 255:
        return float("nan")
    likeness = functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T
    others = likeness[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    return (likeness.diagonal()[:, None] > others).double().mean().item()


def _mean_square(x: Tensor, y: Tensor) -> float:
    return (x - y).square().mean().item()


def _quality(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """PSNR in dB; share of the variance within images that is explained; correlation, channel means removed."""
    error = _mean_square(x, y)
    a, b = ((image - image.mean(dim=(2, 3), keepdim=True)).flatten(1) for image in (x, y))
    explained = 1 - error / b.square().mean().clamp(min=1e-12).item()
    correlation = ((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)).item()
    return -10 * torch.log10(torch.tensor(max(error, 1e-10))).item(), explained, correlation
