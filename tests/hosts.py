"""Several hosts on this machine, made of Linux namespaces: each has its own address, process table, home and sshd.

No host has a default route. They share the file system, but for the home and /tmp/ray, as hosts with a shared mount do."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

import tune_ssim

NETWORK = "198.18.0"  # RFC 2544: set aside for tests of networks
BRIDGE = "br0"
UNSHARE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")


def why_impossible() -> str | None:
    """Why no such hosts can be made here; None if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "rsync") if shutil.which(tool) is None]
    if missing:
        return f"hosts of their own need {', '.join(missing)}"
    try:
        with _namespace(name := f"try{os.getpid()}"):
            _run("ip", "-n", name, "link", "add", BRIDGE, "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.decode().strip()}"
    return None


@dataclass(frozen=True)
class Host:
    """One host. `run` runs a command on it as its only user, root."""

    name: str
    address: str
    home: Path
    pid: int  # of the first process in its namespaces

    def command(self, *argv: str) -> list[str]:
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--pid", "--net"]
        return [
            *inside,
            "env",
            "-i",
            "-C",
            str(self.home),
            f"HOME={self.home}",
            "USER=root",
            f"PATH={os.environ['PATH']}",
            "LANG=C.UTF-8",
            *argv,
        ]

    def run(self, *argv: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)


def ray_environment(folder: Path) -> Path:
    """A virtual environment for hosts without a network: the packages of this one, and `tune_ssim` from ~/tune_ssim if it is there.
    Its pip does nothing."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    own = "import os, sys; sys.path.insert(0, os.path.expanduser('~/tune_ssim'))"
    (site / "packages.pth").write_text(f"{own}\n{Path(ray.__file__).parents[1]}\n{Path(tune_ssim.__file__).parents[1]}\n")
    for name, does in {"ray": "-m ray.scripts.scripts", "tune-ssim": "-m tune_ssim", "pip": "-c pass"}.items():
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {folder}/bin/python {does} "$@"\n')
        script.chmod(0o755)
    return folder


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """`count` hosts on one network, reaching each other by ssh. They end with the context, and all that runs on them."""
    prefix = f"host{os.getpid()}"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    with ExitStack() as stack:
        stack.enter_context(_namespace(hub := f"{prefix}-hub"))
        _run("ip", "-n", hub, "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "-n", hub, "link", "set", BRIDGE, "up")
        yield [stack.enter_context(_host(f"{prefix}-{n}", hub, f"{NETWORK}.{n + 10}", folder)) for n in range(count)]


@contextmanager
def _host(name: str, hub: str, address: str, folder: Path) -> Iterator[Host]:
    with _namespace(name):
        _run("ip", "-n", hub, "link", "add", f"v{name[-8:]}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "-n", hub, "link", "set", f"v{name[-8:]}", "master", BRIDGE, "up")
        _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", name, "link", "set", "eth0", "up")
        home = _home(folder, name)
        with (folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, *UNSHARE, "sh", "-ec", _boot(name, home)], stdout=log, stderr=log
            )
        try:
            yield Host(name, address, home, _child_of(process, address, name))
        finally:
            process.kill()  # its child is the first process of the PID namespace: the kernel ends all others with it
            process.wait()


def _boot(name: str, home: Path) -> str:
    """The script that makes the host's own mounts and becomes its sshd."""
    of_host = [
        f"hostname {name}",
        f"mount --bind {shlex.quote(str(home / 'etc_passwd'))} /etc/passwd",
        f"mkdir -p /tmp/ray /run/sshd && mount --bind {shlex.quote(str(home / 'tmp_ray'))} /tmp/ray",
        f"exec {shutil.which('sshd')} -D -e -f {shlex.quote(str(home / 'sshd_config'))}",
    ]
    return "\n".join(of_host)


def _home(folder: Path, name: str) -> Path:
    home = folder / name
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (home / "tmp_ray").mkdir()
    shutil.copy(folder / "key", home / ".ssh" / "id_ed25519")
    shutil.copy(folder / "key.pub", home / ".ssh" / "authorized_keys")
    shutil.copy(folder / "key", home / "host_key")
    (home / "etc_passwd").write_text(f"root:x:0:0::{home}:/bin/bash\nsshd:x:65534:65534::/run/sshd:/usr/sbin/nologin\n")
    (home / "sshd_config").write_text(
        f"HostKey {home}/host_key\nAuthorizedKeysFile {home}/.ssh/authorized_keys\nPermitRootLogin prohibit-password\n"
        "PasswordAuthentication no\nStrictModes no\nPidFile none\nUsePAM no\n"
    )
    return home


def _child_of(process: subprocess.Popen[bytes], address: str, name: str) -> int:
    """The sshd, once it listens."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        listening = subprocess.run(
            ["ip", "netns", "exec", name, sys.executable, "-c", f"import socket; socket.create_connection(('{address}', 22), 1)"],
            capture_output=True,
        )
        if listening.returncode == 0 and (child := children.read_text().split()):
            return int(child[0])
        time.sleep(0.1)
    raise RuntimeError(f"{name}: its sshd does not listen")


@contextmanager
def _namespace(name: str) -> Iterator[None]:
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "-n", name, "link", "set", "lo", "up")
        yield
    finally:
        _run("ip", "netns", "del", name)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)
