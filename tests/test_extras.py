"""`pip install tune-ssim` without an extra: what works, and what is printed where a library is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tune_ssim.base.extras import EXTRA_OF

ROOT = Path(__file__).resolve().parents[1]
# The command line in an interpreter that finds none of `hidden`, which is a JSON list.
WITHOUT = """
import json, sys
from importlib.machinery import PathFinder
hidden = json.loads(sys.argv[1])
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
from tune_ssim.cli.app import main
main(sys.argv[2:])
"""


def without(hidden: list[str], arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(hidden), *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "TUNE_SSIM_STORAGE": str(folder)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


STEPS = [(step, 1 - step / 1000, 2.0 + step % 3) for step in range(1, 301)]
LOGS = {
    "run.csv": "step,loss_ssim,total_norm\n" + "".join(f"{step},{loss},{norm}\n" for step, loss, norm in STEPS),
    "run.jsonl": "".join(json.dumps({"step": s, "loss_ssim": loss, "total_norm": norm}) + "\n" for s, loss, norm in STEPS),
    "run.log": "".join(f"step {step} loss_ssim={loss} total_norm={norm}\n" for step, loss, norm in STEPS),
}


@pytest.mark.parametrize("name", LOGS)
def test_check_needs_no_extra(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LOGS[name])
    ran = without(list(EXTRA_OF), ["check", name, "--json"], tmp_path)
    assert ran.stderr.startswith("next:") or not ran.stderr, ran.stderr
    assert json.loads(ran.stdout)["records"] == len(STEPS)


@pytest.mark.parametrize("arguments", [["run", "--dry-run"], ["spaces"], ["spaces", "wide"], ["quarantine", "list"]])
def test_verbs_that_only_read_need_no_extra(tmp_path: Path, arguments: list[str]) -> None:
    ran = without(list(EXTRA_OF), arguments, tmp_path)
    assert ran.returncode == 0 and ran.stdout, ran.stderr


BUNDLED = "; for the bundled studies 'tune-ssim[all]'"


@pytest.mark.parametrize(
    ("hidden", "arguments", "line"),
    [
        (list(EXTRA_OF), ["run"], f"run needs Ray: pip install 'tune-ssim[ray]'{BUNDLED}"),
        (["ray"], ["run"], f"run needs Ray: pip install 'tune-ssim[ray]'{BUNDLED}"),
        (["torch"], ["run", "--in-process"], "run needs PyTorch: pip install 'tune-ssim[losses]'"),
        (list(EXTRA_OF), ["verify", "best.json"], f"verify needs Ray: pip install 'tune-ssim[ray]'{BUNDLED}"),
        (list(EXTRA_OF), ["preflight"], "preflight needs PyTorch: pip install 'tune-ssim[losses]'"),
        (list(EXTRA_OF), ["ui"], "ui needs MLflow: pip install 'tune-ssim[mlflow]'"),
        (list(EXTRA_OF), ["mirror"], "mirror needs MLflow: pip install 'tune-ssim[mlflow]'"),
        (list(EXTRA_OF), ["check", "mlflow:abc"], "check needs MLflow: pip install 'tune-ssim[mlflow]'"),
        (list(EXTRA_OF), ["check", "run.csv", "--picture", "x.png"], "check needs Matplotlib: pip install 'tune-ssim[pictures]'"),
    ],
)
def test_a_missing_library_is_one_line(tmp_path: Path, hidden: list[str], arguments: list[str], line: str) -> None:
    (tmp_path / "run.csv").write_text(LOGS["run.csv"])
    ran = without(hidden, arguments, tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", f"error: {line}\n")
