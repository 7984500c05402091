"""cluster/slurm.sbatch without SLURM: its shell logic with stand-ins for every program, and a real study on two hosts."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import Host, hosts, ray_environment, why_impossible
from ruamel.yaml import YAML
from small_studies import SMALL

from tune_ssim.cli.app import exit_code
from tune_ssim.orchestration.stops import stops_as_ctrl_c

SBATCH = Path(__file__).resolve().parents[1] / "cluster" / "slurm.sbatch"
RAY = """#!/bin/bash
echo "ray $* MODE=$RAY_AUTH_MODE TOKEN=$(cat $RAY_AUTH_TOKEN_PATH) BITS=$(stat -c %a $RAY_AUTH_TOKEN_PATH)" >> $SEEN
for word; do case $word in --temp-dir=*) folder=${word#*=};; esac; done
case $* in *--head*) mkdir -p $folder && echo 127.0.0.1:$$ > $folder/ray_current_cluster;; esac
exec sleep 60
"""
STUDY = """#!/bin/bash
echo "study $*" >> $SEEN
trap 'exit 130' TERM
[ -n "$STUDY_ENDS" ] && exit $STUDY_ENDS
while sleep 0.05; do :; done
"""
SRUN = """#!/bin/bash
echo "srun $1 $2 $3" >> $SEEN
while [[ $1 == --* ]]; do shift; done
[ "$1" = getent ] && { echo "127.0.0.1 STREAM node"; exit; }
exec "$@"
"""
PYTHON = '#!/bin/bash\n[[ $2 == "import importlib"* ]] && exec {python} "$@"\nexit 0\n'  # without Ray there is no node to wait for
SCONTROL = '#!/bin/bash\necho "scontrol $*" >> $SEEN\n'


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the script as job 7 of two nodes."""
    (bin_ := tmp_path / "bin").mkdir()
    programs = {"ray": RAY, "tune-ssim": STUDY, "srun": SRUN, "python": PYTHON, "scontrol": SCONTROL}
    for name, text in programs.items():
        (bin_ / name).write_text(text.replace("{python}", sys.executable))
        (bin_ / name).chmod(0o755)

    def start(*arguments: str, job_id: int = 7, nodes: int = 2, ends: str = "") -> subprocess.Popen[str]:
        slurm = {
            "JOB_ID": str(job_id),
            "NNODES": str(nodes),
            "CPUS_PER_TASK": "4",
            "SUBMIT_DIR": str(tmp_path),
            "D_NODENAME": "node",
        }
        environment = {f"SLURM_{key}".replace("SLURM_D_", "SLURMD_"): value for key, value in slurm.items()} | {
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "TUNE_SSIM_BIN": str(bin_),
            "SEEN": str(tmp_path / f"seen-{job_id}"),
            "STUDY_ENDS": ends,
            "RAY_ADDRESS": "192.0.2.1:6379",  # of another user
        }
        return subprocess.Popen(["bash", SBATCH, *arguments], env=environment, cwd=tmp_path, text=True, stderr=subprocess.PIPE)

    return start


def seen(folder: Path, job_id: int = 7, until: str = "") -> list[str]:
    file, deadline = folder / f"seen-{job_id}", time.monotonic() + 20
    while until and time.monotonic() < deadline and not (file.exists() and until in file.read_text()):
        time.sleep(0.02)
    return file.read_text().splitlines()


def test_the_walltime_stops_the_study_and_queues_the_job_again(tmp_path: Path, job: Callable[..., subprocess.Popen[str]]) -> None:
    process = job("study.yaml", "--trials", "8")
    seen(tmp_path, until="ray start --address=")  # srun runs beside the script
    lines = seen(tmp_path, until="study ")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 130, process.stderr and process.stderr.read()
    (head,) = (line for line in lines if "--head" in line)
    (study,) = (line for line in lines if line.startswith("study"))
    address = study.split()[-1]
    assert study == f"study run study.yaml --trials 8 --name slurm-7 --resume-if-started --address {address}"
    assert "MODE=token" in head and "BITS=600" in head and "--include-dashboard=false" in head
    assert any(line.startswith(f"ray start --address={address} --block") for line in lines), lines
    assert seen(tmp_path)[-1] == "scontrol requeue 7"
    assert not list((tmp_path / "tune_ssim_results").glob(".ray-token*")) and not temporary_folders(head)


def temporary_folders(line: str) -> list[Path]:
    (folder,) = (Path(word.split("=")[1]).parent for word in line.split() if word.startswith("--temp-dir"))
    assert len(str(folder)) < 20  # Ray's sockets add 80 bytes of at most 107
    return [folder] if folder.exists() else []


