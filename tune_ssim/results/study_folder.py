"""The folder of a study, the single source of truth. MLflow runs and tables are derived from it.

<storage>/<study>/
  study.yaml            the study as resolved
  preflight.json, calibration.json, provenance.json, start.json
                        what was found before the first trial
  trials.jsonl          one line per trial, written when it ends: see TrialSummary
  skipped.jsonl         settings not launched because they were predicted to be ruinous
  files.jsonl           code and settings that the commands of baselines and confirmations were seen to use
  checkpoints.jsonl     checkpoints that trials wrote, by their contents
  events.jsonl          everything that happened, in order; MLflow is a replay of it
  baseline/<sha256>.json
  preflight.png, calibration.png, pareto.png
                        pictures, the last one of a study with several objectives
  images/<trial_id>/smoke_<step>.png
  ray/                  Ray Tune's own state and the checkpoints
  writer.lock           while a process runs the study: see study_lock

Reading raises UserError, naming the file and line, for content that this package did not write. Only a truncated last line is
skipped, since the process that wrote it was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import append_line, parse_json, parse_lines, read_lines, write_atomically
from tune_ssim.base.numbers import as_float, is_number
from tune_ssim.base.tensor_file import Contents
from tune_ssim.base.validation import JsonNumber, problems_of, read_as
from tune_ssim.study.objective import OBJECTIVE, Objective
from tune_ssim.trials.summary import TrialSummary

DEFAULT_STORAGE = "tune_ssim_results"
STORAGE_VARIABLE = "TUNE_SSIM_STORAGE"
PREFLIGHT, CALIBRATION, PROVENANCE, START = "preflight.json", "calibration.json", "provenance.json", "start.json"
PREFLIGHT_PICTURE = "preflight.png"
SKIPPED, FILES = "skipped.jsonl", "files.jsonl"


@dataclass(frozen=True)
class Skipped:
    """A suggestion that was not launched: its settings, the predicted or requested norm ratio, and the reason."""

    stage: str
    config: Mapping[str, Any]
    predicted_ratio: JsonNumber
    sentence: str


@dataclass(frozen=True)
class WrittenCheckpoint:
    """A checkpoint that a trial wrote at `step`. `parents`: content ids of what it was trained from."""

    trial_id: str
    step: int
    contents: Contents
    parents: tuple[str, ...]
    path: str | None = None


@dataclass(frozen=True)
class StartingState:
    """Hashes of everything that a trial starts from, never to be quarantined. `parents`: ancestors of its weights. not_covered:
    what the hashes of a command's provenance leave out, a phrase each."""

    contents: tuple[Contents, ...]
    parents: tuple[str, ...]
    not_covered: tuple[str, ...] = ()


@dataclass(frozen=True)
class _FilesSeen:
    trial_id: str
    files: dict[str, str]


@dataclass(frozen=True)
class _Preflight:
    status: str
    checks: list[dict[str, Any]]


