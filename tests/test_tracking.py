"""MLflow is a replay of the study's events: nothing twice, nothing lost, nothing of it in the study's way."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tune_ssim.results.events import EventWriter, gain, numbers_of
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.study import load_study
from tune_ssim.tracking.leaderboard import plain
from tune_ssim.tracking.mirror import (
    MLflowMirror,
    default_uri,
    mirror_study,
    process_environment,
    read_state,
    run_ids,
    state_file,
)
from tune_ssim.tracking.mlflow_internals import runs_page
from tune_ssim.tracking.mlflow_ui import _end, _free_port, _wait_until_it_answers
from tune_ssim.tracking.replay import Replay
from tune_ssim.trials.summary import TrialSummary

DEAD = "http://127.0.0.1:9"  # the discard port: nothing listens
CONFIG = {"ssim_loss_weight": 10.0, "ssim_loss_max_t": 0.3, "ssim_grad_scale": 0.1}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database of MLflow's with its tables, made once: that alone takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return f"sqlite:///{path}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, database: str) -> Iterator[str]:
    """A real server on loopback, with a database of its own."""
    folder = tmp_path_factory.mktemp("server")
    copy = folder / "mlflow.db"
    copy.write_bytes(Path(database.removeprefix("sqlite:///")).read_bytes())
    port = _free_port("127.0.0.1", 5610)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{copy}", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        command,
        env={**process_environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # eight processes that nothing here needs
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_until_it_answers(process, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(process)


def client(uri: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def png() -> bytes:
    file = BytesIO()
    Image.radial_gradient("L").resize((32, 32)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def summary(trial_id: str, verdict: str = "safe", reason: str = "", **more: Any) -> dict[str, Any]:
    return {
        "trial_id": trial_id,
        "run_id": None,
        "role": "search",
        "config": CONFIG,
        "verdict": verdict,
        "reason": reason or f"because it is {verdict}",
        "horizon": {"steps": 20, "batch_size": 8, "lr": 0.005},
        "evidence": None,
        "steps": 20,
        "metrics": {"ssim": 0.7, "delta_ssim": 0.0084, "psnr": 19.2, "norm_ratio_max": 2.5},
        **more,
    }


def write_study(folder: StudyFolder, steps: int = 20) -> EventWriter:
    """Two baselines, a safe and a pruned trial, and one in an error."""
    folder.create()
    folder.study_file.write_text("name: small\n")
    events = EventWriter(folder)
    events.study_started(folder.name, "0" * 64, "A *small* study.")
    events.file("study.yaml")
    for trial_id, role in (("b0", "baseline"), ("good", "search"), ("bad", "search"), ("broken", "search")):
        events.trial_started(trial_id, role, {**CONFIG, "seed": 0})
        for step in range(0, steps, 2):
            rows = [[s, {"loss": 1.0 / (1 + s), "total_norm": 2.0 * s}] for s in (step, step + 1)]
            events.result(trial_id, {"records": rows})
    events.image("good", 0, png())
    events.verdict("b0", summary("b0", role="baseline", metrics={"ssim": 0.69}))
    events.verdict("good", summary("good"), {**CONFIG, "ssim_loss_max_t": 0.2, "lr": 0.005})
    evidence = {"guard": "norm_ratio", "step": 12, "metric": "total_norm", "value": 30.0, "limit": 10.0}
    events.verdict("bad", summary("bad", "pruned", evidence=evidence, metrics={"norm_ratio_max": math.inf}))
    events.verdict("broken", summary("broken", "error", metrics={}))
    events.study_ended("all trials done")
    return events


def write_several_objectives(folder: StudyFolder) -> None:
    folder.create()
    folder.study_file.write_text("name: several\nobjective: {maximize: delta_ssim, also: [{maximize: delta_psnr}]}\n")
    events = EventWriter(folder)
    events.study_started(folder.name, "0" * 64)
    for n, (ssim, psnr) in enumerate([(0.008, 0.1), (0.002, 0.4), (0.001, 0.1)]):
        found = summary(f"t{n}", config={**CONFIG, "lr": n}, metrics={"delta_ssim": ssim, "delta_psnr": psnr})
        folder.add_trial(TrialSummary.from_dict(found))
        events.trial_started(f"t{n}", "search", found["config"])
        events.verdict(f"t{n}", found)
    events.study_ended("done")


def runs_of(uri: str, folder: StudyFolder) -> dict[str, Any]:
    """trial_id → run ("" is the parent); fails if a trial has two."""
    mlflow = client(uri)
    experiment = mlflow.get_experiment_by_name("tune_ssim")
    found: dict[str, Any] = {}
    for run in mlflow.search_runs([experiment.experiment_id], max_results=1000):
        if run.data.tags["tune_ssim.study_id"].startswith(folder.name):
            trial_id = run.data.tags.get("tune_ssim.trial_id", "")
            assert trial_id not in found, f"two runs of {trial_id!r}"
            found[trial_id] = run
    return found


def points(uri: str, run: Any, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client(uri).get_metric_history(run.info.run_id, name))


def check_study(uri: str, folder: StudyFolder, steps: int = 20) -> dict[str, Any]:
    """What `write_study` wrote is there, once."""
    runs = runs_of(uri, folder)
    assert set(runs) == {"", "b0", "good", "bad", "broken"}
    for trial_id in ("b0", "good", "bad", "broken"):
        assert runs[trial_id].data.tags["mlflow.parentRunId"] == runs[""].info.run_id
        assert points(uri, runs[trial_id], "loss") == [(step, 1.0 / (1 + step)) for step in range(steps)]
    return runs


@pytest.mark.parametrize("where", ["sqlite", "server"])
def test_what_mlflow_shows(where: str, tmp_path: Path, database: str, server: str) -> None:
    uri = database if where == "sqlite" else server
    folder = StudyFolder(tmp_path / f"shown-{where}")
    write_study(folder)
    done, status = mirror_study(folder, uri, timeout_s=60)
    assert done, status
    runs = check_study(uri, folder)
    good, bad, parent = runs["good"], runs["bad"], runs[""]

    assert [runs[key].info.status for key in ("", "b0", "good", "bad", "broken")] == [
        "FINISHED", "FINISHED", "FINISHED", "KILLED", "FAILED",
    ]  # fmt: skip
    assert good.info.run_name == "gain 1 @ t≤0.3 · safe · ΔSSIM +0.0084"
    assert bad.info.run_name == "gain 1 @ t≤0.3 · pruned by norm_ratio at 12"
    assert runs["b0"].info.run_name == "baseline seed 0 · safe"
    assert parent.info.run_name == f"shown-{where}: best gain 1 @ t≤0.3, ΔSSIM +0.0084"
    assert bad.data.tags["pruned_by"] == "norm_ratio" and bad.data.tags["verdict"] == "pruned"
    assert bad.data.tags["reason"] == "because it is pruned" and bad.data.tags["role"] == "search"
    assert good.data.params["gain"] == "1" and good.data.params["lr"] == "0.005"
    # What was in force differs from what was asked for (SEEDS B3): said, not lost.
    assert good.data.tags["in_force.ssim_loss_max_t"] == "0.2 (asked for: 0.3)"
    assert good.data.metrics["delta_ssim"] == 0.0084 and good.data.metrics["psnr"] == 19.2
    assert bad.data.tags["non_finite.norm_ratio_max"] == "Infinity first at step 20"

    mlflow = client(uri)
    assert "smoke/step_000000.png" in {item.path for item in mlflow.list_artifacts(good.info.run_id, "smoke")}
    assert {Path(item.path).suffix for item in mlflow.list_artifacts(good.info.run_id, "images")} == {".png", ".webp"}
    assert [item.path for item in mlflow.list_artifacts(parent.info.run_id)] == ["study.yaml"]
    note = parent.data.tags["mlflow.note.content"]
    assert f"runs/{good.info.run_id}" in note and "because it is pruned" in note and "A *small* study." in note
    assert note.index(good.info.run_id) < note.index(bad.info.run_id) < note.index(runs["b0"].info.run_id)

    experiment = mlflow.get_experiment(parent.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    share_key = read_state(folder, uri)["share_key"]
    assert f"mlflow.sharedViewState.{share_key}" in experiment.tags
    assert runs_page("7", "k") == "#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=k"
    assert run_ids(folder, uri)["good"] == good.info.run_id


@pytest.mark.parametrize(
    "name",
    (
        *("viewStateShareKey", "mlflow.sharedViewState", "deflate;", "runDateAndNestInfo", "viewMaximized"),
        *("workflowType", "machine_learning", "mlflow.experimentKind", "custom_model_development"),
        *("mlflow.loggedImages", "mlflow.note.content"),
    ),
)
def test_the_pages_of_this_mlflow_know_what_we_rely_on(name: str) -> None:
    """tracking/mlflow_internals.py; a version that drops one is found here, not by a user."""
    import mlflow

    scripts = Path(mlflow.__file__).parent.glob("server/js/build/**/*.js")
    assert any(name.encode() in script.read_bytes() for script in scripts)


def test_the_pareto_front_is_tagged(tmp_path: Path, database: str) -> None:
    folder = StudyFolder(tmp_path / "several")
    write_several_objectives(folder)
    replay = Replay(folder, database, "tune_ssim")
    while replay.push_chunk():
        pass
    runs = runs_of(database, folder)
    assert [runs[f"t{n}"].data.tags["pareto"] for n in range(3)] == ["front", "front", "dominated"]
    assert runs["t1"].data.metrics["delta_psnr"] == 0.4
    assert "| ΔSSIM | ΔPSNR |" in runs[""].data.tags["mlflow.note.content"]


def test_a_new_run_is_not_read_back(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of nine requests for each trial asked for parameters that the mirror itself had just sent."""
    import mlflow

    folder = StudyFolder(tmp_path / "unread")
    write_several_objectives(folder)
    get_run, read = mlflow.MlflowClient.get_run, set[str]()
    monkeypatch.setattr(mlflow.MlflowClient, "get_run", lambda self, run_id: read.add(run_id) or get_run(self, run_id))
    replay = Replay(folder, database, "tune_ssim")
    while replay.push_chunk():
        pass
    assert read <= {replay.runs[""]}
    assert runs_of(database, folder)["t0"].data.params["ssim_loss_weight"] == plain(CONFIG["ssim_loss_weight"])


