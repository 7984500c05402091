"""Studies submitted over Ray Jobs: what is sent, and a real one to a Ray with a token."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_studies import ARGUMENTS, LOSS, study
from ruamel.yaml import YAML
from small_studies import SMALL

from tune_ssim.base.errors import UserError
from tune_ssim.cli.app import cli
from tune_ssim.orchestration.ray_cluster import own_temporary_folder
from tune_ssim.orchestration.submitted import ship
from tune_ssim.study.study import Study, load_study
from tune_ssim.trials.command.process import free_port

TESTS = Path(__file__).parent


def study_file(folder: Path, **changes: object) -> Path:
    """The small task as a user has it: a study, its module and what that imports, in one folder."""
    (folder / "helpers").mkdir()
    (folder / "helpers" / "__init__.py").touch()
    (folder / "helpers" / "marks.py").write_text("MARK = 1\n")
    (folder / "small_task.py").write_text("import helpers.marks\n" + (TESTS / "small_task.py").read_text().replace("from __f", "#"))
    (folder / "images").mkdir()
    (folder / "images" / "large.bin").write_bytes(b"0")
    (folder / "unused.py").touch()
    with (folder / "study.yaml").open("w") as file:
        YAML().dump({key: value for key, value in (SMALL | changes).items() if key != "import_path"}, file)
    return folder / "study.yaml"


def sent(given: Study, folder: Path) -> list[str]:
    folder.mkdir()
    ship(given, folder)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_study_is_sent_with_its_code_and_without_its_data(tmp_path: Path) -> None:
    file = study_file(tmp_path)
    original = load_study(file)
    assert sent(original, tmp_path / "sent") == ["helpers/__init__.py", "helpers/marks.py", "small_task.py", "study.yaml"]
    arrived = load_study(tmp_path / "sent" / "study.yaml")
    assert arrived.import_path == str(tmp_path / "sent") and arrived.sha256 == original.sha256


def test_a_command_is_sent_with_its_script_and_settings(tmp_path: Path) -> None:
    for name in ("step.py", "base.yaml", "start.pt"):
        (tmp_path / name).touch()
    (tmp_path / "images").mkdir()
    arguments = (*ARGUMENTS, "--config=base.yaml", "--from=start.pt")
    given = study(tmp_path, "import step", arguments, task={"records": {"pattern": LOSS}, "data": ["images"], "cwd": None})
    assert sent(load_study(given | {"import_path": str(tmp_path)}), tmp_path / "sent") == [
        "base.yaml",
        "step.py",
        "study.yaml",
        "train.py",
    ]


def test_a_bundled_study_needs_no_code(tmp_path: Path) -> None:
    assert sent(load_study(None), tmp_path / "sent") == ["study.yaml"]


def test_code_outside_the_studys_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "outside.py").touch()
    (tmp_path / "inner").mkdir()
    given = study(tmp_path / "inner", "", (*ARGUMENTS, "../outside.py"), task={"records": {"pattern": LOSS}, "cwd": None})
    with pytest.raises(UserError, match=r"outside\.py: outside .*inner, so it cannot be sent"):
        ship(load_study(given | {"import_path": str(tmp_path / "inner")}), tmp_path)


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["status", "--address", "http://127.0.0.1:1"])
    assert isinstance(result.exception, UserError)
    assert re.fullmatch(r"--address http://127\.0\.0\.1:1: Failed to connect to Ray.*", str(result.exception))


def test_a_local_ray_has_a_folder_that_no_other_user_can_enter(tmp_path: Path) -> None:
    folder = own_temporary_folder(tmp_path)
    assert own_temporary_folder(tmp_path) == folder and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(UserError, match="must be a folder of yours with mode 700"):
        own_temporary_folder(tmp_path)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The dashboard of a Ray with a token of its own."""
    pytest.importorskip("aiohttp_cors", reason="Ray Jobs need ray[default]")
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    dashboard, client = free_port("127.0.0.1"), free_port("127.0.0.1")
    ports = ["--port=0", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0"]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", *ports]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*start, f"--temp-dir={folder}/r"], stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not (folder / "r" / "ray_current_cluster").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder)


@pytest.mark.e2e  # half a minute: what is sent is tested above
def test_a_submitted_study_runs_is_followed_and_stopped(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = study_file(tmp_path, search={"trials": 1, "seed": 0}, baseline={"seeds": 1})

    def call(*words: str) -> str:
        """In a process of its own: Ray reads the token once per process."""
        command = [sys.executable, "-m", "tune_ssim", *words, "--address", head]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200).stdout

    assert "submitted small as small-" in call("submit", str(file), "--storage-path", str(tmp_path / "shared"))
    output = call("logs", "small", "--follow")
    assert "2/2" in output and "token authentication is on" in output
    (job,) = json.loads(call("status", "--json"))
    assert (job["study"], job["storage"]) == ("small", str(tmp_path / "shared"))
    assert len((tmp_path / "shared" / "small" / "trials.jsonl").read_text().splitlines()) == 2
    assert "had ended already" in call("stop", "small")
    assert call("logs", "other") == f"error: --address {head}: no such submitted study: other; there are: small\n"
    call("submit", str(file), "--storage-path", str(tmp_path / "shared"), "--name", "second")
    assert "stopping" in call("stop", "second")

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert call("status").startswith(f"error: --address {head}: the token is missing or wrong: set RAY_AUTH_MODE=token")
