"""Collapse statistics on crops of the real fundus photograph: healthy copies here, every kind of ruin there."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from tune_ssim.guards import SmokeTest
from tune_ssim.probes import collapse_statistics
from tune_ssim.records import SMOKE, Record

CROP, FACTOR = 48, 4


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    """`[16, 3, 48, 48]` in [0, 1] from the middle of skimage.data.retina(), halved by area."""
    from skimage import data

    photo = torch.from_numpy(np.ascontiguousarray(data.retina())).permute(2, 0, 1).float() / 255
    photo = functional.avg_pool2d(photo[None], 2)[0]
    places = [(row, column) for row in range(200, 392, CROP) for column in range(200, 392, CROP)]
    return torch.stack([photo[:, row : row + CROP, column : column + CROP] for row, column in places])


def low(images: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(len(images), 3, CROP // FACTOR, CROP // FACTOR, generator=torch.Generator().manual_seed(1))
    return functional.avg_pool2d(images, FACTOR) + 0.03 * noise[:, : images.shape[1]]


def statistics(images: torch.Tensor, crops: torch.Tensor) -> dict[str, float]:
    return collapse_statistics(images, references=crops, inputs=low(crops))


def slightly_noisy(x: torch.Tensor) -> torch.Tensor:
    """σ 0.003 is less than one grey level; the photograph is so smooth that 0.005 is beyond the limit already."""
    return (x + 0.003 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)


def blurred(x: torch.Tensor, radius: int) -> torch.Tensor:
    padded = functional.pad(x, (radius,) * 4, mode="replicate")
    return functional.avg_pool2d(padded, 2 * radius + 1, stride=1)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=(2, 3), keepdim=True).expand_as(x)


def noise(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(3))


def with_noise(x: torch.Tensor) -> torch.Tensor:
    return (x + 0.15 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4))).clamp(0, 1)


def broken(x: torch.Tensor, value: float = math.nan) -> torch.Tensor:
    images = x.clone()
    images[3, 1, 20, 20] = value
    return images


HEALTHY = {
    "the truth": lambda x: x,
    "a little noise": slightly_noisy,
    "slightly soft": lambda x: 0.7 * x + 0.3 * blurred(x, 1),
}
RUINED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "flat": (flat, "high_frequency"),
    "blurred": (lambda x: blurred(x, 8), "high_frequency"),
    "noise": (noise, "consistency_psnr"),
    "noise upon it": (with_noise, "high_frequency"),
    "black": (torch.zeros_like, "consistency_psnr"),
    "another crop": (lambda x: x.flip(0), "consistency_correlation"),
    "a NaN": (broken, "non_finite_fraction"),
    "an Inf": (lambda x: broken(x, math.inf), "non_finite_fraction"),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_samples_pass(crops: torch.Tensor, kind: str) -> None:
    guard = SmokeTest()
    found = statistics(HEALTHY[kind](crops), crops)
    assert guard.findings(found, statistics(crops, crops)) == []
    assert found["consistency_psnr"] > 28
    assert found["consistency_correlation"] > 0.5
    assert 0.2 < found["high_frequency"] < 1.5
    assert 0.85 < found["std_ratio"] < 1.1


@pytest.mark.parametrize("kind", RUINED)
def test_ruined_samples_do_not(crops: torch.Tensor, kind: str) -> None:
    make, metric = RUINED[kind]
    guard = SmokeTest()
    findings = guard.findings(statistics(make(crops), crops), statistics(crops, crops))
    assert SMOKE + metric in {finding.metric for finding in findings}
    state = guard.init()
    for step, images in enumerate((crops, make(crops), make(crops))):
        record = Record(step, {SMOKE + name: value for name, value in statistics(images, crops).items()})
        state, violation = guard.update(state, record)
    assert violation is not None
    assert violation.action == "prune"


def test_the_truth_scores_one(crops: torch.Tensor) -> None:
    found = statistics(crops, crops)
    assert found["high_frequency"] == pytest.approx(1)
    assert found["std_ratio"] == pytest.approx(1)
    assert found["non_finite_fraction"] == 0
    assert 2 < found["entropy_bits"] < 6


@pytest.mark.parametrize("colour", [0.0, 0.1, 0.3, 1 / 3, 0.7, 1.0])
def test_a_constant_image_correlates_with_nothing(crops: torch.Tensor, colour: float) -> None:
    found = statistics(torch.full_like(crops, colour), crops)
    assert abs(found["consistency_correlation"]) < 1e-3
    assert found["entropy_bits"] == pytest.approx(0, abs=1e-6)
    assert found["std_ratio"] == pytest.approx(0, abs=1e-5)
    assert found["high_frequency"] == pytest.approx(0, abs=1e-6)


def test_entropy_of_known_histograms() -> None:
    levels = torch.linspace(0, 1, 64).repeat(3, 4, 1)  # every bin equally often: log2(64)
    assert collapse_statistics(levels[None])["entropy_bits"] == pytest.approx(6)
    halves = torch.tensor([0.0, 1.0]).repeat(3, 4, 8)
    assert collapse_statistics(halves[None])["entropy_bits"] == pytest.approx(1)
    beyond = torch.tensor([-5.0, 7.0]).repeat(3, 4, 8)  # outside the range counts as its edge
    assert collapse_statistics(beyond[None])["entropy_bits"] == pytest.approx(1)


def test_consistency_against_a_plain_mean_square(crops: torch.Tensor) -> None:
    images = slightly_noisy(crops)
    pooled = images.numpy().astype(np.float64).reshape(16, 3, 12, 4, 12, 4).mean(axis=(3, 5))
    inputs = low(crops).numpy().astype(np.float64)
    psnr = [-10 * np.log10(((a - b) ** 2).mean()) for a, b in zip(pooled, inputs, strict=True)]
    assert statistics(images, crops)["consistency_psnr"] == pytest.approx(np.mean(psnr), abs=1e-4)
    centred = [x - x.mean(axis=(2, 3), keepdims=True) for x in (pooled, inputs)]
    r = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(*centred, strict=True)]
    assert statistics(images, crops)["consistency_correlation"] == pytest.approx(np.mean(r), abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_broken_pixel_hides_nothing(crops: torch.Tensor, value: float) -> None:
    found = statistics(broken(crops, value), crops)
    assert found.pop("non_finite_fraction") == pytest.approx(1 / crops.numel())
    assert not any(math.isfinite(number) for name, number in found.items() if not name.startswith("ideal_"))


def test_grey_images(crops: torch.Tensor) -> None:
    grey = crops.mean(dim=1, keepdim=True)
    found = collapse_statistics(grey, references=grey, inputs=low(grey))
    assert found["high_frequency"] == pytest.approx(1)
    assert found["consistency_psnr"] > 28
    assert found["entropy_bits"] == pytest.approx(statistics(crops, crops)["entropy_bits"], abs=1e-5)


def test_what_cannot_be_measured_is_absent(crops: torch.Tensor) -> None:
    assert set(collapse_statistics(crops)) == {"non_finite_fraction", "entropy_bits", "high_frequency_share", "diversity"}
    assert set(collapse_statistics(crops, references=crops)) - set(collapse_statistics(crops)) == {
        "high_frequency",
        "reference_psnr",
        "std_ratio",
        "ideal_entropy_bits",
    }
    assert "high_frequency" not in collapse_statistics(crops, inputs=low(crops))
    assert set(collapse_statistics(crops, examples=crops)) - set(collapse_statistics(crops)) == {
        "high_frequency",
        "std_ratio",
        "ideal_entropy_bits",
    }


def test_without_ground_truth_noise_and_sameness_are_seen(crops: torch.Tensor) -> None:
    noise = (0.5 + 0.2 * torch.randn(crops.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert collapse_statistics(noise)["high_frequency_share"] == pytest.approx(8 / 9, abs=0.02)
    assert collapse_statistics(crops)["high_frequency_share"] < 0.3
    assert collapse_statistics(crops[:1].expand_as(crops))["diversity"] == pytest.approx(0, abs=1e-4)
    assert collapse_statistics(crops)["diversity"] > 0.05


def test_the_reconstruction_is_the_ideal_where_there_is_one(crops: torch.Tensor) -> None:
    soft = blurred(crops, 1)
    assert collapse_statistics(soft, references=crops, reconstructions=soft)["high_frequency"] == pytest.approx(1)
    assert collapse_statistics(soft, references=crops)["high_frequency"] < 0.5


def test_odd_sizes_and_half_precision(crops: torch.Tensor) -> None:
    images = crops[..., :47, :45]
    found = collapse_statistics(images, references=images, inputs=low(crops)[..., :11, :7])
    assert all(math.isfinite(number) for number in found.values())
    half = collapse_statistics(crops.bfloat16(), references=crops, inputs=low(crops).bfloat16())
    assert half["consistency_psnr"] == pytest.approx(statistics(crops, crops)["consistency_psnr"], abs=0.3)


def test_nothing_is_changed_and_no_graph_is_kept(crops: torch.Tensor) -> None:
    images = crops.clone().requires_grad_()
    found = statistics(images, crops)
    assert torch.equal(images, crops)
    assert all(type(number) is float for number in found.values())
