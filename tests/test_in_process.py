"""Studies without Ray: same trials as under Ray, a breakpoint that works, and a stop at any moment that can be resumed."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_studies import Said
from small_studies import SMALL, TESTS
from test_cli import tune_ssim

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import append_line
from tune_ssim.orchestration.phases import run_study
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.study import Study, load_study

CONFIRMED = {"confirm": {"finalists": 2, "seeds": 2, "steps": 60}}


def small(**changes: Any) -> Study:
    return load_study({**SMALL, **changes})


def facts(folder: StudyFolder) -> dict[str, Any]:
    """Everything of the trials that does not depend on the clock."""
    found = {}
    for trial in folder.trials():
        metrics = {name: value for name, value in trial.metrics.items() if name != "seconds"}
        found[trial.trial_id] = (trial.config, trial.verdict, trial.reason, trial.evidence, trial.steps, metrics)
    return found


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return run_study(small(**CONFIRMED), storage=tmp_path_factory.mktemp("storage"), in_process=True)


def test_same_trials_and_verdicts_as_under_ray(in_process: StudyFolder, tmp_path: Path) -> None:
    under_ray = run_study(small(**CONFIRMED), storage=tmp_path)
    assert facts(under_ray) == facts(in_process)
    assert {trial.verdict for trial in in_process.trials()} >= {"safe", "pruned"}
    assert any(trial.role == "confirm" for trial in in_process.trials())


def test_no_ray_is_loaded(tmp_path: Path) -> None:
    study = tmp_path / "small.yaml"
    study.write_text(small(search={"trials": 2}).to_yaml())
    code = """