@dataclass(frozen=True)
class _Calibration:
    model: dict[str, Any]
    settings: list[dict[str, Any]]


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
    def skipped_file(self) -> Path:
        return self.path / SKIPPED

    @property
    def ray_folder(self) -> Path:
        return self.path / "ray"

    def create(self) -> StudyFolder:
        for folder in (self.path, self.path / "baseline", self.path / "images"):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    # -- the study and the results of its phases before launch

    def study(self) -> dict[str, Any]:
        """The study.yaml as plain values, without validation, so that earlier versions can be read; empty without a file."""
        from tune_ssim.base.yaml_source import read_yaml

        return dict(read_yaml(self.study_file).value) if self.study_file.exists() else {}

    def section(self, name: str) -> dict[str, Any]:
        """A mapping in the study.yaml; empty if it is absent or null. Raises UserError for any other value."""
        value = self.study().get(name)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.study_file}: {name}: must be a mapping, got {str(value)[:60]!r}")
        return value or {}

    @property
    def objective(self) -> Objective:
        """What the study optimises, by default `delta_ssim`. Of the file only metrics, their directions and the smallest useful
        improvement are read."""
        given = self.section("objective")
        direction = "minimize" if given.get("minimize") else "maximize"
        least: Any = given.get("min_improvement")
        found = Objective.of(str(given.get(direction) or OBJECTIVE), direction)
        try:
            return found.replace(min_improvement=as_float(least) if is_number(least) else None, also=given.get("also"))
        except ValidationError as error:
            words = "; ".join(one.text() for one in problems_of(error))
            raise UserError(f"{self.study_file}: objective: {words}") from None

    @property
    def tracking_uri(self) -> str | None:
        """MLflow's tracking URI in the study file."""
        uri = self.section("tracking").get("uri")
        return None if uri is None else str(uri)

    def preflight(self) -> dict[str, Any] | None:
        """The report, or None if preflight was switched off. The next three work alike."""
        return parse_json(self.path / PREFLIGHT, lambda report: report if read_as(_Preflight, report) else None)

    def calibration(self) -> dict[str, Any] | None:
        return parse_json(self.path / CALIBRATION, lambda report: report if read_as(_Calibration, report) else None)

    def provenance(self) -> dict[str, str] | None:
        """Subject → SHA-256 of code, weights and data when the study ran."""
        return parse_json(self.path / PROVENANCE, _hashes)

    def start(self) -> StartingState | None:
        return parse_json(self.path / START, lambda value: read_as(StartingState, value))

    # -- results of trials

    def write_image(self, trial_id: str, step: int, png: bytes) -> Path:
        path = self.path / "images" / trial_id / f"smoke_{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, png)
        return path

    def add_event(self, event: Mapping[str, Any]) -> None:
        append_line(self.events_file, event)

    def events(self) -> Iterator[dict[str, Any]]:
        return read_lines(self.events_file)

    def skipped(self) -> list[Skipped]:
        """Skipped settings without duplicates, which a resumed search writes."""
        return read_skipped(self.skipped_file)

    def add_checkpoint(self, trial_id: str, checkpoint: Mapping[str, Any]) -> None:
        """Records a checkpoint that a trial wrote: its step, its path and the hashes of its contents."""
        append_line(self.path / "checkpoints.jsonl", {"trial_id": trial_id, **checkpoint})

    def checkpoints(self, trial_id: str) -> list[WrittenCheckpoint]:
        file = self.path / "checkpoints.jsonl"
        lines = parse_lines(file, lambda line: read_as(WrittenCheckpoint, line), containing=json.dumps(trial_id))
        return [line for line in lines if line.trial_id == trial_id]

    def add_files_seen(self, trial_id: str, files: Mapping[str, str]) -> None:
        """Records the code and settings that a trial's command was seen to use."""
        append_line(self.path / FILES, {"trial_id": trial_id, "files": files})

    def files_seen(self, trial_ids: Collection[str]) -> list[dict[str, str]]:
        """Name → SHA-256, for each of these trials whose command was observed."""
        lines = parse_lines(self.path / FILES, lambda line: read_as(_FilesSeen, line))
        return [line.files for line in lines if line.trial_id in trial_ids]

    def add_trial(self, summary: TrialSummary, ended: Collection[str] | None = None) -> bool:
        """Appends a summary. Returns False and writes nothing if the trial already has a verdict, since the first one is final.

        ended: the trials that have one, from a caller who knows them: looking it up reads the file."""
        if ended is None:
            ended = ended_ids(self._verdicts(containing=json.dumps(summary.trial_id)).values())
        if summary.trial_id in ended:
            return False
        append_line(self.trials_file, summary.to_dict())
        return True

    def trials(self) -> list[TrialSummary]:
        """Summaries in the order in which trials first ended. The first verdict of a trial is final, except that one with
        `is_repeated_on_resume` is replaced by a later line."""
        return list(self._verdicts().values())

    def _verdicts(self, containing: str = "") -> dict[str, TrialSummary]:
        found: dict[str, TrialSummary] = {}
        for summary in parse_lines(self.trials_file, TrialSummary.from_dict, containing):
            before = found.get(summary.trial_id)
            if before is None or before.is_repeated_on_resume:
                found[summary.trial_id] = summary
        return found


def ended_ids(trials: Iterable[TrialSummary]) -> set[str]:
    """Ids of the trials whose verdict is final."""
    return {trial.trial_id for trial in trials if not trial.is_repeated_on_resume}


def _hashes(value: dict[str, Any]) -> dict[str, str]:
    for name, digest in value.items():
        if not isinstance(digest, str):
            raise ValueError(f"{name} must be text, got {str(digest)[:60]!r}")
    return value


def read_skipped(log: Path) -> list[Skipped]:
    """The settings in a log of those not launched, without duplicates."""
    found: list[Skipped] = []
    for one in parse_lines(log, lambda line: read_as(Skipped, line)):
        if one not in found:
            found.append(one)
    return found


def storage_path(given: str | Path | None) -> Path:
    """`--storage-path`, else $TUNE_SSIM_STORAGE, else ./tune_ssim_results. Raises UserError for an empty one."""
    if given is not None and not str(given).strip():
        raise UserError("storage path: empty; name a folder")
    return Path(given or os.environ.get(STORAGE_VARIABLE) or DEFAULT_STORAGE).expanduser().absolute()


def find_study(storage: Path, name: str | None) -> StudyFolder:
    """The study called `name`, or the one started last. Raises UserError listing the existing ones."""
    found = sorted(storage.glob("*/study.yaml"), key=lambda path: (path.stat().st_mtime_ns, path.parent.name))
    if not found:
        lacking = [f"{path.parent / 'study.yaml'} is missing" for path in sorted(storage.glob("*/events.jsonl"))[:1]]
        raise UserError("; ".join([f"no study in {storage}", *lacking, "start one with `tune-ssim run`, or say --storage-path"]))
    if name is None:
        return StudyFolder(found[-1].parent)
    for path in found:
        if path.parent.name == name:
            return StudyFolder(path.parent)
    raise UserError(f"no study {name!r} in {storage}; there are: {', '.join(path.parent.name for path in found)}")
