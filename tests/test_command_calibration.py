"""Preflight and calibration of a command, from its starts: a real program, sound and broken in one way each."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tune_ssim.base.errors import UserError
from tune_ssim.before_launch.command.inspect import inspect_command
from tune_ssim.before_launch.command.kept_starts import starts_file
from tune_ssim.before_launch.command.starts import Start, significant_digits
from tune_ssim.before_launch.command.take_start import take_here
from tune_ssim.before_launch.preflight.report import Check, Report
from tune_ssim.probes.norm_model import NormModel
from tune_ssim.study.study import Study, load_study
from tune_ssim.trials.load_training import load_task

PROGRAM = Path(__file__).parent / "programs" / "pushes.py"
FLAGS = ("ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale", "pixel_loss_weight", "lr")


def study(tmp_path: Path, *extra: str, space: Any = None, program: Path = PROGRAM, **changes: Any) -> Study:
    command = ["{python}", str(program), "--steps={steps}", "--seed={seed}", *(f"--{name}={{{name}}}" for name in FLAGS), *extra]
    file = tmp_path / "study.yaml"
    content = {
        "name": "pushes",
        "task": {
            "command": command,
            "records": {"pattern": r"step (?P<step>\d+): loss (?P<loss>\S+) total_norm (?P<total_norm>\S+)"},
        },
        "task_config": {"steps": 60, "lr": 0.01},
        "baseline": {"pixel_loss_weight": 0.05, "ssim_loss_max_t": 1.0, "ssim_grad_scale": 1.0},
        "space": space
        or {
            "parameters": {"gain": {"log_uniform": [0.1, 100]}, "ssim_loss_max_t": {"choice": [0.3, 1.0]}},
            "fixed": {"ssim_grad_scale": 1.0, "pixel_loss_weight": 0.0},
        },
        "calibration": {"batches": 12, "disable_update": {"lr": 0}},
        "guards": {"smoke_test": None},
        "objective": {"maximize": "loss"},
        **changes,
    }
    from tune_ssim.base.yaml_source import dump_yaml

    file.write_text(dump_yaml(content))
    return load_study(str(file))


def inspect(study: Study, folder: Path, **phases: bool) -> tuple[dict[str, Any], int]:
    make = load_task(study.task_path, study.import_path)
    taken = partial(take_here, make, study.name, folder)
    count = 0

    def take(jobs: Any) -> Any:
        nonlocal count
        count += len(jobs)
        return taken(jobs)

    return inspect_command(
        study, make, take, preflight=phases.get("preflight", True), calibration=phases.get("calibration", True)
    ), count


def report_of(found: dict[str, Any]) -> Report:
    return Report(tuple(Check(**check) for check in found["preflight"]["checks"]))


def norms(*flags: str) -> list[float]:
    output = subprocess.run(
        [sys.executable, str(PROGRAM), "--lr=0", "--steps=12", *flags], capture_output=True, text=True, check=True
    )
    return [float(line.rsplit(" ", 1)[1]) for line in output.stdout.splitlines() if line.startswith("step")]


def test_a_sound_command_is_calibrated_exactly(tmp_path: Path) -> None:
    found, starts = inspect(study(tmp_path), tmp_path / "starts")
    report = report_of(found)
    assert report.status == "ok", [str(check) for check in report.checks if check.status != "ok"]
    model = NormModel.from_dict(found["calibration"]["model"])
    assert model.max_ts == (0.3, 1.0) and len(model.batches) == 12
    draw = random.Random(3)
    for _ in range(4):
        gain, gate = 10 ** draw.uniform(-1, 2), draw.choice([0, 1])
        measured = norms(f"--ssim_loss_weight={gain}", f"--ssim_loss_max_t={model.max_ts[gate]}")
        v = np.array([1.0, 0.0, gain])
        predicted = [float(np.sqrt(v @ np.nan_to_num(model.q[gate, k]) @ v)) for k in range(12)]
        assert predicted == pytest.approx(measured, rel=1e-4)
    # Alone, the baseline three times, two gains for each gate, and the check; a few more to find a gain that shows.
    assert starts <= 3 * 2 + 1 + 4


def test_starts_are_kept_until_the_program_changes(tmp_path: Path) -> None:
    """Between preflight, calibration and run of one study; what was taken, how long it takes and what was kept is said."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.read_text())
    planned = study(tmp_path, program=program)
    make = load_task(planned.task_path, planned.import_path)
    file, said, taken = starts_file(tmp_path, planned.name), list[str](), list[Start]()

    def phase(preflight: bool, steps: int | None = None) -> dict[str, Any]:
        said.clear()
        taken.clear()

        def take(jobs: Any) -> Iterator[Start]:
            for start in take_here(make, planned.name, tmp_path / "starts", jobs):
                taken.append(start)
                yield start

        options: dict[str, Any] = {"steps": steps, "kept": file, "say": said.append}
        return inspect_command(planned, make, take, preflight=preflight, calibration=not preflight, **options)

    first, count = phase(preflight=True), len(taken)
    assert said[0].startswith("about 10 starts of the command, 12 steps each") and "by the first" in said[1]
    assert phase(preflight=True)["preflight"]["checks"] == first["preflight"]["checks"] and not taken
    reused = f"{count} of {count} starts of the command were taken by an earlier preflight or calibration (--fresh takes new ones)"
    assert said == [reused]
    phase(preflight=False)
    assert not taken  # preflight has calibrated too
    phase(preflight=True, steps=5)
    assert taken
    phase(preflight=False)
    assert not taken
    file.write_text(file.read_text()[:-9])
    phase(preflight=False)
    assert taken and not any("earlier" in line for line in said)
    program.write_text(program.read_text() + "\n# another program\n")
    phase(preflight=False)
    assert taken


