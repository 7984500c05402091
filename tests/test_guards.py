"""Each guard by itself: tables of values, parameters and expected step; the norm guard against a naive twin."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tune_ssim.base.errors import UserError
from tune_ssim.guards import Baseline, BaselineRun, Guard, NonFinite, NormRatio, SmokeTest, Threshold, Violation
from tune_ssim.guards.smoke_test import JUDGED
from tune_ssim.records import (
    ACTIVE_FRACTION,
    LOSS,
    SMOKE,
    SMOKE_AGAIN,
    STEP_SKIPPED,
    TOTAL_NORM,
    TOTAL_NORM_MAIN,
    Record,
)

NAN, INF = math.nan, math.inf


def fold(guard: Guard, records: Iterable[Record]) -> tuple[list[Violation], dict[str, Any]]:
    """All that the guard says, also after the first prune; the state goes through JSON at every step."""
    state, found = guard.init(), []
    for record in records:
        before = json.dumps(state)
        new, violation = guard.update(state, record)
        assert json.dumps(state) == before, "update must leave its argument as it was"
        state = json.loads(json.dumps(new))
        found += [] if violation is None else [violation]
    return found, state


def steps_of(guard: Guard, records: Iterable[Record]) -> list[int]:
    return [violation.step for violation in fold(guard, records)[0]]


# ---- norm_ratio


def norms(values: Sequence[float | None], active: float | None = 1.0, start: int = 1) -> list[Record]:
    """One record a step; None: the step did not log the norm."""
    known = {} if active is None else {ACTIVE_FRACTION: active}
    logged = [{LOSS: 1.0} if value is None else {TOTAL_NORM: value} for value in values]
    return [Record(step, {**known, **values}) for step, values in enumerate(logged, start)]


def flat_baseline(steps: int = 100, seed: int = 0, value: float = 1.0) -> Baseline:
    return Baseline((BaselineRun(seed, {TOTAL_NORM: dict.fromkeys(range(1, steps + 1), value)}, {}),))


BASELINE = flat_baseline()


@pytest.mark.parametrize(
    ("values", "parameters", "steps"),
    [
        ([1.0] * 40, {}, []),
        ([11.0] * 11, {}, [11]),  # the first window is judged, and the next one confirms it
        ([11.0] * 10, {}, []),  # one window alone is not two
        ([11.0] * 10, {"patience": 1}, [10]),
        ([10.0] * 30, {}, []),  # the limit itself is allowed
        ([1e9] * 9 + [1.0] * 30, {"window": 20}, []),  # the minority of a window
        ([1e9, 1.0] * 20, {"window": 11}, []),  # the median changes sides at each step: never twice in a row
        ([1.0] * 20 + [50.0] * 20, {}, [26, 36]),  # five of ten: 25.5 at step 25, confirmed at 26, again a window later
        ([50.0] * 12 + [1.0] * 30, {}, [11]),  # it falls again after the collapse: too late
        ([INF] * 11, {}, [11]),
        ([NAN] * 11, {}, [11]),
        ([None] * 30, {}, []),
        ([11.0, None] * 11, {}, [21]),  # steps without the metric are not counted
        ([3.0] * 11, {"limit": 2.9}, [11]),
        ([3.0] * 11, {"limit": 3.1}, []),
    ],
)
def test_norm_ratio(values: list[float | None], parameters: dict[str, Any], steps: list[int]) -> None:
    guard = NormRatio(**parameters).bind(BASELINE, seed=0, clipped=False)
    assert steps_of(guard, norms(values)) == steps


def test_norm_ratio_counts_active_steps_that_were_not_skipped() -> None:
    harmful = [Record(step, {TOTAL_NORM: 50.0, ACTIVE_FRACTION: float(step % 3 == 0)}) for step in range(1, 40)]
    guard = NormRatio().bind(BASELINE, seed=0, clipped=False)
    assert steps_of(guard, harmful)[0] == 33  # the eleventh active step
    skipped = [Record(record.step, {**record.values, STEP_SKIPPED: 1.0}) for record in harmful]
    assert steps_of(guard, skipped) == []


@pytest.mark.parametrize(
    ("on_excess", "clipped", "action"),
    [
        ("auto", False, "prune"),
        ("auto", True, "probe"),
        ("prune", True, "prune"),
        ("probe", False, "probe"),
        ("warn", False, "warn"),
    ],
)
def test_norm_ratio_on_excess(on_excess: Any, clipped: bool, action: str) -> None:
    guard = NormRatio(on_excess=on_excess).bind(BASELINE, 0, clipped)
    assert {violation.action for violation in fold(guard, norms([11.0] * 50))[0]} == {action}


@pytest.mark.parametrize(
    ("seed", "active", "word"),
    [(0, 1.0, "paired"), (1, 1.0, "unpaired"), (0, None, "unpaired"), (None, 1.0, "unpaired")],
)
def test_norm_ratio_says_how_it_compared(seed: int | None, active: float | None, word: str) -> None:
    guard = NormRatio().bind(BASELINE, seed, clipped=False)
    violation = fold(guard, norms([30.0] * 11, active))[0][0]
    assert f"; {word} median of 10 active steps up to step 11" in violation.sentence
    expected = {"guard": "norm_ratio", "step": 11, "metric": TOTAL_NORM, "value": 30.0, "limit": 10.0}
    assert violation.evidence() == expected
    assert violation.remedy


def test_norm_ratio_compares_the_same_steps() -> None:
    """Two steps of ten are missing from the baseline: neither median may contain them."""
    series = {step: float(step) for step in range(1, 11) if step not in (1, 2)}
    guard = NormRatio(patience=1).bind(Baseline((BaselineRun(0, {TOTAL_NORM: series}, {}),)), 0, clipped=False)
    found, state = fold(guard, norms([2.0 * step for step in range(1, 11)]))
    assert found == []
    assert state["max_ratio"] == 2.0


def test_norm_ratio_beside_the_main_loss_alone() -> None:
    both = {TOTAL_NORM: dict.fromkeys(range(1, 40), 17.6), TOTAL_NORM_MAIN: dict.fromkeys(range(1, 40), 1.0)}
    guard = NormRatio(limit=2).bind(Baseline((BaselineRun(0, both, {}),)), 0, clipped=False)
    found, state = fold(guard, norms([52.8] * 11))
    assert "3x the baseline's" in found[0].sentence
    assert "52.8x the main loss alone" in found[0].sentence
    assert guard.summary(state) == {"norm_ratio_max": pytest.approx(3), "norm_ratio_main_max": pytest.approx(52.8)}
    assert guard.current(state) == pytest.approx(3)


@pytest.mark.parametrize(
    ("baseline", "records", "said"),
    [
        (BASELINE, norms([1.0] * 11), None),
        (BASELINE, norms([1.0] * 10), "saw 10 active steps and needs 11"),  # it could not have fired
        (BASELINE, norms([1.0] * 50, active=0.0), "saw 0 active steps and needs 11"),
        (flat_baseline(value=0.0), norms([1.0] * 20), "no total_norm above zero"),
        (flat_baseline(value=NAN), norms([1.0] * 20), "no total_norm above zero"),
        (Baseline((BaselineRun(0, {}, {"ssim": 1.0}),)), norms([1.0] * 20), "no total_norm above zero"),
        (None, norms([1e9] * 20), "no baseline"),
    ],
)
def test_norm_ratio_never_passes_on_nothing(baseline: Baseline | None, records: list[Record], said: str | None) -> None:
    guard = replace(NormRatio(), baseline=baseline, seed=0)
    found, state = fold(guard, records)
    assert found == []
    reason = guard.unjudged(state)
    assert reason is None if said is None else said in (reason or "")


def naive_norm_ratio(guard: NormRatio, records: list[Record]) -> list[tuple[int, float, bool]]:
    """The contract in docs/facts.md (Design) word by word, from the whole history and with NumPy: (step, ratio, paired)."""
    assert guard.baseline is not None
    active: list[tuple[int, float, bool]] = []
    fired: list[tuple[int, float, bool]] = []
    above = 0
    for record in records:
        values = record.values
        if TOTAL_NORM not in values or values.get(STEP_SKIPPED, 0) or values.get(ACTIVE_FRACTION, 1) == 0:
            continue
        norm = INF if np.isnan(values[TOTAL_NORM]) else values[TOTAL_NORM]
        active.append((record.step, norm, ACTIVE_FRACTION in values))
        if len(active) < guard.window:
            continue
        window = active[len(active) - guard.window :]
        run = next((run for run in guard.baseline.runs if run.seed == guard.seed), None)
        reference = (run or guard.baseline.runs[0]).series.get(TOTAL_NORM, {})
        good = {step: value for step, value in reference.items() if np.isfinite(value)}
        common = [step for step, _, _ in window if step in good]
        paired = run is not None and window[-1][2] and len(common) >= 0.8 * guard.window
        if paired:
            mine = [norm for step, norm, _ in window if step in good]
            theirs = [good[step] for step in common]
        else:
            mine = [norm for _, norm, _ in window]
            theirs = [good[step] for step in range(window[0][0], window[-1][0] + 1) if step in good]
            theirs = theirs if len(theirs) >= guard.window else list(good.values())
        with np.errstate(all="ignore"):
            ratio = float(np.median(mine) / np.median(theirs)) if theirs and np.median(theirs) > 0 else NAN
        above = above + 1 if ratio > guard.limit else 0
        quiet = fired and len(active) - fired[-1][2] < guard.window  # type: ignore[operator]
        if above >= guard.patience and not quiet:
            fired.append((record.step, ratio, len(active)))  # type: ignore[arg-type]
    return fired


NORM = st.floats(0, 100) | st.sampled_from([0.0, 1.0, 20.0, 1e30, NAN, INF])
STEP = st.fixed_dictionaries(
    {},
    optional={
        TOTAL_NORM: NORM,
        ACTIVE_FRACTION: st.sampled_from([0.0, 0.125, 1.0, 1.0]),
        STEP_SKIPPED: st.sampled_from([0.0, 0.0, 0.0, 1.0]),
        LOSS: NORM,
    },
)
STREAMS = st.lists(STEP, max_size=30).map(lambda steps: [Record(n, values) for n, values in enumerate(steps)])
SERIES = st.dictionaries(st.integers(0, 30), st.floats(0.1, 10) | st.sampled_from([NAN, INF, 0.0]), max_size=30)


@st.composite
def norm_guards(draw: st.DrawFn, patience: st.SearchStrategy[int] = st.integers(1, 3)) -> NormRatio:  # noqa: B008
    full = draw(st.booleans())  # most real baselines logged every step
    series = draw(SERIES) if not full else {step: draw(st.floats(0.5, 2)) for step in range(31)}
    guard = NormRatio(limit=draw(st.floats(1.01, 30)), window=draw(st.integers(1, 6)), patience=draw(patience))
    seeds = draw(st.sampled_from([(0,), (0, 1), (1,)]))
    return guard.bind(Baseline(tuple(BaselineRun(seed, {TOTAL_NORM: series}, {}) for seed in seeds)), 0, clipped=False)


def heavy(step: int) -> dict[str, float]:
    return {TOTAL_NORM: [0.1, 40.0, 3.0, INF, 25.0, 70.0, 31.0][step % 7], ACTIVE_FRACTION: float(step % 4 > 0)}


@settings(deadline=None, max_examples=100)
@given(norm_guards(), STREAMS)
@example(NormRatio(window=3).bind(BASELINE, 0, False), [Record(n, heavy(n)) for n in range(30)])
@example(NormRatio(window=3).bind(BASELINE, 5, False), [Record(n, heavy(n)) for n in range(30)])
def test_norm_ratio_is_its_naive_twin(guard: NormRatio, records: list[Record]) -> None:
    found, _ = fold(guard, records)
    expected = naive_norm_ratio(guard, records)
    assert [violation.step for violation in found] == [step for step, _, _ in expected]
    assert [violation.value for violation in found] == pytest.approx([ratio for _, ratio, _ in expected])


def test_the_twin_is_no_empty_promise() -> None:
    guard = NormRatio(window=3).bind(BASELINE, 0, clipped=False)
    assert len(naive_norm_ratio(guard, [Record(n, heavy(n)) for n in range(30)])) > 2


@settings(deadline=None, max_examples=40)
@given(norm_guards(), STREAMS, st.floats(1, 10))
def test_a_higher_limit_never_prunes_earlier(guard: NormRatio, records: list[Record], factor: float) -> None:
    def first(guard: NormRatio) -> float:
        return next(iter(steps_of(guard, records)), INF)

    assert first(guard) <= first(replace(guard, limit=guard.limit * factor))
    assert first(guard) <= first(replace(guard, patience=guard.patience + 1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": 1.0}, {"limit": NAN}, {"limit": INF}, {"limit": -3.0}, {"window": 0}, {"patience": 0},
        {"on_excess": "stop"},
    ],
)  # fmt: skip
def test_norm_ratio_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        NormRatio(**wrong)


# ---- smoke_test

HEALTHY = {
    "non_finite_fraction": 0.0,
    "reference_psnr": 31.0,
    "consistency_psnr": 28.5,
    "consistency_correlation": 0.67,
    "high_frequency": 0.8,
    "std_ratio": 0.95,
    "entropy_bits": 3.5,
    "flow_loss_top_bin": 0.3,
    "undecodable_fraction": 0.0,
    "high_frequency_share": 0.1,
    "diversity": 0.3,
}  # fmt: skip  (FACTS §2)
LOST = {**HEALTHY, "consistency_psnr": 17.0}  # sharp images of something else
NOISE = {**HEALTHY, "consistency_psnr": 17.0, "consistency_correlation": 0.1, "high_frequency": 9.0}


def smoke(*tests: tuple[int, dict[str, float]] | tuple[int, dict[str, float], dict[str, float]]) -> list[Record]:
    prefixed = []
    for step, first, *second in tests:
        values = {SMOKE + name: value for name, value in first.items()}
        for again in second:
            values |= {SMOKE_AGAIN + name: value for name, value in again.items()}
        prefixed.append(Record(step, values))
    return prefixed


@pytest.mark.parametrize(
    ("tests", "consecutive", "fired"),
    [
        ([(0, HEALTHY), (25, HEALTHY), (50, HEALTHY)], 2, []),
        ([(0, HEALTHY), (25, NOISE), (50, HEALTHY), (100, NOISE), (200, HEALTHY)], 2, []),  # one-off failures recover
        ([(0, HEALTHY), (25, NOISE), (50, NOISE)], 2, [(50, "prune")]),
        ([(0, HEALTHY), (25, NOISE), (50, NOISE), (100, NOISE)], 3, [(100, "prune")]),
        ([(0, HEALTHY), (25, NOISE)], 1, [(25, "prune")]),
        ([(0, NOISE)], 2, [(0, "abort")]),  # at step 0 one failure is a bad set-up
        ([(0, NOISE)], 9, [(0, "abort")]),
        ([(0, HEALTHY), (0, NOISE)], 1, []),  # logged twice counts once
        ([(0, HEALTHY), (25, NOISE), (25, NOISE)], 2, []),
        ([(0, HEALTHY), (200, NOISE, NOISE)], 2, [(200, "prune")]),  # the second noise confirms it
        ([(0, HEALTHY), (200, NOISE, NOISE)], 5, [(200, "prune")]),  # whatever number in a row is asked for
        ([(0, HEALTHY), (200, NOISE, HEALTHY)], 2, []),
        ([(0, HEALTHY), (100, NOISE), (200, NOISE, HEALTHY)], 2, []),
        ([(0, HEALTHY), (100, NOISE), (110, NOISE, HEALTHY), (200, NOISE)], 2, []),  # a pass begins the count again
        ([(0, HEALTHY), (200, HEALTHY, NOISE)], 2, []),
        # samples that fail are no start to be judged against
        ([(25, {**HEALTHY, "consistency_psnr": NAN}), (50, HEALTHY), (60, LOST), (70, LOST)], 2, [(70, "prune")]),
    ],
)
def test_smoke_test(tests: Any, consecutive: int, fired: list[tuple[int, str]]) -> None:
    found, _ = fold(SmokeTest(consecutive=consecutive), smoke(*tests))
    assert [(violation.step, violation.action) for violation in found] == fired


@pytest.mark.parametrize(
    ("statistic", "healthy", "ruined"),
    [
        ("consistency_psnr", 25.5, 25.4),
        ("reference_psnr", 28.0, 27.9),
        ("consistency_correlation", 0.44, 0.43),
        ("high_frequency", 1.6, 1.61),
        ("high_frequency", 0.1, 0.09),
        ("std_ratio", 0.4, 0.39),
        ("entropy_bits", 1.5, 1.49),
        ("flow_loss_top_bin", 3.0, 3.01),
        ("non_finite_fraction", 0.0, 1e-6),
        ("undecodable_fraction", 0.0, 0.01),
        ("high_frequency_share", 0.67, 0.68),
        ("diversity", 0.03, 0.029),
        *((name, HEALTHY[name], value) for name in sorted(JUDGED) for value in (NAN, INF, -INF)),
    ],
)
def test_smoke_test_limits(statistic: str, healthy: float, ruined: float) -> None:
    guard = SmokeTest(consecutive=1)
    start = dict(HEALTHY)
    if statistic == "high_frequency_share":  # judged where there is nothing to compare with
        del start["high_frequency"]
    assert fold(guard, smoke((0, start), (1, {**start, statistic: healthy})))[0] == []
    violation = fold(guard, smoke((0, start), (1, {**start, statistic: ruined})))[0][0]
    assert violation.metric == SMOKE + statistic
    assert violation.value == ruined or math.isnan(ruined)
    assert "samples have collapsed" in violation.sentence


def test_everything_that_is_judged_is_in_these_tests() -> None:
    assert set(HEALTHY) == JUDGED


def test_non_finite_pixels_are_said_first() -> None:
    broken = dict.fromkeys(HEALTHY, NAN) | {"non_finite_fraction": 0.25}
    violation = fold(SmokeTest(consecutive=1), smoke((0, HEALTHY), (1, broken)))[0][0]
    assert "25.0% of the sampled pixels are not finite" in violation.sentence
    assert violation.metric == SMOKE + "non_finite_fraction"


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ([(0, HEALTHY), (200, HEALTHY)], None),
        ([(0, HEALTHY), (100, NOISE), (200, NOISE, HEALTHY)], None),
        ([(0, HEALTHY), (200, NOISE)], "the last smoke test, at step 200, failed (agreement with the input 17.0 dB"),
        ([(0, HEALTHY)], "saw no samples after step 0"),
        ([(0, {"sharpness": 3.0}), (200, {"sharpness": 0.0})], "of the samples only sharpness is known"),
        ([(0, {"entropy_bits": 4.0}), (200, {"entropy_bits": 4.0})], None),
    ],
)
def test_smoke_test_never_passes_on_nothing(tests: Any, said: str | None) -> None:
    guard = SmokeTest()
    found, state = fold(guard, smoke(*tests))
    assert found == []
    reason = guard.unjudged(state)
    assert reason is None if said is None else said in (reason or "")


def test_when_a_smoke_test_is_due() -> None:
    guard = SmokeTest(at=(50, 0, 50, 25))
    assert guard.at == (0, 25, 50)
    assert [step for step in range(201) if guard.due(step, last_step=200)] == [0, 25, 50, 200]


STATISTICS = st.dictionaries(st.sampled_from(sorted(JUDGED)), st.floats(-1, 40) | st.sampled_from([NAN, INF]))
SMOKE_STREAMS = st.lists(st.tuples(STATISTICS, STATISTICS), max_size=6).map(
    lambda tests: smoke((0, HEALTHY), *((n, first, second) for n, (first, second) in enumerate(tests, 1)))
)


@settings(deadline=None, max_examples=40)
@given(SMOKE_STREAMS, st.floats(1, 3), st.integers(1, 3))
def test_wider_limits_never_prune_earlier(records: list[Record], factor: float, consecutive: int) -> None:
    def first(guard: SmokeTest) -> float:
        return next(iter(steps_of(guard, records)), INF)

    guard = SmokeTest(consecutive=consecutive)
    wider = {name: getattr(guard, name) * factor for name in vars(guard) if name.startswith("max_")}
    wider |= {name: getattr(guard, name) / factor for name in vars(guard) if name.startswith("min_")}
    assert first(guard) <= first(replace(guard, **wider))
    assert first(guard) <= first(replace(guard, consecutive=consecutive + 1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"at": ()}, {"at": (-1,)}, {"at": (1.5,)}, {"consecutive": 0}, {"max_consistency_drop_db": 0},
        {"max_high_frequency": NAN}, {"min_std_ratio": NAN}, {"max_flow_loss_ratio": -1}, {"min_high_frequency": 2.0},
    ],
)  # fmt: skip
def test_smoke_test_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        SmokeTest(**wrong)


# ---- non_finite


@pytest.mark.parametrize(
    ("values", "metric"),
    [
        ({LOSS: 1.0, TOTAL_NORM: 1e30}, None),
        ({LOSS: NAN}, LOSS),
        ({LOSS: -INF}, LOSS),
        ({"loss_ssim": NAN, LOSS: 1.0}, "loss_ssim"),
        ({TOTAL_NORM: INF, LOSS: 1.0}, None),  # a GradScaler may be searching its scale
        ({TOTAL_NORM: NAN, LOSS: 1.0}, TOTAL_NORM),
        ({"total_norm_main": NAN, LOSS: 1.0}, "total_norm_main"),
        ({"lr": NAN, LOSS: 1.0}, None),
        ({LOSS: 1.0, TOTAL_NORM: INF, STEP_SKIPPED: 1.0}, None),  # routine under a GradScaler
        ({LOSS: 1.0, TOTAL_NORM: INF, STEP_SKIPPED: 0.0}, TOTAL_NORM),
        ({TOTAL_NORM: NAN, "loss_ssim": NAN, LOSS: NAN}, LOSS),  # whichever key comes first
        ({LOSS: NAN, "loss_ssim": NAN, TOTAL_NORM: NAN}, LOSS),
    ],
)
def test_non_finite(values: dict[str, float], metric: str | None) -> None:
    found, _ = fold(NonFinite(), [Record(3, values)])
    assert [(violation.step, violation.metric) for violation in found] == ([] if metric is None else [(3, metric)])
    assert all(violation.action == "prune" for violation in found)


def skips(*runs: tuple[int, bool]) -> list[Record]:
    flags = [skipped for count, skipped in runs for _ in range(count)]
    return [Record(n, {LOSS: 1.0, TOTAL_NORM: INF if flag else 1.0, STEP_SKIPPED: float(flag)}) for n, flag in enumerate(flags, 1)]


@pytest.mark.parametrize(
    ("records", "step"),
    [
        (skips((16, True), (50, False)), None),  # the scale is being found
        (skips((20, True), (1, False), (20, True), (1, False)), None),
        (skips((5, False), (21, True)), 26),
        (skips((25, True)), 21),
        ([record for record in skips((20, True)) for _ in range(2)], None),  # logged twice counts once
    ],
)
def test_non_finite_skipped_steps(records: list[Record], step: int | None) -> None:
    found = steps_of(NonFinite(), records)
    assert (found[0] if found else None) == step


def test_a_smoke_test_between_skipped_steps_does_not_begin_the_count_again() -> None:
    records = skips((21, True))
    records[10:10] = smoke((10, HEALTHY))
    assert steps_of(NonFinite(), records) == [21]


@pytest.mark.parametrize("wrong", [{"prefixes": ()}, {"max_skipped": 0}])
def test_non_finite_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
        NonFinite(**wrong)


# ---- threshold


@pytest.mark.parametrize(
    ("values", "parameters", "steps"),
    [
        ([0.5, 1.0, 1.0], {"upper": 1.0}, []),
        ([0.5, 1.1, 0.5], {"upper": 1.0}, [1]),
        ([0.5, -0.1], {"lower": 0.0}, [1]),
        ([2, 2, 0, 2, 2, 2, 2], {"upper": 1, "patience": 3}, [5]),
        ([2, NAN, INF], {"upper": 3, "patience": 2}, [2]),
        ([NAN], {"lower": 0.0}, [0]),
        ([NAN, 3.0], {}, [0]),
        ([2.0, 2.0, 0.0, 2.0], {"upper": 1}, [0, 3]),  # once for each time it leaves
    ],
)
def test_threshold(values: list[float], parameters: dict[str, Any], steps: list[int]) -> None:
    records = [Record(step, {"loss_ssim": value}) for step, value in enumerate(values)]
    guard = Threshold("loss_ssim", **parameters)
    assert steps_of(guard, records) == steps
    assert steps_of(guard, [record for record in records for _ in range(2)]) == steps
    assert guard.metrics == ("loss_ssim",)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lower": 1.0, "upper": 1.0}, r"lower must be below upper \(1.0\), got 1.0"),
        ({"lower": NAN}, "must be below"),
        ({"patience": 0}, "patience must be >= 1, got 0"),
        ({"action": "stop"}, "action must be warn, probe, prune or abort, got 'stop'"),
    ],
)
def test_threshold_refuses(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Threshold("loss", **wrong)


# ---- the states


@pytest.mark.parametrize(
    "guard",
    [NormRatio().bind(BASELINE, 0, clipped=True), SmokeTest(), NonFinite(), Threshold("loss", upper=1)],
    ids=lambda guard: guard.name,
)
def test_a_state_does_not_grow(guard: Guard) -> None:
    def size(count: int) -> int:
        ruined = [Record(n, {LOSS: NAN, TOTAL_NORM: INF, ACTIVE_FRACTION: 1.0}) for n in range(1000, 1000 + count)]
        tests = smoke((0, HEALTHY), *((record.step, NOISE) for record in ruined))
        merged = [Record(r.step, {**r.values, **s.values}) for r, s in zip(ruined, tests[1:], strict=True)]
        state = guard.init()
        for record in [tests[0], *merged]:
            state, _ = guard.update(state, record)
        return len(json.dumps(state))

    assert size(2000) <= size(50) + 20  # a counter has more digits


# ---- the baseline file

RUNS = st.builds(
    BaselineRun,
    seed=st.integers(),
    series=st.dictionaries(
        st.sampled_from([TOTAL_NORM, LOSS]),
        st.dictionaries(st.integers(0, 99), st.floats() | st.integers(0, 9), max_size=4),
    ),
    evaluation=st.dictionaries(st.sampled_from(["ssim", "psnr"]), st.floats(allow_nan=False)),
    effective=st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3), max_size=2),
    trial_id=st.text(max_size=5),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(RUNS, min_size=1, max_size=3).map(tuple).map(Baseline))
def test_a_baseline_keeps_its_digest(baseline: Baseline) -> None:
    again = Baseline.from_bytes(baseline.to_bytes())
    assert again.sha256 == baseline.sha256
    assert [run.seed for run in again.runs] == [run.seed for run in baseline.runs]


def test_a_baseline_file(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    file.write_bytes(BASELINE.to_bytes())
    assert Baseline.read(file, BASELINE.sha256) == BASELINE
    with pytest.raises(UserError, match=r"has digest .*, expected 000000000000"):
        Baseline.read(file, "0" * 64)
    with pytest.raises(UserError, match=r"no such file.*reachable under the same name from every node"):
        Baseline.read(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="at least one run"):
        Baseline(())


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "runs": [3]}', "\udcff",
             '{"format": 1, "runs": []}', '{"format": 1, "runs": [{"seed": 0, "evaluation": {}, "series": []}]}'],
)  # fmt: skip
def test_what_is_no_baseline_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "foreign.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"foreign\.json: "):
        Baseline.read(file)


def test_pairs_and_noise_floor() -> None:
    runs = [BaselineRun(seed, {}, {"ssim": ssim}) for seed, ssim in ((0, 0.75), (1, 0.5))]
    two, one = Baseline(tuple(runs)), Baseline((runs[0],))
    assert two.noise_floor("ssim") == 0.25
    assert two.noise_floor("absent") is None
    assert one.noise_floor("ssim") is None
    assert two.run_of(1) is runs[1]
    assert two.run_of(2) is None
    assert two.reference(2) is runs[0]
