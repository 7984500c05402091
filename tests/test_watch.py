"""All guards: a verdict depends on the records alone, not on how they came or where a run was interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_ssim.guards import (
    Baseline,
    BaselineRun,
    Guard,
    MissingMetric,
    NonFinite,
    NormRatio,
    Rule,
    SmokeTest,
    Threshold,
    Violation,
    Watch,
)
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.watch import GRACE_RECORDS
from tune_ssim.records import ACTIVE_FRACTION, LOSS, SMOKE, STEP_SKIPPED, TOTAL_NORM, Record, merge
from tune_ssim.records.record_table import Table

NAN, INF = math.nan, math.inf
BASELINE = Baseline((BaselineRun(0, {TOTAL_NORM: dict.fromkeys(range(61), 1.0)}, {}),))


def all_guards(on_excess: Any = "warn") -> tuple[Guard, ...]:
    """Mostly those that go on after they have spoken, so that a property sees more than the first word."""
    return (
        NormRatio(limit=3, window=4, on_excess=on_excess).bind(BASELINE, 0, clipped=False),
        SmokeTest(consecutive=2),
        NonFinite(max_skipped=3),
        Threshold(LOSS, upper=5.0, patience=2, action="warn"),
    )


def spoken(violations: Iterable[Violation]) -> list[str]:
    """Text in which NaN equals NaN."""
    return [repr(violation) for violation in violations]


def say(watch: Watch, records: Iterable[Record]) -> list[str]:
    """Everything that is said, also after what would end the run."""
    return [text for record in records for text in spoken(watch.update(record))]


NUMBER = st.floats(0, 10) | st.sampled_from([0.5, 50.0, NAN, INF])
STEP = st.fixed_dictionaries(
    {LOSS: NUMBER},
    optional={
        TOTAL_NORM: NUMBER,
        ACTIVE_FRACTION: st.sampled_from([0.0, 1.0, 1.0]),
        STEP_SKIPPED: st.sampled_from([0.0, 0.0, 1.0]),
    },
)
SMOKE_STATISTICS = st.sampled_from(
    [
        {SMOKE + "entropy_bits": 4.0, SMOKE + "high_frequency": 0.8},
        {SMOKE + "entropy_bits": 0.0, SMOKE + "high_frequency": 0.0},
        {SMOKE + "entropy_bits": NAN, SMOKE + "high_frequency": 9.0},
    ]
)


@st.composite
def parts(draw: st.DrawFn) -> list[Record]:
    """A stream in the order of its steps: a step's own record, and for some a record of its smoke test."""
    made = [Record(0, {TOTAL_NORM: 1.0, SMOKE + "entropy_bits": 4.0, SMOKE + "high_frequency": 0.8})]
    step = 0
    for values in draw(st.lists(STEP, max_size=30)):
        step += draw(st.sampled_from([1, 1, 1, 3]))
        made.append(Record(step, values))
        if draw(st.booleans()):
            made.append(Record(step, draw(SMOKE_STATISTICS)))
    return made


@settings(deadline=None, max_examples=60)
@given(parts(), st.data())
def test_a_restored_watch_goes_on_as_if_nothing_had_happened(records: list[Record], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(records)))
    whole, first = Watch(all_guards()), Watch(all_guards())
    expected = say(whole, records)
    found = say(first, records[:cut])
    text = json.dumps(first.state_dict())
    say(first, records[cut:])  # what is saved does not change afterwards
    second = Watch(all_guards())
    second.load_state_dict(json.loads(text))
    assert json.dumps(second.state_dict()) == text
    found += say(second, records[cut:])
    assert found == expected
    assert json.dumps(second.state_dict()) == json.dumps(whole.state_dict())


@settings(deadline=None, max_examples=40)
@given(parts(), st.lists(st.integers(0, 60), max_size=6))
def test_batches_change_nothing(records: list[Record], cuts: list[int]) -> None:
    whole, split = Watch(all_guards("prune")), Watch(all_guards("prune"))
    found: list[str] = []
    for start, end in pairwise([0, *sorted(cuts), len(records)]):
        said = split.fold(records[start:end])
        found += spoken(said)
        if any(violation.action in ("prune", "abort") for violation in said):
            break
    assert found == spoken(whole.fold(records))


def verdict(records: Sequence[Record], guards: Sequence[Guard] | None = None) -> str | None:
    """Which guard ends the run, where and with what: what `Trial` makes a verdict of."""
    violations = Watch(guards or all_guards("prune")).fold(records)
    return next((repr(violation) for violation in violations if violation.action in ("prune", "abort")), None)


