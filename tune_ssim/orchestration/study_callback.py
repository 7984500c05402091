"""Ray's callbacks → the study's folder and the live table."""

from __future__ import annotations

import math
import time
from typing import Any

import ray
from ray.tune import Callback

from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.orchestration.live_table import LiveTable
from tune_ssim.orchestration.trainable import CONTEXT
from tune_ssim.orchestration.trial_result import verdict_of
from tune_ssim.results.events import EventWriter
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.space import resolve_settings
from tune_ssim.trials.quarantine import Ledger
from tune_ssim.trials.summary import PROCESS_DIED, TrialSummary

PENDING_S = 30.0  # the process of a trial has usually started by then
# Ray pickles callbacks and makes them again when a study is resumed; what they draw on cannot travel, so it is looked up.
LIVE_TABLES: dict[str, LiveTable] = {}


class StudyCallback(Callback):
    """Keep it last in the list: it takes the bulky keys out of a result, so that they do not fill Ray's snapshots."""

    def __init__(self, folder: StudyFolder, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.ended: set[str] = set()
        self._pending: dict[str, float] = {}  # trial → since when it waits, by the monotonic clock; NaN: that was said

    @property
    def writer(self) -> EventWriter:
        return EventWriter(self.folder)

    @property
    def table(self) -> LiveTable | None:
        return LIVE_TABLES.get(str(self.folder.path))

    def get_state(self) -> dict[str, Any]:
        return {"ended": self.ended}

    def set_state(self, state: dict[str, Any]) -> None:
        self.ended = state["ended"]

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Explains a trial that waits."""
        for trial in trials:
            name = _who(trial)[0] if trial.status == "PENDING" else ""
            since = self._pending.setdefault(name, time.monotonic()) if name else math.nan
            if name and time.monotonic() - since > PENDING_S and self.table:
                self._pending[name] = math.nan
                self.table.say(f"{name} waits: {_what_it_waits_for(trial)}")

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name, context, config = _who(trial)
        self.writer.trial_started(name, context.get("role", "search"), config, context.get("slot"))
        if self.table:
            self.table.trial_started(name, config)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        name, _, _ = _who(trial)
        self.writer.result(name, result)
        if self.table and "step" in result:
            self.table.trial_progress(name, result["step"], self.steps, result.get("norm_ratio"))
        if result.get("traceback"):
            errors = self.folder.path / "errors"
            errors.mkdir(exist_ok=True)
            (errors / f"{name}.txt").write_text(result["traceback"])
        for checkpoint in result.get("wrote") or []:
            self.folder.add_checkpoint(name, checkpoint)
        if (verdict := verdict_of(result)) is not None:
            self._end(name, *verdict)
        for key in ("records", "images", "effective", "traceback", "wrote"):
            result.pop(key, None)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name, _, _ = _who(trial)
        if name not in self.ended:  # no verdict of its own: a scheduler ended it
            self._end(name, _without_verdict(trial, Verdict.STOPPED, "stopped by the scheduler before its last step"), {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name, _, _ = _who(trial)
        if name not in self.ended:
            lines = [line for line in str(getattr(trial, "error_msg", None) or "").splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else "no message"
            self._end(name, _without_verdict(trial, Verdict.ERROR, f"{PROCESS_DIED}: {reason}"), {})

    def _end(self, name: str, summary: TrialSummary, effective: dict[str, Any]) -> None:
        self.ended.add(name)
        if summary.verdict == "pruned" and (ids := quarantine(self.folder, summary)):
            summary.quarantined = ids
        if not self.folder.add_trial(summary):
            return  # its first verdict is final
        self.writer.verdict(name, summary.to_dict(), effective)
        if self.table:
            self.table.trial_ended(summary)


def quarantine(folder: StudyFolder, summary: TrialSummary) -> list[str]:
    """Enters every checkpoint that a ruined trial wrote into the storage path's ledger; returns their ids.

    Without contents that are known to be sound nothing is entered: the starting weights must never be. A training that is a
    process of its own does not show what it starts from; there the baseline's checkpoints say what no trial has made."""
    baselines = {trial.trial_id for trial in folder.trials() if trial.role == "baseline" and trial.verdict == "safe"}
    start = folder.start()
    sound = [*start.contents] if start else []
    sound += [checkpoint.contents for name in sorted(baselines) for checkpoint in folder.checkpoints(name)]
    if not sound:
        return []
    ledger, evidence, ids = Ledger(folder.path.parent), summary.evidence or {}, []
    for checkpoint in folder.checkpoints(summary.trial_id):
        entered = ledger.add(
            checkpoint.contents,
            sound=sound,
            study=folder.name,
            trial_id=summary.trial_id,
            step=checkpoint.step,
            reason=summary.reason,
            guard=evidence.get("guard"),
            parents=checkpoint.parents,
            path=checkpoint.path,
        )
        if entered.entry is not None and entered.entry.id not in ids:
            ids.append(entered.entry.id)
    return ids


def _what_it_waits_for(trial: Any) -> str:
    bundles = trial.placement_group_factory.bundles
    free = ray.available_resources()
    needed = {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}
    short = [kind for kind, count in needed.items() if count > free.get(kind, 0.0)]
    if not short:
        return f"its process is starting since {PENDING_S:g} s, or the free resources are on too many nodes"
    return "it needs " + " and ".join(
        f"{needed[kind]:g} {kind}s, {free.get(kind, 0.0):g} are free (others on this cluster have the rest)" for kind in short
    )


def _who(trial: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name in the study, context and settings of a Ray trial."""
    context = dict(trial.config.get(CONTEXT) or {})
    settings = resolve_settings({key: value for key, value in trial.config.items() if key != CONTEXT})
    return str(context.get("trial_id", trial.trial_id)), context, settings


def _without_verdict(trial: Any, verdict: Verdict, reason: str) -> TrialSummary:
    name, context, settings = _who(trial)
    last = trial.last_result or {}
    metrics = {key: last[key] for key in ("norm_ratio", "held_out_now") if last.get(key) is not None}
    steps = int(last.get("step", 0))
    return TrialSummary(
        trial_id=name,
        role=Role(context.get("role", "search")),
        config=settings,
        verdict=verdict,
        reason=reason,
        horizon={"steps": steps},
        steps=steps,
        metrics=metrics,
    )
