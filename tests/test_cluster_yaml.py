"""cluster.yaml against Ray's own validation, and against the promises that its comments make."""

from __future__ import annotations

import copy
import ipaddress
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.exceptions import ClickException
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
CLUSTER_YAML = ROOT / "cluster.yaml"
DOCUMENTATION_ADDRESSES = ipaddress.ip_network("192.0.2.0/24")  # RFC 5737


@pytest.fixture
def cluster() -> dict[str, Any]:
    return YAML(typ="safe").load(CLUSTER_YAML.read_text(encoding="utf-8"))


def start_commands(cluster: dict[str, Any]) -> Iterator[str]:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        yield next(command for command in cluster[key] if "ray start" in command)


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == len(cluster["provider"]["worker_ips"])


def test_a_misspelt_key_is_rejected(cluster: dict[str, Any]) -> None:
    cluster["setup_comands"] = cluster.pop("setup_commands")
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        validate_config(prepare_config(cluster))


def test_a_missing_head_is_rejected(cluster: dict[str, Any]) -> None:
    del cluster["provider"]["head_ip"]
    with pytest.raises(ClickException):
        prepare_config(cluster)


def test_addresses_are_placeholders(cluster: dict[str, Any]) -> None:
    provider = cluster["provider"]
    for address in [provider["head_ip"], *provider["worker_ips"]]:
        assert ipaddress.ip_address(address) in DOCUMENTATION_ADDRESSES


def test_every_node_starts_with_the_token_and_one_thread(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for command in start_commands(cluster):
        settings, start = command.split("ray start", 1)
        assert " RAY_AUTH_MODE=token " in settings
        assert "OMP_NUM_THREADS=1" in settings
        assert start


def test_every_node_announces_its_own_address_and_none_is_left_out(cluster: dict[str, Any]) -> None:
    """What `ray up` makes of it is tested in test_ray_up.py, on hosts without a default route."""
    head, worker = start_commands(cluster)
    announced = "$(echo $SSH_CONNECTION | cut -d' ' -f3)"
    assert f"--node-ip-address={announced}" in head and f"--node-ip-address={announced}" in worker
    shell = subprocess.run(
        ["bash", "-c", f"echo {announced}"], env={"SSH_CONNECTION": "192.0.2.1 50000 192.0.2.10 22"}, capture_output=True, text=True
    )
    assert shell.stdout.strip() == "192.0.2.10"
    assert " RAY_enable_autoscaler_v2=0 " in head


def test_the_dashboard_stays_on_loopback(cluster: dict[str, Any]) -> None:
    head, _ = start_commands(cluster)
    assert "--head" in head
    assert "--dashboard-host=127.0.0.1" in head


def test_every_node_runs_ray_from_the_environment_that_setup_makes(cluster: dict[str, Any]) -> None:
    setup = "\n".join(cluster["setup_commands"])
    assert "cd ~/tune_ssim && " in setup
    assert "-m venv .venv" in setup
    assert "-c constraints.txt" in setup
    for command in start_commands(cluster):
        assert "~/tune_ssim/.venv/bin/ray start" in command


def test_the_mounts_exist_and_suffice_for_an_installation(cluster: dict[str, Any]) -> None:
    mounted = set()
    for remote, local in cluster["file_mounts"].items():
        if local.startswith("~"):
            continue  # the user's own; made by `ray get-auth-token --generate`
        assert (ROOT / local).exists(), local
        assert remote == "~/tune_ssim/" + local.removeprefix("./")
        mounted.add(local.removeprefix("./"))
    # What pyproject.toml names: the readme, the licence, the packages; and the constraints of the setup command.
    assert mounted == {"tune_ssim", "search_spaces", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
