"""Studies of small programs without torch, run in this process: a second each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_ssim.orchestration.phases import run_study
from tune_ssim.orchestration.progress import NoProgress
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.study import load_study
from tune_ssim.trials.summary import TrialSummary

# Minimises (x w)² with x from the seed. The loss falls for a learning rate below 0.4, and diverges above 1.
DESCENT = """
import json, random, sys
lr, seed, steps = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
draw, w = random.Random(seed), 5.0
for step in range(1, steps + 1):
    x = draw.uniform(0.5, 1.5)
    loss, gradient = (x * w) ** 2, 2 * x * x * w
    w -= lr * gradient
    print(f"step {step}: loss {loss:.6g}" + (f" grad_norm {abs(gradient):.6g}" if "norm" in sys.argv else ""))
print("TUNE_SSIM " + json.dumps({"held_out": {"score": -min(abs(w), 1e300)}}))
"""
LOSS = r"step (?P<step>\d+): loss (?P<loss>\S+)"
ARGUMENTS = ("{lr}", "{seed}", "{steps}")


class Said(NoProgress):
    """Keeps what a study says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.phases: list[str] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def say(self, line: str) -> None:
        self.lines.append(line)


def study(folder: Path, script: str = DESCENT, arguments: tuple[str, ...] = ARGUMENTS, **changes: Any) -> dict[str, Any]:
    """A study of learning rates for `script`, as a mapping. task: changes of the command."""
    (folder / "train.py").write_text(script)
    task = {"command": ["{python}", "train.py", *arguments], "cwd": str(folder), "grace_s": 0.5, **changes.pop("task", {})}
    return {
        "name": "rates",
        "task": {key: value for key, value in task.items() if value is not None},
        "task_config": {"steps": 30},
        "baseline": {"lr": 0.1, "seeds": 1},
        "space": {"name": "rates", "parameters": {"lr": {"choice": [0.2]}}},
        "search": {"trials": 1},
        "guards": {"norm_ratio": None, "smoke_test": None},
        "objective": {"maximize": "score"},
        "confirm": None,
        "tracking": None,
        "preflight": None,
        "calibration": None,
        **changes,
    }


def run(given: Mapping[str, Any], storage: Path, **options: Any) -> StudyFolder:
    return run_study(load_study(given), storage=storage, in_process=True, **options)


def trials(given: Mapping[str, Any], storage: Path) -> list[TrialSummary]:
    return run(given, storage).trials()
