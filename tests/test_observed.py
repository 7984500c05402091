"""The records of a log and what was observed in the program's processes, as one stream."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command_studies import study, trials

from tune_ssim.guards.verdict import Verdict
from tune_ssim.probes.observer import EventReader
from tune_ssim.trials.command import observed
from tune_ssim.trials.command.observed import Digits, ObservedRecords, Row

NORMS = {update: 1 + update / 7 for update in range(1, 41)}

UPDATE = {"grad_coverage": 1.0, "lr": 0.1}


class Program:
    """Writes events as the observer does."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "host-1.jsonl"
        self.write({"event": "start", "pid": 1, "rank": 0, "world_size": 1}, {"event": "hooked", "name": "torch.optim"})
        self.records = ObservedRecords(EventReader(folder), {"train/loss": "loss"})

    def write(self, *events: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)

    def update(self, *updates: int, **more: float) -> None:
        self.write(
            *({"event": "step", "step": k, "optimizer": 0, "values": {**UPDATE, "total_norm": NORMS[k], **more}} for k in updates)
        )

    def merge(self, *rows: Row, final: bool = False, is_alone: bool = False) -> list[Row]:
        return self.records.merge(list(rows), final=final, is_alone=is_alone)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def row(step: int, **values: float) -> Row:
    return step, {"loss": 0.5, **values}


def test_a_row_gets_what_it_lacks(program: Program) -> None:
    program.update(1, 2)
    assert program.merge(row(1), row(2), row(3)) == []  # too few updates to compare the counters
    program.update(3, 4)
    assert program.merge() == [(k, {"loss": 0.5, "total_norm": NORMS[k], **UPDATE}) for k in (1, 2, 3)]
    assert program.merge(row(4), row(5)) == [(4, {"loss": 0.5, "total_norm": NORMS[4], **UPDATE})]
    program.update(5)
    assert [step for step, _ in program.merge()] == [5] and not program.records.remarks()


def test_observed_steps_between_the_rows_of_a_sparse_log(program: Program) -> None:
    program.update(*range(1, 11))
    found = program.merge(row(5), row(10))
    assert [step for step, _ in found] == list(range(1, 11))
    assert [step for step, values in found if "loss" in values] == [5, 10]
    assert all(values["total_norm"] == NORMS[step] for step, values in found)
    program.update(11, 12)
    assert program.merge() == []  # a row of them may come
    assert [step for step, _ in program.merge(final=True)] == [11, 12]


@pytest.mark.parametrize(("first", "offset"), [(0, -1), (1, 0), (2, 1)])
@pytest.mark.parametrize("prints_norm", [True, False])
def test_a_counter_that_begins_elsewhere(first: int, offset: int, prints_norm: bool, program: Program) -> None:
    program.update(*range(1, 9))
    rows = [row(k + offset, **({"total_norm": round(NORMS[k], 4)} if prints_norm else {})) for k in range(1, 9)]
    found = program.merge(*rows, final=True)
    norms = {step: values.get("total_norm") for step, values in found}
    if prints_norm:
        assert norms == {k + offset: round(NORMS[k], 4) for k in range(1, 9)}
        assert program.records.differing == 0
    elif first < 2:  # nothing can tell 1 from 2
        assert norms == {k + offset: NORMS[k] for k in range(1, 9)}
    said = [f"the program's step {first} is taken to be its update {first - offset}"]
    assert program.records.remarks() == (said if offset and (prints_norm or first < 2) else [])


@pytest.mark.parametrize("final", [True, False])
def test_a_counter_of_micro_batches(final: bool, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed, "MIN_WAIT_S", 0.0)
    monkeypatch.setattr(observed, "WAIT_STEPS", 0)
    program.update(*range(1, 11))
    found = program.merge(*(row(step) for step in range(1, 41)), final=final)
    assert {step: values["total_norm"] for step, values in found if "total_norm" in values} == {
        4 * k: NORMS[k] for k in range(1, 11)
    }
    assert len(found) == 40
    assert program.records.remarks() == ["the program's counter is taken to count 4 steps for each update"]


def test_updates_that_begin_late_are_no_micro_batches(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed, "MIN_WAIT_S", 0.0)
    monkeypatch.setattr(observed, "WAIT_STEPS", 0)
    program.write({"event": "optimizer", "optimizer": 0})
    found = program.merge(*(row(step) for step in range(1, 30)))
    program.update(1, 2, 3)
    found += program.merge(*(row(step) for step in range(30, 33)), final=True)
    assert [step for step, values in found if "loss" in values] == list(range(1, 33)) and not program.records.remarks()


