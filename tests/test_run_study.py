"""Studies through the real Ray, the real MLflow and the real command line, on a task small enough for many trials."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.torch import save_file
from small_studies import SMALL

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.cli.app import exit_code
from tune_ssim.cli.launch import run
from tune_ssim.guards import Baseline
from tune_ssim.orchestration.phases import describe_plan, run_study
from tune_ssim.orchestration.progress import NoProgress
from tune_ssim.orchestration.ray_cluster import describe_cluster, require_reachable, require_token
from tune_ssim.orchestration.verification import verify
from tune_ssim.probes import tensor_contents
from tune_ssim.results.export import exported_config, format_export
from tune_ssim.results.proof import proof_of
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.study_lock import LOCK_FILE
from tune_ssim.results.verification import read_export
from tune_ssim.results.winner import best_safe, confirmations
from tune_ssim.study.study import Study, load_study
from tune_ssim.tasks.fundus_sr import WEIGHTS, FundusSR
from tune_ssim.trials.quarantine import Ledger
from tune_ssim.trials.summary import TrialSummary

TESTS = Path(__file__).parent


def small(**changes: Any) -> Study:
    return load_study({**SMALL, **changes})


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One local Ray for the module; `run` uses a connection that is there."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def done(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return run(small(), storage=tmp_path_factory.mktemp("storage"))


def test_baselines_first_then_verdicts_with_reasons(done: StudyFolder) -> None:
    trials = done.trials()
    assert [trial.role for trial in trials[:2]] == ["baseline", "baseline"] and len(trials) == 10
    by_name = {trial.trial_id: trial for trial in trials}
    violent, mild = by_name["trial-00"], by_name["trial-01"]
    assert violent.verdict == "pruned" and violent.evidence is not None
    assert violent.evidence["guard"] == "norm_ratio" and violent.evidence["value"] > 10
    assert violent.steps == violent.evidence["step"] < 20
    assert mild.verdict == "safe" and mild.evidence is None and mild.steps == 40
    assert {"ssim", "delta_ssim", "psnr", "norm_ratio_max"} <= set(mild.metrics)
    for trial in trials:
        assert {"ssim_loss_weight", "ssim_grad_scale"} <= set(trial.config) and "gain" not in trial.config


def test_the_folder_holds_the_truth(done: StudyFolder) -> None:
    assert load_study(done.study_file) == small()  # what was written is what was run
    (baseline_file,) = (done.path / "baseline").glob("*.json")
    baseline = Baseline.read(baseline_file, baseline_file.stem)
    assert [run.seed for run in baseline.runs] == [0, 1]
    assert sorted(baseline.runs[0].series["total_norm"]) == list(range(1, 41))
    events = list(done.events())
    assert events[0]["event"] == "study" and events[-1]["event"] == "end"
    steps: dict[str, list[int]] = {}
    for event in events:
        if event["event"] == "records":
            steps.setdefault(event["trial_id"], []).extend(step for step, _ in event["records"])
    assert steps["trial-01"] == list(range(41))  # every record, once, in order
    images = {path.relative_to(done.path / "images").as_posix() for path in (done.path / "images").rglob("*.png")}
    assert {"trial-01/smoke_000000.png", "trial-01/smoke_000040.png", "baseline-0/smoke_000010.png"} <= images


def test_same_seed_same_study_whichever_trial_ends_first(done: StudyFolder, tmp_path: Path) -> None:
    again = run(small(task_config={"steps": 40}), storage=tmp_path)

    def outcome(folder: StudyFolder) -> dict[str, Any]:
        return {trial.trial_id: (trial.config, trial.verdict, trial.evidence) for trial in folder.trials()}

    assert outcome(again) == outcome(done)


def test_a_taken_name_gets_a_suffix(done: StudyFolder) -> None:
    second = run(small(search={"trials": 2}), in_process=True, storage=done.path.parent)
    assert second.path == done.path.parent / "small-2"
    assert len(done.trials()) == 10


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("ruined_start", BadSetup, "ruined before its first update"),
        ("no_norm", UserError, "metric 'total_norm' absent from"),
        ("raise_at_5", UserError, "RuntimeError: the training broke"),
        ("nan_at_5", BadSetup, "loss is nan at step 5"),
        ("drops_weight", BadSetup, "ssim_loss_weight was set to"),
    ],
)
def test_faults_of_the_set_up_end_the_study_with_their_reason(
    tmp_path: Path, fault: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(small(name=fault, task_config={"steps": 40, "fault": fault}), in_process=True, storage=tmp_path)
    verdicts = {trial.verdict for trial in StudyFolder(tmp_path / fault).trials()}
    assert verdicts & {"bad_setup", "error"}
    assert len(StudyFolder(tmp_path / fault).trials()) <= 6  # not the whole search
    if fault in ("no_norm", "ruined_start"):
        assert {trial.role for trial in StudyFolder(tmp_path / fault).trials()} == {"baseline"}


def test_settings_that_break_the_training_cost_their_own_trials(tmp_path: Path) -> None:
    """Once a trial came through, the set-up is not to blame."""
    points = [{"ssim_loss_weight": weight, "ssim_loss_max_t": 0.3, "ssim_grad_scale": 1.0} for weight in (1.0, 900.0, 800.0, 2.0)]
    study = small(
        name="breaks",
        task_config={"steps": 40, "fault": "raise_when_strong"},
        space={**SMALL["space"], "points": points},
        search={"trials": 4, "concurrency": 1},
    )
    trials = [trial for trial in run(study, in_process=True, storage=tmp_path).trials() if trial.role == "search"]
    assert [trial.verdict for trial in trials] == ["safe", "error", "error", "safe"]


@pytest.mark.parametrize("in_process", [True, False])
def test_nothing_is_written_into_a_study_that_another_process_took_over(tmp_path: Path, in_process: bool) -> None:
    """The error is ours under Ray too, where it is raised in a callback."""
    written: dict[str, bytes] = {}

    class Thief(NoProgress):
        def trial_ended(self, summary: TrialSummary) -> None:
            (folder.path / LOCK_FILE).unlink(missing_ok=True)
            (folder.path / LOCK_FILE).write_text("{}")
            written.update({path.name: path.read_bytes() for path in folder.path.glob("*.jsonl")})

    study = small(name="taken", search={"trials": 4})
    folder = StudyFolder(tmp_path / study.name)
    with pytest.raises(UserError, match="another one runs the study now"):
        run_study(study, storage=tmp_path, in_process=in_process, progress=Thief())
    assert len(folder.trials()) == 1
    assert written == {path.name: path.read_bytes() for path in folder.path.glob("*.jsonl")}


def test_a_baseline_that_fails_beside_another_is_no_interruption(tmp_path: Path) -> None:
    study = small(name="half", task="half_broken:HalfBroken", import_path=str(tmp_path), search={"trials": 2}, result_every=1)
    (tmp_path / "half_broken.py").write_text(
        f"""