@settings(deadline=None, max_examples=60)
@given(parts())
def test_merged_records_give_the_same_verdict_as_those_of_step_and_smoke_test(records: list[Record]) -> None:
    assert verdict(merge(records), ORDERED) == verdict(records, ORDERED)


# A run that two guards would end in the same step is ended by the first: here the one that reads the step's own record.
ORDERED = tuple(sorted(all_guards("prune"), key=lambda guard: guard.name == SmokeTest.name))


@settings(deadline=None, max_examples=40)
@given(parts())
def test_doubled_records_change_nothing(records: list[Record]) -> None:
    """As in a log where standard output and standard error were merged."""
    doubled = [record for record in merge(records) for _ in range(2)]
    assert verdict(doubled) == verdict(merge(records))
    late = [*merge(records), *merge(records)]  # a log that was written twice, one after the other
    first = verdict(merge(records))
    if first is not None:
        assert verdict(late) == first


@settings(deadline=None, max_examples=40)
@given(parts(), st.randoms(use_true_random=False))
def test_the_order_of_keys_means_nothing(records: list[Record], random: Any) -> None:
    def shuffled(record: Record) -> Record:
        items = list(record.values.items())
        random.shuffle(items)
        return Record(record.step, dict(items))

    records = merge(records)
    assert say(Watch(all_guards()), map(shuffled, records)) == say(Watch(all_guards()), records)


# ---- a metric that never appears


def steps(count: int, **values: float) -> list[Record]:
    return [Record(step, dict(values)) for step in range(1, count + 1)]


def test_a_missing_metric_is_an_error_after_the_first_records() -> None:
    watch = Watch([NormRatio().bind(BASELINE, 0, clipped=False)])
    assert watch.fold(steps(GRACE_RECORDS, loss=1.0, lr=0.1)) == []
    with pytest.raises(MissingMetric) as caught:
        watch.update(Record(GRACE_RECORDS + 1, {LOSS: 1.0}))
    said = "guard 'norm_ratio': metric 'total_norm' absent from the first 20 records; saw loss, lr"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("guard", "records", "said"),
    [
        (Threshold("val"), steps(3, loss=1.0), "'threshold:val': metric 'val' absent from all 3 records; saw loss"),
        (SmokeTest(), steps(3, smoke=1.0), "metric 'smoke/' absent from all 3 records; saw smoke"),
        (NonFinite(), [], "metric 'loss*' absent from all 0 records; saw no metric at all"),
        (NonFinite(), steps(2), "metric 'loss*' absent from all 2 records; saw no metric at all"),
    ],
)  # fmt: skip
def test_a_missing_metric_is_an_error_at_the_end(guard: Guard, records: list[Record], said: str) -> None:
    watch = Watch([guard])
    watch.fold(records)
    with pytest.raises(MissingMetric) as caught:
        watch.finish()
    assert said in str(caught.value)


def test_a_restored_watch_goes_on_counting_records() -> None:
    watch = Watch([NormRatio().bind(BASELINE, 0, clipped=False)])
    for record in steps(GRACE_RECORDS, loss=1.0):
        watch.update(record)
        state = json.loads(json.dumps(watch.state_dict()))
        watch = Watch(watch.guards)
        watch.load_state_dict(state)
    with pytest.raises(MissingMetric, match="saw loss"):
        watch.update(Record(GRACE_RECORDS + 1, {}))


@pytest.mark.parametrize("repeated", [1, 2, 5])
def test_records_of_one_step_count_once(repeated: int) -> None:
    """A metric that comes late but in time is not missed because the log has every line twice."""
    early = steps(GRACE_RECORDS - 1, loss=1.0)
    records = [record for record in early for _ in range(repeated)] + [Record(GRACE_RECORDS, {"val": 1.0})]
    watch = Watch([Threshold("val")])
    watch.fold([*records, *[Record(n, {}) for n in range(100, 200)]])
    assert watch.finish() == []


def test_a_metric_is_found_among_hundreds() -> None:
    """Per-module statistics come before `total_norm` in the alphabet."""
    many = {f"dbg/grad_{n:03}": 1.0 for n in range(300)}
    watch = Watch(all_guards())
    watch.update(Record(0, {SMOKE + "entropy_bits": 4.0}))
    watch.update(Record(1, many))
    for n in range(2, 40):
        watch.update(Record(n, {**many, LOSS: 1.0, TOTAL_NORM: 1.0, ACTIVE_FRACTION: 1.0}))
    watch.update(Record(40, {SMOKE + "entropy_bits": 4.0}))
    assert watch.finish() == []


