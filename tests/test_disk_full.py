"""Storage that fails in any phase: exit code 2 and one line, and a resumed study ends as an undisturbed one."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import Ran, command, without_pictures
from test_in_process import CONFIRMED, _whole_lines, facts, small

from tune_ssim.orchestration.phases import run_study
from tune_ssim.results.study_folder import StudyFolder

STUDY = small(preflight={}, calibration={"batches": 12}, search={"trials": 3, "seed": 0, "concurrency": 2}, **CONFIRMED)
IS_LONG = bool(os.environ.get("TUNE_SSIM_E2E"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with without_pictures():
        return facts(run_study(STUDY, storage=tmp_path_factory.mktemp("undisturbed"), in_process=True))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a small disk, or gives it another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(kilobytes: int) -> Path:
        option = f"remount,size={kilobytes}k" if place.is_mount() else f"size={kilobytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", place], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return place

    yield resize
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


def run(storage: Path, *options: str) -> Ran:
    study_file = storage.parent / "small.yaml"
    study_file.write_text(STUDY.to_yaml())
    is_started = (storage / "small/study.yaml").exists()
    with without_pictures():
        return command(
            "run", *(["--resume"] if is_started else [str(study_file)]), *options, "--in-process", "--storage-path", str(storage)
        )


def check_resumed(storage: Path, failed: Ran, undisturbed: dict[str, Any], words: str) -> None:
    assert failed.code == 2 and not failed.problem, failed.stderr
    assert words in failed.stderr and ("--resume --name small" in failed.stderr or "start the study again" in failed.stderr)
    folder = StudyFolder(storage / "small")
    before = _whole_lines(folder.trials_file)
    assert run(storage).code == 0
    assert facts(folder) == undisturbed
    lines = _whole_lines(folder.trials_file)
    assert lines[: len(before)] == before and len(lines) == len(undisturbed)


@pytest.mark.parametrize("kilobytes", range(4, 500, 12) if IS_LONG else [4, 64, 180, 340])
def test_a_full_disk(disk: Callable[[int], Path], kilobytes: int, undisturbed: dict[str, Any]) -> None:
    storage = disk(kilobytes)
    failed = run(storage)
    disk(50_000)
    check_resumed(storage, failed, undisturbed, f"No space left on device (the disk at {storage}")


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
def test_storage_that_fails_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, undisturbed: dict[str, Any]
) -> None:
    """From the n-th write on, every write fails, as on a disk over its quota, remounted read-only or broken."""
    real = os.write
    for first in range(5, 200, 5) if IS_LONG else [40]:
        count = itertools.count(1)

        def fail_later(*arguments: Any, first: int = first, count: Iterator[int] = count) -> int:
            if next(count) >= first:
                raise OSError(number, os.strerror(number))
            return real(*arguments)

        storage = tmp_path / str(first) / "storage"
        storage.mkdir(parents=True)
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", fail_later)
            failed = run(storage)
        if next(count) <= first:
            break  # there were fewer writes
        check_resumed(storage, failed, undisturbed, os.strerror(number))
