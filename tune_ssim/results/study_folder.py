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

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import append_line, read_lines, write_atomically

DEFAULT_STORAGE = "tune_ssim_results"
STORAGE_VARIABLE = "TUNE_SSIM_STORAGE"


class _Later(TypedDict, total=False):
    """Keys that the first studies did not write."""

    seed: int
    objective: str
    quarantined: list[str]


class TrialSummary(_Later):
    """One line of `trials.jsonl` and one object of `tune-ssim trials --json`. A stable schema.

    role: baseline, search or confirm. verdict: safe, degraded, pruned, bad_setup, stopped or error.
    config: the settings of this trial; where the task has an SSIM loss always its ssim_loss_weight,
    ssim_loss_max_t and ssim_grad_scale.
    horizon: how far the verdict reaches, e.g. {"steps": 200, "batch_size": 8, "lr": 0.005}.
    evidence: {guard, step, metric, value, limit} of the violation that ended the trial, else None.
    objective: the metric that the study maximises; delta_ssim where the key is absent.
    seed: of the training's random numbers. quarantined: content ids of the checkpoints that a ruined trial wrote.
    metrics: ssim, delta_ssim, psnr, norm_ratio_max, … where measured. Non-finite numbers are the strings
    "NaN", "Infinity", "-Infinity", since JSON has no others.
    """

    trial_id: str
    run_id: str | None
    role: str
    config: dict[str, Any]
    verdict: str
    reason: str
    horizon: dict[str, Any]
    evidence: dict[str, Any] | None
    steps: int
    metrics: dict[str, Any]


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
    def ray_folder(self) -> Path:
        return self.path / "ray"

    def create(self) -> StudyFolder:
        for folder in (self.path, self.path / "baseline", self.path / "images"):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    def write_baseline(self, data: bytes, sha256: str) -> Path:
        path = self.path / "baseline" / f"{sha256}.json"
        write_atomically(path, data)
        return path

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
        """That a trial wrote one: its step, its path and its contents as hashes."""
        append_line(self.path / "checkpoints.jsonl", {"trial_id": trial_id, **checkpoint})

    def checkpoints(self, trial_id: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.path / "checkpoints.jsonl") if line["trial_id"] == trial_id]

    def add_trial(self, summary: TrialSummary) -> None:
        append_line(self.path / "trials.jsonl", summary)

    def trials(self) -> list[TrialSummary]:
        """In the order in which they first ended; of a trial that was written twice (resumed) the last line stands."""
        found: dict[str, Any] = {}
        for summary in read_lines(self.path / "trials.jsonl"):
            found[summary["trial_id"]] = summary
        return list(found.values())


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
