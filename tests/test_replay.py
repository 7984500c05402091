"""The replay laboratory on made-up curves: its files, its interpolation, its truth, and searches through the real phases."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from synthetic_curves import STEPS, synthetic_curves

from tune_ssim.base.files import jsonable

from curves import Curves  # isort: skip  (synthetic_curves adds the folder of the laboratory to the path)
from replay import run_product, run_stock, simulate  # isort: skip
from run import PRODUCT, compare  # isort: skip
from truth import Truth  # isort: skip


@pytest.fixture(scope="module")
def curves() -> Curves:
    return synthetic_curves()


def test_a_recording_is_read_as_it_was_written(curves: Curves, tmp_path: Path) -> None:
    curves.write(tmp_path / "made")
    again = Curves.read(tmp_path / "made.json")
    assert again.header == jsonable(curves.header)
    assert [(run.gain, run.max_t, run.seed) for run in again.runs] == [(run.gain, run.max_t, run.seed) for run in curves.runs]
    one, other = again.find(16.0, 1.0, 2), curves.find(16.0, 1.0, 2)
    assert one is not None and other is not None
    np.testing.assert_array_equal(one.values["steps"]["total_norm"], other.values["steps"]["total_norm"])
    assert one.at("smoke_again", 0) == {}  # NaN: the second noise was not drawn there


def test_between_two_gains_curves_are_interpolated_in_the_logarithm(curves: Curves) -> None:
    below, above = curves.play(16.0, 1.0, 0), curves.play(32.0, 1.0, 0)
    middle = curves.play(math.sqrt(16 * 32), 1.0, 0)
    expected = np.sqrt(below.values["steps"]["total_norm"] * above.values["steps"]["total_norm"])
    np.testing.assert_allclose(middle.values["steps"]["total_norm"], expected, rtol=1e-5)
    last = [run.values["evaluations"]["ssim"][-1] for run in (below, middle, above)]
    assert last[1] == pytest.approx((last[0] + last[2]) / 2, rel=1e-5)
    assert curves.play(17.0, 1.0, 0, snap=True) is curves.find(16.0, 1.0, 0)
    assert curves.play(16.0, 0.9, 5) is curves.find(16.0, 1.0, 1)  # the nearest max_t, and seeds counted through the four
    assert curves.play(1e-9, 1.0, 0).values["evaluations"]["ssim"][-1] == pytest.approx(0.875)  # the baseline's


def test_the_truth_of_a_setting_comes_from_the_curves(curves: Curves) -> None:
    truth = Truth(curves)
    assert truth.best_setting is not None and truth.best_setting[1] == 1.0
    assert truth.of(400.0, 1.0).truth == "ruined" and truth.of(16.0, 1.0).truth == "safe"
    assert truth.helps and not Truth(synthetic_curves(best=0.0)).helps


def test_a_simulated_clock_keeps_its_workers_busy() -> None:
    class Work:
        def __init__(self, steps: float) -> None:
            self.left = [steps, steps]

        def advance(self) -> float:
            return self.left.pop()

        def tell(self) -> bool:
            return not self.left

    queue = [Work(3), Work(1), Work(1)]
    end, busy = simulate(2, lambda: queue.pop(0) if queue else None)
    assert (end, busy) == (6, 10)  # 3 + 3 on one worker, 1 + 1 + 1 + 1 on the other


def test_the_products_own_phases_run_on_the_clock(curves: Curves) -> None:
    found = run_product(curves, PRODUCT["aggressive_6"], seed=0, workers=2)
    baselines = [one for one in found.trials if one.role == "baseline"]
    assert [one.verdict for one in baselines] == ["safe", "safe"] and len(found.trials) == 8
    pruned = [one for one in found.trials if one.verdict == "pruned"]
    assert all(one.steps < STEPS or Truth(curves).of(one.gain, one.max_t).truth == "ruined" for one in pruned)
    assert found.pick is not None and Truth(curves).of(found.pick.gain, found.pick.max_t).truth == "safe"
    assert found.calibration == 30 and found.makespan > 30 + 2 * STEPS
    assert found == run_product(curves, PRODUCT["aggressive_6"], seed=0, workers=2)


def test_rays_own_scheduler_stops_trials_early(curves: Curves) -> None:
    halved = run_stock(curves, 0, 2, tpe=False, asha=True, trials=12)
    whole = run_stock(curves, 0, 2, tpe=False, asha=False, trials=12)
    assert sum(one.steps for one in whole.trials) == 12 * STEPS > sum(one.steps for one in halved.trials)
    assert halved.pick is not None and halved.pick.value == max(one.value for one in halved.trials)


def test_a_comparison_is_plain_data(curves: Curves, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(curves, ["aggressive_6", "recommend_3"], seeds=2, workers=2)
    row = found["strategies"]["aggressive_6"]
    assert row["seeds"] == 2 and row["steps"] >= 2 * STEPS and 0 <= row["good"] <= 1
    assert found["strategies"]["recommend_3"]["good"] == 1.0  # the made-up training is best at ratio 3
    assert "| aggressive_6 |" in capsys.readouterr().out
