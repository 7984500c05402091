"""Signals that end a study: SIGTERM of a batch system, SIGHUP of a terminal that is closed. Both act like Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HEARD = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stops_as_ctrl_c() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP act like Ctrl-C. Ray's own handler of SIGTERM prints a stack trace and dies.

    A process under `nohup` ignores SIGHUP as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    try:
        for signum in HEARD:
            if signum is not signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, _interrupt)
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # None: the handler was not set from Python


def _interrupt(signum: int, frame: Any) -> None:
    if signum == signal.SIGHUP:
        _leave_terminal()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell has started this in the background
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def _leave_terminal() -> None:
    """Output goes nowhere from now on: writing to a closed terminal fails."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        if _is_terminal(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _is_terminal(descriptor: int) -> bool:
    """Also for one that is gone, which `os.isatty` does not recognise."""
    with suppress(OSError):
        return str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith(("/dev/pts/", "/dev/tty"))
    return os.isatty(descriptor)
