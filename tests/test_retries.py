"""Trials whose process, node or connection is lost."""

from __future__ import annotations

import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, ObjectLostError, RayActorError
from ray.tune.experiment import Trial as RayTrial
from ray.tune.result import SHOULD_CHECKPOINT
from small_studies import SMALL
from small_task import SmallTask
from two_hosts import two_hosts

from tune_ssim.cli.app import exit_code
from tune_ssim.orchestration.ray_internals import forget_statistics, intercept_failures, without_snapshots
from tune_ssim.orchestration.retries import LOSSES, OWN_DEATHS, Preempted, Retries, error_of, is_lost, words_of
from tune_ssim.orchestration.trainable import make_trainable
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.study import load_study

TESTS = Path(__file__).parent


def died(message: str, **context: Any) -> ActorDiedError:
    return ActorDiedError(ActorDiedErrorContext(error_message=message, actor_id=b"0" * 16, **context))


PROCESS = died("The actor is dead because its worker process has died. Worker exit detail: exits with a connection error code 2. E")
NODE = died("The actor died because its node has died. Node Id: 12ab\n\tthe actor's node was terminated unexpectedly: no heartbeat")
PREEMPTED = died("its worker has died", node_death_info=NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED))


@pytest.mark.parametrize(
    ("exception", "lost"),
    [
        (PROCESS, False),
        (NODE, True),
        (died("The actor never ran - it was cancelled before it started running."), True),
        (PREEMPTED, True),
        (ActorUnavailableError("RpcError: Connection reset by peer", None), True),
        (NodeDiedError("n"), True),
        (ObjectLostError("0" * 56, None, ""), True),
        (Preempted("SIGTERM"), True),
        (RayActorError(), False),
        (RuntimeError("the training broke"), False),
    ],
)
def test_what_is_no_failure_of_the_trial(exception: Exception, lost: bool) -> None:
    assert is_lost(exception) is lost


def test_messages_of_ray_become_one_line() -> None:
    assert words_of(PROCESS) == "killed (out of memory?) or crashed"
    assert words_of(NODE) == "the actor's node was terminated unexpectedly: no heartbeat"
    assert "connection to its node broke" in words_of(ActorUnavailableError("RpcError: " + "x" * 900, None))