def test_the_first_step_alone_needs_no_update_off(tmp_path: Path) -> None:
    """One batch a start: the norm of the first step is measured before the first update."""
    options = {"calibration": {"method": "first_step", "batches": 4}}
    found, _ = inspect(study(tmp_path, **options), tmp_path / "starts")
    model = NormModel.from_dict(found["calibration"]["model"])
    first = [norms(f"--seed={seed}", "--ssim_loss_weight=7", "--ssim_loss_max_t=0.3")[0] for seed in range(4)]
    v = np.array([1.0, 0.0, 7.0])
    assert [float(np.sqrt(v @ np.nan_to_num(q) @ v)) for q in model.q[0]] == pytest.approx(first, rel=1e-4)


def test_a_program_that_cannot_be_held_says_what_to_do(tmp_path: Path) -> None:
    sound = study(tmp_path, calibration={"batches": 4})
    found, _ = inspect(sound, tmp_path / "starts")
    report = report_of(found)
    assert "calibration" not in found and report.status == "ok"
    assert "update_off" in next(check.sentence for check in report.checks if check.name == "calibration")
    with pytest.raises(UserError, match=r"calibration: \{update_off: \{lr: 0\}\}"):
        inspect(sound, tmp_path / "again", preflight=False)


def test_a_searched_setting_that_does_nothing_is_found(tmp_path: Path) -> None:
    """Of no auxiliary loss: the momentum is on the command line, and the program uses it or not."""
    space = {"name": "momenta", "parameters": {"momentum": {"choice": [0.0, 0.9]}}}
    config = {"steps": 60, "lr": 0.01, "ssim_loss_weight": 0.0}
    for defect, status in (("", "ok"), ("momentum ignored", "bad_setup")):
        flags = ("--momentum={momentum}", f"--defect={defect}")
        baseline = {"ssim_loss_max_t": 1.0, "ssim_grad_scale": 1.0, "pixel_loss_weight": 0.0, "momentum": 0.0}
        searched = study(tmp_path, *flags, space=space, task_config=config, baseline=baseline, calibration=None)
        found, _ = inspect(searched, tmp_path / f"starts {defect}")
        (check,) = (one for one in report_of(found).checks if one.name == "parameter/momentum")
        assert check.status == status


