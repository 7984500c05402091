"""Enums that describe a trial: its role, its verdict, and the action that a guard requests."""

from __future__ import annotations

from enum import Enum
from typing import Any


class _Word(str, Enum):
    """A string enum that is written and compared as its text, in JSON and in f-strings of every Python version."""

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, spec: str) -> str:
        return format(str(self.value), spec)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Accepts the text also in a strict model, because a file has only text."""
        return {**handler(source), "strict": False}


class Role(_Word):
    BASELINE = "baseline"  # only the pixel loss; the reference for all other trials
    SEARCH = "search"
    CONFIRM = "confirm"  # a finalist again, with another seed and for longer


class Verdict(_Word):
    """How a trial ended. Trials are listed in this order, best first."""

    SAFE = "safe"  # no guard fired, nothing worse than the margins, to the last step
    DEGRADED = "degraded"  # worse than the baseline beyond a margin
    STOPPED = "stopped"  # before its last step: by a scheduler, or by the guided search because it was behind
    PRUNED = "pruned"  # by a guard
    BAD_SETUP = "bad_setup"  # ruined before the first update, or settings that never arrived: no setting is to blame
    ERROR = "error"

    @property
    def rank(self) -> int:
        """0 for the best verdict."""
        return list(Verdict).index(self)

    @property
    def has_result(self) -> bool:
        """Whether the training reached its last step and was compared with the baseline."""
        return self in (Verdict.SAFE, Verdict.DEGRADED)

    @property
    def speaks_against_setting(self) -> bool:
        """Whether the verdict is evidence against the setting. `error` and `bad_setup` are not."""
        return self in (Verdict.PRUNED, Verdict.DEGRADED)


class Action(_Word):
    """The action that a guard requests when it fires, the mildest first."""

    WARN = "warn"  # recorded only
    PROBE = "probe"  # run a smoke test now, which decides
    PRUNE = "prune"
    ABORT = "abort"  # the set-up is at fault, not the setting

    @property
    def severity(self) -> int:
        return list(Action).index(self)

    @property
    def ends_trial(self) -> bool:
        return self in (Action.PRUNE, Action.ABORT)