import sys, time
sys.path.insert(0, {str(TESTS)!r})
from small_task import SmallTask
class HalfBroken(SmallTask):
    def step(self):
        if self.seed == 0 and self.n == 5:
            raise RuntimeError("no memory")
        time.sleep(0.2)
        return super().step()
"""
    )
    with pytest.raises(UserError, match="no memory"):
        run(study, storage=tmp_path)
    assert [trial.trial_id for trial in StudyFolder(tmp_path / "half").trials()] == ["baseline-0"]  # the other was not judged


def test_a_missing_task_is_known_before_anything_starts(tmp_path: Path) -> None:
    for task, words in (("nowhere.train:Task", "no module 'nowhere'"), ("small_task:Other", "has no class or function 'Other'")):
        with pytest.raises(UserError, match=words):
            run(small(task=task), storage=tmp_path)
    assert not list(tmp_path.iterdir())


def test_asha_stops_trials_but_never_a_baseline(tmp_path: Path) -> None:
    study = small(name="asha", scheduler={"asha": {"max_steps": 40, "grace_steps": 10, "reduction_factor": 2}}, result_every=5)
    trials = run(study, storage=tmp_path).trials()
    assert {trial.verdict for trial in trials if trial.role == "baseline"} == {"safe"}
    stopped = [trial for trial in trials if trial.verdict == "stopped"]
    assert stopped and all(0 < trial.steps < 40 for trial in stopped)


def test_a_route_runs_its_stages_in_order(tmp_path: Path) -> None:
    # The small task has no max_t in its gradient; the route's ranges are far too small to matter here, so it runs whole.
    study = small(name="route", space="note_v2", search={"trials": 4}, objective={"keep": {}})
    trials = [trial for trial in run(study, in_process=True, storage=tmp_path).trials() if trial.role == "search"]
    assert 1 <= len(trials) <= 4
    assert all(trial.config["ssim_grad_scale"] == 0.1 for trial in trials)


def command(storage: Path, study: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "tune_ssim", "run", str(study), "--storage-path", str(storage), *more]


def test_killed_in_the_middle_and_resumed(tmp_path: Path) -> None:
    """kill -9 of the driver; `--resume` finishes the study: every slot once, same settings as an undisturbed one."""
    study_file = tmp_path / "small.yaml"
    study = small(name="killed", task_config={"steps": 250}, search={"trials": 4}, tracking={"uri": None})
    study_file.write_text(study.to_yaml())
    environment = {**os.environ, "TUNE_GLOBAL_CHECKPOINT_S": "1", "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("wb")
    driver = subprocess.Popen(command(tmp_path, study_file), env=environment, stdout=log, stderr=log, start_new_session=True)
    folder = StudyFolder(tmp_path / "killed")
    deadline = time.monotonic() + 120
    while len(folder.trials()) < 3 and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.2)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert 3 <= len(folder.trials()) < 6, (tmp_path / "log").read_text()
    resumed = subprocess.run(
        command(tmp_path, study_file, "--name", "killed", "--resume"), env=environment, capture_output=True, text=True, timeout=240
    )
    assert resumed.returncode == 0, resumed.stderr
    trials = folder.trials()
    assert sorted(trial.trial_id for trial in trials) == ["baseline-0", "baseline-1", *(f"trial-{k:02d}" for k in range(4))]
    assert {trial.verdict for trial in trials if trial.role == "baseline"} == {"safe"}

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(runs) - len(children) == 1
    assert sorted(run.data.tags["tune_ssim.trial_id"] for run in children) == sorted(trial.trial_id for trial in trials)
    listed = subprocess.run(
        [sys.executable, "-m", "tune_ssim", "trials", "killed", "--json", "--storage-path", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {trial["run_id"] for trial in json.loads(listed.stdout)} == {run.info.run_id for run in children}


def test_interrupted(tmp_path: Path) -> None:
    """By a batch system, which is heard as Ctrl-C is: one line, and how to go on."""
    study_file = tmp_path / "small.yaml"
    study_file.write_text(small(name="interrupted", task_config={"steps": 100_000}).to_yaml())
    environment = {**os.environ, "HOME": str(tmp_path)}
    driver = subprocess.Popen(
        command(tmp_path, study_file), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    folder = StudyFolder(tmp_path / "interrupted")
    deadline = time.monotonic() + 120
    while not any(event["event"] == "records" for event in folder.events()) and time.monotonic() < deadline:
        time.sleep(0.2)
    driver.send_signal(signal.SIGTERM)
    out, error = driver.communicate(timeout=120)
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600, "a token that Ray made is the user's alone"
    assert driver.returncode == 130, (out, error)
    next_line, last_line = error.splitlines()[-2:]
    assert last_line == "error: interrupted"
    assert "--resume --name interrupted" in next_line
    assert "SIGTERM received" not in error


def test_a_baseline_from_the_log_of_an_earlier_run(done: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No baseline is run; norms are compared unpaired, and the output says what the log cannot prove."""
    runs = [event for event in done.events() if event["event"] == "records" and event["trial_id"] == "baseline-0"]
    points = {step: values["total_norm"] for event in runs for step, values in event["records"] if "total_norm" in values}
    log = tmp_path / "pixel.csv"
    log.write_text("iter,grad_norm\n" + "".join(f"{step},{norm}\n" for step, norm in sorted(points.items())))
    held_out = {"ssim": 0.9, "psnr": 20.0}
    given = {"file": str(log), "names": {"grad_norm": "total_norm"}, "held_out": held_out}
    study = small(name="logged", baseline={"log": given}, search={"trials": 2})
    trials = sorted(run(study, in_process=True, storage=tmp_path).trials(), key=lambda trial: trial.trial_id)  # not as they ended
    assert [(trial.trial_id, trial.verdict, trial.steps) for trial in trials] == [
        ("trial-00", "pruned", 11),
        ("trial-01", "safe", 40),
    ]
    assert "unpaired median" in trials[0].reason
    assert trials[1].metrics["delta_ssim"] == pytest.approx(trials[1].metrics["ssim"] - 0.9)
    assert "Not known: its code, weights, data, seed and batches" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(UserError, match="no total_norm in it, found grad_norm"):
        run(small(name="unnamed", baseline={"log": str(log)}), in_process=True, storage=tmp_path)


