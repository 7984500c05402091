"""Runs a short, real selection of the tests with the oldest and the newest Ray and MLflow of pyproject.toml: `make versions`.

The ranges there are what passed here. A pair of versions gets a virtual environment of its own that sees the packages of this
one, so that only Ray, MLflow and what they need differently are installed. Any other: `tests/versions.py --pair 2.58.1 3.16.1`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = ("2.55.1", "3.12.0")  # Ray, MLflow
NEWEST = ("2.60.0", "3.17.2")

# A study on Ray (also killed and resumed, with its quarantine), our search as Ray asks it, our pieces in a user's own Tuner, and
# MLflow: the mirror, its pages, its runs as logs.
STUDY = ("baselines_first_then_verdicts", "the_folder_holds_the_truth", "killed_in_the_middle", "ruined_trials_are_quarantined")
SELECTIONS = (
    ("tests/test_run_study.py", "-k", " or ".join(STUDY)),
    ("tests/test_ray_search.py", "tests/test_tracking.py", "tests/test_mlflow_source.py"),
)


def make_environment(folder: Path, ray: str, mlflow: str) -> Path:
    """The interpreter of a new virtual environment with these two versions."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.strip())
    (own / "of_this_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"ray[tune]=={ray}", f"mlflow=={mlflow}"]
    subprocess.run(install, check=True)
    return python


def passes(ray: str, mlflow: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="versions-") as folder:
        python = make_environment(Path(folder), ray, mlflow)
        show = "import ray, mlflow; print('Ray', ray.__version__, 'MLflow', mlflow.__version__, flush=True)"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([python, "-c", show], check=True, cwd=ROOT, env=environment)
        pytest = [python, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider"]
        codes = [subprocess.run([*pytest, *selection], cwd=ROOT, env=environment).returncode for selection in SELECTIONS]
        return not any(codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pair", nargs=2, action="append", metavar=("RAY", "MLFLOW"), help="instead of the oldest and the newest")
    pairs = parser.parse_args().pair or [OLDEST, NEWEST]
    results = [((ray, mlflow), passes(ray, mlflow)) for ray, mlflow in pairs]
    for (ray, mlflow), passed in results:
        print(f"Ray {ray}, MLflow {mlflow}: {'passed' if passed else 'FAILED'}")
    sys.exit(not all(passed for _, passed in results))


if __name__ == "__main__":
    main()
