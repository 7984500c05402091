"""Columns instead of records: the same records, and the same said about them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logs_of_branches import HEALTHY, changed, falling, flat, records
from naive_guards import violations_of

from tune_ssim.guards import EpochMean, FirstValue, Guard, MovingMean, NonFinite, Rule, Threshold, Trend, Violation, Watch
from tune_ssim.guards.rule_pack import bundled_packs, load_rules
from tune_ssim.records import Record
from tune_ssim.records.record_table import Table

RECORDS = [Record(1, {"a": 1.0, "b": 0.0}), Record(3, {"a": math.inf}), Record(4, {"b": 2.0}), Record(9, {"a": 0.0, "b": 0.0})]
GUARDS = (
    NonFinite(prefixes=("loss", "a")),
    Threshold("a", upper=1.0, action="warn"),
    Threshold("a", lower=0.1, upper=0.9, patience=3, steps=5, after=4, over="b", action="prune"),
    FirstValue("b", upper=0.5),
    EpochMean("a", upper=0.6, steps_per_epoch=7),
    MovingMean("a", upper=0.6, steps=20),
    MovingMean("a", lower=0.5, upper=3, steps=30, over="b", after=5),
    MovingMean("loss", upper=0.6, steps=25, from_start=True),
    Trend("a", "not falling", steps=20),
    Trend("loss", "rising", steps=40, after=10),
    Rule("both", (Threshold("a", upper=0.5), Threshold("b", lower=0.2, patience=2)), "abort"),
    Rule("trend_and", (Trend("loss", "not falling", steps=20), Threshold("b", upper=0.8)), "warn"),
)


def test_a_table_is_its_records() -> None:
    table = Table.of(RECORDS)
    assert list(table) == RECORDS
    assert [table[k] for k in range(4)] == RECORDS
    assert list(table[1:3]) == RECORDS[1:3]
    assert table.metrics == ("a", "b")
    assert table.grows
    assert Table.of(table) is table
    columns = Table([1, 2], columns={"a": (0.5, 1.5), "b": [2.0, 3.0]})
    assert list(columns) == [Record(1, {"a": 0.5, "b": 2.0}), Record(2, {"a": 1.5, "b": 3.0})]
    assert list(columns[1:]) == [Record(2, {"a": 1.5, "b": 3.0})]
    assert type(columns[0].values["a"]) is float
    assert not Table([1, 1], rows=[{}, {}]).grows
    assert len(Table([], rows=[])) == 0
    with pytest.raises(ValueError, match="equally long"):
        Table([1], columns={"a": [1.0, 2.0]})
    with pytest.raises(ValueError, match="either rows or columns"):
        Table([1])


def test_a_column_knows_where_its_values_stand() -> None:
    table = Table.of(RECORDS)
    a = table.column("a")
    assert a is not None
    assert (list(a.rows), list(a.steps), list(a.values)) == ([0, 1, 3], [1, 3, 9], [1.0, math.inf, 0.0])
    assert table.column("c") is None
    quotient = table.quotient("a", "b")
    assert quotient is not None
    assert (list(quotient.rows), list(quotient.steps)) == ([0, 3], [1, 9])
    assert quotient.values[0] == math.inf
    assert quotient.values[1] == 0
    assert table.quotient("a", "c") is None


def violations_of_watch(
    guards: Sequence[Guard], stream: Sequence[Record], cuts: Sequence[int]
) -> tuple[list[list[Violation]], dict[str, dict[str, object]]]:
    watch = Watch(guards, strict=False)
    found: list[list[Violation]] = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += watch.update_table(Table.of(stream[begin:end]))
    return found, {guard.name: watch.state_of(guard.name) for guard in guards}


VALUES = st.one_of(st.floats(-1, 2, width=16), st.sampled_from([0.0, -0.0, 1e160, -1e308, math.nan, math.inf, -math.inf]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    gaps=st.lists(st.sampled_from([1, 1, 1, 1, 2, 5, 0, -2]), min_size=1, max_size=150),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_log_is_judged_alike_however_it_is_cut(gaps: list[int], data: st.DataObject, seed: int) -> None:
    generator = np.random.default_rng(seed)
    odd = data.draw(st.lists(VALUES, min_size=1, max_size=8))
    stream, step = [], 0
    wild, sparse = generator.random(2) * 0.5
    for gap in gaps:
        step = max(0, step + gap)
        names = [name for name in ("loss", "a", "b", "step_skipped") if generator.random() > (0.97 if "_" in name else sparse)]
        stream.append(
            Record(step, {name: generator.choice(odd) if generator.random() < wild else generator.random() for name in names})
        )
    stream = [Record(record.step, {name: float(value) for name, value in record.values.items()}) for record in stream]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    expected = violations_of(GUARDS, stream)
    assert text_of(violations_of_watch(GUARDS, stream, cuts)) == text_of(expected)
    live = Watch(GUARDS, strict=False)
    assert text_of([found for found in map(live.update, stream) if found]) == text_of(expected[0])


def text_of(found: object) -> str:
    """NaN equals NaN in it. A sum of zeros may have either sign, which means nothing."""
    return re.sub(r"-0\.0(?!\d)", "0.0", repr(found))


@pytest.mark.parametrize("pack", bundled_packs())
def test_the_bundled_rules_say_the_same_at_the_same_steps(pack: str) -> None:
    rules = load_rules(pack).rules
    loss = next((name for name in rules[0].about), "loss")
    base = HEALTHY.get(pack, {loss: falling(1, 0.4, 100)})
    ruined = changed(
        base, **{name: (lambda step: math.nan) if k % 5 == 4 else flat(0.002 * 10**k, 0.3, k) for k, name in enumerate(base)}
    )
    for metrics in (base, ruined):
        stream = records(1500, **metrics)
        expected = violations_of(rules, stream)
        assert repr(violations_of_watch(rules, stream, [1, 20, 21, 700])) == repr(expected)
    assert expected[0]  # else nothing was compared
