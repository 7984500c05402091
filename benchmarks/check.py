"""How fast is a log of millions of records checked, and in how much memory?

    python benchmarks/check.py [--records 5000000] [--output benchmarks/results/check.json]

A CSV of a healthy training with five rules about seven metrics is read, folded through the guards of a live trial and drawn
into curves, on one core; then its parts by themselves: reading alone, the guards alone, once a column at a time as the check does
it, once record by record as a live trial does. The same for a tenth of the log as JSONL and as printed lines. Times are of the
processor, so that other processes count little; memory is the highest of a process of its own, without the libraries it loads.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as PrintedTable
from ssim import save

from tune_ssim.cli.log_arguments import open_log
from tune_ssim.guards import Watch
from tune_ssim.guards.log_check import LogCheck, check_log
from tune_ssim.guards.rule_pack import load_rules
from tune_ssim.records import Record
from tune_ssim.records.readers import open_source
from tune_ssim.records.record_table import Table

METRICS = ("loss_flow", "kl_raw", "dino_global", "dbg/grad_flow", "dbg/flow_has_grad", "dbg/flow_trainable", "z_init/var")
FIVE = {
    "name": "five",
    "branches": {
        "flow": {
            "loss": "loss_flow", "gradient": "dbg/grad_flow", "has_grad": "dbg/flow_has_grad", "trainable": "dbg/flow_trainable",
        },
    },
    "rules": {
        "coverage": {"when": {"metric": "dbg/flow_has_grad", "over": "dbg/flow_trainable", "off": 1, "by": 0.1, "steps": 100}},
        "flow_stuck": {
            "when": [
                {"metric": "loss_flow", "trend": "not falling", "steps": 100},
                {"metric": "dbg/grad_flow", "below": 0.01, "steps": 100},
            ]
        },
        "dino_stuck": {"when": {"metric": "dino_global", "trend": "not falling", "steps": 200, "settled": 0.5}},
        "kl_rising": {"when": {"metric": "kl_raw", "trend": "rising", "steps": 200}},
        "z_var": {"when": {"metric": "z_init/var", "outside": [0.3, 1.5], "steps": 200}},
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=5_000_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "check.json")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a log, in the process of its own
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(whole(arguments.only)))
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run.csv"
        write_log(log, arguments.records)
        short = Path(folder) / "short.csv"
        write_log(short, min(arguments.records, 200_000))
        logs = [log, *(written_as(log, form, arguments.records // 10) for form in ("jsonl", "log"))]
        rows = [in_a_process_of_its_own(log) for log in logs]
        result = {"logs": rows, "parts_us_per_record": parts(short)}
    table = PrintedTable("log", "records", "log MB", "records/s", "memory of the log MB", "alerts")
    for row in rows:
        table.add_row(
            row["log"], str(row["records"]), f"{row['log_mb']:.0f}", f"{row['records_per_cpu_s']:.0f}",
            f"{row['grown_mb']:.1f}", str(row["alerts"]),
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    console.print("µs a record: " + ", ".join(f"{name} {value:.2f}" for name, value in result["parts_us_per_record"].items()))
    save(arguments.output, {"rules": len(FIVE["rules"]), "metrics": len(METRICS), **result})


def in_a_process_of_its_own(log: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--only", str(log)], check=True, capture_output=True, text=True)
    return {"log": log.suffix[1:], "log_mb": log.stat().st_size / 1e6, **json.loads(done.stdout)}


def written_as(log: Path, form: str, count: int) -> Path:
    """The first records of a CSV in another form."""
    path = log.with_suffix(f".{form}")
    with log.open() as lines, path.open("w") as file:
        next(lines)
        for line, _ in zip(lines, range(count), strict=False):
            step, *values = line.rstrip().split(",")
            if form == "jsonl":
                file.write(json.dumps({"step": int(step), **dict(zip(METRICS, map(float, values), strict=True))}) + "\n")
            else:
                file.write(f"step {step} " + " ".join(map("=".join, zip(METRICS, values, strict=True))) + "\n")
    return path


def write_log(path: Path, count: int) -> None:
    """A healthy training: every trend is there, in noise of a few percent."""
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        file.write("step," + ",".join(METRICS) + "\n")
        for start in range(0, count, 100_000):
            steps = np.arange(start, min(start + 100_000, count))
            noise = 1 + 0.05 * generator.standard_normal((5, len(steps)))
            falls = 0.3 + 0.7 * np.exp(-steps / (count / 5))
            columns = (
                steps, falls * noise[0], (5 + 15 * falls) * noise[1], falls * noise[2], 0.5 * falls * noise[3],
                np.full(len(steps), 40), np.full(len(steps), 40), 0.9 * noise[4],
            )  # fmt: skip
            np.savetxt(file, np.stack(columns, 1), fmt="%d," + ",".join(["%.6g"] * len(METRICS)))


def whole(log: str) -> dict[str, Any]:
    """The check as the command does it."""
    pack = Path(log).with_name("five.yaml")
    pack.write_text(json.dumps(FIVE))
    check_log(open_log(str(first_lines(log, 2000)), {}), packs=[pack])  # so that every library is loaded
    before, started, wall = peak_mb(), time.process_time(), time.perf_counter()
    report = check_log(open_log(log, {}), packs=[pack])
    seconds = time.process_time() - started
    return {
        "records": report.records,
        "records_per_cpu_s": report.records / seconds,
        "records_per_wall_s": report.records / (time.perf_counter() - wall),
        "peak_mb": peak_mb(),
        "grown_mb": peak_mb() - before,
        "alerts": sum(alert.times for alert in report.alerts),
        "load_average_1min": os.getloadavg()[0],
    }


def parts(log: Path) -> dict[str, float]:
    """Microseconds of the processor for a record, of each part by itself."""
    pack = load_rules(FIVE)
    parts: list[Sequence[Record]] = []
    source = open_source(log)
    seconds = {"reading": timed(lambda: parts.extend((*source.batches(), source.finish())))}
    watch = Watch(pack.rules, strict=False)
    seconds["guards by columns"] = timed(lambda: [watch.update_table(Table.of(part)) for part in parts])
    check = LogCheck([pack])
    check.guards, check.watch = (), Watch((), strict=False)
    seconds["curves"] = timed(lambda: [check.feed(part) for part in parts])
    records: list[Record] = []
    seconds["records of the columns"] = timed(lambda: records.extend(record for part in parts for record in part))
    live = Watch(pack.rules)
    seconds["guards by records"] = timed(lambda: [live.update(record) for record in records])
    assert live.state_dict()["states"] == watch.state_dict()["states"], "both must have seen the same"
    return {name: value / len(records) * 1e6 for name, value in seconds.items()}


def timed(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def first_lines(log: str, count: int) -> Path:
    path = Path(log).with_name(f"first{Path(log).suffix}")
    with Path(log).open() as file:
        path.write_text("".join(line for line, _ in zip(file, range(count), strict=False)))
    return path


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
