"""A trial's summary: what is read back, what a script must be given, and which settings train alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
from small_studies import SETTING, trial

from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.trials.summary import TrialSummary, reported_config


def test_a_summary_comes_back() -> None:
    one = trial("a", "pruned", math.inf, seed=3, warnings=["look"], quarantined=["0123"])
    again = TrialSummary.from_dict(one.to_dict())
    assert again == one and again.verdict is Verdict.PRUNED and again.role is Role.SEARCH
    assert one.to_dict()["metrics"]["delta_ssim"] == "Infinity"


def test_keys_that_are_seldom_are_absent_where_there_is_nothing() -> None:
    assert not {"seed", "warnings", "quarantined"} & set(trial("a").to_dict())


def test_what_the_first_version_wrote_is_filled_in() -> None:
    old = TrialSummary.from_dict({"trial_id": "a", "verdict": "safe", "config": {}, "metrics": {"ssim": None}})
    assert (old.role, old.objective, old.seed, old.steps, old.metrics) == ("search", "delta_ssim", None, 0, {})
    assert math.isnan(old.metric("ssim"))


def adaptive(ratio: float) -> dict[str, Any]:
    return {"ssim_loss_weight": {"adaptive": {"target_ratio": ratio}}}


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ({"ssim_loss_weight": 30.0}, {"ssim_loss_weight": 300.0, "ssim_grad_scale": 0.1}, True),
        ({"seed": 1}, {"seed": 2, "gain": 30.0}, True),
        ({"lr": 0.1}, {"lr": 0.2}, False),
        (adaptive(2), adaptive(2), True),
        (adaptive(2), adaptive(3), False),
    ],
)
def test_settings_that_train_alike(one: dict[str, Any], other: dict[str, Any], alike: bool) -> None:
    assert (trial("a", config=one).setting_key == trial("b", config=other).setting_key) is alike


@pytest.mark.parametrize(
    ("settings", "effective", "expected"),
    [
        (SETTING, {}, SETTING),
        ({"ssim_loss_weight": 0.0}, {}, {"ssim_loss_weight": 0.0, "ssim_loss_max_t": None, "ssim_grad_scale": 1.0}),
        ({"lr": 1.0}, {}, {"lr": 1.0}),  # nothing is known of an SSIM loss
        ({"lr": 1.0}, {"lr": 1.0, "kl_alpha": 2.0}, {"lr": 1.0}),  # a training without an SSIM loss
        (
            {"ssim_loss_weight": 3.0},
            {"ssim_loss_weight": 3.0, "ssim_loss_max_t": 0.5, "pixel_loss_weight": 0.05, "batch": 8},
            {"ssim_loss_weight": 3.0, "ssim_loss_max_t": 0.5, "ssim_grad_scale": 1.0, "pixel_loss_weight": 0.05},
        ),
    ],
)
def test_what_is_reported_as_the_configuration(
    settings: dict[str, float], effective: dict[str, float], expected: dict[str, float]
) -> None:
    assert reported_config(settings, effective) == expected
