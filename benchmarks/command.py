"""What does it cost to run somebody's script as a trial? The same script by itself and below `CommandTask`, in turns.

    python benchmarks/command.py [--rounds 5] [--output benchmarks/results/command.json]

The wall time of a trial over that of the bare script; the CPU, as a share of one core, of one process that reads ten commands side
by side, also while each of them prints 100 KB/s that is of no interest; and the CPU of the process that drives a study of ten at a
time, where each is read by the process of its own trial.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tune_ssim.guards import NonFinite
from tune_ssim.study.command_spec import CommandSpec
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.final_verdict import TrialPlan
from tune_ssim.trials.trial import Trial

# 200 steps of 50 ms of real work (the fastest training worth tuning), a line each; then with chatter in between.
SCRIPT = """
import sys, time
chatter = 'x' * 99 + '\\n'
for step in range(1, int(sys.argv[1]) + 1):
    end = time.process_time() + float(sys.argv[2]) if float(sys.argv[2]) < 1 else 0
    while time.process_time() < end:
        pass
    time.sleep(float(sys.argv[3]))
    sys.stdout.write(chatter * int(sys.argv[4]))
    print(f'step={step} loss={1 / step} grad_norm=0.5', flush=True)
"""
PATTERN = r"step=(?P<step>\d+) loss=(?P<loss>\S+) grad_norm=(?P<total_norm>\S+)"
COMMANDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "command.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"overhead": overhead(arguments.rounds), "readers": [readers(0), readers(50)], "driver": driver()}
    table = Table("what", "figure")
    row = found["overhead"]
    table.add_row("bare script, s (median)", f"{row['bare_s']:.2f}")
    table.add_row("as a trial, s (median)", f"{row['trial_s']:.2f}")
    table.add_row("overhead (median of pairs)", f"{100 * row['overhead']:.2f} %  ({row['seconds_more']:.3f} s a trial)")
    for row in found["readers"]:
        table.add_row(
            f"{COMMANDS} commands, {row['kb_per_s_each']:.0f} KB/s each: CPU of the reader",
            f"{100 * row['cpu_share']:.1f} % of a core",
        )
    row = found["driver"]
    table.add_row(
        f"the driver of a study, {COMMANDS} commands at a time",
        f"{100 * row['cpu_share']:.1f} % of a core while all run, {100 * row['cpu_share_whole']:.1f} % in all",
    )
    Console(width=120).print(table)
    save(arguments.output, {"rounds": arguments.rounds, **found})


def argv(steps: int, work_s: float, pause_s: float, chatter: int) -> list[str]:
    return ["-c", SCRIPT, str(steps), str(work_s), str(pause_s), str(chatter)]


def overhead(rounds: int, steps: int = 200, work_s: float = 0.05) -> dict[str, Any]:
    """A whole trial, guards and start included, against the script alone."""
    bare, judged = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run([sys.executable, *argv(steps, work_s, 0, 0)], stdout=subprocess.DEVNULL, check=True)
        bare.append(time.perf_counter() - started)
        started = time.perf_counter()
        trial = Trial(task(argv(steps, work_s, 0, 0)), TrialPlan(steps=steps, guards=(NonFinite(),)))
        trial.start({"steps": steps}, role="baseline")
        trial.advance()
        judged.append(time.perf_counter() - started)
        assert trial.verdict is not None and trial.verdict.verdict == "safe" and trial.step == steps, trial.verdict
    pairs = [b / a - 1 for a, b in zip(bare, judged, strict=True)]
    more = [b - a for a, b in zip(bare, judged, strict=True)]
    return {
        "bare_s": statistics.median(bare),
        "trial_s": statistics.median(judged),
        "overhead": statistics.median(pairs),
        "seconds_more": statistics.median(more),
        "pairs": pairs,
    }


def readers(chatter: int, steps: int = 200, pause_s: float = 0.05) -> dict[str, Any]:
    """Ten at once: CPU time of this process over wall time."""
    tasks = [task(argv(steps, 1, pause_s, chatter)) for _ in range(COMMANDS)]
    counts = [0] * COMMANDS

    def read(index: int) -> None:
        while tasks[index].step() is not None:
            counts[index] += 1
        tasks[index].close()

    threads = [threading.Thread(target=read, args=(index,)) for index in range(COMMANDS)]
    wall, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert counts == [steps] * COMMANDS, counts
    return {"kb_per_s_each": chatter * 0.1 * steps / wall, "wall_s": wall, "cpu_s": cpu, "cpu_share": cpu / wall}


def driver(steps: int = 900, pause_s: float = 0.05) -> dict[str, Any]:
    """`tune-ssim run` of a study of ten commands at a time: its own CPU time over wall time, from when the last of the ten has
    started to when the first one ends, and from beginning to end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [word.replace("{", "{{").replace("}", "}}") for word in argv(steps, 1, pause_s, 0)]
        study = {
            "name": "driver",
            "task": {"command": ["{python}", *words], "environment": {"W": "{ssim_loss_weight}"}, "records": {"pattern": PATTERN}},
            "task_config": {"steps": steps},
            "space": {
                "parameters": {"ssim_loss_weight": {"log_uniform": [1, 2]}},
                "fixed": {"ssim_grad_scale": 1.0, "ssim_loss_max_t": 1.0},
            },
            "baseline": {"log": {"file": str(folder / "pixel.csv")}},
            "search": {"strategy": "random", "trials": COMMANDS, "concurrency": COMMANDS},
            "guards": {"smoke_test": None},
            "objective": {"maximize": "delta_ssim", "keep": {}},
            "resources": {"cpus": 0.2},
            "preflight": None, "calibration": None, "confirm": None, "tracking": None,
        }  # fmt: skip
        (folder / "pixel.csv").write_text("step,total_norm\n" + "".join(f"{step},0.5\n" for step in range(1, steps + 1)))
        (folder / "study.yaml").write_text(json.dumps(study))
        command = [sys.executable, "-m", "tune_ssim", "run", "study.yaml", "--storage-path", str(folder / "results")]
        begun = time.perf_counter()
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
            seen: list[tuple[float, float, int]] = []
            while process.poll() is None:
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                running = len(list((folder / "results" / "driver" / "work").glob("*/output.log")))
                seen.append((time.perf_counter(), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), running))
                time.sleep(0.25)
        trials = [json.loads(line) for line in (folder / "results" / "driver" / "trials.jsonl").read_text().splitlines()]
        assert len(trials) == COMMANDS and all(trial["steps"] == steps for trial in trials), (folder / "output.txt").read_text()
    together = [one for one in seen if one[2] == COMMANDS]
    # The first to end has run for `steps` pauses at least; what is left of the window is free of starts and ends.
    first = together[0]
    within = [one for one in together if one[0] < first[0] + 0.5 * steps * pause_s]
    wall, cpu = within[-1][0] - first[0], within[-1][1] - first[1]
    whole = seen[-1][0] - begun
    return {"wall_s": wall, "cpu_s": cpu, "cpu_share": cpu / wall, "whole_s": whole, "cpu_share_whole": seen[-1][1] / whole}


def task(words: list[str]) -> CommandTask:
    spec = {
        "command": ["{python}", *(word.replace("{", "{{").replace("}", "}}") for word in words)],
        "records": {"pattern": PATTERN},
        "grace_s": 0.5,
    }
    made = CommandTask(CommandSpec.model_validate(spec))
    made.setup({"steps": int(words[2])}, 0)
    return made


def save(output: Path, result: dict[str, Any]) -> None:
    """With what one must know to compare it with another run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    load = os.getloadavg()[0]
    hardware = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(), "load_1min": load}
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"commit": commit, "hardware": hardware, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
