"""What is known before any trial is launched: is the set-up sound, how hard does each setting push, what is it made of.

Runs as one Ray task with a trial's resources: the node that drives a study may have no accelerator."""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from tune_ssim.checkpoint import tensors_of
from tune_ssim.errors import BadSetup, UserError
from tune_ssim.orchestration.events import EventWriter
from tune_ssim.probes import tensor_contents
from tune_ssim.proof import CALIBRATION, PREFLIGHT, PROVENANCE, START
from tune_ssim.quarantine import Ledger
from tune_ssim.run_trial import ancestry
from tune_ssim.study_folder import StudyFolder, jsonable, write_atomically
from tune_ssim.tasks.task import Task, load_task
from tune_ssim.tensor_file import Contents

if TYPE_CHECKING:
    from tune_ssim.orchestration.live_table import LiveTable
    from tune_ssim.study import Study


def before_launch(study: Study, folder: StudyFolder, writer: EventWriter, table: LiveTable, gpus: float) -> None:
    """The phases before the first trial; a study that is resumed has them behind it. Raises BadSetup for an unsound one."""
    if (folder.path / PROVENANCE).exists():
        return
    found = inspect(study, gpus, preflight=False, calibration=False, provenance=True)
    ledger = Ledger(folder.path.parent)
    for contents in found["start"]:
        if refusal := ledger.check_hashes(contents["hashes"], found["parents"], "the weights that the study starts from"):
            raise BadSetup(str(refusal))
    for name in (PREFLIGHT, CALIBRATION, START, PROVENANCE):
        subject = name.removesuffix(".json")
        if subject in found:
            write_json(folder.path / name, found[subject])
            writer.file(name, "before_launch")


def inspect(study: Study, gpus: float, *, preflight: bool, calibration: bool, provenance: bool) -> dict[str, Any]:
    """The parts that are asked for, as plain data: `preflight`, `calibration`, `provenance`. Needs a connection to Ray.

    After a bad set-up nothing further is measured. Raises UserError for a task that cannot be set up with this study."""
    remote = ray.remote(num_cpus=study.resources.cpus, num_gpus=gpus, max_retries=1)(_inspect)
    found = ray.get(remote.remote(study, preflight, calibration, provenance))
    kind = found.pop("failed", None)
    if kind is not None:
        raise (BadSetup if kind == "BadSetup" else UserError)(found["message"])
    return dict(found)


def _inspect(study: Study, preflight: bool, calibration: bool, provenance: bool) -> dict[str, Any]:
    """On the worker."""
    found: dict[str, Any] = {}
    try:
        task_class = load_task(study.task_path, study.import_path)
        if preflight:
            from tune_ssim.preflight import preflight as check

            report = check(study)
            found["preflight"] = report.to_dict()
            if report.status == "bad_setup":
                return found
        if calibration:
            from tune_ssim.calibrate import calibrate

            found["calibration"] = calibrate(study).to_dict()
        if provenance:
            from tune_ssim.provenance import fingerprints

            task = task_class()
            task.setup({**study.task_config, **study.baseline_settings}, study.search.seed)
            found["provenance"] = fingerprints(task, study.import_path)
            found["start"] = [asdict(contents) for contents in _starting_contents(task)]
            found["parents"] = list(ancestry(task))
    except (UserError, BadSetup) as error:
        return {"failed": type(error).__name__, "message": str(error)}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return {"failed": "UserError", "message": f"{type(error).__name__}: {error} ({where})"}
    return found


def _starting_contents(task: Task) -> list[Contents]:
    """Of the state before the first step and of every part: what a trial has not made itself."""
    parts = task.parts().values() if hasattr(task, "parts") else ()
    return [tensor_contents(tensors) for tensors in (tensors_of(task.state_dict()), *(part.module.state_dict() for part in parts))]


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n").encode())