def test_the_message_of_a_failed_trial_is_there_before_rays_snapshot(tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(f"Failure # 3\n{PROCESS}\n")
    trial = SimpleNamespace(error_file=str(tmp_path / "error.txt"), get_error=lambda: None)
    assert error_of(trial) == "killed (out of memory?) or crashed"
    assert error_of(SimpleNamespace(error_file=None, get_error=lambda: "NodeDiedError: gone")) == "NodeDiedError: gone"


@dataclass
class Failing:
    """What `Retries` uses of a Ray trial."""

    status: str = "RUNNING"
    max_failures: int = OWN_DEATHS


def outcomes(exceptions: list[Exception]) -> tuple[list[int], list[str]]:
    """The limit that Ray gets at each failure: -1 tries again, 0 ends the trial."""
    said: list[str] = []
    limits: list[int] = []
    trial, tries = Failing(), Retries(lambda trial: "trial-00", said.append)
    for exception in exceptions:
        tries.failed(trial, exception, lambda: limits.append(trial.max_failures))
        for one in tries._waiting:
            one.due_s = 0.0
        tries.start_due()
    return limits, said


def test_a_lost_node_uses_no_try_of_the_trial() -> None:
    lost = ActorUnavailableError("RpcError: Socket closed", None)
    limits, said = outcomes([lost, PROCESS, lost, lost, PROCESS, lost, PROCESS])
    assert limits == [-1] * 6 + [0]
    assert "no try is used up" in said[0] and "try 2 of 3 in 2 s" in said[1] and "try 3 of 3 in 16 s" in said[4]


def test_a_trial_that_loses_every_node_ends() -> None:
    limits, _ = outcomes([NODE] * (LOSSES + OWN_DEATHS + 1))
    assert limits == [-1] * (LOSSES + OWN_DEATHS) + [0]


def test_a_trial_waits_before_it_is_tried_again() -> None:
    trial, tries, started = Failing(), Retries(lambda trial: "trial-00", lambda line: None), []
    tries.failed(trial, PROCESS, lambda: started.append(1))
    tries.start_due()
    assert started == []
    (waiting,) = tries._waiting
    waiting.due_s = 0.0
    trial.status = "TERMINATED"  # the study was stopped meanwhile
    tries.start_due()
    assert started == [] and tries._waiting == []


def test_the_death_of_a_process_is_one_failure() -> None:
    """Ray reports it for the process and for what it was doing."""
    trial, said, started = Failing(), [], []
    tries = Retries(lambda trial: "trial-00", said.append)
    for _ in range(2):
        tries.failed(trial, PROCESS, lambda: started.append(1))
    for waiting in tries._waiting:
        waiting.due_s = 0.0
    tries.start_due()
    assert started == [1] and len(said) == 1


def test_a_trial_whose_process_dies_while_it_is_reset_is_not_reset_any_more() -> None:
    handled: list[Any] = []
    controller = SimpleNamespace(
        _process_trial_failure=lambda trial, exception: None, _actor_manager=SimpleNamespace(), _resetting_trials={"trial-00"}
    )
    intercept_failures(controller, lambda *arguments: handled.append(arguments))
    controller._process_trial_failure("trial-00", exception=PROCESS)
    assert controller._resetting_trials == set() and len(handled) == 1


def test_a_trial_that_is_asked_to_end_saves_its_state_and_goes_on_elsewhere(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    train = make_trainable(SmallTask, guards=(), steps=40, result_every=10)
    try:
        trial = train({"ssim_loss_weight": 1.0})
        assert trial.train()["step"] == 10
        signal.raise_signal(signal.SIGTERM)
        asked = trial.train()
        assert asked["step"] == 10 and asked[SHOULD_CHECKPOINT]
        trial.save_checkpoint(str(tmp_path))
        with pytest.raises(Preempted, match="asked to end"):
            trial.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    elsewhere = train({"ssim_loss_weight": 1.0})
    elsewhere.load_checkpoint(str(tmp_path))
    assert elsewhere.train()["step"] == 20
    signal.signal(signal.SIGTERM, before)


def test_a_study_writes_rays_snapshot_once_and_not_after_every_trial() -> None:
    written: list[bool] = []
    controller = SimpleNamespace(checkpoint=lambda force=False, wait=False: written.append(wait))
    without_snapshots(controller)
    for _ in range(3):
        controller.checkpoint()
    controller.checkpoint(force=True, wait=True)
    assert written == [True]
    assert pickle.loads(pickle.dumps(controller.checkpoint)) == "", "Ray pickles what its controller holds"


def test_an_ended_trial_leaves_no_averages_in_the_drivers_memory() -> None:
    trial = RayTrial("none", stub=True)
    trial.update_last_result({"loss": 1.0, "training_iteration": 1})
    assert trial.run_metadata.metric_n_steps, "what Ray 2.60 keeps of each metric"
    forget_statistics(trial)
    assert not trial.run_metadata.metric_n_steps and not trial.run_metadata.metric_analysis
    assert trial.last_result["loss"] == 1.0


@pytest.mark.e2e  # each of its parts is tested above
def test_deaths_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM: the trial is saved and goes on elsewhere. SIGKILL, again and again: no verdict, and the study says so."""
    space = {**SMALL["space"], "points": [dict(point) for point in SMALL["space"]["points"]]}
    study = load_study(
        {
            **SMALL,
            "name": "dying",
            "task": "dying_task:DyingTask",
            "import_path": str(TESTS),
            "task_config": {"steps": 40, "mark": str(tmp_path)},
            "baseline": {"seeds": 1},
            "guards": {"smoke_test": None},
            "search": {"trials": 2, "concurrency": 2},
            "result_every": 4,
            "space": space,
        }
    )
    (tmp_path / "dying.yaml").write_text(study.to_yaml())
    code = exit_code(["run", str(tmp_path / "dying.yaml"), "--storage-path", str(tmp_path)])
    out, error = capsys.readouterr()
    trials = {trial.trial_id: trial for trial in StudyFolder(tmp_path / "dying").trials()}
    assert trials["trial-01"].verdict == "safe" and trials["trial-01"].steps == 40
    assert (tmp_path / "steps-1").read_text().split() == [str(step) for step in range(1, 41)], "no step was lost or repeated"
    assert trials["trial-00"].verdict == "error" and "killed" in trials["trial-00"].reason
    assert code == 4, error
    assert "trial-01: its process was asked to end (SIGTERM); it goes on from its last checkpoint" in out
    assert "trial-00: its process died: killed (out of memory?) or crashed; try 3 of 3" in out
    assert error.splitlines()[-1].startswith("1 trial has no verdict, since the process died (trial-00): `tune-ssim run")
    assert "Traceback" not in out + error and "raylet" not in out + error


@pytest.mark.e2e
def test_a_process_that_is_killed_while_a_trial_takes_it_over(tmp_path: Path) -> None:
    """Ray gives the trial the process of the baseline; the study waited for ever."""
    changes = {"name": "dying", "task": "dying_task:DyingAtItsStart", "task_config": {"steps": 40, "mark": str(tmp_path)}}
    space = {**SMALL["space"], "points": SMALL["space"]["points"][1:]}
    search = {"baseline": {"seeds": 1}, "space": space, "search": {"trials": 1, "concurrency": 1}}
    (tmp_path / "dying.yaml").write_text(load_study({**SMALL, **changes, **search}).to_yaml())
    assert exit_code(["run", str(tmp_path / "dying.yaml"), "--storage-path", str(tmp_path)]) == 0
    trials = {trial.trial_id: trial.steps for trial in StudyFolder(tmp_path / "dying").trials()}
    assert (tmp_path / "killed").exists() and trials == {"baseline-0": 40, "trial-00": 40}


@pytest.mark.e2e
@pytest.mark.parametrize("fault", ["cut", "killed"])
def test_a_host_that_is_lost_uses_no_try(tmp_path: Path, fault: str) -> None:
    """The only host with room for trials is cut off for 25 s, or killed and started again."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "slow_task.py").write_text(
        "import time\nfrom small_task import SmallTask\n\n\nclass SlowTask(SmallTask):\n"
        "    def step(self):\n        time.sleep(0.3)\n        return super().step()\n"
    )
    shutil.copy(TESTS / "small_task.py", code)
    changes = {"name": "lost", "task": "slow_task:SlowTask", "import_path": str(code), "search": {"trials": 2}}
    every = {"result_every": 1, "checkpoint_every": 5}
    (tmp_path / "lost.yaml").write_text(load_study({**SMALL, **changes, **every}).to_yaml())
    with two_hosts(tmp_path / "hosts") as hosts:
        hosts.head.environment["PYTHONPATH"] = hosts.worker.environment["PYTHONPATH"] = str(TESTS.parent)
        hosts.start(cpus=(0, 2))
        command = [sys.executable, "-m", "tune_ssim", "run", str(tmp_path / "lost.yaml"), "--address", hosts.address]
        with (tmp_path / "log").open("wb") as log:
            argv = hosts.head.argv(*command, "--storage-path", str(tmp_path / "storage"))
            driver = subprocess.Popen(argv, env=hosts.head.environment, stdout=log, stderr=log)
            folder = StudyFolder(tmp_path / "storage" / "lost")
            while sum(event["event"] == "records" for event in folder.events()) < 12 and driver.poll() is None:
                time.sleep(0.5)
            if fault == "cut":
                hosts.cut(25)
            else:
                hosts.worker.end()
                time.sleep(5)
                hosts.worker.ray(f"--address={hosts.address}", cpus=2)
            code_of_driver = driver.wait(timeout=400)
    text = (tmp_path / "log").read_text()
    assert code_of_driver == 0, text
    assert {trial.trial_id: trial.verdict for trial in folder.trials()} == {
        "baseline-0": "safe",
        "baseline-1": "safe",
        "trial-00": "pruned",
        "trial-01": "safe",
    }
    assert "no try is used up" in text and "Traceback" not in text and "(raylet)" not in text


@pytest.mark.e2e
def test_a_study_whose_raylet_is_killed_ends_and_says_how_to_go_on(tmp_path: Path) -> None:
    """It waited forever for a node that nobody starts again."""
    study = load_study({**SMALL, "name": "alone", "task_config": {"steps": 3000}, "confirm": None})
    (tmp_path / "alone.yaml").write_text(study.to_yaml())
    command = [sys.executable, "-m", "tune_ssim", "run", str(tmp_path / "alone.yaml"), "--storage-path", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as driver:
        while driver.poll() is None and not list(tmp_path.glob("alone/ray/run/baseline-*")):
            time.sleep(0.2)
        assert subprocess.run(["pkill", "-KILL", "-s", str(driver.pid), "-x", "raylet"]).returncode == 0
        printed, _ = driver.communicate(timeout=300)
    assert driver.returncode == 2 and "the Ray of this study has died" in printed
    assert "`tune-ssim run --resume --name alone` goes on" in printed
