"""Samples of trials at each smoke test, small enough to be embedded in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tune_ssim.guards.verdict import Role
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.trial_text import format_setting
from tune_ssim.trials.summary import TrialSummary

MAX_TRIALS, MAX_STEPS = 12, 8  # twelve kilobytes a picture: about a megabyte
MAX_WIDTH, QUALITY = 400, 88  # pixels; of JPEG


@dataclass(frozen=True)
class SampleSheet:
    """A trial's pictures by step, as data URIs."""

    trial: TrialSummary
    setting: str
    pictures: dict[int, str]


def sample_sheets(folder: StudyFolder, trials: Sequence[TrialSummary]) -> list[SampleSheet]:
    """Of the first trials that have pictures."""
    found = []
    for trial in trials:
        files = {int(file.stem.rpartition("_")[2]): file for file in (folder.path / "images" / trial.trial_id).glob("smoke_*.png")}
        if files:
            chosen = _spread(sorted(files))
            setting = "baseline" if trial.role is Role.BASELINE else format_setting(trial.config)
            found.append(SampleSheet(trial, setting, {step: _small(files[step]) for step in chosen}))
        if len(found) == MAX_TRIALS:
            break
    return found


def _spread(steps: Sequence[int]) -> list[int]:
    """At most MAX_STEPS, the first and the last among them."""
    if len(steps) <= MAX_STEPS:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (MAX_STEPS - 1))] for index in range(MAX_STEPS)]


def _small(file: Path) -> str:
    from PIL import Image

    with Image.open(file) as picture:
        picture = picture.convert("RGB")
        if picture.width > MAX_WIDTH:
            size = (MAX_WIDTH, max(1, round(picture.height * MAX_WIDTH / picture.width)))
            picture = picture.resize(size, Image.Resampling.BOX)
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
