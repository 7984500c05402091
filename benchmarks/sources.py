"""Log lines a second on one core: tune_ssim.records.readers against the loop one would write, side by side.

    python benchmarks/sources.py [--rows 100000] [--repeats 5] [--large 5000000]

The other loop reads the same file line by line with json.loads, csv.DictReader or a compiled regular expression and
makes the same records; it merges nothing, follows nothing and ends at the first bad line. Both take turns; the best of
the repeats counts, in CPU time. Then a JSONL log of `--large` lines is read in a process of its own, for its memory.
Writes benchmarks/results/sources.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tune_ssim.records import Record
from tune_ssim.records.readers import read_all

METRICS = ("loss", "loss_flow", "loss_ssim", "total_norm", "lr")
PATTERN = (
    r"\(step=(?P<step>\d+)\) Train Loss mse: (?P<loss_flow>\S+), Train Loss ce: (?P<loss_ce>\S+), "
    r"Train Loss ssim: (?P<loss_ssim>\S+), Train Steps/Sec: (?P<rate>\S+),"
)
OTHER_LINE = "[2025-06-01 12:00:00] INFO worker {} has read shard {} of part-00012.parquet, queue 12, 3.4 GB\n"
ONE_IN = 50  # lines of a real log that are rows; the rest is other output


def write_logs(folder: Path, rows: int) -> None:
    draw = random.Random(0)
    with (
        (folder / "rows.jsonl").open("w") as jsonl,
        (folder / "rows.csv").open("w") as table,
        (folder / "all.log").open("w") as dense,
        (folder / "few.log").open("w") as sparse,
    ):
        table.write(",".join(("step", *METRICS)) + "\n")
        for step in range(rows):
            values = {name: draw.random() for name in METRICS}
            jsonl.write(json.dumps({"step": step, **values}) + "\n")
            table.write(",".join(map(repr, (step, *values.values()))) + "\n")
            line = (
                f"[2025-06-01 12:00:00] (step={step:07d}) Train Loss mse: {values['loss']:.4f}, Train Loss ce: {values['lr']:.4f}, "
                f"Train Loss ssim: {values['loss_ssim']:.4f}, Train Steps/Sec: 0.08, \n"
            )
            dense.write(line)
            sparse.write(OTHER_LINE.format(step % 8, step) if step % ONE_IN else line)


def naive_jsonl(path: Path) -> Iterator[Record]:
    with path.open() as file:
        for line in file:
            row = json.loads(line)
            yield Record(row.pop("step"), {name: float(value) for name, value in row.items()})


def naive_csv(path: Path) -> Iterator[Record]:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            yield Record(int(row.pop("step")), {name: float(value) for name, value in row.items() if value})


def naive_text(path: Path) -> Iterator[Record]:
    pattern = re.compile(PATTERN)
    with path.open() as file:
        for line in file:
            found = pattern.search(line)
            if found:
                row = found.groupdict()
                yield Record(int(row.pop("step")), {name: float(value) for name, value in row.items()})


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Path], Iterator[Record]] | None]] = {
    "jsonl": ("rows.jsonl", {}, naive_jsonl),
    "csv": ("rows.csv", {}, naive_csv),
    "text, every line a row": ("all.log", {"pattern": PATTERN}, naive_text),
    f"text, one line in {ONE_IN}": ("few.log", {"pattern": PATTERN}, naive_text),
    "bagel, every line a row": ("all.log", {"pattern": "bagel"}, None),
    f"bagel, one line in {ONE_IN}": ("few.log", {"pattern": "bagel"}, None),
}


def cpu_s(read: Callable[[], Iterator[Record]]) -> tuple[float, int]:
    start = time.process_time()
    records = sum(1 for _ in read())
    return time.process_time() - start, records


def compare(folder: Path, rows: int, repeats: int) -> dict[str, Any]:
    found = {}
    for case, (name, options, naive) in CASES.items():
        path = folder / name
        ours, theirs, counts = [], [], set()
        for _ in range(repeats):
            seconds, count = cpu_s(lambda path=path, options=options: read_all(path, **options))
            ours.append(seconds)
            counts.add(count)
            if naive is not None:
                seconds, count = cpu_s(lambda path=path, naive=naive: naive(path))
                theirs.append(seconds)
                counts.add(count)
        assert len(counts) == 1, f"{case}: different numbers of records: {counts}"
        found[case] = {
            "records": counts.pop(),
            "lines_a_second": round(rows / min(ours)),
            "naive_lines_a_second": round(rows / min(theirs)) if theirs else None,
        }
    return found


# VmHWM and not ru_maxrss: that one a process inherits from its parent.
LARGE = """
import re, sys, time
from pathlib import Path
from tune_ssim.records.readers import read_all

def peak_kb():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak_kb()
start = time.process_time()
records = sum(1 for _ in read_all(sys.argv[1]))
print(records, time.process_time() - start, peak_kb() - before)
"""


def large(folder: Path, lines: int) -> dict[str, Any]:
    path = folder / "large.jsonl"
    with path.open("w") as file:
        for step in range(lines):
            values = f'"loss": 0.4{step}, "loss_flow": 0.3, "loss_ssim": 0.51, "total_norm": 1.25, "lr": 2.5e-06'
            file.write(f'{{"step": {step}, {values}}}\n')
    megabytes = path.stat().st_size / 1e6
    told = subprocess.run([sys.executable, "-c", LARGE, str(path)], capture_output=True, text=True, check=True).stdout.split()
    path.unlink()
    assert int(told[0]) == lines
    return {
        "lines": lines,
        "file_mb": round(megabytes),
        "lines_a_second": round(lines / float(told[1])),
        "memory_mb_beyond_the_imports": round(int(told[2]) / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", type=int, default=5_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_logs(folder, arguments.rows)
        cases = compare(folder, arguments.rows, arguments.repeats)
        big = large(folder, arguments.large)
    found = {
        "rows": arguments.rows,
        "metrics_a_row": len(METRICS),
        "cases": cases,
        "large_jsonl": big,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip(),
    }
    target = Path(__file__).parent / "results" / "sources.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'':<26}{'lines/s':>10}{'naive loop':>12}")
    for case, row in cases.items():
        print(f"{case:<26}{row['lines_a_second']:>10}{row['naive_lines_a_second'] or '':>12}")
    print(
        f"{big['lines']} lines ({big['file_mb']} MB): {big['lines_a_second']} lines/s, "
        f"{big['memory_mb_beyond_the_imports']} MB of memory beyond the imports"
    )


if __name__ == "__main__":
    main()
