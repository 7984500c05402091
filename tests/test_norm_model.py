"""The norm model against the norms of real vectors: whatever it says must be what adding the vectors up gives."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_ssim.base.files import jsonable
from tune_ssim.before_launch.forecast import predicted
from tune_ssim.probes.norm_model import NormModel, Prediction, fit

GATES, BATCHES, SIZE = (0.1, 0.3, 1.0), 12, 400
rng = np.random.default_rng(7)
MAIN_G = rng.normal(size=(BATCHES, SIZE)) * rng.lognormal(size=(BATCHES, 1))  # heavy-tailed over batches, as norms are
PIXEL_G = rng.normal(size=(BATCHES, SIZE)) * 0.003
# One SSIM gradient a gate, partly against the main one: a small gain then shortens the sum.
SSIM_G = rng.normal(size=(3, BATCHES, SIZE)) * np.array([0.005, 0.01, 0.03])[:, None, None] - 0.01 * MAIN_G
ACTIVE = np.ones((3, BATCHES), dtype=bool)
ACTIVE[0, ::2] = False
BASELINE = np.linalg.norm(MAIN_G + 0.05 * PIXEL_G, axis=1)


def products(*gradients: np.ndarray) -> np.ndarray:
    return np.einsum("ibk,jbk->bij", np.stack(gradients), np.stack(gradients))


def predict(model: NormModel, weight: float, max_t: float, scale: float = 1.0, pixel_weight: float = 0.0) -> Prediction:
    return model.predict_gain(weight * scale, max_t, pixel_weight)


def model(**changes: Any) -> NormModel:
    q = np.stack([products(MAIN_G, PIXEL_G, ssim) for ssim in SSIM_G])
    held = {"pixel_loss_weight": 0.0, "pixel_loss_max_t": 0.3, "ssim_grad_scale": 1.0, "ssim_loss_max_t": 0.3}
    parts: dict[str, Any] = {"max_ts": GATES, "q": q, "active": ACTIVE, "baseline": BASELINE, "batches": range(1, 13)}
    parts |= {"method": "gram", "held": held}
    return NormModel(**{**parts, **changes})


MODEL = model()


def norms(gate: int, gain: float, pixel_weight: float = 0.0) -> np.ndarray:
    """Of the sums themselves, over the active batches."""
    return np.linalg.norm(MAIN_G + pixel_weight * PIXEL_G + gain * SSIM_G[gate], axis=1)[ACTIVE[gate]]


@settings(deadline=None)
@given(st.floats(-4, 5), st.floats(-3, 1), st.sampled_from([0, 1, 2]), st.sampled_from([0.0, 0.05, 300.0]))
def test_a_prediction_is_the_norm_of_the_sum(log_weight: float, log_scale: float, gate: int, pixel_weight: float) -> None:
    weight, scale = 10**log_weight, 10**log_scale
    said = predict(MODEL, weight, GATES[gate], scale, pixel_weight)
    sums, chosen = norms(gate, weight * scale, pixel_weight), ACTIVE[gate]
    numbers = (np.mean(sums), np.median(sums), np.quantile(sums, 0.1), np.quantile(sums, 0.9))
    said_numbers = (said.total_norm_mean, said.total_norm_median, said.total_norm_p10, said.total_norm_p90)
    assert said_numbers == pytest.approx(numbers, rel=1e-9)
    assert said.ratio == pytest.approx(np.median(sums) / np.median(BASELINE[chosen]), rel=1e-9)
    assert said.ratio_main == pytest.approx(np.median(sums) / np.median(np.linalg.norm(MAIN_G[chosen], axis=1)), rel=1e-9)
    ssim, main = SSIM_G[gate][chosen], MAIN_G[chosen]
    lengths = np.linalg.norm(ssim, axis=1)
    assert said.auxiliary_share == pytest.approx(np.median(weight * scale * lengths / sums), rel=1e-9)
    assert said.cosine == pytest.approx(np.median((ssim * main).sum(1) / lengths / np.linalg.norm(main, axis=1)), rel=1e-9)
    assert said.active_batches == chosen.sum() and said.between is None


@pytest.mark.parametrize(("pixel_weight", "scale", "limit"), [(0.0, 1.0, 1e4), (300.0, 0.1, 1e4), (0.0, 0.1, 100.0)])
def test_an_adaptive_weight_is_solved_for_on_each_batch(pixel_weight: float, scale: float, limit: float) -> None:
    main, ssim = (MAIN_G + pixel_weight * PIXEL_G)[ACTIVE[0]], SSIM_G[0][ACTIVE[0]]
    lengths = np.linalg.norm(main, axis=1), np.linalg.norm(ssim, axis=1)
    gains = np.minimum(2.5 * lengths[0] / lengths[1], limit * scale)
    assert (gains < limit * scale).all() == (limit == 1e4)  # in the last case the limit acts on some batches
    rule = {"adaptive": {"target_ratio": 2.5, "max_weight": limit}}
    setting = {"ssim_loss_weight": rule, "ssim_grad_scale": scale, "pixel_loss_weight": pixel_weight, "ssim_loss_max_t": 0.1}
    said = predicted(MODEL, setting)
    assert said.total_norm_median == pytest.approx(np.median(np.linalg.norm(main + gains[:, None] * ssim, axis=1)), rel=1e-9)
    assert said.gain == pytest.approx(np.median(gains)) and said.active_batches == len(gains)
    between = predicted(MODEL, {**setting, "ssim_loss_max_t": 0.2})
    ends = sorted([said.ratio, predicted(MODEL, {**setting, "ssim_loss_max_t": 0.3}).ratio])
    assert ends[0] <= between.ratio <= ends[1] and between.between == (0.1, 0.3)


def test_a_schedule_is_predicted_by_its_largest_weight() -> None:
    cosine = {"cosine": {"start": 2, "end": 20, "steps": 100}}
    said = predicted(MODEL, {"ssim_loss_weight": cosine, "ssim_loss_max_t": 1.0})
    assert said == predicted(MODEL, {"ssim_loss_weight": 20, "ssim_loss_max_t": 1.0})


def test_the_gate_of_the_pixel_loss_is_that_of_the_calibration() -> None:
    setting = {"ssim_loss_weight": 3.0, "ssim_loss_max_t": 1.0, "pixel_loss_weight": 300.0}
    assert predicted(MODEL, {**setting, "pixel_loss_max_t": 0.1}) == MODEL.predict_setting(setting)


def test_only_the_product_acts() -> None:
    one, other = predict(MODEL, 10, 0.3, 0.1), predict(MODEL, 100, 0.3, 0.01)
    assert (one.gain, one.ratio) == pytest.approx((other.gain, other.ratio))


@settings(deadline=None)
@given(st.floats(1.0, 1e4), st.sampled_from([*GATES, 0.2, 0.05]), st.sampled_from([0.0, 5.0]))
def test_the_gain_for_a_ratio_gives_that_ratio(ratio: float, max_t: float, pixel_weight: float) -> None:
    gain = MODEL.gain_for(ratio, max_t, pixel_weight)
    assert MODEL.ratios([gain], max_t, pixel_weight)[0] == pytest.approx(ratio, rel=1e-9)
    assert (MODEL.ratios(np.geomspace(gain * 1.0001, gain * 1e4, 300), max_t, pixel_weight) > ratio).all()  # the rising branch


def test_the_falling_branch_is_not_taken() -> None:
    dip = np.geomspace(1e-3, 10, 400)
    ratios = MODEL.ratios(dip, 1.0)
    assert ratios.min() < 0.999  # else this tests nothing
    ratio = float((ratios.min() + 1) / 2)
    assert MODEL.gain_for(ratio, 1.0) > dip[ratios.argmin()]


def test_a_ratio_that_no_gain_has() -> None:
    with pytest.raises(ValueError, match=r"no gain has a norm ratio of 0.5 at max_t=0.3: the smallest there is 0\.63"):
        MODEL.gain_for(0.5, 0.3)
    with pytest.raises(ValueError, match="finite number > 0"):
        MODEL.gain_for(math.nan, 0.3)
    silent = MODEL.q.copy()
    silent[:, :, 2, :] = silent[:, :, :, 2] = 0
    with pytest.raises(ValueError, match=r"sends no gradient at max_t=0\.3"):
        model(q=silent).gain_for(2, 0.3)


def test_between_two_gates_numbers_lie_between_and_beyond_them_they_are_the_nearest() -> None:
    ends = [predict(MODEL, 50, max_t).ratio for max_t in (0.3, 1.0)]
    middle = predict(MODEL, 50, 0.6)
    assert min(ends) < middle.ratio < max(ends) and middle.between == (0.3, 1.0)
    near = predict(MODEL, 50, 0.3 + 1e-6)
    assert near.ratio == pytest.approx(ends[0], rel=1e-4)
    below = predict(MODEL, 50, 0.05)
    assert below.ratio == predict(MODEL, 50, 0.1).ratio and below.between == (0.1, 0.1)
    assert MODEL.ratios([50.0], 0.6)[0] == pytest.approx(middle.ratio, rel=1e-12)


def test_a_gate_that_no_sample_passes() -> None:
    idle = ACTIVE.copy()
    idle[0] = False
    blind = model(active=idle)
    said = predict(blind, 50, 0.1)
    assert said.active_batches == 0 and math.isnan(said.ratio) and math.isnan(said.total_norm_median)
    with pytest.raises(ValueError, match=r"no sample of the 12 calibrated batches has 0 < t <= 0\.1: raise calibration\.batches"):
        blind.gain_for(2, 0.1)
    assert predict(blind, 50, 0.2).ratio == predict(blind, 50, 0.3).ratio  # its neighbour is asked instead


def test_what_a_setting_leaves_out_is_held() -> None:
    assert MODEL.predict_setting({"ssim_loss_weight": 3.0}) == predict(MODEL, 3, 0.3)
    assert MODEL.predict_setting({"gain": 3.0, "ssim_loss_max_t": 1.0}) == predict(MODEL, 3, 1.0)
    mixed = model(held={**MODEL.held, "pixel_loss_weight": 300.0})
    assert mixed.predict_setting({"ssim_loss_weight": 3.0}) == predict(mixed, 3, 0.3, 1.0, 300.0)
    with pytest.raises(ValueError, match=r"calibrated with pixel_loss_max_t=0\.3; this setting has 0\.2"):
        MODEL.predict_setting({"ssim_loss_weight": 3.0, "pixel_loss_weight": 1.0, "pixel_loss_max_t": 0.2})
    MODEL.predict_setting({"ssim_loss_weight": 3.0, "pixel_loss_max_t": 0.2})  # without a pixel loss its gate means nothing


def test_a_baseline_that_pushes_hard_itself() -> None:
    hard = model(baseline=np.linalg.norm(MAIN_G + 1e4 * PIXEL_G, axis=1))
    assert hard.baseline_ratio_main > 10 > 1.1 > MODEL.baseline_ratio_main
    assert predict(hard, 60, 1.0).ratio < 1 < predict(hard, 60, 1.0).ratio_main
    gain = hard.gain_for(0.5, 1.0)  # below the baseline, and yet on the rising branch
    assert hard.ratios([gain], 1.0)[0] == pytest.approx(0.5)


def test_a_clamp_is_said() -> None:
    clamped = model(clamp_gain=(5.0, 10.0, 20.0))
    assert not predict(clamped, 9, 0.3).clamped and predict(clamped, 11, 0.3).clamped
    assert predict(clamped, 6, 0.2).clamped  # of the two gates around it the earlier one counts


# ---- readings ----


def readings(settings: list[tuple[float, float]], gate: int = 1) -> np.ndarray:
    return np.stack([np.linalg.norm(MAIN_G + p * PIXEL_G + g * SSIM_G[gate], axis=1) for p, g in settings])


@pytest.mark.parametrize("count", [3, 6])
def test_three_readings_give_the_curve(count: int) -> None:
    settings = [(0.0, g) for g in (0.0, 30.0, 120.0, 3.0, 60.0, 10.0)][:count]
    q = fit(settings, readings(settings))
    np.testing.assert_allclose(q[:, 2, 2], MODEL.q[1, :, 2, 2], rtol=1e-8)
    np.testing.assert_allclose(q[:, 0, 2], MODEL.q[1, :, 0, 2], rtol=1e-6, atol=1e-9)
    assert np.isnan(q[:, 1]).all()
    fitted = model(q=np.stack([q] * 3))
    assert predict(fitted, 7, 0.3).ratio == pytest.approx(predict(MODEL, 7, 0.3).ratio, rel=1e-8)
    with pytest.raises(ValueError, match="calibrated without the pixel loss"):
        predict(fitted, 7, 0.3, pixel_weight=0.05)


def test_with_the_pixel_loss_six_readings_give_all_of_q() -> None:
    settings = [(0.0, 0.0), (300.0, 0.0), (600.0, 0.0), (0.0, 30.0), (0.0, 120.0), (300.0, 30.0)]
    np.testing.assert_allclose(fit(settings, readings(settings)), MODEL.q[1], rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="6 unknowns need as many different settings, got 5"):
        fit(settings[:5], readings(settings[:5]))
    with pytest.raises(ValueError, match="3 unknowns"):
        fit([(0.0, 0.0), (0.0, 1.0), (0.0, 1.0)], readings([(0.0, 0.0), (0.0, 1.0), (0.0, 1.0)]))


def test_a_fit_to_rounded_readings_stays_a_gradient() -> None:
    settings = [(0.0, 0.0), (0.0, 1e-5), (0.0, 2e-5)]  # far too small: nothing but float32 rounding is read
    q = fit(settings, readings(settings).astype(np.float32))
    assert (q[:, 2, 2] * q[:, 0, 0] >= q[:, 0, 2] ** 2 * (1 - 1e-12)).all()
    said = predict(model(q=np.stack([q] * 3)), 1e6, 0.3)
    assert said.total_norm_p10 >= 0 and not math.isnan(said.ratio)


# ---- as data ----


def test_json_and_back() -> None:
    for one in (MODEL, model(q=np.where(np.isin(np.arange(3), 1)[:, None], np.nan, MODEL.q), clamp_gain=(1.0, 2.0, math.inf))):
        text = json.dumps(jsonable(one.to_dict()), allow_nan=False)
        again = NormModel.from_dict(json.loads(text))
        np.testing.assert_array_equal(again.q[..., 0, 2], one.q[..., 0, 2])
        assert (again.max_ts, again.batches, again.held, again.clamp_gain) == (one.max_ts, one.batches, one.held, one.clamp_gain)
        assert predict(again, 3, 0.1) == predict(one, 3, 0.1)


@pytest.mark.parametrize("data", [[], {}, {"format": 99}, {"format": 1}, {"format": 1, "dot_products": [{}]}, "x"])
def test_what_is_no_norm_model_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="norm model"):
        NormModel.from_dict(data)


@pytest.mark.parametrize(
    "changes",
    [{"max_ts": gates} for gates in ((0.3, 0.1, 1.0), (0.1, 0.1, 1.0), ())] + [{"batches": (1, 2)}, {"clamp_gain": (1.0,)}],
)
def test_parts_that_do_not_fit_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="norm model"):
        model(**changes)
