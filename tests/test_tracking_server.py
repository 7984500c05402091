"""cluster/mlflow.compose.yaml and mlflow.service: what docs/tracking_server.md says of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
COMPOSE, UNIT = ROOT / "cluster" / "mlflow.compose.yaml", ROOT / "cluster" / "mlflow.service"
PAGE = ROOT / "docs" / "tracking_server.md"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return YAML(typ="safe").load(COMPOSE.read_text())["services"]


def test_only_this_hosts_loopback_is_published(services: dict[str, Any]) -> None:
    assert services["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]
    assert "ports" not in services["database"]
    assert " --host 127.0.0.1 " in UNIT.read_text()


def test_no_secret_stands_in_a_file_or_an_argument(services: dict[str, Any]) -> None:
    text = COMPOSE.read_text()
    for password in re.findall(r"(?:PASSWORD|SECRET_KEY): *(.+)", text) + re.findall(r"//mlflow:(.+?)@", text):
        assert password.startswith("${")
    for command in (services["mlflow"]["command"], re.search(r"ExecStart=(.+)", UNIT.read_text())[1]):  # type: ignore[index]
        assert "postgresql" not in command and "--app-name basic-auth" in command


def test_the_versions_are_those_that_were_tested() -> None:
    (tested,) = re.findall(r"^mlflow==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    for file in (COMPOSE, PAGE):
        assert re.findall(r"mlflow\[auth\]==([\d.]+)", file.read_text()) == [tested]
