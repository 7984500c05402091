"""The process of a command, and how it is started: on this machine, or by whoever sets `CommandTask.launch`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tune_ssim.trials.processes import SupervisedProcess


class Process(Protocol):
    """A running command: `SupervisedProcess` here, `NodesProcess` on several nodes."""

    def wait(self, timeout: float | None = None) -> bool: ...
    def stop(self) -> None: ...
    def describe_exit(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def has_ended(self) -> bool: ...
    @property
    def exit_code(self) -> int | None: ...
    @property
    def failure(self) -> BaseException | None:
        """The exception that the output callback raised; later output was not read."""
        ...


@dataclass(frozen=True)
class Invocation:
    """The command to start; nodes differ only in the node's fields. environment: added to the existing one."""

    argv: list[str]
    environment: dict[str, str]
    cwd: str | None
    grace_s: float


Launch = Callable[[Callable[[Mapping[str, Any]], Invocation], Callable[[bytes], None], Path], Process]
"""Takes (render: a node's fields → its invocation, callback for the first node's output, folder for the other nodes' output)."""


def launch_here(render: Callable[[Mapping[str, Any]], Invocation], on_output: Callable[[bytes], None], folder: Path) -> Process:
    """Starts the command on this machine only."""
    what = render(this_node())
    environment = {**os.environ, **what.environment}
    return SupervisedProcess(what.argv, on_output, environment=environment, cwd=what.cwd, grace_s=what.grace_s)


def this_node() -> dict[str, Any]:
    """The node's fields for a command on this machine only."""
    return {"nodes": 1, "node_rank": 0, "master_addr": "127.0.0.1", "master_port": free_port("127.0.0.1")}


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
