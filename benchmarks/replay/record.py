"""Records the learning curves of a grid of settings, for the replay laboratory.

    python benchmarks/replay/record.py sgd_small                      # one of the recordings below
    python benchmarks/replay/record.py mine --study my_study.yaml --gains 1 10 100 --max-t 0.3 1.0 --seeds 0 1 2 3 --out FOLDER

Nothing is pruned: guards are applied in the replay. Every run is appended as it ends, so a recording that was stopped goes on
where it was. The file format is in benchmarks/replay/README.md. A run of the bundled task takes about 12 s on one quiet core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from curves import FORMAT, Curves, Run, rows_of

from tune_ssim import __version__
from tune_ssim.base.files import jsonable
from tune_ssim.before_launch.calibration import calibrate
from tune_ssim.guards import SmokeTest
from tune_ssim.study.space import GRAD_SCALE, MAX_T, WEIGHT
from tune_ssim.study.study import Study, load_study
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.sample_check import statistics_of
from tune_ssim.trials.training import Training

CURVES = Path(__file__).parent / "curves"
# Training steps: the rungs of ASHA (grace 25, factor 3), and the middle of a trial; the last step of a run is always added.
EVALUATIONS = (0, 25, 75, 100, 200)
SEEDS = (0, 1, 2, 3)
# Closer together where the best setting and the first harmful ones are expected (FACTS §2, §6). Behind the narrowest gate gains up
# to 16 are inert (predicted ratio 1.09).
GRID = {
    1.0: (3.0, 8.0, 16.0, 32.0, 64.0, 125.0, 400.0),
    0.3: (8.0, 32.0, 100.0, 250.0, 1000.0),
    0.1: (32.0, 250.0, 1000.0),
}
# For a busy machine: smaller crops, at half the price of a run, and fewer settings.
SMALL = {1.0: (4.0, 12.0, 32.0, 64.0, 250.0), 0.3: (12.0, 50.0, 200.0, 1000.0), 0.1: (50.0, 1000.0)}
SMALLER = {1.0: (4.0, 12.0, 32.0, 64.0, 250.0), 0.3: (50.0, 200.0)}
# Under clipping nothing collapses up to 2500 times the baseline's norm (FACTS §2); AdamW at a high rate is ruined at 2.3 times.
HIGH = {1.0: (8.0, 32.0, 125.0, 500.0, 2000.0), 0.3: (50.0, 500.0)}
LOW = {1.0: (1.0, 4.0, 12.0, 32.0, 125.0), 0.3: (12.0, 100.0)}

# name → study, changes of its task_config, max_t → gains
RECORDINGS: dict[str, tuple[str, dict[str, Any], Mapping[float, Sequence[float]]]] = {
    "sgd": ("fundus_ssim", {}, GRID),
    "sgd_small": ("fundus_ssim", {"crop": 32}, SMALL),
    "clip_small": ("fundus_adamw_clip", {"crop": 32}, HIGH),
    "hot_small": ("fundus_adamw_hot", {"crop": 32}, LOW),
    "tissue_small": ("fundus_ssim", {"crop": 32, "image": "immunohistochemistry"}, SMALLER),
    "adamw_clip": ("fundus_adamw_clip", {}, GRID),
    "adamw_hot": ("fundus_adamw_hot", {}, GRID),
    "sgd_tissue": ("fundus_ssim", {"image": "immunohistochemistry"}, GRID),
}


def record(name: str, study: Study, grid: Mapping[float, Sequence[float]], seeds: Sequence[int], out: Path) -> Curves:
    """Records what is missing in the files `out`/`name`.{npz,json}. grid: max_t → gains."""
    path = out / f"{name}.npz"
    header = header_of(name, study, grid, seeds)
    curves = Curves(header, [])
    if path.exists():
        curves = Curves.read(path)
        if differing := [key for key in ("task", "task_config", "baseline", "steps") if curves.header[key] != header[key]]:
            raise SystemExit(f"{path}: recorded with another {', '.join(differing)}; give --out or another name")
        if curves.header["evaluation_steps"] != header["evaluation_steps"] or curves.header["smoke_steps"] != header["smoke_steps"]:
            raise SystemExit(f"{path}: recorded at other steps; give --out or another name")
        curves.header |= {key: header[key] for key in ("grid", "seeds")}
    if "calibration" not in curves.header:
        curves.header["calibration"] = calibration_of(study, grid)
        curves.header["costs"] = costs_of(study, curves.header["calibration"]["cpu_s"])
        curves.write(path)
    wanted = [(0.0, 1.0, seed) for seed in seeds]
    wanted += [(gain, max_t, seed) for seed in seeds for max_t in sorted(grid, reverse=True) for gain in grid[max_t]]
    start: Start | None = None
    missing = [key for key in wanted if curves.find(*key) is None]
    for left, (gain, max_t, seed) in zip(reversed(range(len(missing))), missing, strict=True):
        began = time.perf_counter()
        run, start = record_run(study, gain, max_t, seed, start)
        curves.runs.append(run)
        curves.write(path)
        last = run.at("evaluations", -1)
        shown = ", ".join(f"{name} {last[name]:.5g}" for name in ("ssim", "psnr") if name in last)
        took = time.perf_counter() - began
        print(f"{name}: gain {gain:g} @ {max_t:g}, seed {seed}: {shown}, {took:.1f} s, {left} left", flush=True)
    return curves


Start = dict[str, dict[str, float]]  # kind → metrics of step 0: the same for every run from the same weights


def record_run(study: Study, gain: float, max_t: float, seed: int, start: Start | None = None) -> tuple[Run, Start]:
    """One whole training, with the product's own task, statistics and evaluation. start: that of another run, to save time."""
    settings = {WEIGHT: gain, MAX_T: max_t, GRAD_SCALE: 1.0, "pixel_loss_weight": 0} if gain else study.baseline_settings
    training = load_task(study.task_path, study.import_path)()
    training.setup({**study.task_config, "steps": study.steps, **settings}, seed)
    clipped = training.effective().get("max_grad_norm") is not None
    first: Start = start or {"evaluations": dict(training.evaluate()), **_samples(training, True)}
    rows: dict[str, list[Mapping[str, float]]] = {"steps": [], **{kind: [values] for kind, values in first.items()}}
    for step in range(1, study.steps + 1):
        rows["steps"].append({key: float(value) for key, value in training.step().items()})
        if step in evaluation_steps(study):
            rows["evaluations"].append(dict(training.evaluate()))
        if step in smoke_steps(study):
            # The guard draws the second noise at the last step, and on a probe, which happens under clipping only.
            for kind, values in _samples(training, clipped or step == study.steps).items():
                rows[kind].append(values)
    training.close()
    return Run(gain, max_t, seed, {kind: rows_of(found) for kind, found in rows.items()}), first


