"""Results a second into MLflow on SQLite: the mirror against Ray Tune's own MLflowLoggerCallback, side by side.

    python benchmarks/tracking.py [--results 5000]

Both get the same results of ten metrics, in turn, in one run of this script. The clock stops when the last row is in
the database; then the rows are counted through MLflow's client. Ray's callback writes one metric a request: it gets a
twentieth of the results. The start (import, tables) is left out on both sides and told apart.
Writes benchmarks/results/tracking.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import mlflow

from tune_ssim.results.events import EventWriter
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.tracking.mirror import MLflowMirror, default_uri, read_state

METRICS = 10


def values(step: int) -> dict[str, float]:
    return {f"metric_{k}": step + k / METRICS for k in range(METRICS)}


def rows_in(uri: str, run_id: str) -> int:
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    return sum(len(client.get_metric_history(run_id, f"metric_{k}")) for k in range(METRICS))


def our_mirror(storage: Path, results: int) -> dict[str, Any]:
    """The study's side writes events; the process brings them over. CPU seconds of that process are counted."""
    folder = StudyFolder(storage / "mirrored").create()
    events = EventWriter(folder)
    events.study_started("mirrored")
    events.trial_started("t", "search", {"lr": 0.1})
    mirror = MLflowMirror(folder)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    mirror.start()
    while read_state(folder, mirror.uri)["offset"] == 0:  # import of MLflow and the first events
        time.sleep(0.01)
    ready_s = time.perf_counter() - start
    start = time.perf_counter()
    for step in range(results):
        events.result("t", {"records": [[step, values(step)]]})
    written_s = time.perf_counter() - start
    if not mirror.drain(timeout_s=600):
        raise SystemExit(mirror.status())
    total_s = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = rows_in(default_uri(storage), read_state(folder, mirror.uri)["runs"]["t"])
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "results": results,
        "rows": rows,
        "rows_lost": results * METRICS - rows,
        "results_a_second": round(results / total_s, 1),
        "study_waits_ms_a_result": round(1000 * written_s / results, 3),
        "mirror_cpu_s_with_start": round(cpu_s, 2),
        "mirror_start_s": round(ready_s, 2),
    }


class _Trial:
    """What Ray's callback asks of a trial."""

    config: ClassVar = {"lr": 0.1}


def ray_callback(storage: Path, results: int) -> dict[str, Any]:
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    uri = default_uri(storage)
    trial: Any = _Trial()
    callback = MLflowLoggerCallback(tracking_uri=uri, experiment_name="ray")
    callback.setup()
    callback.log_trial_start(trial)
    start, cpu = time.perf_counter(), time.process_time()
    for step in range(results):
        callback.log_trial_result(step, trial, {**values(step), "training_iteration": step})
    total_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    rows = rows_in(uri, callback._trial_runs[trial])
    return {
        "results": results,
        "rows": rows,
        "rows_lost": results * METRICS - rows,
        "results_a_second": round(results / total_s, 1),
        "study_waits_ms_a_result": round(1000 * total_s / results, 3),
        "driver_cpu_s_a_1000_results": round(1000 * cpu_s / results, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=int, default=5000)
    results = parser.parse_args().results
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        ours = our_mirror(Path(first), results)
        # The start costs the same however much follows: a second, smaller study takes it out.
        small = our_mirror(Path(second), results // 10)
        per_1000 = 1000 * (ours["mirror_cpu_s_with_start"] - small["mirror_cpu_s_with_start"]) / (results * 0.9)
        ours["mirror_cpu_s_a_1000_results"] = round(per_1000, 2)
    with tempfile.TemporaryDirectory() as storage:
        rays = ray_callback(Path(storage), max(20, results // 20))
    found = {
        "metrics_a_result": METRICS,
        "mirror": ours,
        "ray_callback": rays,
        "times_faster": round(ours["results_a_second"] / rays["results_a_second"], 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip(),
        "mlflow": mlflow.__version__,
    }
    target = Path(__file__).parent / "results" / "tracking.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'':<16}{'results/s':>10}{'rows lost':>11}{'the study waits, ms a result':>30}")
    for name in ("mirror", "ray_callback"):
        side = found[name]
        waits = side["study_waits_ms_a_result"]
        print(f"{name:<16}{side['results_a_second']:>10}{side['rows_lost']:>11}{waits:>30}")
    print(f"{found['times_faster']} times; {ours['mirror_cpu_s_a_1000_results']} CPU s a 1000 results, in the mirror")


if __name__ == "__main__":
    main()
