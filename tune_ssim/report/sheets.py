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
    """Of the first trials that have pictures. Files that are no pictures are left out."""
    found: list[SampleSheet] = []
    for trial in trials:
        if len(found) == MAX_TRIALS:
            break
        files = {}
        for file in (folder.path / "images" / trial.trial_id).glob("smoke_*.png"):
            step = file.stem.rpartition("_")[2]
            if step.isdecimal() and file.is_file():
                files[int(step)] = file
        pictures = {step: picture for step in _spread(sorted(files)) if (picture := _small(files[step])) is not None}
        if pictures:
            setting = "baseline" if trial.role is Role.BASELINE else format_setting(trial.config)
            found.append(SampleSheet(trial, setting, pictures))
    return found


def _spread(steps: Sequence[int]) -> list[int]:
    """At most MAX_STEPS, the first and the last among them."""
    if len(steps) <= MAX_STEPS:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (MAX_STEPS - 1))] for index in range(MAX_STEPS)]


def _small(file: Path) -> str | None:
    """A JPEG as data URI; None if the file is truncated or no picture."""
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    if picture.width > MAX_WIDTH:
        size = (MAX_WIDTH, max(1, round(picture.height * MAX_WIDTH / picture.width)))
        picture = picture.resize(size, Image.Resampling.BOX)
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
