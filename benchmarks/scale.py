"""A study of 10,000 trials: what running, reading, resuming and mirroring it costs.

    python benchmarks/scale.py [--trials 10000] [--output benchmarks/results/scale.json]

The study runs trial by trial in this process, without Ray, with a training that does nothing but report ten metrics at each of four
steps; a third of the trials is pruned. So all that counts is what the study itself writes and keeps. Then each command reads the
study's folder in a process of its own. Memory is that process's peak.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from rich.console import Console
from rich.table import Table
from ssim import save
from trials_per_second import Clock, NoTraining

STEPS = 4
METRICS = 10
NAME = "scale"


class TenMetrics(NoTraining):
    """Reports ten metrics a step. Its loss is NaN above a weight of 1.67."""

    def step(self) -> dict[str, float]:
        weight = float(self.config.get("ssim_loss_weight", 0.0))
        loss = math.nan if weight > 5 / 3 else 1.0
        return {"loss": loss, "total_norm": 1.0} | {f"metric_{index}": weight + index for index in range(METRICS - 2)}


def study_of(trials: int) -> dict[str, Any]:
    space = {"name": "inline", "parameters": {"ssim_loss_weight": {"uniform": [1, 2]}}}
    space["fixed"] = {"ssim_grad_scale": 1.0, "ssim_loss_max_t": 1.0}
    return {
        "name": NAME,
        "task": "scale:TenMetrics",
        "import_path": str(Path(__file__).parent),
        "task_config": {"steps": STEPS},
        "result_every": 1,
        "baseline": {"seeds": 1},
        "space": space,
        "search": {"trials": trials, "strategy": "random"},
        "guards": {"smoke_test": None, "norm_ratio": None},
        **dict.fromkeys(("preflight", "calibration", "confirm", "tracking")),
    }


def run(trials: int, storage: Path) -> dict[str, float]:
    from tune_ssim.orchestration.phases import run_study
    from tune_ssim.orchestration.progress import NoProgress
    from tune_ssim.study.study import load_study

    clock = Clock()

    class Ticking(NoProgress):
        def trial_ended(self, summary: Any) -> None:
            clock.tick()

    run_study(load_study(study_of(trials)), storage=storage, in_process=True, progress=Ticking())
    return clock.figures()


def measured(storage: Path, *arguments: str) -> dict[str, Any]:
    """One command of the package: seconds, processor seconds, peak memory in MB, exit code."""
    command = [sys.executable, "-m", "tune_ssim", *arguments, "--storage-path", str(storage)]
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])}
    peak_kb, before = 0, os.times()
    with (storage / "output").open("ab") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **paths})
        while process.poll() is None:
            peak_kb = max(peak_kb, peak_kb_of(process.pid))
            time.sleep(0.02)
        wall_s, after = time.perf_counter() - start, os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": peak_kb / 1024, "exit_code": process.returncode}


def peak_kb_of(pid: int) -> int:
    """Peak resident memory of a process; 0 if it has ended. (The parent's memory counts in `getrusage`.)"""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def sizes(folder: Path) -> Mapping[str, float]:
    return {name: (folder / name).stat().st_size / 1e6 for name in ("trials.jsonl", "events.jsonl", "report.html")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tune-ssim-scale-") as name:
        storage = Path(name)
        found: dict[str, Any] = {"trials": arguments.trials, "run": run(arguments.trials, storage)}
        found["run"]["peak_mb"] = peak_kb_of(os.getpid()) / 1024
        print("run", found["run"], flush=True)
        commands = {
            "trials": ["trials"],
            "trials --json": ["trials", "--json"],
            "report": ["report", NAME],
            "export --unproven": ["export", NAME, "--unproven"],
            "run --resume": ["run", "--resume", "--name", NAME, "--in-process"],
            "mirror": ["mirror", NAME],
        }
        found["commands"] = {}
        for words, command in commands.items():
            found["commands"][words] = measured(storage, *command)
            print(words, found["commands"][words], flush=True)
        found["megabytes"] = sizes(storage / NAME)
        results = arguments.trials * STEPS * 2 / 3
        found["mirrored_results_per_s"] = results / found["commands"]["mirror"]["wall_s"]
    table = Table("command", "seconds", "processor seconds", "peak MB")
    for words, one in found["commands"].items():
        table.add_row(words, f"{one['wall_s']:.1f}", f"{one['cpu_s']:.1f}", f"{one['peak_mb']:.0f}")
    Console().print(table)
    figures = found["run"]
    print(
        f"run: {figures['trials_per_s']:.0f} trials/s, {figures['first_tenth_per_s']:.0f} in the first tenth, "
        f"{figures['last_tenth_per_s']:.0f} in the last, {figures['driver_kb_per_trial']:.1f} kB a trial"
    )
    save(arguments.output, found)


if __name__ == "__main__":
    main()
