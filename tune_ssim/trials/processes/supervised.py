"""A command run under a supervisor: its output, its exit code, and termination of its whole process tree."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tune_ssim.base.errors import UserError
from tune_ssim.trials.processes import supervisor

GRACE_S = 10.0  # between TERM and KILL; torchrun gives its workers 30 s, saving a small model takes less
CHUNK = 2**20


class SupervisedProcess:
    """Starts `argv` (no shell) under a supervisor, see `supervisor`. `on_output` is called in a separate thread with what the
    command prints, stdout and stderr together. A slow `on_output` slows the command down; no output is lost.

    Raises UserError if the command cannot be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        on_output: Callable[[bytes], None],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        if not argv or any("\0" in word for word in argv):
            raise UserError(f"a command needs a program and no NUL characters, got {list(argv)!r}")
        if cwd is not None and not Path(cwd).is_dir():
            raise UserError(f"command {argv[0]!r}: working folder {str(cwd)!r} does not exist")
        self.argv, self.grace_s = list(argv), grace_s
        self._on_output = on_output
        output, output_end = os.pipe()
        status, status_end = os.pipe()
        alive, self._alive = os.pipe()
        try:
            # -I -S: neither the user's site packages nor environment variables such as PYTHONPATH reach the supervisor itself.
            starter = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(grace_s), str(status_end), "--", *argv],
                stdin=alive,
                stdout=output_end,
                stderr=output_end,
                pass_fds=(status_end,),
                env=dict(environment) if environment is not None else None,
                cwd=cwd,
            )
        except (OSError, ValueError) as error:  # e.g. an environment that is too long or contains a NUL
            for end in (output, status, self._alive):
                os.close(end)
            raise UserError(f"command {argv[0]!r} cannot be started: {error}") from None
        finally:
            for end in (output_end, status_end, alive):
                os.close(end)
        self._status = os.fdopen(status, "rb", buffering=0)
        self.exit_code: int | None = None
        self.failure: BaseException | None = None  # exception of `on_output`
        self.left = 0  # processes that the command left running when it exited; they were ended
        self._ended = threading.Event()
        started = self._read_status()
        starter.wait()
        if "pid" not in started:
            os.close(output)
            os.close(self._alive)
            raise UserError(f"command {argv[0]!r} cannot be started: {started.get('failed', 'its supervisor died')}")
        self.pid = int(str(started["pid"]))
        self._threads = [
            threading.Thread(target=self._pump, args=(output,), daemon=True),
            threading.Thread(target=self._watch, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the whole tree has ended and all output was read. False if that takes longer than `timeout` seconds."""
        if not self._ended.wait(timeout):
            return False
        self._threads[0].join(timeout)
        return not self._threads[0].is_alive()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set() and not self._threads[0].is_alive()

    def stop(self) -> None:
        """Ends the tree with TERM, and after the grace period with KILL. Returns when no process is left."""
        with contextlib.suppress(OSError):
            alive, self._alive = self._alive, -1
            os.close(alive)
        self._ended.wait(self.grace_s + 30)
        self._threads[0].join(5)

    @property
    def place(self) -> str:
        """Where it runs."""
        return f"process {self.pid}"

    def describe_exit(self) -> str:
        """E.g. `exit code 3`, `ended by SIGSEGV`."""
        if self.exit_code is None:
            return "its supervisor was killed"
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        try:
            return f"ended by {signal.Signals(-self.exit_code).name}"
        except ValueError:
            return f"ended by signal {-self.exit_code}"

    def _pump(self, output: int) -> None:
        with os.fdopen(output, "rb", buffering=0) as pipe:
            while data := pipe.read(CHUNK):
                if self.failure is None:
                    try:
                        self._on_output(data)
                    except BaseException as error:  # keep reading: a full pipe would block the command
                        self.failure = error

    def _watch(self) -> None:
        ended = self._read_status()
        code = ended.get("exit")
        self.exit_code = code if isinstance(code, int) else None
        self.left = int(str(ended.get("left", 0)))
        self._status.close()
        self._ended.set()

    def _read_status(self) -> dict[str, object]:
        line = b""
        while not line.endswith(b"\n") and (byte := self._status.read(1)):
            line += byte
        return json.loads(line) if line else {}
