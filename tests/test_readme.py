"""What the README and the pages about a study tell people to type, typed. The bundled study is run once, for real."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tune_ssim.study.study import load_study

pytestmark = pytest.mark.timeout(1500)  # the first test runs the main job: five minutes on two quiet cores
ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/study.md", "docs/own_training.md", "docs/own_command.md", "docs/objective.md")
BLOCKS = [block for page in PAGES for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)]
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith((".venv", "python3"))]
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e "


def argv(line: str) -> list[str]:
    """A README line as this environment runs it."""
    words = shlex.split(line)
    if words[0] == ".venv/bin/tune-ssim":
        return [sys.executable, "-m", "tune_ssim", *words[1:]]
    assert words[0] == ".venv/bin/python", line
    return [sys.executable, *(str(ROOT / word) if word.startswith("examples/") else word for word in words[1:])]


def call(line: str, folder: Path, timeout_s: int = 1400) -> subprocess.CompletedProcess[str]:
    # local: not the cluster that another test may have started on this machine, and may end any time
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    return subprocess.run(argv(line), cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job, as pasted, less its installation (which is how this test came to run)."""
    folder = tmp_path_factory.mktemp("newcomer")
    (line,) = [line for line in LINES if line.startswith(INSTALL) and line.endswith("tune-ssim run")]
    ran = call(line.removeprefix(f"{INSTALL}'.[all]' && "), folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    return folder


@pytest.fixture(scope="module")
def trials(study: Path) -> list[dict[str, Any]]:
    listed = call(".venv/bin/tune-ssim trials --json", study)
    assert listed.returncode == 0, listed.stderr
    found: list[dict[str, Any]] = json.loads(listed.stdout)
    return found


def test_every_command_of_the_readme_is_known_here() -> None:
    assert len(LINES) == len(set(LINES)) >= 10
    verbs = {words[1] for line in LINES if (words := shlex.split(line))[0].endswith("tune-ssim")}
    assert verbs == {
        "trials",
        "report",
        "export",
        "verify",
        "preflight",
        "calibrate",
        "recommend",
        "spaces",
        "run",
        "quarantine",
        "ui",
        "mirror",
    }


@pytest.mark.parametrize("page", ["README.md", "docs/own_training.md", "docs/own_command.md", "docs/objective.md"])
def test_every_study_that_is_shown_can_be_read(page: str, tmp_path: Path) -> None:
    """A part of a study is read within a whole one."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        file = tmp_path / "study.yaml"
        file.write_text(block if "name:" in block.splitlines()[0] else f"name: part\n{block}")
        load_study(file)


def test_the_study_shows_what_it_is_for(trials: list[dict[str, Any]]) -> None:
    by_id = {trial["trial_id"]: trial for trial in trials}
    roles = [trial["role"] for trial in trials]
    assert roles.count("baseline") >= 3 and roles.count("search") >= 4 and roles.count("confirm") >= 2
    assert all(trial["verdict"] == "safe" for trial in trials if trial["role"] == "baseline")
    for name in ("norm_ratio", "smoke_test"):
        demonstration = by_id["demo-norm_guard" if name == "norm_ratio" else "demo-smoke_test"]
        assert demonstration["verdict"] == "pruned" and demonstration["evidence"]["guard"] == name
        assert demonstration["steps"] == demonstration["evidence"]["step"]
    better = [t for t in trials if t["verdict"] == "safe" and t["role"] == "search" and t["metrics"]["delta_ssim"] > 0.001]
    assert any(trial["metrics"]["delta_psnr"] >= -0.3 for trial in better)
    spent = sum(trial["steps"] for trial in trials if trial["role"] == "search" and not trial["trial_id"].startswith("demo-"))
    assert spent <= 5 * 200  # twelve trials would be 2400


def test_the_exported_setting_is_a_safe_one_in_every_format(study: Path, trials: list[dict[str, Any]]) -> None:
    lines = [line for line in LINES if "export" in line]
    assert len(lines) == 3  # two formats, and the training
    environment = call(lines[0], study)
    values = dict(line.split("=", 1) for line in environment.stdout.split())
    assert {"SSIM_LOSS_WEIGHT", "SSIM_LOSS_MAX_T", "SSIM_GRAD_SCALE", "EXP_NAME"} <= set(values)
    assert call(lines[1], study).returncode == 0
    exported = json.loads((study / "best.json").read_text())
    assert exported["config"]["ssim_loss_weight"] == float(values["SSIM_LOSS_WEIGHT"])
    assert exported["trial_id"] in {trial["trial_id"] for trial in trials if trial["verdict"] == "safe"}


@pytest.mark.e2e  # the confirm phase of the study compares both on new seeds
def test_the_exported_setting_beats_the_baseline_on_a_new_seed(study: Path) -> None:
    export, train = [line for line in LINES if "export" in line][1:]
    assert call(export, study).returncode == 0
    trained = call(train, study)
    gains = re.findall(r"seed \d+: SSIM ([-+.\d]+), PSNR ([-+.\d]+)", trained.stdout)
    assert len(gains) == 1, trained.stderr
    assert all(float(by_ssim) > 0 and float(by_psnr) > -0.3 for by_ssim, by_psnr in gains), trained.stdout


def test_the_export_is_proven(study: Path) -> None:
    assert call(next(line for line in LINES if "-o best.json" in line), study).returncode == 0
    proof = json.loads((study / "best.json").read_text())["proof"]
    assert proof["unproven"] == [] and proof["preflight"]["status"] == "ok" and proof["calibration"]["ratios"]
    low, _ = proof["comparison"]["delta_ssim"]["interval"]
    assert low > 0


@pytest.mark.e2e  # test_run_study.py verifies a smaller study
def test_the_export_can_be_verified(study: Path) -> None:
    (line,) = [line for line in LINES if "verify" in line]
    assert call(next(line for line in LINES if "-o best.json" in line), study).returncode == 0
    verified = call(line, study)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "hold" in verified.stdout


def test_mlflow_shows_the_study_to_its_own_client(study: Path, trials: list[dict[str, Any]]) -> None:
    import mlflow

    assert call(".venv/bin/tune-ssim mirror", study).returncode == 0
    client = mlflow.MlflowClient(f"sqlite:///{study / 'tune_ssim_results' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.data.tags["tune_ssim.trial_id"]: run for run in runs if run is not parent}
    assert set(children) == {trial["trial_id"] for trial in trials}
    status = {"pruned": "KILLED", "safe": "FINISHED", "degraded": "FINISHED", "stopped": "FINISHED"}
    for trial in trials:
        run = children[trial["trial_id"]]
        assert run.info.run_id == trial["run_id"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (run.info.status, run.data.tags["verdict"]) == (status[trial["verdict"]], trial["verdict"])
        assert run.data.tags["reason"] == trial["reason"]
        norms = client.get_metric_history(run.info.run_id, "total_norm")
        assert [metric.step for metric in norms] == list(range(1, trial["steps"] + 1))
    assert any("smoke" in artifact.path for artifact in client.list_artifacts(children["baseline-0"].info.run_id))
    assert "best gain" in parent.data.tags["mlflow.note.content"]


def test_the_ui_prints_a_link_that_answers_on_loopback(study: Path) -> None:
    line = next(line for line in LINES if line.endswith("tune-ssim ui"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(
        argv(line), cwd=study, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        link = next(found for text in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+/#\S+", text)))
        address = link.group().split("#")[0]
        with urllib.request.urlopen(f"{address}health", timeout=30) as answer:
            assert answer.status == 200
    finally:
        os.kill(server.pid, signal.SIGINT)
        assert server.wait(30) == 0


OTHERS = r"tune-ssim (trials|report|spaces|preflight|calibrate|quarantine|run .*--dry-run)"


@pytest.mark.parametrize("line", [line for line in LINES if re.search(OTHERS, line)])
def test_the_other_lines_answer(study: Path, line: str) -> None:
    ran = call(line, study)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr


@pytest.fixture(scope="module")
def own_tuner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.CompletedProcess[str]]]:
    folder = tmp_path_factory.mktemp("own")
    (line,) = [line for line in LINES if "own_tuner" in line]
    yield folder, call(f"{line} 2 40", folder)


@pytest.mark.e2e  # test_ray_search.py and test_tracking.py run each piece in a Tuner
def test_every_piece_works_in_a_tuner_of_ones_own(own_tuner: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, ran = own_tuner
    assert ran.returncode == 0, ran.stderr
    verdicts = re.findall(r"^(safe|degraded|pruned) ", ran.stdout, re.M)
    assert len(verdicts) == 4, ran.stdout + ran.stderr
    (baseline,) = (folder / "own_tuner_results" / "baseline").glob("*.json")
    assert json.loads(baseline.read_text())["runs"][0]["seed"] == 0
