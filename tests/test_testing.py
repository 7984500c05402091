"""The conformance suite finds each fault by itself, names the remedy, and passes tasks that keep the contract."""

from __future__ import annotations

from functools import lru_cache

import pytest
from broken_tasks import FAULTS, Honest
from small_task import SmallTask

from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.testing import TaskReport, check_task


@lru_cache
def report_of(name: str) -> TaskReport:
    return check_task(FAULTS[name].task)


def test_an_honest_task_passes() -> None:
    report = check_task(Honest)
    assert report.ok, str(report)
    assert not report.of("warn") and not report.of("unknown"), str(report)
    report.raise_if_broken()


def test_the_small_task_passes() -> None:
    report = check_task(SmallTask)
    assert report.ok, str(report)


def test_the_bundled_task_passes() -> None:
    report = check_task("tune_ssim.tasks.fundus_sr:FundusSR", {"batch_size": 2, "crop": 32})
    assert {finding.status for finding in report.findings} == {"ok"}, str(report)
    assert FundusSR.__name__ in str(report)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_with_its_remedy(name: str) -> None:
    fault = FAULTS[name]
    report = report_of(name)
    found = [finding for finding in report.of(fault.status) if finding.name == fault.found]
    assert found, str(report)
    assert found[0].remedy
    text = str(found[0])
    assert all(words in text for words in fault.words), text
    assert report.ok == (fault.status != "broken")


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_not_taken_for_many(name: str) -> None:
    """At most one more finding follows from it: whoever mends the first sees the rest go."""
    broken = report_of(name).of("broken")
    assert len(broken) <= 2, "\n".join(map(str, broken))
