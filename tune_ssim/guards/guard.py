"""The guard protocol: a fold over records. The state is plain JSON, so that a resumed trial continues from it."""

from __future__ import annotations

import copy
from typing import Any, Protocol

from tune_ssim.guards.violation import Violation
from tune_ssim.records import Record
from tune_ssim.records.record_table import Table

State = dict[str, Any]


class Guard(Protocol):
    """A frozen dataclass of limits. Deterministic: the same records give the same violations, live or from a log."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Required metrics. If one never appears, that is an error, not a pass."""
        ...

    def init(self) -> State: ...

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        """The next state and a violation, if any. Does not modify `state`."""
        ...

    def unjudged(self, state: State) -> str | None:
        """At the end of a run: why the guard could not judge although its metric was present, or None."""
        ...


Found = tuple[int, Violation]  # table row and the violation in it


class TableGuard:
    """A guard that processes many records at once. A long log is judged by columns, a live trial record by record, both with the
    same code."""

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        """`fold` for a single record, on a copy of the state."""
        state = copy.deepcopy(state)
        found = self.fold(state, Table([record.step], rows=[record.values]))
        return state, found[0][1] if found else None

    def fold(self, state: State, table: Table) -> list[Found]:
        """Updates `state` in place and returns the violations. The steps of the table must increase; rows with steps that were
        already seen are ignored."""
        raise NotImplementedError