def test_a_dead_tracking_server_neither_stops_nor_fails_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tune_ssim.orchestration.phases.UNREACHED_TIMEOUT_S", 0.0)
    study_file = tmp_path / "small.yaml"
    study_file.write_text(small(name="dead", search={"trials": 2}, tracking={"uri": "http://127.0.0.1:9"}).to_yaml())
    assert exit_code(["run", str(study_file), "--storage-path", str(tmp_path), "--in-process"]) == 0
    assert "mirror dead" in "".join(capfd.readouterr())
    assert len(StudyFolder(tmp_path / "dead").trials()) == 4


@pytest.fixture(scope="module")
def confirmed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """Of a task whose code may be changed afterwards."""
    code = tmp_path_factory.mktemp("code")
    shutil.copy(TESTS / "small_task.py", code / "copied_task.py")
    study = small(
        name="confirmed",
        task="copied_task:SmallTask",
        import_path=str(code),
        confirm={"seeds": 3, "steps": 60, "finalists": 2},
        search={**SMALL["search"], "trials": 4},
    )
    return run(study, in_process=True, storage=tmp_path_factory.mktemp("confirmed"))


def test_confirm_runs_the_best_and_the_baseline_again_with_new_seeds(confirmed: StudyFolder) -> None:
    trials = confirmed.trials()
    best = best_safe(confirmed)
    again = [trial for trial in trials if trial.role == "confirm"]
    baselines = [trial for trial in trials if trial.trial_id.startswith("confirm-baseline")]
    seeds = sorted(trial.seed for trial in baselines)  # side by side: any may end first
    assert seeds in ([2, 3], [2, 3, 4])  # a third one only if two do not decide
    mine = confirmations(best, trials)
    assert sorted(trial.seed for trial in mine) == seeds[: len(mine)] and 2 <= len(mine) <= len(again)
    assert {trial.steps for trial in (*mine, *baselines)} == {60}
    for trial in mine:  # compared with the baseline of the same seed, at the same horizon
        reference = next(b for b in baselines if b.seed == trial.seed)
        assert trial.metrics["delta_ssim"] == pytest.approx(trial.metrics["ssim"] - reference.metrics["ssim"])
    proof = proof_of(best, confirmed)
    assert proof["unproven"] == [] and proof["horizon"]["steps"] == 60
    found = proof["comparison"]["delta_ssim"]
    low, high = found["interval"]
    assert found["n"] == len(mine) and low < found["mean"] < high
    assert 0 < proof["margins"]["norm_ratio_max"]["worst"] < proof["margins"]["norm_ratio_max"]["limit"] == 10
    assert "code/copied_task.py" in proof["provenance"]


