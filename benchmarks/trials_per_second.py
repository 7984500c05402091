"""What a trial itself costs: trials a second that do nothing, in a study and in bare Ray Tune, and the driver's memory.

    python benchmarks/trials_per_second.py [--trials 1000] [--rounds 1] [--output benchmarks/results/trials_per_second.json]

Both run the given number of trials of one step on two slots with random search, reused actors and no loggers (Ray's CSV, JSON and
TensorBoard files, MLflow). A study also gives each trial its verdict, records and folder. Rates are over the first and the last
tenth and over all trials, from the first trial's start; memory is the growth of the driver per trial from the first tenth on. Each
run has a process and a Ray of its own; the two go in turn, figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table
from ssim import save

from tune_ssim.trials.training import Sample, Training

SLOTS = 2
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class NoTraining(Training):
    """Does nothing, and its metric is always a little better than the baseline's."""

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.config = dict(config)

    def step(self) -> dict[str, float]:
        return {"loss": 1.0, "total_norm": 1.0}

    def sample(self, noise: int = 0) -> Sample | None:
        return None

    def evaluate(self) -> dict[str, float]:
        return {"ssim": 0.5 + 0.001 * float(self.config.get("ssim_loss_weight", 0.0))}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def effective(self) -> dict[str, Any]:
        return self.config


class Clock:
    """Times and memory at the ends of trials."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.memory_kb: list[float] = []

    def tick(self) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        self.times_s.append(time.monotonic())
        self.memory_kb.append(resident * PAGE_BYTES / 1024)

    def figures(self) -> dict[str, float]:
        times, part = self.times_s, max(1, len(self.times_s) // 10)
        return {
            "trials_per_s": (len(times) - 1) / (times[-1] - times[0]),
            "first_tenth_per_s": part / (times[part] - times[0]),
            "last_tenth_per_s": part / (times[-1] - times[-1 - part]),
            "driver_kb_per_trial": (self.memory_kb[-1] - self.memory_kb[part]) / (len(times) - part),
        }


def study(trials: int, storage: Path) -> Clock:
    from tune_ssim.orchestration.phases import run_study
    from tune_ssim.orchestration.progress import NoProgress
    from tune_ssim.study.study import load_study

    clock = Clock()

    class Ticking(NoProgress):
        def trial_ended(self, summary: Any) -> None:
            if summary.role == "search":
                clock.tick()

    space = {"name": "inline", "parameters": {"ssim_loss_weight": {"uniform": [1, 2]}}}
    space["fixed"] = {"ssim_grad_scale": 1.0, "ssim_loss_max_t": 1.0}
    nothing = dict.fromkeys(("preflight", "calibration", "confirm", "tracking"))
    given = {
        "name": "nothing",
        "task": "trials_per_second:NoTraining",
        "import_path": str(Path(__file__).parent),
        "task_config": {"steps": 1},
        "baseline": {"seeds": 1},
        "space": space,
        "search": {"trials": trials, "strategy": "random", "concurrency": SLOTS},
        "guards": {"smoke_test": None, "norm_ratio": None},
        **nothing,
    }
    run_study(load_study(given), storage=storage, progress=Ticking())
    return clock


def bare(trials: int, storage: Path) -> Clock:
    import ray
    from ray import tune

    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_MAX_PENDING_TRIALS_PG": str(SLOTS)}
    clock = Clock()

    class Ticking(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            clock.tick()

        def __getstate__(self) -> dict[str, Any]:
            return {}

    class Nothing(tune.Trainable):
        def step(self) -> dict[str, Any]:
            return {"ssim": self.config["ssim_loss_weight"], "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.config = new_config
            return True

    ray.init(num_cpus=SLOTS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    tune.Tuner(
        Nothing,
        param_space={"ssim_loss_weight": tune.uniform(1, 2)},
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=SLOTS, reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(storage), callbacks=[Ticking()], verbose=0),
    ).fit()
    ray.shutdown()
    return clock


def measure(name: str, trials: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return {"study": study, "bare": bare}[name](trials, Path(folder)).figures()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "trials_per_second.json")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"bare": [], "study": []}
    for _ in range(arguments.rounds):
        for name, rounds in found.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rounds.append(pool.apply(measure, (name, arguments.trials)))
            print(name, json.dumps(rounds[-1]), flush=True)
    medians = {name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]} for name, rounds in found.items()}
    share = medians["study"]["trials_per_s"] / medians["bare"]["trials_per_s"]
    table = Table("", "trials/s", "first tenth", "last tenth", "driver kB a trial")
    for name, figures in medians.items():
        table.add_row(name, *(f"{figures[key]:.3g}" for key in figures))
    Console().print(table)
    print(f"a study runs {share:.0%} of bare Ray Tune's trials a second")
    save(
        arguments.output, {"trials": arguments.trials, "rounds": arguments.rounds, "medians": medians, "share": share, "all": found}
    )


if __name__ == "__main__":
    main()
