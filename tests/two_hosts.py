"""Two hosts on one machine: network namespaces with addresses of their own, joined by a cable that can be cut. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PORT = 6399
PREFIX = "10.213.77"  # of the addresses; nothing outside the two namespaces routes to it


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def reason_to_skip() -> str:
    """Why there can be no two hosts here; empty if there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    probe = f"ts-probe-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "del", probe)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


class Host:
    """A host: commands that run on it see its network only. The file system is this machine's."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address = f"ts{number}-{os.getpid()}", f"{PREFIX}.{number}"
        self.folder = folder / f"host{number}"
        self.environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token")}
        self.environment |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

    def argv(self, *command: str, hides: Path | None = None) -> list[str]:
        """`command` on this host. hides: an existing folder of which the host sees an empty one instead."""
        inside = ["ip", "netns", "exec", self.name]
        if hides is None:
            return [*inside, *command]
        return [*inside, "unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hides), *command]

    def ray(self, *options: str, cpus: int, hides: Path | None = None, **environment: str) -> None:
        """Starts Ray on this host."""
        command = ["-m", "ray.scripts.scripts", "start", *options, f"--node-ip-address={self.address}", f"--num-cpus={cpus}"]
        command += ["--disable-usage-stats", "--object-store-memory=100000000"]
        started = subprocess.run(
            self.argv(sys.executable, *command, hides=hides),
            env=self.environment | environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert started.returncode == 0, started.stdout + started.stderr

    def pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def end(self) -> None:
        """Kills every process of this host."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class TwoHosts:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        token = folder / "auth_token"
        token.write_text("0123456789abcdef" * 4)
        token.chmod(0o600)
        self.head, self.worker = Host(1, folder), Host(2, folder)

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def start(self, cpus: Sequence[int] = (1, 1), hides: Path | None = None, **environment: str) -> None:
        """Ray on both hosts. hides, environment: of the worker."""
        self.head.ray("--head", "--include-dashboard=false", f"--port={PORT}", f"--temp-dir=/tmp/{self.head.name}", cpus=cpus[0])
        self.worker.ray(f"--address={self.address}", cpus=cpus[1], hides=hides, **environment)

    def cut(self, seconds: float) -> None:
        _ip("-n", self.worker.name, "link", "set", "cable", "down")
        time.sleep(seconds)
        _ip("-n", self.worker.name, "link", "set", "cable", "up")


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Skips the test, with the reason, where there can be no two hosts."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    hosts = TwoHosts(folder)
    both = (hosts.head, hosts.worker)
    try:
        for host in both:
            _ip("netns", "add", host.name)
        first, second = (host.name for host in both)
        _ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for host in both:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", host.name, "link", "set", device, "up")
            _ip("-n", host.name, "route", "add", "default", "via", hosts.head.address, "dev", "cable")
        yield hosts
    finally:
        for host in both:
            with suppress(subprocess.CalledProcessError):
                host.end()
                _ip("netns", "del", host.name)
        shutil.rmtree(f"/tmp/{hosts.head.name}", ignore_errors=True)
