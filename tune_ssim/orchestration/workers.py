"""Runs a training over several processes, one per rank, in lock step, judged as one.

The workers are actors in the placement group of the trial. So a trial gets all its resources at once or none, and trials cannot
wait for each other's workers. The trial's own process takes no resources. It calls the same method on every rank, so any method of
a training may use collectives (DDP, FSDP).
"""

from __future__ import annotations

import fcntl
import math
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tune_ssim.base.errors import UserError
from tune_ssim.orchestration.retries import cause_of
from tune_ssim.records import STEP_SKIPPED, TOTAL_NORM
from tune_ssim.trials.command.process import free_port
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.training import Abilities, Sample, Training

SAME_NORM = 1e-3  # relative tolerance; ranks with reduced gradients differ at most in summation order
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # PyTorch's own default for NCCL
SIOCGIFADDR = 0x8915  # of Linux, netdevice(7): the address of an interface
DEAD_WAIT_S = 5.0  # an actor's death is reported later than the broken connections it causes
# Only the first rank's result is used; those of the others are dropped before they are sent.
ANSWERED_BY_FIRST = (
    "sample", "sample_ema", "evaluate", "per_image", "state_dict", "effective", "abilities", "fingerprints", "left_out", "ancestry",
)  # fmt: skip


class _Worker:
    """One rank. Its task gets an initialised process group, and its rank in the usual environment variables."""

    def address(self) -> tuple[str, int]:
        host = ray.util.get_node_ip_address()
        return host, free_port(host)

    def join(self, rank: int, size: int, local_rank: int, local_size: int, host: str, port: int) -> None:
        import torch
        from torch import distributed

        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(local_size),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }
        if local_size < size and (name := interface_of(ray.util.get_node_ip_address())):
            # Gloo resolves the host's name, which is 127.0.0.1 or 127.0.1.1 on many hosts: other hosts cannot reach it there.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        backend = "nccl" if ray.get_gpu_ids() and torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(0)  # Ray makes only a worker's own devices visible
        distributed.init_process_group(backend, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)

    def make(self, task: Any, import_path: str | None) -> None:
        self.task = load_task(task, import_path)()

    def call(self, method: str, arguments: Sequence[Any]) -> Any:
        found = getattr(self.task, method)(*arguments)
        if method == "step":
            return {name: float(value) for name, value in found.items()}
        is_first = os.environ["RANK"] == "0"
        return found if is_first and method in ANSWERED_BY_FIRST else None

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


class WorkersTask(Training):
    """A training over `workers` processes. Losses are averaged over the ranks; everything else is the first rank's result.

    `total_norm` must be the norm of the reduced gradient, the same on every rank; anything else is an error."""

    def __init__(self, task: Any, import_path: str | None, workers: int, cpus: float, gpus: float) -> None:
        self._made_of = task, import_path
        self._workers: list[Any] = []
        group = get_current_placement_group()
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Worker)
        for index in range(workers):
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) if group else "DEFAULT"
            self._workers.append(remote.options(scheduling_strategy=where).remote())
        host, port = ray.get(self._workers[0].address.remote())
        nodes = ray.get([worker.node.remote() for worker in self._workers])
        local = [nodes[:rank].count(node) for rank, node in enumerate(nodes)]
        self._all(
            [
                worker.join.remote(rank, workers, local[rank], nodes.count(nodes[rank]), host, port)
                for rank, worker in enumerate(self._workers)
            ]
        )
        self._all([worker.make.remote(*self._made_of) for worker in self._workers])

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self._call("setup", dict(config), seed, device)

    def step(self) -> Mapping[str, float]:
        return together(self._call("step"))

    def sample(self, noise: int = 0) -> Sample | None:
        return self._first("sample", noise)

    def evaluate(self) -> Mapping[str, float]:
        return dict(self._first("evaluate"))

    def per_image(self) -> Mapping[str, Sequence[float]]:
        return dict(self._first("per_image"))

    def state_dict(self) -> dict[str, Any]:
        return dict(self._first("state_dict"))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._call("load_state_dict", state)

    def effective(self) -> Mapping[str, Any]:
        return {**self._first("effective"), "workers": len(self._workers)}

    def abilities(self) -> Abilities:
        """Those of the first rank, without methods that return tensors of its process."""
        found: Abilities = self._first("abilities")
        here = {"forward": False, "trainable_parameters": False, "parts": False, "training_images": False}
        return replace(found, **here, time_law=False, latent_statistics=False)

    def sample_ema(self, noise: int = 0) -> Sample | None:
        return self._first("sample_ema", noise)

    def fingerprints(self) -> Mapping[str, str]:
        return self._first("fingerprints")

    def left_out(self) -> Mapping[str, str]:
        return self._first("left_out")

    def ancestry(self) -> tuple[str, ...]:
        return self._first("ancestry")

    def close(self, verdict: str = "", reason: str = "") -> None:
        """Ends the workers."""
        workers, self._workers = self._workers, []
        for worker in workers:
            ray.kill(worker)

    def _first(self, method: str, *arguments: Any) -> Any:
        """Calls a method on every rank and returns the first rank's result."""
        return self._call(method, *arguments)[0]

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        shared = ray.put(arguments)  # a state is sent once
        return self._all([worker.call.remote(method, shared) for worker in self._workers])

    def _all(self, calls: Sequence[Any]) -> list[Any]:
        """Raises as soon as one rank fails, since others may wait for it. A death takes precedence over errors that it caused."""
        pending, failure = list(calls), None
        while pending and failure is None:
            done, pending = ray.wait(pending, num_returns=1)
            failure = _failure_of(done)
        deadline = time.monotonic() + DEAD_WAIT_S
        while failure is not None and not isinstance(failure, RayActorError) and pending and time.monotonic() < deadline:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            failure = next((found for found in (_failure_of(done),) if isinstance(found, RayActorError)), failure)
        if failure is not None:
            raise failure
        return list(ray.get(list(calls)))


def _failure_of(done: Sequence[Any]) -> Exception | None:
    try:
        ray.get(list(done))
    except Exception as error:
        found = cause_of(error)
        if found is not error:
            found.__cause__ = error  # with the traceback in the worker
        return found if isinstance(found, Exception) else error
    return None


def together(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combines the metrics of all ranks. Raises UserError if they cannot be combined."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for one in metrics for name in one):
        values = [one[name] for one in metrics if name in one]  # a rank lacks a loss in which none of its samples took part
        if name == TOTAL_NORM:
            finite = [value for value in values if math.isfinite(value)]
            if finite and max(finite) - min(finite) > SAME_NORM * max(finite):
                per_rank = ", ".join(f"{value:.4g}" for value in values)
                raise UserError(
                    f"{TOTAL_NORM} differs between the ranks ({per_rank}): measure it after the gradients were reduced, over all "
                    "shards, so that it is the norm that the optimiser sees"
                )
        found[name] = max(values) if name == STEP_SKIPPED else sum(values) / len(values)
    return found
