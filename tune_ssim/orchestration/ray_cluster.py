"""A connection to Ray: started or joined, what it has, and how many trials fit."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import ray

from tune_ssim.base.errors import UserError
from tune_ssim.orchestration.ray_internals import token_authentication
from tune_ssim.study.study import Study

WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}  # trials side by side: contended threads are slower than one thread each
UNLIMITED = 1000  # places where nothing is needed
CONNECT_TIMEOUT_S = 5.0  # what Ray itself grants a single attempt


@contextmanager
def connection(study: Study, address: str | None) -> Iterator[dict[str, float]]:
    """Connects, yields the cluster's resources, and shuts down what it started. An existing connection is used as it is."""
    _quiet()
    mine = not ray.is_initialized()
    if mine:
        options: dict[str, Any] = {
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "runtime_env": {"env_vars": WORKER_ENVIRONMENT},
        }
        if address is None:
            cpus = study.resources.cpus * (study.search.concurrency if isinstance(study.search.concurrency, int) else 1)
            options |= {"address": "local", "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus))}
        else:
            require_reachable(address)
            options["address"] = address
            options.pop("include_dashboard")
        try:
            ray.init(**options)
        except Exception as error:
            if address is None:
                raise
            raise UserError(f"--address {address}: {str(error).splitlines()[0]}") from None
    try:
        with _sigterm_as_ctrl_c() if mine else nullcontext():
            yield ray.cluster_resources()
    finally:
        if mine:
            ray.shutdown()


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A batch system or a container ends a study as Ctrl-C does; Ray's own handler prints a stack of addresses and dies."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: a handler that is not Python's


def require_reachable(address: str) -> None:
    """Raises UserError where nobody listens: Ray itself tries for minutes, and fills the screen."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and the like
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--address {address}: {getattr(error, 'strerror', None) or error}") from None


def describe_cluster(cluster: dict[str, float]) -> str:
    """Says whether token authentication is on: Ray's ports listen on every interface, so nothing else keeps strangers out."""
    enabled = token_authentication()
    if enabled is None:
        fence = "this version does not say whether token authentication is on"
    elif enabled:
        fence = "token authentication is on"
    else:
        fence = "token authentication is OFF: whoever reaches Ray's ports can run code here (RAY_AUTH_MODE=token)"
    gpus = f"{cluster['GPU']:g} GPUs" if cluster.get("GPU") else "no GPU"
    return f"Ray: {cluster.get('CPU', 0):g} CPUs, {gpus}; {fence}"


def _quiet() -> None:
    """Ray's own reporting off: progress is shown by us. Warnings and errors of the training still come."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_PROMPT_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # ASHA's metric is there at its rungs only
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\..*")


def gpus_of(study: Study, cluster: dict[str, float]) -> float:
    """Of a trial, or of each of its workers or nodes."""
    if study.resources.gpus_per_worker is not None:
        return study.resources.gpus_per_worker
    gpus = study.resources.gpus
    return (1.0 if cluster.get("GPU") else 0.0) if gpus == "auto" else float(gpus)


def concurrency_of(study: Study, cluster: dict[str, float]) -> int:
    """Trials side by side; never more than the nodes can hold, so that none waits for ever."""
    cpus, gpus, parts = study.resources.cpus, gpus_of(study, cluster), study.resources.parts
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # How many parts of a trial fit on each node; what is left over on one is of no use to another.
    room = [min(_fitting(node.get("CPU", 0.0), cpus), _fitting(node.get("GPU", 0.0), gpus)) for node in nodes]
    if study.resources.nodes == 1:
        fits = sum(room) // parts
        what = "a trial" if parts == 1 else f"each of a trial's {parts} workers"
    else:  # a part on each of several different nodes
        fits = spread(room, parts)
        what = f"a trial, on each of {parts} nodes,"
    if fits < 1:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UserError(f"resources: {what} needs {cpus:g} CPUs and {gpus:g} GPUs; the cluster's nodes have {have}")
    wanted = study.search.concurrency
    return fits if wanted == "auto" else min(int(wanted), fits)


def _fitting(there: float, needed: float) -> int:
    return int(there / needed + 1e-6) if needed else UNLIMITED


def spread(room: Sequence[int], parts: int) -> int:
    """How many trials can each have `parts` places on different nodes, of nodes with so many places: the largest n for which the
    nodes have n * parts places, counting at most n of each."""
    count = 0
    while sum(min(places, count + 1) for places in room) >= (count + 1) * parts and count < UNLIMITED:
        count += 1
    return count
