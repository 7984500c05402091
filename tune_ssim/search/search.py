"""The contract of a search: it is asked for a setting and told what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tune_ssim.guards import Baseline
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.trials.summary import TrialSummary
from tune_ssim.trials.trial import harm_of


@dataclass(frozen=True)
class Suggestion:
    """A setting to try. slot: its position in the order of suggestions, from 0. trial_id, seed: None where the study chooses."""

    slot: int
    settings: Mapping[str, Any]
    stage: str | None = None
    trial_id: str | None = None
    role: Role = Role.SEARCH
    seed: int | None = None


@dataclass(frozen=True)
class Wait:
    """Nothing to suggest until another result is told."""


@dataclass(frozen=True)
class Done:
    """No further suggestion will come. reason: why the search ended before its last trial, if it did. failed: because the set-up
    is at fault."""

    reason: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a search needs to know of a trial that ended.

    verdict: None for a trainable that gives none. value: of the objective, NaN where the training did not reach its end.
    harm: a graded constraint, <= 0 feasible; NaN where unknown. baseline: of a baseline run, what others are compared with.
    died: the trial's process died, so that nothing is known."""

    verdict: Verdict | None = None
    value: float = math.nan
    harm: float = math.nan
    reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    baseline: Baseline | None = None
    died: bool = False

    @property
    def failed(self) -> bool:
        """Whether it says nothing about the setting."""
        return self.died or self.verdict in (Verdict.ERROR, Verdict.BAD_SETUP)

    @property
    def was_judged(self) -> bool:
        return not self.died and self.verdict is not None and not self.failed

    @classmethod
    def of(cls, summary: TrialSummary, steps: int, objective: str) -> Outcome:
        """Of a trial of `steps` steps, as it stands in the study's folder."""
        return cls(
            verdict=summary.verdict,
            value=summary.metric(objective) if summary.verdict.has_result else math.nan,
            harm=harm_of(summary.verdict, summary.evidence, summary.steps, steps),
            reason=summary.reason,
            settings=summary.config,
        )


class Search(Protocol):
    """`ask` may be called at any time, `tell` once for every slot, in any order.

    Its state is nothing but the calls that were made: a search is resumed by asking again and telling what is known already."""

    def ask(self) -> Suggestion | Wait | Done: ...

    def tell(self, slot: int, outcome: Outcome) -> None: ...

    def replace(self, slot: int, settings: Mapping[str, Any]) -> bool:
        """Puts other settings in place of the latest suggestion. False where that is not possible."""
        ...
