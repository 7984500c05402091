"""The contract of a guard: a fold over records. State is plain JSON, so that a resumed trial goes on counting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from tune_ssim.guards.violation import Violation
from tune_ssim.records import Record
from tune_ssim.records.record_table import Table

State = dict[str, Any]
GuardType = TypeVar("GuardType", bound="Guard")


class Guard(Protocol):
    """A frozen dataclass of limits. The same records give the same violations, wherever they come from."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics without which the guard can say nothing: their absence is an error, never a pass."""
        ...

    def init(self) -> State: ...

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        """The next state and what is to be said, if anything. `state` itself is left as it was."""
        ...

    def unjudged(self, state: State) -> str | None:
        """Asked at the end: why the guard could not give a verdict although its metric was there, or None."""
        ...


Fold = Callable[[Record], Violation | None]
Found = tuple[int, Violation]  # in which row of a table, and what


class InPlace:
    """A guard that says how a state moves on in place: `update` is the same on a copy. A `Watch` owns its states, and a log of
    millions of records is folded without a new dictionary for each record and guard."""

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        state = copy.deepcopy(state)
        return state, self.bound(state)(record)

    def bound(self, state: State) -> Fold:
        """A function of a record that changes `state`."""
        raise NotImplementedError

    def fold_table(self, state: State, table: Table) -> list[Found]:
        """As `bound(state)` of each record. `table.grows`, and its first step is later than all that `state` has seen."""
        fold = self.bound(state)
        return [(row, said) for row, record in enumerate(table) if (said := fold(record)) is not None]