def test_the_state_does_not_grow_with_the_names() -> None:
    watch = Watch(all_guards())
    start = {SMOKE + "entropy_bits": 4.0, LOSS: 1.0, TOTAL_NORM: 1.0}
    watch.update(Record(0, start))
    for n in range(1, 3000):
        watch.update(Record(n, {LOSS: 1.0, f"of_step/{n}": 1.0}))
    assert len(json.dumps(watch.state_dict())) < 5000


def test_a_guard_that_cannot_judge_says_why() -> None:
    watch = Watch(all_guards())
    watch.fold([Record(0, {SMOKE + "entropy_bits": 4.0}), *steps(3, loss=1.0, total_norm=1.0)])
    assert watch.finish() == [
        "guard 'norm_ratio' saw 3 active steps and needs 5: train longer, raise ssim_loss_max_t or the batch size",
        "guard 'smoke_test' saw no samples after step 0",
    ]


# ---- the watch itself


def test_the_gravest_is_said_first() -> None:
    """A model that is ruined at step 0 is a bad set-up, whatever else is wrong there (SEEDS B4)."""
    guards = [Threshold(LOSS, upper=1, action="warn"), NonFinite(), SmokeTest()]
    found = Watch(guards).update(Record(0, {LOSS: NAN, SMOKE + "entropy_bits": 0.0}))
    assert [violation.action for violation in found] == ["abort", "prune", "warn"]


def test_fold_looks_at_nothing_after_the_end() -> None:
    watch = Watch([NonFinite(), Threshold(LOSS, upper=5, action="warn")])
    found = watch.fold([Record(1, {LOSS: 9.0}), Record(2, {LOSS: NAN}), Record(3, {LOSS: INF})])
    assert [(violation.guard, violation.step) for violation in found] == [("threshold:loss", 1), ("non_finite", 2)]


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="different names, got"):
        Watch([Threshold(LOSS, upper=1), Threshold(LOSS, upper=2)])


def test_a_state_of_other_guards_is_refused() -> None:
    saved = Watch([NonFinite()]).state_dict()
    with pytest.raises(ValueError, match=r"saved guards \['non_finite'\] are not this trial's \['smoke_test'\]"):
        Watch([SmokeTest()]).load_state_dict(saved)


def test_a_state_of_another_version_is_refused() -> None:
    guards = [Threshold(LOSS, upper=5), Rule("r", (Threshold(LOSS, upper=5),))]
    for name in ("threshold:loss", "r"):
        saved = Watch(guards).state_dict()
        state = saved["states"][name]
        del (state if name != "r" else state["parts"][0])["records"]
        with pytest.raises(ValueError, match=f"guard '{name}': its saved state is another version's"):
            Watch(guards).load_state_dict(saved)


def test_a_threshold_says_when_there_were_too_few_records() -> None:
    few = [Record(step, {LOSS: 1.0}) for step in range(40)]
    for guard, said in (
        (Threshold(LOSS, upper=5, patience=41), "41 records in a row are needed; the log has 40"),
        (Threshold(LOSS, upper=5, steps=41), "41 steps in a row are needed; the log has 40"),
        (Threshold(LOSS, upper=5, after=40), "loss has no record after step 40"),
    ):
        watch = Watch([guard])
        watch.fold(few)
        assert watch.finish() == [said]
    watch = Watch([Threshold(LOSS, upper=5, patience=40, steps=40)])
    watch.fold(few)
    assert watch.finish() == []


def test_no_guards_no_opinion() -> None:
    watch = Watch([])
    assert watch.fold(steps(50, loss=NAN)) == []
    assert watch.finish() == []


class Own:
    """A guard of a user, which inherits from nothing."""

    name, metrics = "own", ("loss",)

    def init(self) -> dict[str, Any]:
        return {"seen": 0}

    def update(self, state: dict[str, Any], record: Record) -> tuple[dict[str, Any], Violation | None]:
        found = Violation("own", record.step, "loss", record.values["loss"], 1.0, Action.WARN, "too large")
        return {"seen": state["seen"] + 1}, found if found.value > 1 else None

    def unjudged(self, state: dict[str, Any]) -> str | None:
        return None if state["seen"] else "nothing seen"


def test_a_guard_need_not_inherit() -> None:
    watch = Watch([Own()])
    found = [
        violation.step for step, loss in ((1, 0.5), (2, 9.0), (3, 0.5)) for violation in watch.update(Record(step, {"loss": loss}))
    ]
    assert found == [2] and watch.finish() == [] and watch.state_of("own") == {"seen": 3}
    table = Watch([Own()], strict=False)
    rows = Table([1, 2, 3], rows=[{"loss": 0.5}, {"loss": 9.0}, {"loss": 0.5}])
    assert [[violation.step for violation in of_row] for of_row in table.update_table(rows)] == [[2]]
