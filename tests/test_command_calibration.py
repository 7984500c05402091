"""Preflight and calibration of a command, from its starts: a real program, sound and broken in one way each."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tune_ssim.before_launch.command.inspect import inspect_command
from tune_ssim.before_launch.command.take_start import take_here
from tune_ssim.before_launch.preflight.report import Report
from tune_ssim.probes.norm_model import NormModel
from tune_ssim.study.study import Study, load_study
from tune_ssim.trials.load_training import load_task

PROGRAM = Path(__file__).parent / "programs" / "pushes.py"
FLAGS = ("ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale", "pixel_loss_weight", "lr")


def study(tmp_path: Path, *extra: str, space: Any = None, **changes: Any) -> Study:
    command = ["{python}", str(PROGRAM), "--steps={steps}", "--seed={seed}", *(f"--{name}={{{name}}}" for name in FLAGS), *extra]
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
    taken = take_here(make, folder)
    count = 0

    def take(jobs: Any) -> Any:
        nonlocal count
        count += len(jobs)
        return taken(jobs)

    return inspect_command(
        study, make, take, preflight=phases.get("preflight", True), calibration=phases.get("calibration", True)
    ), count


def norms(*flags: str) -> list[float]:
    output = subprocess.run(
        [sys.executable, str(PROGRAM), "--lr=0", "--steps=12", *flags], capture_output=True, text=True, check=True
    )
    return [float(line.rsplit(" ", 1)[1]) for line in output.stdout.splitlines() if line.startswith("step")]


def test_a_sound_command_is_calibrated_exactly(tmp_path: Path) -> None:
    found, starts = inspect(study(tmp_path), tmp_path / "starts")
    report = Report.from_dict(found["preflight"])
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


DEFECTS = {
    "weight dropped": ("parameter/ssim_loss_weight", "bad_setup", "does not reach the loss"),
    "scale ignored": ("parameter/ssim_grad_scale", "bad_setup", "not applied"),
    "gate ignored": ("parameter/ssim_loss_max_t", "bad_setup", "does not reach"),
    "unseeded": ("seeds/same", "warn", "same seed differ"),
    "seed ignored": ("seeds", "warn", "another seed gives the same batch"),
    "lr ignored": ("update_off", "bad_setup", "switches nothing off"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found_by_its_effect(tmp_path: Path, defect: str) -> None:
    found, _ = inspect(study(tmp_path, f"--defect={defect}"), tmp_path / "starts", calibration=False)
    report = Report.from_dict(found["preflight"])
    name, status, words = DEFECTS[defect]
    wrong = [check for check in report.checks if check.status in ("warn", "bad_setup")]
    assert [(check.name, check.status) for check in wrong] == [(name, status)], [str(check) for check in report.checks]
    assert words in wrong[0].sentence and wrong[0].remedy
