"""Statistics of samples that distinguish a healthy model from one whose inference has collapsed.

SSIM cannot: a flat image of the mean colour scores 0.85 on the fundus task, bicubic interpolation 0.75."""

from __future__ import annotations

import torch
from torch.nn import functional

ENTROPY_BINS = 64


@torch.no_grad()
def collapse_statistics(
    images: torch.Tensor,
    *,
    references: torch.Tensor | None = None,
    inputs: torch.Tensor | None = None,
    reconstructions: torch.Tensor | None = None,
    examples: torch.Tensor | None = None,
) -> dict[str, float]:
    """Mean statistics over `images` `[n, 3, H, W]` in [0, 1]. A statistic is absent if the arguments it needs are missing.

    `references`: the ground truth. `reconstructions`: the ground truth passed through the frozen autoencoder.
    `examples`: `[m, 3, h, w]`, other real images of the same kind, used if neither of these is given.
    `inputs`: `[n, 3, h, w]`, the input of each image. Any number of channels works.

    consistency_psnr: dB, between the sample, downsampled to the size of its input, and the input.
    reference_psnr: dB, between the sample and the ground truth.
    consistency_correlation: Pearson correlation of downsampled sample and input, without the mean colour of each image; 0 if
    one of them is constant.
    high_frequency_share: energy of `x - box_blur(x)` (3 x 3) relative to the variance within an image. It is 8/9 for white
    noise of any strength. diversity: RMS difference between the images, downsampled to 8 x 8; 0 if all are equal.
    high_frequency: energy of `x - box_blur(x)` (3 x 3), relative to the reconstructions, else the references, else the examples.
    std_ratio: contrast (standard deviation within an image), relative to the same.
    entropy_bits: entropy of the grey-level histogram, 64 bins over [0, 1]; at most 6.
    ideal_consistency_correlation, ideal_entropy_bits: the same statistics of the reconstructions (else the references, else, for
    the entropy, the examples), as an upper bound for samples.
    non_finite_fraction: fraction of pixels. One non-finite pixel makes every sample statistic non-finite, so it is not hidden.
    """
    images = images.float()
    statistics = {"non_finite_fraction": (~torch.isfinite(images)).float().mean()}
    ideal = reconstructions if reconstructions is not None else references
    if references is not None:
        wrong = (images - references.float()).square().mean(dim=(1, 2, 3))
        statistics["reference_psnr"] = (-10 * torch.log10(wrong.clamp(min=1e-10))).mean()
    if inputs is not None:
        inputs = inputs.float()
        down = functional.adaptive_avg_pool2d(images, (inputs.shape[-2], inputs.shape[-1]))
        error = (down - inputs).square().mean(dim=(1, 2, 3))
        statistics["consistency_psnr"] = (-10 * torch.log10(error.clamp(min=1e-10))).mean()
        statistics["consistency_correlation"] = _correlation(down, inputs).mean()
    if ideal is not None:
        ideal = ideal.float()
        if inputs is not None:
            ideal_down = functional.adaptive_avg_pool2d(ideal, (inputs.shape[-2], inputs.shape[-1]))
            statistics["ideal_consistency_correlation"] = _correlation(ideal_down, inputs).mean()
    compared = ideal if ideal is not None else examples
    if compared is not None:
        ideal = compared.float()
        statistics["ideal_entropy_bits"] = _entropy_bits(ideal)
        statistics["high_frequency"] = high_frequency_energy(images) / high_frequency_energy(ideal).clamp(min=1e-12)
        contrast = images.std(dim=(1, 2, 3)).mean()
        statistics["std_ratio"] = contrast / ideal.std(dim=(1, 2, 3)).mean().clamp(min=1e-6)
    statistics["entropy_bits"] = _entropy_bits(images)
    statistics["high_frequency_share"] = high_frequency_energy(images) / images.var(dim=(1, 2, 3)).mean().clamp(min=1e-12)
    small = functional.adaptive_avg_pool2d(images, 8)
    statistics["diversity"] = small.var(dim=0, correction=0).mean().mul(2).sqrt()
    names = list(statistics)
    values = torch.stack([statistics[name].double() for name in names]).tolist()  # one transfer from the device
    return dict(zip(names, values, strict=True))


def _correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pearson correlation per image, with the mean of each channel removed: two `[n, c, h, w]` → `[n]`."""
    x, y = (image - image.mean(dim=(2, 3), keepdim=True) for image in (x, y))
    norms = x.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)
    return (x * y).sum(dim=(1, 2, 3)) / norms.clamp(min=1e-8)


def high_frequency_energy(x: torch.Tensor) -> torch.Tensor:
    """Mean square of `x - box_blur(x)` (3 x 3), of `[n, c, h, w]`."""
    return (x - functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)).square().mean()


def _entropy_bits(x: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(x).all():
        return x.new_tensor(float("nan"))
    grey = (x.mean(dim=1).clamp(0, 1) * (ENTROPY_BINS - 1)).round().long().flatten(1)
    counts = x.new_zeros(len(grey), ENTROPY_BINS).scatter_add_(1, grey, torch.ones_like(grey, dtype=x.dtype))
    share = counts / counts.sum(dim=1, keepdim=True)
    return -(share * share.clamp(min=1e-12).log2()).sum(dim=1).mean()
