"""What does it cost to run somebody's script as a trial? The same script by itself and below `CommandTask`, in turns.

    python benchmarks/command.py [--rounds 5] [--output benchmarks/results/command.json]

Three figures: the wall time of a trial over that of the bare script; the CPU that ten commands side by side take from the process
that reads them, as a share of one core; and the same while each of them prints 100 KB/s that is of no interest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tune_ssim.guards import NonFinite
from tune_ssim.run_trial import Trial, TrialPlan
from tune_ssim.tasks.command import CommandTask
from tune_ssim.tasks.command_spec import CommandSpec

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
    found: dict[str, Any] = {"overhead": overhead(arguments.rounds), "readers": [readers(0), readers(50)]}
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