def test_token_authentication_and_an_open_token_file_are_reported(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "auth_token"
    token.write_text("secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    token.chmod(0o644)
    line = "Ray: 2 CPUs, no GPU; token authentication is on"
    assert describe_cluster(ray.cluster_resources()) == f"{line}, but other users can read the token: chmod 600 {token}"
    token.chmod(0o600)
    assert describe_cluster(ray.cluster_resources()) == line


def test_a_wrong_token_is_one_line_at_once(cluster: None) -> None:
    """Ray itself tries for a minute, with a warning every second."""
    address = ray.get_runtime_context().gcs_address
    require_token(address)  # the right one
    code = f"from tune_ssim.orchestration.ray_cluster import require_token; require_token({address!r})"
    environment = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    words = f"--address {address}: the cluster refuses the token in $RAY_AUTH_TOKEN: copy the head's token file to "
    assert words in ended.stderr and "gcs_client.cc" not in ended.stderr


def test_a_study_without_a_confirm_phase_is_unproven(done: StudyFolder) -> None:
    assert proof_of(best_safe(done), done)["unproven"] == ["it was not confirmed with further seeds"]


def test_checkpoints_of_ruined_trials_are_quarantined(done: StudyFolder) -> None:
    ledger = Ledger(done.path.parent)
    ruined = {trial.trial_id: trial for trial in done.trials() if trial.verdict == "pruned"}
    assert ruined and {entry.trial_id for entry in ledger.entries()} == set(ruined)
    left = {trial_id: sorted((done.ray_folder / "run" / trial_id).glob("checkpoint_*")) for trial_id in ruined}
    for trial_id, folders in left.items():
        assert ruined[trial_id].quarantined
        for folder in folders:
            refusal = ledger.check(folder)
            assert refusal is not None and refusal.entry.trial_id == trial_id
    assert any(left.values())
    safe = next(trial.trial_id for trial in done.trials() if trial.verdict == "safe" and trial.role == "search")
    assert ledger.check(sorted((done.ray_folder / "run" / safe).glob("checkpoint_*"))[-1]) is None


def test_a_study_does_not_start_from_ruined_weights(cluster: None, tmp_path: Path) -> None:
    start, ruined = FundusSR(), FundusSR()
    start.setup({}, 0, "cpu")
    ruined.setup({"ssim_loss_weight": 5000.0, "ssim_loss_max_t": 1.0}, 0, "cpu")
    ruined.step()
    ledger = Ledger(tmp_path / "storage")
    sound = [tensor_contents(start.model.state_dict())]
    contents = tensor_contents(ruined.model.state_dict())
    ledger.add(contents, sound=sound, study="old", trial_id="trial-07", step=1, reason="norm too high")
    weights = tmp_path / "renamed"
    weights.mkdir()
    shutil.copy(WEIGHTS / "fundus_vae.safetensors", weights)
    save_file(
        {f"{name}": tensor.clone() for name, tensor in ruined.model.state_dict().items()}, weights / "fundus_denoiser.safetensors"
    )
    config = {"steps": 20, "weights": str(weights), "crop": 24, "batch_size": 2}
    study = {
        "name": "from-ruined",
        "task_config": config,
        "calibration": None,
    }  # preflight finds faults too, which are consequences
    with pytest.raises(BadSetup, match=r"quarantined: .*trial trial-07 of study old"):
        run(load_study(study), in_process=True, storage=tmp_path / "storage")
    assert not (tmp_path / "storage" / "from-ruined" / "trials.jsonl").exists()


def test_verify_passes_on_an_untouched_export_and_names_what_changed(confirmed: StudyFolder, tmp_path: Path) -> None:
    exported = exported_config(best_safe(confirmed), confirmed)
    (tmp_path / "best.yaml").write_text(format_export(exported, "yaml"))
    again = read_export(tmp_path / "best.yaml")
    found, trials = verify(again, in_process=True)
    assert found == []
    repeated = {trial.trial_id: trial.metrics["delta_ssim"] for trial in trials if trial.role == "confirm"}
    assert list(repeated.values()) == pytest.approx(list(exported["proof"]["comparison"]["delta_ssim"]["by_seed"].values()))

    other = json.loads(json.dumps(again))
    other["config"]["ssim_loss_weight"] *= 1.01
    assert [line.split(" is ")[0] for line in verify(other, in_process=True)[0]] == ["setting: ssim_loss_weight"]

    weakened = json.loads(json.dumps(again))
    weakened["proof"]["study"]["guards"]["norm_ratio"]["limit"], weakened["metrics"]["ssim"] = 1e9, 0.99
    assert verify(weakened, in_process=True) == (["metrics is not what was exported", "proof.study is not what was exported"], [])

    code = Path(exported["proof"]["study"]["import_path"]) / "copied_task.py"
    before = code.read_text()
    code.write_text(before.replace("self.gain * 0.1", "self.gain * 0.100001"))
    found, trials = verify(again, in_process=True)
    code.write_text(before)
    assert [line.split(" has ")[0] for line in found] == ["code/copied_task.py"] and trials == []


def test_an_unsound_set_up_stops_the_study_before_any_trial(cluster: None, tmp_path: Path) -> None:
    study = load_study({"name": "unsound", "task_config": {"steps": 20, "pretrained": False}, "tracking": None})
    with pytest.raises(BadSetup, match="smoke"):
        run(study, in_process=True, storage=tmp_path)
    folder = StudyFolder(tmp_path / "unsound")
    assert folder.trials() == []
    report = json.loads((folder.path / "preflight.json").read_text())
    assert report["status"] == "bad_setup"
    assert any(event["event"] == "end" and "smoke" in event["reason"] for event in folder.events())


def test_settings_predicted_beyond_the_limit_are_listed_and_not_launched(cluster: None, tmp_path: Path) -> None:
    space = {**SMALL["space"], "points": [{"ssim_loss_weight": 2500.0, "ssim_loss_max_t": 0.3, "ssim_grad_scale": 1.0}]}
    study = small(
        name="skips", space=space, calibration={"batches": 12}, search={**SMALL["search"], "strategy": "optuna", "trials": 3}
    )
    folder = run(study, in_process=True, storage=tmp_path)
    skipped = folder.skipped()
    assert skipped[0].config["ssim_loss_weight"] == 2500.0 and skipped[0].predicted_ratio > 20
    launched = [trial.config["ssim_loss_weight"] for trial in folder.trials() if trial.role == "search"]
    assert len(launched) == 3 and 2500.0 not in launched


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "best.json: is empty"),
        ("[1, 2]", "best.json:1: must be a mapping (`key: value` lines), got a list"),
        ('{"proof": 3, "config": {}}', "it has no proof"),
        ('{"proof": {"unproven": ["not confirmed"]}}', "nothing to verify, it was exported as unproven: not confirmed"),
        ('{"proof": {"unproven": "hello"}}', "trial_id is missing"),
        ('{"proof": ', "best.json: its end is missing"),
        ('{"a":' * 100_000, "best.json: not JSON"),
        ("a: 1\na: 2\n", "best.json:2: key 'a' appears twice (first in line 1)"),
        ("\x00", "best.json: is a binary file"),
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 9)),
            "once aliases are written out",
        ),
    ],
)
def test_what_is_no_export_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_export(tmp_path / "best.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"trial_id": "../x"}, {"trial_id": 3}, {"seals": []}, {"config": None}, {"exported_with": None}]
)
def test_a_malformed_export_is_refused_by_its_place(confirmed: StudyFolder, tmp_path: Path, change: dict[str, Any]) -> None:
    exported = exported_config(best_safe(confirmed), confirmed) | change
    (tmp_path / "best.json").write_text(json.dumps(exported))
    with pytest.raises(UserError, match=f": {next(iter(change))}"):
        read_export(tmp_path / "best.json")


def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--address 127\.0\.0\.1:9: "):
        require_reachable("127.0.0.1:9")
    with pytest.raises(UserError, match=r"--address ray://nohost\.invalid:6379: "):
        require_reachable("ray://nohost.invalid:6379")


def test_one_baseline_is_not_several() -> None:
    assert describe_plan(1, 2, 2) == "1 baseline, then 2 trials, 2 at a time"
    assert describe_plan(0, 1, 1) == "0 baselines, then 1 trial, 1 at a time"
