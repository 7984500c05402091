"""The replay laboratory on made-up curves: its files, its interpolation, its truth, and searches through the real phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_studies import SMALL
from synthetic_curves import STEPS, synthetic_curves

from tune_ssim.base.files import jsonable
from tune_ssim.guards import Baseline
from tune_ssim.guards.verdict import Role
from tune_ssim.study.study import load_study
from tune_ssim.trials.final_verdict import TrialPlan
from tune_ssim.trials.job import BaselineFile, TrialJob
from tune_ssim.trials.training import Training
from tune_ssim.trials.trial_run import TrialResult, TrialRun, TrialSpec

from curves import Curves  # isort: skip  (synthetic_curves adds the folder of the laboratory to the path)
from policies import measure  # isort: skip
from record import record  # isort: skip
from recommend import evidence, rule  # isort: skip
from replay import ReplayTraining, run_product, run_stock, simulate  # isort: skip
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


def test_a_recorded_training_gets_the_verdicts_of_the_real_one(tmp_path: Path) -> None:
    """Recorded with the product's own task, and replayed through its own trials: verdict, step, evidence and metrics agree."""
    study = load_study({**SMALL, "calibration": {}, "objective": {"keep": {"psnr": {"min_delta": -3.0}}}})
    made = record("small", study, {0.3: (1.0, 30.0, 1000.0)}, (0, 1), tmp_path)
    assert record("small", study, {0.3: (1.0, 30.0, 1000.0)}, (0, 1), tmp_path).runs[3].gain == made.runs[3].gain  # nothing is left
    plan = TrialPlan(study.steps, study.guard_list, keep=study.objective.rules, image_grids=False)
    spec = TrialSpec(study.task_path, plan, study.task_config, import_path=study.import_path)

    def ends(make: Callable[[], Training]) -> list[dict[str, Any]]:
        folder, found = tmp_path / make.__class__.__name__, []
        runs = []
        for seed in (0, 1):
            report = played(spec, TrialJob(f"b{seed}", study.baseline_settings, Role.BASELINE, seed), make)
            assert report.baseline is not None
            runs.append(report.baseline.runs[0])
        baseline = Baseline(tuple(runs))
        folder.mkdir()
        file = BaselineFile(str(folder / "b.json"), baseline.sha256)
        Path(file.path).write_bytes(baseline.to_bytes())
        for gain in (1.0, 30.0, 1000.0):
            settings = {"ssim_loss_weight": gain, "ssim_loss_max_t": 0.3, "ssim_grad_scale": 1.0, "pixel_loss_weight": 0}
            result = played(spec, TrialJob(f"gain-{gain:g}", settings, seed=1, searched=tuple(settings), baseline=file), make)
            found.append(
                result.summary.to_dict() | {"metrics": rounded(result.summary.metrics), "evidence": result.summary.evidence}
            )
        return found

    real, replayed = ends(spec.make_training), ends(partial(ReplayTraining, Curves.read(tmp_path / "small")))
    assert [one["verdict"] for one in replayed] == [one["verdict"] for one in real] == ["safe", "degraded", "pruned"]
    for one, other in zip(replayed, real, strict=True):
        assert (one["steps"], one["metrics"], one["config"]) == (other["steps"], other["metrics"], other["config"])


def played(spec: TrialSpec, job: TrialJob, make: Callable[[], Training]) -> TrialResult:
    run, result = TrialRun(spec, job, make), None
    while result is None:
        result = run.advance().result
    return result


def rounded(metrics: Mapping[str, float]) -> dict[str, str]:
    """To the five digits that float32 certainly keeps."""
    return {name: f"{value:.5g}" for name, value in metrics.items() if name != "seconds" and not name.startswith("delta")}


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


def test_every_search_sees_the_seeds_in_an_order_of_its_own(curves: Curves) -> None:
    orders = {tuple(curves.of_search(seed).play(16.0, 1.0, seed + index).seed for index in range(4)) for seed in range(40)}
    assert len(orders) > 10 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert curves.of_search(7).play(0.0, 1.0, 8).seed == curves.of_search(7).play(16.0, 0.3, 8).seed  # paired


def test_the_evidence_for_a_recommendation_names_the_ratios_that_are_good(curves: Curves) -> None:
    found = evidence(curves)
    low, high = found["by_max_t"]["1"]["good_ratios"]
    assert low < 3.0 < high < 15  # made up to be best at 3, and ruined from 15 on
    at_three = rule({"made": found, "useless": evidence(synthetic_curves(best=0.0))})["3"]
    assert at_three["recordings"] == at_three["good"] == 1 and at_three["harmful"] == 0


def test_policies_are_judged_by_the_truth_of_each_run() -> None:
    curves = synthetic_curves(seeds=2, gains=(8.0, 400.0))
    found = measure(curves)
    assert found["truth"]["ruined"] == 2 * sum(Truth(curves).of(*setting).truth == "ruined" for setting in curves.settings) > 0
    smoke, norm = found["policies"]["smoke alone"], found["policies"]["norm alone"]
    assert smoke["ruined_missed"]["count"] == 0 and smoke["sound_pruned"]["count"] == 0  # made up to fall by 8 dB
    assert norm["ruined_missed"]["count"] == 0 and norm["median_step_of_a_right_prune"] < 15
