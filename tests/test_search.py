"""Searches by ask and tell: order, what Optuna is told, routes, confirm, baselines. Real Optuna; no trial is trained here."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from norm_models import at_right_angles

from tune_ssim.base.errors import UserError
from tune_ssim.guards import Baseline, BaselineRun
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.results.study_folder import read_skipped
from tune_ssim.search.baseline_first import BaselineFirst
from tune_ssim.search.confirm import ConfirmSearch
from tune_ssim.search.demonstrations import WithDemonstrations
from tune_ssim.search.optuna_search import OptunaSearch
from tune_ssim.search.search import Done, Outcome, Suggestion, Wait
from tune_ssim.search.staged import StagedSearch
from tune_ssim.study.objective import Goal, Objective
from tune_ssim.study.space import gain_of, load_space
from tune_ssim.trials.job import TrialJob

WIDE = load_space("wide").stages[0]
SAFE, PRUNED = Outcome(Verdict.SAFE, 0.0, 0.0), Outcome(Verdict.PRUNED, math.nan, 1.0)


def outcome_for(settings: Any) -> Outcome:
    """A smooth stand-in for a training: best near gain 30, harmful from 300 on."""
    gain = gain_of(settings)
    if gain > 300:
        return Outcome(Verdict.PRUNED, harm=math.log10(gain / 300), settings=settings)
    value = 0.01 * math.exp(-((math.log10(max(gain, 1e-9)) - 1.5) ** 2))
    return Outcome(Verdict.SAFE, value, 0.0, settings=settings)


def settings_tried(
    order: random.Random | None, trials: int = 24, concurrency: int = 2, seed: int = 0, **options: Any
) -> list[dict[str, Any]]:
    """Runs `trials` with `concurrency` at a time, which of the running ones ends first being drawn from `order`."""
    search = OptunaSearch(WIDE, seed=seed, concurrency=concurrency, **options)
    tried: list[dict[str, Any]] = []
    running: list[Suggestion] = []
    while len(tried) < trials or running:
        asked = search.ask() if len(tried) < trials and len(running) < concurrency else None
        if isinstance(asked, Suggestion):
            tried.append(dict(asked.settings))
            running.append(asked)
        if not isinstance(asked, Suggestion) or len(running) == concurrency:
            ended = running.pop(order.randrange(len(running)) if order else 0)
            search.tell(ended.slot, outcome_for(ended.settings))
    return tried


def ask(search: Any) -> Suggestion:
    suggestion = search.ask()
    assert isinstance(suggestion, Suggestion)
    return suggestion


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_suggestions_do_not_depend_on_which_trial_ends_first(concurrency: int) -> None:
    orders = [settings_tried(random.Random(k) if k else None, concurrency=concurrency) for k in range(4)]
    assert all(other == orders[0] for other in orders[1:])
    assert settings_tried(None, concurrency=concurrency, seed=1) != orders[0]


def test_the_order_would_matter_without_it() -> None:
    orders = [settings_tried(random.Random(k), concurrency=4, deterministic=False) for k in range(4)]
    assert any(other != orders[0] for other in orders[1:])


def test_points_come_first_as_written_and_the_hypercube_covers_the_range() -> None:
    suggested = settings_tried(None)
    written = [dict(point) for point in WIDE.points]
    for point, config in zip(written, suggested, strict=False):
        assert {name: config[name] for name in point} == point
    gains = sorted(gain_of(config) for config in suggested[len(written) : len(written) + 6])
    edges = [0.001 * (3000 / 0.001) ** (k / 6) for k in range(7)]
    for low, gain, high in zip(edges, gains, edges[1:], strict=False):
        assert low <= gain <= high * 1.0000001  # one in each sixth of the logarithmic range, for every seed
    assert all("gain" not in config for config in suggested)


def test_optuna_is_told_pruned_with_a_graded_constraint() -> None:
    search = OptunaSearch(WIDE, concurrency=1, deterministic=False)
    outcomes = [
        (Outcome(Verdict.PRUNED, math.nan, 0.7), "PRUNED", 0.7),
        (Outcome(Verdict.SAFE, 0.01, 0.0), "COMPLETE", 0.0),
        (Outcome(Verdict.DEGRADED, 0.02, 0.05), "COMPLETE", 0.05),
        (Outcome(Verdict.ERROR, math.nan, 0.0), "FAIL", None),
        (Outcome(), "PRUNED", 1.0),  # of a foreign trainable, stopped by a scheduler
        (Outcome(died=True), "FAIL", None),
    ]
    for outcome, _, _ in outcomes:
        search.tell(ask(search).slot, outcome)
    for trial, (_, state, harm) in zip(search.study.get_trials(), outcomes, strict=False):
        assert trial.state.name == state
        assert trial.constraints.get("harm") == harm


def test_pruning_is_learnt() -> None:
    """A loss that looks the better the harder one pushes, and a cliff at gain 300. Told COMPLETE with its last value, as Ray's
    own OptunaSearch does, a ruined trial attracts the sampler; told PRUNED with a constraint it does not."""

    def n_harmful(told_complete: bool, seed: int) -> int:
        search = OptunaSearch(WIDE, seed=seed, concurrency=1)
        harmful = 0
        for _ in range(40):
            suggestion = ask(search)
            gain = gain_of(suggestion.settings)
            harmful += gain > 300
            complete = Outcome(Verdict.SAFE, math.log10(gain), 0.0)
            pruned = Outcome(Verdict.PRUNED, harm=math.log10(max(gain, 301) / 300))
            search.tell(suggestion.slot, complete if told_complete or gain <= 300 else pruned)
        return harmful

    guarded, naive = (sum(n_harmful(told, seed) for seed in range(4)) for told in (False, True))
    assert guarded < 0.6 * naive, (guarded, naive)


def test_a_further_objective_is_searched_too() -> None:
    """Of two objectives, the first is best at gain 30 and the second at gain 0.03. Ruined trials above 300 have neither."""

    def n_near_the_second(also: tuple[Goal, ...], seed: int) -> int:
        search, found = OptunaSearch(WIDE, seed=seed, also=also), 0
        for _ in range(40):
            suggestion = ask(search)
            outcome = outcome_for(suggestion.settings)
            decades = math.log10(max(gain_of(suggestion.settings), 1e-9) / 0.03)
            if outcome.verdict is Verdict.SAFE:
                outcome = replace(outcome, metrics={"psnr": -(decades**2)})
            search.tell(suggestion.slot, outcome)
            found += abs(decades) < 0.7
        assert {len(trial.values) for trial in search.study.get_trials() if trial.values} == {1 + len(also)}
        return found

    both, first = (sum(n_near_the_second(also, seed) for seed in range(4)) for also in ((Goal(maximize="psnr"),), ()))
    assert both > 1.25 * first, (both, first)


def test_a_trial_without_a_further_objective_is_not_complete() -> None:
    search = OptunaSearch(WIDE, also=(Goal(minimize="lpips"),), deterministic=False)
    for metrics in ({"lpips": 0.2}, {"lpips": math.nan}, {}):
        search.tell(ask(search).slot, Outcome(Verdict.SAFE, 0.01, 0.0, metrics=metrics))
    assert [trial.state.name for trial in search.study.get_trials()[:3]] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert search.study.get_trials()[0].values == [0.01, 0.2]


@pytest.mark.parametrize("stop_after", [0, 1, 5, 11, 15])
def test_asked_again_and_told_what_is_known_it_goes_on_as_before(stop_after: int) -> None:
    straight = settings_tried(None, trials=16)
    search = OptunaSearch(WIDE, concurrency=2)
    for k in range(stop_after):  # what a resumed study does: see BaselineFirst
        assert ask(search).settings == straight[k]
        search.tell(k, outcome_for(straight[k]))
    for k in range(stop_after, 16):
        suggestion = ask(search)
        assert suggestion.settings == straight[k]
        search.tell(suggestion.slot, outcome_for(suggestion.settings))


def test_settings_that_were_run_replace_another_suggestion() -> None:
    search = OptunaSearch(WIDE, deterministic=False, n_latin=0)
    for _ in WIDE.points:
        search.tell(ask(search).slot, SAFE)
    slot = ask(search).slot
    assert search.replace(slot, {"ssim_loss_weight": 5.0, "ssim_loss_max_t": 0.2, "ssim_grad_scale": 1.0})
    search.tell(slot, Outcome(Verdict.SAFE, 0.5, 0.0))
    assert search.study.best_trial.params == {"gain": 5.0, "ssim_loss_max_t": 0.2}
    assert not search.replace(ask(search).slot, {"ssim_loss_weight": 1e9, "ssim_loss_max_t": 0.2, "ssim_grad_scale": 1.0})


def test_a_replacement_does_not_take_another_place_of_the_queue() -> None:
    search = OptunaSearch(WIDE, deterministic=False, seed=3)
    for _ in WIDE.points:
        search.tell(ask(search).slot, SAFE)
    slot = ask(search).slot  # the first point of the hypercube; five are left
    assert search.replace(slot, {"ssim_loss_weight": 5.0, "ssim_loss_max_t": 0.2, "ssim_grad_scale": 1.0})
    search.tell(slot, Outcome(Verdict.SAFE, 0.5, 0.0))
    assert search.study.best_trial.params == {"gain": 5.0, "ssim_loss_max_t": 0.2}
    undisturbed = OptunaSearch(WIDE, deterministic=False, seed=3)
    for _ in range(len(WIDE.points) + 1):
        undisturbed.tell(ask(undisturbed).slot, SAFE)
    for _ in range(5):
        assert ask(search).settings == ask(undisturbed).settings


def route(outcome: Any, trials: int = 8, **options: Any) -> tuple[str, list[str], StagedSearch]:
    search, stages = StagedSearch(load_space("note_v3"), trials, noise_floor=lambda: 0.001, concurrency=1, **options), []
    while isinstance(suggestion := search.ask(), Suggestion):
        stages.append(suggestion.stage or "")
        search.tell(suggestion.slot, outcome(stages[-1]))
    assert isinstance(suggestion, Done)
    return suggestion.reason, stages, search


def test_a_route_is_relaxed_only_while_it_is_stable_and_ineffective() -> None:
    reason, stages, _ = route(lambda stage: SAFE)
    assert [name for name, _ in itertools.groupby(stages)] == ["conservative", "moderate", "assertive", "aggressive"]
    assert len(stages) == 8 and not reason
    reason, stages, _ = route(lambda stage: SAFE if stage == "conservative" else PRUNED)
    assert stages[-1] == "moderate" and "harmful" in reason
    reason, stages, _ = route(lambda stage: Outcome(Verdict.SAFE, 0.01, 0.0, 0.01))
    assert set(stages) == {"conservative"} and "effective" in reason and "noise floor of 0.0010" in reason
    reason, stages, _ = route(lambda stage: Outcome(Verdict.SAFE, 0.0009, 0.0, 0.0009))
    assert stages[-1] == "aggressive" and not reason  # another seed of the baseline differs by as much


def test_a_route_compares_an_objective_that_is_no_difference_with_the_baseline() -> None:
    """A score of 0.8 is no success if the baseline has 0.9; a loss of 0.5 is one if the baseline has 0.7."""
    score, loss = Objective(maximize="score"), Objective(minimize="val_loss")
    reason, stages, _ = route(lambda stage: Outcome(Verdict.SAFE, 0.8, 0.0, -0.1), objective=score)
    assert stages[-1] == "aggressive" and not reason
    reason, stages, search = route(lambda stage: Outcome(Verdict.SAFE, 0.5, 0.0, 0.2), objective=loss)
    assert set(stages) == {"conservative"} and "is effective (Δval_loss -0.2000" in reason
    assert search.options["direction"] == "minimize"


def test_finalists_are_tried_until_one_holds() -> None:
    # A loss of 3 is better than the baseline's, although it is above zero, and one of 5 is not.
    better, worse = Outcome(Verdict.SAFE, 3.0, improvement=0.01), Outcome(Verdict.SAFE, 5.0, improvement=-0.01)
    search = ConfirmSearch([("a", {"x": 1}), ("b", {"x": 2}), ("c", {"x": 3})], seeds=[5, 6])
    assert [ask(search).trial_id, ask(search).trial_id] == ["confirm-a-seed-5", "confirm-a-seed-6"]
    assert search.ask() == Wait()
    search.tell(1, PRUNED)  # one is enough
    first, second = ask(search), ask(search)
    assert (first.trial_id, first.seed, first.settings, first.role) == ("confirm-b-seed-5", 5, {"x": 2}, Role.CONFIRM)
    search.tell(0, better)  # of the finalist before: means nothing any more
    search.tell(first.slot, worse)
    search.tell(second.slot, worse)
    last = [ask(search), ask(search)]
    for suggestion in last:
        search.tell(suggestion.slot, better)
    assert [suggestion.trial_id for suggestion in last] == ["confirm-c-seed-5", "confirm-c-seed-6"]
    assert search.ask() == Done()


def confirm(values: list[float], least: float, seeds: int = 4) -> tuple[int, bool]:
    """How many seeds a finalist gets that improves by `values`, and whether another follows it."""
    search = ConfirmSearch([("a", {"x": 1}), ("b", {"x": 2})], seeds=list(range(seeds)), least=least)
    given = 0
    while isinstance(asked := search.ask(), Suggestion) and asked.settings == {"x": 1}:
        search.tell(asked.slot, Outcome(Verdict.SAFE, 1.0, improvement=values[given]))
        given += 1
    return given, isinstance(asked, Suggestion)


def test_a_finalist_gets_seeds_until_its_interval_decides() -> None:
    # Intervals of Student's t at 95 %: of two values half a width of 6.35 times their distance, of three 2.48 standard deviations.
    assert confirm([0.0100, 0.0101, 0.01, 0.01], least=0.001) == (2, False)
    assert confirm([0.008, 0.010, 0.009, 0.009], least=0.001) == (3, False)
    assert confirm([0.000012, 0.000011, 0.000013, 0.00001], least=0.001) == (2, True)  # above zero, and of no use
    assert confirm([0.01, -0.008, 0.009, -0.01], least=0.001) == (4, True)  # undecided to the last seed
    assert confirm([0.010, 0.002], least=0.001, seeds=2) == (2, True)


def test_a_third_seed_waits_for_the_first_two() -> None:
    search = ConfirmSearch([("a", {})], seeds=[0, 1, 2], least=0.001)
    assert [ask(search).slot, ask(search).slot] == [0, 1]
    assert search.ask() == Wait()
    search.tell(0, Outcome(Verdict.SAFE, 1.0, improvement=0.01))
    assert search.ask() == Wait()


def test_demonstrations_run_beside_a_search_that_does_not_see_them() -> None:
    inner = OptunaSearch(WIDE, seed=1)
    search = WithDemonstrations(inner, {"loud": {"gain": 1e4}})
    first, demo, second = ask(search), ask(search), ask(search)
    assert (first.slot, demo.trial_id, demo.slot, second.slot) == (0, "demo-loud", -1, 1)
    search.tell(-1, PRUNED)
    alone = OptunaSearch(WIDE, seed=1)
    assert [ask(alone).settings, ask(alone).settings] == [first.settings, second.settings]
    search.tell(0, outcome_for(first.settings))


def baseline_of(seed: int, trial_id: str) -> Baseline:
    return Baseline((BaselineRun(seed, {"total_norm": {1: 1.0}}, {"ssim": 0.9}, trial_id=trial_id),))


def job(search: BaselineFirst) -> TrialJob:
    asked = search.ask()
    assert isinstance(asked, TrialJob)
    return asked


def test_the_baseline_comes_first_and_everyone_waits(tmp_path: Path) -> None:
    search = BaselineFirst(OptunaSearch(WIDE, concurrency=2), {"ssim_loss_weight": 0.0}, folder=tmp_path, seeds=(7, 8))
    first, second = job(search), job(search)
    assert [(one.seed, one.role, one.baseline) for one in (first, second)] == [(7, Role.BASELINE, None), (8, Role.BASELINE, None)]
    assert search.ask() == Wait()
    search.tell(second.trial_id, Outcome(Verdict.SAFE, baseline=baseline_of(8, second.trial_id)))
    assert search.ask() == Wait()
    search.tell(first.trial_id, Outcome(Verdict.SAFE, baseline=baseline_of(7, first.trial_id)))
    third = job(search)
    assert third.baseline is not None
    assert [run.seed for run in third.baseline.read().runs] == [7, 8]  # in the order of the seeds, not of their ends
    assert (third.seed, third.role, third.trial_id) == (7, Role.SEARCH, "trial-00")
    assert TrialJob.from_dict(third.to_dict()) == third


def test_a_baseline_of_which_one_run_is_there_needs_the_other_only(tmp_path: Path) -> None:
    runs = {"baseline-1": baseline_of(8, "baseline-1").runs[0]}
    search = BaselineFirst(OptunaSearch(WIDE), {}, folder=tmp_path, seeds=(7, 8), runs=runs)
    assert job(search).trial_id == "baseline-0" and search.ask() == Wait()
    search.tell("baseline-0", Outcome(Verdict.SAFE, baseline=baseline_of(7, "baseline-0")))
    file = job(search).baseline
    assert file is not None and [run.seed for run in file.read().runs] == [7, 8]


@pytest.mark.parametrize("died", [True, False])
def test_a_failing_baseline_ends_the_search(tmp_path: Path, died: bool) -> None:
    search = BaselineFirst(OptunaSearch(WIDE), {}, folder=tmp_path)
    search.tell(job(search).trial_id, Outcome(None if died else Verdict.BAD_SETUP, reason="ruined at step 0", died=died))
    assert search.ask() == Done("ruined at step 0", failed=True)


def test_two_alike_set_up_errors_end_the_search(tmp_path: Path) -> None:
    search = BaselineFirst(OptunaSearch(WIDE, deterministic=False), {}, folder=tmp_path, seeds=(0,))
    search.tell(job(search).trial_id, Outcome(Verdict.SAFE, baseline=baseline_of(0, "baseline-0")))
    for step in (3, 7):
        search.tell(job(search).trial_id, Outcome(Verdict.ERROR, reason=f"no weights at step {step}"))
    done = search.ask()
    assert isinstance(done, Done) and done.failed and "no weights" in done.reason


@pytest.mark.parametrize("n_previous", [0, 3, 8])
def test_what_has_ended_is_not_run_again(tmp_path: Path, n_previous: int) -> None:
    """Whatever was running when the study stopped: here the last of the previous ones, and all after it."""
    straight = settings_tried(None, trials=10)
    previous = {f"trial-{k:02d}": outcome_for(straight[k]) for k in range(n_previous) if k != n_previous - 2}
    search = BaselineFirst(
        OptunaSearch(WIDE, concurrency=2),
        {},
        folder=tmp_path,
        seeds=(0,),
        baseline=baseline_of(0, "baseline-0"),
        previous=previous,
        max_trials=10,
    )
    run = {}
    while isinstance(asked := search.ask(), TrialJob):
        run[asked.trial_id] = asked.settings
        search.tell(asked.trial_id, outcome_for(asked.settings))
    assert asked == Done()
    assert run == {f"trial-{k:02d}": straight[k] for k in range(10) if f"trial-{k:02d}" not in previous}


def test_settings_that_the_search_refuses_do_not_share_their_trial_with_others(tmp_path: Path) -> None:
    """An ended trial keeps its id: another setting under it would be run in vain, since the first verdict is final."""
    outside = {"ssim_loss_weight": 1e9, "ssim_loss_max_t": 0.2, "ssim_grad_scale": 1.0}
    previous = {"trial-00": Outcome(Verdict.SAFE, 0.5, 0.0, settings=outside)}
    for _ in range(2):  # the second start finds the result of the first
        search = BaselineFirst(
            OptunaSearch(WIDE), {}, folder=tmp_path, baseline=baseline_of(0, "baseline-0"), previous=previous, max_trials=1
        )
        if "trial-00-2" not in previous:
            asked = job(search)
            assert asked.trial_id == "trial-00-2" and asked.settings["ssim_loss_weight"] != 1e9
            previous["trial-00-2"] = outcome_for(asked.settings)
            search.tell(asked.trial_id, previous["trial-00-2"])
        assert search.ask() == Done()


# ---- with a norm model ----


MODEL = at_right_angles({0.1: 40.0, 0.2: 25.0, 0.3: 15.0, 1.0: 8.0})
GUARD: dict[str, Any] = {"limit": 10.0, "max_ratio": 20.0}


@pytest.mark.parametrize("name", ["conservative", "moderate", "assertive", "aggressive"])
def test_a_relative_space_gives_gains_of_the_predicted_ratio(name: str) -> None:
    (stage,) = load_space(name).stages
    search = OptunaSearch(stage, model=MODEL, seed=3, **GUARD)
    gates = set()
    for _ in range(20):
        suggestion = ask(search)
        assert set(suggestion.settings) == {"ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale", "pixel_loss_weight"}
        gates.add(suggestion.settings["ssim_loss_max_t"])
        asked = search.study.get_trials(states=[optuna.trial.TrialState.RUNNING])[-1].params["gain"]
        predicted = MODEL.predict_setting(suggestion.settings).ratio
        assert asked in stage.parameters["gain"] and predicted == pytest.approx(asked, rel=1e-9)
        search.tell(suggestion.slot, outcome_for(suggestion.settings))
    assert gates == {0.1, 0.2, 0.3, 1.0} and not search.skipped


def test_a_relative_space_without_a_model() -> None:
    with pytest.raises(UserError, match="stage 'moderate' gives its gain as a norm ratio: calibrate first"):
        OptunaSearch(load_space("moderate").stages[0])


def test_settings_whose_predicted_ratio_is_too_high_are_listed_and_not_launched(tmp_path: Path) -> None:
    log = tmp_path / "skipped.jsonl"
    search = OptunaSearch(WIDE, model=MODEL, concurrency=2, skip_log=log, **GUARD)
    launched = []
    for _ in range(24):
        suggestion = ask(search)  # a skipped one costs no trial
        launched.append(suggestion.settings)
        search.tell(suggestion.slot, outcome_for(suggestion.settings))
    assert all(MODEL.predict_setting(settings).ratio <= 20 for settings in launched)
    assert search.skipped and all(skipped.predicted_ratio > 20 for skipped in search.skipped)
    skipped = search.skipped[0]
    assert MODEL.predict_setting(skipped.config).ratio == skipped.predicted_ratio
    assert f"predicted {skipped.predicted_ratio:.3g}x the baseline's" in skipped.sentence and "limit 10" in skipped.sentence
    told = [trial for trial in search.study.get_trials() if trial.state.name == "PRUNED"]
    harms = {round(math.log10(s.predicted_ratio / 10), 9) for s in search.skipped}
    assert harms <= {round(trial.constraints["harm"], 9) for trial in told}  # the sampler learns from what was not launched
    assert read_skipped(log) == search.skipped
    log.write_text(log.read_text() * 2 + '{"stage": "wi')  # repeated by a resumed study, torn by a kill
    assert read_skipped(log) == search.skipped and read_skipped(tmp_path / "none") == []


def test_a_model_alone_changes_no_suggestion() -> None:
    assert settings_tried(None, model=MODEL) == settings_tried(None)
    assert settings_tried(None, model=MODEL, limit=10.0) == settings_tried(None)
    mild = at_right_angles(dict.fromkeys((0.1, 0.2, 0.3, 1.0), 1e6))
    assert settings_tried(None, model=mild, **GUARD) == settings_tried(None)  # nothing in the space exceeds it


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_skipping_keeps_the_order_deterministic(concurrency: int) -> None:
    orders = [settings_tried(random.Random(k) if k else None, concurrency=concurrency, model=MODEL, **GUARD) for k in range(4)]
    assert all(other == orders[0] for other in orders[1:])
    assert orders[0] != settings_tried(None, concurrency=concurrency)


def test_a_space_wholly_above_the_limit_ends_with_a_message() -> None:
    deadly = at_right_angles(dict.fromkeys((0.1, 0.2, 0.3, 1.0), 1e-6))
    with pytest.raises(
        UserError, match=r"stage 'wide': the predicted ratio of every setting exceeds 20 \(2x .*mildest has 1e\+03x"
    ):
        OptunaSearch(WIDE, model=deadly, **GUARD)
    narrow = at_right_angles({0.1: 1e-5, 0.2: 1e-5, 0.3: 1e-5, 1.0: 5.01e-5})  # one gain in ten thousand is left
    ask(OptunaSearch(WIDE, model=narrow, **GUARD))  # the graded constraint leads TPE there
    search = OptunaSearch(WIDE, model=narrow, sampler=optuna.samplers.RandomSampler(seed=0), **GUARD)
    done = search.ask()
    assert isinstance(done, Done) and "200 suggestions in a row were not launched" in done.reason  # it does not look for ever
    assert len(search.skipped) == 200


def test_a_gate_that_was_not_calibrated_is_listed_too() -> None:
    gates = dict.fromkeys((0.2, 0.3, 1.0), 10.0)
    idle = at_right_angles({0.1: math.inf, **gates})
    (stage,) = load_space("moderate").stages
    search = OptunaSearch(stage, model=idle, deterministic=False, **GUARD)
    assert {ask(search).settings["ssim_loss_max_t"] for _ in range(16)} == set(gates)
    assert search.skipped and "no sample of the 4 calibrated batches has 0 < t <= 0.1" in search.skipped[0].sentence
    with pytest.raises(UserError, match="no setting can be launched: no sample of the 4"):
        OptunaSearch(stage, model=at_right_angles(dict.fromkeys((0.1, 0.2, 0.3, 1.0), math.inf)))


def test_points_of_a_relative_space_are_checked_when_it_is_calibrated() -> None:
    text = {"parameters": {"gain": {"unit": "norm_ratio", "log_uniform": [1.1, 3]}, "ssim_loss_max_t": {"choice": [0.1]}}}
    point = {"ssim_loss_weight": 40.0, "ssim_loss_max_t": 0.1, "ssim_grad_scale": 1.0}
    (stage,) = load_space({**text, "points": [point]}).stages
    assert ask(OptunaSearch(stage, model=MODEL)).settings["ssim_loss_weight"] == 40.0  # as written
    (stage,) = load_space({**text, "points": [{**point, "ssim_grad_scale": 0.1}]}).stages
    with pytest.raises(UserError, match=r"point gain 4 @ 0\.1 has a predicted norm ratio of 1\.005, outside the space: predicted"):
        OptunaSearch(stage, model=MODEL)


def test_a_route_skips_too_and_ends_where_nothing_is_left() -> None:
    # Gains of 0.001 to 0.01: from assertive on it is too much.
    hot = at_right_angles({0.1: 0.001, 0.15: 1e-5, 0.2: 1e-6, 1.0: 1e-6})
    reason, stages, search = route(lambda stage: SAFE, model=hot, limit=10.0, max_ratio=4.9)
    assert stages[:2] == ["conservative"] * 2 and stages[-1] != "aggressive"
    assert "aggressive" in reason and "the predicted ratio of every setting exceeds" in reason
    assert {skipped.stage for skipped in search.skipped} <= {"moderate", "assertive"} and search.skipped
