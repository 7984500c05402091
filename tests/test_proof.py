"""Confidence intervals against SciPy's own, margins, and what differs between two sets of hashes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from small_studies import baseline, trial

from tune_ssim.before_launch.provenance import fingerprints
from tune_ssim.guards import KeepRule
from tune_ssim.results.intervals import paired, paired_on_images
from tune_ssim.results.proof import comparison, differences, digest, margins
from tune_ssim.results.trial_text import proof_line
from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.trials.summary import TrialSummary


@pytest.mark.parametrize("values", [[0.001, 0.004, 0.002], [-0.1, 0.3], list(np.random.default_rng(0).normal(size=9))])
def test_interval_is_students(values: list[float]) -> None:
    found = paired(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["interval"] == pytest.approx([expected.low, expected.high])
    assert found["mean"] == pytest.approx(np.mean(values)) and found["n"] == len(values)


def test_one_seed_has_no_interval() -> None:
    assert paired([0.5])["interval"] is None


def covered(seeds: int, images: int, deviations: tuple[float, float, float]) -> float:
    """How often the interval holds the true mean of differences that vary by seed, by image, and by both."""
    rng, studies = np.random.default_rng(7), 400
    by_seed, by_image, by_both = deviations
    hits = 0
    for _ in range(studies):
        rows = rng.normal(0, by_seed, (seeds, 1)) + rng.normal(0, by_image, images) + rng.normal(0, by_both, (seeds, images))
        lower, upper = paired_on_images(rows.tolist())["interval"]
        hits += lower <= 0 <= upper
    return hits / studies


@pytest.mark.parametrize(("seeds", "images"), [(2, 4), (3, 4), (3, 20), (5, 4)])
@pytest.mark.parametrize("deviations", [(1.0, 1.0, 1.0), (0.2, 3.0, 1.0), (1.0, 0.0, 0.1)])
def test_the_interval_over_seeds_and_images_covers_the_truth(
    seeds: int, images: int, deviations: tuple[float, float, float]
) -> None:
    assert covered(seeds, images, deviations) > 0.92  # 0.95, less three deviations of 400 studies


def test_without_differences_between_images_only_the_seeds_count() -> None:
    by_seed = [0.001, 0.004, 0.002]
    assert paired_on_images([[value] * 4 for value in by_seed])["interval"] == pytest.approx(paired(by_seed)["interval"])
    assert paired_on_images([[0.5, 0.5], [0.5, 0.5]])["interval"] == [0.5, 0.5]


@pytest.mark.parametrize("differences", [[[0.1, 0.2, 0.3]], [[0.1], [0.2]]])
def test_one_seed_or_one_image_has_no_interval(differences: list[list[float]]) -> None:
    found = paired_on_images(differences)
    assert found["interval"] is None and found["n"] == len(differences[0])


def test_images_are_compared_with_those_of_the_same_baseline() -> None:
    def measured(trial_id: str, seed: int, ssims: list[float], role: str = "confirm") -> TrialSummary:
        return trial(trial_id, seed=seed, role=role, metrics={"delta_ssim": 0.1}, per_image={"ssim": ssims})

    baselines = [measured("b2", 2, [0.5, 0.7], "baseline"), measured("b3", 3, [0.4, 0.6], "baseline")]
    confirmed = [measured("c2", 2, [0.6, 0.8]), measured("c3", 3, [0.6, 0.9])]
    found = comparison(confirmed, baselines)["delta_ssim"]
    assert found["images"] == paired_on_images([[0.6 - 0.5, 0.8 - 0.7], [0.6 - 0.4, 0.9 - 0.6]])
    assert found["interval"] == paired([0.1, 0.1])["interval"]  # of the seeds
    for odd in ([0.6], [], [0.6, math.nan]):
        assert "images" not in comparison([confirmed[0], measured("c3", 3, odd)], baselines)["delta_ssim"]
    assert "images" not in comparison(confirmed)["delta_ssim"]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"n": 4, "interval": [-0.001, 0.02]}, "(95 %), over 4 held-out images as well [-0.0010, +0.0200]"),
        ({"n": 1, "interval": None}, "(95 %), all on one held-out image"),
        (None, "(95 %)"),
    ],
)
def test_the_line_says_what_the_interval_covers(images: Any, words: str) -> None:
    found = {"mean": 0.01, "interval": [0.005, 0.015], "level": 0.95} | ({"images": images} if images else {})
    proof = {
        "unproven": [], "objective": "delta_ssim", "seeds": [2, 3], "horizon": {"steps": 60}, "comparison": {"delta_ssim": found},
    }  # fmt: skip
    assert proof_line(proof) == f"confirmed with 2 new seeds, 60 steps each: ΔSSIM +0.0100 [+0.0050, +0.0150] {words}"


def test_comparison_is_by_seed_and_of_what_all_measured() -> None:
    one = trial("a", seed=2, metrics={"delta_ssim": 0.1, "delta_psnr": 1.0})
    two = trial("b", seed=3, metrics={"delta_ssim": 0.3})
    found = comparison([one, two])
    assert set(found) == {"delta_ssim"} and found["delta_ssim"]["by_seed"] == {"2": 0.1, "3": 0.3}


def test_margins_are_of_the_worst_seed() -> None:
    confirmed = [trial("a", seed=2, metrics={"norm_ratio_max": 2.0, "psnr": 30.0, "bins/0": 1.5})]
    confirmed += [trial("b", seed=3, metrics={"norm_ratio_max": 4.0, "psnr": 31.0, "bins/0": 1.0})]
    baselines = [replace(baseline("x"), seed=seed, metrics={"psnr": 30.5, "bins/0": 1.0}) for seed in (2, 3)]
    rules = [KeepRule("psnr", min_delta=-0.6), KeepRule("bins", max_ratio=2.0)]
    found = margins(confirmed, baselines, {"norm_ratio_max": 10.0}, rules)
    assert found["norm_ratio_max"] == {"worst": 4.0, "limit": 10.0}
    assert found["psnr"] == {"worst": -0.5, "limit": -0.6}
    assert found["bins/0"] == {"worst": 1.5, "limit": 2.0}


def test_differences_name_what_changed() -> None:
    lines = differences({"a": "1" * 64, "b": "2" * 64, "c": "3"}, {"a": "1" * 64, "b": "4" * 64, "d": "5"})
    assert lines == ["b has changed (222222222222… → 444444444444…)", "c is gone", "d is new"]


def test_digest_knows_numbers_not_order() -> None:
    assert digest({"a": 1.5, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1.5}) != digest({"a": 1.5000001, "b": [1, 2]})


def test_fingerprints_of_the_bundled_task() -> None:
    one, two, other = FundusSR(), FundusSR(), FundusSR()
    one.setup({}, 0, "cpu"), two.setup({"ssim_loss_weight": 3.0}, 5, "cpu"), other.setup({"image": "coffee"}, 0, "cpu")
    first = fingerprints(one)
    assert first == fingerprints(two)
    assert {"code/losses/structural.py", "weights/vae", "weights/denoiser", "data/held_out"} <= set(first)
    assert {line.split()[0] for line in differences(first, fingerprints(other))} == {
        "data/train",
        "data/held_out",
        "data/evaluation",
    }
    two.model.conv_in.bias.data[3] += 1e-6
    assert [line.split()[0] for line in differences(first, fingerprints(two))] == ["weights/denoiser"]
    assert all(Path(name).suffix == ".py" for name in first if name.startswith("code/"))
