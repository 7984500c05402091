"""Verifies an export: whether code, weights, data and setting are unchanged, and whether the result still holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import write_atomically
from tune_ssim.orchestration.phases import StudyRun, make_executor
from tune_ssim.orchestration.progress import NoProgress, Progress
from tune_ssim.results.events import EventWriter
from tune_ssim.results.proof import differences
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.verification import file_differences, result_differences
from tune_ssim.study.study import Study, load_study
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.command.dependencies import hashes_of, working_folder
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.summary import TrialSummary


def verify(
    exported: Mapping[str, Any],
    *,
    address: str | None = None,
    storage: Path | None = None,
    in_process: bool = False,
    progress: Progress | None = None,
) -> tuple[list[str], list[TrialSummary]]:
    """The differences from the proof, one line each, and the trials of the repeated confirmation.

    If anything differs beforehand, the confirmation is not run, since it would prove something else. storage: a folder for the
    files of its trials, which are removed afterwards; None: one on this machine. On a cluster every node must reach it, so
    `address` without it raises UserError."""
    if address is not None and storage is None:
        raise UserError("--address needs --storage-path: a folder that every node of the cluster reaches under the same path")
    if lines := file_differences(exported):
        return lines, []
    if storage is not None:
        storage.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="tune-ssim-verify-", dir=storage) as folder:
        return _confirm_again(exported, Path(folder), address, in_process, progress or NoProgress())


def _confirm_again(
    exported: Mapping[str, Any], storage: Path, address: str | None, in_process: bool, progress: Progress
) -> tuple[list[str], list[TrialSummary]]:
    proof, trial_id = exported["proof"], exported["trial_id"]
    seeds, steps = proof["seeds"], proof["horizon"]["steps"]
    study = _study(proof)
    folder = StudyFolder(storage / study.name).create()
    write_atomically(folder.study_file, study.to_yaml().encode())
    with make_executor(study, address, in_process) as executor:
        found = executor.inspect(study, preflight=False, calibration=False, provenance=True)["provenance"]
        found = _files_seen(study, set(proof["provenance"]) - set(found)) | found
        if lines := differences(proof["provenance"], found):
            return lines, []
        progress.phase(f"confirming {trial_id} again: {len(seeds)} seeds, {steps} steps")
        run = StudyRun(study, EventWriter(folder), executor, progress)
        run.confirm_settings([(trial_id, proof["setting"])], seeds, steps, decide_after=len(seeds))
    trials = folder.trials()
    return result_differences(proof, trials), trials


def _files_seen(study: Study, names: set[str]) -> dict[str, str]:
    """The hashes of files that a command was seen to use, as they are now."""
    task = load_task(study.task_path, study.import_path)()
    if not isinstance(task, CommandTask):
        return {}
    fields = {**study.task_config, **study.baseline_settings}
    return hashes_of(names, working_folder(task.spec, fields, task.home))


def _study(proof: Mapping[str, Any]) -> Study:
    try:
        return load_study({**proof["study"], "tracking": None})
    except UserError as error:
        raise UserError(f"the study in the proof cannot be read by this version: {error}") from None
