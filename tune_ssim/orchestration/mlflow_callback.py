"""The MLflow callback for your own `tune.Tuner`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ray import tune

from tune_ssim.orchestration.ray_job import JOB, drop_bulk, verdict_of
from tune_ssim.orchestration.retries import error_of
from tune_ssim.orchestration.trainable import GuardedTrainable
from tune_ssim.results.events import EventWriter, numbers_of
from tune_ssim.results.study_folder import StudyFolder, storage_path
from tune_ssim.tracking.mirror import MLflowMirror
from tune_ssim.trials.job import TrialJob

log = logging.getLogger(__name__)


class MLflowTracking(tune.Callback):
    """Logs a Tune experiment to MLflow: a parent run, one child run per trial, every metric at its step.

        tune.Tuner(train, run_config=tune.RunConfig(callbacks=[MLflowTracking()]), ...)

    folder: where the events to be mirrored into MLflow are kept; None: the experiment's own folder.
    uri: MLflow's tracking URI; None: `mlflow.db` (SQLite) next to that folder.
    drop_bulk: remove `records` and `images` from a result after use, so that they do not fill Ray's snapshots.
    drain_timeout_s: how long the end of the experiment waits for MLflow. If the server is down, training continues: the
    numbers stay in `events.jsonl`, and `tune-ssim ui` mirrors them later.

    Our own trainable (`make_trainable`) reports its records, images and verdict. For any other trainable, all numbers are logged
    at their `training_iteration`, and a result with a true `pruned` (and `reason`) counts as pruned.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        uri: str | None = None,
        experiment: str | None = None,
        drop_bulk: bool = True,
        drain_timeout_s: float = 60.0,
    ) -> None:
        self.folder = None if folder is None else StudyFolder(Path(folder).expanduser().absolute())
        self.uri, self.experiment = uri, experiment
        self.drop_bulk, self.drain_timeout_s = drop_bulk, drain_timeout_s
        self._mirror: MLflowMirror | None = None
        self._slots = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mirror": None}

    def get_state(self) -> dict[str, Any]:
        return {"folder": None if self.folder is None else str(self.folder.path), "slots": self._slots}

    def set_state(self, state: dict[str, Any]) -> None:
        """Called after Tuner.restore, before `setup`. The same events file is continued, hence the same runs."""
        if self.folder is None and state["folder"] is not None:
            self.folder = StudyFolder(Path(state["folder"]))
        self._slots = state["slots"]

    def setup(self, **info: Any) -> None:
        if self.folder is not None:
            self._open(self.folder)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        role, config = _role_and_settings(trial)
        self._slots += 1
        self._events(trial).trial_started(trial.trial_id, role, config, self._slots - 1)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._events(trial).result(trial.trial_id, result)
        if self.drop_bulk:
            drop_bulk(result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, error=error_of(trial) or "the trial ended with an error")

    def _end(self, trial: Any, error: str | None = None) -> None:
        result = trial.last_result or {}
        verdict = verdict_of(result)
        summary, effective = (verdict[0].to_dict(), verdict[1]) if verdict is not None else (_summary(trial, result), {})
        summary["trial_id"] = trial.trial_id
        if error is not None:
            summary |= {"verdict": "error", "reason": error, "evidence": None}
        self._events(trial).verdict(trial.trial_id, summary, effective)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if self._mirror is None:
            return
        EventWriter(self._mirror.folder).study_ended()
        if not self._mirror.drain(self.drain_timeout_s):
            log.warning("%s; the study itself is complete", self._mirror.status())

    def _events(self, trial: Any) -> EventWriter:
        if self._mirror is None:
            self._open(self.folder or _folder_of(trial))
        assert self.folder is not None
        return EventWriter(self.folder)

    def _open(self, folder: StudyFolder) -> None:
        self.folder = folder.create()
        EventWriter(folder).study_started(folder.name)
        self._mirror = MLflowMirror(folder, self.uri, self.experiment)
        self._mirror.start()


def _folder_of(trial: Any) -> StudyFolder:
    """The experiment's own folder if it is on this machine, otherwise one of its name in our default storage."""
    path = Path(trial.storage.experiment_fs_path)
    if trial.storage.storage_filesystem.type_name == "local" and path.is_dir():
        return StudyFolder(path)
    return StudyFolder(storage_path(None) / trial.experiment_dir_name)


def _role_and_settings(trial: Any) -> tuple[str, dict[str, Any]]:
    """For a trial with a job, with its role and seed; for any other, the configuration itself."""
    job = trial.config.get(JOB)
    config = {key: value for key, value in trial.config.items() if key != JOB and not key.startswith("__")}
    if not isinstance(job, TrialJob):
        return str(config.get("role") or "search"), _loggable(config)
    return job.role.value, _loggable({**config, "seed": job.seed})


def _summary(trial: Any, result: dict[str, Any]) -> dict[str, Any]:
    """The summary of a trial without its own verdict: a foreign trainable, or a trial that a scheduler stopped."""
    role, config = _role_and_settings(trial)
    steps = int(result.get("step") or result.get("training_iteration") or 0)
    # A trial without guards was not judged, so it is not `safe`.
    verdict, reason, evidence = "unjudged", str(result.get("reason") or ""), None
    if result.get("pruned"):
        verdict, evidence = "pruned", {"guard": str(result.get("guard") or "trainable"), "step": steps}
    elif issubclass(trial.get_trainable_cls(), GuardedTrainable):
        verdict, reason = "stopped", "stopped by the scheduler before its last step"
    return {
        "trial_id": trial.trial_id,
        "role": role,
        "config": config,
        "verdict": verdict,
        "reason": reason,
        "evidence": evidence,
        "steps": steps,
        "metrics": numbers_of(result),
    }


def _loggable(config: dict[str, Any]) -> dict[str, Any]:
    """Converts a user's configuration to JSON values. Other values are replaced by their name."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            plain[str(key)] = _loggable(value)
        elif value is None or isinstance(value, (bool, int, float, str)):
            plain[str(key)] = value
        else:
            plain[str(key)] = str(value)
    return plain
