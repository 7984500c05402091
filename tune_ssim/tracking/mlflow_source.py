"""A run in MLflow as a source of records, like the log files of tune_ssim.records.readers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tune_ssim.base.errors import UserError
from tune_ssim.base.passwords import hide_password
from tune_ssim.records import Record
from tune_ssim.records.readers.reader import Source
from tune_ssim.records.readers.rows import Rows
from tune_ssim.records.readers.source import MLFLOW
from tune_ssim.tracking.mirror import describe_error
from tune_ssim.tracking.mlflow_internals import restored

if TYPE_CHECKING:
    from mlflow import MlflowClient

COMMANDS = "tune_ssim commands"  # the experiment for the runs that scripts log to
SQLITE = "sqlite:///"


def open_run(
    run: str,
    *,
    tracking_uri: str | None = None,
    names: Mapping[str, str] | None = None,
) -> MLflowRun:
    """The metrics of a run, named `mlflow:RUN_ID` or `runs:/RUN_ID`, from its first step.

    `tracking_uri`: None is MLflow's own choice ($MLFLOW_TRACKING_URI). `names`: log names → our metric names. Raises UserError if
    there is no such run, or the tracking server does not answer."""
    run_id = next((run.removeprefix(prefix) for prefix in MLFLOW if run.startswith(prefix)), "").strip("/")
    if not run_id or "/" in run_id:
        raise UserError(f"{run!r}: a run in MLflow is named mlflow:RUN_ID or runs:/RUN_ID")
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = tracking_uri or mlflow.get_tracking_uri()
    where = f"(tracking URI {hide_password(uri)}{'' if tracking_uri else '; $MLFLOW_TRACKING_URI says another'})"
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE).partition("?")[0]).exists():  # MLflow would make an empty one
        raise UserError(f"{run}: there is no such database {where}")
    client = mlflow.MlflowClient(tracking_uri=uri)
    try:
        client.get_run(run_id)
    except (MlflowException, OSError) as error:
        raise UserError(f"{run}: {describe_error(error)} {where}") from None
    return MLflowRun(client, run_id, names)


def open_new_run(tracking_uri: str, name: str, names: Mapping[str, str] | None = None) -> tuple[MLflowRun, dict[str, str]]:
    """A new, empty run, and the environment in which `mlflow.start_run()` continues it. So a script that logs to MLflow can be
    followed whatever it calls its runs. Raises UserError if the tracking server does not answer."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(tracking_uri=tracking_uri)
    try:
        found = client.get_experiment_by_name(COMMANDS)
        experiment = found.experiment_id if found is not None else client.create_experiment(COMMANDS)
        run_id = client.create_run(experiment, run_name=name).info.run_id
    except (MlflowException, OSError) as error:
        raise UserError(f"records.mlflow: {describe_error(error)} (tracking URI {hide_password(tracking_uri)})") from None
    environment = {"MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_EXPERIMENT_ID": str(experiment), "MLFLOW_RUN_ID": run_id}
    return MLflowRun(client, run_id, names), environment


class MLflowRun(Source):
    """Each `read` fetches the whole histories, in pages. Records already released are not released again. If a metric is logged
    twice at a step, the first value wins."""

    def __init__(self, client: MlflowClient, run_id: str, names: Mapping[str, str] | None = None) -> None:
        super().__init__(Rows(names))
        self.issues.unit = "value"
        self.run_id = run_id
        self._client = client

    def finish(self) -> list[Record]:
        self._fetch(complete=True)
        return self.rows.steps.finish()

    def batches(self) -> Iterator[list[Record]]:
        self._fetch(complete=False)
        yield self.rows.steps.take()

    def _fetch(self, complete: bool) -> None:
        """`complete`: nothing more will be logged. Otherwise steps that began after the first request are left for the next call,
        since metrics fetched earlier may lack them."""
        from mlflow.exceptions import MlflowException

        try:
            latest = self._client.get_run(self.run_id).data.to_proto().metrics
            histories = {metric.key: self._client.get_metric_history(self.run_id, metric.key) for metric in latest}
        except (MlflowException, OSError) as error:
            self.issues.note(f"run {self.run_id}: {describe_error(error)}")
            return
        newest = sys.maxsize if complete else max((metric.step for metric in latest), default=-1)
        by_step: dict[int, dict[str, float]] = {}
        for name, history in histories.items():
            for point in history:
                if point.step <= newest:
                    by_step.setdefault(point.step, {}).setdefault(name, restored(point.value))
        self.issues.lines = sum(map(len, histories.values()))
        self.rows.steps.begin_anew()
        for step in sorted(by_step):
            self.rows.add(step, {self.rows.names[name]: value for name, value in by_step[step].items()}, step, f"step {step}")
