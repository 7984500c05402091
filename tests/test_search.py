"""Who is tried next: order, what Optuna is told, routes, baselines. Real Optuna; no trial is trained here."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from norm_models import at_right_angles
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from tune_ssim.base.errors import UserError
from tune_ssim.guards import Baseline, BaselineRun
from tune_ssim.orchestration.search import BaselineFirst, GuardedOptunaSearch, StagedSearch, param_space
from tune_ssim.orchestration.trainable import CONTEXT
from tune_ssim.results.study_folder import read_skipped
from tune_ssim.study.space import gain_of, load_space

WIDE = load_space("wide").stages[0]


def result_of(config: dict[str, Any]) -> dict[str, Any]:
    """A smooth stand-in for a training: best near gain 30, harmful from 300 on."""
    gain = gain_of(config)
    if gain > 300:
        return {"verdict": "pruned", "harm": math.log10(gain / 300), "delta_ssim": math.nan}
    return {"verdict": "safe", "harm": 0.0, "delta_ssim": 0.01 * math.exp(-((math.log10(max(gain, 1e-9)) - 1.5) ** 2))}


def search(
    order: random.Random | None, trials: int = 24, concurrency: int = 2, seed: int = 0, **options: Any
) -> list[dict[str, Any]]:
    """Runs `trials` with `concurrency` at a time, which of the running ones ends first being drawn from `order`."""
    searcher = GuardedOptunaSearch(WIDE, seed=seed, concurrency=concurrency, **options)
    suggested: list[dict[str, Any]] = []
    running: list[tuple[str, dict[str, Any]]] = []
    while len(suggested) < trials or running:
        asked = None
        if len(suggested) < trials and len(running) < concurrency:
            trial_id = f"t{len(suggested)}"
            asked = searcher.suggest(trial_id)
            if asked is not None:
                suggested.append(asked)
                running.append((trial_id, asked))
        if asked is None or len(running) == concurrency:
            index = order.randrange(len(running)) if order else 0
            trial_id, config = running.pop(index)
            searcher.on_trial_complete(trial_id, result_of(config))
    return suggested


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_suggestions_do_not_depend_on_which_trial_ends_first(concurrency: int) -> None:
    orders = [search(random.Random(k) if k else None, concurrency=concurrency) for k in range(4)]
    assert all(other == orders[0] for other in orders[1:])
    assert search(None, concurrency=concurrency, seed=1) != orders[0]


def test_the_order_would_matter_without_it() -> None:
    orders = [search(random.Random(k), concurrency=4, deterministic=False) for k in range(4)]
    assert any(other != orders[0] for other in orders[1:])


def test_points_come_first_as_written_and_the_hypercube_covers_the_range() -> None:
    suggested = search(None)
    written = [dict(point) for point in WIDE.points]
    for point, config in zip(written, suggested, strict=False):
        assert {name: config[name] for name in point} == point
    gains = sorted(gain_of(config) for config in suggested[len(written) : len(written) + 6])
    edges = [0.001 * (3000 / 0.001) ** (k / 6) for k in range(7)]
    for low, gain, high in zip(edges, gains, edges[1:], strict=False):
        assert low <= gain <= high * 1.0000001  # one in each sixth of the logarithmic range, for every seed
    assert all("gain" not in config for config in suggested)


def test_optuna_is_told_pruned_with_a_graded_constraint() -> None:
    searcher = GuardedOptunaSearch(WIDE, concurrency=1, deterministic=False)
    outcomes = [
        ({"verdict": "pruned", "harm": 0.7, "delta_ssim": math.nan}, "PRUNED", 0.7),
        ({"verdict": "safe", "harm": 0.0, "delta_ssim": 0.01}, "COMPLETE", 0.0),
        ({"verdict": "degraded", "harm": 0.05, "delta_ssim": 0.02}, "COMPLETE", 0.05),
        ({"verdict": "error", "harm": 0.0, "delta_ssim": math.nan}, "FAIL", None),
        ({"delta_ssim": math.nan, "harm": None, "verdict": None}, "PRUNED", 1.0),  # stopped by a scheduler
    ]
    for index, (result, _, _) in enumerate(outcomes):
        searcher.suggest(f"t{index}")
        searcher.on_trial_complete(f"t{index}", result)
    searcher.suggest("t9")
    searcher.on_trial_complete("t9", None, error=True)
    told = searcher._ot_study.get_trials()
    for trial, (_, state, harm) in zip(told, outcomes, strict=False):
        assert trial.state.name == state
        assert trial.constraints.get("harm") == harm
    assert told[5].state == optuna.trial.TrialState.FAIL


def test_pruning_is_learnt() -> None:
    """A loss that looks the better the harder one pushes, and a cliff at gain 300. Told COMPLETE with its last value, as Ray's
    own OptunaSearch does, a ruined trial attracts the sampler; told PRUNED with a constraint it does not."""

    def harmful(told_complete: bool, seed: int) -> int:
        searcher = GuardedOptunaSearch(WIDE, seed=seed, concurrency=1)
        beyond = 0
        for k in range(40):
            config = searcher.suggest(f"t{k}")
            gain = gain_of(config)
            beyond += gain > 300
            value = {"delta_ssim": math.log10(gain), "verdict": "safe", "harm": 0.0}
            pruned = {"delta_ssim": math.nan, "verdict": "pruned", "harm": math.log10(max(gain, 301) / 300)}
            searcher.on_trial_complete(f"t{k}", value if told_complete or gain <= 300 else pruned)
        return beyond

    guarded, naive = (sum(harmful(told, seed) for seed in range(4)) for told in (False, True))
    assert guarded < 0.6 * naive, (guarded, naive)


def test_state_survives_a_restart_in_the_middle(tmp_path: Path) -> None:
    straight = search(None, trials=16)
    searcher = GuardedOptunaSearch(WIDE, concurrency=2)
    configs = []
    for k in range(16):
        if k == 11:
            searcher.save(str(tmp_path / "s"))
            searcher = GuardedOptunaSearch(WIDE, concurrency=2, seed=99)
            searcher.restore(str(tmp_path / "s"))
        if k >= 2:
            searcher.on_trial_complete(f"t{k - 2}", result_of(configs[k - 2]))
        configs.append(searcher.suggest(f"t{k}"))
    assert configs == straight


def route(outcome: Any, trials: int = 8) -> tuple[StagedSearch, list[str]]:
    searcher, stages = StagedSearch(load_space("note_v3"), trials, effective_above=0.001, concurrency=1), []
    while isinstance(suggestion := searcher.suggest(f"t{len(stages)}"), dict):
        stages.append(suggestion[CONTEXT]["stage"])
        searcher.on_trial_complete(f"t{len(stages) - 1}", outcome(stages[-1]))
    assert suggestion == Searcher.FINISHED
    return searcher, stages


def test_a_route_is_relaxed_only_while_it_is_stable_and_ineffective() -> None:
    safe = {"verdict": "safe", "harm": 0.0, "delta_ssim": 0.0}
    _, stages = route(lambda stage: safe)
    assert [name for name, _ in itertools.groupby(stages)] == ["conservative", "moderate", "assertive", "aggressive"]
    assert len(stages) == 8
    searcher, stages = route(lambda stage: safe if stage == "conservative" else {**safe, "verdict": "pruned", "harm": 1.0})
    assert stages[-1] == "moderate" and "harmful" in searcher.reason
    searcher, stages = route(lambda stage: {**safe, "delta_ssim": 0.01})
    assert set(stages) == {"conservative"} and "effective" in searcher.reason


def baseline_bytes(seed: int) -> str:
    return Baseline((BaselineRun(seed, {"total_norm": {1: 1.0}}, {"ssim": 0.9}),)).to_bytes().decode()


def test_the_baseline_comes_first_and_everyone_waits(tmp_path: Path) -> None:
    inner = GuardedOptunaSearch(WIDE, concurrency=2)
    searcher = BaselineFirst(inner, {"ssim_loss_weight": 0.0}, folder=tmp_path, seeds=(7, 8))
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert isinstance(first, dict) and isinstance(second, dict)
    assert [config[CONTEXT]["seed"] for config in (first, second)] == [7, 8]
    assert searcher.suggest("c") is None
    searcher.on_trial_complete("b", {"verdict": "safe", "baseline_run": baseline_bytes(8)})
    assert searcher.suggest("c") is None
    searcher.on_trial_complete("a", {"verdict": "safe", "baseline_run": baseline_bytes(7)})
    third = searcher.suggest("c")
    assert isinstance(third, dict)
    pointer = third[CONTEXT]["baseline"]
    assert [run.seed for run in Baseline.read(**pointer).runs] == [7, 8]  # in the order of the seeds, not of their ends
    assert third[CONTEXT]["seed"] == 7
    assert len(json.dumps(third)) < 1000  # a path and a digest, not the norms

    again = BaselineFirst(GuardedOptunaSearch(WIDE), {}, folder=tmp_path)
    again.set_state(json.loads(json.dumps({k: v for k, v in searcher.get_state().items() if not k.startswith("_metric")})))
    assert isinstance(again.suggest("d"), dict)


@pytest.mark.parametrize("error", [True, False])
def test_a_failing_baseline_ends_the_search(tmp_path: Path, error: bool) -> None:
    searcher = BaselineFirst(GuardedOptunaSearch(WIDE), {}, folder=tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", None if error else {"verdict": "bad_setup", "reason": "ruined at step 0"}, error=error)
    assert searcher.suggest("b") == Searcher.FINISHED
    assert searcher.failure == ("the trial's process died" if error else "ruined at step 0")


def test_two_alike_set_up_errors_end_the_search(tmp_path: Path) -> None:
    searcher = BaselineFirst(GuardedOptunaSearch(WIDE, deterministic=False), {}, folder=tmp_path, seeds=(0,))
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"verdict": "safe", "baseline_run": baseline_bytes(0)})
    for trial_id in "bc":
        assert isinstance(searcher.suggest(trial_id), dict)
        searcher.on_trial_complete(trial_id, {"verdict": "error", "reason": "no weights", "delta_ssim": math.nan})
    assert searcher.suggest("d") == Searcher.FINISHED and "no weights" in searcher.failure


def test_a_space_as_ray_domains() -> None:
    domains = param_space(load_space("wide"))
    assert domains["ssim_grad_scale"] == 1.0
    assert 0.001 <= domains["gain"].sample() <= 3000
    with pytest.raises(ValueError, match="4 stages"):
        param_space(load_space("note_v2"))


# ---- with a norm model ----


MODEL = at_right_angles({0.1: 40.0, 0.2: 25.0, 0.3: 15.0, 1.0: 8.0})
GUARD: dict[str, Any] = {"limit": 10.0, "skip_above": 20.0}


@pytest.mark.parametrize("name", ["conservative", "moderate", "assertive", "aggressive"])
def test_a_relative_space_hands_out_gains_of_the_predicted_ratio(name: str) -> None:
    (stage,) = load_space(name).stages
    searcher = GuardedOptunaSearch(stage, model=MODEL, seed=3, **GUARD)
    gates = set()
    for k in range(20):
        config = searcher.suggest(f"t{k}")
        assert isinstance(config, dict) and set(config) == {
            "ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale", "pixel_loss_weight"
        }  # fmt: skip
        gates.add(config["ssim_loss_max_t"])
        asked = searcher._ot_trials[f"t{k}"].params["gain"]
        said = MODEL.predict_setting(config).ratio
        assert asked in stage.parameters["gain"] and said == pytest.approx(asked, rel=1e-9)
        searcher.on_trial_complete(f"t{k}", result_of(config))
    assert gates == {0.1, 0.2, 0.3, 1.0} and not searcher.skipped
    assert "gain" not in str(config)  # three numbers reach the task


def test_a_relative_space_without_a_model() -> None:
    space = load_space("moderate")
    for make in (GuardedOptunaSearch, param_space):
        with pytest.raises(UserError, match="stage 'moderate' gives its gain as a norm ratio: calibrate first"):
            make(space.stages[0])


def test_settings_predicted_beyond_are_listed_and_not_launched() -> None:
    searcher = GuardedOptunaSearch(WIDE, model=MODEL, concurrency=2, **GUARD)
    launched: list[dict[str, Any]] = []
    for k in range(24):
        config = searcher.suggest(f"t{k}")
        assert isinstance(config, dict)  # a skipped one costs no trial
        launched.append(config)
        searcher.on_trial_complete(f"t{k}", result_of(config))
    assert all(MODEL.predict_setting(config).ratio <= 20 for config in launched)
    assert searcher.skipped and all(skipped.predicted_ratio > 20 for skipped in searcher.skipped)
    skipped = searcher.skipped[0]
    assert MODEL.predict_setting(skipped.config).ratio == skipped.predicted_ratio
    assert f"predicted {skipped.predicted_ratio:.3g}x the baseline's" in skipped.sentence and "limit 10" in skipped.sentence
    told = [trial for trial in searcher._ot_study.get_trials() if trial.state.name == "PRUNED"]
    harms = {round(math.log10(s.predicted_ratio / 10), 9) for s in searcher.skipped}
    assert harms <= {round(trial.constraints["harm"], 9) for trial in told}  # the sampler learns from what was not launched


def test_a_model_alone_changes_no_suggestion() -> None:
    assert search(None, model=MODEL) == search(None)
    assert search(None, model=MODEL, limit=10.0) == search(None)
    mild = at_right_angles(dict.fromkeys((0.1, 0.2, 0.3, 1.0), 1e6))
    assert search(None, model=mild, **GUARD) == search(None)  # nothing in the space is beyond


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_skipping_keeps_the_order_deterministic(concurrency: int) -> None:
    orders = [search(random.Random(k) if k else None, concurrency=concurrency, model=MODEL, **GUARD) for k in range(4)]
    assert all(other == orders[0] for other in orders[1:])
    assert orders[0] != search(None, concurrency=concurrency)


def test_a_space_wholly_beyond_the_limit_ends_with_a_message() -> None:
    deadly = at_right_angles(dict.fromkeys((0.1, 0.2, 0.3, 1.0), 1e-6))
    with pytest.raises(UserError, match=r"stage 'wide': every setting is predicted beyond 20 \(2x .*the mildest has 1e\+03x"):
        GuardedOptunaSearch(WIDE, model=deadly, **GUARD)
    narrow = at_right_angles({0.1: 1e-5, 0.2: 1e-5, 0.3: 1e-5, 1.0: 5.01e-5})  # one gain in ten thousand is left
    searcher = GuardedOptunaSearch(WIDE, model=narrow, **GUARD)
    assert isinstance(searcher.suggest("t0"), dict)  # the graded constraint leads TPE there
    searcher = GuardedOptunaSearch(WIDE, model=narrow, sampler=optuna.samplers.RandomSampler(seed=0), **GUARD)
    assert searcher.suggest("t0") == Searcher.FINISHED  # it does not look for ever
    assert len(searcher.skipped) == 200 and "200 suggestions in a row were not launched" in searcher.reason


def test_a_gate_that_was_not_calibrated_is_listed_too() -> None:
    gates = dict.fromkeys((0.2, 0.3, 1.0), 10.0)
    idle = at_right_angles({0.1: math.inf, **gates})
    (stage,) = load_space("moderate").stages
    searcher = GuardedOptunaSearch(stage, model=idle, deterministic=False, **GUARD)
    launched = [searcher.suggest(f"t{k}") for k in range(16)]
    assert {config["ssim_loss_max_t"] for config in launched if isinstance(config, dict)} == set(gates)
    assert searcher.skipped and "no sample of the 4 calibrated batches has 0 < t <= 0.1" in searcher.skipped[0].sentence
    with pytest.raises(UserError, match="no setting can be launched: no sample of the 4"):
        GuardedOptunaSearch(stage, model=at_right_angles(dict.fromkeys((0.1, 0.2, 0.3, 1.0), math.inf)))


def test_points_of_a_relative_space_are_checked_when_it_is_calibrated() -> None:
    text = {"parameters": {"gain": {"unit": "norm_ratio", "log_uniform": [1.1, 3]}, "ssim_loss_max_t": {"choice": [0.1]}}}
    point = {"ssim_loss_weight": 40.0, "ssim_loss_max_t": 0.1, "ssim_grad_scale": 1.0}
    (stage,) = load_space({**text, "points": [point]}).stages
    config = GuardedOptunaSearch(stage, model=MODEL).suggest("t0")
    assert isinstance(config, dict) and config["ssim_loss_weight"] == 40.0  # as written
    (stage,) = load_space({**text, "points": [{**point, "ssim_grad_scale": 0.1}]}).stages
    with pytest.raises(UserError, match=r"point gain 4 @ 0\.1 has a predicted norm ratio of 1\.005, outside the space: predicted"):
        GuardedOptunaSearch(stage, model=MODEL)


def test_a_route_skips_too_and_ends_where_nothing_is_left() -> None:
    space = load_space("note_v3")
    hot = at_right_angles(
        {0.1: 0.001, 0.15: 1e-5, 0.2: 1e-6, 1.0: 1e-6}
    )  # gains of 0.001 to 0.01: from assertive on it is too much
    searcher = StagedSearch(space, 8, concurrency=1, model=hot, limit=10.0, skip_above=4.9)
    stages = []
    while isinstance(suggestion := searcher.suggest(f"t{len(stages)}"), dict):
        stages.append(suggestion[CONTEXT]["stage"])
        searcher.on_trial_complete(f"t{len(stages) - 1}", {"verdict": "safe", "harm": 0.0, "delta_ssim": 0.0})
    assert suggestion == Searcher.FINISHED and stages[:2] == ["conservative"] * 2 and stages[-1] != "aggressive"
    assert "aggressive" in searcher.reason and "every setting is predicted beyond" in searcher.reason
    assert {skipped.stage for skipped in searcher.skipped} <= {"moderate", "assertive"} and searcher.skipped


def test_skipped_settings_survive_a_restart(tmp_path: Path) -> None:
    log = tmp_path / "skipped.jsonl"
    inner = GuardedOptunaSearch(WIDE, model=MODEL, deterministic=False, skip_log=log, **GUARD)
    searcher = BaselineFirst(inner, {}, folder=tmp_path, seeds=(0,))
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"verdict": "safe", "baseline_run": baseline_bytes(0)})
    for k in range(9):
        searcher.suggest(f"t{k}")
    assert searcher.skipped
    searcher.save(str(tmp_path / "s"))
    again = BaselineFirst(GuardedOptunaSearch(WIDE, model=MODEL, **GUARD), {}, folder=tmp_path)
    again.restore(str(tmp_path / "s"))
    assert again.skipped == searcher.skipped == read_skipped(log)
    log.write_text(log.read_text() * 2 + '{"stage": "wi')  # repeated after a restart, torn by a kill
    assert read_skipped(log) == searcher.skipped and read_skipped(tmp_path / "none") == []


def test_a_relative_space_as_ray_domains() -> None:
    domains = param_space(load_space("moderate"), MODEL)
    generator = BasicVariantGenerator(random_state=1)
    generator.add_configurations([tune.Experiment("e", lambda config: None, config=domains, num_samples=20)])
    for _ in range(20):
        ratio = MODEL.predict_setting(generator.next_trial().config).ratio
        assert 1.1 * (1 - 1e-9) <= ratio <= 1.5 * (1 + 1e-9)