def test_the_parent_run_has_the_result_and_one_run_is_the_champion(tmp_path: Path, database: str) -> None:
    folder = StudyFolder(tmp_path / "summarised")
    write_several_objectives(folder)

    def mirrored() -> dict[str, Any]:
        replay = Replay(folder, database, "tune_ssim")
        while replay.push_chunk():
            pass
        return runs_of(database, folder)

    runs = mirrored()
    assert runs[""].data.params["ssim_loss_weight"] == plain(CONFIG["ssim_loss_weight"]) and "gain" in runs[""].data.params
    assert runs[""].data.metrics == {"trials/safe": 3.0, "delta_ssim": 0.008, "delta_psnr": 0.1}
    assert [name for name, run in runs.items() if run.data.tags.get("champion") == "true"] == ["t0"]

    events = EventWriter(folder)  # resumed, with a better setting that its confirmation then holds
    events.study_started(folder.name, "0" * 64)
    better = summary("t3", config={**CONFIG, "lr": 3}, metrics={"delta_ssim": 0.01, "delta_psnr": 0.2})
    again = [
        summary(f"confirm-{k}", role="confirm", seed=k, config={**CONFIG, "lr": 3}, metrics={"delta_ssim": 0.01 + k / 1e4})
        for k in (1, 2)
    ]
    for found in (better, *again):
        folder.add_trial(TrialSummary.from_dict(found))
        events.trial_started(found["trial_id"], found["role"], found["config"])
        events.verdict(found["trial_id"], found)
    events.study_ended("done")
    runs = mirrored()
    assert [name for name, run in runs.items() if run.data.tags.get("champion") == "true"] == ["t3"]
    metrics = runs[""].data.metrics
    assert metrics["trials/safe"] == 4.0 and metrics["delta_ssim"] == 0.01
    assert metrics["confirmed/delta_ssim/low"] < metrics["confirmed/delta_ssim"] < metrics["confirmed/delta_ssim/high"]
    assert runs["confirm-1"].info.run_name.startswith("confirm: gain") and "seed 1" in runs["confirm-1"].info.run_name


