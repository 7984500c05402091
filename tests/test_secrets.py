"""A password of the tracking server stands in no byte that a study leaves, and in no argument of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_studies import SMALL
from test_cli import tune_ssim
from test_in_process import small

from tune_ssim.cli.exit_codes import bug_report
from tune_ssim.results.study_folder import StudyFolder

SECRET = "hunter2-in-the-uri"
URI = f"http://ada:{SECRET}@127.0.0.1:9"  # the discard port: nothing listens
ENVIRONMENT = {"MLFLOW_TRACKING_PASSWORD": "hunter2-in-the-environment", "MLFLOW_TRACKING_USERNAME": "ada"}


def files_with(words: bytes, folder: Path) -> list[Path]:
    """Files with these words in their content or name."""
    return [
        file for file in folder.rglob("*") if words in os.fsencode(file.name) or (file.is_file() and words in file.read_bytes())
    ]


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"\0hunter2\0")
    assert files_with(b"hunter2", tmp_path) == [tmp_path / "deep" / "file"]


@pytest.mark.e2e  # that a URI is written without its password is tested in test_tracking.py
def test_no_file_of_a_study_has_a_password(tmp_path: Path) -> None:
    """The results folder, exports, MLflow's database and artifacts, a trial's traceback and all output."""
    storage, source = tmp_path / "storage", tmp_path / "source"
    storage.mkdir(), source.mkdir()
    study = source / "small.yaml"
    changes = {"task_config": {**SMALL["task_config"], "fault": "raise_when_strong"}, "tracking": {"uri": URI}}
    text = small(**changes, search={"trials": 3, "concurrency": 2}, baseline={"seeds": 1}).to_yaml()
    assert SECRET not in text  # what is resolved has none; the user's own file has it
    study.write_text(text.replace("//ada@", f"//ada:{SECRET}@"))
    assert SECRET in study.read_text()
    output = ""
    for arguments in (
        ["run", str(study), "--in-process"],
        ["run", "--resume", "--in-process", "--tracking-uri", URI],
        ["trials", "--json"],
        ["export", "--unproven", "-o", str(storage / "best.yaml")],
        ["mirror", "--tracking-uri", f"sqlite:///{storage}/mlflow.db"],
    ):
        done = tune_ssim(*arguments, cwd=storage, **ENVIRONMENT)
        assert done.returncode in (0, 2), done.stderr
        output += done.stdout + done.stderr
    assert (storage / "mlflow.db").exists() and any((storage / "mlartifacts").rglob("study.yaml"))
    assert any((storage / "small/errors").iterdir())
    assert "hunter2" not in output
    assert files_with(b"hunter2", storage) == []


def test_a_crash_file_has_no_password(tmp_path: Path) -> None:
    try:
        raise RuntimeError(f"no connection to {URI}")
    except RuntimeError as error:
        assert "hunter2" not in bug_report(error, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and files_with(b"hunter2", tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc: arguments of processes are not visible here")
def test_no_process_has_a_password_in_its_arguments(tmp_path: Path) -> None:
    """Of the mirror and of MLflow's own server, whose database may have one."""
    folder = StudyFolder(tmp_path / "small").create()
    folder.study_file.write_text("name: small\n")
    program = (
        "import sys, time; from pathlib import Path; from tune_ssim.tracking.mirror import MLflowMirror\n"
        "from tune_ssim.results.study_folder import StudyFolder; from tune_ssim.tracking.mlflow_ui import serve_ui\n"
        "MLflowMirror(StudyFolder(Path(sys.argv[1])), sys.stdin.readline().strip()).start()\n"
        "uri = f'sqlite:///{sys.argv[1]}/hunter2.db'\n"
        "serve_ui(Path(sys.argv[1]).parent, uri, port=5700)\n"
    )
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen([sys.executable, "-c", program, str(folder.path)], stdin=subprocess.PIPE, env=environment, text=True)
    try:
        assert process.stdin is not None
        process.stdin.write(URI + "\n")
        process.stdin.flush()
        seen: set[str] = set()
        ends = time.monotonic() + 100
        while time.monotonic() < ends and not any("mlflow server" in line for line in seen):
            seen |= arguments_of_descendants(process.pid)
            time.sleep(0.1)
        assert any("mirror_process" in line for line in seen) and any("mlflow server" in line for line in seen)
        assert not [line for line in seen if "hunter2" in line and "serve_ui" not in line]
    finally:
        process.terminate()
        process.wait(30)


def arguments_of_descendants(pid: int) -> set[str]:
    found, left = set(), [str(pid)]
    while left:
        parent = left.pop()
        try:
            found.add(Path(f"/proc/{parent}/cmdline").read_bytes().replace(b"\0", b" ").decode())
            left += Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            pass
    return found
