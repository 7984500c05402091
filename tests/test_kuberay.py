"""cluster/kuberay.yaml: what its comments promise. (Its fields were checked by hand against KubeRay's CRD, 1.6.0 to 1.7.0.)"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from ruamel.yaml import YAML

from tune_ssim.cli.app import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def spec() -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / "cluster" / "kuberay.yaml").read_text())["spec"]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = spec["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_entrypoint_is_one_command_that_resumes(spec: dict[str, Any]) -> None:
    """KubeRay pastes it into a longer shell line, so a shell's own characters would end up in the wrong place."""
    words = shlex.split(spec["entrypoint"])
    assert words == spec["entrypoint"].split() and not re.search(r"[;&|$`<>(){}]", spec["entrypoint"])
    assert words[:2] == ["tune-ssim", "run"] and "--resume-if-started" in words
    context = click.Context(cli)
    cli.commands["run"].make_context("run", words[2:], parent=context)
    assert spec["backoffLimit"] > 0


def test_every_pod_shares_the_storage_and_the_token_is_a_secret(spec: dict[str, Any]) -> None:
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "tune-ssim-token"}
    for pod in pods(spec):
        assert {"name": "shared", "persistentVolumeClaim": {"claimName": "tune-ssim"}} in pod["volumes"]
        (container,) = pod["containers"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert {"name": "TUNE_SSIM_STORAGE", "value": "/shared/tune_ssim"} in container["env"]
        assert not any(re.search("TOKEN|PASSWORD|SECRET", variable["name"]) for variable in container["env"])
        assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]


def test_ray_is_the_pinned_one(spec: dict[str, Any]) -> None:
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert spec["rayClusterSpec"]["rayVersion"] == pinned
    assert f"FROM rayproject/ray:{pinned}-" in (ROOT / "cluster" / "kuberay.yaml").read_text()