def test_nan_and_odd_names_and_long_texts(tmp_path: Path, database: str) -> None:
    folder = StudyFolder(tmp_path / "odd").create()
    events = EventWriter(folder)
    events.study_started("odd")
    events.trial_started("t", "search", {"text": "ü" * 9000, "nested": {"a b?": [1, 2]}, "none": None})
    odd = {"psnr (dB)": 1.0, "psnr [dB]": 2.0, "../up": 3.0, "/root": 4.0, "a//b": 5.0, "ΔSSIM": 6.0, "x" * 400: 7.0}
    rows = [[0, {"n": math.nan, "i": math.inf, "m": -math.inf, **odd}], [1, {"n": 1.0, "i": 1.0, "m": 1.0, "": 8.0}]]
    events.result("t", {"records": rows})
    events.verdict("t", summary("t", "pruned", reason="weil 毁了 | `x` " * 1000))
    done, status = mirror_study(folder, database, timeout_s=60)
    assert done and "refused" not in status, status
    run = runs_of(database, folder)["t"]
    tags = run.data.tags
    assert tags["non_finite.n"] == "NaN first at step 0"
    assert tags["non_finite.i"] == "Infinity first at step 0" and tags["non_finite.m"] == "-Infinity first at step 0"
    assert [step for step, _ in points(database, run, "n")] == [0, 1]
    # Each number is there, under a name of its own.
    assert {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0} <= set(run.data.metrics.values())
    assert run.data.metrics["ΔSSIM"] == 6.0 and len(run.data.params["text"]) == 6000
    assert len(tags["reason"]) == 5000 and tags["reason"].endswith("…")


