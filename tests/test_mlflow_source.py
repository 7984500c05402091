"""A run in MLflow read back as records: a real store, and a real server that pages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Metric

from tune_ssim.base.errors import UserError
from tune_ssim.records import Record
from tune_ssim.tracking.mlflow_source import MLflowRun, open_run


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def run(uri: str) -> tuple[mlflow.MlflowClient, str]:
    client = mlflow.MlflowClient(tracking_uri=uri)
    return client, client.create_run("0").info.run_id


def log(run: tuple[mlflow.MlflowClient, str], step: int, at: int = 0, **values: float) -> None:
    client, run_id = run
    client.log_batch(run_id, metrics=[Metric(name, value, at or step, step) for name, value in values.items()])


def exact(records: list[Record]) -> str:
    return json.dumps([record.to_json() for record in records], sort_keys=True)


def test_a_run_is_followed(uri: str, run: tuple[mlflow.MlflowClient, str]) -> None:
    source = open_run(f"mlflow:{run[1]}", tracking_uri=uri, names={"grad_norm": "total_norm"})
    assert source.read() == []
    log(run, 0, loss=0.5, grad_norm=2.0)
    log(run, 1, loss=math.nan, grad_norm=math.inf)
    assert source.read() == [Record(0, {"loss": 0.5, "total_norm": 2.0})]
    log(run, 1, val_loss=0.25)
    log(run, 2, loss=-math.inf, grad_norm=1.0)
    log(run, 0, at=9, loss=7.0)  # the step again, after a restart
    wanted = exact([Record(1, {"loss": math.nan, "total_norm": math.inf, "val_loss": 0.25})])
    assert exact(source.read()) == wanted
    assert source.finish() == [Record(2, {"loss": -math.inf, "total_norm": 1.0})]
    assert source.issues.sentence() == ""
    whole = open_run(f"runs:/{run[1]}", tracking_uri=uri)
    assert [record.values["loss"] for record in whole.finish()][::2] == [0.5, -math.inf]


def test_a_step_that_begins_while_histories_are_fetched_is_left_for_later(uri: str, run: tuple[mlflow.MlflowClient, str]) -> None:
    for step in range(3):
        log(run, step, a=float(step), b=float(step))

    class LoggedInBetween(mlflow.MlflowClient):
        asked = 0

        def get_metric_history(self, run_id: str, key: str) -> list[Metric]:
            history = super().get_metric_history(run_id, key)
            LoggedInBetween.asked += 1
            if LoggedInBetween.asked == 1:
                log(run, 3, a=3.0, b=3.0)
                log(run, 4, a=4.0, b=4.0)
            return history

    source = MLflowRun(LoggedInBetween(tracking_uri=uri), run[1])
    records = source.read() + source.finish()
    assert records == [Record(step, {"a": float(step), "b": float(step)}) for step in range(5)]


def test_pages(uri: str, run: tuple[mlflow.MlflowClient, str], monkeypatch: pytest.MonkeyPatch) -> None:
    client, run_id = run
    client.log_batch(run_id, metrics=[Metric("loss", float(step), step, step) for step in range(25)])
    import mlflow.tracking._tracking_service.client as service

    monkeypatch.setattr(service, "GET_METRIC_HISTORY_MAX_RESULTS", 10)
    assert [record.step for record in open_run(f"runs:/{run_id}", tracking_uri=uri).finish()] == list(range(25))


@pytest.mark.parametrize("name", ["mlflow:", "runs:/a/model", "abc", "mlflow:0123456789abcdef"])
def test_no_such_run(uri: str, name: str) -> None:
    with pytest.raises(UserError, match=r"RUN_ID|not found"):
        open_run(name, tracking_uri=uri)


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such database"):
        open_run("mlflow:0123", tracking_uri=f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()


def test_a_server_that_is_away(uri: str, run: tuple[mlflow.MlflowClient, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="connection refused"):
        open_run("mlflow:0123", tracking_uri="http://127.0.0.1:9")
    source: Any = open_run(f"mlflow:{run[1]}", tracking_uri=uri)
    source._client = mlflow.MlflowClient(tracking_uri="http://127.0.0.1:9")
    assert source.read() == []
    assert "connection refused" in source.issues.sentence()
