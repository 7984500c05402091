import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_ssim.losses.schedules import Adaptive, Constant, Cosine, CyclicalLinear, Linear, WarmUp, read_schedule, written_schedule


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(0.01), {0: 0.01, 10**9: 0.01}),
        (Constant(1), {7: 1.0}),
        (Constant(-1), {0: -1.0}),
        (Linear(0, 0.01, 1000), {0: 0, 1: 1e-5, 500: 0.005, 1000: 0.01, 1001: 0.01}),
        (Linear(1, 0, 4), {0: 1, 1: 0.75, 4: 0, 9: 0}),
        # 4 cycles of 100: 50 steps up, 50 at the top; then at the top for good
        (CyclicalLinear(0, 1, 400), {0: 0, 25: 0.5, 50: 1, 99: 1, 100: 0, 125: 0.5, 399: 1, 400: 1, 10**6: 1}),
        # cycles that do not divide the steps: of 10/3 steps each
        (CyclicalLinear(0, 1, 10, cycles=3, ratio=1), {1: 0.3, 3: 0.9, 4: 0.2, 10: 1}),
        (Linear(0, 0.1, 500), {0: 0, 250: 0.05, 500: 0.1, 501: 0.1}),
        (WarmUp(8, 4), {0: 0, 1: 2, 4: 8, 5: 8}),
        (Cosine(10, 2, 6), {0: 10, 2: 8, 3: 6, 4: 4, 6: 2, 7: 2}),  # cos 60° = 1/2
    ],
)
def test_values(schedule, values):
    assert {step: schedule(step) for step in values} == pytest.approx(values, abs=1e-15)
    assert all(isinstance(schedule(step), float) for step in values)


@pytest.mark.parametrize(("value", "divisor", "steps"), [(0.01, 1000, 10), (0.01, 100_000, 1000)])
def test_the_annealings_of_note_004(value, divisor, steps):
    schedule = Linear(0, value, steps)
    for step in (0, 1, steps // 2, steps - 1, steps, steps + 1, 10 * steps):
        assert schedule(step) == pytest.approx(min(value, step / divisor))


@given(st.sampled_from([Linear(0.01, 0.2, 1000), CyclicalLinear(0.01, 0.2, 400), Linear(0, 0.2, 500)]), st.integers(-5, 5000))
def test_a_weight_stays_between_its_ends(schedule, step):
    assert schedule.start <= schedule(step) <= 0.2


def test_a_cycle_is_repeated_exactly():
    schedule = CyclicalLinear(start=0.1, end=0.7, steps=3_000_000, cycles=3, ratio=0.3)
    for step in (0, 1, 7, 123_457, 299_999, 300_000, 999_999):
        assert schedule(step) == schedule(step + 1_000_000) == schedule(step + 2_000_000)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Linear(0, 1, 0), "steps must be an integer >= 1, got 0"),
        (lambda: Linear(0, 1, 2.5), "steps must be an integer >= 1, got 2.5"),
        (lambda: Linear(0, math.inf, 2), "end must be a finite number, got inf"),
        (lambda: Linear(0, "1e-4", 2), "end must be a finite number, got '1e-4'"),
        (lambda: CyclicalLinear(0, 1, 9, ratio=0), r"ratio must be in \(0, 1\], got 0"),
        (lambda: CyclicalLinear(0, 1, 3, cycles=4), r"must be at most steps \(3\), got 4"),
        (lambda: Constant(math.nan), "value must be a finite number, got nan"),
        (lambda: Adaptive(0), "target_ratio must be > 0, got 0"),
        (lambda: Adaptive(2, max_weight=math.inf), "max_weight must be a finite number, got inf"),
    ],
)
def test_mistakes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "written",
    [
        {"constant": {"value": 3.0}},
        {"cyclical": {"start": 0.0, "end": 1.0, "steps": 400, "cycles": 2, "ratio": 1.0}},
        {"adaptive": {"target_ratio": 2.0, "max_weight": 50.0}},
    ],
)
def test_a_schedule_is_read_as_it_was_written(written):
    assert written_schedule(read_schedule(written)) == written


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (3, "a schedule is one of constant, linear, .* with its numbers, got 3"),
        ({"warmup": {}}, "unknown schedule 'warmup'; did you mean 'warm_up'?"),
        ({"adaptive": 2}, "adaptive: must be a mapping, got 2"),
        ({"adaptive": {"target_rato": 2}}, "adaptive: unknown key 'target_rato'; did you mean 'target_ratio'?"),
        ({"linear": {"start": 1, "steps": 3}}, "linear: end is missing"),
        ({"cosine": {"start": 1, "end": "0", "steps": 3}}, "cosine.end: must be a number, got '0'"),
        ({"adaptive": {"target_ratio": -1}}, "adaptive.target_ratio: must be > 0, got -1"),
    ],
)
def test_mistakes_in_a_file(written, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        read_schedule(written)
