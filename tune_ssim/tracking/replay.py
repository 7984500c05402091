"""Replays a study's events into MLflow: a parent run a study, a child run a trial. Only this file and
mlflow_source import mlflow.

One mechanism serves the live mirror, the mirror made later (the server was down) and the resumed study: events are
applied from the last acknowledged byte on, and applying one twice changes nothing, because

- a run is looked up by its tags (`tune_ssim.study_id`, `tune_ssim.trial_id`) before it is made;
- a metric has the time of its event: MLflow keeps one row for the same name, step, value and time;
- of a trial that was set back to a checkpoint and repeats its steps, the first value of each step stands.

So nothing here needs to be exactly-once, and kill -9 at any moment costs at most a second push of one chunk.
This file is also the program of the mirror's process (`python -m`, see `mirror`).
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import logging
import math
import os
import posixpath
import re
import select
import sys
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tune_ssim.base.files import write_atomically
from tune_ssim.results.events import gain
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.trial_text import shown_metric
from tune_ssim.tracking import mirror

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHUNK_BYTES = 256 * 1024  # of events.jsonl held in memory at a time, unless a single event is longer
METRICS_A_BATCH = 1000  # MLflow's own limits (mlflow/utils/validation.py), as the next four
PARAMS_A_BATCH = 100
KEY_LENGTH = 250
PARAM_LENGTH = 6000
TAG_LENGTH = 5000  # 8000 from MLflow 2.12 on
NOTE_LENGTH = 7900

STATUS = {"pruned": "KILLED", "error": "FAILED", "bad_setup": "FAILED"}  # every other verdict is FINISHED
STUDY_ID = "tune_ssim.study_id"
TRIAL_ID = "tune_ssim.trial_id"

# The columns of the shared view, left to right, with their widths in pixels. They are so narrow because MLflow opens
# its assistant beside the table on a first visit; the reason comes last and takes what room there is.
COLUMNS = {
    "attributes.`Run Name`": 300,
    "runDateAndNestInfo": 45,  # "Created" cannot be hidden; its first sign is the run's status
    "tags.`verdict`": 80,
    "params.`gain`": 60,
    "params.`max_t`": 60,
    "metrics.`norm_ratio_max`": 112,
    "metrics.`delta_ssim`": 95,
    "metrics.`psnr`": 60,
    "tags.`reason`": 640,
}


class Replay:
    """One connection to MLflow and what was learnt of the study up to `offset`.

    Any method may raise what MLflow raises; make a new one then."""

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
        self.refused: list[str] = []  # what MLflow will never take, in words

        # What the events up to `offset` say.
        self.name, self._note = folder.name, ""
        self._config: dict[str, dict[str, Any]] = {}
        self._role: dict[str, str] = {}
        self._verdicts: dict[str, Mapping[str, Any]] = {}
        self._last: dict[tuple[str, str], tuple[int, float]] = {}  # (trial, metric) → last step and its value
        self._non_finite: set[tuple[str, str]] = set()
        self._metric_names: dict[str, str] = {}
        self._ended = False
        self._board_is_old = False
        self._waiting: dict[str, list[Any]] = {}  # trial_id → metrics not sent yet

        self.offset = self.events = 0
        state = mirror.read_state(folder, uri)
        if "" in self.runs and 0 < state["offset"] <= folder.events_file.stat().st_size:
            for event in _events_before(folder, state["offset"]):
                self.events += 1
                self._learn(event)
                if event["event"] == "records":
                    for _ in self._new_metrics(event):
                        pass
            self.offset = state["offset"]
        self.share_key = share_view(self._client, self.experiment_id, self.study_id, self.name)

    def push_chunk(self) -> bool:
        """Applies the next events, at most about CHUNK_BYTES; False if there are none."""
        chunk = _read_lines(self.folder.events_file, self.offset)
        if not chunk:
            return False
        for line in chunk.splitlines():
            event = _parse(line)
            self.events += 1
            if event is not None:
                self._learn(event)
                self._attempt(self._apply, event)
        for trial_id in list(self._waiting):
            self._attempt(self._flush, trial_id)
        if self._board_is_old:
            self._attempt(self._write_leaderboard)
        self.offset += len(chunk)
        return True

    def _attempt(self, action: Any, *arguments: Any) -> None:
        """What MLflow refuses for good (an invalid name, say) is noted and passed over, lest it block all the rest."""
        try:
            action(*arguments)
        except self._mlflow_error as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            self.refused.append(mirror.in_words(error))
        except FileNotFoundError as error:
            self.refused.append(f"{error.filename} is gone")

    # -- what an event says ------------------------------------------------------------------------------------------

    def _learn(self, event: Mapping[str, Any]) -> None:
        kind, trial_id = event["event"], event.get("trial_id", "")
        if kind == "study":
            self.name, self._note, self._ended = event.get("name") or self.name, event.get("note") or "", False
        elif kind == "trial":
            self._role[trial_id], self._config[trial_id] = event.get("role") or "search", event.get("config") or {}
        elif kind == "verdict":
            self._verdicts[trial_id] = event["summary"]
        elif kind == "end":
            self._ended = True

    def _new_metrics(self, event: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
        """Name, value and step of what was not there before."""
        trial_id = event["trial_id"]
        for step, values in event["records"]:
            for name, value in values.items():
                value = _number(value)
                key = (trial_id, name)
                if value is not None and (key not in self._last or step > self._last[key][0]):
                    self._last[key] = (step, value)
                    yield name, value, step

    # -- what MLflow gets --------------------------------------------------------------------------------------------

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind, time_ms = event["event"], event["time_ms"]
        parent = self._parent(time_ms)
        if kind == "study":
            self._client.update_run(parent, status="RUNNING", name=self._parent_name())
            tags = {"study_sha256": event.get("study_sha256") or "", "study": self.name}
            self._log(parent, tags=tags)
            self._board_is_old = True
        elif kind == "file":
            folder = event.get("artifact_path") or None
            self._client.log_artifact(parent, str(self.folder.path / event["path"]), folder)
        elif kind == "trial":
            self._start(event)
        elif kind == "records":
            trial_id = event["trial_id"]
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
            tags = {STUDY_ID: self.study_id, "role": "study", "mlflow.source.name": "tune-ssim"}
            self.runs[""] = self._create(self.name, tags, time_ms)
        return self.runs[""]

    def _child(self, trial_id: str, time_ms: int) -> str:
        if trial_id not in self.runs:
            tags = {
                "mlflow.parentRunId": self._parent(time_ms),
                "mlflow.source.name": "tune-ssim",
                STUDY_ID: self.study_id,
                TRIAL_ID: trial_id,
                "role": self._role.get(trial_id, "search"),
            }
            self.runs[trial_id] = self._create(self._run_name(trial_id), tags, time_ms)
        return self.runs[trial_id]

    def _create(self, name: str, tags: dict[str, str], time_ms: int) -> str:
        run = self._client.create_run(self.experiment_id, start_time=time_ms, tags=tags, run_name=name[:KEY_LENGTH])
        return str(run.info.run_id)

    def _start(self, event: Mapping[str, Any]) -> None:
        trial_id = event["trial_id"]
        known = trial_id in self.runs
        run_id = self._child(trial_id, event["time_ms"])
        if known:
            self._client.update_run(run_id, status="RUNNING", name=self._run_name(trial_id))
        self._log_params(run_id, {**self._config[trial_id], **(event.get("parameters") or {})})

    def _finish(self, event: Mapping[str, Any]) -> None:
        trial_id, summary, time_ms = event["trial_id"], event["summary"], event["time_ms"]
        run_id = self._child(trial_id, time_ms)
        step = int(summary.get("steps") or 0)
        for name, value in (summary.get("metrics") or {}).items():
            value = _number(value)
            if value is not None and not _same(self._last.get((trial_id, name)), (step, value)):
                self._add_metric(trial_id, name, value, step, time_ms)
        self._flush(trial_id)
        evidence = summary.get("evidence") or {}
        tags = {
            "verdict": summary["verdict"],
            "reason": summary.get("reason") or "",
            "role": summary.get("role") or "search",
            "horizon": _plain(summary.get("horizon") or {}),
        }
        if summary["verdict"] == "pruned":
            tags["pruned_by"] = str(evidence.get("guard") or "")
        if summary.get("quarantined"):
            tags["quarantined"] = " ".join(summary["quarantined"])
        if evidence:
            tags["evidence"] = json.dumps(evidence, ensure_ascii=False)
        self._log(run_id, tags=tags)
        self._log_params(run_id, {**(summary.get("config") or {}), **(event.get("effective") or {})})
        self._client.update_run(run_id, name=self._run_name(trial_id))
        self._client.set_terminated(run_id, STATUS.get(summary["verdict"], "FINISHED"), end_time=time_ms)
        self._board_is_old = True

    def _end(self, event: Mapping[str, Any]) -> None:
        for trial_id in self._config.keys() - self._verdicts.keys():  # e.g. stopped by Ctrl-C
            run_id = self._child(trial_id, event["time_ms"])
            self._log(run_id, tags={"reason": "the study ended before this trial did"})
            self._client.set_terminated(run_id, "KILLED", end_time=event["time_ms"])
        self._write_leaderboard()
        self._log(self.runs[""], tags={"reason": event.get("reason") or ""})
        self._client.set_terminated(self.runs[""], "FINISHED", end_time=event["time_ms"])

    def _add_metric(self, trial_id: str, name: str, value: float, step: int, time_ms: int) -> None:
        if not math.isfinite(value) and (trial_id, name) not in self._non_finite:
            # NaN is drawn as a gap and left out of MLflow's "latest" value: say it in words as well.
            self._non_finite.add((trial_id, name))
            text = "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
            key = self._name(f"non_finite.{name}")
            if key not in self._tags_of(trial_id, time_ms):
                self._log(self._child(trial_id, time_ms), tags={key: f"{text} first at step {step}"})
        waiting = self._waiting.setdefault(trial_id, [])
        waiting.append(self._entities.Metric(self._name(name), value, time_ms, step))
        if len(waiting) >= METRICS_A_BATCH:
            self._flush(trial_id)

    def _tags_of(self, trial_id: str, time_ms: int) -> Mapping[str, str]:
        return self._client.get_run(self._child(trial_id, time_ms)).data.tags

    def _flush(self, trial_id: str) -> None:
        metrics = self._waiting.pop(trial_id, [])
        if metrics:
            self._client.log_batch(self._child(trial_id, metrics[0].timestamp), metrics=metrics)

    def _add_image(self, event: Mapping[str, Any]) -> None:
        """As a plain file, and under the name by which MLflow's page of a run offers a slider over the steps
        (mlflow/tracking/client.py, log_image), where a random part is replaced by a fixed one."""
        from PIL import Image

        source = self.folder.path / event["path"]
        run_id = self._child(event["trial_id"], event["time_ms"])
        folder, file_name = posixpath.split(event.get("name") or source.name)
        key = folder.replace("/", "~") or "images"
        unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{self.study_id}/{event['trial_id']}/{event['path']}")
        stem = f"{key}+step+{event['step']}+timestamp+{event['time_ms']}+{unique}"
        with tempfile.TemporaryDirectory() as temporary, Image.open(source) as image:
            for path in (f"{folder}/{file_name}", f"images/{stem}.png", f"images/{stem}+compressed.webp"):
                copy = Path(temporary, posixpath.basename(path))
                if copy.suffix == ".webp":
                    image.convert("RGB").save(copy)
                else:
                    copy.write_bytes(source.read_bytes())
                self._client.log_artifact(run_id, str(copy), posixpath.dirname(path) or None)
        self._log(run_id, tags={"mlflow.loggedImages": "True"})

    def _log(self, run_id: str, tags: Mapping[str, str]) -> None:
        made = [self._entities.RunTag(key, _short(value, TAG_LENGTH)) for key, value in tags.items()]
        self._client.log_batch(run_id, tags=made)

    def _log_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """MLflow refuses to change a parameter. Where what is in force is not what was asked for, a tag says so."""
        wanted = {self._name(key): _short(_plain(value), PARAM_LENGTH) for key, value in _flat(values).items()}
        if (strength := gain(values)) is not None:  # short names, for the columns
            wanted |= {"gain": _plain(strength), "max_t": _plain(values.get("ssim_loss_max_t"))}
        there = self._client.get_run(run_id).data.params
        differing = {
            f"in_force.{key}"[:KEY_LENGTH]: f"{value} (asked for: {there[key]})"
            for key, value in wanted.items()
            if key in there and there[key] != value
        }
        new = [self._entities.Param(key, value) for key, value in wanted.items() if key not in there]
        for start in range(0, len(new), PARAMS_A_BATCH):
            self._client.log_batch(run_id, params=new[start : start + PARAMS_A_BATCH])
        if differing:
            self._log(run_id, tags=differing)

    def _name(self, name: str) -> str:
        """A name that MLflow takes: letters, digits and ` _-./:`, at most 250, not like a path out of its folder."""
        if name not in self._metric_names:
            # A colon is refused by servers on Windows.
            mapped = re.sub(r"[^/\w.\- ]", "_", name)
            parts = [part if part.strip(".") else part.replace(".", "_") for part in mapped.split("/") if part]
            mapped = "/".join(parts) or "_"
            if len(mapped) > KEY_LENGTH or mapped in self._metric_names.values():
                mapped = f"{mapped[: KEY_LENGTH - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
            self._metric_names[name] = mapped
        return self._metric_names[name]

    def _find_runs(self) -> None:
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], f"tags.`{STUDY_ID}` = '{self.study_id}'", max_results=1000, page_token=token
            )
            for run in page:
                self.runs.setdefault(run.data.tags.get(TRIAL_ID, ""), run.info.run_id)
            token = page.token
            if not token:
                return

    # -- for people --------------------------------------------------------------------------------------------------

    def _run_name(self, trial_id: str) -> str:
        summary = self._verdicts.get(trial_id)
        parts = [_setting(self._role.get(trial_id, "search"), self._config.get(trial_id, {})) or trial_id]
        if summary is not None:
            evidence, metrics = summary.get("evidence") or {}, summary.get("metrics") or {}
            verdict = summary["verdict"]
            if verdict == "pruned" and evidence.get("guard"):
                verdict = f"pruned by {evidence['guard']} at {evidence.get('step')}"
            parts.append(verdict.replace("_", " ", 1) if verdict == "bad_setup" else verdict)
            delta = _number(metrics.get(_objective(summary)))
            if delta is not None and summary.get("role") != "baseline":
                parts.append(f"{shown_metric(_objective(summary))} {_signed(delta)}")
        return " · ".join(parts)[:KEY_LENGTH]

    def _parent_name(self) -> str:
        ranked = self._ranked()
        if not self._verdicts:
            return self.name
        best = next((summary for _, summary in ranked if summary["verdict"] == "safe" and _delta(summary) > 0), None)
        if best is None:
            return f"{self.name}: no safe gain {'found' if self._ended else 'yet'}"[:KEY_LENGTH]
        setting = _setting("search", best.get("config") or {})
        return f"{self.name}: best {setting}, {shown_metric(_objective(best))} {_signed(_delta(best))}"[:KEY_LENGTH]

    def _ranked(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Best first: safe ones by the objective, then the degraded, …; baselines last."""
        order = ["safe", "degraded", "stopped", "pruned", "bad_setup", "error"]

        def place(item: tuple[str, Mapping[str, Any]]) -> tuple[bool, int, float]:
            summary = item[1]
            verdict = summary["verdict"]
            rank = order.index(verdict) if verdict in order else len(order)
            return summary.get("role") == "baseline", rank, -_delta(summary)

        return sorted(self._verdicts.items(), key=place)

    def _write_leaderboard(self) -> None:
        """The description of the parent run: what came out, in one sentence and one table with links."""
        parent = self.runs[""]
        counts: dict[str, int] = {}
        for summary in self._verdicts.values():
            if summary.get("role") != "baseline":
                counts[summary["verdict"]] = counts.get(summary["verdict"], 0) + 1
        told = ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) or "no trial has ended yet"
        pages = f"#/experiments/{self.experiment_id}/runs"
        training = "?workflowType=machine_learning"  # not MLflow 3's GenAI pages
        view = f"{pages}{training}&viewStateShareKey={self.share_key}"
        head = [f"**{_cell(self._parent_name())}** ({told}). [All trials, best first]({view})", ""]
        if self._note:
            head += [self._note, ""]
        objective = next((_objective(summary) for summary in self._verdicts.values()), "delta_ssim")
        head += [
            f"| setting | verdict | reason | {_cell(shown_metric(objective))} | PSNR | norm ratio |",
            "|---|---|---|---|---|---|",
        ]
        rows = []
        for trial_id, summary in self._ranked():
            metrics = summary.get("metrics") or {}
            config = {**self._config.get(trial_id, {}), **(summary.get("config") or {})}
            setting = _setting(summary.get("role") or "search", config) or trial_id
            link = f"[{_cell(setting)}]({pages}/{self.runs.get(trial_id, '')}{training})"
            numbers = [
                _cell_number(metrics.get(name), form)
                for name, form in ((objective, "+.4f"), ("psnr", ".2f"), ("norm_ratio_max", ".3g"))
            ]
            reason = _cell(_short(str(summary.get("reason") or ""), 160))
            rows.append(f"| {' | '.join([link, summary['verdict'], reason, *numbers])} |")
        text = "\n".join(head)
        for shown, row in enumerate(rows):
            if len(text) + len(row) > NOTE_LENGTH - 60:
                text += f"\n\n… and {len(rows) - shown} more in the table of runs."
                break
            text += f"\n{row}"
        self._client.set_tag(parent, "mlflow.note.content", text[:NOTE_LENGTH])
        self._client.update_run(parent, name=self._parent_name())
        self._board_is_old = False