def test_a_dead_server_is_nobodys_problem_and_is_made_up_for(tmp_path: Path, server: str) -> None:
    folder = StudyFolder(tmp_path / "dead")
    began = time.monotonic()
    mirror = MLflowMirror(folder.create(), DEAD)
    mirror.start()
    write_study(folder)
    assert time.monotonic() - began < 2  # nothing of it waited for MLflow
    while "connection refused" not in mirror.status() and time.monotonic() - began < 120:
        time.sleep(0.1)
    assert not mirror.drain(timeout_s=1)
    assert "MLflow has 0 of 52 events" in mirror.status() and "connection refused" in mirror.status()
    assert mirror_study(folder, server, timeout_s=60)[0]
    check_study(server, folder)


def test_kill_in_the_middle_then_again(tmp_path: Path, database: str) -> None:
    folder = StudyFolder(tmp_path / "killed")
    steps = 1500
    write_study(folder, steps)
    mirror = MLflowMirror(folder, database)
    mirror.start()
    ends = time.monotonic() + 60
    while read_state(folder, database)["offset"] == 0 and time.monotonic() < ends:
        time.sleep(0.005)
    assert mirror._process is not None
    os.kill(mirror._process.pid, signal.SIGKILL)
    assert mirror._process.wait() == -signal.SIGKILL
    assert 0 < read_state(folder, database)["offset"] < folder.events_file.stat().st_size
    assert mirror.drain(timeout_s=90), mirror.status()  # starts another process
    check_study(database, folder, steps)

    # The file that says how far it was is lost: everything is applied again, and changes nothing.
    state_file(folder, database).unlink()
    assert mirror_study(folder, database, timeout_s=90)[0]
    check_study(database, folder, steps)


def test_a_resumed_study_goes_on_in_its_runs(tmp_path: Path, database: str) -> None:
    folder = StudyFolder(tmp_path / "resumed").create()
    events = EventWriter(folder)
    events.study_started("resumed")
    events.trial_started("t", "search", CONFIG)
    events.result("t", {"records": [[step, {"loss": float(step)}] for step in range(10)]})
    with folder.events_file.open("ab") as file:
        file.write(b'{"event": "records", "tri')  # kill -9 in the middle of a line
    assert mirror_study(folder, database, timeout_s=60)[0]
    assert runs_of(database, folder)["t"].info.status == "RUNNING"

    events = pickle.loads(pickle.dumps(events))
    events.study_started("resumed")
    events.trial_started("t", "search", CONFIG)
    # Back at the checkpoint of step 5, the steps to 9 are trained again.
    events.result("t", {"records": [[step, {"loss": float(step)}] for step in range(5, 15)]})
    events.trial_started("left", "search", CONFIG)
    events.verdict("t", summary("t"))
    events.study_ended()
    assert mirror_study(folder, database, timeout_s=60)[0]
    runs = runs_of(database, folder)
    assert points(database, runs["t"], "loss") == [(step, float(step)) for step in range(15)]
    assert runs["t"].info.status == "FINISHED" and runs["left"].info.status == "KILLED"
    assert "ended before" in runs["left"].data.tags["reason"]


