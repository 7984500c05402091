"""One line of a rule pack as a guard: what must hold together, what follows, and what to do about it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tune_ssim.guards.condition import Condition, as_action
from tune_ssim.guards.guard import Found, State, TableGuard
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records.record_table import Table

NOT_A_SIZE = "a number went out of range, here or in what it is computed from"
FIND_THE_FIRST = "look for the first value that is not finite: a step too large, a division by zero, half precision"


@dataclass(frozen=True)
class Rule(TableGuard):
    """Fires when all conditions of `when` have come to hold at once; again only after one of them did not in between."""

    name: str
    when: tuple[Condition, ...]
    action: Action = Action.WARN
    sentence: str = ""  # what is wrong, in plain words; what was measured is added to it
    cause: str = ""
    remedy: str = ""
    source: str = ""  # where the limits come from: an id of SEEDS, a paper
    optional: bool = False  # a training that does not log the metrics is no error

    def __post_init__(self) -> None:
        if not self.when:
            raise ValueError("a rule needs at least one condition")
        object.__setattr__(self, "action", as_action(self.action))

    @property
    def about(self) -> tuple[str, ...]:
        """Every metric that it looks at."""
        return tuple(dict.fromkeys(metric for condition in self.when for metric in condition.metrics))

    @property
    def metrics(self) -> tuple[str, ...]:
        return () if self.optional else self.about

    def init(self) -> State:
        """`holds` at the record before, all of them together; of a single condition that is its own affair."""
        return {"parts": [condition.init() for condition in self.when], "holds": False}

    def fold(self, state: State, table: Table) -> list[Found]:
        parts = state["parts"]
        if len(parts) == 1:
            return [(row, self._of([found])) for row, found in self.when[0].fold(parts[0], table)]
        if len(table) == 1:
            return self._fold_one(state, table)
        before = pickle.loads(pickle.dumps(parts))  # plain data: ten times as fast as deepcopy
        found = [condition.fold(part, table) for condition, part in zip(self.when, parts, strict=True)]
        # A condition fires when it comes to hold: one that is silent and does not hold now did not hold at any record.
        if any(not one and not part["holds"] and not old["holds"] for one, part, old in zip(found, parts, before, strict=True)):
            state["holds"] = False
            return []
        for part, old in zip(parts, before, strict=True):
            part |= old
        return [(row, violation) for row in range(len(table)) for _, violation in self._fold_one(state, table[row : row + 1])]

    def _fold_one(self, state: State, table: Table) -> list[Found]:
        """The same for a table of one record."""
        for condition, part in zip(self.when, state["parts"], strict=True):
            condition.fold(part, table)
        held, state["holds"] = state["holds"], self.holds(state)
        return [(0, self.finding(state))] if state["holds"] and not held else []

    def holds(self, state: State) -> bool:
        """Whether all conditions hold now."""
        return all(part["holds"] for part in state["parts"])

    def finding(self, state: State) -> Violation:
        return self._of([condition.finding(part) for condition, part in zip(self.when, state["parts"], strict=True)])

    def _of(self, found: Sequence[Violation]) -> Violation:
        """What the conditions said, as one."""
        broken = next((violation for violation in found if not math.isfinite(violation.value)), None)
        if broken is not None:  # what the rule knows is about sizes, and this is none
            return replace(
                broken,
                guard=self.name,
                action=self.action,
                sentence=f"{broken.metric} is {broken.value}, so this rule cannot be kept",
                cause=NOT_A_SIZE,
                remedy=FIND_THE_FIRST,
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
        """A warning that could not be given is nothing that a verdict would wait for."""
        reason = self.too_little(state)
        return None if reason is None or self.optional or self.action is Action.WARN else f"guard '{self.name}': {reason}"

    def too_little(self, state: State) -> str | None:
        """Why it could not have fired although its metrics were there, or None."""
        for condition, part in zip(self.when, state["parts"], strict=True):
            if (reason := condition.unjudged(part)) is not None:
                return reason
        return None
