"""What is published is what was measured: pages against the results of the benchmarks."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

health = import_module("health")
adaptive = import_module("adaptive")
against_trainscope = import_module("against_trainscope")
early_warning = import_module("early_warning")


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_health_table_is_that_of_the_last_run() -> None:
    found = results("health")
    page = (ROOT / "docs" / "tasks.md").read_text().splitlines()
    assert [line for line in health.markdown(found["by_case"]) if line not in page] == []
    assert set(found["by_case"]) == set(health.CASES), "a case was added, renamed or left out since"
    ruined, healthy = found["ruined"], found["healthy"]
    said = f"{ruined['by name']} of {ruined['caught'] + ruined['missed']} ruined runs caught, each by a rule that names the fault"
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "measurements.md").read_text()
    assert (
        f"{ruined['by name']} of {ruined['caught'] + ruined['missed']}, no false alarm in {healthy['quiet']} sound ones" in readme
    )
    assert said in page and ruined["by name"] == ruined["caught"]
    assert healthy["false alarms"] == 0 and f"no false alarm in {healthy['quiet']} sound ones" in page


def test_the_rules_that_are_credited_are_there() -> None:
    from tune_ssim.guards.rule_pack import load_rules

    for name, case in health.CASES.items():
        rules = {rule.name.rpartition("/")[2] for rule in load_rules(case.system, health.OPTIONS[case.system]).rules}
        known = rules | {rule.partition(":")[0] for rule in rules} | {"non_finite", "refused"}
        assert set(case.known_by) <= known, name


def test_the_table_of_the_adaptive_weight_is_that_of_the_last_run() -> None:
    rows = results("adaptive")["rows"]
    page = (ROOT / "docs" / "spaces.md").read_text().splitlines()
    lines = adaptive.markdown(rows)
    assert lines and [line for line in lines if line not in page] == []
    assert not any(one["ruined"] for one in rows) and "No run was ruined" in "\n".join(page)
    collapsed = [(one["regime"], one["crop"], one["setting"], one["collapsed"], one["runs"]) for one in rows if one["collapsed"]]
    assert collapsed == [("sgd", 64, "adaptive 4", 2, 2)] and "on crops of 64 the smoke test failed in both runs" in "\n".join(page)


def test_the_counts_of_producers_are_those_of_the_last_run() -> None:
    logs = results("check_producers")["logs"]
    sound = [log["sound"]["verdict"] for log in logs]
    broken = [log["nan"]["verdict"] for log in logs]
    page = (ROOT / "docs" / "measurements.md").read_text()
    assert f"{sound.count('healthy')} of {len(logs)} sound logs healthy" in page
    assert f"{broken.count('alerts')} of {len(logs)} with a NaN are an alert" in page and "healthy" not in broken
    assert [(log["producer"], log["log"]) for log in logs if log["nan"]["verdict"] == "unknown"] == [("ray", "TensorBoard")]


def test_the_table_against_trainscope_is_that_of_the_last_run() -> None:
    found = results("against_trainscope")
    page = (ROOT / "docs" / "measurements.md").read_text().splitlines()
    assert [line for line in against_trainscope.markdown(found["tools"]) if line not in page] == []
    assert [against_trainscope.summary(found["runs"], tool) for tool in against_trainscope.TOOLS] == found["tools"]


def test_the_table_of_the_early_warning_is_that_of_the_last_run() -> None:
    found = results("early_warning")
    judged = found["runs"]["judged"]
    assert early_warning.summary(judged) == found["judged"]
    shared = early_warning.shared_with_trainscope(judged)
    assert len(shared) == len(results("against_trainscope")["runs"])
    page = (ROOT / "docs" / "measurements.md").read_text()
    lines = early_warning.markdown(found["design"], found["judged"], early_warning.summary(shared))
    assert [line for line in lines if line not in page.splitlines()] == []
    assert {row["run"].rpartition("-")[0] for row in judged if row["warned"] and not row["fault"]} == {"two_stage_vlm-healthy"}
    late = [row for row in judged if row["ruined"] is not None and row["warned"][0] >= row["ruined"]]
    assert all("rate" in row["run"] or "ascent" in row["run"] for row in late)
    assert f"{len(late)} runs were ruined first, all of them by a learning rate" in page
    harmless = [row for row in judged if row["fault"] and row["ruined"] is None]
    assert f"Of {len(harmless)} faults" in page and f"it names {sum(bool(row['warned']) for row in harmless)};" in page


def test_without_trainscope_its_benchmark_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # nothing is installed
    with pytest.raises(SystemExit, match="trainscope is not installed in this environment: pip install trainscope"):
        against_trainscope.require_trainscope()
