"""The program of the mirror process, `python -m tune_ssim.tracking.mirror_process`, which `mirror` starts."""

from __future__ import annotations

import fcntl
import json
import os
import select
import sys
import time
from pathlib import Path
from typing import IO

from tune_ssim.base.files import write_atomically
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.tracking import mirror
from tune_ssim.tracking.failures import hopeless
from tune_ssim.tracking.replay import Replay, read_chunk


class Commands:
    """Reads lines from a pipe with a timeout. (`select` on a buffered file would miss what is already in its buffer.)"""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._text = descriptor, b""

    def next(self, timeout_s: float | None = None) -> str | None:
        """The next line; None if there is none within `timeout_s`; empty if the other end is closed."""
        while b"\n" not in self._text:
            if not select.select([self._descriptor], [], [], timeout_s)[0]:
                return None
            block = os.read(self._descriptor, 65536)
            if not block:
                return ""
            self._text += block
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()


def main(descriptor: int = 0) -> None:
    """Reads one line of JSON (`folder`, `uri`, `experiment`), then mirrors until it reads `drain <seconds>`, or until the pipe
    closes because its parent has died; then it mirrors the pending events. The state file holds its progress."""
    commands = Commands(descriptor)
    job = json.loads(commands.next() or "{}")
    folder, uri = StudyFolder(Path(job["folder"])), job["uri"]
    deadline: float | None = None
    pause = mirror.POLL_S
    replay: Replay | None = None
    state = mirror.read_state(folder, uri)
    with mirror.lock_file(folder, uri).open("w") as lock:
        locked = False
        while True:
            try:
                if not locked:
                    locked = _try_lock(lock)
                if locked and folder.events_file.exists() and read_chunk(folder.events_file, state["offset"]):
                    replay = replay or Replay(folder, uri, job["experiment"])
                    while replay.push_chunk():
                        state = _acknowledge(folder, uri, replay)
                        if deadline is not None and time.monotonic() > deadline:
                            break
                elif locked and state["error"]:
                    state["error"] = None
                pause = mirror.POLL_S if locked else 1.0
                error = None if locked else "another process is mirroring this study"
            except Exception as problem:  # any error of MLflow or the network: report it, wait, and retry
                replay = None
                advice = hopeless(problem)
                pause = min(2 * pause, mirror.MAX_PAUSE_S if deadline is None else mirror.MAX_DRAIN_PAUSE_S)
                error = advice or f"{mirror.describe_error(problem)}; tried again after {pause:.0f} s"
                if advice:
                    deadline = 0.0  # ends now; `drain` starts it once more
            state["error"] = error
            if locked:
                write_atomically(mirror.state_file(folder, uri), json.dumps(state).encode())
            if deadline is not None:
                done = error is None and not read_chunk(folder.events_file, state["offset"])
                if done or time.monotonic() > deadline:
                    sys.exit(0 if done else 1)
                pause = min(pause, max(0.1, deadline - time.monotonic()))
            if deadline is not None:
                time.sleep(pause)
            else:
                line = commands.next(pause)
                if line is not None:
                    deadline = time.monotonic() + (float(line.split()[1]) if line else mirror.ORPHAN_TIMEOUT_S)


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _acknowledge(folder: StudyFolder, uri: str, replay: Replay) -> mirror.State:
    state: mirror.State = {
        "offset": replay.offset,
        "events": replay.events,
        "experiment_id": replay.experiment_id,
        "share_key": replay.share_key,
        "runs": replay.runs,
        "refused": replay.refused[:20],
        "error": None,
    }
    write_atomically(mirror.state_file(folder, uri), json.dumps(state).encode())
    return state


if __name__ == "__main__":
    os.nice(19)  # training comes first: Ray runs its workers at 15
    main()
