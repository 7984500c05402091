"""What is wrong with a cluster and its storage, in words and with remedies: one small task on every node."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_ssim.base.errors import UserError
from tune_ssim.orchestration import node_facts
from tune_ssim.orchestration.ray_cluster import concurrency_of, connection, token_file
from tune_ssim.orchestration.ray_internals import token_authentication
from tune_ssim.study.study import Study

NODE_TIMEOUT_S = 30.0  # a new worker process takes seconds to start, more on a busy node
SLOW_LOCK_S, SKEW_S = 1.0, 2.0  # a lock on NFS takes milliseconds; NTP holds clocks within milliseconds
LOW_DISK_BYTES, LOW_SHM_BYTES = 5 * 10**9, 10**9  # a container's /dev/shm has 64 MB unless asked for more
LOW_OPEN_FILES = 4096  # Ray recommends 65,536
SERVER_TIMEOUT_S = 5.0
MIN_MLFLOW = (3, 0)  # pyproject.toml admits no older client either
OPEN_CLUSTER = "TUNE_SSIM_OPEN_CLUSTER"  # environment variable: run on a cluster without authentication


@dataclass(frozen=True)
class Finding:
    """level: `problem` (a study does not start) or `warning`."""

    level: str
    subject: str
    text: str
    remedy: str

    @property
    def sentence(self) -> str:
        return f"{self.subject}: {self.text}; {self.remedy}"


def problem(subject: str, text: str, remedy: str) -> Finding:
    return Finding("problem", subject, text, remedy)


def warning(subject: str, text: str, remedy: str) -> Finding:
    return Finding("warning", subject, text, remedy)


def examine(study: Study, address: str | None, storage: Path, tracking_uri: str | None = None) -> dict[str, Any]:
    """Connects to a cluster and examines it. Returns plain data: the findings and every node's facts."""
    with connection(study, address):
        findings, nodes = examine_connected(study, storage, tracking_uri)
    return {
        "status": "problem" if any(one.level == "problem" for one in findings) else "warning" if findings else "ok",
        "findings": [asdict(one) for one in findings],
        "nodes": nodes,
    }


def require_fit(study: Study, storage: Path, tracking_uri: str | None) -> list[str]:
    """Before a study on a cluster. Returns its warnings. Raises UserError with all its problems."""
    findings, _ = examine_connected(study, storage, tracking_uri)
    problems = [one.sentence for one in findings if one.level == "problem"]
    if problems:
        raise UserError("\n".join(problems))
    return [one.sentence for one in findings]


def examine_connected(study: Study, storage: Path, tracking_uri: str | None) -> tuple[list[Finding], dict[str, Any]]:
    findings = list(_authentication())
    try:
        concurrency_of(study, ray.cluster_resources())
    except UserError as error:
        findings.append(problem("resources", str(error), "ask for less in `resources`, or no trial ever starts"))
    marker = f".tune-ssim-doctor-{uuid.uuid4().hex}"
    try:
        storage.mkdir(parents=True, exist_ok=True)
        (storage / marker).write_text("written by the driver")
    except OSError as error:
        return [*findings, problem("storage", f"{storage} cannot be written: {error.strerror}", "choose --storage-path")], {}
    try:
        import_path = study.import_path
        mine = node_facts.facts_of_node(str(storage), marker, import_path, has_gpus=False)
        nodes = dict(_facts_of_nodes(storage, marker, import_path))
    finally:
        (storage / marker).unlink(missing_ok=True)
    for name, facts in nodes.items():
        findings += _of_node(name, facts, mine, storage)
    return [*findings, *_tracking(tracking_uri)], nodes