@pytest.mark.parametrize(("ends", "code"), [("0", 0), ("2", 2), ("130", 130)])
def test_a_study_that_ends_by_itself_ends_the_job(
    tmp_path: Path, job: Callable[..., subprocess.Popen[str]], ends: str, code: int
) -> None:
    assert job("study.yaml", nodes=1, ends=ends).wait(20) == code
    assert not any(line.startswith(("scontrol", "srun")) for line in seen(tmp_path))


def test_a_cancelled_job_is_not_queued_again(tmp_path: Path, job: Callable[..., subprocess.Popen[str]]) -> None:
    process = job("study.yaml", nodes=1)
    seen(tmp_path, until="study ")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    assert not any(line.startswith("scontrol") for line in seen(tmp_path))


def test_jobs_on_one_node_do_not_meet(tmp_path: Path, job: Callable[..., subprocess.Popen[str]]) -> None:
    processes = [job("study.yaml", job_id=one, nodes=1) for one in (7, 8)]
    heads = [next(line for line in seen(tmp_path, one, until="study ") if "--head" in line) for one in (7, 8)]
    own = [{word for word in head.split() if word.startswith(("--temp-dir", "TOKEN"))} for head in heads]
    assert [len(words) for words in own] == [2, 2] and not own[0] & own[1]
    for process in processes:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def test_sigterm_interrupts_a_study_that_a_shell_has_started_in_the_background() -> None:
    """Such a process ignores SIGINT from its start."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), stops_as_ctrl_c():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_resume_if_started_starts_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "study.yaml").open("w") as file:
        YAML().dump(SMALL | {"search": {"trials": 1, "seed": 0}, "baseline": {"seeds": 1}}, file)
    again = ["run", "study.yaml", "--in-process", "--name", "job", "--resume-if-started"]
    for _ in range(2):
        exit_code(again)
    assert [path.name for path in (tmp_path / "tune_ssim_results").glob("*/study.yaml")] == ["study.yaml"]
    assert len((tmp_path / "tune_ssim_results" / "job" / "trials.jsonl").read_text().splitlines()) == 2


@pytest.mark.e2e
@pytest.mark.skipif((reason := why_impossible()) is not None, reason=str(reason))
def test_a_study_goes_on_after_its_walltime(tmp_path: Path) -> None:
    """On two hosts, with the real Ray; `srun` is ssh to the second one."""
    storage = tmp_path / "shared"
    ray_environment(tmp_path / "shared_venv")
    with hosts(2, tmp_path) as (first, second):
        (bin_ := first.home / "bin").mkdir()
        by_ssh = f'ssh -o StrictHostKeyChecking=no {second.address} "$(export -p | grep -v HOME=); $(printf "%q " "$@")"'
        options = f'while [[ $1 == --* ]]; do shift; done\n[ "$1" = getent ] && echo {first.address} && exit'
        (bin_ / "srun").write_text(f"#!/bin/bash\n{options}\nexec {by_ssh}\n")
        (bin_ / "scontrol").write_text(f"#!/bin/bash\necho $* >> {tmp_path}/requeued\n")
        for script in bin_.iterdir():
            script.chmod(0o755)
        with (first.home / "study.yaml").open("w") as file:
            YAML().dump(SMALL | {"task_config": {"steps": 400}}, file)
        command = slurm_job(first, storage, tmp_path / "shared_venv")
        with (tmp_path / "job.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and len(ended(storage)) < 3 and process.poll() is None:
                time.sleep(0.2)
            first.run("pkill", "-USR1", "-o", "-f", "slurm.sbatch")
            assert process.wait(100) == 130, (tmp_path / "job.log").read_text()
            before = ended(storage)
            assert (tmp_path / "requeued").read_text() == "requeue 7\n"
            assert len(before) < 10
            assert subprocess.run(command, stdout=log, stderr=log, timeout=300).returncode == 0, (tmp_path / "job.log").read_text()
    assert ended(storage)[: len(before)] == before and len(ended(storage)) == 10
    assert "Ray: 4 CPUs" in (tmp_path / "job.log").read_text()


def slurm_job(host: Host, storage: Path, environment: Path) -> list[str]:
    slurm = ["SLURM_JOB_ID=7", "SLURM_NNODES=2", "SLURM_CPUS_PER_TASK=2", "SLURM_SUBMIT_DIR=.", "SLURMD_NODENAME=first"]
    here = [f"TUNE_SSIM_STORAGE={storage}", f"TUNE_SSIM_BIN={environment / 'bin'}"]
    script = f"PATH={host.home / 'bin'}:$PATH exec bash {shlex.quote(str(SBATCH))} study.yaml"
    return host.command("env", *slurm, *here, "bash", "-c", script)


def ended(storage: Path) -> list[str]:
    """The lines of the trials that have ended."""
    file = storage / "slurm-7" / "trials.jsonl"
    return file.read_text().splitlines() if file.exists() else []
