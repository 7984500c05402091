"""Our searches as Ray Tune asks them. Real Ray classes; no cluster is started."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from norm_models import at_right_angles
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch as RayOptunaSearch
from small_studies import baseline, trial

from tune_ssim.base.errors import UserError
from tune_ssim.guards import Baseline, BaselineRun
from tune_ssim.orchestration import BaselineFirst, GuardedOptunaSearch, StagedSearch, param_space, ray_job
from tune_ssim.orchestration.ray_job import job_of
from tune_ssim.study.space import gain_of, load_space
from tune_ssim.trials.summary import TrialSummary
from tune_ssim.trials.trial_run import TrialReport, TrialResult

WIDE = load_space("wide").stages[0]
MODEL = at_right_angles({0.1: 40.0, 0.2: 25.0, 0.3: 15.0, 1.0: 8.0})


def result_of(config: dict[str, Any]) -> dict[str, Any]:
    """A smooth stand-in for a training: best near gain 30, harmful from 300 on."""
    gain = gain_of(config)
    if gain > 300:
        return {"verdict": "pruned", "harm": math.log10(gain / 300), "delta_ssim": math.nan}
    return {"verdict": "safe", "harm": 0.0, "delta_ssim": 0.01 * math.exp(-((math.log10(max(gain, 1e-9)) - 1.5) ** 2))}


def suggestions(searcher: Searcher, count: int, first: int = 0) -> list[dict[str, Any]]:
    found = []
    for k in range(first, first + count):
        config = searcher.suggest(f"t{k}")
        assert isinstance(config, dict)
        found.append(config)
        searcher.on_trial_complete(f"t{k}", result_of(config))
    return found


def test_a_restored_searcher_goes_on_as_the_one_that_was_saved(tmp_path: Path) -> None:
    straight = suggestions(GuardedOptunaSearch(WIDE, concurrency=2, model=MODEL, limit=10.0, max_ratio=20.0), 16)
    searcher = GuardedOptunaSearch(WIDE, concurrency=2, model=MODEL, limit=10.0, max_ratio=20.0)
    suggestions(searcher, 11)
    searcher.save(str(tmp_path / "state"))
    again = GuardedOptunaSearch(WIDE, concurrency=2, model=MODEL, limit=10.0, max_ratio=20.0)
    again.restore(str(tmp_path / "state"))
    assert again.skipped == searcher.skipped != []
    assert suggestions(again, 5, first=11) == straight[11:]


def ended(summary: TrialSummary, baseline_seed: int | None = None) -> dict[str, Any]:
    """The last result of our trainable."""
    run = None if baseline_seed is None else Baseline((BaselineRun(baseline_seed, {"total_norm": {1: 1.0}}, {"ssim": 0.9}),))
    return ray_job.result_of(TrialReport(result=TrialResult(summary, baseline=run)), "delta_ssim")


@pytest.mark.parametrize("inner", ["ours", "rays"])
def test_the_baseline_comes_before_any_searcher_of_ray(tmp_path: Path, inner: str) -> None:
    def make() -> BaselineFirst:
        space = {"gain": tune.loguniform(1.0, 10.0)}
        of_ray = RayOptunaSearch(space, metric="delta_ssim", mode="max", seed=0)
        searcher = GuardedOptunaSearch(WIDE) if inner == "ours" else of_ray
        return BaselineFirst(searcher, {"ssim_loss_weight": 0.0}, folder=tmp_path, seeds=(7, 8))

    searcher = make()
    first, second = (job_of(searcher.suggest(name), name) for name in "ab")
    assert [(job.role, job.seed) for job in (first, second)] == [("baseline", 7), ("baseline", 8)]
    assert searcher.suggest("c") is None
    for name, seed in (("b", 8), ("a", 7)):
        searcher.on_trial_complete(name, ended(baseline(f"baseline-{seed - 7}"), seed))
    config = searcher.suggest("c")
    job = job_of(config, "c")
    assert job.baseline is not None and [run.seed for run in job.baseline.read().runs] == [7, 8]
    assert {name: config[name] for name in job.settings} == dict(job.settings)  # schedulers and callbacks of Ray see the settings

    searcher.save(str(tmp_path / "state"))  # as Ray does: the innermost by `save`, what wraps it by `get_state`
    state = json.loads(json.dumps(searcher.get_state()))
    again = make()
    again.restore(str(tmp_path / "state"))
    again.set_state(state)
    following = []
    for one in (searcher, again):  # "c" was running when it was saved
        one.on_trial_complete("c", ended(trial("trial-00")))
        following.append(job_of(one.suggest("d"), "d"))
    assert following[0] == following[1] and following[0].trial_id == "trial-01"


def test_a_failing_baseline_ends_the_experiment(tmp_path: Path) -> None:
    searcher = BaselineFirst(GuardedOptunaSearch(WIDE), {}, folder=tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", None, error=True)
    assert searcher.suggest("b") == Searcher.FINISHED and searcher.failure == "the trial's process died"


def test_a_route_for_a_tuner_of_ones_own() -> None:
    searcher = StagedSearch(load_space("note_v3"), 4, concurrency=1)
    assert len(suggestions(searcher, 1)) == 1
    assert searcher.suggest("t1") == Searcher.FINISHED and "effective" in searcher.reason


def test_a_space_as_ray_domains() -> None:
    domains = param_space(load_space("wide"))
    assert domains["ssim_grad_scale"] == 1.0
    assert 0.001 <= domains["gain"].sample() <= 3000
    with pytest.raises(ValueError, match="4 stages"):
        param_space(load_space("note_v2"))


def test_the_space_may_come_from_the_tuner() -> None:
    searcher = GuardedOptunaSearch(metric="delta_ssim", seed=0)
    assert searcher.set_search_properties("delta_ssim", "max", param_space(load_space("wide")))
    for config in suggestions(searcher, 12):
        assert 0.001 <= config["gain"] <= 3000 and config["ssim_loss_max_t"] in (0.1, 0.2, 0.3, 1.0)


def test_a_relative_space_as_ray_domains() -> None:
    with pytest.raises(UserError, match="stage 'moderate' gives its gain as a norm ratio: calibrate first"):
        param_space(load_space("moderate"))
    domains = param_space(load_space("moderate"), MODEL)
    generator = BasicVariantGenerator(random_state=1)
    generator.add_configurations([tune.Experiment("e", lambda config: None, config=domains, num_samples=20)])
    for _ in range(20):
        ratio = MODEL.predict_setting(generator.next_trial().config).ratio
        assert 1.1 * (1 - 1e-9) <= ratio <= 1.5 * (1 + 1e-9)


def test_a_first_contact_passes_through_ray() -> None:
    assert ray_job.report_of(ray_job.result_of(TrialReport(contact=["first contact"]), "delta_ssim")).contact == ["first contact"]