def _samples(training: Training, again: bool) -> Start:
    drawn = {"smoke": training.sample(0), "smoke_again": training.sample(1) if again else None}
    return {kind: statistics_of(sample) if sample is not None else {} for kind, sample in drawn.items()}


def evaluation_steps(study: Study) -> list[int]:
    return sorted({*(step for step in EVALUATIONS if step < study.steps), study.steps})


def smoke_steps(study: Study) -> list[int]:
    """Those of the study's guard, or of the default one if it is off."""
    guard = study.guards.get(SmokeTest.name)
    at = guard.at if isinstance(guard, SmokeTest) else SmokeTest().at
    return sorted({0, *(step for step in at if step < study.steps), study.steps})


def header_of(name: str, study: Study, grid: Mapping[float, Sequence[float]], seeds: Sequence[int]) -> dict[str, Any]:
    training = load_task(study.task_path, study.import_path)()
    training.setup({**study.task_config, "steps": study.steps, **study.baseline_settings}, 0)
    return {
        "format": FORMAT,
        "name": name,
        "study": study.name,
        "task": study.task_path if isinstance(study.task_path, str) else str(study.task_path),
        "task_config": dict(study.task_config),
        "baseline": dict(study.baseline_settings),
        "baseline_effective": dict(training.effective()),
        "steps": study.steps,
        "evaluation_steps": evaluation_steps(study),
        "smoke_steps": smoke_steps(study),
        "grid": [{"max_t": max_t, "gains": list(gains)} for max_t, gains in sorted(grid.items())],
        "seeds": list(seeds),
        "recorded": f"tune-ssim {__version__}, torch {torch.__version__}, Python {platform.python_version()}, one thread, CPU",
    }