def test_a_locked_database_is_waited_for(tmp_path: Path, database: str) -> None:
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(Path(database.removeprefix("sqlite:///")).read_bytes())
    folder = StudyFolder(tmp_path / "locked")
    write_study(folder)
    lock = sqlite3.connect(copy, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    assert default_uri(tmp_path) == f"sqlite:///{copy}"
    mirror = MLflowMirror(folder)
    assert not mirror.drain(timeout_s=4)
    assert "MLflow has 0 of" in mirror.status()
    lock.execute("ROLLBACK")
    lock.close()
    assert mirror.drain(timeout_s=60), mirror.status()
    check_study(default_uri(tmp_path), folder)


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "nowhere")
    write_study(folder)
    done, status = mirror_study(folder, "sqlite:////proc/none/mlflow.db", timeout_s=10)
    assert not done and "MLflow has 0 of 52 events" in status and status.count(";") >= 1


def test_a_mirror_survives_its_study(tmp_path: Path, database: str) -> None:
    """kill -9 of the study: the process sees the closed pipe and brings the rest over."""
    folder = StudyFolder(tmp_path / "orphan")
    write_study(folder)
    program = (
        "import os, sys; from pathlib import Path; from tune_ssim.results.study_folder import StudyFolder\n"
        "from tune_ssim.tracking.mirror import MLflowMirror\n"
        "MLflowMirror(StudyFolder(Path(sys.argv[1])), sys.argv[2]).start(); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", program, str(folder.path), database]
    assert subprocess.run(command, env=process_environment(), timeout=30).returncode == -9
    ends = time.monotonic() + 60
    while read_state(folder, database)["offset"] < folder.events_file.stat().st_size and time.monotonic() < ends:
        time.sleep(0.1)
    check_study(database, folder)


def test_events_need_neither_ray_nor_mlflow() -> None:
    program = "import sys, tune_ssim.results.events, tune_ssim.tracking.mirror, tune_ssim.tracking.mlflow_ui"
    program += "; assert not {'ray', 'mlflow', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], env=process_environment(), check=True)


def test_a_password_is_neither_written_nor_part_of_a_mirrors_identity(tmp_path: Path) -> None:
    """A resumed study reads its tracking URI from study.yaml, and the password from the environment."""
    for uri, kept in [
        ("http://user:hunter2@host:5000/path", "http://user@host:5000/path"),
        ("postgresql+psycopg2://user:hun@ter/2@db/mlflow", "postgresql+psycopg2://user@db/mlflow"),
        (default_uri(tmp_path), default_uri(tmp_path)),
        ("http://host:5000", "http://host:5000"),
    ]:
        study = load_study({"name": "quiet", "task": "fundus_sr", "space": "wide", "tracking": {"uri": uri}})
        assert study.tracking is not None and study.tracking.uri == uri  # the driver's own mirror needs it
        assert study.to_dict()["tracking"]["uri"] == kept and "hun" not in study.to_yaml()
        folder = StudyFolder(tmp_path)
        assert state_file(folder, uri) == state_file(folder, kept)
        assert "hun" not in MLflowMirror(folder, uri).status()


def test_password_is_not_shown(tmp_path: Path) -> None:
    mirror = MLflowMirror(StudyFolder(tmp_path), "http://user:secret@127.0.0.1:9")
    assert "secret" not in mirror.status() and "127.0.0.1:9" in mirror.status()
    assert "secret" not in state_file(mirror.folder, mirror.uri).name


def test_a_busy_port_gives_the_next() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert _free_port("127.0.0.1", port) > port


