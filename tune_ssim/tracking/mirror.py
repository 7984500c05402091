"""Mirrors a study into MLflow from a separate process, so that MLflow cannot stop or slow down training.

The process (`mirror_process`) reads the study's events from the last byte that MLflow has acknowledged. It runs at low
priority, holds a quarter of a megabyte of events at a time, and retries while a server is down. It can be killed at any moment
without loss, since the next process continues where it stopped. Neither mlflow nor ray is imported here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from tune_ssim.base.extras import install_hint, is_installed
from tune_ssim.base.files import read_whole
from tune_ssim.base.passwords import hide_password, without_password
from tune_ssim.results.study_folder import StudyFolder

EXPERIMENT = "tune_ssim"
POLL_S = 2.0  # larger batches cost MLflow less: 25 ms per batch, 0.2 ms per metric
MAX_PAUSE_S = 30.0
MAX_DRAIN_PAUSE_S = 8.0  # the longest pause while somebody waits for the rest
ORPHAN_TIMEOUT_S = 60.0  # how long a mirror continues after its study was killed

# Few retries by MLflow, since `mirror_process` has its own back-off. The user's settings take precedence.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class State(TypedDict):
    """The progress of a mirror, kept in a small file in the study's folder, one per tracking URI."""

    offset: int  # bytes of events.jsonl that MLflow has
    events: int
    experiment_id: str | None
    share_key: str | None
    runs: dict[str, str]  # trial_id → run_id; the parent run is ""
    refused: list[str]  # messages about what MLflow rejected
    error: str | None


class MLflowMirror:
    """Starts and stops the mirror process. `uri` None: SQLite next to the study's folder. No method raises because of MLflow."""

    def __init__(self, folder: StudyFolder, uri: str | None = None, experiment: str | None = None) -> None:
        self.folder = folder
        self.uri = uri or default_uri(folder.path.parent)
        self.experiment = experiment or EXPERIMENT
        self._process: subprocess.Popen[bytes] | None = None
        self._problem: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def start(self) -> None:
        """Returns at once. The other process imports MLflow and opens its database."""
        if self._process is not None and self._process.poll() is None:
            return
        self._problem = None if is_installed("mlflow") else install_hint("mlflow")
        if self._problem is not None:
            return
        try:
            state_file(self.folder, self.uri).parent.mkdir(parents=True, exist_ok=True)
            with state_file(self.folder, self.uri).with_suffix(".log").open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tune_ssim.tracking.mirror_process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env=process_environment(),
                    start_new_session=True,  # Ctrl-C must reach the study only, which then drains
                )
            # Not an argument: a URI may hold a password, and every user can see the arguments of a process.
            job = {"folder": str(self.folder.path.absolute()), "uri": self.uri, "experiment": self.experiment}
            self._send(json.dumps(job))
        except OSError as error:
            self._problem = describe_error(error)

    def drain(
        self, timeout_s: float = 60.0, progress: Callable[[str], None] | None = None, unreached_timeout_s: float = math.inf
    ) -> bool:
        """Ends the mirror when MLflow has everything (True) or after `timeout_s` (False); `status()` then gives the reason.

        unreached_timeout_s: the same if MLflow has accepted no event and given an error."""
        if not self._pending_bytes() and self._process is None:
            return True
        self.start()  # if it was never started, or has died
        process, began = self._process, time.monotonic()
        ends = began + timeout_s
        if process is None:
            return False
        self._send(f"drain {timeout_s:g}")
        while process.poll() is None and time.monotonic() < ends + 2:
            if progress is not None:
                progress(self.status())
            if not self.reached():
                ends = min(ends, began + unreached_timeout_s)
            time.sleep(0.1)
        hangs = process.poll() is None  # hangs in a request
        if hangs:
            process.kill()
        code = process.wait()
        if process.stdin is not None:
            process.stdin.close()
        self._process = None
        if hangs:
            self._problem = f"not done within {timeout_s:g} s"
        elif code not in (0, 1):
            log = state_file(self.folder, self.uri).with_suffix(".log")
            self._problem = f"the mirror's process ended with code {code}; see {log}"
        return code == 0

    def reached(self) -> bool:
        """Whether MLflow has any event of this study, or has given no error yet."""
        state = read_state(self.folder, self.uri)
        return state["events"] > 0 or state["error"] is None

    def status(self) -> str:
        """One line: how much of the study MLflow has, and the problem if there is one."""
        state = read_state(self.folder, self.uri)
        pending = self._pending_events(state["offset"])
        where = hide_password(self.uri)
        text = f"MLflow has {state['events']} of {state['events'] + pending} events ({where})"
        problem = state["error"] or self._problem
        if pending and problem:
            text += f"; {problem}"
        if state["refused"]:
            text += f"; {len(state['refused'])} refused, e.g. {state['refused'][0]}"
        return text

    def _send(self, line: str) -> None:
        try:
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()
        except OSError:
            pass  # it has ended; `drain` sees its exit code

    def _pending_bytes(self) -> bool:
        return self._pending_events(read_state(self.folder, self.uri)["offset"]) > 0

    def _pending_events(self, offset: int) -> int:
        try:
            with self.folder.events_file.open("rb") as file:
                file.seek(offset)
                return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        except OSError:
            return 0


def mirror_study(
    folder: StudyFolder,
    uri: str | None = None,
    experiment: str | None = None,
    timeout_s: float = 600.0,
    progress: Callable[[str], None] | None = None,
) -> tuple[bool, str]:
    """Mirrors the pending events of a study now. Returns whether MLflow has all of them, and the status in one line."""
    mirror = MLflowMirror(folder, uri, experiment)
    done = mirror.drain(timeout_s, progress)
    return done, mirror.status()


def run_ids(folder: StudyFolder, uri: str | None = None) -> dict[str, str]:
    """trial_id → MLflow's run_id, for the mirrored trials. The parent run is ""."""
    return read_state(folder, uri or default_uri(folder.path.parent))["runs"]


def default_uri(storage: Path) -> str:
    return f"sqlite:///{storage.absolute() / 'mlflow.db'}"


def state_file(folder: StudyFolder, uri: str) -> Path:
    """The same with and without a password in `uri`."""
    return folder.path / "mirror" / f"{hashlib.sha256(without_password(uri).encode()).hexdigest()[:16]}.json"


def lock_file(folder: StudyFolder, uri: str) -> Path:
    return state_file(folder, uri).with_suffix(".lock")


def read_state(folder: StudyFolder, uri: str) -> State:
    """The saved progress. Zero if the file is missing or damaged, which is safe, since events are idempotent."""
    empty = State(offset=0, events=0, experiment_id=None, share_key=None, runs={}, refused=[], error=None)
    try:
        return State(**{**empty, **json.loads(read_whole(state_file(folder, uri)))})  # type: ignore[typeddict-item]
    except (OSError, ValueError, TypeError, RecursionError):
        return empty


def process_environment() -> dict[str, str]:
    """Environment for processes that use MLflow: they can import this package, and the user's settings take precedence."""
    import tune_ssim

    package = str(Path(tune_ssim.__file__).parent.parent)
    path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**_SETTINGS, **os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUTF8": "1"}


def describe_error(error: BaseException) -> str:
    """One short line without passwords."""
    text = " ".join(str(error).split())
    for cause in ("connection refused", "name or service not known", "timed out", "database is locked"):
        if cause in text.lower():
            return cause
    text = hide_password(text)
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
