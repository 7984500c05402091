"""Results of an earlier version still open: `old_studies/` was written by version 0.1's `run`, `expected/` by its verbs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_cli import tune_ssim

from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.verification import file_differences, read_export

OLD = Path(__file__).parent / "old_studies"
EXPECTED = OLD / "expected"


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    for name in ("small", "quarantine.jsonl"):
        (shutil.copytree if (OLD / name).is_dir() else shutil.copy)(OLD / name, tmp_path / name)
    return tmp_path


def expected(name: str) -> Any:
    return json.loads((EXPECTED / name).read_text())


def test_trials(storage: Path) -> None:
    assert json.loads(tune_ssim("trials", "--json", cwd=storage).stdout) == expected("trials.json")
    table = [
        line.rstrip() for line in tune_ssim("trials", cwd=storage, COLUMNS="200").stdout.splitlines() if not line.startswith("next")
    ]
    assert table == (EXPECTED / "trials.txt").read_text().splitlines()


def test_quarantine(storage: Path) -> None:
    assert json.loads(tune_ssim("quarantine", "list", "--json", cwd=storage).stdout) == expected("quarantine.json")


def test_export_and_its_proof(storage: Path) -> None:
    found, before = json.loads(tune_ssim("export", "--format", "json", cwd=storage).stdout), expected("export.json")
    for exported in (found, before):
        del exported["exported_with"], exported["seals"]["exported_with"]
    assert found == before
    assert found["proof"]["unproven"] == []


def test_an_export_can_be_verified() -> None:
    assert file_differences(read_export(EXPECTED / "export.json")) == []


def test_on_a_cluster_it_needs_a_folder_that_every_node_reaches(tmp_path: Path) -> None:
    done = tune_ssim("verify", str(EXPECTED / "export.json"), "--address", "127.0.0.1:9", cwd=tmp_path, TUNE_SSIM_STORAGE="")
    assert done.returncode == 2
    assert "--address needs --storage-path: a folder that every node of the cluster reaches" in done.stderr
    done = tune_ssim("verify", str(EXPECTED / "export.json"), "--address", "127.0.0.1:9", "--storage-path", "shared", cwd=tmp_path)
    assert "--address 127.0.0.1:9: " in done.stderr and list((tmp_path / "shared").iterdir()) == []


def test_files_of_the_folder(storage: Path) -> None:
    folder, start = StudyFolder(storage / "small"), StudyFolder(storage / "small").start()
    assert start is not None and start.contents
    assert [one.trial_id for one in folder.checkpoints("trial-00")] and folder.skipped()[0].predicted_ratio > 20


def test_mlflow_is_filled_from_it(storage: Path) -> None:
    done = tune_ssim("mirror", "small", cwd=storage)
    assert done.returncode == 0, done.stderr
    runs = [trial["run_id"] for trial in json.loads(tune_ssim("trials", "--json", cwd=storage).stdout)]
    assert None not in runs and len(set(runs)) == 9
