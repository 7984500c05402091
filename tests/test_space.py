"""Search spaces: the notes' numbers, what belongs to a space, and one clear line for every mistake in a file."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tune_ssim.base.errors import UserError
from tune_ssim.base.yaml_source import MAX_BYTES, dump_yaml, parse_yaml, read_yaml
from tune_ssim.study.domains import Choice, LogUniform, Uniform
from tune_ssim.study.space import (
    KNOWN,
    TRIPLE,
    Space,
    Stage,
    bundled_spaces,
    bundled_spaces_folder,
    gain_of,
    load_space,
    near_miss,
    resolve_settings,
)

# SEEDS A5, A4: (weight, max_t, grad_scale) as the notes give them.
V1, V2, V3 = (1.0, 0.3, 1.0), (0.1, 0.1, 0.1), (0.1, 0.1, 0.01)
V2_ROUTE = [(0.1, 0.1, 0.1), (0.2, 0.1, 0.1), (0.3, 0.15, 0.1), (0.5, 0.2, 0.1)]
V3_ROUTE = [(0.1, 0.1, 0.01), (0.2, 0.15, 0.01), (0.5, 0.2, 0.01)]
STAGES = ["conservative", "moderate", "assertive", "aggressive"]


def triples(stage: Stage) -> list[tuple[float, ...]]:
    return [tuple(config[name] for name in TRIPLE) for config in stage.point_configs()]


def parse(text: str | bytes) -> Space:
    return load_space(parse_yaml(text, "s.yaml"))


# ---- the bundled spaces ----


OF_SSIM = ["aggressive", "assertive", "conservative", "moderate", "note_v2", "note_v3", "wide"]


def test_the_bundled_spaces_are_these() -> None:
    assert bundled_spaces() == [*OF_SSIM[:3], "flow_dino_kl", *OF_SSIM[3:6], "two_stage_vlm", "vae_kl", "wide"]


def test_yaml_for_any_reader_changes_nothing_for_the_next_one() -> None:
    value = {"a": "off", "x": 1e-05, "n": None}
    before = dump_yaml(value)
    assert dump_yaml(value, for_any_reader=True) == 'a: "off"\nx: 1.0e-05\n"n": null\n'
    assert dump_yaml(value) == before == "a: off\nx: 1e-05\nn: null\n"


def test_wide_begins_with_the_settings_of_the_notes() -> None:
    (stage,) = load_space("wide").stages
    assert triples(stage) == [V1, V2, V3]
    assert stage.parameters == {"gain": LogUniform(0.001, 3000), "ssim_loss_max_t": Choice((0.1, 0.2, 0.3, 1.0))}
    assert stage.fixed == {"ssim_grad_scale": 1.0, "pixel_loss_weight": 0.0}


def test_note_v2_is_the_route_of_the_note() -> None:
    space = load_space("note_v2")
    assert [stage.name for stage in space.stages] == STAGES
    assert [triples(stage)[0] for stage in space.stages] == V2_ROUTE


def test_note_v3_is_the_route_of_the_note_with_one_stage_between() -> None:
    space = load_space("note_v3")
    assert [stage.name for stage in space.stages] == STAGES
    firsts = [triples(stage)[0] for stage in space.stages]
    assert [first for first in firsts if first in V3_ROUTE] == V3_ROUTE
    assert firsts[1] == (0.2, 0.1, 0.01)


@pytest.mark.parametrize(("name", "scale"), [("note_v2", 0.1), ("note_v3", 0.01)])
def test_a_route_moves_weight_first_then_the_gate_and_never_the_scale(name: str, scale: float) -> None:
    stages = load_space(name).stages
    assert all(stage.fixed["ssim_grad_scale"] == scale for stage in stages)
    firsts = [triples(stage)[0] for stage in stages]
    for before, after in pairwise(firsts):
        assert after[0] >= before[0] and after[1] >= before[1] and after > before
    assert firsts[1][0] > firsts[0][0] and firsts[1][1] == firsts[0][1]


def test_the_relative_spaces_follow_upon_each_other() -> None:
    """The same initial push on every model, from hardly any to the limit of the norm guard (note 000 §5.2)."""
    stages = [load_space(name).stages[0] for name in STAGES]
    gains = [stage.parameters["gain"] for stage in stages]
    assert [gain.upper for gain in gains] == [1.1, 1.5, 3, 10]
    assert all(before.upper == after.lower for before, after in pairwise(gains)) and gains[0].lower > 1
    assert all(gain.unit == "norm_ratio" for gain in gains)
    assert all(stage.is_relative and stage.fixed == {"ssim_grad_scale": 1.0, "pixel_loss_weight": 0.0} for stage in stages)
    assert not load_space("wide").is_relative


@pytest.mark.parametrize("name", bundled_spaces())
def test_every_bundled_space_describes_itself_and_cites_its_numbers(name: str) -> None:
    space = load_space(name)
    assert space.name == name and space.description
    assert len(space.stages) == 1 or all(stage.description for stage in space.stages)
    text = (bundled_spaces_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert ("note 000 §" if name in OF_SSIM else "note 00") in text


def test_one_stage_of_a_route() -> None:
    space = load_space("note_v3:conservative")
    assert space.name == "note_v3:conservative"
    assert [stage.name for stage in space.stages] == ["conservative"]


# ---- what a number means ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("-.inf", -math.inf), ("0x1f", 31), ("0o10", 8),
        ("010", 10), ("no", "no"), ("on", "on"), ("y", "y"), ("1:30", "1:30"), ("2001-01-01", "2001-01-01"),
        ("1_000", "1_000"), ("'1e-4'", "1e-4"), ("!!str 3", "3"), ("~", None), ("", None), ("True", True), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(f"a: {text}\n", "s.yaml").value["a"]
    assert found == value and type(found) is type(value)


def test_gain_becomes_a_weight_and_the_rest_stays() -> None:
    assert resolve_settings({"gain": 3.0, "ssim_grad_scale": 0.01, "lr": 1e-3}) == {
        "ssim_loss_weight": 300.0,
        "ssim_grad_scale": 0.01,
        "lr": 1e-3,
    }
    assert resolve_settings({"gain": 3.0}) == {"ssim_loss_weight": 3.0, "ssim_grad_scale": 1.0}
    assert resolve_settings({"ssim_loss_weight": 3.0}) == {"ssim_loss_weight": 3.0}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"gain": 1.0, "ssim_loss_weight": 1.0}, "cannot both be given"),
        ({"gain": 1.0, "ssim_grad_scale": 0.0}, "must be > 0"),
        ({"gain": math.nan}, "finite"),
        ({"gain": "3"}, "'3' (text)"),
    ],
)
def test_a_gain_that_cannot_be_resolved(values: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_settings(values)
    assert says in str(error.value)


@given(st.floats(1e-3, 3e3), st.floats(1e-4, 1e2))
def test_the_gain_comes_back(gain: float, scale: float) -> None:
    assert math.isclose(gain_of(resolve_settings({"gain": gain, "ssim_grad_scale": scale})), gain)


def test_a_domain_puts_rounding_back_within_bounds() -> None:
    parameters = load_space("wide").stages[0].parameters
    gains = [gain_of(point) for point in load_space("wide").stages[0].point_configs()]
    assert all(gain in parameters["gain"] for gain in gains)
    assert parameters["gain"].clip(gains[2]) >= 0.001  # 0.1 · 0.01 is 0.001 less a rounding error or so
    assert parameters["gain"].clip(3000 * (1 + 1e-12)) == 3000.0
    assert 3000 * (1 + 1e-12) in parameters["gain"] and 5000 not in parameters["gain"]
    assert parameters["ssim_loss_max_t"].clip(0.1 + 1e-12) == 0.1 and parameters["ssim_loss_max_t"].clip(0.9) == 1.0


@pytest.mark.parametrize("domain", [LogUniform(0.001, 3000), Uniform(-1, 5), Choice((0.1, 0.2, 0.3)), Choice(("a", "b"))])
def test_every_quantile_of_a_domain_lies_inside(domain: LogUniform | Uniform | Choice) -> None:
    found = [domain.at(u / 100) for u in range(101)]
    assert all(value in domain and domain.to_optuna()._contains(domain.to_optuna().to_internal_repr(value)) for value in found)
    assert (found[0], found[-1]) == pytest.approx((domain.listed[0], domain.listed[-1])) or found[0] == "a"
    assert set(domain.listed) <= set(domain.grid(7)) and all(domain.clip(value) == value for value in found)


def test_quantiles_and_grids() -> None:
    assert LogUniform(0.01, 100).at(0.5) == pytest.approx(1)
    assert LogUniform(0.01, 100).grid(5) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert Uniform(0, 4).at(0.25) == 1 and Uniform(0, 4).grid(3) == [0, 2, 4]
    assert [Choice((1, 2, 3)).at(u) for u in (0, 0.34, 0.67, 1)] == [1, 2, 3, 3]
    assert Choice((3, 1, 2)).bounds == (1, 3) and Uniform(0, 4).bounds == (0, 4)


def test_a_gain_by_what_it_does_leaves_its_points_to_the_calibration() -> None:
    text = HEAD + "  gain: {unit: norm_ratio, log_uniform: [1.1, 3]}\n  ssim_loss_max_t: {choice: [0.1]}\npoints:\n"
    space = parse(text + "  - {ssim_loss_weight: 900, ssim_loss_max_t: 0.1, ssim_grad_scale: 1}\n")
    (stage,) = space.stages
    assert space.is_relative and stage.is_relative
    assert str(stage.parameters["gain"]) == "predicted norm ratio, log-uniform in [1.1, 3]"
    with pytest.raises(UserError, match=r"ssim_loss_max_t: 0\.2 is outside the space"):  # the rest is known already
        parse(text + "  - {ssim_loss_weight: 900, ssim_loss_max_t: 0.2, ssim_grad_scale: 1}\n")


SCHEDULED = """
name: s
fixed: {ssim_grad_scale: 1}
stages:
  - name: rising
    parameters:
      ssim_loss_weight: {warm_up: {value: {log_uniform: [1, 16]}, steps: 50}}
  - name: adaptive
    parameters:
      ssim_loss_weight: {adaptive: {target_ratio: {choice: [1, 2]}}}
      ssim_loss_max_t: {choice: [0.1, 1]}
    points:
      - {ssim_loss_weight: {adaptive: {target_ratio: 2}}, ssim_loss_max_t: 0.1, ssim_grad_scale: 1}
  - name: falling
    parameters: {ssim_loss_max_t: {choice: [0.1, 1]}}
    fixed: {ssim_loss_weight: {cosine: {start: 10, end: 1, steps: 200}}}
