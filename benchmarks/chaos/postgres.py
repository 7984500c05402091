"""The mirror into an MLflow server on PostgreSQL, while each of the three is stopped or killed: which metrics are lost or doubled.

    python benchmarks/chaos/postgres.py [--away 60] [--output benchmarks/results/chaos_postgres.json]

Needs Debian's `postgresql` and the Python package psycopg2. A study of four trials writes twenty results of ten metrics a second.
In turn PostgreSQL is stopped for a minute, its processes are killed in the middle of a batch, then those of the MLflow server, then
the mirror. All listen on this machine's loopback only. The rows are counted in the database.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tune_ssim.results.events import EventWriter
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.tracking.mirror import MLflowMirror, read_state

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ssim import save

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
METRICS, TRIALS = 10, 4
RESULT_S = 0.05
BETWEEN_S = 10.0  # of undisturbed writing after each failure


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postgres:
    """A database server with a data folder of its own. As root it runs as the user `postgres`, since it refuses root."""

    def __init__(self, folder: Path) -> None:
        self.data, self.port, self.user = folder / "data", free_port(), "postgres"
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        self.data.mkdir()
        if self._as:
            shutil.chown(self.data, "postgres", "postgres")
        self._run("initdb", "--auth=trust", f"--username={self.user}", "--pgdata", str(self.data))
        self.start()

    def _run(self, program: str, *arguments: str) -> str:
        command = [*self._as, str(PROGRAMS[-1] / program), *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd="/").stdout

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        self._run("pg_ctl", "start", "-w", "-t", "60", "-D", str(self.data), "-o", options, "-l", str(self.data / "log"))

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-m", "fast", "-D", str(self.data))

    def kill(self) -> None:
        """As the kernel does where memory runs out: all its processes, without a word."""
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        children = subprocess.run(["pgrep", "-P", str(pid)], stdout=subprocess.PIPE, text=True).stdout.split()
        for one in (pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        time.sleep(1)
        (self.data / "postmaster.pid").unlink(missing_ok=True)  # a dead process that nobody has waited for still has its number

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://{self.user}@127.0.0.1:{self.port}/postgres"

    def rows(self, query: str) -> list[list[str]]:
        found = self._run("psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", self.user, "-At", "-F", "|", "-c", query)
        return [line.split("|") for line in found.splitlines()]


class Server:
    """An MLflow server on that database, with an artifact store."""

    def __init__(self, database: Postgres, folder: Path) -> None:
        self.database, self.folder, self.port = database, folder, free_port()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self.database.uri, "--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.2)
        self.kill()
        raise SystemExit(f"the MLflow server does not answer: {(self.folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Writer:
    """A study that writes results, and the times of it."""

    def __init__(self, folder: StudyFolder) -> None:
        self.events, self.n_results, self.slowest_s = EventWriter(folder), 0, 0.0
        self.events.study_started("postgres")
        for index in range(TRIALS):
            self.events.trial_started(f"trial-{index}", "search", {"lr": 0.1})

    def write(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            step = self.n_results // TRIALS
            values = {f"metric_{index}": step + index / METRICS for index in range(METRICS)}
            start = time.monotonic()
            self.events.result(f"trial-{self.n_results % TRIALS}", {"records": [[step, values]]})
            self.slowest_s = max(self.slowest_s, time.monotonic() - start)
            self.n_results += 1
            time.sleep(RESULT_S)


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[tuple[Postgres, Server]]:
    database = Postgres(folder)
    try:
        server = Server(database, folder)
        try:
            yield database, server
        finally:
            server.kill()
    finally:
        database.stop()


def mirrored(database: Postgres) -> tuple[int, int]:
    """Rows of metrics, and how many of them have a name, run and step that another row has."""
    (found,) = database.rows(
        "SELECT count(*), count(*) - count(DISTINCT (run_uuid, key, step)) FROM metrics WHERE key LIKE 'metric_%'"
    )
    return int(found[0]), int(found[1])


def wait_for_a_batch(folder: StudyFolder, uri: str) -> None:
    """Until the mirror has acknowledged something new, which is when the next batch is being sent."""
    before, end = read_state(folder, uri)["events"], time.monotonic() + 60
    while read_state(folder, uri)["events"] == before and time.monotonic() < end:
        time.sleep(0.005)


def disturbed(root: Path, away_s: float) -> dict[str, Any]:
    folder = StudyFolder(root / "postgres").create()
    with servers(root) as (database, server):
        writer = Writer(folder)
        mirror = MLflowMirror(folder, server.uri)
        mirror.start()
        writer.write(BETWEEN_S)
        database.stop()
        writer.write(away_s)
        database.start()
        writer.write(BETWEEN_S)
        wait_for_a_batch(folder, server.uri)
        database.kill()
        database.start()
        writer.write(BETWEEN_S)
        wait_for_a_batch(folder, server.uri)
        server.kill()
        server.start()
        writer.write(BETWEEN_S)
        wait_for_a_batch(folder, server.uri)
        assert mirror._process is not None
        mirror._process.kill()
        writer.write(BETWEEN_S)
        writer.events.study_ended("done")
        start = time.monotonic()
        is_done = mirror.drain(600)
        rows, doubled = mirrored(database)
        runs = int(database.rows("SELECT count(*) FROM runs")[0][0])
        expected = writer.n_results * METRICS
        return {
            "away_s": away_s,
            "rows_expected": expected,
            "rows_lost": expected - (rows - doubled),
            "rows_doubled": doubled,
            "runs_doubled": runs - TRIALS - 1,
            "drained": is_done,
            "drain_s": time.monotonic() - start,
            "slowest_write_ms": 1000 * writer.slowest_s,
            "status": mirror.status(),
            "postgresql": database.rows("SHOW server_version")[0][0],
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--away", type=float, default=60.0, help="seconds without PostgreSQL")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results" / "chaos_postgres.json")
    given = parser.parse_args(arguments)
    if not PROGRAMS:
        raise SystemExit("needs PostgreSQL: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="tune-ssim-postgres-") as name:
        Path(name).chmod(0o755)  # the user postgres reads its data below
        found = disturbed(Path(name), given.away)
    table = Table("PostgreSQL stopped, killed; server killed; mirror killed", "")
    for key, value in found.items():
        table.add_row(key, f"{value:.3g}" if isinstance(value, float) else str(value))
    Console().print(table)
    save(given.output, found)


if __name__ == "__main__":
    main()
