import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_ssim.base.errors import UserError
from tune_ssim.losses import parse_schedule, schedule_config
from tune_ssim.losses.schedules import SCHEDULES, Constant, CyclicalLinear, WarmUp

ONE_OF_EACH = {
    "constant": {"value": 0.3},
    "linear": {"start": 0.2, "end": 0.01, "steps": 1000},
    "cosine": {"start": 0.1, "end": 0.0, "steps": 2000},
    "cyclical_linear": {"start": 0.0, "end": 0.01, "steps": 400, "cycles": 4, "ratio": 0.5},
    "warm_up": {"steps": 500, "value": 0.1},
}


@pytest.mark.parametrize(
    ("line", "values"),
    [
        (0.01, {0: 0.01, 10**9: 0.01}),
        (1, {7: 1.0}),
        ({"constant": {"value": 2}}, {7: 2.0}),
        ({"linear": {"start": 0, "end": 0.01, "steps": 1000}}, {0: 0, 1: 1e-5, 500: 0.005, 1000: 0.01, 1001: 0.01}),
        ({"linear": {"start": 1, "end": 0, "steps": 4}}, {0: 1, 1: 0.75, 4: 0, 9: 0}),
        # half a cosine: start + (end − start)·(1 − cos πx)/2
        ({"cosine": {"start": 1, "end": 0, "steps": 8}}, {0: 1, 2: (1 + math.sqrt(0.5)) / 2, 4: 0.5, 8: 0, 99: 0}),
        # 4 cycles of 100: 50 steps up, 50 at the top; then at the top for good
        (
            {"cyclical_linear": {"start": 0, "end": 1, "steps": 400}},
            {0: 0, 25: 0.5, 50: 1, 99: 1, 100: 0, 125: 0.5, 399: 1, 400: 1, 10**6: 1},
        ),
        # cycles that do not divide the steps: of 10/3 steps each
        ({"cyclical_linear": {"start": 0, "end": 1, "steps": 10, "cycles": 3, "ratio": 1}}, {1: 0.3, 3: 0.9, 4: 0.2, 10: 1}),
        ({"warm_up": {"steps": 500, "value": 0.1}}, {0: 0, 250: 0.05, 500: 0.1, 501: 0.1}),
    ],
)
def test_values(line, values):
    schedule = parse_schedule(line)
    assert {step: schedule(step) for step in values} == pytest.approx(values, abs=1e-15)
    assert all(isinstance(schedule(step), float) for step in values)


@pytest.mark.parametrize(("value", "divisor", "steps"), [(0.01, 1000, 10), (0.01, 100_000, 1000)])
def test_the_annealings_of_note_004(value, divisor, steps):
    schedule = WarmUp(steps=steps, value=value)
    for step in (0, 1, steps // 2, steps - 1, steps, steps + 1, 10 * steps):
        assert schedule(step) == pytest.approx(min(value, step / divisor))


@pytest.mark.parametrize("name", SCHEDULES)
def test_as_configuration_and_back(name):
    schedule = parse_schedule({name: ONE_OF_EACH[name]})
    assert parse_schedule(json.loads(json.dumps(schedule_config(schedule)))) == schedule
    assert parse_schedule(schedule) is schedule
    assert (schedule_config(schedule) == 0.3) == (name == "constant")


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(-5, 5000))
def test_between_its_ends_and_a_function_of_the_step_alone(name, step):
    settings = ONE_OF_EACH[name]
    ends = [settings.get("start", 0.0 if name == "warm_up" else settings.get("value")), settings.get("end", settings.get("value"))]
    schedule = parse_schedule({name: settings})
    assert min(ends) <= schedule(step) <= max(ends)
    assert schedule(step) == parse_schedule({name: settings})(step)


def test_a_cycle_is_repeated_exactly():
    schedule = CyclicalLinear(start=0.1, end=0.7, steps=3_000_000, cycles=3, ratio=0.3)
    for step in (0, 1, 7, 123_457, 299_999, 300_000, 999_999):
        assert schedule(step) == schedule(step + 1_000_000) == schedule(step + 2_000_000)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("linear", "kl_weight: got 'linear'; expected a number, or one of constant, linear, cosine, cyclical_linear, warm_up"),
        (None, "kl_weight: got None; expected a number"),
        (True, "kl_weight: got True; expected a number"),
        ({}, "kl_weight: got 0 keys"),
        ({"linear": {}, "cosine": {}}, r"kl_weight: got 2 keys \(linear, cosine\)"),
        ({"warmup": {"steps": 5, "value": 1}}, "kl_weight: unknown schedule 'warmup'; did you mean 'warm_up'?"),
        ({"step": {}}, "kl_weight: unknown schedule 'step'; valid: constant, linear"),
        ({"linear": 3}, "kl_weight: linear: got 3; expected a mapping with start, end, steps"),
        ({"linear": {"start": 0, "stop": 1, "steps": 3}}, "kl_weight: linear: unknown key 'stop'; did you mean 'st"),
        ({"linear": {"start": 0}}, "kl_weight: linear: end, steps missing; valid: start, end, steps"),
        ({"linear": {"start": 0, "end": 1, "steps": 0}}, "kl_weight: linear: steps must be an integer >= 1, got 0"),
        ({"linear": {"start": 0, "end": 1, "steps": 2.5}}, "steps must be an integer >= 1, got 2.5"),
        ({"linear": {"start": 0, "end": math.inf, "steps": 2}}, "end must be a finite number, got inf"),
        ({"linear": {"start": 0, "end": "1e-4", "steps": 2}}, "end must be a finite number, got '1e-4'"),
        ({"linear": {"start": 0, "end": -1, "steps": 2}}, "kl_weight: linear: end=-1; expected a number >= 0"),
        ({"cyclical_linear": {"start": 0, "end": 1, "steps": 9, "ratio": 0}}, r"ratio must be in \(0, 1\], got 0"),
        ({"cyclical_linear": {"start": 0, "end": 1, "steps": 3, "cycles": 4}}, r"cycles \(4\) must be at most steps \(3\)"),
        (-0.1, "kl_weight: constant: value=-0.1; expected a number >= 0"),
        (math.nan, "kl_weight: value must be a finite number, got nan"),
    ],
)
def test_mistakes(line, message):
    with pytest.raises(UserError, match=message):
        parse_schedule(line, "kl_weight")


def test_something_other_than_a_weight_may_be_negative():
    assert parse_schedule({"linear": {"start": -1, "end": 1, "steps": 2}}, lower=-math.inf)(0) == -1
    assert Constant(-1)(0) == -1