def test_numbers_of_a_foreign_result() -> None:
    result = {"loss": 1, "ok": True, "val": {"ssim": 0.5}, "pid": 7, "config": {"lr": 1.0}, "training_iteration": 3}
    assert numbers_of(result) == {"loss": 1.0, "val/ssim": 0.5}
    assert gain({"ssim_loss_weight": 0.1, "ssim_grad_scale": 0.01}) == 0.001 and gain({"lr": 1}) is None


def test_callback_in_a_tuner_of_ones_own(tmp_path: Path, database: str) -> None:
    ray = pytest.importorskip("ray")
    from ray import tune

    from tune_ssim.orchestration import MLflowTracking

    def train(config: dict[str, Any]) -> None:
        for step in range(3):
            tune.report({"loss": config["lr"] * step, "pruned": step == 2 and config["lr"] > 1, "reason": "too hot"})

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        callback = MLflowTracking(uri=database)
        pickle.dumps(callback)
        tuner = tune.Tuner(
            train,
            param_space={"lr": tune.grid_search([0.1, 10.0])},
            run_config=tune.RunConfig(name="own", storage_path=str(tmp_path), callbacks=[callback], verbose=0),
        )
        tuner.fit()
    finally:
        ray.shutdown()
    folder = StudyFolder(tmp_path / "own")
    runs = {run.data.params["lr"]: run for key, run in runs_of(database, folder).items() if key}
    assert {lr: run.info.status for lr, run in runs.items()} == {"0.1": "FINISHED", "10": "KILLED"}
    assert points(database, runs["10"], "loss") == [(1, 0.0), (2, 10.0), (3, 20.0)]
    assert runs["10"].data.tags["reason"] == "too hot"
    assert json.loads(folder.events_file.read_text().splitlines()[-1])["event"] == "end"


def test_events_of_the_first_version_are_mirrored(tmp_path: Path, database: str) -> None:
    """Its MLflowTracking wrote the parameters in force as JSON text."""
    folder = StudyFolder(tmp_path / "first").create()
    events = EventWriter(folder)
    events.study_started("first")
    events.trial_started("t", "search", CONFIG)
    old = {"event": "verdict", "time_ms": 1, "trial_id": "t", "summary": summary("t", "unjudged"), "effective": '{"lr": 0.1}'}
    folder.add_event(old)
    done, status = mirror_study(folder, database, timeout_s=20)
    assert done, status
    assert runs_of(database, folder)["t"].data.params["lr"] == "0.1"


def test_callback_beside_our_trainable(tmp_path: Path, database: str) -> None:
    """The verdict, its evidence and what was in force arrive, and the end of the experiment does not wait in vain."""
    ray = pytest.importorskip("ray")
    from ray import tune

    from tune_ssim import make_trainable
    from tune_ssim.guards import NonFinite
    from tune_ssim.orchestration import MLflowTracking

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        trainable = make_trainable(
            "small_task:SmallTask", guards=[NonFinite()], steps=10, objective="ssim", import_path=str(Path(__file__).parent)
        )
        space = {"fault": tune.grid_search(["none", "nan_at_5"]), "ssim_loss_weight": 1.0, "ssim_loss_max_t": 0.3}
        run_config = tune.RunConfig(name="ours", storage_path=str(tmp_path), callbacks=[MLflowTracking(uri=database)], verbose=0)
        tune.Tuner(trainable, param_space=space, run_config=run_config).fit()
    finally:
        ray.shutdown()
    folder = StudyFolder(tmp_path / "ours")
    assert read_state(folder, database)["offset"] == folder.events_file.stat().st_size  # nothing was left to wait for
    runs = {run.data.params["fault"]: run for key, run in runs_of(database, folder).items() if key}
    assert {fault: run.data.tags["verdict"] for fault, run in runs.items()} == {"none": "safe", "nan_at_5": "pruned"}
    assert runs["nan_at_5"].data.tags["pruned_by"] == "non_finite" and runs["nan_at_5"].info.status == "KILLED"
    assert runs["none"].data.params["lr"] == "0.1"  # in force, not asked for
    assert runs["none"].data.params["gain"] == "1" and not any("tune_ssim" in name for name in runs["none"].data.params)
    assert [step for step, _ in points(database, runs["none"], "loss")] == list(range(1, 11))
