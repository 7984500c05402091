"""The guided search, told the outcomes of made-up response curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_ssim.base.errors import UserError
from tune_ssim.guards.verdict import Verdict
from tune_ssim.probes.norm_model import NormModel
from tune_ssim.search.guided import AHEAD, FACTOR, START_RATIO, GuidedSearch
from tune_ssim.search.search import Done, Outcome, Suggestion, Wait
from tune_ssim.study.domains import Choice, LogUniform
from tune_ssim.study.space import GAIN, MAX_T, WEIGHT, Stage, gain_of

STEPS = 200
PRUNED = Outcome(Verdict.PRUNED, harm=1.0, steps=20)


def make_model(gates: tuple[float, ...] = (0.3, 1.0)) -> NormModel:
    """Main and SSIM gradient orthogonal and of equal length, so that the norm ratio of a gain is sqrt(1 + gain²)."""
    q = np.zeros((len(gates), 4, 3, 3))
    q[..., 0, 0] = q[..., 2, 2] = 1.0
    q[..., 1, :] = q[..., :, 1] = np.nan
    return NormModel(gates, q, np.ones((len(gates), 4), bool), np.ones(4), (0, 1, 2, 3), "gram")


WIDE = LogUniform(1e-3, 1e3)


def make_stage(gain: Any = WIDE, **more: Any) -> Stage:
    return Stage(name="s", parameters={GAIN: gain, **more}, fixed={} if MAX_T in more else {MAX_T: 1.0})


Response = Callable[[dict[str, Any]], "float | None"]  # improvement of a setting; None: it is pruned


def run(search: GuidedSearch, response: Response, side_by_side: int = 2) -> tuple[list[Suggestion], str, int]:
    """Suggestions, the reason of the end, and training steps. Improvements grow in proportion to the steps."""
    made, open_slots, steps = [], [], 0
    while not isinstance(asked := search.ask(), Done):
        if isinstance(asked, Wait) or len(open_slots) == side_by_side:
            asked_now = None if isinstance(asked, Wait) else asked
            if asked_now is not None:
                made.append(asked_now)
                open_slots.append(asked_now)
            one = open_slots.pop(0)
            outcome = outcome_of(one, response)
            steps += outcome.steps
            search.tell(one.slot, outcome)
            continue
        made.append(asked)
        open_slots.append(asked)
    for one in open_slots:
        steps += outcome_of(one, response).steps
    return made, asked.reason, steps


def outcome_of(suggestion: Suggestion, response: Response) -> Outcome:
    value = response(dict(suggestion.settings))
    if value is None:
        return PRUNED
    half = (STEPS // 2, value / 2)
    if suggestion.rival is not None and half[1] < suggestion.rival[1]:
        return Outcome(Verdict.STOPPED, curve=[half], steps=STEPS // 2)
    return Outcome(Verdict.SAFE, value, improvement=value, curve=[half], steps=STEPS)


def peak_at(gain: float, width: float = 1.5, height: float = 0.01) -> Response:
    """Bell-shaped in log gain, pruned where it is ten widths above its peak's gain."""

    def response(found: dict[str, Any]) -> float | None:
        distance = (math.log(gain_of(found)) - math.log(gain)) / width
        return None if distance > 3 else height * math.exp(-(distance**2) / 2)

    return response


def test_starts_at_the_calibrated_ratio_behind_the_widest_gate():
    search = GuidedSearch(make_stage(**{MAX_T: Choice((0.3, 1.0))}), make_model())
    first = search.ask()
    assert isinstance(first, Suggestion)
    assert first.settings[MAX_T] == 1.0
    assert math.sqrt(1 + gain_of(first.settings) ** 2) == pytest.approx(START_RATIO)
    assert f"ratio {START_RATIO:g}" in first.reason
    assert isinstance(search.ask(), Wait)


