"""Checks of the image losses' targets: in their place, as sharp as the images, and what the autoencoder leaves of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tune_ssim.before_launch.preflight import rules
from tune_ssim.before_launch.preflight.images import Seen
from tune_ssim.before_launch.preflight.plain import own_gradient_norms, setting_of
from tune_ssim.before_launch.preflight.report import Check, unknown
from tune_ssim.before_launch.preflight.subject import Unavailable, call
from tune_ssim.trials.training import Forward

MAX_SHIFT = 8  # pixels
EMPTY = 1e-12  # of an image without any detail
FINE = 0.25  # cycles a pixel; detail above it is compared, half of what an image can hold


def check_targets(task: Any, seen: Seen | None) -> Iterator[Check]:
    """Compares the targets with the training images of the same steps, or with predictions at low t."""
    if seen is None:
        raise Unavailable("no forward pass was seen")
    targets, sampled = seen.all_targets, None
    if seen.latent_sized:
        remedy = "sizes are in pixels of the images, not of the latents"
        sentence = "all images of a batch have the size of its latents: the image losses see only their upper left corner"
        yield Check("targets/sizes", "bad_setup", sentence, {}, remedy)
    if task.abilities().training_images:
        steps = range(1, len(targets) // seen.batch_size + 1)
        sampled = torch.cat([call(task, "training_images", n).float().cpu() for n in steps])
    if sampled is not None and sampled.shape == targets.shape:
        yield rules.target_shift("training images", *shift_between(sampled, targets))
        kept, closeness = detail(targets) / max(detail(sampled), EMPTY), None
        if seen.round_trip is not None:
            of = len(seen.round_trip)
            lost = (seen.round_trip - sampled[:of]).square().mean().item()
            closeness = (seen.round_trip - targets[:of]).square().mean().item() / max(lost, EMPTY)
        yield rules.target_sharpness("training images", kept, closeness)
        yield rules.target_difference((targets - sampled).square().mean().sqrt().item(), closeness)
    elif len(seen.targets):
        yield rules.target_shift("predictions at low t", *shift_between(seen.decoded, seen.targets))
        yield rules.target_sharpness("predictions at low t", detail(seen.targets) / max(detail(seen.decoded), EMPTY))
    else:
        yield unknown("targets/shift", "there are no predictions at low t to compare the targets with")


def check_round_trip(task: Any, base: Mapping[str, Any]) -> Iterator[Check]:
    """Measures what raw targets still push when the prediction is perfect: only the autoencoder's error is left."""
    forward: Forward = call(task, "forward", 1)
    parameters = list(call(task, "trainable_parameters"))
    if forward.clean is None:
        raise Unavailable("the forward pass does not show the clean latent")
    raw = replace(forward, loss=replace(forward.loss, target="raw"))
    perfect = replace(raw, z0=forward.clean + raw.z0 - raw.z0.detach())
    main, ssim, _ = own_gradient_norms(raw, parameters)
    _, ssim_left, pixel_left = own_gradient_norms(perfect, parameters)
    setting = setting_of({**call(task, "effective"), **base})
    push = setting.pixel_loss_weight * pixel_left / main if main else 0.0
    yield rules.round_trip(forward.loss.target, ssim_left / ssim if ssim else 0.0, push)


def shift_between(x: Tensor, y: Tensor) -> tuple[int, int, float, float]:
    """Rows and columns by which `y` is shifted against `x`; the correlation of their detail there, and without a shift."""
    near = fit_of_shifts(x, y)
    best, width = int(near.argmax()), near.shape[1]
    dy, dx = best // width - near.shape[0] // 2, best % width - width // 2
    return dy, dx, near.max().item(), near[near.shape[0] // 2, width // 2].item()


def fit_of_shifts(x: Tensor, y: Tensor) -> Tensor:
    """`[rows, columns]`, none in the centre: correlation of the detail of `x` and of `y` moved back by so many pixels."""
    height, width = x.shape[-2:]
    (a, frequency), (b, _) = _spectrum(x), _spectrum(y)
    weight = frequency.square()  # natural images fall off as 1 / frequency; so weighted, all their detail counts
    energies = [torch.fft.irfft2((f.abs().square() * weight).sum(dim=(0, 1)), s=(height, width))[0, 0] for f in (a, b)]
    scale = (energies[0] * energies[1]).sqrt().clamp(min=EMPTY)
    correlation = torch.fft.irfft2((a.conj() * b * weight).sum(dim=(0, 1)), s=(height, width)) / scale
    reach = min(MAX_SHIFT, height // 3, width // 3)
    return torch.roll(correlation, (reach, reach), (0, 1))[: 2 * reach + 1, : 2 * reach + 1]


def detail(images: Tensor) -> float:
    """Energy above FINE, a mean over the images."""
    spectrum, frequency = _spectrum(images)
    return spectrum[..., frequency >= FINE].abs().square().sum().item() / len(images)


def _spectrum(images: Tensor) -> tuple[Tensor, Tensor]:
    """The Fourier transform of images that fade out at their edges, and the frequencies in cycles a pixel."""
    height, width = images.shape[-2:]
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    spectrum = torch.fft.rfft2((images - images.mean(dim=(2, 3), keepdim=True)) * window)
    return spectrum, (rows.square() + columns.square()).sqrt()
