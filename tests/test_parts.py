"""Trials of several processes: ranks of a Python task, and torchrun on two nodes of a real cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from small_studies import SMALL

from tune_ssim.base.errors import UserError
from tune_ssim.base.tensor_file import TensorFile
from tune_ssim.before_launch.command.starts import StartJob
from tune_ssim.cli.launch import run
from tune_ssim.orchestration.nodes import NodesProcess
from tune_ssim.orchestration.phases import run_study
from tune_ssim.orchestration.ray_cluster import spread
from tune_ssim.orchestration.ray_starts import take_on_ray
from tune_ssim.orchestration.trainable import TrialResources
from tune_ssim.orchestration.workers import WorkersTask, interface_of, together
from tune_ssim.study.study import Study, load_study
from tune_ssim.trials.checkpoint import TENSORS, save_checkpoint
from tune_ssim.trials.command.process import Invocation
from tune_ssim.trials.final_verdict import TrialPlan
from tune_ssim.trials.training import Abilities
from tune_ssim.trials.trial import Trial

TESTS = Path(__file__).parent
TRAININGS = TESTS / "trainings"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TRAININGS)))}
SCRIPT = str(TRAININGS / "torchrun_script.py")
PUSHES = r"step (?P<step>\d+): loss (?P<loss>\S+) total_norm (?P<total_norm>\S+)"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """Two nodes with two CPUs each."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes.add_node(num_cpus=2)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": ENVIRONMENT})
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def small(**changes: Any) -> Study:
    return load_study({**SMALL, "import_path": str(TRAININGS), **changes})


def test_two_workers_give_the_verdict_of_one_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    """Rank 1 dies at step 5 of some trial; the trial goes on from its checkpoint with new workers."""
    found = {}
    for workers in (1, 2):
        fault = {"fault": "die_at_5", "mark": str(tmp_path / "died")} if workers == 2 else {}
        study = small(
            name=f"workers-{workers}",
            task="ranked_task:RankedTask",
            task_config={"steps": 40, **fault},
            search={"trials": 2},
            resources={"workers": workers},
            checkpoint_every=2,
            result_every=1,
        )
        folder = run(study, storage=tmp_path)
        found[workers] = {trial.trial_id: (trial.verdict, trial.reason, trial.steps) for trial in folder.trials()}
    assert found[1] == found[2]
    assert found[2]["trial-00"][0] == "pruned" and found[2]["trial-01"][0] == "safe"
    assert (tmp_path / "died").exists()


def test_a_training_over_workers_declares_its_parents(tmp_path: Path) -> None:
    """What a ruined trial wrote is traced back to the weights that its ranks loaded."""
    save_checkpoint(tmp_path / "start", {"x": torch.rand(3)}, parents=("a" * 64,))
    weights = tmp_path / "start" / TENSORS
    workers = WorkersTask("ranked_task:LoadedTask", str(TRAININGS), 2, cpus=1, gpus=0)
    try:
        trial = Trial(workers, TrialPlan(steps=2, guards=(), image_grids=False))
        trial.start({"steps": 2, "mark": str(weights)})
        trial.advance()
        trial.save(tmp_path / "end")
        abilities, fingerprints = workers.abilities(), workers.fingerprints()
    finally:
        workers.close()
    assert trial.parents == TensorFile.open(weights).ancestry() and len(trial.parents) == 2
    assert [made["parents"] for made in trial.wrote] == [list(trial.parents)]
    assert abilities == Abilities(fingerprints=True)
    assert fingerprints == {"data/rank": "0"}


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.77") is None


def test_an_error_in_a_worker_is_the_trainings_own() -> None:
    workers = WorkersTask("ranked_task:RankedTask", str(TRAININGS), 2, cpus=1, gpus=0)
    try:
        with pytest.raises(ValueError, match=r"^could not convert string to float: 'fast'$") as raised:
            workers.setup({"ssim_loss_weight": "fast"}, 0)
    finally:
        workers.close()
    assert "in setup" in str(raised.value.__cause__), "the traceback in the worker"


