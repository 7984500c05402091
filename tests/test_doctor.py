"""Clusters that are not fit for a study, and what `doctor` and `run` say of them."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from small_studies import SMALL
from two_hosts import two_hosts

import tune_ssim
from tune_ssim.base.errors import UserError
from tune_ssim.cli.app import exit_code
from tune_ssim.orchestration import doctor
from tune_ssim.orchestration.node_facts import facts_of_node
from tune_ssim.study.study import Study, load_study

TESTS = Path(__file__).parent


def small(**changes: Any) -> Study:
    return load_study({**SMALL, **changes})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_a_sound_cluster(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings, nodes = doctor.examine_connected(small(search={"trials": 1}), tmp_path, None)
    assert [one.sentence for one in findings if one.level == "problem"] == []
    assert list(tmp_path.iterdir()) == [], "nothing is left in the storage path"
    (facts,) = nodes.values()
    assert facts["storage"]["is_shared"] and facts["code"] and facts["task_code"] and facts["cpus"] == 1
    assert exit_code(["doctor", "--json", "--storage-path", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["nodes"]


def test_a_trial_that_no_node_can_hold(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a trial needs 64 CPUs .* or no trial ever starts"):
        doctor.require_fit(small(resources={"cpus": 64}), tmp_path, None)


def test_an_open_cluster_is_refused_unless_it_is_allowed(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "auth_token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setattr(doctor, "token_authentication", lambda: False)
    with pytest.raises(UserError, match=r"token authentication is off.*TUNE_SSIM_OPEN_CLUSTER=1"):
        doctor.require_fit(small(), tmp_path, None)
    monkeypatch.setenv("TUNE_SSIM_OPEN_CLUSTER", "1")
    said = doctor.require_fit(small(), tmp_path, None)
    assert any("authentication is off" in line for line in said)
    assert any(line.endswith(f"chmod 600 {token}") for line in said)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    storage = tmp_path_factory.mktemp("storage")
    (storage / "marker").touch()
    return {**facts_of_node(str(storage), "marker", str(TESTS), False), "cpus": 1.0, "gpus": 0.0, "skew_s": 0.0}


@pytest.mark.parametrize(
    ("place", "value", "level", "words"),
    [
        (("versions", "ray"), "2.55.0", "problem", "ray 2.55.0 there"),
        (("versions", "python"), "3.9.1", "problem", "python 3.9.1 there"),
        (("versions", "torch"), "2.0", "warning", "torch 2.0 there"),
        (("versions", "torch"), None, "problem", "torch is missing there"),
        (("code",), "other", "problem", "the same version but other code"),
        (("task_code",), "other", "problem", "the task's code differs"),
        (("task_code",), None, "problem", "folder of the task's code is missing"),
        (("storage", "is_shared"), False, "problem", "is not seen there; put --storage-path on a file system that all nodes share"),
        (("storage", "error"), "Permission denied", "problem", "cannot be written there: Permission denied"),
        (("storage", "lock_s"), 4.2, "warning", "takes 4.2 s"),
        (("storage", "free"), 10**8, "warning", "has 0.1 GB left"),
        (("free", "/dev/shm"), 64 * 2**20, "warning", "/dev/shm has 0.1 GB left"),
        (("skew_s",), 90.0, "warning", "its clock is 90 s off"),
        (("open_files",), 1024, "warning", "ulimit -n 65536"),
        (("cuda",), "torch 2.13.0 is built for CPUs only", "problem", "built for CPUs only"),
        (("has_nvidia",), True, "warning", "a GPU that Ray does not offer"),
        (("error",), "no answer within 30 s", "problem", "no answer within 30 s"),
    ],
)
def test_faults_of_a_node(mine: dict[str, Any], place: tuple[str, ...], value: Any, level: str, words: str) -> None:
    roomy = {**mine, "free": {"/tmp": 10**12, "/dev/shm": 10**10}, "open_files": 65536, "has_nvidia": False}
    roomy["storage"] = {**mine["storage"], "free": 10**12}
    facts = copy.deepcopy(roomy)
    inner = facts
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    assert list(doctor._of_node("node a", roomy, roomy, Path("/shared"))) == []
    (finding,) = doctor._of_node("node a", facts, roomy, Path("/shared"))
    assert finding.level == level and words in finding.sentence
    if place[0] in ("versions", "code", "task_code"):  # a head without CPUs runs no trial
        assert list(doctor._of_node("node a", {**facts, "cpus": 0.0}, roomy, Path("/shared"))) == []


def test_a_tracking_server_that_is_not_there() -> None:
    (finding,) = doctor._tracking("http://user:secret@127.0.0.1:9")
    assert finding.level == "warning" and "cannot be reached" in finding.text and "secret" not in finding.sentence
    assert list(doctor._tracking("sqlite:///mlflow.db")) == []


@pytest.mark.e2e
def test_storage_and_code_that_differ_on_a_second_host(tmp_path: Path) -> None:
    storage, other = tmp_path / "storage", tmp_path / "other" / "tune_ssim"
    storage.mkdir()
    shutil.copytree(Path(tune_ssim.__file__).parent, other)
    with (other / "version.py").open("a") as file:
        file.write("# changed\n")
    with two_hosts(tmp_path / "hosts") as hosts:
        hosts.start(hides=storage, PYTHONPATH=str(other.parent))
        environment = {**hosts.head.environment, "PYTHONPATH": str(TESTS.parent)}
        for verb in ("doctor", "run"):
            command = [sys.executable, "-m", "tune_ssim", verb, "--storage-path", str(storage), "--address", hosts.address]
            ran = subprocess.run(
                hosts.head.argv(*command), env=environment, cwd="/", capture_output=True, text=True, timeout=200, check=False
            )
            assert ran.returncode == {"doctor": 3, "run": 2}[verb], ran.stderr
            assert f"a file written to {storage} here is not seen there" in ran.stderr
            assert "tune_ssim has the same version but other code there" in ran.stderr
            assert "Traceback" not in ran.stderr + ran.stdout
