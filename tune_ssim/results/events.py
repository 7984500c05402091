"""The events of a study, in order. The process that runs it writes them; `tracking` replays them into MLflow.

Neither Ray nor MLflow is imported: an event is a plain JSON object in the study's `events.jsonl`, with the time at which it was
written. So a replay always gives the same rows with the same times.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from tune_ssim.base.files import open_regular, parse_lines
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.space import WEIGHT, gain_of
from tune_ssim.trials.summary import TrialSummary

# Keys that Ray Tune adds to every result and that are not worth plotting.
_BOOKKEEPING = frozenset(
    {"timestamp", "pid", "training_iteration", "iterations_since_restore", "time_since_restore", "time_this_iter_s"}
    | {"config", "done", "trial_id", "checkpoint_dir_name", "experiment_tag", "date", "hostname", "node_ip"}
)

MAX_END_BYTES = 64 * 1024  # an event that ends a study has one sentence


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of `events.jsonl`. event: study, file, trial, records, image, verdict or end; `EventWriter` documents the fields
    that each of them has."""

    event: str
    time_ms: int
    name: str = ""
    study_sha256: str = ""
    note: str = ""
    path: str = ""
    artifact_path: str = ""
    trial_id: str = ""
    role: str = "search"
    config: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[tuple[int, Mapping[str, Any]]] = ()
    step: int = 0
    summary: Mapping[str, Any] = field(default_factory=dict)
    effective: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    @classmethod
    def read(cls, line: bytes) -> Event | None:
        """None for a line that is truncated, because its writer was killed, and for one that is no event."""
        try:
            found = json.loads(line)
            if isinstance(found.get("effective"), str):  # MLflowTracking of version 0.1.0 wrote it as text
                found["effective"] = json.loads(found["effective"])
            event = cls(**{one.name: found[one.name] for one in fields(cls) if found.get(one.name) is not None})
        except (AttributeError, TypeError, ValueError, RecursionError):
            return None
        return event if event._is_sound() else None

    def _is_sound(self) -> bool:
        texts = (self.event, self.name, self.note, self.path, self.artifact_path, self.trial_id, self.role, self.reason)
        mappings = (self.config, self.parameters, self.summary, self.effective)
        return (
            all(isinstance(value, str) for value in texts)
            and all(isinstance(value, int) for value in (self.time_ms, self.step))
            and all(isinstance(value, Mapping) for value in mappings)
            and isinstance(self.records, Sequence)
            and all(isinstance(row, Sequence) and len(row) == 2 for row in self.records)
            and all(isinstance(step, int) and isinstance(values, Mapping) for step, values in self.records)
            and (self.event != "verdict" or isinstance(self.summary.get("verdict"), str))
        )


def _no_lock() -> None:
    """For a folder that only one process writes. (A function of the module, so that a writer can be pickled.)"""


@dataclass(frozen=True)
class EventWriter:
    """Appends events to the study's folder. require_lock: raises UserError if another process has taken over the study."""

    folder: StudyFolder
    require_lock: Callable[[], None] = _no_lock

    def study_started(self, name: str, study_sha256: str = "", note: str = "") -> None:
        """Written at the start and at every resume. The first one identifies the study. `note` is Markdown."""
        self._add("study", name=name, study_sha256=study_sha256, note=note)

    def file(self, path: str, artifact_path: str = "", digest: str = "") -> None:
        """A file of the study to be logged to the artifact folder `artifact_path`. `path`: relative to the study's folder. digest:
        of its content, if it must not change later."""
        self._add("file", path=path, artifact_path=artifact_path, **({"digest": digest} if digest else {}))

    def trial_started(
        self,
        trial_id: str,
        role: str,
        config: Mapping[str, Any],
        slot: int | None = None,
        parameters: Mapping[str, Any] | None = None,
        reason: str = "",
    ) -> None:
        """`config`: the requested settings. `parameters`: those in force, if already known. `reason`: why the search chose it."""
        more = {"reason": reason} if reason else {}
        self._add("trial", trial_id=trial_id, role=role, config=config, slot=slot, parameters=parameters or {}, **more)

    def result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A result of our trainable: its `records` ([[step, {name: number}], …]) and its `images` ({step: PNG bytes}).

        Of any other trainable: all its numbers, at its `training_iteration`."""
        records: Iterable[Any] = result.get("records") or []
        if "records" not in result:
            values = numbers_of(result)
            records = [[int(result.get("training_iteration", 0)), values]] if values else []
        rows = [[step, dict(values)] for step, values in records]
        if rows:
            self._add("records", trial_id=trial_id, records=rows)
        for step, png in (result.get("images") or {}).items():
            self.image(trial_id, int(step), png)

    def image(self, trial_id: str, step: int, png: bytes) -> None:
        path = self.folder.write_image(trial_id, step, png).relative_to(self.folder.path)
        self._add("image", trial_id=trial_id, step=step, path=path.as_posix(), name=f"smoke/step_{step:06d}.png")

    def verdict(self, trial_id: str, summary: Mapping[str, Any], effective: Mapping[str, Any] | None = None) -> None:
        """`summary`: of `TrialSummary.to_dict`. `effective`: the parameters in force."""
        self._add("verdict", trial_id=trial_id, summary=summary, effective=effective or {})

    def study_ended(self, reason: str = "") -> None:
        self._add("end", reason=reason)

    def _add(self, event: str, **values: Any) -> None:
        self.require_lock()
        self.folder.add_event({"event": event, "time_ms": time.time_ns() // 1_000_000, **values})


def ended_trials(folder: StudyFolder) -> list[TrialSummary]:
    """The summaries in the study's events, also of trials whose lines in `trials.jsonl` are lost. Raises UserError."""

    def parse(event: dict[str, Any]) -> TrialSummary | None:
        return TrialSummary.from_dict(event["summary"]) if event.get("event") == "verdict" else None

    lines = parse_lines(folder.events_file, parse, containing='"verdict"')
    return [summary for summary in lines if summary is not None]


def end_of(folder: StudyFolder) -> str:
    """Why the study ended at its last start, if it says so; empty while it runs, after a kill, and for a study that is done."""
    try:
        with open_regular(folder.events_file) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_END_BYTES))
            last = file.read().splitlines()[-1:]
    except OSError:
        return ""
    event = Event.read(last[0]) if last else None
    return event.reason if event is not None and event.event == "end" and event.reason != "done" else ""


def numbers_of(result: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a (nested) result under flat names, without Ray's bookkeeping and without booleans."""
    found: dict[str, float] = {}
    for key, value in result.items():
        if not prefix and key in _BOOKKEEPING:
            continue
        if isinstance(value, Mapping):
            found.update(numbers_of(value, f"{prefix}{key}/"))
        elif isinstance(value, Real) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


def gain(config: Mapping[str, Any]) -> float | None:
    """The gain of a configuration for display, rounded; None if it has no SSIM loss (SEEDS B6)."""
    try:
        found = gain_of(config) if WEIGHT in config else math.nan
    except (TypeError, ValueError):  # not numbers
        return None
    return float(f"{found:.12g}") if math.isfinite(found) else None  # 0.1 · 0.01 is 0.001, also in decimal
