"""What a norm model says about a space: inert, deadly, blind, aliases, and how much of it is which."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
from norm_models import at_right_angles
from rich.console import Console

from tune_ssim.base.files import jsonable
from tune_ssim.before_launch.forecast import Forecast, forecast_space, inert_below
from tune_ssim.cli.tables import calibration_sentences, gains_table, predictions_table
from tune_ssim.report.heat_map import draw_heat_map
from tune_ssim.study.space import bundled_spaces, load_space

GATES = (0.1, 0.15, 0.2, 0.3, 1.0)
MODEL = at_right_angles(dict.fromkeys(GATES, 10.0))
TRIPLE = ("ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale")


def names(told: Forecast) -> list[str]:
    return [finding.name for finding in told.findings]


def space(gain: Any = None, points: list[tuple[float, ...]] | None = None, **parameters: Any) -> Any:
    gain = {"gain": gain} if gain else {}
    parameters = {"ssim_loss_max_t": {"choice": [0.1, 0.3]}, **gain, **parameters}
    return load_space({"parameters": parameters, "points": [dict(zip(TRIPLE, point, strict=True)) for point in points or []]})


def test_an_inert_space() -> None:
    told = forecast_space(MODEL, load_space("note_v3"), limit=10)
    (finding,) = told.findings
    assert finding.name == "inert" and "the whole space changes total_norm by < 0.1%" in finding.sentence
    assert "a ratio of 1.1 begins at gain 4.58" in finding.remedy  # sqrt(1 + .458²) = 1.1
    assert told.shares["inert"] == 1 and told.widest == pytest.approx((1, 1))


def test_a_deadly_space() -> None:
    told = forecast_space(MODEL, space({"log_uniform": [200, 3000]}), limit=10)
    (finding,) = told.findings
    assert finding.name == "deadly" and "the mildest, gain 200 @ 0.1, has 20x the baseline's total_norm" in finding.sentence
    assert told.shares["beyond_limit"] == 1
    assert names(forecast_space(MODEL, space({"log_uniform": [90, 3000]}), limit=10)) == []
    assert names(forecast_space(MODEL, space({"log_uniform": [200, 3000]}))) == []  # no guard, no limit


def test_shares_are_of_the_space_as_it_is_sampled() -> None:
    told = forecast_space(MODEL, space({"log_uniform": [0.01, 10_000]}), limit=10, max_ratio=100)
    # Inert below 10 · sqrt(0.002001) = 0.447, beyond 10 from 99.5 on, beyond 100 from 1000 on; six decades in all.
    inert, beyond, skipped = (math.log10(x) / 6 for x in (0.447 / 0.01, 10_000 / 99.5, 10_000 / 1000))
    assert told.shares == pytest.approx({"inert": inert, "beyond_limit": beyond, "skipped": skipped}, abs=0.02)
    assert inert_below(MODEL, 0.3) == pytest.approx(0.447, rel=0.03)


def test_a_baseline_that_blinds_the_guard() -> None:
    told = forecast_space(at_right_angles(dict.fromkeys(GATES, 10.0), baseline=np.full(4, 17.6)), load_space("wide"), limit=10)
    assert names(told) == ["blind"]
    assert (
        "pushes 17.6x the main loss" in told.findings[0].sentence
        and "176x the main loss before it fires" in told.findings[0].sentence
    )
    milder = at_right_angles(dict.fromkeys(GATES, 10.0), baseline=np.full(4, 9.9))
    assert names(forecast_space(milder, load_space("wide"), limit=10)) == []


def test_aliases_are_named() -> None:
    both = forecast_space(MODEL, space(ssim_loss_weight={"log_uniform": [1, 100]}, ssim_grad_scale={"choice": [0.1, 1]}))
    assert names(both) == ["aliases"] and "one dimension too many" in both.findings[0].sentence
    points = [(10.0, 0.3, 0.1), (1.0, 0.3, 1.0), (1.0, 0.1, 1.0), (100.0, 0.3, 0.01), (1.0, 0.3, 1.0)]
    told = forecast_space(MODEL, space({"log_uniform": [0.1, 100]}, points))
    assert [finding.sentence for finding in told.findings] == [
        "points (10, 0.3, 0.1) and (1, 0.3, 1) and (100, 0.3, 0.01) are one setting: the same gain behind the same gate"
    ]


def test_a_clamp_breaks_the_equivalence_and_is_said() -> None:
    clamped = at_right_angles(dict.fromkeys(GATES, 10.0), clamp_gain=(50.0, 40.0, 30.0, 20.0, 5.0))
    points = [(10.0, 0.3, 0.1), (1.0, 0.3, 1.0)]
    told = forecast_space(clamped, space({"log_uniform": [0.1, 100]}, points), limit=10)
    assert names(told) == ["clamp"] and "cuts in from gain 5 (@ 1) on" in told.findings[0].sentence
    assert told.widest[1] == pytest.approx(math.hypot(1, 5), rel=0.12)  # nothing is said beyond gain 50
    assert told.landmarks[-1].gain_for == {"1.1": pytest.approx(4.58, rel=1e-2), "1.5": None, "3": None, "10": None}
    with pytest.raises(ValueError, match=r"ssim_grad_clamp cuts in from gain 5 on at max_t=1: a ratio of 3 cannot be promised"):
        clamped.gain_for(3, 1.0)


def test_gates_that_nothing_is_known_about() -> None:
    told = forecast_space(at_right_angles({0.1: math.inf, 0.2: 10.0, 0.3: 10.0, 1.0: 10.0}), load_space("wide"), limit=10)
    assert (
        names(told) == ["inactive"]
        and "max_t 0.1: no sample of the 4 calibrated batches has 0 < t <= 0.1" in told.findings[0].sentence
    )
    assert [named.judgement for named in told.settings] == ["pushes", *["no calibrated batch is active"] * 2]


def test_a_range_of_gates_is_interpolated_and_says_so() -> None:
    told = forecast_space(MODEL, space({"log_uniform": [1, 30]}, ssim_loss_max_t={"uniform": [0.1, 1.0]}))
    assert names(told) == ["interpolated"] and "0.1, 0.15, 0.2, 0.3, 1" in told.findings[0].sentence


def test_relative_units_that_cannot_be_had() -> None:
    mixed = {"parameters": {"gain": {"unit": "norm_ratio", "log_uniform": [1.1, 3]}, "ssim_loss_max_t": {"choice": [0.3]}}}
    assert names(forecast_space(MODEL, load_space(mixed), limit=10)) == []
    told = forecast_space(MODEL, load_space({**mixed, "fixed": {"pixel_loss_weight": 2000}}), limit=10)
    assert (
        names(told) == ["unreachable"]
        and "no gain has a norm ratio of 1.1 at max_t=0.3: the smallest there is 2.2" in told.findings[0].sentence
    )


def test_other_settings_that_are_searched_too() -> None:
    assert names(forecast_space(MODEL, space({"log_uniform": [1, 30]}, lr={"log_uniform": [1e-5, 1e-3]}))) == []
    told = forecast_space(MODEL, space({"log_uniform": [1, 30]}, batch_size={"choice": [4, 8]}))
    assert names(told) == ["other_settings"] and told.findings[0].sentence.startswith("batch_size searched too")


def test_settings_by_name() -> None:
    told = forecast_space(MODEL, load_space("wide"), limit=10, max_ratio=20)
    assert [(named.name, named.judgement) for named in told.settings] == [("v1", "pushes"), ("v2", "inert"), ("v3", "inert")]
    harsh = forecast_space(
        MODEL, space({"log_uniform": [1, 3000]}, [(150.0, 0.3, 1.0), (2500.0, 0.3, 1.0)]), limit=10, max_ratio=20
    )
    assert [(named.name, named.judgement) for named in harsh.settings[3:]] == [
        ("point 1", "beyond the limit"),
        ("point 2", "not launched"),
    ]
    assert harsh.settings[3].prediction.ratio == pytest.approx(math.hypot(1, 15))


# ---- shown ----


def calibration(name: str, **guard: Any) -> dict[str, Any]:
    """As `Calibration.to_dict()`, through JSON."""
    told = forecast_space(MODEL, load_space(name), **guard).to_dict()
    check = {"setting": {}, "steps": [1, 2, 3], "predicted": [1.0], "measured": [1.0], "relative_error": 2e-7}
    loss = {"rms": 1e-3, "peak_over_rms": 6.0, "top_share": 0.15}
    made = {
        **{key: told[key] for key in ("findings", "limit", "shares", "settings")}, "skip_above": told["max_ratio"],
        "method": "gram", "why": "as asked", "ratios": told["widest"], "by_max_t": told["landmarks"], "check": check,
        "baseline_ratio_main": 1.0, "gradient_at_decoder": {"ssim": loss, "pixel": {**loss, "rms": 1e-6}},
        "dropped_batches": [], "wall_s": 3.2, "share_of_study": 0.03, "model": MODEL.to_dict(),
    }  # fmt: skip
    return json.loads(json.dumps(jsonable(made), allow_nan=False))


@pytest.mark.parametrize("name", bundled_spaces())
@pytest.mark.parametrize("guard", [{}, {"limit": 10.0, "max_ratio": 20.0}])
def test_every_space_can_be_shown(name: str, guard: dict[str, float]) -> None:
    data = calibration(name, **guard)
    console = Console(width=100, file=io.StringIO(), legacy_windows=False)
    for table in (gains_table(data), predictions_table(data, ascii_only=True)):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(version in text for version in ("v1", "v2", "v3")) and "4.58" in text
    assert ("10× (limit)" in text) == ("limit" in guard)
    words = calibration_sentences(data)
    assert any("the SSIM gradient is 1e+03 times the pixel loss's" in line for line in words)
    assert ("the whole space changes" in words[0]) == name.startswith("note")
    picture = draw_heat_map(data, load_space(name), "a study")
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_the_picture_of_little() -> None:
    """One gate, nothing that reaches the limit, no setting of a space's own."""
    lonely = at_right_angles({0.3: 1e9})
    data = {**calibration("wide"), "model": jsonable(lonely.to_dict()), "settings": []}
    assert draw_heat_map(
        data, load_space({"parameters": {"gain": {"choice": [1]}, "ssim_loss_max_t": {"choice": [0.3]}}})
    ).startswith(b"\x89PNG")
