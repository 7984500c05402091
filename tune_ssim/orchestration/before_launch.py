"""What is known before any trial is launched: is the set-up sound, how hard does each setting push, what is it made of.

Runs as one Ray task with a trial's resources: the node that drives a study may have no accelerator."""

from __future__ import annotations

import json
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from tune_ssim.atomic_file import write_atomically
from tune_ssim.checkpoint import tensors_of
from tune_ssim.errors import BadSetup, UserError
from tune_ssim.guards.preflight import Report
from tune_ssim.guards.preflight_rules import unknown
from tune_ssim.orchestration.events import EventWriter
from tune_ssim.probes import tensor_contents
from tune_ssim.probes.norm_model import NormModel
from tune_ssim.proof import CALIBRATION, PREFLIGHT, PROVENANCE, START, read_json
from tune_ssim.quarantine import Ledger
from tune_ssim.run_trial import ancestry
from tune_ssim.study_folder import StudyFolder, jsonable, number
from tune_ssim.tasks.task import Task, load_task
from tune_ssim.tensor_file import Contents

if TYPE_CHECKING:
    from tune_ssim.orchestration.live_table import LiveTable
    from tune_ssim.study import Study

HEAT_MAP = "calibration.png"
OWN_PROCESS = "the training is a process of its own: what reaches it is checked when the baseline runs, its weights are not"


def before_launch(study: Study, folder: StudyFolder, writer: EventWriter, table: LiveTable, gpus: float) -> None:
    """The phases before the first trial; a study that is resumed has them behind it. Raises BadSetup for an unsound one."""
    if (folder.path / PROVENANCE).exists():
        _require_clean(folder, read_json(folder.path / START) or {})
        return
    phases = [name for name, wanted in (("preflight", study.preflight is not None), ("calibration", study.calibrates)) if wanted]
    if phases:
        table.phase(" and ".join(phases))
    found = inspect(study, gpus, preflight=study.preflight is not None, calibration=study.calibrates, provenance=True)
    if (picture := found.pop("heat_map", None)) is not None:
        write_atomically(folder.path / HEAT_MAP, picture)
        writer.file(HEAT_MAP, "before_launch")
    for name in (PREFLIGHT, CALIBRATION, START, PROVENANCE):
        subject = name.removesuffix(".json")
        if subject in found:
            write_json(folder.path / name, found[subject])
            writer.file(name, "before_launch")
    for line in (*preflight_lines(found.get("preflight")), *calibration_lines(found.get("calibration"))):
        table.say(line)
    if found.get("preflight", {}).get("status") == "bad_setup":
        raise BadSetup("\n".join(bad_lines(found["preflight"])))
    _require_clean(folder, found[START.removesuffix(".json")])


def _require_clean(folder: StudyFolder, start: dict[str, Any]) -> None:
    """Raises BadSetup where a study starts from weights that are, or have become, quarantined."""
    ledger = Ledger(folder.path.parent)
    for contents in start.get("contents", []):
        if refusal := ledger.check_hashes(contents["hashes"], start["parents"], "the weights that the study starts from"):
            raise BadSetup(str(refusal))


def preflight_lines(report: dict[str, Any] | None) -> list[str]:
    """A summary and every warning, for people."""
    if report is None:
        return []
    counts = Counter(check["status"] for check in report["checks"])
    told = ", ".join(f"{counts[status]} {status}" for status in ("ok", "warn", "bad_setup", "unknown") if counts[status])
    warnings = [check for check in report["checks"] if check["status"] == "warn"]
    return [f"preflight: {told} ({report['seconds']:.0f} s)"] + [f"  warn  {c['name']}: {c['sentence']}" for c in warnings]


def bad_lines(report: dict[str, Any]) -> list[str]:
    """What makes a set-up unsound, each with its remedy."""
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


def norm_model(folder: StudyFolder) -> tuple[NormModel | None, float | None, float | None]:
    """(model, the norm guard's limit, the predicted ratio beyond which nothing is launched) of a calibrated study."""
    calibration = read_json(folder.path / CALIBRATION)
    if calibration is None:
        return None, None, None
    return NormModel.from_dict(calibration["model"]), calibration["limit"], calibration["skip_above"]


def inspect(study: Study, gpus: float, *, preflight: bool, calibration: bool, provenance: bool) -> dict[str, Any]:
    """The parts that are asked for, as plain data: `preflight`, `calibration`, `provenance`. Needs a connection to Ray.

    After a bad set-up nothing further is measured. Raises UserError for a task that cannot be set up with this study."""
    remote = ray.remote(num_cpus=study.resources.cpus, num_gpus=gpus, max_retries=1)(_inspect)
    return _or_raise(ray.get(remote.remote(study, preflight, calibration, provenance)))


def inspect_here(study: Study, *, preflight: bool, calibration: bool, provenance: bool) -> dict[str, Any]:
    """The same in this process, without Ray."""
    return _or_raise(_inspect(study, preflight, calibration, provenance))


def _or_raise(found: dict[str, Any]) -> dict[str, Any]:
    kind = found.pop("failed", None)
    if kind is not None:
        raise (BadSetup if kind == "BadSetup" else UserError)(found["message"])
    return found


def _inspect(study: Study, preflight: bool, calibration: bool, provenance: bool) -> dict[str, Any]:
    """On the worker."""
    found: dict[str, Any] = {}
    try:
        task_class = load_task(study.task_path, study.import_path)
        if hasattr(task_class(), "takes_samples"):  # a process of its own
            calibration = False
            if preflight:
                found["preflight"] = Report((unknown("setup", OWN_PROCESS),), 0.0).to_dict()
                preflight = False
        if preflight:
            from tune_ssim.preflight import preflight as check

            report = check(study)
            found["preflight"] = report.to_dict()
            if report.status == "bad_setup":
                return jsonable(found)  # type: ignore[no-any-return]
        if calibration:
            from tune_ssim.calibrate import calibrate
            from tune_ssim.heat_map import draw_heat_map

            found["calibration"] = calibrate(study).to_dict()
            found["heat_map"] = draw_heat_map(jsonable(found["calibration"]), study.space, study.name)
        if provenance:
            from tune_ssim.provenance import fingerprints

            task = task_class()
            task.setup({**study.task_config, **study.baseline_settings}, study.search.seed)
            found["provenance"] = fingerprints(task, study.import_path)
            contents = [asdict(contents) for contents in _starting_contents(task)]
            found["start"] = {"contents": contents, "parents": list(ancestry(task))}
    except (UserError, BadSetup) as error:
        return {"failed": type(error).__name__, "message": str(error)}
    except Exception as error:  # of the task's own code: what cannot be looked at is not sound
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return {"failed": "BadSetup", "message": f"{type(error).__name__}: {' '.join(str(error).split())} ({where})"}
    return found


def _starting_contents(task: Task) -> list[Contents]:
    """Of the state before the first step and of every part: what a trial has not made itself."""
    parts = task.parts().values() if hasattr(task, "parts") else ()
    all_tensors = (tensors_of(task.state_dict()), *(part.module.state_dict() for part in parts))
    return [tensor_contents(tensors) for tensors in all_tensors if tensors]


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n").encode())
