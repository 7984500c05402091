# ruff: noqa: E501  (tables: one case a line)
"""Rule packs: each limit of the notes fires on a stream that breaks it and on no healthy one; what is wrong in a pack is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from logs_of_branches import HEALTHY, Values, after, changed, falling, flat, records

from tune_ssim.base.errors import UserError
from tune_ssim.guards import EpochMean, FirstValue, Guard, MovingMean, Rule, Threshold, Trend, Violation, Watch
from tune_ssim.guards.rule_pack import RulePack, bundled_packs, load_rules
from tune_ssim.records import Record
from tune_ssim.study.study import load_study

ROOT = Path(__file__).resolve().parents[1]
PACKS = bundled_packs()


def everything(pack: RulePack, stream: list[Record]) -> list[Violation]:
    """Also after what would end the run."""
    watch = Watch(pack.rules, strict=False)
    return [violation for record in stream for violation in watch.update(record)]


def test_the_four_packs_are_there() -> None:
    assert PACKS == ["flow_dino_kl", "ssim", "two_stage_vlm", "vae_kl"]
    assert set(HEALTHY) == set(PACKS)


@pytest.mark.parametrize("name", PACKS)
def test_every_rule_says_what_why_and_what_to_do(name: str) -> None:
    pack = load_rules(name)
    assert pack.description
    assert pack.known_by
    assert len({rule.name for rule in pack.rules}) == len(pack.rules)
    for rule in pack.rules:
        assert rule.name.startswith(name + "/")
        assert rule.sentence
        assert rule.cause
        assert rule.remedy
        assert rule.source.startswith(("SEEDS ", "FACTS ", "Burda et al. 2016", "Hoffman and Johnson 2016", "measured on ")), (
            rule.name
        )
        assert "{" not in rule.sentence + rule.cause + rule.remedy + "".join(rule.about)


@pytest.mark.parametrize("name", PACKS)
def test_healthy_trainings_give_no_alert(name: str) -> None:
    assert everything(load_rules(name), records(2500, **HEALTHY[name])) == []


def const(value: float) -> Values:
    return lambda step: value


FLAT_AFTER_500 = falling(0.6, 0.3, 100, 0.03)
FALLS_THEN_FLAT = after(300, flat(0.6, 0.01), falling(0.9, 0.4, 300, 0.01))
# (pack, what is otherwise, the rule, the earliest and the latest step, the action)
BROKEN: list[tuple[str, dict[str, Values], str, int, int, str]] = [
    # C4: off by more than 10 % for 100 steps
    ("flow_dino_kl", {"dbg__flow_has_grad": after(50, const(35), const(40))}, "coverage:flow", 149, 149, "warn"),
    ("flow_dino_kl", {"dbg__mu_head_has_grad": const(0)}, "coverage:mu_head", 99, 99, "warn"),
    ("flow_dino_kl", {"dbg__flow_has_grad": const(45)}, "coverage:flow", 99, 99, "warn"),
    # C4: gradient below 1e-2 while loss_flow does not fall for 100 steps
    ("flow_dino_kl", {"loss_flow": flat(0.9), "dbg__grad_flow": const(0.009)}, "flow_stuck", 99, 240, "warn"),
    ("flow_dino_kl", {"loss_flow": flat(0.9), "dbg__grad_flow": lambda s: math.exp(s / 50)}, "flow_unstable", 99, 240, "warn"),
    # C4: dino_global not falling for 200 steps
    ("flow_dino_kl", {"dino_global": flat(0.8)}, "dino_stuck", 200, 240, "warn"),
    ("flow_dino_kl", {"dino_global": FALLS_THEN_FLAT}, "dino_stuck", 480, 560, "warn"),
    # C4: |mean| > 0.1, var < 0.3 or > 1.5 for 200 steps
    ("flow_dino_kl", {"z_init__mean": const(0.11)}, "z_mean", 199, 199, "warn"),
    ("flow_dino_kl", {"z_init__mean": const(-0.11)}, "z_mean", 199, 199, "warn"),
    ("flow_dino_kl", {"z_init__var": const(0.29)}, "z_var_low", 199, 199, "warn"),
    ("flow_dino_kl", {"z_init__var": const(1.51)}, "z_var_high", 199, 199, "warn"),
    # C4: kl_raw rising for 200 steps
    ("flow_dino_kl", {"kl_raw": after(400, lambda s: 10 * math.exp((s - 400) / 1000), flat(10))}, "kl_rising", 450, 640, "warn"),
    ("flow_dino_kl", {"dbg__loss_grad__dino": const(11), "dbg__loss_grad__flow": const(1)}, "dino_pushes", 99, 99, "warn"),
    ("flow_dino_kl", {"kl_raw": const(0.05)}, "kl_vanished", 199, 199, "warn"),
    ("flow_dino_kl", {"loss_kl": const(0.009), "loss": const(1.0), "kl_raw": const(900)}, "kl_idle", 199, 199, "warn"),
    ("flow_dino_kl", {"dbg__update_ratio__flow": const(0)}, "no_update:flow", 99, 99, "warn"),
    ("flow_dino_kl", {"dbg__update_ratio__flow": const(9e-7)}, "small_updates:flow", 200, 200, "warn"),
    # D1: epoch mean below 0.001
    ("two_stage_vlm", {"loss_proxy": lambda s: 0.5 * math.exp(-s / 40)}, "proxy_ruined", 300, 400, "abort"),
    ("two_stage_vlm", {"loss_proxy": const(5e-5)}, "proxy_vanishing", 99, 99, "warn"),
    # D2
    ("two_stage_vlm", {"loss_caption": const(0.09)}, "caption_masking", 0, 0, "abort"),
    ("two_stage_vlm", {"label_fraction": const(1.0)}, "labels_unmasked", 0, 0, "abort"),
    ("two_stage_vlm", {"loss_caption": flat(1.8)}, "caption_stuck", 200, 260, "warn"),
    ("two_stage_vlm", {"loss_caption": falling(11.5, 1.0, 100, 0.01)}, "caption_unloaded", 0, 0, "warn"),
    ("two_stage_vlm", {"loss_caption": after(500, const(0.09), const(2.0))}, "caption_too_low", 599, 599, "warn"),
    ("two_stage_vlm", {"loss_caption": const(2.6)}, "caption_slow_5", 499, 500, "warn"),
    ("two_stage_vlm", {"loss_caption": const(1.6)}, "caption_slow_20", 1999, 2000, "warn"),
    ("two_stage_vlm", {"visual_scale": const(101)}, "tokens_blown_up", 99, 99, "warn"),
    # C4
    ("two_stage_vlm", {"dbg__bridge_has_grad": const(2)}, "coverage:bridge", 99, 99, "warn"),
    ("two_stage_vlm", {"dbg__vision_has_grad": const(0), "dbg__vision_trainable": const(0)}, "coverage:vision", 99, 99, "warn"),
    # D3
    ("two_stage_vlm", {"dbg__llm_trainable": const(7)}, "llm_not_frozen", 0, 0, "abort"),
    # E5
    ("vae_kl", {"kl_raw": after(1300, lambda s: 10 * math.exp((s - 1300) / 1500), flat(10)), "loss_reconstruction": FLAT_AFTER_500},
     "kl_rising", 1350, 1600, "warn"),
    ("vae_kl", {"z_init__marginal_kl": const(0.26)}, "prior_missed", 1200, 1200, "warn"),
    ("vae_kl", {"kl_raw": lambda s: 5 - s / 100}, "kl_negative", 510, 510, "warn"),
    ("flow_dino_kl", {"kl_raw": lambda s: 5 - s / 100}, "kl_negative", 510, 510, "warn"),
    ("vae_kl", {"kl_raw": falling(10, 0.001, 100, 0)}, "kl_vanished", 650, 680, "warn"),
    ("vae_kl", {"loss_reconstruction": flat(0.6)}, "recon_flat", 200, 240, "warn"),
    ("vae_kl", {"kl_raw": const(60), "loss": const(0.5)}, "kl_hidden", 1200, 1200, "warn"),
    ("vae_kl", {"active_units": const(0)}, "units_dead", 200, 200, "warn"),
    # a loss that dips below the limit now and then
    ("vae_kl", {"kl_raw": lambda s: 40.0 if s % 7 == 0 else 70.0, "loss": const(0.5)}, "kl_hidden", 1200, 1200, "warn"),
    # A7
    ("ssim", {"loss_ssim": after(30, const(2.01), const(0.4))}, "ssim_range", 30, 30, "prune"),
    ("ssim", {"loss_ssim": after(30, const(math.nan), const(0.4))}, "ssim_range", 30, 30, "prune"),
    ("ssim", {"ssim_active_fraction": const(0)}, "ssim_absent", 499, 499, "warn"),
]  # fmt: skip


@pytest.mark.parametrize(("pack", "change", "rule", "earliest", "latest", "action"), BROKEN, ids=lambda value: str(value)[:20])
def test_each_limit_of_the_notes_fires(
    pack: str, change: dict[str, Values], rule: str, earliest: int, latest: int, action: str
) -> None:
    found = [
        v for v in everything(load_rules(pack), records(2200, **changed(HEALTHY[pack], **change))) if v.guard == f"{pack}/{rule}"
    ]
    assert found
    assert earliest <= found[0].step <= latest
    assert found[0].action == action
    assert found[0].sentence
    assert found[0].cause
    assert found[0].remedy


def test_every_rule_is_broken_by_one_of_them() -> None:
    said = {f"{pack}/{rule}".split(":")[0] for pack, _, rule, _, _, _ in BROKEN}
    rules = {rule.name.split(":")[0] for name in PACKS for rule in load_rules(name).rules}
    assert rules - said == {
        "vae_kl/coverage", "vae_kl/no_update", "vae_kl/small_updates", "two_stage_vlm/no_update", "two_stage_vlm/small_updates"
    }  # fmt: skip  # as in flow_dino_kl


def test_a_kl_may_rise_for_a_better_reconstruction() -> None:
    rises = {"kl_raw": lambda step: 8 + step / 100, "loss_reconstruction": falling(0.6, 0.5, 800, 0.03)}
    assert everything(load_rules("vae_kl"), records(2000, **changed(HEALTHY["vae_kl"], **rises))) == []
    stalls = {**rises, "loss_reconstruction": falling(0.6, 0.5, 100, 0.03)}
    found = everything(load_rules("vae_kl"), records(2000, **changed(HEALTHY["vae_kl"], **stalls)))
    assert {v.guard for v in found} == {"vae_kl/kl_rising"}


def test_the_kl_of_a_fresh_encoder_may_rise() -> None:
    """It starts near 0; what a user knows of the warm-up is an option."""
    grows = {"kl_raw": lambda step: 20 * (1 - math.exp(-step / 150)), "loss": const(0.15)}
    stream = records(800, **changed(HEALTHY["vae_kl"], **grows))
    assert everything(load_rules("vae_kl"), stream) == []
    assert {v.guard for v in everything(load_rules("vae_kl", {"kl_after": 100}), stream)} == {"vae_kl/kl_hidden"}


def test_a_value_that_is_no_number_is_not_taken_for_a_size() -> None:
    stream = records(400, **changed(HEALTHY["flow_dino_kl"], loss_flow=flat(0.9), dbg__grad_flow=const(math.nan)))
    found = {v.guard: v for v in everything(load_rules("flow_dino_kl"), stream)}
    for name in ("flow_stuck", "flow_unstable"):
        violation = found[f"flow_dino_kl/{name}"]
        assert "dbg/grad_flow is" in violation.sentence and "learning rate" not in violation.remedy


def test_gradient_accumulation_is_an_option() -> None:
    stream = records(300, **changed(HEALTHY["flow_dino_kl"], dbg__flow_has_grad=const(160)))
    assert [v.guard for v in everything(load_rules("flow_dino_kl"), stream)] == ["flow_dino_kl/coverage:flow"]
    four = {v.guard for v in everything(load_rules("flow_dino_kl", {"ga": 4}), stream)}
    assert four == {f"flow_dino_kl/coverage:{tag}" for tag in ("dino_t_head", "mu_head", "logvar_head")}


# ---- the guards that rules are made of


def steps_of(guard: Guard, stream: list[Record]) -> list[int]:
    state, found = guard.init(), []
    for record in stream:
        before = json.dumps(state)
        new, violation = guard.update(state, record)
        assert json.dumps(state) == before, "update must leave its argument as it was"
        state = json.loads(json.dumps(new))
        found += [] if violation is None else [violation.step]
    return found


def stream(*values: float, metric: str = "m", every: int = 1, **more: Any) -> list[Record]:
    return [Record(i * every, {metric: value, **{k: v[i] for k, v in more.items()}}) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("guard", "made", "steps"),
    [
        (Threshold("m", upper=1, steps=3), stream(2, 2, 2, 2, 0, 2, 2, 2), [2, 7]),
        (Threshold("m", upper=1, steps=100), stream(2, 2, 2, 2, every=50), [100]),  # three records span 101 steps
        (Threshold("m", upper=1, after=2), stream(2, 2, 2), [2]),
        (Threshold("m", 0.9, 1.1, over="n"), stream(4, 4, 4, n=[4, 2, 0]), [1]),
        (Threshold("m", 0.9, 1.1, over="n"), stream(0, n=[0]), [0]),  # nothing to train is not trained: 0
        (Threshold("m", 0.9, 1.1, over="n"), stream(4, 4), []),
        (FirstValue("m", lower=0.1), stream(0.05, 0.05), [0]),
        (FirstValue("m", lower=0.1), stream(0.5, 0.05), []),
        (FirstValue("m", lower=0.1), stream(math.nan), [0]),
        (FirstValue("m", lower=0.1), [Record(0, {}), *stream(0.05, every=1)], [0]),
        (EpochMean("m", lower=1), stream(2, 2, 0, 1, 0, 1, epoch=[0, 0, 1, 1, 2, 2]), [3]),  # stays ruined: said once
        (EpochMean("m", lower=1), stream(0, 1, 2, 2, 0, 1, epoch=[0, 0, 1, 1, 2, 2]), [2, 5]),
        (EpochMean("m", lower=1), stream(2, 0, 0, 2, epoch=[1, 2, 3, 4]), [1]),  # one record an epoch
        (EpochMean("m", lower=1), stream(2, 2, 0, 0, 0, epoch=[0.1, 0.9, 1.1, 1.5, 2.1]), [3]),
        (EpochMean("m", lower=1, steps_per_epoch=2), stream(2, 2, 0, 0, 2, 2), [3]),
        (EpochMean("m", lower=1, epoch=2), stream(0, 0, 0, 0, 0, 0, epoch=[0, 0, 1, 1, 2, 2]), [3]),
        (EpochMean("m", lower=1), stream(2, math.nan, 2, 2, epoch=[0, 0, 1, 1]), [2]),
        (EpochMean("m", lower=1), stream(0, 0, 0, epoch=[0, 0, 0]), []),  # not over
        (MovingMean("m", upper=1, steps=20), stream(*[0, 3] * 15), [20]),
        (MovingMean("m", upper=1, steps=20), stream(*[0, 1.9] * 15), []),
        (MovingMean("m", upper=1, steps=20), stream(*[3] * 21, *[0] * 30, *[3] * 15), [20, 58]),
        (MovingMean("m", upper=1, steps=20, after=5), stream(*[3] * 30), [25]),
        (MovingMean("m", upper=1, steps=20, from_start=True), stream(*[3] * 40, *[0] * 30, *[3] * 30), [20]),
        (MovingMean("m", upper=1, steps=20, from_start=True), stream(*[0] * 22, *[3] * 40), []),  # it was within bounds
        (MovingMean("m", upper=1, steps=20, from_start=True), stream(*[3] * 60)[21:], []),  # a log that begins later
        (MovingMean("m", upper=1, steps=20), stream(*[3] * 22, every=50), [1000]),  # twenty records
        (MovingMean("m", upper=1, steps=100), stream(*[3] * 102), [100]),
        (MovingMean("m", upper=1, steps=20, over="n"), stream(*[3] * 30, n=[2, 4] * 15), [20]),
        (MovingMean("m", upper=1, steps=20), stream(*[0] * 10, math.nan, *[0] * 20), [20]),
        (Rule("r", (Threshold("m", upper=1), Threshold("n", upper=1))), stream(2, 2, 0, 2, n=[0, 2, 2, 2]), [1, 3]),
        (Rule("r", (Threshold("m", upper=1),), action="abort"), stream(2, 0, 2), [0, 2]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_conditions(guard: Guard, made: list[Record], steps: list[int]) -> None:
    assert steps_of(guard, made) == steps
    assert steps_of(guard, [record for record in made for _ in range(2)]) == steps


def test_a_rule_joins_what_its_conditions_saw() -> None:
    rule = Rule("r", (Threshold("m", upper=1), Threshold("n", lower=0)), "prune", "both", "a cause", "a remedy", "SEEDS X")
    _, violation = rule.update(rule.init(), Record(3, {"m": 2.0, "n": -1.0}))
    said = "both: m is 2, above 1 and n is -1, below 0"
    assert violation == Violation("r", 3, "m", 2.0, 1, "prune", said, "a remedy", "a cause")
    assert rule.metrics == ("m", "n")


def test_an_optional_rule_misses_nothing() -> None:
    rule = Rule("r", (Threshold("absent", upper=1),), optional=True)
    watch = Watch([rule])
    watch.fold(stream(*[1.0] * 50))
    assert watch.finish() == []
    assert rule.about == ("absent",)


def test_a_warning_that_could_not_be_given_stops_no_verdict() -> None:
    short = stream(*[1.0] * 50)
    for action, count in (("warn", 0), ("prune", 1)):
        watch = Watch([Rule("r", (Trend("m", "rising"),), action=action)])  # type: ignore[arg-type]
        watch.fold(short)
        assert len(watch.finish()) == count
    assert "a trend over 200 steps needs 20 records" in watch.finish()[0]


# ---- packs as files

GOOD = """name: mine
rules:
  low: {when: {metric: loss, below: 0}, action: prune, sentence: too low}
