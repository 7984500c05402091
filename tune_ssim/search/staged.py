"""Staged search: the stages of a space one after the other, from conservative to aggressive."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.results.study_folder import Skipped
from tune_ssim.results.trial_text import metric_label
from tune_ssim.search.optuna_search import DEFAULT_LATIN_POINTS, OptunaSearch
from tune_ssim.search.search import Done, Outcome, Suggestion, Wait
from tune_ssim.study.objective import DEFAULT_OBJECTIVE, Objective
from tune_ssim.study.space import Space


class StagedSearch:
    """Opens the next stage only if the previous one was stable *but ineffective* (note 000 §5.1).

    A stage with a harmful trial ends the search. So does one that beats the baseline by more than `noise_floor()`; a smaller
    difference may come from the seed alone.
    search: options of `OptunaSearch`. Raises UserError if no setting of the first stage can be launched."""

    def __init__(
        self,
        space: Space,
        trials: int,
        *,
        objective: Objective = DEFAULT_OBJECTIVE,
        noise_floor: Callable[[], float] = float,
        **search: Any,
    ) -> None:
        if trials < len(space.stages):
            raise ValueError(f"a space with {len(space.stages)} stages needs at least as many trials, got {trials}")
        self.space, self.objective, self.noise_floor = space, objective, noise_floor
        share, more = divmod(trials, len(space.stages))
        self.budgets = [share + (index < more) for index in range(len(space.stages))]
        self.options = {"direction": objective.direction, **search}
        self._open(0, [])

    def _open(self, index: int, skipped: list[Skipped]) -> None:
        stage, budget = self.space.stages[index], self.budgets[index]
        n_latin = max(0, min(self.options.get("n_latin", DEFAULT_LATIN_POINTS), budget - len(stage.points)))
        self._search = OptunaSearch(stage, **{**self.options, "n_latin": n_latin})
        self._skipped_before = skipped
        self._stage_index, self._first_slot, self._n_suggested = index, sum(self.budgets[:index]), 0
        self._outcomes: dict[int, Outcome] = {}

    @property
    def skipped(self) -> list[Skipped]:
        """Suggestions of all stages so far that were not launched."""
        return [*self._skipped_before, *self._search.skipped]

    def ask(self) -> Suggestion | Wait | Done:
        if self._n_suggested == self.budgets[self._stage_index]:
            if len(self._outcomes) < self._n_suggested:
                return Wait()
            reason = self._reason_to_stop()
            if reason or self._stage_index + 1 == len(self.space.stages):
                return Done(reason)
            try:
                self._open(self._stage_index + 1, self.skipped)
            except UserError as error:  # no setting of this stage can be launched
                return Done(str(error))
        suggestion = self._search.ask()
        if isinstance(suggestion, Done):
            return Done(f"stage {self.space.stages[self._stage_index].name!r}: {suggestion.reason}")
        if isinstance(suggestion, Wait):
            return suggestion
        self._n_suggested += 1
        return Suggestion(self._first_slot + suggestion.slot, suggestion.settings, suggestion.stage)

    def tell(self, slot: int, outcome: Outcome) -> None:
        if slot >= self._first_slot:
            self._outcomes[slot] = outcome
            self._search.tell(slot - self._first_slot, outcome)

    def replace(self, slot: int, settings: Mapping[str, Any]) -> bool:
        return self._search.replace(slot - self._first_slot, settings)

    def _reason_to_stop(self) -> str:
        name = self.space.stages[self._stage_index].name
        if any(outcome.verdict is not None and outcome.verdict.speaks_against_setting for outcome in self._outcomes.values()):
            return f"stage {name!r} had a harmful trial: no further stage is opened"
        found = [outcome.improvement for outcome in self._outcomes.values() if math.isfinite(outcome.improvement)]
        best, floor = max(found, default=-math.inf), self.noise_floor()
        if best > floor:
            delta = best if self.objective.direction == "maximize" else -best
            above = f", beyond the noise floor of {floor:.4f}" if floor else ""
            return f"stage {name!r} is effective ({metric_label(self.objective.delta)} {delta:+.4f}{above}): no need to push harder"
        return ""