"""


def test_each_number_of_a_schedule_can_be_searched() -> None:
    space = parse(SCHEDULED)
    rising, adaptive, falling = space.stages
    assert rising.parameters == {"ssim_loss_weight.warm_up.value": LogUniform(1, 16)}
    sampled = {name: domain.at(0.5) for name, domain in rising.parameters.items()}
    assert resolve_settings({**rising.fixed, **sampled}) == {
        "ssim_grad_scale": 1.0,
        "ssim_loss_weight": {"warm_up": {"value": pytest.approx(4), "steps": 50}},
    }
    (point,) = adaptive.point_configs()
    assert resolve_settings(point)["ssim_loss_weight"] == {"adaptive": {"target_ratio": 2}}
    weight = resolve_settings(falling.fixed)["ssim_loss_weight"]
    assert weight == {"cosine": {"start": 10, "end": 1, "steps": 200}}
    assert gain_of({"ssim_loss_weight": weight, "ssim_grad_scale": 0.1}) == pytest.approx(1)  # of its largest weight
    assert math.isnan(gain_of(point | {"ssim_loss_weight": {"adaptive": {"target_ratio": 2}}}))
    assert load_space(space.to_yaml()) == space == parse(dump_yaml(space.to_yaml()))


# ---- mistakes: file text → what the one line must hold ----

HEAD = "name: s\nparameters:\n"
GOOD = HEAD + "  gain: {log_uniform: [0.1, 30]}\n  ssim_loss_max_t: {choice: [0.1, 0.2]}\n"
GATE = HEAD + "  ssim_loss_max_t: {choice: [0.1, 0.2]}\n"
PINNED = HEAD + "  ssim_loss_weight: {uniform: [0, 1]}\n  ssim_loss_max_t: {uniform: [0.1, 0.5]}\nfixed: {ssim_grad_scale: 0.1}\n"

BAD = [
    # bounds and domains
    (HEAD + "  ssim_loss_weight: {uniform: [0.5, 0.05]}", "s.yaml:3: ssim_loss_weight: lower (0.5) must be below upper (0.05)"),
    (HEAD + "  gain: {log_uniform: [0, 1]}", "s.yaml:3: gain: lower must be > 0 on a logarithmic scale, got 0"),
    (HEAD + "  gain: {log_uniform: ['0.1', 3]}", "s.yaml:3: gain: lower must be a number, got '0.1' (text)"),
    (HEAD + "  gain: {log_uniform: [1, .inf]}", "s.yaml:3: gain: upper must be finite"),
    (HEAD + "  gain: {log_uniform: [1, 1e999]}", "s.yaml:3: gain: upper must be finite"),
    (HEAD + "  gain: {log_uniform: [1]}", "s.yaml:3: gain: log_uniform must be [lower, upper], got [1] (a list)"),
    (HEAD + "  gain: {log_uniform: 3}", "s.yaml:3: gain: log_uniform must be [lower, upper], got 3"),
    (HEAD + "  gain: {loguniform: [1, 2]}", "s.yaml:3: gain: unknown key 'loguniform'; did you mean 'log_uniform'?"),
    (HEAD + "  gain:\n    unit: x\n    log_uniform: [1, 2]", "s.yaml:4: gain: `unit` must be norm_ratio, or left out, got 'x'"),
    (HEAD + "  gain: {unit: norm_ratio}", "s.yaml:3: gain: must have exactly one of log_uniform, uniform, choice; got none"),
    (HEAD + "  gain: {unit: norm_ratio, log_uniform: [0, 2]}", "s.yaml:3: gain: lower must be > 0"),
    (HEAD + "  gain: {unit: norm_ratio, choice: [0, 2]}", "s.yaml:3: gain: must be a finite number > 0, got 0"),
    (HEAD + "  gain: {unit: [1], log_uniform: [1, 2]}", "s.yaml:3: gain: `unit` must be norm_ratio, or left out, got [1]"),
    (HEAD + "  ssim_loss_weight: {unit: norm_ratio, choice: [1]}", "s.yaml:3: ssim_loss_weight: `unit: norm_ratio` is for gain"),
    (HEAD + "  gain: {units: norm_ratio, choice: [1]}", "s.yaml:3: gain: unknown key 'units'; did you mean 'unit'?"),
    (HEAD + "  gain: {uniform: [1, 2], choice: [1]}", "s.yaml:3: gain: must have exactly one of"),
    (HEAD + "  gain: {}", "s.yaml:3: gain: must have exactly one of"),
    (HEAD + "  gain: [1, 2]", "s.yaml:3: gain: must say how to search it"),
    (HEAD + "  gain: {choice: []}", "s.yaml:3: gain: choice must have at least one value"),
    (HEAD + "  gain: {choice: 0.1}", "s.yaml:3: gain: choice must be a list of values, got 0.1"),
    (HEAD + "  gain: {choice: [1, 1.0]}", "s.yaml:3: gain: choice has 1.0 twice"),
    (HEAD + "  gain: {choice: [[1]]}", "s.yaml:3: gain: must be a single value, got [1] (a list)"),
    (HEAD + "  gain: {choice: [no]}", "s.yaml:3: gain: must be a number, got 'no' (text)"),
    # schedules of the weight
    (GATE + "  ssim_loss_weight: {adaptve: {target_ratio: {uniform: [1, 2]}}}", "s.yaml:4: ssim_loss_weight: unknown schedule"),
    (GATE + "  ssim_loss_weight:\n    linear:\n      start: 1\n      end: {uniform: [-1, 2]}\n      steps: 9",
     "s.yaml:7: ssim_loss_weight.linear.end: a weight must be >= 0, got -1"),
    (GATE + "  ssim_loss_weight:\n    adaptive:\n      target_ratio: {log_unifrm: [1, 2]}",
     "s.yaml:6: ssim_loss_weight.adaptive.target_ratio: unknown key 'log_unifrm'; did you mean 'log_uniform'?"),
    (GATE + "fixed:\n  ssim_loss_weight:\n    cosine:\n      strt: 1\n      end: 0\n      steps: 5",
     "s.yaml:7: ssim_loss_weight.cosine.strt: unknown key 'strt'; did you mean 'start'?"),
    (GATE + "fixed:\n  ssim_loss_weight: {warm_up: {value: 3}}", "s.yaml:5: ssim_loss_weight.warm_up: steps is missing"),
    (GATE + "fixed:\n  ssim_loss_weight: {linear: {start: 1, end: 2, steps: 2.5}}",
     "s.yaml:5: ssim_loss_weight.linear.steps: must be an integer, got 2.5"),
    (GATE + "fixed:\n  ssim_loss_weight: {adaptive: 2}", "s.yaml:5: ssim_loss_weight: must be a mapping, got 2"),
    (GATE + "  ssim_loss_weight:\n    cyclical:\n      start: 0\n      end: {uniform: [1, 5]}\n      steps: 3\n      cycles: 50",
     "s.yaml:9: ssim_loss_weight.cyclical.cycles: must be at most steps (3), got 50"),
    (GATE + "  ssim_loss_weight:\n    cyclical:\n      start: 0\n      end: {uniform: [1, 5]}\n      steps: 3",
     "s.yaml:6: ssim_loss_weight.cyclical.cycles: must be at most steps (3), got 4"),
    (HEAD + "  ssim_loss_weight:\n    adaptve: {target_ratio: 2}", "s.yaml:4: ssim_loss_weight: unknown schedule 'adaptve'"),
    (GATE + "fixed: {ssim_loss_weight: {adaptive: {target_ratio: 2}}, ssim_grad_clamp: 1}",
     "s.yaml:4: ssim_grad_clamp: cannot be combined with an adaptive ssim_loss_weight"),
    (GOOD + "fixed: {ssim_loss_weight: {adaptive: {target_ratio: 2}}}", "s.yaml:3: gain: cannot be combined with a schedule"),
    # ranges of the known settings
    (GOOD + "fixed: {ssim_grad_clamp: 0}", "s.yaml:5: ssim_grad_clamp: must be a finite number > 0, got 0"),
    (GOOD + "  ssim_warmup_steps: {uniform: [-1, 3]}", "s.yaml:5: ssim_warmup_steps: must be a finite number >= 0, got -1"),
    (HEAD + "  ssim_loss_max_t: {choice: [0.1, 1.5]}", "s.yaml:3: ssim_loss_max_t: must be above 0 and at most 1"),
    (HEAD + "  ssim_loss_max_t: {uniform: [0, 1]}", "s.yaml:3: ssim_loss_max_t: must be above 0"),
    (HEAD + "  ssim_loss_weight: {uniform: [-1, 1]}", "s.yaml:3: ssim_loss_weight: must be a finite number >= 0, got -1"),
    (GOOD + "fixed: {pixel_loss_weight: true}", "s.yaml:5: pixel_loss_weight: must be a number, got true"),
    (GOOD + "fixed:\n  lr: 1\n  pixel_loss_weight: -3", "s.yaml:7: pixel_loss_weight: must be a finite number >= 0, got -3"),
    (GOOD + "fixed: {lr: [1]}", "s.yaml:5: lr: must be a single value, got [1] (a list)"),
    # names
    (HEAD + "  max_T: {choice: [0.1]}", "s.yaml:3: max_T: a parameter's name is lower_snake_case, got 'max_T'; did you mean"),
    (HEAD + "  max_t: {choice: [0.1]}", "s.yaml:3: max_t: unknown setting 'max_t'; did you mean 'ssim_loss_max_t'?"),
    (HEAD + "  ssim_weight: {choice: [0.1]}", "s.yaml:3: ssim_weight: unknown setting 'ssim_weight'; did you mean"),
    (GOOD + "fixd: {lr: 1}", "s.yaml:5: unknown key 'fixd'; did you mean 'fixed'?"),
    ("name: a b\n" + GOOD[8:], "s.yaml:1: name: must be letters"),
    # parts that do not fit together
    ("name: s\n", "s.yaml: parameters: nothing to search"),
    (HEAD, "s.yaml:2: parameters: nothing to search"),
    ("name: s\nparameters: [gain]", "s.yaml:2: parameters: must be a mapping, got ['gain'] (a list)"),
    (GOOD + "  ssim_loss_weight: {choice: [1]}", "s.yaml:5: ssim_loss_weight: cannot be combined with gain"),
    (GOOD + "fixed: {ssim_loss_weight: 1}", "s.yaml:5: ssim_loss_weight: cannot be combined with gain"),
    (GOOD + "  ssim_grad_scale: {choice: [1]}", "s.yaml:5: ssim_grad_scale: must be fixed when gain is searched"),
    (GOOD + "fixed: {ssim_grad_scale: 0}", "s.yaml:5: ssim_grad_scale: must be > 0 when gain is searched, got 0"),
    (GOOD + "fixed: {ssim_loss_max_t: 0.1}", "s.yaml:5: ssim_loss_max_t: is searched and fixed at once"),
    (PINNED + "  gain: 1", "not valid YAML"),
    (PINNED.replace("ssim_grad_scale: 0.1", "gain: 0.1"), "s.yaml:5: gain: fix ssim_loss_weight and ssim_grad_scale instead"),
    # points
    (GOOD + "points: {a: 1}", "s.yaml:5: points: must be a list, got {'a': 1} (a mapping)"),
    (GOOD + "points: [3]", "s.yaml:5: point: must be a mapping, got 3"),
    (GOOD + "points:\n  - {ssim_loss_weight: 1}", "s.yaml:6: point: ssim_loss_max_t, ssim_grad_scale missing"),
    (GOOD + "points:\n  - {gain: 1, ssim_loss_max_t: 0.1}", "s.yaml:6: gain: a point gives ssim_loss_weight and"),
    (
        GOOD + "points:\n  - {ssim_loss_weight: 1, ssim_loss_max_t: 0.1, ssim_grad_scale: 1}\n"
        "  - {ssim_loss_weight: 1, ssim_loss_max_t: 0.1, ssim_grad_scale: 0.01}",
        "s.yaml:7: point: gain 0.01 (= ssim_loss_weight x ssim_grad_scale) is outside the space: log-uniform in [0.1, 30]",
    ),
    (
        GOOD + "points:\n  - ssim_loss_weight: 1\n    ssim_loss_max_t: 0.15\n    ssim_grad_scale: 1",
        "s.yaml:7: ssim_loss_max_t: 0.15 is outside the space: one of 0.1, 0.2",
    ),
    (
        PINNED + "points:\n  - {ssim_loss_weight: 1, ssim_loss_max_t: 0.1, ssim_grad_scale: 1}",
        "s.yaml:7: ssim_grad_scale: 1 is outside the space: fixed at 0.1",
    ),
    (
        PINNED + "points:\n  - {ssim_loss_weight: 1.1, ssim_loss_max_t: 0.1, ssim_grad_scale: 0.1}",
        "s.yaml:7: ssim_loss_weight: 1.1 is outside the space: uniform in [0, 1]",
    ),
    (
        GOOD + "points:\n  - {ssim_loss_weight: 1, ssim_loss_max_t: 0.1, ssim_grad_scale: 1, lr: 1}",
        "s.yaml:6: lr: is neither searched nor fixed in this space",
    ),
    # stages
    ("name: s\nstages: {}", "s.yaml:2: stages: must be a list of stages"),
    ("name: s\nstages:\n  - 3", "s.yaml:3: stages.0: must be a mapping, got 3"),
    ("name: s\nstages:\n  - {parameters: {gain: {choice: [1]}}}", "s.yaml:3: stages.0: name is missing"),
    ("name: s\nparameters: {}\nstages: []", "s.yaml:2: parameters: belongs to a stage"),
    (
        "name: s\nstages:\n  - {name: a, parameters: {gain: {choice: [1]}}}\n  - {name: a, parameters: {gain: {choice: [1]}}}",
        "s.yaml:4: two stages are called 'a'",
    ),
    (
        "name: s\nfixed: {lr: 1}\nstages:\n  - name: a\n    parameters: {gain: {choice: [1]}}\n    fixed: {lr: 2}",
        "s.yaml:6: lr: is fixed for the whole space already",
    ),
    (
        "name: s\nfixed: {max_t: 1}\nstages:\n  - name: a\n    parameters: {gain: {choice: [1]}}",
        "s.yaml:2: max_t: unknown setting 'max_t'",
    ),
    # not YAML, or not plain
    ("", "s.yaml: is empty"),
    ("# only a comment\n", "s.yaml: is empty"),
    ("- a\n- b", "s.yaml:1: must be a mapping (`key: value` lines), got a list"),
    ("hello", "s.yaml:1: must be a mapping (`key: value` lines), got the text 'hello'"),
    ("name: [a", "s.yaml:1: not valid YAML: expected ',' or ']'"),
    ("name: s\n\tparameters: 1", "s.yaml:2: not valid YAML"),
    ("name: s\nname: t", "s.yaml:2: key 'name' appears twice (first in line 1)"),
    ("a: 1\n---\nb: 2", "s.yaml:2: not valid YAML"),
    ("name: !!python/name:os.system x", "s.yaml:1: the tag 'tag:yaml.org,2002:python/name:os.system' is not used here"),
    ("name: s\n<<: {a: 1}", "s.yaml:2: merge keys (<<) are not YAML 1.2"),
    ("1: a", "s.yaml:1: a key must be a name, got '1'"),
    ("[a]: 1", "s.yaml:1: a key must be a name, got a list or mapping"),
    ("name: &a [*a]", "s.yaml:1: nested more than"),
    ("name: .nan", "s.yaml:1: NaN is not a setting"),
    ("name: " + "9" * 5000, "s.yaml:1: a number of 5000 digits"),
    ('name: "\\ud800"', "s.yaml:1: half of a surrogate pair is not a character"),
    ("[" * 100_000, "s.yaml: is nested too deeply"),
    ("a: " * 50 + "b", "s.yaml:1: not valid YAML"),
    (b"\x89PNG\r\n\x1a\n\0\0", "s.yaml: is not a text file"),
    (b"PK\x03\x04\0\0", "s.yaml: is a binary file"),
    ("#" * (MAX_BYTES + 1), "s.yaml: is larger than"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), BAD)
def test_a_mistake_is_one_line_that_says_where(text: str | bytes, says: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text)
    assert any(line.startswith(says) or says in line for line in str(error.value).splitlines()), str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("schedule", ["{adaptve: {target_ratio: 2}}", "{cyclical: {start: 0, end: {uniform: [1, 5]}, steps: 3}}"])
def test_a_mistake_in_a_schedule_is_one_line(schedule: str) -> None:
    with pytest.raises(UserError) as error:
        parse(f"{HEAD}  ssim_loss_weight:\n    {schedule}")
    assert len(str(error.value).splitlines()) == 1


def test_all_mistakes_of_a_file_come_at_once_in_its_order() -> None:
    with pytest.raises(UserError) as error:
        parse(HEAD + "  gain: {uniform: [2, 1]}\n  max_t: {choice: [1]}\nfixed: {pixel_loss_weight: -1}\nnotes: 1\n")
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == [f"s.yaml:{line}" for line in (3, 4, 5, 6)]


def test_aliases_are_written_out_but_not_without_end() -> None:
    assert parse_yaml("a: &x [1]\nb: *x\n", "s.yaml").value == {"a": [1], "b": [1]}
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    with pytest.raises(UserError, match="more than 20000 values"):
        parse_yaml("\n".join(lines), "s.yaml")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wid", "unknown space 'wid'; did you mean 'wide'?"),
        ("zzz", f"unknown space 'zzz'; valid: {', '.join(bundled_spaces())}"),
        ("note_v3:conservativ", "has no stage 'conservativ'; did you mean 'conservative'?"),
        ("note_v3:", "no stage after ':'"),
        (
            "nowhere.yaml",
            f"nowhere.yaml: no such file; bundled spaces: {', '.join(bundled_spaces())}",
        ),
        ("", "a name, a path or a mapping"),
        ("x" * 5000, "unknown space"),
        ("a\0b.yaml", "no such file"),
    ],
)
def test_a_space_that_is_not_there(name: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        load_space(name)
    assert says in str(error.value)


def test_a_file_a_folder_and_a_stage_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text((bundled_spaces_folder() / "note_v2.yaml").read_text(encoding="utf-8"))
    (tmp_path / "folder.yaml").mkdir()
    assert load_space(tmp_path / "mine.yaml") == load_space("note_v2")
    assert load_space("mine.yaml:moderate", relative_to=tmp_path).stages == load_space("note_v2:moderate").stages
    with pytest.raises(UserError, match=r"folder\.yaml: is a folder"):
        load_space("folder.yaml", relative_to=tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")


def test_a_mapping_from_python() -> None:
    space = load_space({"parameters": {"lr": {"log_uniform": (1e-5, 1e-3)}}, "points": [{"lr": 1e-4}]})
    assert space.stages[0].parameters == {"lr": LogUniform(1e-5, 1e-3)}
    assert space.stages[0].fixed == {}  # a space that is not about SSIM needs no triple
    with pytest.raises(UserError, match=r"^space: gain: lower"):
        load_space({"parameters": {"gain": {"uniform": [2, 1]}}})


def test_objects_are_checked_when_built() -> None:
    with pytest.raises(ValueError, match="lower"):
        Uniform(2, 1)
    with pytest.raises(ValueError, match="cannot be combined with gain"):
        Stage(name="a", parameters={"gain": Choice((1,)), "ssim_loss_weight": Choice((1,))})
    stage = Stage(name="a", parameters={"gain": Choice((1,))})
    assert stage.fixed == {"ssim_grad_scale": 1.0}
    with pytest.raises(ValueError, match="two stages are called 'a'"):
        Space(name="s", stages=(stage, stage))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("max_t", "ssim_loss_max_t"), ("ssim_weight", "ssim_loss_weight"), ("ssim_los_weight", "ssim_loss_weight"),
        ("grad_scale", "ssim_grad_scale"), ("ssim_gradient_scale", "ssim_grad_scale"), ("SSIM_LOSS_MAX_T", "ssim_loss_max_t"),
        ("pixel_weight", "pixel_loss_weight"), ("gains", "gain"), ("ssim_loss_weigth", "ssim_loss_weight"),
        ("ssimlossweight", "ssim_loss_weight"), ("ssim-loss-weight", "ssim_loss_weight"), ("pixel_max_t", "pixel_loss_max_t"),
        *[(name, None) for name in KNOWN],
        *[(name, None) for name in ("lr", "kl_loss_weight", "ms_ssim_loss_weight", "lpips_loss_weight", "alpha", "scale",
                                    "weight", "max_grad_norm", "loss_scale", "preset", "steps", "batch_size", "t_law",
                                    "timestep_shift", "precision", "ssim_clamp",
                                        "warmup_steps", "measure_main_norm", "optimizer", "seed")],
    ],
)  # fmt: skip
def test_a_slip_is_told_from_another_name(name: str, known: str | None) -> None:
    assert near_miss(name) == known


# ---- properties ----

NUMBERS = st.floats(1e-6, 1e6, allow_nan=False) | st.integers(1, 10_000)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
SCALARS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**15), 10**15) | st.booleans() | TEXTS
NAMES = st.sampled_from(["lr", "alpha", "beta1", "optimizer", "dropout", "gain", "ssim_loss_weight"])
DOMAINS = st.one_of(
    st.tuples(NUMBERS, NUMBERS).filter(lambda b: float(b[0]) < float(b[1])).map(lambda b: LogUniform(*b)),
    st.tuples(NUMBERS, NUMBERS).filter(lambda b: float(b[0]) < float(b[1])).map(lambda b: Uniform(*b)),
    st.lists(SCALARS, min_size=1, max_size=4).map(tuple),
)


@st.composite
def stages(draw: st.DrawFn, name: str) -> Stage:
    parameters = draw(st.dictionaries(NAMES, DOMAINS, min_size=1, max_size=4))
    parameters = {key: _choice(value) if isinstance(value, tuple) else value for key, value in parameters.items()}
    if "gain" in parameters:
        parameters.pop("ssim_loss_weight", None)
    for known in ("gain", "ssim_loss_weight"):
        if known in parameters and isinstance(parameters[known], Choice):
            parameters[known] = Choice((0.1, 1))
    if "gain" in parameters and draw(st.booleans()):
        parameters["gain"] = replace(parameters["gain"], unit="norm_ratio")
    fixed = draw(st.dictionaries(st.sampled_from(["momentum", "note", "ssim_loss_max_t"]), SCALARS | st.none(), max_size=3))
    if "ssim_loss_max_t" in fixed:
        fixed["ssim_loss_max_t"] = 0.3
    return Stage(name=name, parameters=parameters, fixed=fixed, description=" ".join(draw(TEXTS).split()))


def _choice(values: tuple[object, ...]) -> Choice:
    kept: list[object] = []
    for value in values:
        try:
            Choice((*kept, value))
            kept.append(value)
        except ValueError:
            pass  # the same twice
    return Choice(tuple(kept))


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    names = draw(st.lists(st.sampled_from(STAGES), min_size=1, max_size=3, unique=True))
    return Space(name="s", stages=tuple(draw(stages(name)) for name in names), description=" ".join(draw(TEXTS).split()))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spaces())
def test_a_space_survives_yaml(space: Space) -> None:
    assert load_space(parse_yaml(dump_yaml(space.to_yaml()), "s.yaml")) == space


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_a_space_or_a_user_error(data: bytes) -> None:
    _space_or_user_error(data)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_mutilated_space_is_a_space_or_a_user_error(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([GOOD, PINNED + "points:\n - {ssim_loss_weight: 1}\n", *_bundled_texts()]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 12))
        piece = data.draw(
            st.sampled_from(
                ["", ":", "\n", "- ", "{", "}", "[", "]", "~", "1e999", "-1", "'", "&a ", "*a", "? ", "!", "\t", "true"]
            )
            | st.text(max_size=3)
        )
        text = text[:start] + piece + text[start + length :]
    _space_or_user_error(text.encode("utf-8", "replace"))


def _bundled_texts(cache: list[str] = []) -> list[str]:  # noqa: B006  (read once)
    if not cache:
        cache += [path.read_text(encoding="utf-8") for path in sorted(bundled_spaces_folder().glob("*.yaml"))]
    return cache


def _space_or_user_error(data: bytes) -> None:
    try:
        assert isinstance(parse(data), Space)
    except UserError as error:
        assert all(line.startswith(("s.yaml", "…")) for line in str(error).splitlines())


@given(st.permutations(["ssim_loss_max_t", "lr", "gain", "alpha"]))
def test_the_order_of_keys_means_nothing(names: list[str]) -> None:
    stage = Stage(name="a", parameters={name: Choice((0.1, 0.2)) for name in names})
    assert list(stage.parameters) == ["gain", "ssim_loss_max_t", "alpha", "lr"]
