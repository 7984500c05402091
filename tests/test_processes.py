"""Supervised commands: what they print, how they end, and that nothing of them is left, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tune_ssim.base.errors import UserError
from tune_ssim.trials.processes import OutputLog, SupervisedProcess, quote_of

# Ignores TERM, and leaves a daemon that has a session and a parent of its own. Every process leaves its pid in a folder.
STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / str(os.getpid())).touch()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        (folder / str(os.getpid())).touch()
        time.sleep(600)
    os._exit(0)
os.wait()
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
(folder / str(child.pid)).touch()
(folder / "ready").touch()
time.sleep(float(sys.argv[2]))
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def alive(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit() and is_alive(int(path.name))]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def run(argv: list[str], **options: object) -> tuple[SupervisedProcess, bytes]:
    output: list[bytes] = []
    process = SupervisedProcess(argv, output.append, **options)  # type: ignore[arg-type]
    assert process.wait(60)
    return process, b"".join(output)


def test_output_exit_code_environment_and_folder(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), os.environ['X']); print('to stderr', file=sys.stderr); sys.exit(3)"
    process, output = run([sys.executable, "-c", code], environment={**os.environ, "X": "a  'b' $(c)\n"}, cwd=tmp_path)
    assert output.decode().splitlines() == [f"{tmp_path} a  'b' $(c)", "", "to stderr"]
    assert process.exit_code == 3 and process.describe_exit() == "exit code 3"


def test_words_reach_the_command_literally() -> None:
    words = ["", "a b", "'\"", "$(rm -rf /)", "`x`", "new\nline", "*", "\N{GREEK SMALL LETTER ALPHA}", "--", "-c"]
    _, output = run([sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *words])
    import json

    assert json.loads(output) == words


def test_a_signal_has_its_name() -> None:
    process, _ = run([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])
    assert process.describe_exit() == "ended by SIGSEGV"


@pytest.mark.parametrize(
    ("argv", "options", "says"),
    [
        (["/no/such/program"], {}, "'/no/such/program' cannot be started: No such file or directory"),
        ([str(Path(__file__))], {}, "cannot be started: Permission denied"),
        (["true"], {"cwd": "/no/such/folder"}, "working folder '/no/such/folder' does not exist"),
        ([], {}, "needs a program"),
        (["a\0b"], {}, "no NUL"),
    ],
)
def test_what_cannot_be_started_is_said(argv: list[str], options: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        SupervisedProcess(argv, lambda _: None, **options)  # type: ignore[arg-type]


def test_stop_ends_the_whole_tree(tmp_path: Path) -> None:
    process = SupervisedProcess([sys.executable, "-c", STUBBORN, str(tmp_path), "600"], lambda _: None, grace_s=0.5)
    assert wait_for((tmp_path / "ready").exists)
    assert len(alive(tmp_path)) == 3
    process.stop()
    assert not alive(tmp_path)
    assert process.describe_exit() == "ended by SIGKILL"


def test_what_a_command_leaves_behind_is_ended_too(tmp_path: Path) -> None:
    process, _ = run([sys.executable, "-c", STUBBORN, str(tmp_path), "0"], grace_s=0.2)
    assert process.exit_code == 0 and process.left == 2
    assert not alive(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_owner_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    owner = (
        "import sys, time; from tune_ssim.trials.processes import SupervisedProcess\n"
        "p = SupervisedProcess([sys.executable, '-c', sys.argv[1], sys.argv[2], '600'], print, grace_s=0.2); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", owner, STUBBORN, str(tmp_path)])
    assert wait_for((tmp_path / "ready").exists)
    os.kill(process.pid, number)
    process.wait()
    assert wait_for(lambda: not alive(tmp_path)), alive(tmp_path)


def test_a_flood_is_read_whole_and_kept_within_bounds(tmp_path: Path) -> None:
    log = OutputLog(tmp_path / "output.log", part_bytes=2**20)
    seen = 0

    def take(data: bytes) -> None:
        nonlocal seen
        seen += len(data)
        log.write(data)

    process = SupervisedProcess(["sh", "-c", "echo begin; yes | head -c 20000000; echo the end"], take)
    assert process.wait(60)
    assert seen == 20_000_014
    assert log.first.read_bytes().startswith(b"begin\n") and log.last_lines(1) == ["the end"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 7 * 2**20  # parts are whole reads of the pipe
    assert log.dropped > 10_000_000


def test_last_lines_can_be_shown(tmp_path: Path) -> None:
    log = OutputLog(tmp_path / "output.log")
    log.write(b"one\n\n\x1b[31mred\x1b[0m\nbad \xff byte\n 10%|#\r 20%|##\r" + b"x" * 1000)
    lines = log.last_lines(4)
    assert lines[0] == "bad \N{REPLACEMENT CHARACTER} byte" and lines[1:3] == [" 10%|#", " 20%|##"] and len(lines[3]) == 300


def test_a_failing_reader_does_not_stop_the_command() -> None:
    def fail(_: bytes) -> None:
        raise RuntimeError("no")

    process = SupervisedProcess(["sh", "-c", "yes | head -c 1000000"], fail)
    assert process.wait(60) and process.exit_code == 0
    assert isinstance(process.failure, RuntimeError)


def test_a_quote_begins_with_what_was_raised_and_is_short() -> None:
    frame = ['  File "/a/train.py", line 3, in <module>', "    main(1)", "    ~~~~^^^"]
    begin = ["start", "Traceback (most recent call last):", *frame * 9]
    found = quote_of([*begin, "torch.cuda.OutOfMemoryError: 3 GiB", "", "[rank0] x" + "y" * 900, "ended " * 60])
    assert found.startswith("torch.cuda.OutOfMemoryError: 3 GiB | ") and "^^^" not in found and len(found) <= 400
    assert quote_of(["a", "b " * 30, "ValueError: in the words of a line"]).startswith("a | b b")
    assert quote_of([str(n) * 300 for n in range(9)]).count("|") == 0 and quote_of([]) == ""