def test_one_full_trial_and_two_halves_where_the_start_is_best():
    made, reason, steps = run(GuidedSearch(make_stage(), make_model()), peak_at(math.sqrt(8)))
    assert (len(made), steps) == (3, STEPS + 2 * STEPS // 2)
    assert "bracketed" in reason


@settings(max_examples=400, deadline=None)
@given(st.floats(math.log(2e-2), math.log(300)), st.floats(1.0, 3.0), st.booleans())
def test_finds_a_peak_anywhere(place: float, width: float, is_parallel: bool):
    search = GuidedSearch(make_stage(), make_model(), noise_floor=lambda: 1e-6)
    made, _, _ = run(search, peak_at(math.exp(place), width), 2 if is_parallel else 1)
    assert search.best is not None
    # It ends where twice or half the gain is not better by AHEAD. On a bell that is at most this far from the peak:
    distance = width**2 * math.log(AHEAD) / math.log(FACTOR) + math.log(FACTOR) / 2
    assert search.best.improvement >= 0.01 * math.exp(-((distance / width) ** 2) / 2) - 1e-12
    assert len(made) <= 16


def test_retreats_from_harm():
    made, _, _ = run(GuidedSearch(make_stage(), make_model()), lambda s: None if gain_of(s) > 0.2 else gain_of(s))
    gains = [gain_of(one.settings) for one in made]
    assert gains[1] == pytest.approx(gains[0] / 4)
    assert made[1].reason.startswith("less push, since the last trial was pruned")


def test_says_that_nothing_beats_the_baseline():
    space = make_stage(**{MAX_T: Choice((0.3, 1.0))})
    search = GuidedSearch(space, make_model(), noise_floor=lambda: 0.001)
    made, reason, _ = run(search, lambda s: -0.01 * gain_of(s))
    assert "nothing beats the baseline by more than 0.001" in reason
    assert {one.settings[MAX_T] for one in made} == {0.3, 1.0}  # the narrower gate was tried too


def test_more_push_while_it_is_not_effective():
    search = GuidedSearch(make_stage(), make_model(), noise_floor=lambda: 0.001)
    made, _, _ = run(search, lambda s: None if gain_of(s) > 500 else 0.0)
    gains = [gain_of(one.settings) for one in made]
    assert gains[:4] == sorted(gains[:4])
    assert "safe, but not effective" in made[1].reason


def test_stays_in_the_space():
    stage = make_stage(LogUniform(1.5, 3, unit="norm_ratio"))
    made, _, _ = run(GuidedSearch(stage, make_model()), lambda s: gain_of(s))
    ratios = [math.sqrt(1 + gain_of(one.settings) ** 2) for one in made]
    assert min(ratios) >= 1.5 - 1e-6
    assert max(ratios) <= 3 + 1e-6


def test_launches_nothing_beyond_the_largest_ratio():
    made, _, _ = run(GuidedSearch(make_stage(), make_model(), max_ratio=20.0), lambda s: gain_of(s))
    assert max(math.sqrt(1 + gain_of(one.settings) ** 2) for one in made) <= 20 + 1e-6


def test_searches_further_parameters_afterwards():
    stage = make_stage(lr=LogUniform(1e-4, 1e-2), scheme=Choice(("a", "b", "c")))
    found = peak_at(2.0)

    def response(s: dict[str, Any]) -> float | None:
        value = found(s)
        bonus = math.exp(-((math.log10(s["lr"]) + 2.5) ** 2)) + (s["scheme"] == "c")
        return None if value is None else value * bonus

    search = GuidedSearch(stage, make_model(), start={"lr": 1e-3, "scheme": "a"})
    made, _, _ = run(search, response)
    assert search.best is not None
    assert search.best.settings["scheme"] == "c"
    assert 1e-3 < search.best.settings["lr"] <= 1e-2
    assert all(WEIGHT in one.settings for one in made)


def test_gives_the_same_suggestions_again():
    made, reason, _ = run(GuidedSearch(make_stage(), make_model()), peak_at(30.0))
    again, same, _ = run(GuidedSearch(make_stage(), make_model()), peak_at(30.0), side_by_side=1)
    assert ([one.settings for one in made], reason) == ([one.settings for one in again], same)


def test_a_fast_start_is_no_rival_if_it_got_worse_later():
    search = GuidedSearch(make_stage(), make_model())
    first = search.ask()
    assert isinstance(first, Suggestion)
    search.tell(first.slot, Outcome(Verdict.SAFE, improvement=0.002, curve=[(100, 0.006)], steps=200))
    following = search.ask()
    assert isinstance(following, Suggestion)
    assert following.rival is None


def test_needs_a_gain():
    stage = Stage(name="s", parameters={"lr": LogUniform(1e-4, 1e-2)})
    with pytest.raises(UserError, match="needs a space that searches gain"):
        GuidedSearch(stage, make_model())


def test_says_if_nothing_can_be_launched():
    with pytest.raises(UserError, match="no setting can be launched"):
        GuidedSearch(make_stage(LogUniform(100, 1000)), make_model(), max_ratio=20.0)