"""


def test_a_pack_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    pack = load_rules("mine.yaml", relative_to=tmp_path)
    assert pack == load_rules(tmp_path / "mine.yaml")
    assert [rule.name for rule in pack.rules] == ["mine/low"]
    assert load_rules(pack.document) == pack


@pytest.mark.parametrize("name", PACKS)
def test_a_pack_is_read_back_from_what_it_was(name: str) -> None:
    pack = load_rules(name)
    assert load_rules(json.loads(json.dumps(pack.document))) == pack


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "p.yaml: is empty"),
        ("- 1", "p.yaml:1: must be a mapping"),
        ("name: x", "p.yaml: rules is missing"),
        ("rulez: {}", "p.yaml:1: unknown key 'rulez'; did you mean 'rules'?"),
        ("rules: {a: {}}", "p.yaml:1: rules.a: when is missing"),
        ("rules: {a: 3}", "p.yaml:1: rules.a: must be a mapping, got 3"),
        ("rules:\n  a: {wen: {}}", "p.yaml:2: rules.a: unknown key 'wen'; did you mean 'when'?"),
        ("rules:\n  a: {when: {metric: m, abov: 1}}", "p.yaml:2: rules.a.when: unknown key 'abov'; did you mean 'above'?"),
        ("rules:\n  a: {when: {above: 1}}", "p.yaml:2: rules.a.when: metric is missing"),
        ("rules: {a: {when: {metric: m}}}", "must have exactly one of above, below, outside, off (or a trend); got none"),
        ("rules: {a: {when: {metric: m, above: 1, below: 0}}}", "got above, below"),
        ("rules: {a: {when: {metric: m, above: x}}}", "p.yaml:1: rules.a.when.above: must be a number, got 'x' (text)"),
        ("rules: {a: {when: {metric: m, above: $x}}}", "$x is not an option of the pack; the pack has no options"),
        ("options: {gaa: 1}\nrules: {a: {when: {metric: m, above: $ga}}}", "p.yaml:2: rules.a.when.above: $ga is not an option"),
        ("options: {ga: many}\nrules: {}", "p.yaml:1: options.ga: must be a number or null, got 'many' (text)"),
        ("rules: {a: {when: {metric: m, outside: 3}}}", "rules.a.when.outside: must be [lower, upper], got 3"),
        ("rules: {a: {when: {metric: m, outside: [2, 1]}}}", "lower must be below upper (1), got 2"),
        ("rules: {a: {when: {metric: m, off: 1}}}", "off and by go together"),
        ("rules: {a: {when: {metric: m, above: 1, steps: 1.5}}}", "rules.a.when.steps: must be an integer, got 1.5"),
        ("rules: {a: {when: {metric: m, above: 1, steps: 0}}}", "steps must be >= 1, got 0"),
        ("rules: {a: {when: {metric: m, trend: up}}}", "rules.a.when.trend: must be one of 'rising', 'not falling', got 'up' (text)"),
        ("rules: {a: {when: {metric: m, trend: rising, above: 1}}}", "rules.a.when.above: does not go with a trend"),
        ("rules: {a: {when: {metric: m, of: last, above: 1}}}", "rules.a.when.of: must be one of 'first', 'mean', 'epoch mean', got 'last'"),
        ("rules: {a: {when: {metric: m, of: [1], above: 1}}}", "rules.a.when.of: must be one of 'first', 'mean', 'epoch mean', got [1]"),
        ("rules: {a: {when: {metric: m, above: 1}, action: kill}}", "rules.a.action: must be one of 'warn', 'probe', 'prune', 'abort'"),
        ("rules: {a: {when: {metric: m, above: 1}, action: [1]}}", "rules.a.action: must be one of"),
        ("rules: {a: {when: {metric: m, above: 1}, optional: maybe}}", "rules.a.optional: must be true or false"),
        ("rules: {a: {when: {metric: m, above: 1}, cause: 3}}", "rules.a.cause: must be text, got 3"),
        ("rules: {a: {for_each: {tag: [a, b]}, when: {above: 1}}}", "p.yaml:1: rules.a.when: metric is missing"),
        ("rules: {a: {for_each: {tag: [a, b]}, when: {metric: m, above: 1}, action: stop}}", "rules.a.action: must be one of"),
        ("rules: {a: {when: {metric: m, above: many}}}", "rules.a.when.above: must be a number, got 'many' (text)"),
        ("rules: {a: {when: {metric: m, of: mean, above: 1, from_start: 1}}}", "a.when.from_start: must be true or false, got 1"),
        ("rules: {a: {for_each: 3, when: {metric: m, above: 1}}}", "rules.a.for_each: must be a mapping"),
        ("rules: {a: {when: {metric: m, off: 1, by: -0.1}}}", "rules.a.when.by: must be a share above 0"),
        ("branches: {a: {los: x}}\nrules: {a: {when: {metric: m, above: 1}}}", "branches.a: unknown key 'los'; did you mean"),
        ("branches: {a: {loss: x, has_grad: y}}\nrules: {a: {when: {metric: m, above: 1}}}", "has_grad and trainable go together"),
        ("branches: [1]\nrules: {a: {when: {metric: m, above: 1}}}", "branches: must be a mapping, got [1] (a list)"),
        ("known_by: 3\nrules: {a: {when: {metric: m, above: 1}}}", "known_by: must be a metric or a list of metrics, got 3"),
        ("name: a/b\nrules: {a: {when: {metric: m, above: 1}}}", "p.yaml:1: name: must be a plain name, got 'a/b'"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_pack_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_rules("p.yaml", relative_to=tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("pack", "options", "said"),
    [
        ("vae", {}, "unknown rule pack 'vae'; did you mean 'vae_kl'? (a path ends in .yaml)"),
        ("no.yaml", {}, "no such file"),
        ("", {}, "a rule pack is a name, a path or a mapping"),
        (3, {}, "a rule pack is a name, a path or a mapping, got 3"),
        ("vae_kl", {"gaa": 1}, "rule pack vae_kl: no option 'gaa'; did you mean 'ga'?"),
        ("vae_kl", {"ga": "x"}, "rule pack vae_kl: option ga: must be a number"),
        ("ssim", {"ga": 1}, "rule pack ssim: no option 'ga'; it has none"),
    ],
)
def test_what_is_no_pack_is_named(pack: Any, options: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_rules(pack, options)
    assert said in str(caught.value)


# ---- in a study


def test_a_study_takes_packs_by_name_path_and_written_out(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    inline = "{name: own, rules: {high: {when: {metric: loss, above: 9}, action: warn}}}"
    (tmp_path / "s.yaml").write_text(f"rules:\n  - mine.yaml\n  - {{pack: vae_kl, options: {{ga: 2}}}}\n  - {inline}\n")
    study = load_study(tmp_path / "s.yaml")
    names = [guard.name for guard in study.guard_list]
    assert {"mine/low", "vae_kl/kl_rising", "own/high", "norm_ratio"} <= set(names)
    assert study.rules[1].options["ga"] == 2
    (tmp_path / "resolved").mkdir()
    (tmp_path / "resolved" / "again.yaml").write_text(study.to_yaml())
    again = load_study(tmp_path / "resolved" / "again.yaml")  # elsewhere: it needs no other file
    assert again.rules == study.rules
    assert again.sha256 == study.sha256
    assert load_study({}).rules == ()
    assert load_study({"rules": []}).sha256 == load_study({}).sha256 != study.sha256


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("[ssm]", "s.yaml:1: unknown rule pack 'ssm'; did you mean 'ssim'?"),
        ("[3]", "s.yaml:1: rules.0: must be a name, a path or a mapping, got 3"),
        ("3", "s.yaml:1: rules: must be a list of rule packs, got 3"),
        ("[ssim, ssim]", "s.yaml:1: rules: there are two rule packs named 'ssim'"),
        ("[{pack: vae_kl, options: {gaa: 1}}]", "s.yaml:1: rule pack vae_kl: no option 'gaa'; did you mean 'ga'?"),
        ("[{pack: vae_kl, optoins: {}}]", "s.yaml:1: rules.0: unknown key 'optoins'; did you mean 'options'?"),
        ("[{name: m, rules: {a: {when: {metric: loss}}}}]", "s.yaml:1: rules.0.rules.a.when: must have exactly one"),
    ],
)
def test_what_is_wrong_in_a_studys_rules_is_said(tmp_path: Path, rules: str, said: str) -> None:
    (tmp_path / "s.yaml").write_text(f"rules: {rules}\n")
    with pytest.raises(UserError) as caught:
        load_study(tmp_path / "s.yaml")
    assert said in str(caught.value)


@pytest.mark.parametrize(("action", "verdict"), [("warn", "safe"), ("prune", "pruned"), ("abort", "bad_setup")])
def test_a_rule_acts_in_a_live_trial(action: str, verdict: str, tmp_path: Path) -> None:
    from small_task import SmallTask

    from tune_ssim.trials.final_verdict import TrialPlan
    from tune_ssim.trials.trial import Trial

    rule = {"when": {"metric": "total_norm", "above": 0, "records": 3}, "action": action, "cause": "a cause", "remedy": "a remedy"}
    study = load_study({"rules": [{"name": "own", "rules": {"moves": rule, "not_there": {**rule, "optional": True}}}]})
    trial = Trial(SmallTask(), TrialPlan(steps=6, guards=study.rules[0].rules))
    trial.start({"steps": 6})
    trial.advance(2)
    trial.save(tmp_path)  # a restored trial goes on counting
    again = Trial(SmallTask(), trial.plan)
    again.start({"steps": 6})
    again.load(tmp_path)
    again.advance()
    assert again.verdict is not None
    assert again.verdict.verdict == verdict
    said = again.warnings[0] if action == "warn" else again.verdict.violation
    assert said is not None
    assert (said.guard, said.step, said.cause, said.remedy) == ("own/moves", 3, "a cause", "a remedy")
