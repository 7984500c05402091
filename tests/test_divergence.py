"""The guard against a loss that diverges."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from tune_ssim.guards import Baseline, BaselineRun, Divergence, Watch
from tune_ssim.records import Record
from tune_ssim.records.record_table import Table


def fired_at(losses: Sequence[float], baseline: Sequence[float], *, has_other_terms: bool = False, every: int = 1) -> int | None:
    """The step at which the guard prunes; None if it does not."""
    watch = Watch([bound(baseline, has_other_terms, every)])
    found = watch.fold(Record(every * at, {"loss": loss}) for at, loss in enumerate(losses, 1))
    return found[-1].step if found else None


def bound(baseline: Sequence[float], has_other_terms: bool = False, every: int = 1) -> Divergence:
    series = {"loss": {every * at: loss for at, loss in enumerate(baseline, 1)}}
    return Divergence().bind(Baseline((BaselineRun(0, series, {}),)), 0, has_other_terms)


FALLS = [4 / at for at in range(1, 41)]
FLAT = [0.5] * 40


@pytest.mark.parametrize(
    ("losses", "baseline", "other", "step"),
    [
        (FALLS, FALLS, False, None),
        ([4.0 * 3**at for at in range(40)], FALLS, False, 11),  # from the first full window on, twice
        ([39.0] * 40, FALLS, False, None),  # below ten times the first
        ([41.0] * 40, FALLS, False, 11),
        ([4.0] * 30 + [90.0] * 10, FALLS, False, 36),  # half of a window, twice
        ([4.0] * 30 + [1e9] + [4.0] * 9, FALLS, False, None),  # an outlier
        ([6.0] * 40, [0.05] * 20 + [1.0] * 20, False, 11),  # the baseline's loss rises only later
        ([0.05] * 20 + [6.0] * 20, [0.05] * 20 + [1.0] * 20, False, None),
        ([300.0] * 40, FALLS, True, None),  # a weighted term that the baseline does not have
        ([300.0 * 2**at for at in range(40)], FALLS, True, 11),
        ([-3.0 + 0.01 * at for at in range(40)], [-3.0] * 40, False, None),
        ([-3.0] * 20 + [40.0] * 20, [-3.0] * 40, False, 27),
        ([1.0] * 40, [], False, None),  # nothing to compare with
        ([1.0, 9.0] * 3, [1.0] * 6, False, None),
        ([1.0] + [1e6] * 5, [1.0] * 6, False, 4),  # six records: windows of three
    ],
)
def test_when_it_prunes(losses: list[float], baseline: list[float], other: bool, step: int | None) -> None:
    assert fired_at(losses, baseline, has_other_terms=other) == step
    assert fired_at(losses, baseline, has_other_terms=other, every=50) == (None if step is None else 50 * step)


@pytest.mark.parametrize(
    ("losses", "baseline", "ratio"),
    [
        (FLAT, FLAT, 1.0),
        ([1.5] * 40, [4.0, *FLAT], 3.0),
        ([4.0, *([1e-9] * 39)], [4.0, *([1e-13] * 39)], 1.0),  # near zero a loss has no scale
        ([4.0, *([0.03] * 39)], [4.0, *([0.0] * 39)], 1.0),
        ([4.0, *([1.0] * 39)], [4.0, *([0.0] * 39)], math.inf),
        (FLAT, [1.0] * 40, 0.5),
    ],
)
def test_the_ratio_at_the_end(losses: list[float], baseline: list[float], ratio: float) -> None:
    guard = bound(baseline)
    watch = Watch([guard])
    watch.fold(Record(at, {"loss": loss}) for at, loss in enumerate(losses, 1))
    assert guard.end_ratio(watch.state_of("divergence")) == pytest.approx(ratio)
    assert bound(baseline, True).end_ratio(watch.state_of("divergence")) is None


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        (FALLS, None),
        ([*FALLS, *[0.1 * 2**at for at in range(20)]], 53),  # ten times the median of the first ten, which is 0.75
        ([1.0] * 20 + [9.9] * 20, None),
        ([1.0] * 20 + [10.5] * 20, 27),
        ([1.0] * 20 + [1e9] + [1.0] * 19, None),  # an outlier
        ([1e9] + [1.0] * 20 + [11.0] * 20, 28),  # at the start too
        ([-1.0] * 20 + [50.0] * 20, None),  # no ratio
        ([1.0] * 9 + [50.0] * 11, 15),
    ],
)
def test_without_a_baseline_the_start_is_the_reference(losses: list[float], step: int | None) -> None:
    stream = [Record(at, {"loss": loss}) for at, loss in enumerate(losses, 1)]
    found = Watch([Divergence()]).fold(stream)
    assert (found[0].step if found else None) == step
    for cut in (1, 25, len(stream)):
        watch = Watch([Divergence()], strict=False)
        parts = [watch.update_table(Table.of(part)) for part in (stream[:cut], stream[cut:]) if part]
        first = [violation.step for part in parts for row in part for violation in row][:1]
        assert first == ([] if step is None else [step])
    if found:
        assert f"x that of its first 10 records (limit 10; median of 10 records up to step {step})" in found[0].sentence
