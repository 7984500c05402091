"""Runs one command on several nodes: a copy on each, started and ended together."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tune_ssim.base.errors import UserError
from tune_ssim.trials.command.process import Invocation, free_port
from tune_ssim.trials.processes import OutputLog, SupervisedProcess

POLL_S = 0.1  # between polls of the nodes
BUFFER_BYTES = 2**24  # output buffered until it is fetched; when it is full, the command blocks


class _Runner:
    """Runs the command on one node. If this actor dies, the command ends, since the supervisor sees its pipe close."""

    def __init__(self) -> None:
        self._output: list[bytes] = []
        self._lock = threading.Lock()
        self._process: SupervisedProcess | None = None

    def address(self) -> tuple[str, int]:
        host = ray.util.get_node_ip_address()
        return host, free_port(host)

    def start(self, what: Invocation, log: Path | None) -> int:
        self._log = OutputLog(log) if log is not None else None
        environment = {**os.environ, **what.environment}
        self._process = SupervisedProcess(what.argv, self._keep, environment=environment, cwd=what.cwd, grace_s=what.grace_s)
        return self._process.pid

    def _keep(self, data: bytes) -> None:
        if self._log is not None:  # other nodes than the first write their output to a file
            self._log.write(data)
            self._log.flush()
            return
        while sum(map(len, self._output)) > BUFFER_BYTES:
            time.sleep(POLL_S)
        with self._lock:
            self._output.append(data)

    def look(self) -> tuple[bytes, bool, int | None, str]:
        """(output since the last call, whether it has ended, its exit code, a description of the exit)."""
        assert self._process is not None
        ended = self._process.has_ended
        with self._lock:
            data, self._output = b"".join(self._output), []
        return data, ended, self._process.exit_code, self._process.describe_exit() if ended else ""

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()


class NodesProcess:
    """A `SupervisedProcess` over the nodes of the trial's placement group. If one node fails, all are ended."""

    def __init__(
        self,
        nodes: int,
        cpus: float,
        gpus: float,
        render: Callable[[Mapping[str, Any]], Invocation],
        on_output: Callable[[bytes], None],
        folder: Path,
    ) -> None:
        group = get_current_placement_group()
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_concurrency=2)(_Runner)
        self._runners = []
        for index in range(nodes):
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) if group else "SPREAD"
            self._runners.append(remote.options(scheduling_strategy=where).remote())
        self.exit_code: int | None = None
        self.failure: BaseException | None = None  # exception of `on_output`
        self._words, self._on_output = "", on_output
        self._ended, self._stopping = threading.Event(), threading.Event()
        try:
            host, port = ray.get(self._runners[0].address.remote())
            starts = []
            for rank, runner in enumerate(self._runners):
                what = render({"nodes": nodes, "node_rank": rank, "master_addr": host, "master_port": port})
                starts.append(runner.start.remote(what, folder / f"output.node-{rank}.log" if rank else None))
            ray.get(starts)
        except BaseException as error:
            self._kill()
            if isinstance(error, Exception):
                raise UserError(str(getattr(error, "cause", error))) from None
            raise
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        return self._ended.wait(timeout)

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def stop(self) -> None:
        self._stopping.set()
        try:
            self._ended.wait()
        finally:
            self._kill()

    @property
    def place(self) -> str:
        return f"{len(self._runners)} nodes"

    def describe_exit(self) -> str:
        return self._words

    def _watch(self) -> None:
        try:
            self._watch_nodes()
        except RayError as error:
            self._words = f"a node died ({str(error).splitlines()[0]})"
            self._kill()  # at once: an interrupted caller may never call `stop`
        finally:
            self._ended.set()

    def _watch_nodes(self) -> None:
        asked = False
        while True:
            looks = ray.get([runner.look.remote() for runner in self._runners])
            if self.failure is None:
                try:
                    self._on_output(looks[0][0])
                except BaseException as error:  # so that callers of `wait` do not block forever
                    self.failure = error
            failed = next(((rank, look) for rank, look in enumerate(looks) if look[1] and look[2] != 0), None)
            if failed is not None and self.exit_code is None and not asked:
                rank, look = failed
                self.exit_code, self._words = look[2] if look[2] is not None else -9, f"{look[3]} on node {rank}"
            if (failed is not None or self._stopping.is_set()) and not asked:
                asked = True
                for runner in self._runners:
                    runner.stop.remote()
            if all(look[1] for look in looks):
                if self.exit_code is None:
                    self.exit_code, self._words = looks[0][2], looks[0][3]
                return
            time.sleep(POLL_S)

    def _kill(self) -> None:
        """Kills the actors. Their commands have ended, or end with them."""
        for runner in self._runners:
            with contextlib.suppress(RayError):
                ray.kill(runner)
