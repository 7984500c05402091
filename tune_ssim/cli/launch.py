"""Runs a study from Python with the display of `tune-ssim run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_ssim.orchestration.phases import run_study
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.study import Study

if TYPE_CHECKING:
    from rich.console import Console


def run(study: Study, *, storage: Path, console: Console | None = None, **options: Any) -> StudyFolder:
    """Runs a study; for the options see `orchestration.phases.run_study`. console: None is the terminal."""
    from tune_ssim.cli.live_table import LiveTable

    with LiveTable(None, console) as table:
        return run_study(study, storage=Path(storage), progress=table, **options)
