"""One rule of a rule pack as a guard: its conditions, the cause, and the remedy."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tune_ssim.guards.condition import Condition, set_action
from tune_ssim.guards.guard import Found, State, TableGuard
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Table

NON_FINITE_CAUSE = "a number went out of range, here or in what it is computed from"
NON_FINITE_REMEDY = "look for the first value that is not finite: a step too large, a division by zero, half precision"


@dataclass(frozen=True)
class Rule(TableGuard):
    """Fires when all conditions of `when` become true together, and again only after one was false in between."""

    name: str
    when: tuple[Condition, ...]
    action: Action = Action.WARN
    sentence: str = ""  # what is wrong, in plain words; the measured values are appended
    cause: str = ""
    remedy: str = ""
    source: str = ""  # origin of the limits: an id of SEEDS, a paper
    optional: bool = False  # missing metrics are not an error

    def __post_init__(self) -> None:
        if not self.when:
            raise ValueError("a rule needs at least one condition")
        set_action(self)

    @property
    def about(self) -> tuple[str, ...]:
        """All metrics of its conditions."""
        return tuple(dict.fromkeys(metric for condition in self.when for metric in condition.metrics))

    @property
    def metrics(self) -> tuple[str, ...]:
        return () if self.optional else self.about

    def init(self) -> State:
        """parts: the states of the conditions. holds: whether all were true at the previous record (used for several only)."""
        return {"parts": [condition.init() for condition in self.when], "holds": False}

    def fold(self, state: State, table: Table) -> list[Found]:
        parts = state["parts"]
        if len(parts) == 1:
            return [(row, self._combined([found])) for row, found in self.when[0].fold(parts[0], table)]
        if len(table) == 1:
            return self._fold_one(state, table)
        before = pickle.loads(pickle.dumps(parts))  # for plain data ten times as fast as deepcopy
        found = [condition.fold(part, table) for condition, part in zip(self.when, parts, strict=True)]
        # A condition fires when it becomes true. One that did not fire and is false before and after was false throughout.
        if any(not one and not part["holds"] and not old["holds"] for one, part, old in zip(found, parts, before, strict=True)):
            state["holds"] = False
            return []
        for part, old in zip(parts, before, strict=True):
            part |= old
        return [(row, violation) for row in range(len(table)) for _, violation in self._fold_one(state, table[row : row + 1])]

    def _fold_one(self, state: State, table: Table) -> list[Found]:
        """`fold` for a table with one record."""
        for condition, part in zip(self.when, state["parts"], strict=True):
            condition.fold(part, table)
        held, state["holds"] = state["holds"], self.holds(state)
        return [(0, self.finding(state))] if state["holds"] and not held else []

    def holds(self, state: State) -> bool:
        """Whether all conditions are currently true."""
        return all(part["holds"] for part in state["parts"])

    def finding(self, state: State) -> Violation:
        return self._combined([condition.finding(part) for condition, part in zip(self.when, state["parts"], strict=True)])

    def _combined(self, found: Sequence[Violation]) -> Violation:
        """The violations of the conditions as one violation of the rule."""
        broken = next((violation for violation in found if not math.isfinite(violation.value)), None)
        if broken is not None:  # the rule's own explanation does not apply to a non-finite value
            return replace(
                broken,
                guard=self.name,
                action=self.action,
                sentence=f"{broken.metric} is {broken.value}, so this rule cannot be kept",
                cause=NON_FINITE_CAUSE,
                remedy=NON_FINITE_REMEDY,
            )
        measured = " and ".join(violation.sentence for violation in found)
        return replace(
            found[0],
            guard=self.name,
            step=max(violation.step for violation in found),
            action=self.action,
            sentence=f"{self.sentence}: {measured}" if self.sentence else measured,
            remedy=self.remedy,
            cause=self.cause,
        )

    def unjudged(self, state: State) -> str | None:
        """Like `insufficient_data`, but None for optional rules and warnings, which must not hold up a verdict."""
        reason = self.insufficient_data(state)
        return None if reason is None or self.optional or self.action is Action.WARN else f"guard '{self.name}': {reason}"

    def insufficient_data(self, state: State) -> str | None:
        """Why the rule could not have fired although its metrics were present, or None."""
        for condition, part in zip(self.when, state["parts"], strict=True):
            if (reason := condition.unjudged(part)) is not None:
                return reason
        return None
