"""The folder of a study, where the truth lives: everything else (MLflow, the tables on the screen) is made from it.

<storage>/<study>/
  study.yaml            the study as resolved
  trials.jsonl          one line a trial, written when it ends: see TrialSummary
  events.jsonl          everything that happened, in order; MLflow is a replay of it
  baseline/<sha256>.json
  images/<trial_id>/smoke_<step>.png
  ray/                  Ray Tune's own state and the checkpoints
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import append_line, parse_lines, read_lines, write_atomically
from tune_ssim.trials.summary import TrialSummary

DEFAULT_STORAGE = "tune_ssim_results"
STORAGE_VARIABLE = "TUNE_SSIM_STORAGE"


@dataclass(frozen=True)
class StudyFolder:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def study_file(self) -> Path:
        return self.path / "study.yaml"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def trials_file(self) -> Path:
        return self.path / "trials.jsonl"

    @property
    def ray_folder(self) -> Path:
        return self.path / "ray"

    def create(self) -> StudyFolder:
        for folder in (self.path, self.path / "baseline", self.path / "images"):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    def write_image(self, trial_id: str, step: int, png: bytes) -> Path:
        path = self.path / "images" / trial_id / f"smoke_{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, png)
        return path

    def add_event(self, event: Mapping[str, Any]) -> None:
        append_line(self.events_file, event)

    def events(self) -> Iterator[dict[str, Any]]:
        return read_lines(self.events_file)

    def add_checkpoint(self, trial_id: str, checkpoint: Mapping[str, Any]) -> None:
        """Notes that a trial wrote one: its step, its path and its contents as hashes."""
        append_line(self.path / "checkpoints.jsonl", {"trial_id": trial_id, **checkpoint})

    def checkpoints(self, trial_id: str) -> list[dict[str, Any]]:
        lines = parse_lines(self.path / "checkpoints.jsonl", _checkpoint, containing=json.dumps(trial_id))
        return [line for line in lines if line["trial_id"] == trial_id]

    def add_trial(self, summary: TrialSummary) -> bool:
        """False, and nothing is written, for a trial that has a verdict: its first one is final."""
        before = self._verdicts(containing=json.dumps(summary.trial_id)).get(summary.trial_id)
        if before is not None and not before.is_repeated_on_resume:
            return False
        append_line(self.trials_file, summary.to_dict())
        return True

    def trials(self) -> list[TrialSummary]:
        """In the order in which they first ended. The first verdict of a trial is final; only one that is
        `is_repeated_on_resume` gives way to a later line. Raises UserError for a line that is no summary of a trial."""
        return list(self._verdicts().values())

    def _verdicts(self, containing: str = "") -> dict[str, TrialSummary]:
        found: dict[str, TrialSummary] = {}
        for summary in parse_lines(self.trials_file, TrialSummary.from_dict, containing):
            before = found.get(summary.trial_id)
            if before is None or before.is_repeated_on_resume:
                found[summary.trial_id] = summary
        return found


def _checkpoint(line: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError, naming the key, for what is no line of checkpoints.jsonl."""
    for name, kind in (("trial_id", str), ("step", int), ("contents", dict), ("parents", list)):
        if not isinstance(line.get(name), kind):
            raise ValueError(f"{name} is missing or of the wrong kind")
    return line


def storage_path(given: str | Path | None) -> Path:
    """`--storage-path`, else $TUNE_SSIM_STORAGE, else ./tune_ssim_results. Raises UserError for an empty one."""
    if given is not None and not str(given).strip():
        raise UserError("storage path: empty; name a folder")
    return Path(given or os.environ.get(STORAGE_VARIABLE) or DEFAULT_STORAGE).expanduser().absolute()


def find_study(storage: Path, name: str | None) -> StudyFolder:
    """The study called `name`, or the one that was started last. Raises UserError naming what there is."""
    found = sorted(storage.glob("*/study.yaml"), key=lambda path: (path.stat().st_mtime_ns, path.parent.name))
    if not found:
        raise UserError(f"no study in {storage}; start one with `tune-ssim run`, or say --storage-path")
    if name is None:
        return StudyFolder(found[-1].parent)
    for path in found:
        if path.parent.name == name:
            return StudyFolder(path.parent)
    raise UserError(f"no study {name!r} in {storage}; there are: {', '.join(path.parent.name for path in found)}")
