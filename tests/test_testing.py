"""The conformance suite finds each fault by itself, names the remedy, and passes tasks that keep the contract."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_tasks import FAULTS, BlackBox, Honest
from small_task import SmallTask

from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.testing import TaskReport, check_task
from tune_ssim.trials.training import Sample

ROOT = Path(__file__).resolve().parents[1]


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


def test_mended_faults_leave_no_excuse() -> None:
    """Each status is reached, so that no check of the suite is dead."""
    assert {fault.status for fault in FAULTS.values()} == {"broken", "warn", "unknown"}
    assert len({fault.found for fault in FAULTS.values()}) >= 30


def test_a_report_is_for_people_and_for_tests() -> None:
    report = report_of("CallsItGradNorm")
    assert str(report).startswith("CallsItGradNorm: ")
    assert "\n  ✗ step/total_norm: " in str(report) and "\n      → rename 'grad_norm' to 'total_norm': " in str(report)
    with pytest.raises(AssertionError, match="CallsItGradNorm does not implement") as raised:
        report.raise_if_broken()
    assert "✗ step/total_norm" in str(raised.value) and "✓" not in str(raised.value)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is False


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Honest(), "check_task(Honest)"),
        (3, "a task is a class"),
        ("no_such_module:MyTask", "no module 'no_such_module'"),
        ("broken_tasks:NoSuchTask", "has no class or function 'NoSuchTask'"),
        ("broken_tasks:smooth", "is a function"),
    ],
)
def test_what_is_no_task_is_said_in_words(given: object, words: str) -> None:
    report = check_task(given)  # type: ignore[arg-type]
    assert not report.ok and words in str(report)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps=1"):
        check_task(Honest, steps=1)


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(2).tolist(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    check_task(FAULTS["GlobalNoise"].task)
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected


class Junk:
    def __float__(self) -> float:
        raise RuntimeError("no number")

    __repr__ = __str__ = __float__  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("step", {"loss": Junk()}),
        ("sample", Sample(torch.rand(1, 3, 12, 12), references="x")),  # type: ignore[arg-type]
        ("evaluate", {"ssim": math.nan, "psnr": Junk()}),
        ("state_dict", [1]),
        ("effective", {"lr": Junk()}),
        ("trainable_parameters", 3),
        ("parts", {"network": None}),
    ],
)
def test_whatever_a_method_returns_the_suite_answers_in_words(method: str, value: object) -> None:
    report = check_task(type("Odd", (Honest,), {method: lambda self, *arguments: value}))
    assert any(finding.name.startswith(method) for finding in report.of("broken")), str(report)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of examples/own_task: where a user's own folder would be."""
    folder = tmp_path / "own_task"
    shutil.copytree(ROOT / "examples" / "own_task", folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("task", "plain_loop"):
        sys.modules.pop(name, None)


def test_the_example_keeps_the_contract(example: Path) -> None:
    report = check_task("task:MyTask", {"batch_size": 4})
    assert report.ok and not report.of("warn"), str(report)


def test_the_plain_loop_of_the_example_runs(example: Path) -> None:
    ran = subprocess.run([sys.executable, "plain_loop.py", "50"], cwd=example, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and "step 50: loss" in ran.stdout and "held out: PSNR" in ran.stdout, ran.stdout + ran.stderr


def test_the_example_runs_as_a_study(example: Path) -> None:
    """The study of the example, shorter, by the real command: baselines first, then settings up to a ruinous one."""
    study = example / "study.yaml"
    text = study.read_text()
    off = "confirm: null\ncalibration: null\ntracking: null"
    short = text.replace("steps: 200", "steps: 25").replace("confirm: {seeds: 3, steps: 400}", off)
    assert short.count("25") == 1 and "confirm: null" in short
    study.write_text(short)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tune_ssim"]
    ran = subprocess.run(
        [*command, "run", "study.yaml", "--trials", "3", "--in-process"],
        cwd=example,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    listed = subprocess.run(
        [*command, "trials", "--json"], cwd=example, env=environment, capture_output=True, text=True, timeout=60
    )
    trials = json.loads(listed.stdout)
    assert [trial["role"] for trial in trials].count("baseline") == 2 and len(trials) == 5, ran.stdout
    assert all(trial["steps"] == 25 and trial["verdict"] in ("safe", "degraded") for trial in trials), ran.stdout


@pytest.mark.e2e  # two minutes
def test_the_example_prints_what_its_readme_shows(example: Path) -> None:
    """The words; numbers differ between machines."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400"}
    command = [sys.executable, "-m", "tune_ssim", "run", "study.yaml"]
    ran = subprocess.run(command, cwd=example, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    shown = (example / "README.md").read_text().partition("```text\n")[2].partition("```")[0]
    printed = without_numbers(ran.stdout)
    assert len(shown.splitlines()) > 10
    for line in shown.splitlines():
        assert without_numbers(line) in printed, line


def without_numbers(text: str) -> str:
    return re.sub(r"[-+]?[\d.]+(e[-+]?\d+)?", "N", text)


class Unlisted(Honest):
    """Shows its weights in its state alone."""

    trainable_parameters = property()  # type: ignore[assignment]  # hasattr() is False
    rate: float | None = None

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        super().setup(config, seed, device)
        if self.rate is not None:
            self.optimizer.param_groups[0]["lr"] = self.rate


class IgnoresTheRate(Unlisted):
    rate = 0.01


class ShowsNothing(IgnoresTheRate):
    def sample(self, noise: int = 0) -> Any:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}


@pytest.mark.parametrize(("task", "status"), [(Unlisted, "ok"), (IgnoresTheRate, "broken"), (ShowsNothing, "unknown")])
def test_whether_the_update_is_off_is_seen_in_the_state(task: type, status: str) -> None:
    found = [finding for finding in check_task(task).findings if finding.name == "still"]
    assert [finding.status for finding in found] == [status], found
    if status == "broken":
        assert "4 of 4 tensors of state_dict()" in str(found[0])


class ClipsAtOne(BlackBox):
    """Accepts a limit that it does not use, clips at another, measures afterwards, and leaves no gradient behind."""

    def clip(self) -> torch.Tensor:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 0.01)
        return torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters()])

    def step(self) -> dict[str, Any]:
        metrics = BlackBox.step(self)
        self.optimizer.zero_grad(set_to_none=True)
        return metrics


class ClearsGradients(BlackBox):
    def step(self) -> dict[str, Any]:
        metrics = BlackBox.step(self)
        self.optimizer.zero_grad(set_to_none=True)
        return metrics


@pytest.mark.parametrize(("task", "status"), [(ClipsAtOne, "unknown"), (ClearsGradients, "ok")])
def test_a_limit_without_effect_proves_nothing_about_total_norm(task: type, status: str) -> None:
    report = check_task(task)
    first = next(check for check in report.checks if check.name == "step/total_norm/clipping")
    assert first.status == status, first
