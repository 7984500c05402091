"""One writer a study: real processes that hold, die, stop and race for the lock."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_studies import SMALL, study
from test_cli import mistake, tune_ssim

from tune_ssim.base.errors import UserError
from tune_ssim.results.study_lock import LOCK_FILE, Owner, StudyLock
from tune_ssim.study.study import load_study

ROOT = Path(__file__).parents[1]
HOLD = """
    import sys
    from pathlib import Path
    from tune_ssim.results.study_lock import StudyLock

    with StudyLock(Path(sys.argv[1]), heartbeat_s=0.1, max_silence_s=1.0):
        print("held", flush=True)
        sys.stdin.read()
"""
# Each adds its line only while it holds the lock; who is refused tries again. `overlaps` is what must never be.
COUNT = """
    import os, sys, time
    from pathlib import Path
    from tune_ssim.base.errors import UserError
    from tune_ssim.results.study_lock import StudyLock

    folder, inside, won = Path(sys.argv[1]), Path(sys.argv[1]) / "inside", 0
    print("ready", flush=True)
    sys.stdin.readline()
    while won < int(sys.argv[2]):
        try:
            with StudyLock(folder, heartbeat_s=0.1, max_silence_s=1.0):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                time.sleep(0.002)
                os.unlink(inside)
                won += 1
        except UserError:
            time.sleep(0.001)
"""
# Takes over from the dead owner, says so, and ends without a word to anybody.
DIE_AS_OWNER = """
    import os, sys
    from pathlib import Path
    from tune_ssim.base.errors import UserError
    from tune_ssim.results.study_lock import StudyLock

    print("ready", flush=True)
    sys.stdin.readline()
    try:
        StudyLock(Path(sys.argv[1]), heartbeat_s=0.1, max_silence_s=1.0).__enter__()
    except UserError as error:
        print(error, flush=True)
    else:
        print("owner", flush=True)
        sys.stdin.read()
