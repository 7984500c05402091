"""cluster.yaml as its comments say to use it: `ray up` from one host to three others, a study on them, and the end of it all.

pip alone is a stand-in: the hosts have no network, so they use the packages of this test's own environment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host, hosts, ray_environment, why_impossible
from ruamel.yaml import YAML
from small_studies import SMALL

ROOT = Path(__file__).resolve().parents[1]
REASON = why_impossible()
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
NODES = "import ray; ray.init('auto', log_to_driver=False); print(*(n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']))"
yaml = YAML()


@pytest.fixture
def four_hosts(tmp_path: Path) -> Iterator[list[Host]]:
    """A laptop and three nodes, each with ~/tune_ssim/.venv."""
    environment = ray_environment(tmp_path / "venv")
    with hosts(4, tmp_path) as found:
        for host in found:
            (host.home / "tune_ssim").mkdir()
            (host.home / "tune_ssim" / ".venv").symlink_to(environment)
        yield found


def write_cluster_yaml(laptop: Host, nodes: list[Host]) -> None:
    """The file of this repository with its three EDITs made."""
    cluster = yaml.load((ROOT / "cluster.yaml").read_text())
    cluster["provider"] |= {"head_ip": nodes[0].address, "worker_ips": [node.address for node in nodes[1:]]}
    cluster["auth"]["ssh_user"] = "root"
    mounts = cluster["file_mounts"]
    mounts |= {there: str(ROOT / here) for there, here in mounts.items() if here.startswith("./")}
    with (laptop.home / "cluster.yaml").open("w") as file:
        yaml.dump(cluster, file)


def alive(head: Host, count: int) -> set[str]:
    """Addresses of the nodes, as soon as there are `count` of them."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        addresses = set(head.run("env", "RAY_AUTH_MODE=token", "tune_ssim/.venv/bin/python", "-c", NODES).stdout.split())
        if len(addresses) == count:
            break
    return addresses


def ray_processes(host: Host) -> list[str]:
    return [line for line in host.run("ps", "-eo", "args").stdout.splitlines() if "ray" in line and "sshd" not in line]


def test_all_listed_nodes_start_run_a_study_and_end(four_hosts: list[Host], tmp_path: Path) -> None:
    laptop, *nodes = four_hosts
    head = nodes[0]
    write_cluster_yaml(laptop, nodes)
    bin_ = "tune_ssim/.venv/bin"
    assert laptop.run(f"{bin_}/ray", "get-auth-token", "--generate").returncode == 0
    up = laptop.run(f"{bin_}/ray", "up", "-y", "--no-config-cache", "cluster.yaml", timeout_s=200)
    assert up.returncode == 0, up.stdout + up.stderr
    assert alive(head, 3) == {node.address for node in nodes}
    assert all((node.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600 for node in nodes)

    one_a_node = {"search": {"trials": 4, "seed": 0}, "resources": {"cpus": os.cpu_count()}}
    with (head.home / "study.yaml").open("w") as file:
        yaml.dump(SMALL | one_a_node, file)
    run = ["env", "RAY_AUTH_MODE=token", "RAY_ADDRESS=auto", f"TUNE_SSIM_STORAGE={tmp_path / 'shared'}", f"{bin_}/tune-ssim"]
    done = head.run(*run, "run", "study.yaml", "--address", "auto", timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "token authentication is on" in done.stdout
    trials = json.loads(head.run(*run, "trials", "--json").stdout)
    assert len(trials) == 6
    assert {trial["verdict"] for trial in trials} == {"safe", "pruned"}

    for node in reversed(nodes):
        laptop.run("ssh", "-o", "StrictHostKeyChecking=no", node.address, f"{bin_}/ray", "stop")
    assert [ray_processes(node) for node in nodes] == [[], [], []]
    assert laptop.run(f"{bin_}/ray", "down", "-y", "cluster.yaml").returncode == 0