def calibration_of(study: Study, grid: Mapping[float, Sequence[float]]) -> dict[str, Any]:
    """The norm model, and the predicted ratio of every setting of the grid."""
    gains = sorted({gain for row in grid.values() for gain in row})
    space = {
        "name": "grid",
        "parameters": {"gain": {"log_uniform": [min(gains), max(gains)]}, MAX_T: {"choice": sorted(grid)}},
        "fixed": {GRAD_SCALE: 1.0, "pixel_loss_weight": 0},
    }
    began_s = time.process_time()
    found = calibrate(changed(study, {}, space=space))
    return jsonable(  # type: ignore[no-any-return]
        {
            "model": found.model.to_dict(),
            "relative_error": found.check.relative_error,
            "cpu_s": round(time.process_time() - began_s, 3),
            "predicted_ratio": [
                {"gain": gain, "max_t": max_t, "ratio": round(found.model.predict_gain(gain, max_t).ratio, 5)}
                for max_t in sorted(grid)
                for gain in grid[max_t]
            ],
        }
    )


def costs_of(study: Study, calibration_s: float, steps: int = 10) -> dict[str, float]:
    """What an evaluation, a sample with its statistics and the calibration cost, in training steps with the SSIM loss on. By
    processor time, which other programs on the machine distort less than the clock."""
    training = load_task(study.task_path, study.import_path)()
    training.setup({**study.task_config, "steps": study.steps, WEIGHT: 1.0, MAX_T: 1.0, GRAD_SCALE: 1.0}, 0)

    def seconds(action: Callable[[], Any], times: int) -> float:
        action()
        began_s = time.process_time()
        for _ in range(times):
            action()
        return (time.process_time() - began_s) / times

    step_s = seconds(training.step, steps)
    found = {"evaluation": seconds(training.evaluate, 1), "sample": seconds(lambda: _samples(training, False), 2)}
    return {name: round(cost_s / step_s, 2) for name, cost_s in (found | {"calibration": calibration_s}).items()}


def changed(study: Study, task_config: Mapping[str, Any], **keys: Any) -> Study:
    """The study with other keys, and with some keys of its task_config changed."""
    given = study.to_dict()
    return load_study({**given, **keys, "task_config": {**given["task_config"], **task_config}})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help=f"one of {', '.join(RECORDINGS)}, or your own with --study")
    parser.add_argument("--study", help="a study file; its space is replaced by the grid")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of task_config")
    parser.add_argument("--gains", type=float, nargs="+")
    parser.add_argument("--max-t", type=float, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=CURVES)
    options = parser.parse_args()
    if options.study is None and options.name not in RECORDINGS:
        parser.error(f"{options.name}: not one of {', '.join(RECORDINGS)}; give --study")
    source, changes, grid = RECORDINGS.get(options.name, (options.study, {}, GRID))
    if options.gains or options.max_t:
        grid = dict.fromkeys(options.max_t or grid, options.gains or GRID[1.0])
    changes = {**changes, **{key: _value(text) for key, _, text in (pair.partition("=") for pair in options.set)}}
    study = changed(load_study(Path(options.study) if options.study else source), task_config=changes)
    torch.set_num_threads(1)
    record(options.name, study, grid, options.seeds, options.out)


if __name__ == "__main__":
    main()