"""


@contextmanager
def process(code: str, *arguments: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    made = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield made
    finally:
        made.kill()
        made.communicate()


def line_of(made: subprocess.Popen[str]) -> str:
    assert made.stdout is not None
    return made.stdout.readline().strip()


def say(made: subprocess.Popen[str]) -> None:
    assert made.stdin is not None
    made.stdin.write("\n")
    made.stdin.flush()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lock(folder: Path, **changes: float) -> StudyLock:
    return StudyLock(folder, **{"heartbeat_s": 0.1, "max_silence_s": 1.0, **changes})


def written_elsewhere(folder: Path, **changes: Any) -> Path:
    """A lock as a process on another machine writes it."""
    file = folder / LOCK_FILE
    owner = {**vars(Owner.this_process()), "host": "node-7", "pid": 4711, "since": "2026-01-02T03:04:05+00:00", **changes}
    file.write_text(json.dumps(owner))
    return file


def aged(file: Path, age_s: float) -> None:
    os.utime(file, (time.time() - age_s, time.time() - age_s))


def test_a_second_writer_is_refused_with_host_process_and_time(tmp_path: Path) -> None:
    folder = tmp_path / "fundus"
    folder.mkdir()
    with process(HOLD, folder) as owner:
        assert line_of(owner) == "held"
        with pytest.raises(UserError) as refused, lock(folder):
            pass
        words = str(refused.value)
        assert words.startswith(f"study fundus is being run by {socket.gethostname()}, process {owner.pid}, since 20")
        assert left_in(folder) == [LOCK_FILE]
        owner.communicate("", timeout=30)  # ends as it should
        assert left_in(folder) == []
    with lock(folder):
        pass
    assert left_in(folder) == []


@pytest.mark.parametrize("option", [[], ["--in-process"]])
def test_a_study_that_runs_cannot_be_resumed_beside_it(tmp_path: Path, option: list[str]) -> None:
    folder = study(tmp_path, name="small", yaml=load_study(SMALL).to_yaml())
    with lock(folder.path):
        before = left_in(folder.path)
        mistake(tune_ssim("run", "--resume", *option, cwd=tmp_path), f"study small is being run by {socket.gethostname()}")
        assert left_in(folder.path) == before


def test_the_same_process_has_it_once(tmp_path: Path) -> None:
    with lock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), lock(tmp_path):
            pass
        assert left_in(tmp_path) == [LOCK_FILE]


def test_it_is_given_back_when_the_study_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock(tmp_path):
        raise ZeroDivisionError
    assert left_in(tmp_path) == []


def test_a_killed_owner_on_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    with process(HOLD, tmp_path) as owner:
        assert line_of(owner) == "held"
        owner.send_signal(signal.SIGKILL)
        wait_until(lambda: Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        # Its heartbeat is fresh and its parent has not noticed its death.
        with lock(tmp_path, max_silence_s=1e9) as taken:
            assert not taken.is_lost
    assert left_in(tmp_path) == []


def test_a_process_id_that_was_given_again_is_not_the_owner(tmp_path: Path) -> None:
    here = Owner.this_process()
    written_elsewhere(tmp_path, host=here.host, pid=os.getpid(), started=(here.started or 0) - 1)
    with lock(tmp_path, max_silence_s=1e9):
        pass
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("elsewhere", [{}, {"host": socket.gethostname(), "namespace": "another boot"}])
def test_an_owner_elsewhere_is_known_by_its_heartbeat(tmp_path: Path, elsewhere: dict[str, Any]) -> None:
    file = written_elsewhere(tmp_path, **elsewhere)
    aged(file, 20)
    with pytest.raises(UserError, match=r"process 4711, since 2026-01-02T03:04:05\+00:00; its last sign of life came 20 s ago"):
        lock(tmp_path, max_silence_s=60).__enter__()
    aged(file, 90)
    with lock(tmp_path, max_silence_s=60):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert left_in(tmp_path) == []


def test_an_owner_elsewhere_whose_file_server_was_away_is_alive(tmp_path: Path) -> None:
    """The age is beyond the limit, and then a heartbeat comes."""
    file = written_elsewhere(tmp_path)
    aged(file, 90)
    touch = f"import os, time; time.sleep(0.5); os.utime({str(file)!r})"
    with process(touch), pytest.raises(UserError, match="node-7"):
        lock(tmp_path, max_silence_s=60, heartbeat_s=2).__enter__()


def test_the_heartbeat_keeps_the_file_young(tmp_path: Path) -> None:
    with process(HOLD, tmp_path) as owner:
        assert line_of(owner) == "held"
        file = tmp_path / LOCK_FILE
        aged(file, 500)
        wait_until(lambda: time.time() - file.stat().st_mtime < 100)
        os.kill(owner.pid, signal.SIGSTOP)
        time.sleep(0.3)  # a beat under way
        aged(file, 500)
        time.sleep(0.5)
        assert time.time() - file.stat().st_mtime > 400  # so that it was the owner's thread that touched it


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b'{"pid": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_lock_that_is_not_written_yet_counts_by_its_age(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / LOCK_FILE
    file.write_bytes(content)
    with pytest.raises(UserError, match="being started by another process"):
        lock(tmp_path, max_silence_s=60).__enter__()
    aged(file, 90)
    with lock(tmp_path, max_silence_s=60):
        pass
    assert left_in(tmp_path) == []


def test_an_owner_that_was_taken_over_from_knows_it_and_removes_nothing(tmp_path: Path) -> None:
    """A process that was suspended for long, on a machine that others cannot look into."""
    with lock(tmp_path) as suspended:
        assert suspended._owner is not None
        suspended.require_held()
        (tmp_path / LOCK_FILE).unlink()
        file = written_elsewhere(tmp_path)
        wait_until(lambda: suspended.is_lost)
        with pytest.raises(UserError, match="another one runs the study now"):
            suspended.require_held()
        aged(file, 90)
        time.sleep(0.3)
        assert time.time() - file.stat().st_mtime > 80  # another's file is not touched
    assert left_in(tmp_path) == [LOCK_FILE] and json.loads(file.read_text())["host"] == "node-7"


def test_several_at_once_never_overlap(tmp_path: Path) -> None:
    made = [process(COUNT, tmp_path, 60) for _ in range(3)]
    running = [one.__enter__() for one in made]
    try:
        for one in running:
            assert line_of(one) == "ready"
        for one in running:
            say(one)
        for one in running:
            assert one.wait(120) == 0
    finally:
        for context in made:
            context.__exit__(None, None, None)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("attempt", range(8))
def test_of_several_that_take_over_at_once_one_wins(tmp_path: Path, attempt: int) -> None:
    folder = tmp_path / "fundus"
    folder.mkdir()
    here = Owner.this_process()
    written_elsewhere(folder, host=here.host, pid=os.getpid(), started=-5)  # dead
    made = [process(DIE_AS_OWNER, folder) for _ in range(4)]
    running = [one.__enter__() for one in made]
    try:
        for one in running:
            assert line_of(one) == "ready"
        for one in running:
            say(one)
        said = [line_of(one) for one in running]
        assert said.count("owner") == 1, said
        winner = running[said.index("owner")]
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == winner.pid
        wait_until(lambda: left_in(folder) == [LOCK_FILE])
    finally:
        for context in made:
            context.__exit__(None, None, None)
    with lock(folder):  # the winner was killed
        pass


def test_a_process_that_died_while_it_took_over_is_in_nobodys_way(tmp_path: Path) -> None:
    here = Owner.this_process()
    dead = {**vars(here), "started": -5}
    (tmp_path / LOCK_FILE).write_text(json.dumps({**dead, "token": "first"}))
    (tmp_path / f".{LOCK_FILE}.first").write_text(json.dumps({**dead, "token": "second"}))
    (tmp_path / f".{LOCK_FILE}.second").write_text(json.dumps({**dead, "token": "third"}))
    with lock(tmp_path, max_silence_s=1e9):
        pass
    assert left_in(tmp_path) == []
