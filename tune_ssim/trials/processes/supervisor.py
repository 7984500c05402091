"""The supervisor of a command: a separate program between the command and its owner.

    python supervisor.py GRACE_S STATUS_FD -- COMMAND ARGUMENT…

Standard input is a pipe from the owner. When it closes, because the owner closed it or was killed, the whole process tree of the
command gets SIGTERM and, after GRACE_S seconds, SIGKILL. No process of the tree can escape: those that changed their session or
lost their parents are still found, since the supervisor is their subreaper (Linux prctl). Processes that a command leaves running
when it exits are ended in the same way.

The supervisor has its own session and is not the owner's child (it forks once more). So a signal to the owner's group, or a reaper
of the owner's children, does not kill it early. It writes one JSON object per line to STATUS_FD: {"pid": n} or {"failed": "why"} at
the start, {"exit": code, "left": n} at the end. The code is negative for a signal; n counts processes that were left running.

It uses the standard library only and imports nothing of this package, so it starts in a few milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
POLL_S = 0.02


def main() -> None:
    grace, status = float(sys.argv[1]), int(sys.argv[2])
    argv = sys.argv[4:]
    if os.fork():
        os._exit(0)
    os.setsid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), lambda *_: None)  # only wakes the poll; the pipe decides
    pid = _start(libc, argv, status)
    if pid is None:
        return
    _write_status(status, {"pid": pid})
    # The command has its own copies. The owner must see EOF when the command's tree is gone.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    code = _wait(pid)
    left = len(_descendants()) if code is not None else 0
    stopped = _end_tree(grace, pid)
    _write_status(status, {"exit": stopped if code is None else code, "left": left})


def _start(libc: ctypes.CDLL, argv: list[str], status: int) -> int | None:
    """The command's pid; None if it could not be started, with the reason in the status."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, False)
    pid = os.fork()
    if pid == 0:
        try:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # in case the supervisor itself is killed
            os.setsid()
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGPIPE"):
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            os.close(reader)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(status)
            os.execvp(argv[0], argv)
        except BaseException as error:
            os.write(writer, str(getattr(error, "strerror", None) or error).encode())
        finally:
            os._exit(127)
    os.close(writer)
    failed = os.read(reader, 10_000).decode(errors="replace")
    os.close(reader)
    if failed:
        os.waitpid(pid, 0)
        _write_status(status, {"failed": failed})
        return None
    return pid


def _wait(pid: int) -> int | None:
    """The command's exit code, or None when the owner's end of the pipe closed first."""
    while True:
        code = _reap(pid)
        if code is not None:
            return code
        try:
            ready, _, _ = select.select([0], [], [], POLL_S)
            if ready and not os.read(0, 1):
                return _reap(pid)
        except InterruptedError:
            continue


def _reap(wanted: int) -> int | None:
    """Reaps children that have exited; returns the exit code of `wanted`."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == wanted:
            found = os.waitstatus_to_exitcode(status)


def _end_tree(grace: float, pid: int) -> int | None:
    """Sends TERM to all, then KILL to what is left after `grace` seconds. Returns the exit code of `pid` if it was alive."""
    code: int | None = None
    end = time.monotonic() + grace
    signalled: set[int] = set()
    while True:
        reaped = _reap(pid)
        code = code if reaped is None else reaped
        alive = _descendants()
        if not alive:
            return code
        number = signal.SIGTERM if time.monotonic() < end else signal.SIGKILL
        for one in alive:
            if number == signal.SIGKILL or one not in signalled:
                signalled.add(one)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(one, number)
                    os.kill(one, signal.SIGCONT)  # a stopped process does not handle SIGTERM
        time.sleep(POLL_S)


def _descendants() -> list[int]:
    """Descendants of this process that are still running."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  (pathlib would double the time that the supervisor takes to start)
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] not in (b"Z", b"X"):
                children.setdefault(int(fields[1]), []).append(int(name))
            else:  # a zombie may still have children of its threads; they are found below it
                children.setdefault(int(fields[1]), [])
    found, to_visit = [], [os.getpid()]
    while to_visit:
        for child in children.get(to_visit.pop(), []):
            found.append(child)
            to_visit.append(child)
    return found


def _write_status(status: int, message: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # the owner may be gone
        os.write(status, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
