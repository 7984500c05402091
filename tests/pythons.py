"""Runs the tests of readers, guards, rules, studies and spaces with other versions of Python: `make pythons`.

Without torch, Ray and MLflow, which take minutes and gigabytes a version: all of it is tested with the Python of the main
installation. Versions that are not on this machine are named and left out. Another one: `tests/pythons.py python3.12`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUPPORTED = ("python3.10", "python3.11", "python3.12", "python3.13")
LIBRARIES = ("pytest", "pytest-timeout", "hypothesis", "packaging", "jsonschema", "pyyaml", "optuna", "tensorboardX", "matplotlib")
FILES = ("guards", "records", "record_table", "watch", "trend", "rules", "sources", "space", "study", "check", "extras")
NEEDS_TORCH = "not live_trial and not PyTorch"


def passes(python: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="pythons-") as folder:
        own = Path(folder, "bin", "python")
        subprocess.run([python, "-m", "venv", folder], check=True)
        subprocess.run([own, "-m", "pip", "install", "-q", "-c", "constraints.txt", ".", *LIBRARIES], check=True, cwd=ROOT)
        subprocess.run([own, "-VV"], check=True)
        files = [f"tests/test_{name}.py" for name in FILES]
        pytest = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", NEEDS_TORCH, *files]
        return subprocess.run(pytest, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0


def main() -> None:
    results = {python: passes(python) if shutil.which(python) else None for python in sys.argv[1:] or SUPPORTED}
    words = {True: "passed", False: "FAILED", None: "not on this machine"}
    for python, passed in results.items():
        print(f"{python}: {words[passed]}")
    sys.exit(False in results.values())


if __name__ == "__main__":
    main()
