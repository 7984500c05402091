"""What the observer costs a program, and that the program's numbers stay the same to the last digit.

    python benchmarks/observe.py [--pairs 5] [--steps 150]

Each program runs bare and observed by turns, as a command of its own. Compared are every printed loss, as text, and the CPU time of
all its processes; the cost is the median over pairs of the difference, by the steps beyond a run of few steps, so that start-up
does not count. The time of a step is the program's own. Writes benchmarks/results/observe.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tune_ssim.probes.observer import EventReader, observed_environment

HERE = Path(__file__).resolve().parent
BAGEL = HERE.parent / "examples" / "bagel_style"
FEW = 10  # steps of the run that stands for start-up


def bagel(ranks: int, data: Path, out: Path) -> tuple[list[str], Path]:
    flags = [f"--vae_path={data}/vae.safetensors", f"--resume_from={data}/start", "--resume_model_only=True"]
    flags += [
        f"--results_dir={out}",
        "--save_every=1000000",
        "--ssim_loss_weight=10",
        "--ssim_loss_max_t=1.0",
        "--total_steps={steps}",
        "--exp_name={run}",
    ]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "train.py", *flags], BAGEL


def run(command: list[str], cwd: Path, steps: int, environment: dict[str, str]) -> tuple[str, float]:
    """(its losses as printed, seconds of CPU of all its processes)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [word.replace("{steps}", str(steps)).replace("{run}", uuid4().hex) for word in command]
    ended = subprocess.run(words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{command}: {ended.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    losses = re.findall(r"(?:loss|Train Loss \w+:?)[: ]+(\S+)", ended.stdout)
    return " ".join(losses), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(name: str, command: list[str], cwd: Path, pairs: int, steps: int) -> dict[str, Any]:
    bare_s, cost_s, same, observed_steps = [], [], True, 0
    for _ in range(pairs):
        cpu = {}
        for count in (FEW, steps):
            bare, cpu[count, "bare"] = run(command, cwd, count, {})
            with tempfile.TemporaryDirectory() as folder:
                environment = observed_environment(Path(folder), os.environ)
                observed, cpu[count, "observed"] = run(command, cwd, count, environment)
                reader = EventReader(Path(folder))
                reader.read()
                observed_steps = reader.observation.steps
            same = same and bare == observed and bool(bare)
        per_step = {kind: (cpu[steps, kind] - cpu[FEW, kind]) / (steps - FEW) for kind in ("bare", "observed")}
        bare_s.append(per_step["bare"])
        cost_s.append(per_step["observed"] - per_step["bare"])
    step_ms, cost_ms = 1000 * median(bare_s), 1000 * median(cost_s)
    row = {"step_ms": round(step_ms, 2), "cost_ms": round(cost_ms, 3), "share": round(cost_ms / step_ms, 4), "same_losses": same}
    print(f"{name}: {json.dumps({**row, 'observed_steps': observed_steps})}", flush=True)
    return {**row, "observed_steps": observed_steps, "shares": [round(c / b, 4) for c, b in zip(cost_s, bare_s, strict=True)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "data"), Path(folder, "out")
        subprocess.run(
            [sys.executable, "prepare.py", f"--out={data}", "--language_steps=20"], cwd=BAGEL, check=True, capture_output=True
        )
        programs = {
            "small_gpt": ([sys.executable, str(HERE / "programs" / "small_gpt.py"), "--steps={steps}"], HERE),
            "bagel_style, 1 rank": bagel(1, data, out),
            "bagel_style, 2 ranks": bagel(2, data, out),
        }
        rows = {name: measure(name, *program, arguments.pairs, arguments.steps) for name, program in programs.items()}
    result = {
        "pairs": arguments.pairs,
        "steps": arguments.steps,
        "programs": rows,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    (HERE / "results" / "observe.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
