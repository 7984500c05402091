"""What an installation costs: seconds and MB of a fresh virtual environment, for each extra.

    python benchmarks/install.py ['' losses ray mlflow pictures fundus all]   # '' is the package without an extra, the default

Installs this checkout with pip, versions from constraints.txt, then runs `tune-ssim check` on a CSV there. MB are those of the
environment less what a new one has (pip). Seconds depend on the registry and the network; a second run is served from pip's cache.
Writes benchmarks/results/install.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "install.json"


def megabytes(folder: Path) -> float:
    files = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_blocks * 512 for file in files) / 1e6


def measure(extra: str) -> dict[str, float | str]:
    with tempfile.TemporaryDirectory(prefix="install-") as folder:
        environment, log = Path(folder, "venv"), Path(folder, "run.csv")
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        empty, began_s = megabytes(environment), time.perf_counter()
        pip = [environment / "bin" / "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, f"{ROOT}[{extra}]" if extra else ROOT], check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - began_s
        log.write_text("step,loss_ssim,total_norm\n" + "".join(f"{step},{1 - step / 1000},2.5\n" for step in range(300)))
        command = [environment / "bin" / "tune-ssim", "check", log, "--json"]
        report = json.loads(subprocess.run(command, capture_output=True, check=False, cwd=folder).stdout)
        assert report["records"] == 300, report
        return {"extra": extra, "seconds": round(seconds, 1), "MB": round(megabytes(environment) - empty, 1)}


def main() -> None:
    rows = [measure(extra) for extra in sys.argv[1:] or [""]]
    for row in rows:
        name = f"tune-ssim[{row['extra']}]" if row["extra"] else "tune-ssim"
        print(f"{name:24} {row['seconds']:6} s {row['MB']:7} MB")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    RESULTS.write_text(json.dumps({"machine": machine, "commit": commit, "installs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