import sys
from tune_ssim.cli.app import exit_code
code = exit_code(["run", sys.argv[1], "--in-process", "--storage-path", sys.argv[2]])
print("ray" in sys.modules, code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(study), str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr


def test_a_breakpoint_in_the_users_task_works(tmp_path: Path) -> None:
    (tmp_path / "paused.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from small_task import SmallTask
class Paused(SmallTask):
    def evaluate(self):
        found = super().evaluate()
        breakpoint()
        return found
"""
    )
    study = tmp_path / "paused.yaml"
    study.write_text(small(task="paused:Paused", import_path=str(tmp_path), search={"trials": 2}, baseline={"seeds": 1}).to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "tune_ssim", "run", str(study), "--in-process", "--storage-path", str(tmp_path)],
        input="p sorted(found)\nc\n" * 4,
        capture_output=True,
        text=True,
        timeout=120,
        env={key: value for key, value in os.environ.items() if key != "PYTHONBREAKPOINT"},
    )
    assert done.returncode in (0, 2), done.stderr
    assert done.stdout.count("(Pdb) ['psnr', 'ssim']") >= 2, done.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resources": {"workers": 2}}, "workers and nodes need Ray"),
        ({"scheduler": {"asha": {"grace_steps": 10}}}, "asha needs trials side by side"),
    ],
)
def test_what_needs_ray_is_said(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run_study(small(**changes), storage=tmp_path, in_process=True)


def test_a_study_without_matplotlib_leaves_its_pictures_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    objective = [{"maximize": "delta_ssim", **SMALL["objective"]}, {"maximize": "psnr"}]
    study = small(calibration={"batches": 2}, objective=objective, baseline={"seeds": 1}, search={"trials": 2, "concurrency": 2})
    progress = Said()
    folder = run_study(study, storage=tmp_path, in_process=True, progress=progress)
    assert sum(trial.role == "search" for trial in folder.trials()) == 2
    assert "small: 1 baseline, then 2 trials, 1 at a time" in progress.phases
    for picture in ("calibration.png", "pareto.png"):
        assert f"{picture} was not drawn; it needs Matplotlib: pip install 'tune-ssim[pictures]'" in progress.lines
        assert not (folder.path / picture).exists()


def test_a_confirm_phase_whose_baseline_failed_is_resumed(tmp_path: Path) -> None:
    """What was wrong is mended meanwhile, here a fault of the longer training; the search is not run again."""
    study = small(**CONFIRMED)
    folder = run_study(small(confirm=None), storage=tmp_path, in_process=True)
    before = folder.trials_file.read_bytes()
    failed = {**folder.trials()[0].to_dict(), "trial_id": "confirm-baseline-0", "verdict": "error", "reason": "no memory"}
    append_line(folder.trials_file, failed)
    folder.study_file.write_text(study.to_yaml())
    run_study(study, storage=tmp_path, in_process=True, resume=True)
    assert folder.trials_file.read_bytes().startswith(before)
    verdicts = {trial.trial_id: trial.verdict for trial in folder.trials() if trial.trial_id.startswith("confirm-baseline")}
    assert set(verdicts.values()) == {"safe"} and len(verdicts) == 2


def test_what_ended_is_not_run_again_when_its_lines_are_lost(tmp_path: Path) -> None:
    folder = run_study(small(**CONFIRMED), storage=tmp_path, in_process=True)
    before, progress = facts(folder), Said()
    for kept in (b"", folder.trials_file.read_bytes()[:3000]):
        folder.trials_file.write_bytes(kept)
        n_started = sum(event["event"] == "trial" for event in folder.events())
        run_study(small(**CONFIRMED), storage=tmp_path, in_process=True, resume=True, progress=progress)
        assert facts(folder) == before
        assert sum(event["event"] == "trial" for event in folder.events()) == n_started
        assert any("trials.jsonl lacked" in line and "restored from events.jsonl" in line for line in progress.lines)
    for file in (folder.path / "baseline").rglob("*.json"):
        file.unlink()
    run_study(small(**CONFIRMED), storage=tmp_path, in_process=True, resume=True, progress=progress)
    assert facts(folder) == before
    assert any(line.startswith("baseline-0 runs again: no file in ") for line in progress.lines)


def test_another_study_is_not_resumed_under_the_same_name(tmp_path: Path) -> None:
    folder = run_study(small(search={"trials": 2}), storage=tmp_path, in_process=True)
    written = folder.study_file.read_bytes()
    for changes in ({"search": {"trials": 2, "seed": 7}}, {"task_config": {"steps": 60}}):
        with pytest.raises(
            UserError, match=r"study.yaml: the study was started with another (search|task_config); resume it without"
        ):
            run_study(small(**changes), storage=tmp_path, in_process=True, resume=True)
        assert folder.study_file.read_bytes() == written
    run_study(small(search={"trials": 4}), storage=tmp_path, in_process=True, resume=True)  # more of the same
    assert sum(trial.role == "search" for trial in folder.trials()) == 4 and load_study(folder.study_file).search.trials == 4


def test_a_closed_terminal_is_a_stop_that_trials_reports(tmp_path: Path) -> None:
    study_file = tmp_path / "small.yaml"
    study_file.write_text(small(name="closed", task_config={"steps": 100_000}).to_yaml())
    folder = StudyFolder(tmp_path / "closed")
    ours, its = pty.openpty()

    def in_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    driver = subprocess.Popen(
        [sys.executable, "-m", "tune_ssim", "run", str(study_file), "--in-process", "--storage-path", str(tmp_path)],
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=in_terminal,
    )
    os.close(its)
    deadline = time.monotonic() + 120
    while not any(event["event"] == "records" for event in folder.events()) and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            os.read(ours, 65536)
    os.close(ours)  # the kernel sends SIGHUP
    assert driver.wait(timeout=120) == 130
    assert [*folder.events()][-1]["reason"] == "interrupted; `tune-ssim run --resume --name closed` goes on"
    listed = tune_ssim("trials", cwd=tmp_path)
    assert "it was interrupted; `tune-ssim run --resume --name closed` goes on" in listed.stdout


# ---- a stop at any write ----


def in_child(action: Callable[[], None]) -> int:
    """The exit code of `action` in a copy of this process; -9 for one that was killed."""
    if (pid := os.fork()) == 0:
        code = 70
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(write: int, action: Callable[[], Any]) -> Callable[[], None]:
    """`action`, killed in place of its n-th write to a file or rename; each of them is a moment at which a machine may fail."""
    count = 0

    def or_die(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == write:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    def run() -> None:
        os.write, os.fsync, os.replace = or_die(os.write), or_die(os.fsync), or_die(os.replace)  # type: ignore[assignment]
        os.rename, Path.replace = or_die(os.rename), or_die(Path.replace)  # type: ignore[assignment,method-assign]
        action()

    return run


def test_a_study_stopped_at_any_write_of_any_phase_is_resumed(in_process: StudyFolder, tmp_path: Path) -> None:
    """The same trials and verdicts as undisturbed, no finished trial run again, no trial with two verdicts."""
    study = small(**CONFIRMED)
    every = 1 if os.environ.get("TUNE_SSIM_E2E") else 23  # `make e2e` takes each of them
    write, n_killed = 1, 0
    while True:
        storage = tmp_path / str(write)

        def run(resume: bool, storage: Path = storage) -> StudyFolder:
            resume = resume and (storage / study.name / "study.yaml").exists()
            return run_study(study, storage=storage, in_process=True, resume=resume)

        code = in_child(killed_at(write, lambda: run(resume=False)))
        if code == 0:
            break  # there were fewer writes
        assert code == -signal.SIGKILL, write
        n_killed += 1
        folder = StudyFolder(storage / study.name)
        before = [json.loads(line) for line in _whole_lines(folder.path / "trials.jsonl")]
        assert in_child(lambda: run(resume=True)) == 0, write
        assert facts(folder) == facts(in_process), write
        lines = [json.loads(line) for line in _whole_lines(folder.path / "trials.jsonl")]
        assert lines[: len(before)] == before, write  # what had ended was not run again
        assert len({line["trial_id"] for line in lines}) == len(lines), write
        write += every
    assert n_killed >= 10


def _whole_lines(file: Path) -> list[str]:
    if not file.exists():
        return []
    return [line for line in file.read_text().split("\n")[:-1] if line.endswith("}")]


def test_a_guided_study_gives_the_same_trials_after_a_stop(tmp_path: Path) -> None:
    """Calibrated by total_norm readings of the small task; its later trials are lost, as if it had been stopped before them."""
    given = {"calibration": {"batches": 12}, "search": {"trials": 6, "concurrency": 2}}
    whole = run_study(small(**given), storage=tmp_path / "whole", in_process=True)
    again = run_study(small(**given), storage=tmp_path / "again", in_process=True)
    kept = again.trials_file.read_bytes().splitlines(keepends=True)[:5]
    again.trials_file.write_bytes(b"".join(kept))
    again.events_file.unlink()  # else the lost trials come back from there
    resumed = run_study(small(**given), storage=tmp_path / "again", resume=True, in_process=True)
    assert repr(facts(resumed)) == repr(facts(whole))  # as text: a NaN is equal there
    assert any(trial.curve for trial in whole.trials()) and len(whole.trials()) > 5