def _facts_of_nodes(storage: Path, marker: str, import_path: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """By node. Its task has no resources, so that it runs on a busy node too."""
    cloudpickle.register_pickle_by_value(node_facts)
    try:
        remote = ray.remote(num_cpus=0, max_retries=0)(node_facts.facts_of_node)
        tasks = {}
        for node in ray.nodes():
            if node["Alive"]:
                where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                has_gpus = bool(node["Resources"].get("GPU"))
                asked_s = time.time()
                task = remote.options(scheduling_strategy=where).remote(str(storage), marker, import_path, has_gpus)
                tasks[node["NodeID"]] = (node, asked_s, task)
    finally:
        cloudpickle.unregister_pickle_by_value(node_facts)
    deadline = time.monotonic() + NODE_TIMEOUT_S
    for node_id, (node, asked_s, task) in tasks.items():
        name = f"node {node['NodeManagerAddress']} ({node_id[:6]})"
        has = {"cpus": node["Resources"].get("CPU", 0.0), "gpus": node["Resources"].get("GPU", 0.0)}
        try:
            found = ray.get(task, timeout=max(0.1, deadline - time.monotonic()))
        except GetTimeoutError:
            yield name, {**has, "error": f"no answer within {NODE_TIMEOUT_S:g} s"}
        except RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            yield name, {**has, "error": lines[-1] if lines else type(error).__name__}
        else:
            skew_s = max(asked_s - found["time_s"], found["time_s"] - time.time(), 0.0)
            yield name, {**has, **found, "skew_s": skew_s}


def _authentication() -> Iterator[Finding]:
    enabled, token = token_authentication(), token_file()
    if enabled is False:
        remedy = f"start every node with RAY_AUTH_MODE=token, or allow it with {OPEN_CLUSTER}=1"
        text = "token authentication is off: anyone who reaches Ray's ports can run code on its nodes"
        yield Finding("warning" if os.environ.get(OPEN_CLUSTER, "") not in ("", "0") else "problem", "cluster", text, remedy)
    if token.exists() and token.stat().st_mode & 0o077:
        yield warning("token", f"{token} can be read by other users of this machine", f"chmod 600 {token}")


def _of_node(name: str, facts: Mapping[str, Any], mine: Mapping[str, Any], storage: Path) -> Iterator[Finding]:
    if error := facts.get("error"):
        yield problem(name, f"its check failed: {error}", "see its logs, or take it out of the cluster")
        return
    stored = facts["storage"]
    if not stored["is_shared"]:
        text = f"a file written to {storage} here is not seen there"
        yield problem(name, text, "put --storage-path on a file system that all nodes share under the same path (NFS)")
    elif stored["error"]:
        yield problem(name, f"{storage} cannot be written there: {stored['error']}", "mount it writable for the user of Ray")
    elif stored["lock_s"] > SLOW_LOCK_S:
        yield warning(name, f"a lock in {storage} takes {stored['lock_s']:.1f} s", "check the lock service of the file system")
    if facts["skew_s"] > SKEW_S:
        yield warning(name, f"its clock is {facts['skew_s']:.0f} s off", "run an NTP client on every node")
    if facts["cpus"] or facts["gpus"]:  # no trial runs on others
        yield from _code_of_node(name, facts, mine)
        yield from _gpus_of_node(name, facts)
    rooms = dict(facts["free"]) | ({str(storage): stored["free"]} if "free" in stored else {})
    for folder, free in rooms.items():
        if free >= (LOW_SHM_BYTES if folder == "/dev/shm" else LOW_DISK_BYTES):
            continue
        yield warning(name, f"{folder} has {free / 1e9:.1f} GB left", "free or enlarge it before a long study")
    if 0 < facts["open_files"] < LOW_OPEN_FILES:
        yield warning(name, f"a process may open {facts['open_files']} files", "ulimit -n 65536 before `ray start`")


def _code_of_node(name: str, facts: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[Finding]:
    same = "install the same versions on every node (constraints.txt)"
    for package, version in facts["versions"].items():
        here = mine["versions"][package]
        if version == here:
            continue
        if package == "tune-ssim" and facts["code"] is not None and facts["code"] == mine["code"]:
            continue  # the same code on the path instead of installed
        is_minor = package == "torch" or (package == "python" and version.split(".")[:2] == here.split(".")[:2])
        text = f"{package} {version or 'is missing'} there, {here or 'missing'} here"
        yield (warning if is_minor and version else problem)(name, text, same)
    if facts["versions"]["tune-ssim"] == mine["versions"]["tune-ssim"] and facts["code"] != mine["code"]:
        yield problem(name, "tune_ssim has the same version but other code there", same)
    if facts["task_code"] != mine["task_code"]:
        text = "the task's code differs from the code here" if facts["task_code"] else "the folder of the task's code is missing"
        yield problem(name, text, "put the study file's folder on the shared file system")


def _gpus_of_node(name: str, facts: Mapping[str, Any]) -> Iterator[Finding]:
    if reason := facts.get("cuda"):
        yield problem(name, f"has {facts['gpus']:g} GPUs, but {reason}", "install the torch build for its CUDA driver")
    if not facts["gpus"] and facts["has_nvidia"]:
        yield warning(name, "has a GPU that Ray does not offer", "start Ray there with --num-gpus")


def _tracking(uri: str | None) -> Iterator[Finding]:
    if uri is None or not uri.startswith(("http://", "https://")):
        return
    shown = uri.rpartition("@")[2] if "@" in uri else uri
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=SERVER_TIMEOUT_S) as answer:
            version = answer.read(100).decode(errors="replace").strip().strip('"')
        numbers = tuple(int(part) for part in version.split(".")[:2])
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            yield warning("tracking", f"{shown}/version answers {error.code}", "is this an MLflow server?")
    except ValueError:
        yield warning("tracking", f"{shown} does not answer as an MLflow server", "check --tracking-uri")
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        yield warning("tracking", f"{shown} cannot be reached: {reason}", "metrics wait in the study's folder until it can")
    else:
        if numbers < MIN_MLFLOW:
            yield warning("tracking", f"MLflow {version} is too old", "use a server of version 3 or newer")
