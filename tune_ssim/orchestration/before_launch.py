"""The phases before the first trial: preflight, calibration and provenance."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_ssim.base.errors import BadSetup
from tune_ssim.base.extras import install_hint, is_installed
from tune_ssim.base.files import jsonable, parse_json, write_atomically
from tune_ssim.base.validation import JsonNumber, read_as
from tune_ssim.before_launch.command.kept_starts import starts_file
from tune_ssim.before_launch.inspection import PICTURE, bad_lines, calibration_lines, preflight_lines
from tune_ssim.probes.norm_model import NormModel, Prediction
from tune_ssim.report.heat_map import draw_heat_map
from tune_ssim.results.events import EventWriter
from tune_ssim.results.proof import digest, require_unchanged
from tune_ssim.results.study_folder import CALIBRATION, PREFLIGHT, PREFLIGHT_PICTURE, PROVENANCE, START, StartingState, StudyFolder
from tune_ssim.search.guided import GuidedSearch
from tune_ssim.trials.quarantine import Ledger

if TYPE_CHECKING:
    from tune_ssim.orchestration.executor import Executor
    from tune_ssim.orchestration.progress import Progress
    from tune_ssim.study.study import Study

HEAT_MAP = "calibration.png"


@dataclass(frozen=True)
class _Limits:
    limit: JsonNumber | None
    skip_above: JsonNumber | None


def check_before_launch(study: Study, folder: StudyFolder, writer: EventWriter, progress: Progress, executor: Executor) -> None:
    """Runs the phases before the first trial, unless a resumed study has completed them. Raises BadSetup if they find a fault,
    UserError if a file that they wrote was changed."""
    if (folder.path / PROVENANCE).exists():
        require_unchanged(folder)
        _require_clean(folder)
        return
    phases = [name for name, wanted in (("preflight", study.preflight is not None), ("calibration", study.calibrates)) if wanted]
    if phases:
        progress.phase(" and ".join(phases))
    wanted = {"preflight": study.preflight is not None, "calibration": study.calibrates, "provenance": True}
    kept = starts_file(folder.path.parent, study.name)
    found = executor.inspect(study, **wanted, kept=kept, say=progress.say)
    writer.require_lock()
    if "calibration" in found and can_draw(HEAT_MAP, progress):
        write_atomically(folder.path / HEAT_MAP, draw_heat_map(found["calibration"], study.space, study.name))
        writer.file(HEAT_MAP, "before_launch")
    if found.get(PICTURE):
        write_atomically(folder.path / PREFLIGHT_PICTURE, base64.b64decode(found[PICTURE]))
        writer.file(PREFLIGHT_PICTURE, "before_launch")
    for name in (PREFLIGHT, CALIBRATION, START, PROVENANCE):
        subject = name.removesuffix(".json")
        if subject in found:
            write_json(folder.path / name, found[subject])
            writer.file(name, "before_launch", digest(found[subject]))
    for line in (*preflight_lines(found.get("preflight")), *calibration_lines(found.get("calibration"))):
        progress.say(line)
    _require_clean(folder)  # first, since ruined weights are the reason of other findings
    if found.get("preflight", {}).get("status") == "bad_setup":
        raise BadSetup("\n".join(bad_lines(found["preflight"])))


def can_draw(picture: str, progress: Progress) -> bool:
    """Whether Matplotlib is installed. Reports that `picture` is left out if it is not."""
    if not is_installed("matplotlib"):
        progress.say(f"{picture} was not drawn; it needs {install_hint('matplotlib')}")
        return False
    return True


def _require_clean(folder: StudyFolder) -> None:
    """Raises BadSetup if the study starts from quarantined weights."""
    ledger, start = Ledger(folder.path.parent), folder.start() or StartingState((), ())
    for contents in start.contents:
        if refusal := ledger.check_hashes(contents.hashes, start.parents, "the weights that the study starts from"):
            raise BadSetup(str(refusal))


def norm_model(folder: StudyFolder) -> tuple[NormModel | None, float | None, float | None]:
    """(model, the norm guard's limit, the predicted ratio above which no setting is launched) of a calibrated study."""

    def parse(calibration: dict[str, Any]) -> tuple[NormModel, float | None, float | None]:
        limits = read_as(_Limits, calibration)
        return NormModel.from_dict(calibration["model"]), limits.limit, limits.skip_above

    return parse_json(folder.path / CALIBRATION, parse) or (None, None, None)


def recommended(study: Study, calibration: Mapping[str, Any]) -> tuple[dict[str, Any], Prediction]:
    """The setting from which a guided search starts, and its prediction. calibration: of `Calibration.to_dict()`."""
    model = NormModel.from_dict(calibration["model"])
    return GuidedSearch(study.space.stages[0], model, start=study.baseline_settings, max_ratio=calibration["skip_above"]).start


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n").encode())
