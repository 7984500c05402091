"""The confirm phase: repeats the finalists of a search and the baseline with new seeds and more steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tune_ssim.guards import Guard, SmokeTest
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.results.intervals import MIN_RUNS, exceeds
from tune_ssim.search.search import Done, Outcome, Suggestion, Wait
from tune_ssim.study.study import Study

PREFIX = "confirm-"  # prefix of the trial ids


class ConfirmSearch:
    """Suggests one finalist at a time, best first, once per seed. The next one follows only if the previous one did not hold.

    finalists: (trial id of the search, settings). least: a finalist holds if all its trials are safe and the interval of its
    improvement over the baseline exceeds it, on seeds that the search has not used. It gets no further seed once that is decided
    for or against it, which is looked at from `decide_after` seeds on."""

    def __init__(
        self,
        finalists: Sequence[tuple[str, Mapping[str, Any]]],
        seeds: Sequence[int],
        least: float | None = None,
        decide_after: int = MIN_RUNS,
    ) -> None:
        self.finalists, self.seeds = [(name, dict(settings)) for name, settings in finalists], list(seeds)
        self.least, self.decide_after = least, decide_after
        self._index = 0  # of the finalist under test
        self._next_slot = self._first_slot = 0
        self._outcomes: dict[int, Outcome] = {}  # outcomes of the current finalist, by slot

    def ask(self) -> Suggestion | Wait | Done:
        while self._index < len(self.finalists):
            n_suggested = self._next_slot - self._first_slot
            holds = self._holds()
            if holds:
                return Done()
            is_over = n_suggested == len(self.seeds) and len(self._outcomes) == n_suggested
            if holds is None and not is_over:
                if n_suggested == len(self.seeds) or (n_suggested >= self.decide_after and len(self._outcomes) < n_suggested):
                    return Wait()  # the next seed is only for what the others leave open
                name, settings = self.finalists[self._index]
                slot, seed = self._next_slot, self.seeds[n_suggested]
                self._next_slot += 1
                return Suggestion(slot, settings, trial_id=f"{PREFIX}{name}-seed-{seed}", role=Role.CONFIRM, seed=seed)
            self._index += 1
            self._first_slot, self._outcomes = self._next_slot, {}
        return Done()

    def _holds(self) -> bool | None:
        """Whether the current finalist holds; None if that is not decided yet. After one trial that is not safe it cannot hold, so
        the others need not be awaited."""
        if any(outcome.verdict != Verdict.SAFE for outcome in self._outcomes.values()):
            return False
        if len(self._outcomes) < max(self._next_slot - self._first_slot, self.decide_after):
            return None
        return exceeds([self._outcomes[slot].improvement for slot in sorted(self._outcomes)], self.least)

    def tell(self, slot: int, outcome: Outcome) -> None:
        if slot >= self._first_slot:
            self._outcomes[slot] = outcome

    def replace(self, slot: int, settings: Mapping[str, Any]) -> bool:
        return False


def confirm_seeds(study: Study) -> list[int]:
    """Seeds that neither the search nor its baselines have used."""
    assert study.confirm is not None
    first = study.search.seed + max(1, study.baseline_seeds)
    return [first + index for index in range(study.confirm.seeds)]


def confirm_steps(study: Study) -> int | None:
    """None: until the command ends by itself, as in the search."""
    assert study.confirm is not None
    return study.confirm.steps or (None if study.steps is None else 10 * study.steps)


def for_longer(guards: Sequence[Guard], steps: int | None) -> tuple[Guard, ...]:
    """The same guards for a longer training. Smoke tests continue at doubling intervals."""
    if steps is None:
        return tuple(guards)
    return tuple(replace(guard, at=_extended(guard.at, steps)) if isinstance(guard, SmokeTest) else guard for guard in guards)


def _extended(at: tuple[int, ...], steps: int) -> tuple[int, ...]:
    found = list(at)
    while (following := 2 * max(*found, 1)) < steps:
        found.append(following)
    return tuple(found)
