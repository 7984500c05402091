"""The confirm phase: the finalists of a search and the baseline again, with further seeds and for longer, guards on."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from tune_ssim.guards import Guard, SmokeTest
from tune_ssim.orchestration.trainable import CONTEXT
from tune_ssim.trials.summary import OBJECTIVE

if TYPE_CHECKING:
    from tune_ssim.study.study import Study

PREFIX = "confirm-"  # of the baselines' trial ids


class ConfirmSearch(Searcher):
    """Hands out one finalist at a time, the best first, once a seed; the next one only if the one before did not hold.

    `finalists`: (trial id of the search, settings). A finalist holds if all its trials are safe and its mean objective is
    above zero: it beats the baseline on seeds that the search has not seen."""

    def __init__(self, finalists: Sequence[tuple[str, Mapping[str, Any]]], seeds: Sequence[int], metric: str = OBJECTIVE) -> None:
        super().__init__(metric=metric, mode="max")
        self.finalists, self.seeds = [(name, dict(settings)) for name, settings in finalists], list(seeds)
        self.index = 0  # of the finalist under test
        self._suggested: list[str] = []  # Ray's ids of its trials
        self._results: dict[str, dict[str, Any]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.index < len(self.finalists) and len(self._suggested) == len(self.seeds):
            if len(self._results) < len(self._suggested):
                # One that fails cannot hold any more: no need to wait for the others.
                if not any(self._is_lost(result) for result in self._results.values()):
                    return None
            elif self._holds():
                return Searcher.FINISHED
            self.index += 1
            self._suggested, self._results = [], {}
        if self.index >= len(self.finalists):
            return Searcher.FINISHED
        name, settings = self.finalists[self.index]
        seed = self.seeds[len(self._suggested)]
        self._suggested.append(trial_id)
        context = {"trial_id": f"{PREFIX}{name}-seed-{seed}", "role": "confirm", "seed": seed, "searched": list(settings)}
        return {**settings, CONTEXT: context}

    def _is_lost(self, result: Mapping[str, Any]) -> bool:
        return result.get("verdict") != "safe"

    def _holds(self) -> bool:
        values = [float(result.get(self.metric) or math.nan) for result in self._results.values()]
        return not any(map(self._is_lost, self._results.values())) and fmean(values) > 0

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a trial is judged when it has ended."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._suggested:
            self._results[trial_id] = {} if error else {key: (result or {}).get(key) for key in ("verdict", self.metric)}

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        # Ray's own snapshot, written by this process's user in the study's folder.
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))


def confirm_seeds(study: Study) -> list[int]:
    """Seeds that neither the search nor its baselines have seen."""
    assert study.confirm is not None
    first = study.search.seed + max(1, study.baseline_seeds)
    return [first + index for index in range(study.confirm.seeds)]


def confirm_steps(study: Study) -> int:
    assert study.confirm is not None
    return study.confirm.steps or 10 * study.steps


def longer(guards: Sequence[Guard], steps: int) -> tuple[Guard, ...]:
    """The same guards for a longer training: smoke tests go on, twice as far apart each time."""
    return tuple(replace(guard, at=_further(guard.at, steps)) if isinstance(guard, SmokeTest) else guard for guard in guards)


def _further(at: tuple[int, ...], steps: int) -> tuple[int, ...]:
    found = list(at)
    while (following := 2 * max(*found, 1)) < steps:
        found.append(following)
    return tuple(found)
