"""Confidence intervals against SciPy's own, margins, and what differs between two sets of hashes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from small_studies import baseline, trial

from tune_ssim.before_launch.provenance import fingerprints
from tune_ssim.guards import KeepRule
from tune_ssim.results.proof import comparison, differences, digest, margins, paired
from tune_ssim.tasks.fundus_sr import FundusSR


@pytest.mark.parametrize("values", [[0.001, 0.004, 0.002], [-0.1, 0.3], list(np.random.default_rng(0).normal(size=9))])
def test_interval_is_students(values: list[float]) -> None:
    found = paired(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["interval"] == pytest.approx([expected.low, expected.high])
    assert found["mean"] == pytest.approx(np.mean(values)) and found["n"] == len(values)


def test_one_seed_has_no_interval() -> None:
    assert paired([0.5])["interval"] is None


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
