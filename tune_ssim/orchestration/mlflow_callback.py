"""The MLflow callback for a `tune.Tuner` of your own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ray import tune

from tune_ssim.results.events import BULKY, EventWriter, numbers_of
from tune_ssim.results.study_folder import StudyFolder, storage_path
from tune_ssim.tracking.mirror import MLflowMirror

log = logging.getLogger(__name__)


class MLflowTracking(tune.Callback):
    """Shows a Tune experiment in MLflow: a parent run, a child run a trial, every number at its step.

        tune.Tuner(train, run_config=tune.RunConfig(callbacks=[MLflowTracking()]), ...)

    folder: where the events are kept that MLflow is made from; None: the experiment's own folder.
    uri: MLflow's tracking URI; None: `mlflow.db` (SQLite) beside that folder.
    drop_bulk: take `records` and `images` out of a result after use, lest they fill Ray's snapshots.
    drain_timeout_s: how long the end of the experiment waits for MLflow. A server that is down stops nothing: the
    numbers stay in `events.jsonl`, and `tune-ssim ui` brings them over later.

    A trainable of ours says everything in its results (`records`, `images`, `summary`, `effective`). Of any other, all
    numbers are logged at their `training_iteration`, and a result with a true `pruned` (and `reason`) means pruned.
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
        """After Tuner.restore, before `setup`: the same events go on, hence the same runs."""
        if self.folder is None and state["folder"] is not None:
            self.folder = StudyFolder(Path(state["folder"]))
        self._slots = state["slots"]

    def setup(self, **info: Any) -> None:
        if self.folder is not None:
            self._open(self.folder)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        events = self._events(trial)
        config = {key: value for key, value in trial.config.items() if not key.startswith("__")}
        self._slots += 1
        events.trial_started(trial.trial_id, config.get("role") or "search", _loggable(config), self._slots - 1)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._events(trial).result(trial.trial_id, result)
        if self.drop_bulk:
            for key in BULKY:
                result.pop(key, None)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        summary = _summary(trial, last)
        self._events(trial).verdict(trial.trial_id, summary, last.get("effective"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        lines = str(error or "").strip().splitlines()
        reason = lines[-1] if lines else "the trial ended with an error"
        summary = {**_summary(trial, trial.last_result or {}), "verdict": "error", "reason": reason, "evidence": None}
        self._events(trial).verdict(trial.trial_id, summary)

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
    """The experiment's own folder where it is on this machine, else one of its name in our default storage."""
    path = Path(trial.storage.experiment_fs_path)
    if trial.storage.storage_filesystem.type_name == "local" and path.is_dir():
        return StudyFolder(path)
    return StudyFolder(storage_path(None) / trial.experiment_dir_name)


def _summary(trial: Any, result: dict[str, Any]) -> dict[str, Any]:
    if isinstance(result.get("summary"), dict):
        return dict(result["summary"])
    pruned = bool(result.get("pruned"))
    return {
        "trial_id": trial.trial_id,
        "role": trial.config.get("role") or "search",
        "config": _loggable(trial.config),
        # Nobody has judged a trial without guards: that is not `safe`.
        "verdict": "pruned" if pruned else "unjudged",
        "reason": str(result.get("reason") or ""),
        "evidence": {"guard": str(result.get("guard") or "trainable"), "step": result.get("training_iteration")}
        if pruned
        else None,
        "steps": int(result.get("training_iteration") or 0),
        "metrics": {} if "records" in result else numbers_of(result),
    }


def _loggable(config: dict[str, Any]) -> dict[str, Any]:
    """A user's configuration may hold anything; what is not JSON is shown by its name."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            plain[str(key)] = _loggable(value)
        elif value is None or isinstance(value, (bool, int, float, str)):
            plain[str(key)] = value
        else:
            plain[str(key)] = str(value)
    return plain
