"""The contract of a guard: a fold over records. State is plain JSON, so that a resumed trial goes on counting."""

from __future__ import annotations

import copy
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


Found = tuple[int, Violation]  # row of a table, and the violation there


class TableGuard:
    """A guard that folds many records at once: a log of millions is judged a column at a time, a live trial one record at a time
    by the same code."""

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        """`fold` of a single record, on a copy of the state."""
        state = copy.deepcopy(state)
        found = self.fold(state, Table([record.step], rows=[record.values]))
        return state, found[0][1] if found else None

    def fold(self, state: State, table: Table) -> list[Found]:
        """Changes `state` in place. The steps of the table increase; rows whose step `state` has seen already are ignored."""
        raise NotImplementedError