@pytest.mark.parametrize(("digits", "worst"), [(8, 1e-4), (4, 0.02)])
def test_printed_digits_limit_the_prediction(tmp_path: Path, digits: int, worst: float) -> None:
    """Issue: 1e-4 relative with 8 printed digits, 2 % with 4."""
    found, _ = inspect(study(tmp_path, f"--digits={digits}"), tmp_path / "starts", preflight=False)
    model = NormModel.from_dict(found["calibration"]["model"])
    for gain in (0.3, 3.0, 30.0):
        measured = norms(f"--ssim_loss_weight={gain}", "--ssim_loss_max_t=1.0")
        v = np.array([1.0, 0.0, gain])
        predicted = [float(np.sqrt(v @ np.nan_to_num(q) @ v)) for q in model.q[1]]
        assert predicted == pytest.approx(measured, rel=worst)
    said = [finding for finding in found["calibration"]["findings"] if finding["name"] == "digits"]
    assert bool(said) == (digits == 4)


def test_significant_digits() -> None:
    assert significant_digits([1.5, 0.25, float("nan")]) == 2
    assert significant_digits([2.5008142, 3.6104310]) == 8
    assert significant_digits([1 / 3]) == 16


DEFECTS = {
    "weight dropped": ("parameter/ssim_loss_weight", "bad_setup", "does not reach the loss"),
    "scale ignored": ("parameter/ssim_grad_scale", "bad_setup", "not applied"),
    "gate ignored": ("parameter/ssim_loss_max_t", "bad_setup", "does not reach"),
    "unseeded": ("seeds/same", "warn", "same seed differ"),
    "seed ignored": ("seeds", "warn", "another seed gives the same batch"),
    "lr ignored": ("update_off", "bad_setup", "disables nothing"),
    "same batch": ("data/steps", "bad_setup", "the same numbers return at every step"),
    "climbs": ("update", "bad_setup", "rises with every update"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found_by_its_effect(tmp_path: Path, defect: str) -> None:
    found, _ = inspect(study(tmp_path, f"--defect={defect}"), tmp_path / "starts", calibration=False)
    report = report_of(found)
    name, status, words = DEFECTS[defect]
    wrong = [check for check in report.checks if check.status in ("warn", "bad_setup")]
    assert [(check.name, check.status) for check in wrong] == [(name, status)], [str(check) for check in report.checks]
    assert words in wrong[0].sentence and wrong[0].remedy


def test_an_observed_program_needs_no_setting_to_hold_its_updates(tmp_path: Path) -> None:
    """A PyTorch loop with its ordinary learning rate; nothing in it knows of the observer, and it prints no step that is read."""
    loop = PROGRAM.with_name("loop.py")
    config = {"steps": 8, "rate": 0.01}
    searched = {"name": "rates", "parameters": {"rate": {"choice": [0.01]}}}
    task = {"command": ["{python}", str(loop), "--steps={steps}"], "environment": {"RATE": "{rate}"}}
    given = {"name": "held", "task": task, "task_config": config}
    held = load_study({**given, "space": searched, "objective": {"maximize": "loss"}, "guards": {"smoke_test": None}})
    make = load_task(held.task_path, held.import_path)
    found = inspect_command(held, make, partial(take_here, make, "held", tmp_path), preflight=True, calibration=True, steps=4)
    checks = {check.name: check for check in report_of(found).checks}
    assert checks["update_off"].status == "ok" and checks["seeds/same"].sentence.endswith("trials are compared in pairs")
    assert checks["total_norm"].sentence == "observed at 4 of 4 steps"
    assert checks["seeds"].status == "warn"  # the loop has a seed of its own
    assert "name it in `task: {weights: [FILE]}`" in checks["weights/Net"].sentence