def share_view(client: MlflowClient, experiment_id: str, study_id: str, name: str) -> str:
    """Stores the view of a study's trials as an experiment tag; returns the key for `?viewStateShareKey=`.

    The format is that of the page's own "Share" (mlflow 3.17, server/js, chunk 3878): the tag
    `mlflow.sharedViewState.<key>` holds `{"name", "createdAt", "state"}`, where `state` is JSON, or "deflate;" and the
    base64 of its zlib stream. Runs are nested only while they are sorted by date: sorted by a metric, all are shown.
    """
    state = {
        "searchFilter": f"tags.`{STUDY_ID}` = '{study_id}'",
        "orderByKey": "metrics.`delta_ssim`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(COLUMNS),
        "columnWidths": COLUMNS,
        "viewMaximized": True,  # folds the page's heading: more rows
        "runListHidden": False,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state, separators=(",", ":")).encode())).decode()
    key = f"tune_ssim-{hashlib.sha256(study_id.encode()).hexdigest()[:16]}"
    tag = f"mlflow.sharedViewState.{key}"
    view = {"name": f"tune_ssim: {name}", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"}
    value = json.dumps(view)
    if client.get_experiment(experiment_id).tags.get(tag) != value:
        client.set_experiment_tag(experiment_id, tag, value)
    return key


def _experiment(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            created = client.create_experiment(name, artifact_location=artifact_location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another study was quicker
                raise
        else:
            client.set_experiment_tag(
                created, "mlflow.note.content", "Studies of tune_ssim: one parent run a study, one child run a trial."
            )
        found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage == "deleted":
        raise RuntimeError(f"the MLflow experiment {name!r} is deleted; restore it, or name another one")
    # Without it, MLflow 3 opens the experiment as a GenAI application (server/js: `experimentKind`).
    if "mlflow.experimentKind" not in found.tags:
        client.set_experiment_tag(found.experiment_id, "mlflow.experimentKind", "custom_model_development")
    return str(found.experiment_id)


def _artifact_location(uri: str, folder: StudyFolder) -> str | None:
    """A server has a place of its own; for a database it is beside the file, never the current folder."""
    scheme = uri.split(":", 1)[0]
    if scheme.startswith("sqlite"):
        database = uri.split("?", 1)[0].partition(":///")[2]
        return (Path(database).absolute().parent / "mlartifacts").as_uri()
    if scheme.startswith(("postgresql", "mysql", "mssql")):
        return (folder.path.parent / "mlartifacts").as_uri()
    return None


def _study_id(folder: StudyFolder) -> str:
    """The first event, which never changes and has the time in it, tells studies of one name apart."""
    first = _read_lines(folder.events_file, 0).split(b"\n", 1)[0]
    return f"{folder.name}-{hashlib.sha256(first).hexdigest()[:12]}"


def _read_lines(path: Path, offset: int) -> bytes:
    """Whole lines from `offset` on, about CHUNK_BYTES, or one line if it is longer."""
    with path.open("rb") as file:
        file.seek(offset)
        chunk = file.read(CHUNK_BYTES)
        end = chunk.rfind(b"\n") + 1
        if not end and len(chunk) == CHUNK_BYTES:
            chunk += file.readline()
            end = chunk.rfind(b"\n") + 1
        return chunk[:end]


def _events_before(folder: StudyFolder, offset: int) -> Iterator[dict[str, Any]]:
    with folder.events_file.open("rb") as file:
        while file.tell() < offset:
            event = _parse(file.readline())
            if event is not None:
                yield event


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None  # torn by kill -9
    return event if isinstance(event, dict) and "event" in event and "time_ms" in event else None


def _number(value: Any) -> float | None:
    """Also from the strings in which `jsonable` writes NaN and Inf."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _same(a: tuple[int, float] | None, b: tuple[int, float]) -> bool:
    return a is not None and a[0] == b[0] and (a[1] == b[1] or (math.isnan(a[1]) and math.isnan(b[1])))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _plain(value: Any) -> str:
    """1.0 and 1 are one setting; 0.1 · 0.01 is 0.001."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, (int, float)):
        return f"{value:.12g}" if abs(value) < 1e15 else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return json.dumps(value, ensure_ascii=False, default=str)


def _short(text: str, length: int) -> str:
    text = str(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _setting(role: str, config: Mapping[str, Any]) -> str:
    """gain 30 @ t≤0.3"""
    seed = f"seed {config['seed']}" if "seed" in config else ""
    if role == "baseline":
        return f"baseline {seed}".strip()
    strength, max_t = gain(config), config.get("ssim_loss_max_t")
    if strength is None or max_t is None:
        return ", ".join(f"{key.rsplit('.', 1)[-1]} {_plain(value)}" for key, value in _flat(config).items())[:100]
    setting = f"gain {strength:.4g} @ t≤{_plain(max_t)}"
    return f"{role}: {setting} {seed}".strip() if role != "search" else setting


def _objective(summary: Mapping[str, Any]) -> str:
    return str(summary.get("objective") or "delta_ssim")


def _delta(summary: Mapping[str, Any]) -> float:
    delta = _number((summary.get("metrics") or {}).get(_objective(summary)))
    return -math.inf if delta is None or math.isnan(delta) else delta


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _cell(text: str) -> str:
    """In a Markdown table; reasons may hold anything."""
    return re.sub(r"([\\|\[\]<>`*_])", r"\\\1", " ".join(text.split()))


def _cell_number(value: Any, form: str) -> str:
    number = _number(value)
    return "–" if number is None else format(number, form).replace("-", "−")


# -- the mirror's own process ----------------------------------------------------------------------------------------


class Commands:
    """Lines from a pipe, without blocking. (`select` on a buffered file misses what the buffer holds already.)"""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._text = descriptor, b""

    def next(self, timeout_s: float | None = None) -> str | None:
        """None: nothing within `timeout_s`. An empty line: the other end is closed."""
        while b"\n" not in self._text:
            if not select.select([self._descriptor], [], [], timeout_s)[0]:
                return None
            block = os.read(self._descriptor, 65536)
            if not block:
                return ""
            self._text += block
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()


def main(descriptor: int = 0) -> None:
    """Reads one line of JSON (`folder`, `uri`, `experiment`), then mirrors until it is told `drain <seconds>` or its
    parent is gone (end of file: what is there is still mirrored), and says in the state file how far it is."""
    commands = Commands(descriptor)
    job = json.loads(commands.next() or "{}")
    folder, uri = StudyFolder(Path(job["folder"])), job["uri"]
    deadline: float | None = None
    pause = mirror.POLL_S
    replay: Replay | None = None
    state = mirror.read_state(folder, uri)
    with mirror.lock_file(folder, uri).open("w") as lock:
        locked = False
        while True:
            try:
                if not locked:
                    locked = _try_lock(lock)
                if locked and folder.events_file.exists() and _read_lines(folder.events_file, state["offset"]):
                    replay = replay or Replay(folder, uri, job["experiment"])
                    while replay.push_chunk():
                        state = _acknowledge(folder, uri, replay)
                        if deadline is not None and time.monotonic() > deadline:
                            break
                elif locked and state["error"]:
                    state["error"] = None
                pause = mirror.POLL_S if locked else 1.0
                error = None if locked else "another process is mirroring this study"
            except Exception as problem:  # whatever MLflow or the network does: say it, wait, and try again
                replay = None
                error = mirror.in_words(problem)
                pause = min(2 * pause, mirror.LONGEST_PAUSE_S)
            state["error"] = error
            if locked:
                write_atomically(mirror.state_file(folder, uri), json.dumps(state).encode())
            if deadline is not None:
                done = error is None and not _read_lines(folder.events_file, state["offset"])
                if done or time.monotonic() > deadline:
                    sys.exit(0 if done else 1)
                pause = min(pause, 1.0)
            if deadline is not None:
                time.sleep(pause)
            else:
                line = commands.next(pause)
                if line is not None:
                    deadline = time.monotonic() + (float(line.split()[1]) if line else mirror.ORPHAN_S)


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _acknowledge(folder: StudyFolder, uri: str, replay: Replay) -> mirror.State:
    state: mirror.State = {
        "offset": replay.offset,
        "events": replay.events,
        "experiment_id": replay.experiment_id,
        "share_key": replay.share_key,
        "runs": replay.runs,
        "refused": replay.refused[:20],
        "error": None,
    }
    write_atomically(mirror.state_file(folder, uri), json.dumps(state).encode())
    return state


if __name__ == "__main__":
    os.nice(19)  # training comes first: Ray runs its workers at 15
    main()
