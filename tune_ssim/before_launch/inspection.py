"""Preflight, calibration and provenance of a study, measured before any trial."""

from __future__ import annotations

import base64
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.base.extras import is_installed
from tune_ssim.base.files import jsonable, number
from tune_ssim.base.tensor_file import Contents
from tune_ssim.before_launch.preflight.cost import ESTIMATE
from tune_ssim.probes import narrowed_tensors, tensor_contents
from tune_ssim.study.study import Study
from tune_ssim.trials.checkpoint import tensors_of
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.training import Training

if TYPE_CHECKING:
    from tune_ssim.before_launch.command.starts import Say, Take
    from tune_ssim.before_launch.preflight.picture import Album
    from tune_ssim.before_launch.preflight.report import Report

PICTURE = "preflight_picture"  # what preflight looked at, a PNG in base64


def inspect_here(study: Study, *, preflight: bool, calibration: bool, provenance: bool, **of_starts: Any) -> dict[str, Any]:
    """`inspect_study` in this process, without Ray. Raises UserError or BadSetup for what it could not measure."""
    return found_or_raise(inspect_study(study, preflight, calibration, provenance, **of_starts))


def is_command(study: Study) -> bool:
    """Whether the training runs in processes of its own: a command, or a function that reports through `trial_context`."""
    return isinstance(load_task(study.task_path, study.import_path)(), CommandTask)


def inspect_study(
    study: Study,
    preflight: bool,
    calibration: bool,
    provenance: bool,
    steps: int | None = None,
    take: Take | None = None,
    kept: Path | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """The requested parts, as plain data. steps: of each start of a command. take: runs these starts, by default one after the
    other on this machine. kept, say: see `inspect_command`."""
    found: dict[str, Any] = {}
    try:
        task_class = load_task(study.task_path, study.import_path)
        if isinstance(task_class(), CommandTask):
            from tune_ssim.before_launch.command.inspect import inspect_command

            if preflight or calibration:
                found = inspect_command(
                    study, task_class, take, preflight=preflight, calibration=calibration, steps=steps, kept=kept, say=say
                )
            preflight = calibration = False
        elif steps is not None:
            raise UserError("--steps is for a command; a task in Python is checked by what its methods show")
        if preflight:
            from tune_ssim.before_launch.preflight import Album, run_preflight

            album = Album()
            report = run_preflight(study, album=album)
            found["preflight"] = report.to_dict()
            if provenance and is_installed("matplotlib"):  # of a study that keeps what was found
                found[PICTURE] = _picture(album, report)
            if report.status == "bad_setup":
                found |= _start_of_a_fault(study, task_class) if provenance else {}
                return jsonable(found)  # type: ignore[no-any-return]
        if calibration:
            from tune_ssim.before_launch.calibration import calibrate

            found["calibration"] = calibrate(study).to_dict()
        if provenance:
            from tune_ssim.before_launch.provenance import fingerprints

            task = task_class()
            task.setup({**study.task_config, **study.baseline_settings}, study.search.seed)
            found["provenance"] = fingerprints(task, study.import_path)
            found["start"] = _start(task)
            if isinstance(task, CommandTask):
                others = ["the files of other nodes"] if study.resources.nodes > 1 else []
                found["start"]["not_covered"] = [*task.not_covered, *others]
    except (UserError, BadSetup) as error:
        return {"failed": type(error).__name__, "message": str(error)}
    except Exception as error:  # raised by the training's code
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return {"failed": "BadSetup", "message": f"{type(error).__name__}: {' '.join(str(error).split())} ({where})"}
    return found


def _picture(album: Album, report: Report) -> str:
    """PNG in base64, since everything that is found is JSON; empty if it cannot be drawn."""
    from tune_ssim.before_launch.preflight.picture import draw

    try:
        return base64.b64encode(draw(album, report.checks)).decode()
    except Exception:  # images of a broken set-up may have any shape, and its report says so
        return ""


def found_or_raise(found: dict[str, Any]) -> dict[str, Any]:
    kind = found.pop("failed", None)
    if kind is not None:
        raise (BadSetup if kind == "BadSetup" else UserError)(found["message"])
    return found


def _start_of_a_fault(study: Study, task_class: Any) -> dict[str, Any]:
    """What a study with a bad set-up starts from, so that the quarantine can be asked whether that is the reason. Empty if the task
    cannot be set up."""
    try:
        task = task_class()
        task.setup({**study.task_config, **study.baseline_settings}, study.search.seed)
        return {"start": _start(task)}
    except Exception:  # preflight has reported it
        return {}


def _start(task: Training) -> dict[str, Any]:
    contents = [asdict(contents) for contents in _starting_contents(task)]
    return {"contents": contents, "parents": list(task.ancestry())}


def _starting_contents(task: Training) -> list[Contents]:
    """Hashes of the state before the first step and of every part, none of which a trial has written, and of those of their tensors
    that have no more digits than a lower precision."""
    all_tensors = [tensors_of(task.state_dict()), *(part.module.state_dict() for part in task.parts().values())]
    narrowed = [narrowed_tensors(tensors) for tensors in all_tensors]
    return [tensor_contents(tensors) for tensors in (*all_tensors, *narrowed) if tensors]


def preflight_lines(report: dict[str, Any] | None) -> list[str]:
    """A summary, all warnings, and the checks that were not run because of their cost, as text."""
    if report is None:
        return []
    counts = Counter(check["status"] for check in report["checks"])
    summary = ", ".join(f"{counts[status]} {status}" for status in ("ok", "warn", "bad_setup", "unknown") if counts[status])
    said = [f"  warn  {c['name']}: {c['sentence']}" for c in report["checks"] if c["status"] == "warn"]
    said += [f"  unknown  {c['name']}: {c['sentence']}" for c in report["checks"] if ESTIMATE in c["evidence"]]
    return [f"preflight: {summary} ({report['seconds']:.0f} s)", *said]


def bad_lines(report: dict[str, Any]) -> list[str]:
    """The faults of an unsound set-up, each with its remedy."""
    return [
        f"{check['name']}: {check['sentence']}; {check['remedy']}" if check["remedy"] else f"{check['name']}: {check['sentence']}"
        for check in report["checks"]
        if check["status"] == "bad_setup"
    ]


def calibration_lines(calibration: dict[str, Any] | None) -> list[str]:
    if calibration is None:
        return []
    low, high = (number(ratio) for ratio in calibration["ratios"])
    head = f"calibration: the space pushes {low:.3g} to {high:.3g} times the baseline's norm ({calibration['wall_s']:.0f} s)"
    return [head] + [f"  {finding['name']}: {finding['sentence']}" for finding in calibration["findings"]]
