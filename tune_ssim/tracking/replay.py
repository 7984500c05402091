"""Replays a study's events into MLflow: one parent run per study, one child run per trial.

The same mechanism serves the live mirror, a later mirror (after the server was down) and a resumed study. Events are applied from
the last acknowledged byte on. Applying one twice changes nothing, because

- a run is looked up by its tags (`tune_ssim.study_id`, `tune_ssim.trial_id`) before it is created;
- a metric has the time of its event: MLflow keeps one row for the same name, step, value and time;
- if a trial resumes from a checkpoint and repeats steps, the first value of each step wins.

So exactly-once delivery is not needed, and kill -9 at any moment costs at most a repeated push of one chunk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import posixpath
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_ssim.base.errors import UserError
from tune_ssim.results.events import Event, gain
from tune_ssim.results.pareto import pareto_front
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.winner import safe_trials
from tune_ssim.tracking import mirror
from tune_ssim.tracking import mlflow_internals as internals
from tune_ssim.tracking.leaderboard import Leaderboard, flattened, number, plain, shortened
from tune_ssim.tracking.study_summary import summary_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHUNK_BYTES = 256 * 1024  # of events.jsonl held in memory at a time, unless a single event is longer
STATUS = {"pruned": "KILLED", "error": "FAILED", "bad_setup": "FAILED"}  # every other verdict is FINISHED
STUDY_ID = "tune_ssim.study_id"
TRIAL_ID = "tune_ssim.trial_id"
CHAMPION = "champion"


class Replay:
    """One connection to MLflow, and the state of a study up to `offset`.

    Any method may raise an exception of MLflow; create a new instance then."""

    def __init__(self, folder: StudyFolder, uri: str, experiment: str) -> None:
        import mlflow
        from mlflow import entities
        from mlflow.exceptions import MlflowException

        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.folder = folder
        self._entities: Any = entities
        self._mlflow_error = MlflowException
        self._client: MlflowClient = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        self.study_id = _study_id(folder)
        self.experiment_id = _experiment(self._client, experiment, _artifact_location(uri, folder))
        self.runs: dict[str, str] = {}  # trial_id → run_id; the parent is ""
        self._find_runs()
        self.refused: list[str] = []  # messages about what MLflow rejects for good

        # State from the events up to `offset`.
        self._board = Leaderboard(folder.name, folder.objective.also)
        self._board_has_changed = False
        self._last: dict[tuple[str, str], tuple[int, float]] = {}  # (trial, metric) → last step and its value
        self._non_finite: set[tuple[str, str]] = set()
        self._names: dict[str, str] = {}  # names of metrics and parameters: ours → MLflow's
        self._unsent: dict[str, list[Any]] = {}  # trial_id → metrics
        self._fresh: dict[str, dict[str, str]] = {}  # run_id → its parameters, of unfinished runs that this connection created

        self.offset = self.events = 0
        state = mirror.read_state(folder, uri)
        if "" in self.runs and 0 < state["offset"] <= folder.events_file.stat().st_size:
            for event in _events_before(folder, state["offset"]):
                self.events += 1
                self._board.add(event)
                for _ in self._new_metrics(event):
                    pass
            self.offset = state["offset"]
        self.share_key = internals.share_view(
            self._client, self.experiment_id, self.study_id, self._runs_filter, f"tune_ssim: {self._board.name}"
        )

    def push_chunk(self) -> bool:
        """Applies the next events, about CHUNK_BYTES at most. False if there are none."""
        chunk = read_chunk(self.folder.events_file, self.offset)
        if not chunk:
            return False
        for line in chunk.splitlines():
            event = Event.read(line)
            self.events += 1
            if event is not None:
                self._board.add(event)
                self._attempt(self._apply, event)
        for trial_id in list(self._unsent):
            self._attempt(self._flush, trial_id)
        if self._board_has_changed:
            self._attempt(self._write_leaderboard)
        self.offset += len(chunk)
        return True

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Calls `action`. A permanent rejection by MLflow (e.g. of an invalid name) is noted and skipped, so that the rest goes
        on."""
        try:
            action(*arguments)
        except self._mlflow_error as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            self.refused.append(mirror.describe_error(error))
        except FileNotFoundError as error:
            self.refused.append(f"{error.filename} is gone")

    def _new_metrics(self, event: Event) -> Iterator[tuple[str, float, int]]:
        """Name, value and step of metrics that no earlier event had."""
        for step, values in event.records:
            for name, value in values.items():
                value = number(value)
                key = (event.trial_id, name)
                if value is not None and (key not in self._last or step > self._last[key][0]):
                    self._last[key] = (step, value)
                    yield name, value, step

    def _apply(self, event: Event) -> None:
        kind, trial_id, time_ms = event.event, event.trial_id, event.time_ms
        parent = self._parent(time_ms)
        if kind == "study":
            self._client.update_run(parent, status="RUNNING", name=self._board.study_name())
            self._tag(parent, {"study_sha256": event.study_sha256, "study": self._board.name})
            self._board_has_changed = True
        elif kind == "file":
            self._client.log_artifact(parent, str(self.folder.path / event.path), event.artifact_path or None)
        elif kind == "trial":
            is_known = trial_id in self.runs
            run_id = self._child(trial_id, time_ms)
            if is_known:
                self._client.update_run(run_id, status="RUNNING", name=self._board.run_name(trial_id))
            self._log_params(run_id, {**event.config, **event.parameters})
        elif kind == "records":
            for name, value, step in self._new_metrics(event):
                self._add_metric(trial_id, name, value, step, time_ms)
        elif kind == "image":
            self._add_image(event)
        elif kind == "verdict":
            self._finish(event)
        elif kind == "end":
            self._end(event)

    def _parent(self, time_ms: int) -> str:
        if "" not in self.runs:
            tags = {STUDY_ID: self.study_id, "role": "study", internals.SOURCE: "tune-ssim"}
            self.runs[""] = self._create(self._board.name, tags, time_ms)
        return self.runs[""]

    def _child(self, trial_id: str, time_ms: int) -> str:
        if trial_id not in self.runs:
            tags = {
                internals.PARENT: self._parent(time_ms),
                internals.SOURCE: "tune-ssim",
                STUDY_ID: self.study_id,
                TRIAL_ID: trial_id,
                "role": self._board.roles.get(trial_id, "search"),
            }
            self.runs[trial_id] = self._create(self._board.run_name(trial_id), tags, time_ms)
            self._fresh[self.runs[trial_id]] = {}
        return self.runs[trial_id]

    def _create(self, name: str, tags: dict[str, str], time_ms: int) -> str:
        run = self._client.create_run(self.experiment_id, start_time=time_ms, tags=tags, run_name=name[: internals.MAX_NAME_LENGTH])
        return str(run.info.run_id)

    def _finish(self, event: Event) -> None:
        trial_id, summary, time_ms = event.trial_id, event.summary, event.time_ms
        run_id = self._child(trial_id, time_ms)
        step = int(summary.get("steps") or 0)
        for name, value in (summary.get("metrics") or {}).items():
            value = number(value)
            # repr: NaN equals NaN
            if value is not None and repr(self._last.get((trial_id, name))) != repr((step, value)):
                self._add_metric(trial_id, name, value, step, time_ms)
        self._flush(trial_id)
        evidence = summary.get("evidence") or {}
        tags = {
            "verdict": summary["verdict"],
            "reason": summary.get("reason") or "",
            "role": summary.get("role") or "search",
            "horizon": plain(summary.get("horizon") or {}),
        }
        if summary["verdict"] == "pruned":
            tags["pruned_by"] = str(evidence.get("guard") or "")
        if summary.get("quarantined"):
            tags["quarantined"] = " ".join(summary["quarantined"])
        if evidence:
            tags["evidence"] = json.dumps(evidence, ensure_ascii=False)
        self._tag(run_id, tags)
        self._log_params(run_id, {**(summary.get("config") or {}), **event.effective})
        self._client.update_run(run_id, name=self._board.run_name(trial_id))
        self._client.set_terminated(run_id, STATUS.get(summary["verdict"], "FINISHED"), end_time=time_ms)
        self._fresh.pop(run_id, None)
        self._board_has_changed = True

    def _end(self, event: Event) -> None:
        for trial_id in self._board.configs.keys() - self._board.summaries.keys():  # e.g. stopped by Ctrl-C
            run_id = self._child(trial_id, event.time_ms)
            self._tag(run_id, {"reason": "the study ended before this trial did"})
            self._client.set_terminated(run_id, "KILLED", end_time=event.time_ms)
        if (objective := self.folder.objective).also:
            trials = self.folder.trials()
            front = [summary.trial_id for summary in pareto_front(trials, objective)]
            for trial_id in (summary.trial_id for summary in safe_trials(trials, objective)):
                tag = {"pareto": "front" if trial_id in front else "dominated"}
                self._tag(self._child(trial_id, event.time_ms), tag)
        self._write_summary(event.time_ms)
        self._write_leaderboard()
        self._tag(self.runs[""], {"reason": event.reason})
        self._client.set_terminated(self.runs[""], "FINISHED", end_time=event.time_ms)

    def _write_summary(self, time_ms: int) -> None:
        """The study's result on the parent run, and the tag `champion` on the run of the setting to use."""
        found = summary_of(self.folder)
        self._log_params(self.runs[""], found.settings)
        metrics = [self._entities.Metric(self._name(name), value, time_ms, 0) for name, value in found.metrics.items()]
        if metrics:
            self._client.log_batch(self.runs[""], metrics=metrics)
        champions = self._client.search_runs([self.experiment_id], f"{self._runs_filter} AND tags.{CHAMPION} = 'true'")
        for run in champions:  # of an earlier end of this study
            if run.info.run_id != self.runs.get(found.champion or ""):
                self._client.delete_tag(run.info.run_id, CHAMPION)
        if found.champion is not None:
            self._tag(self._child(found.champion, time_ms), {CHAMPION: "true"})

    def _add_metric(self, trial_id: str, name: str, value: float, step: int, time_ms: int) -> None:
        if not math.isfinite(value) and (trial_id, name) not in self._non_finite:
            # MLflow draws NaN as a gap and ignores it in a metric's "latest" value, so a tag records it too.
            self._non_finite.add((trial_id, name))
            text = "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
            key = self._name(f"non_finite.{name}")
            run_id = self._child(trial_id, time_ms)
            if run_id in self._fresh or key not in self._client.get_run(run_id).data.tags:
                self._tag(run_id, {key: f"{text} first at step {step}"})
        unsent = self._unsent.setdefault(trial_id, [])
        unsent.append(self._entities.Metric(self._name(name), value, time_ms, step))
        if len(unsent) >= internals.METRICS_PER_BATCH:
            self._flush(trial_id)

    def _flush(self, trial_id: str) -> None:
        metrics = self._unsent.pop(trial_id, [])
        if metrics:
            self._client.log_batch(self._child(trial_id, metrics[0].timestamp), metrics=metrics)

    def _add_image(self, event: Event) -> None:
        from PIL import Image

        source = self.folder.path / event.path
        run_id = self._child(event.trial_id, event.time_ms)
        folder, file_name = posixpath.split(event.name or source.name)
        unique = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.study_id}/{event.trial_id}/{event.path}"))
        paths = internals.image_paths(folder, file_name, event.step, event.time_ms, unique)
        with tempfile.TemporaryDirectory() as temporary, Image.open(source) as image:
            for path in paths:
                copy = Path(temporary, posixpath.basename(path))
                if copy.suffix == ".webp":
                    image.convert("RGB").save(copy)
                else:
                    copy.write_bytes(source.read_bytes())
                self._client.log_artifact(run_id, str(copy), posixpath.dirname(path) or None)
        self._tag(run_id, internals.HAS_IMAGES)

    def _tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        made = [self._entities.RunTag(key, shortened(str(value), internals.MAX_TAG_LENGTH)) for key, value in tags.items()]
        self._client.log_batch(run_id, tags=made)

    def _log_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Logs parameters. MLflow cannot change one, so a tag records a value in force that differs from the requested one."""
        wanted = {self._name(key): shortened(plain(value), internals.MAX_PARAM_LENGTH) for key, value in flattened(values).items()}
        if (strength := gain(values)) is not None:  # short names, for the columns
            wanted |= {"gain": plain(strength), "max_t": plain(values.get("ssim_loss_max_t"))}
        fresh = self._fresh.get(run_id)
        logged = self._client.get_run(run_id).data.params if fresh is None else fresh
        differing = {
            f"in_force.{key}"[: internals.MAX_NAME_LENGTH]: f"{value} (asked for: {logged[key]})"
            for key, value in wanted.items()
            if key in logged and logged[key] != value
        }
        new = [self._entities.Param(key, value) for key, value in wanted.items() if key not in logged]
        for start in range(0, len(new), internals.PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=new[start : start + internals.PARAMS_PER_BATCH])
        if fresh is not None:
            fresh |= {param.key: param.value for param in new}
        if differing:
            self._tag(run_id, differing)

    def _name(self, name: str) -> str:
        """A valid MLflow name, unique for each of our names."""
        if name not in self._names:
            mapped = internals.valid_name(name)
            if len(mapped) > internals.MAX_NAME_LENGTH or mapped in self._names.values():
                mapped = f"{mapped[: internals.MAX_NAME_LENGTH - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
            self._names[name] = mapped
        return self._names[name]

    @property
    def _runs_filter(self) -> str:
        return f"tags.`{STUDY_ID}` = '{self.study_id}'"

    def _find_runs(self) -> None:
        token: str | None = None
        while True:
            page = self._client.search_runs([self.experiment_id], self._runs_filter, max_results=1000, page_token=token)
            for run in page:
                self.runs.setdefault(run.data.tags.get(TRIAL_ID, ""), run.info.run_id)
            token = page.token
            if not token:
                return

    def _write_leaderboard(self) -> None:
        parent = self.runs[""]
        self._client.set_tag(parent, internals.NOTE, self._board.text(self.experiment_id, self.share_key, self.runs))
        self._client.update_run(parent, name=self._board.study_name())
        self._board_has_changed = False


def _experiment(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            created = client.create_experiment(name, artifact_location=artifact_location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another study has just created it
                raise
        else:
            client.set_experiment_tag(
                created, internals.NOTE, "Studies of tune_ssim: one parent run a study, one child run a trial."
            )
        found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage == "deleted":
        raise UserError(f"the MLflow experiment {name!r} is deleted; restore it, or name another one")
    for tag, value in internals.KIND.items():
        if tag not in found.tags:
            client.set_experiment_tag(found.experiment_id, tag, value)
    return str(found.experiment_id)


def _artifact_location(uri: str, folder: StudyFolder) -> str | None:
    """The artifact location. None for a server, which has its own. For a database: next to its file or in the storage path."""
    scheme = uri.split(":", 1)[0]
    if scheme.startswith("sqlite"):
        database = uri.split("?", 1)[0].partition(":///")[2]
        return (Path(database).absolute().parent / "mlartifacts").as_uri()
    if scheme.startswith(("postgresql", "mysql", "mssql")):
        return (folder.path.parent / "mlartifacts").as_uri()
    return None


def _study_id(folder: StudyFolder) -> str:
    """An id from the first event, which never changes and contains the time, so studies with the same name differ."""
    first = read_chunk(folder.events_file, 0).split(b"\n", 1)[0]
    return f"{folder.name}-{hashlib.sha256(first).hexdigest()[:12]}"


def read_chunk(path: Path, offset: int) -> bytes:
    """Whole lines from `offset` on, about CHUNK_BYTES, or one line if it is longer."""
    with path.open("rb") as file:
        file.seek(offset)
        chunk = file.read(CHUNK_BYTES)
        end = chunk.rfind(b"\n") + 1
        if not end and len(chunk) == CHUNK_BYTES:
            chunk += file.readline()
            end = chunk.rfind(b"\n") + 1
        return chunk[:end]


def _events_before(folder: StudyFolder, offset: int) -> Iterator[Event]:
    with folder.events_file.open("rb") as file:
        while file.tell() < offset:
            event = Event.read(file.readline())
            if event is not None:
                yield event
