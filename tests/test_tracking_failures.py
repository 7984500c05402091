"""Tracking servers that fail: for good, which ends the mirror with advice, or for a while, which is waited for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tune_ssim.results.events import Event, EventWriter
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.tracking.failures import hopeless
from tune_ssim.tracking.mirror import mirror_study, process_environment
from tune_ssim.tracking.replay import Replay


class Answers(ThreadingHTTPServer):
    """A web server that answers every request with `code`."""

    code = 200
    n_requests = 0


class Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_GET(self) -> None:
        self.server.n_requests += 1
        self.send_response(self.server.code)
        self.send_header("Content-Length", "13")
        self.end_headers()
        self.wfile.write(b"<html></html>")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    for name, value in process_environment().items():
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, value)
    with Answers(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    made = StudyFolder(tmp_path / "small").create()
    EventWriter(made).study_started("small")
    return made


def failure(folder: StudyFolder, uri: str) -> Exception:
    with pytest.raises(Exception) as caught:
        Replay(folder, uri, "experiment")
    return caught.value


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (200, "is not an MLflow server: check the address"),
        (302, "is not an MLflow server: check the address"),
        (401, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, "refuses this user (403)"),
        (404, "no MLflow server answers there (404)"),
        (405, "is not an MLflow server: check the address"),
        (429, None),
        (500, None),
        (502, None),
        (503, None),
    ],
)
def test_answers_of_a_server(web: Answers, folder: StudyFolder, code: int, advice: str | None) -> None:
    web.code = code
    found = hopeless(failure(folder, f"http://127.0.0.1:{web.server_port}"))
    assert found is None if advice is None else advice in str(found)


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("http://127.0.0.1:9", None),  # the discard port: nothing listens
        ("http://no-such-host.invalid", "no host has this name"),
        ("https://127.0.0.1:{port}", "check https:// against http://"),
        ("htp://127.0.0.1:{port}", "MLflow cannot use this tracking URI"),
        ("http:/127.0.0.1", "a tracking URI is http://HOST:PORT"),
        ("mysql://user:secret@host/x", "needs the Python package MySQLdb"),
        ("sqlite:////proc/none/a.db", "/proc/none: No such file or directory"),
    ],
)
def test_addresses(web: Answers, folder: StudyFolder, uri: str, advice: str | None) -> None:
    found = hopeless(failure(folder, uri.format(port=web.server_port)))
    assert "secret" not in str(found)
    assert found is None if advice is None else advice in str(found)


def test_a_hopeless_mirror_ends_at_once_and_a_busy_server_is_waited_for(web: Answers, folder: StudyFolder) -> None:
    uri = f"http://127.0.0.1:{web.server_port}"
    web.code = 401
    done, line = mirror_study(folder, uri, timeout_s=10_000)  # would be waited for
    assert not done and "MLflow has 0 of 1 events" in line and "MLFLOW_TRACKING_PASSWORD" in line
    assert web.n_requests <= 2
    web.code, lines = 503, list[str]()

    def give_up_later(line: str) -> None:
        lines.append(line)
        if "tried again after" in line:
            web.code = 401

    done, _ = mirror_study(folder, uri, timeout_s=10_000, progress=give_up_later)
    assert not done and any("tried again after" in line for line in lines)


@pytest.mark.parametrize(
    "change", [{"records": 3}, {"records": [[1, 2]]}, {"records": [["a", {}]]}, {"summary": "x"}, {"config": []}, {"event": {}}]
)
def test_a_foreign_event_is_no_event(change: dict[str, object]) -> None:
    event = {"event": "records", "time_ms": 1, "trial_id": "t", "records": [[1, {"loss": 0.5}]]}
    assert Event.read(json.dumps(event).encode()) is not None
    assert Event.read(json.dumps(event | change).encode()) is None
