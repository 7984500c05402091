"""`tune-ssim ui`: mirrors all studies, starts MLflow's server on loopback, prints a link to the trials, best first."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tune_ssim.base.errors import UserError
from tune_ssim.base.passwords import hide_password
from tune_ssim.results.study_folder import StudyFolder, find_study
from tune_ssim.tracking.mirror import default_uri, mirror_study, process_environment, read_state
from tune_ssim.tracking.mlflow_internals import runs_page

START_TIMEOUT_S = 90.0  # a cold import of MLflow on a busy machine


def studies_of(storage: Path) -> list[StudyFolder]:
    """The studies with events, the latest last."""
    found = [StudyFolder(path.parent) for path in storage.glob("*/events.jsonl")]
    return sorted(found, key=lambda folder: (_started(folder), folder.name))


def serve_ui(
    storage: Path,
    uri: str | None = None,
    host: str = "127.0.0.1",
    port: int = 5000,
    name: str | None = None,
    experiment: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Mirrors pending events, serves until Ctrl-C, then ends the server with all its processes.

    With an http(s) `uri` there is a server already: only the link is printed. Raises UserError if there is no study,
    no port from `port` on is free, or the server does not start.
    """
    folders = studies_of(storage)
    selected = find_study(storage, name) if name is not None or not folders else folders[-1]
    uri = uri or default_uri(storage)
    for folder in folders:
        done, status = mirror_study(folder, uri, experiment)
        if not done:
            say(f"{folder.name}: {status}")
    state = read_state(selected, uri)
    if uri.startswith(("http://", "https://")):
        if state["experiment_id"] is None:
            raise UserError(f"MLflow at {hide_password(uri)}: {state['error'] or 'nothing could be mirrored'}")
        say(f"{hide_password(uri).rstrip('/')}/{runs_page(state['experiment_id'], state['share_key'])}")
        return
    port = _free_port(host, port)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends the server as Ctrl-C does
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", (storage.absolute() / "mlartifacts").as_uri()]
    server = subprocess.Popen(
        command,  # without the URI, which may hold a password: every user can see the arguments of a process
        env={**process_environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": uri},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # its own process group, so that its workers end with it
    )
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        _wait_until_it_answers(server, address)
        page = runs_page(state["experiment_id"], state["share_key"]) if state["experiment_id"] else ""
        say(f"{address}/{page}\nCtrl-C ends it.")
        server.wait()
        raise UserError(f"MLflow's server at {address} has ended (code {server.returncode})")
    except KeyboardInterrupt:
        pass
    finally:
        _end(server)


def _started(folder: StudyFolder) -> int:
    return int(next((event.get("time_ms", 0) for event in folder.events()), 0))


def _free_port(host: str, port: int) -> int:
    for candidate in range(port, port + 50):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                if isinstance(error, socket.gaierror) or error.errno == 99:
                    raise UserError(f"--host {host}: not an address of this machine") from None
                continue
            return candidate
    raise UserError(f"--port {port}: this port and the 49 after it are taken on {host}")


def _wait_until_it_answers(server: subprocess.Popen[bytes], address: str) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy
    ends = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < ends:
        if server.poll() is not None:
            raise UserError(f"MLflow's server did not start (code {server.returncode}); try `mlflow server` by hand")
        try:
            with direct.open(f"{address}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UserError(f"MLflow's server did not answer at {address} within {START_TIMEOUT_S:g} s")


def _end(server: subprocess.Popen[bytes]) -> None:
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=5)
