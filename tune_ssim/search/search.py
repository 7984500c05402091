"""The interface of search algorithms: `ask` for a setting, `tell` its outcome."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tune_ssim.guards import Baseline
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.trials.summary import TrialSummary


@dataclass(frozen=True)
class Suggestion:
    """A setting to try. slot: its position in the order of suggestions, from 0. trial_id, seed: None if the study chooses them.

    reason: why it is tried, as text. rival: (step, improvement) of a trial that this one must keep up with: see `TrialJob`."""

    slot: int
    settings: Mapping[str, Any]
    stage: str | None = None
    trial_id: str | None = None
    role: Role = Role.SEARCH
    seed: int | None = None
    reason: str = ""
    rival: tuple[int, float] | None = None


@dataclass(frozen=True)
class Wait:
    """No suggestion until `tell` is called with another outcome."""


@dataclass(frozen=True)
class Done:
    """The search is over. reason: why it ended before its last trial, if it did. failed: whether the set-up is the cause."""

    reason: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a search needs to know about a trial that ended.

    verdict: None for a trainable without verdicts. value: of the objective, NaN if the training did not reach its end.
    harm: a graded constraint, feasible if <= 0; NaN if unknown. improvement: how much better than the baseline it is, above zero if
    it is; NaN if unknown. metrics: what was measured, for further objectives. curve: (step, improvement) at evaluations on the way.
    steps: training steps done. baseline: set for a baseline run, for comparison with other trials. died: the trial's process died,
    so nothing is known."""

    verdict: Verdict | None = None
    value: float = math.nan
    harm: float = math.nan
    improvement: float = math.nan
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: Sequence[tuple[int, float]] = ()
    steps: int = 0
    reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    baseline: Baseline | None = None
    died: bool = False

    @property
    def failed(self) -> bool:
        """Whether it gives no information about the setting."""
        return self.died or self.verdict in (Verdict.ERROR, Verdict.BAD_SETUP)

    @property
    def was_judged(self) -> bool:
        return not self.died and self.verdict is not None and not self.failed

    @classmethod
    def of(cls, summary: TrialSummary, harm: float, baseline: Baseline | None = None) -> Outcome:
        return cls(
            verdict=summary.verdict,
            value=summary.metric(summary.objective) if summary.verdict.has_result else math.nan,
            improvement=summary.improvement if summary.verdict.has_result else math.nan,
            metrics=summary.metrics if summary.verdict.has_result else {},
            curve=summary.curve,
            steps=summary.steps,
            harm=harm,
            reason=summary.reason,
            settings=summary.config,
            baseline=baseline,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, except that numbers may be NaN."""
        baseline = None if self.baseline is None else self.baseline.to_bytes().decode()
        return {**vars(self), "settings": dict(self.settings), "metrics": dict(self.metrics), "baseline": baseline}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        verdict, baseline = data["verdict"], data["baseline"]
        return cls(
            **{
                **data,
                "verdict": None if verdict is None else Verdict(verdict),
                "baseline": None if baseline is None else Baseline.from_bytes(baseline.encode()),
            }
        )


class Search(Protocol):
    """A search algorithm. `ask` may be called at any time, `tell` once for every slot, in any order.

    Its state depends only on the sequence of calls, so a search is resumed by replaying `ask` and `tell` with known outcomes."""

    def ask(self) -> Suggestion | Wait | Done: ...

    def tell(self, slot: int, outcome: Outcome) -> None: ...

    def replace(self, slot: int, settings: Mapping[str, Any]) -> bool:
        """Replaces the settings of the latest suggestion. False if that is not possible."""
        ...