@pytest.mark.e2e  # two workers that agree are tested above, a sharded norm in test_taps.py
@pytest.mark.parametrize("wrap", ["fsdp", "ddp"])
def test_sharded_and_copied_models_give_the_verdict_of_one_process(tmp_path: Path, wrap: str) -> None:
    """`fully_shard` and DDP over two workers, one of which dies and is replaced: the state is whole in every checkpoint."""
    found = {}
    for name, how, workers in (("one", "none", 1), ("two", wrap, 2)):
        mark = tmp_path / f"{name}-died"
        study = small(
            name=name,
            task="sharded_task:ShardedTask",
            task_config={"steps": 40, "wrap": how, **({"mark": str(mark)} if workers == 2 else {})},
            search={"trials": 2, "concurrency": 1},
            guards={"smoke_test": None},
            resources={"workers": workers},
            checkpoint_every=2,
            result_every=1,
        )
        trials = run_study(study, storage=tmp_path, in_process=workers == 1).trials()
        found[name] = {trial.trial_id: trial for trial in trials}
        assert mark.exists() == (workers == 2)
    for trial_id, alone in found["one"].items():
        other = found["two"][trial_id]
        assert (other.verdict, other.steps) == (alone.verdict, alone.steps), other.reason
        if alone.verdict == "safe":
            assert other.metrics["psnr"] == pytest.approx(alone.metrics["psnr"], rel=1e-4)
    assert found["one"]["trial-00"].verdict == "pruned" and found["one"]["trial-01"].verdict == "safe"


@pytest.mark.parametrize(
    ("room", "parts", "fits"),
    [([2, 2], 2, 2), ([4], 2, 0), ([1, 3], 2, 1), ([1, 1, 1], 2, 1), ([2, 1, 1], 2, 2), ([], 2, 0), ([9, 1, 1], 3, 1)],
)
def test_trials_that_fit_on_different_nodes(room: list[int], parts: int, fits: int) -> None:
    assert spread(room, parts) == fits


def test_what_no_node_can_hold_is_said_at_once(tmp_path: Path) -> None:
    for resources, says in (
        ({"workers": 2, "cpus": 3}, "each of a trial's 2 workers needs 3 CPUs and 0 GPUs; the cluster's nodes have 2 CPUs"),
        ({"workers": 5}, "each of a trial's 5 workers needs 1 CPUs"),
    ):
        with pytest.raises(UserError, match=says):
            run(small(task="ranked_task:RankedTask", resources=resources), storage=tmp_path)
    with pytest.raises(UserError, match="on each of 3 nodes, needs 1 CPUs"):
        run(commands(tmp_path, resources={"nodes": 3}), storage=tmp_path)


def test_metrics_of_ranks_become_one() -> None:
    ranks = [{"loss": 1.0, "total_norm": 2.0, "step_skipped": 0.0}, {"loss": 3.0, "total_norm": 2.0, "step_skipped": 1.0}]
    assert together(ranks) == {"loss": 2.0, "total_norm": 2.0, "step_skipped": 1.0}
    assert together([{"loss": 1.0}, {"loss": 1.0, "loss_ssim": 0.5}])["loss_ssim"] == 0.5
    with pytest.raises(UserError, match="total_norm differs between the ranks"):
        together([{"total_norm": 2.0}, {"total_norm": 2.1}])


def torchrun(pids: Path, *more: str) -> dict[str, Any]:
    command = ["{python}", "-m", "torch.distributed.run", "--nnodes", "{nodes}", "--node-rank", "{node_rank}"]
    command += ["--master-addr", "{master_addr}", "--master-port", "{master_port}", "--nproc-per-node", "1", SCRIPT]
    command += ["--ssim_loss_weight", "{ssim_loss_weight}", "--pids", str(pids), *more]
    return {"command": command, "grace_s": 1.0, "known": {"nodes": 2}}


def commands(pids: Path, *more: str, **changes: Any) -> Study:
    given = {
        "name": "nodes",
        "task": torchrun(pids, *more),
        "task_config": {"steps": 40},
        "baseline": {"seeds": 1},
        "search": {"trials": 1},
        "guards": {"smoke_test": None},
        "objective": {"minimize": "delta_loss"},
        "resources": {"nodes": 2},
    }
    space = {**SMALL["space"], "fixed": {"ssim_grad_scale": 1.0, "ssim_loss_max_t": 1.0}}
    space["points"] = [{"ssim_loss_weight": 1000.0, "ssim_loss_max_t": 1.0, "ssim_grad_scale": 1.0}]
    return small(**{**given, "space": space, **changes})


