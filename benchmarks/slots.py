"""How busy two slots are kept by short trials on Ray Tune, and how many trials a second that is.

    python benchmarks/slots.py [--trials 16] [--seconds 0.3 1 3]

A trial computes on one core for about the given time, so that two of them side by side need two cores; on a machine with fewer
free ones the share says so too. Busy share: the time of all trials of the search, by their own clocks, over the time from the
first start to the last end, of one slot. 2.0 is the most. The same trials one after the other in this process stand beside it.
Writes benchmarks/results/slots.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tune_ssim.orchestration.phases import run_study
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.study import load_study
from tune_ssim.trials.training import Sample, Training

STEPS = 20


class TimedTraining(Training):
    """Takes `seconds` of one core for its steps; learns nothing."""

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.config, self.n = dict(config), 0

    def step(self) -> dict[str, float]:
        self.n += 1
        until = time.perf_counter() + float(self.config["seconds"]) / STEPS
        while time.perf_counter() < until:
            pass
        return {"loss": 1.0, "total_norm": 1.0, "ssim_active_fraction": 1.0}

    def sample(self, noise: int = 0) -> Sample:
        return Sample(torch.zeros(0, 3, 1, 1))

    def evaluate(self) -> dict[str, float]:
        return {"ssim": 0.9, "psnr": 30.0}

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]

    def effective(self) -> dict[str, Any]:
        return dict(self.config)


def study(seconds: float, trials: int) -> Any:
    return load_study(
        {
            "name": f"slots-{seconds:g}",
            "task": f"{Path(__file__).stem}:TimedTraining",
            "import_path": str(Path(__file__).parent),
            "task_config": {"steps": STEPS, "seconds": seconds},
            "space": "wide",
            "search": {"trials": trials, "concurrency": 2},
            "guards": {"smoke_test": None},
            "preflight": None,
            "calibration": None,
            "confirm": None,
            "tracking": None,
        }
    )


def measure(seconds: float, trials: int, in_process: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as storage:
        folder = run_study(study(seconds, trials), storage=Path(storage), in_process=in_process)
        return share(folder)


def share(folder: StudyFolder) -> dict[str, float]:
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for event in folder.events():
        if event["event"] == "trial":
            starts.setdefault(event["trial_id"], event["time_ms"])
        elif event["event"] == "verdict":
            ends[event["trial_id"]] = event["time_ms"]
    searched = {name for name in starts if name.startswith("trial-")}
    wall_s = (max(ends[name] for name in searched) - min(starts[name] for name in searched)) / 1000
    busy_s = sum(trial.metric("seconds") for trial in folder.trials() if trial.trial_id in searched)
    return {"busy_slots": round(busy_s / wall_s, 3), "trials_per_s": round(len(searched) / wall_s, 3), "wall_s": round(wall_s, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.3, 1.0, 3.0])
    arguments = parser.parse_args()
    rows = {}
    for seconds in arguments.seconds:
        rows[f"{seconds:g}"] = {
            "ray": measure(seconds, arguments.trials, in_process=False),
            "in_process": measure(seconds, arguments.trials, in_process=True),
        }
        print(f"trials of {seconds:g} s:", json.dumps(rows[f"{seconds:g}"]))
    result = {"trials": arguments.trials, "by_seconds": rows, "cpus": os.cpu_count(), "python": platform.python_version()}
    (Path(__file__).parent / "results" / "slots.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
