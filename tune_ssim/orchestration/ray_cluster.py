"""Starts or joins a Ray cluster, reads its resources, and computes how many trials fit."""

from __future__ import annotations

import logging
import math
import os
import socket
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray

from tune_ssim.base.errors import UserError
from tune_ssim.orchestration.ray_internals import refuses_token, token_authentication, without_messages_of_nodes
from tune_ssim.orchestration.stops import stops_as_ctrl_c
from tune_ssim.study.study import Study

# A process behind a link that was cut is noticed after a minute, in Ray after seven: an answer lost on the way never comes.
KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms": "30000", "RAY_grpc_client_keepalive_timeout_ms": "30000"}
# Parallel trials: contended threads are slower than one thread each.
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", **KEEPALIVE}
UNLIMITED = 1000  # slots if no resource is needed
CONNECT_TIMEOUT_S = 5.0  # Ray's own timeout of a single attempt


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
            if "RAY_TMPDIR" not in os.environ:
                options["_temp_dir"] = str(own_temporary_folder() / "ray")
            options |= {"address": "local", "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus))}
        else:
            require_reachable(address)
            require_token(address)
            options["address"] = address
            options.pop("include_dashboard")
        had_token = token_file().exists()
        try:
            ray.init(**options)
        except Exception as error:
            if address is None:
                raise
            raise UserError(f"--address {address}: {str(error).splitlines()[0]}") from None
        if not had_token and token_file().exists():
            token_file().chmod(0o600)  # Ray has made it readable to every user of the machine
    try:
        with _terminal_is_ours() if mine else nullcontext():
            yield ray.cluster_resources()
    finally:
        if mine:
            ray.shutdown()


@contextmanager
def _terminal_is_ours() -> Iterator[None]:
    with stops_as_ctrl_c(), without_messages_of_nodes():
        yield


def own_temporary_folder(parent: Path = Path("/tmp")) -> Path:
    """A folder that no other user can enter, for the sockets and logs of a local Ray, which itself opens /tmp/ray to all. Not in
    $TMPDIR: a socket's path has at most 107 bytes. Raises UserError if the folder there is not only this user's."""
    folder = parent / f"tune-ssim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UserError(f"{folder}: must be a folder of yours with mode 700: remove it, or set RAY_TMPDIR to another place")
    return folder


def require_reachable(address: str) -> None:
    """Raises UserError if nothing listens at the address. Ray itself retries for minutes and floods the terminal."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and the like
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--address {address}: {getattr(error, 'strerror', None) or error}") from None


def require_token(address: str) -> None:
    """Raises UserError if the cluster refuses this user's token, or gets none."""
    copied = f"copy the head's token file to {token_file()}, with mode 0600"
    is_held, is_on = bool(os.environ.get("RAY_AUTH_TOKEN")), token_authentication()
    if is_on and not is_held and not token_file().exists():
        raise UserError(f"--address {address}: RAY_AUTH_MODE=token, but there is no token: {copied}")
    if address.startswith("ray://") or not refuses_token(address, CONNECT_TIMEOUT_S):
        return
    if is_on:
        held = "$RAY_AUTH_TOKEN" if is_held else token_file()
        raise UserError(f"--address {address}: the cluster refuses the token in {held}: {copied}")
    raise UserError(f"--address {address}: the cluster wants a token: set RAY_AUTH_MODE=token, and {copied}")


def describe_cluster(cluster: dict[str, float]) -> str:
    """Describes the cluster and whether token authentication is enabled. Ray's ports listen on every interface."""
    enabled = token_authentication()
    if enabled is None:
        authentication = "this version does not report whether token authentication is on"
    elif enabled:
        authentication = "token authentication is on"
        if token_file().exists() and token_file().stat().st_mode & 0o077:
            authentication += f", but other users can read the token: chmod 600 {token_file()}"
    else:
        authentication = "token authentication is OFF: anyone who reaches Ray's ports can run code here (RAY_AUTH_MODE=token)"
    gpus = f"{cluster['GPU']:g} GPUs" if cluster.get("GPU") else "no GPU"
    return f"Ray: {cluster.get('CPU', 0):g} CPUs, {gpus}; {authentication}"


def token_file() -> Path:
    """Where Ray reads the token from, unless it is given by $RAY_AUTH_TOKEN."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _quiet() -> None:
    """Turns off Ray's own progress output, which ours replaces. Warnings and errors of the training are still shown."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_PROMPT_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # tracebacks of Ray; the study says in a line what happened
    for name, value in KEEPALIVE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # results have ASHA's metric only at its rungs
    for name, level in (("ray", logging.ERROR), ("ray.train", logging.ERROR), ("ray.tune", logging.CRITICAL)):
        logging.getLogger(name).setLevel(level)  # Tune's errors are the trials', which the study reports
    warnings.filterwarnings("ignore", module=r"ray\..*")


def gpus_of(study: Study, cluster: dict[str, float]) -> float:
    """CPUs and GPUs of a trial, or of each of its workers or nodes."""
    if study.resources.gpus_per_worker is not None:
        return study.resources.gpus_per_worker
    gpus = study.resources.gpus
    return (1.0 if cluster.get("GPU") else 0.0) if gpus == "auto" else float(gpus)


def concurrency_of(study: Study, cluster: dict[str, float]) -> int:
    """Parallel trials: never more than the nodes can hold, so that none waits forever."""
    cpus, gpus, parts = study.resources.cpus, gpus_of(study, cluster), study.resources.parts
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # How many parts of a trial fit on each node. Resources left over on two nodes cannot be combined.
    room = [min(_fitting(node.get("CPU", 0.0), cpus), _fitting(node.get("GPU", 0.0), gpus)) for node in nodes]
    if study.resources.nodes == 1:
        fits = sum(room) // parts
        what = "a trial" if parts == 1 else f"each of a trial's {parts} workers"
    else:  # one part on each of several different nodes
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
    """How many trials fit if each needs `parts` slots on different nodes, given the slots of each node: the largest n for which the
    nodes have n * parts slots, counting at most n slots of each node."""
    count = 0
    while sum(min(places, count + 1) for places in room) >= (count + 1) * parts and count < UNLIMITED:
        count += 1
    return count