def test_another_norm_than_the_observed_one_is_reported(program: Program) -> None:
    program.update(*range(1, 7), total_norm_clipped=1.0)
    found = program.merge(*(row(step, total_norm=1.0 if step > 2 else round(NORMS[step], 3)) for step in range(1, 7)), final=True)
    assert found[4][1]["total_norm"] == 1.0  # the log's
    assert program.records.remarks() == [
        "its log has another total_norm than was observed before clipping, in 4 rows (the first has 1 at step 3, where 1.42857 was "
        "observed); the log's is judged"
    ]


def test_without_a_log_the_observed_steps_are_the_records(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program.update(1)
    program.write({"event": "logged", "source": "wandb", "step": 0, "at": 1, "values": {"train/loss": 0.25}})
    program.update(2)
    assert program.merge(is_alone=True) == []  # a line of it may be on its way
    monkeypatch.setattr(observed, "ALONE_S", 0.0)
    assert program.merge(is_alone=True) == [
        (1, {"total_norm": NORMS[1], **UPDATE, "loss": 0.25}),
        (2, {"total_norm": NORMS[2], **UPDATE}),
    ]


def test_a_program_that_is_not_observed_waits_for_nothing(tmp_path: Path) -> None:
    records = ObservedRecords(EventReader(tmp_path), {})
    assert records.merge([row(1), row(2)], is_alone=False) == [row(1), row(2)]
    assert records.held() is None and "not observed" in records.observation.sentence()


@pytest.mark.parametrize(
    ("printed", "seen", "agree"),
    [
        (1.23, 1.2349, True),
        (1.23, 1.2351, False),
        (12.0, 12.4, True),
        (12.0, 12.6, False),
        (1e-05, 1.4e-05, True),
        (1e-05, 1.6e-05, False),
        (0.12345679, 0.123456789, True),
        (123456789.0, 123460000.0, False),
        (math.nan, math.inf, True),
        (1.0, math.nan, False),
    ],
)
def test_numbers_agree_to_the_digits_printed(printed: float, seen: float, agree: bool) -> None:
    digits = Digits()
    digits.add(printed)
    assert digits.agree(printed, seen) is agree


def test_the_digits_of_all_printed_numbers_count() -> None:
    fixed, general = Digits(), Digits()
    for printed in (1.2345, 12.3457, 1.0):  # %.4f
        fixed.add(printed)
    for printed in (0.00123, 12.3, 1.0):  # %.3g
        general.add(printed)
    assert not fixed.agree(1.0, 1.0002) and fixed.agree(1.0, 1.00004)
    assert not general.agree(1.0, 1.006) and general.agree(1.0, 1.004) and general.agree(12.3, 12.34)


TORCH = """
import sys, torch
torch.manual_seed(int(sys.argv[2]))
net = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=float(sys.argv[1]))
for step in range(int(sys.argv[3])):
    loss = net(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9)
    optimizer.step()
    if step % 5 == 0:
        print(f"iter {step}: loss {loss.item():.4f}")
print('TUNE_SSIM {"held_out": {"score": 1}}')
"""


def test_a_study_of_a_program_that_prints_no_norm(tmp_path: Path) -> None:
    pattern = r"iter (?P<step>\d+): loss (?P<loss>\S+)"
    given = study(tmp_path, TORCH, task={"records": {"pattern": pattern}}, guards={"smoke_test": None})
    baseline, trial = trials(given, tmp_path / "results")
    assert (baseline.verdict, trial.verdict) == (Verdict.SAFE, Verdict.SAFE), trial.reason
    assert 0 < trial.metrics["norm_ratio_max"] < 3 and baseline.steps == 29
    assert baseline.horizon["max_grad_norm"] is None  # it clips at 1e9, only to get the norm
    assert not set(trial.metrics) & {"update_ratio", "grad_coverage"}
    assert baseline.warnings == ["the program's step 0 is taken to be its update 1"]
    assert not list((tmp_path / "results").rglob("observed"))


def test_the_clipping_is_observed(tmp_path: Path) -> None:
    """So a high norm calls for a smoke test instead of ending the trial, whatever the study says."""
    records, known = {"pattern": r"iter (?P<step>\d+): loss (?P<loss>\S+)"}, {"max_grad_norm": 5}
    given = study(tmp_path, TORCH.replace("1e9", "0.5"), task={"records": records, "known": known}, guards={"smoke_test": None})
    baseline, trial = trials(given, tmp_path / "results")
    assert baseline.horizon["max_grad_norm"] == trial.horizon["max_grad_norm"] == 0.5
    remark = "gradients are clipped at 0.5, as observed, but the study says max_grad_norm: 5; the observed value is used"
    assert remark in baseline.warnings