def test_starts_of_a_command_use_the_room_of_the_cluster() -> None:
    """More of them than fit side by side."""
    flags = ("ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale", "seed")
    program = str(TRAININGS.parent / "programs" / "pushes.py")
    command = ["{python}", program, *(f"--{flag}={{{flag}}}" for flag in flags)]
    study = small(task={"command": command, "records": {"pattern": PUSHES}}, guards={"smoke_test": None})
    config = {"steps": 60, "ssim_loss_weight": 0.0, "ssim_loss_max_t": 1.0, "ssim_grad_scale": 1.0}
    jobs = [StartJob(config, seed, 3) for seed in range(5)]
    starts = sorted(take_on_ray(study, TrialResources(), jobs), key=lambda start: start.job.seed)
    assert [(start.failure, len(start.records), start.job.seed) for start in starts] == [("", 3, seed) for seed in range(5)]
    assert len({start.values("total_norm")[0] for start in starts}) == 5


@pytest.mark.e2e
def test_starts_of_a_command_over_two_nodes(tmp_path: Path) -> None:
    study = commands(tmp_path / "pids")
    config = {**study.task_config, **study.baseline_settings}
    jobs = [StartJob({**config, "ssim_loss_weight": weight}, 0, 3) for weight in (0.0, 1.0, 2.0)]
    starts = list(take_on_ray(study, TrialResources(nodes=2), jobs))
    assert [(start.failure, len(start.records)) for start in starts] == [("", 3)] * 3
    assert len({start.values("total_norm")[0] for start in starts}) == 3
    assert wait_for(lambda: not alive(tmp_path / "pids"), 20)


def alive(pids: Path) -> list[int]:
    return [int(path.name) for path in pids.iterdir() if is_alive(int(path.name))]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_two_torchruns_on_two_nodes_are_pruned_and_leave_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    folder = run(commands(pids, "--pause", "0.05", "--ignore_term"), storage=tmp_path)
    baseline, trial = folder.trials()
    assert baseline.verdict == "safe" and baseline.steps == 40
    assert trial.verdict == "pruned" and trial.steps == 11, trial.reason
    assert len(list(pids.iterdir())) >= 10  # of two trainings: two launchers, two ranks and their children each, some shared
    assert wait_for(lambda: not alive(pids), 5), alive(pids)
    logs = list((folder.path / "work").rglob("output*.log"))
    text = {log.parent.name + log.name: log.read_text() for log in logs}
    assert any("rank 0 of 2" in one for one in text.values()) and any("rank 1 of 2" in one for one in text.values())


def test_when_a_node_dies_the_others_are_ended_even_if_nobody_calls_stop(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    code = f"import os, time; open({str(pids)!r} + f'/{{os.getpid()}}', 'w').close(); time.sleep(600)"
    argv = [sys.executable, "-c", code]
    process = NodesProcess(2, 1, 0, lambda node: Invocation(argv, {}, None, 0.5), lambda data: None, tmp_path)
    assert wait_for(lambda: len(alive(pids)) == 2, 60)
    ray.kill(process._runners[1])
    assert process.wait(60) and "a node died" in process.describe_exit()
    assert wait_for(lambda: not alive(pids), 30), alive(pids)


@pytest.mark.e2e  # a node that dies, and a killed driver on one node, are tested beside it
def test_a_killed_driver_leaves_nothing_on_any_node(tmp_path: Path, cluster: Cluster) -> None:
    pids, study_file = tmp_path / "pids", tmp_path / "nodes.yaml"
    study_file.write_text(commands(pids, "--pause", "0.5", "--steps", "4000", "--ignore_term").to_yaml())
    argv = [
        sys.executable,
        "-m",
        "tune_ssim",
        "run",
        str(study_file),
        "--storage-path",
        str(tmp_path),
        "--address",
        cluster.address,
    ]
    environment = {**os.environ, **ENVIRONMENT, "TUNE_SSIM_OPEN_CLUSTER": "1"}
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(argv, env=environment, stdout=log, stderr=log, start_new_session=True)
        started = wait_for(lambda: pids.exists() and len(list(pids.iterdir())) >= 6, 300)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert started, (tmp_path / "log").read_text()
    assert wait_for(lambda: not alive(pids), 60), alive(pids)
