"""Records: what may be in one, and how the records of one step become one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_ssim.records import Record, merge

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
VALUES = st.dictionaries(st.sampled_from(["loss", "total_norm", "lr", "smoke/entropy_bits"]), NUMBERS)
RECORDS = st.lists(st.builds(Record, st.integers(0, 5), VALUES), max_size=12)


def exact(records: list[Record]) -> str:
    """Text in which NaN equals NaN and the order of keys means nothing."""
    return json.dumps([record.to_json() for record in records], sort_keys=True)


@pytest.mark.parametrize("step", [-1, 1.0, True, None, "3", math.nan])
def test_a_step_is_a_whole_number_from_zero(step: Any) -> None:
    with pytest.raises(ValueError, match="integer >= 0, got"):
        Record(step)


@settings(max_examples=40)
@given(RECORDS)
def test_json_round_trip_keeps_nan_and_infinity(records: list[Record]) -> None:
    texts = [json.dumps(record.to_json()) for record in records]
    assert exact([Record.from_json(json.loads(text)) for text in texts]) == exact(records)


def test_the_json_form_shares_nothing_with_the_record() -> None:
    record = Record(1, {"loss": 1.0})
    record.to_json()[1]["loss"] = 2.0
    assert record.values["loss"] == 1.0


@pytest.mark.parametrize(
    ("records", "merged"),
    [
        ([], []),
        ([Record(0)], [Record(0)]),
        ([Record(2, {"a": 1.0}), Record(1, {"a": 2.0})], [Record(1, {"a": 2.0}), Record(2, {"a": 1.0})]),
        ([Record(1, {"a": 1.0}), Record(1, {"b": 2.0})], [Record(1, {"a": 1.0, "b": 2.0})]),
        ([Record(1, {"a": 1.0}), Record(1, {"a": 2.0, "b": 3.0})], [Record(1, {"a": 1.0, "b": 3.0})]),  # the first value wins
    ],
)
def test_merge(records: list[Record], merged: list[Record]) -> None:
    assert merge(records) == merged


@settings(max_examples=40)
@given(RECORDS)
def test_merging_is_done_once(records: list[Record]) -> None:
    once = merge(records)
    assert [record.step for record in once] == sorted({record.step for record in records})
    assert exact(merge(once)) == exact(once)
    assert exact(merge([*records, *records])) == exact(once)


@settings(max_examples=40)
@given(RECORDS, st.integers(0, 12))
def test_merging_in_parts_changes_nothing(records: list[Record], cut: int) -> None:
    assert exact(merge([*merge(records[:cut]), *merge(records[cut:])])) == exact(merge(records))


@settings(max_examples=40)
@given(st.lists(st.builds(Record, st.just(1), VALUES), min_size=1, max_size=4))
def test_merging_leaves_the_records_as_they_were(records: list[Record]) -> None:
    before = exact(records)
    merge(records)
    assert exact(records) == before
