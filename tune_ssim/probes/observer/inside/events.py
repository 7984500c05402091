"""Writes what was seen, one JSON object a line, into a file of this process."""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import threading
from typing import IO


class Events:
    """`write` appends to `<folder>/<host>-<pid>.jsonl`, which is created by the first event. A forked child has its own file."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.failed = False  # after the first error of the observer nothing more is looked at
        self._file: IO[str]
        self._pid: int | None = None
        self._lock = threading.Lock()

    def write(self, event: str, **values) -> None:
        with self._lock:
            if self._pid != os.getpid():
                self._open()
            self._file.write(json.dumps({"event": event, **values}) + "\n")

    def note(self, text: str) -> None:
        """What the observer could not see, or did not understand."""
        self.write("note", text=text)

    def _open(self) -> None:
        self._pid = os.getpid()
        path = os.path.join(self.folder, f"{socket.gethostname()}-{self._pid}.jsonl")
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (a line at a time, until the process ends)
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        start = {"event": "start", "pid": self._pid, "rank": rank, "world_size": world, "argv": sys.argv, "python": sys.executable}
        self._file.write(json.dumps(start) + "\n")


def guarded(events):
    """A decorator for everything of the observer that the program runs: an error switches the observer off, not the program."""

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if events.failed:
                return None
            try:
                return function(*args, **kwargs)
            except Exception as error:
                events.failed = True
                try:
                    events.note(f"the observer stopped: {type(error).__name__}: {error} (in {function.__qualname__})")
                except Exception:  # a full disk
                    pass
                return None

        return call

    return decorate
