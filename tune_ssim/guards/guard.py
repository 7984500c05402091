"""The contract of a guard: a fold over records. The state is plain JSON, so that a resumed trial continues from it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from tune_ssim.guards.violation import Violation
from tune_ssim.records import Record
from tune_ssim.records.record_table import Table

State = dict[str, Any]
Found = tuple[int, Violation]  # table row and the violation in it
WILDCARD_ENDINGS = ("/", "*")  # a metric with this ending matches every name with that prefix


class Guard:
    """A frozen dataclass of limits. Deterministic: the same records give the same violations, live or from a log."""

    if TYPE_CHECKING:  # at run time it would forbid a dataclass field with this name

        @property
        def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Required metrics. If one never appears, that is an error, not a pass."""
        raise NotImplementedError

    @property
    def expected_by(self) -> int:
        """The step by which the required metrics must have appeared, if that is later than the first records."""
        return -1

    def init(self) -> State:
        raise NotImplementedError

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        """The next state and a violation, if any. Does not modify `state`."""
        raise NotImplementedError

    def fold(self, state: State, table: Table) -> list[Found]:
        """Updates `state` in place by many records and returns the violations. The steps of the table must increase; rows with
        steps that were already seen are ignored."""
        found: list[Found] = []
        if len(table) > 1 and self.metrics and not any(is_named(metric, table.metrics) for metric in self.metrics):
            return found  # the guard ignores these records
        for row, record in enumerate(table):
            new, violation = self.update(state, record)
            state |= new
            if violation is not None:
                found.append((row, violation))
        return found

    def unjudged(self, state: State) -> str | None:
        """At the end of a run: why the guard could not judge although its metric was present, or None."""
        return None


class ForeignGuard(Guard):
    """A guard of a user that has `name`, `metrics`, `init`, `update` and `unjudged` without inheriting from `Guard`."""

    def __init__(self, guard: Any) -> None:
        self.guard = guard
        self.name = guard.name  # type: ignore[misc]
        self.init, self.update, self.unjudged = guard.init, guard.update, guard.unjudged  # type: ignore[method-assign]

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.guard.metrics)


class TableGuard(Guard):
    """A guard that processes many records at once: those of a long log, and the single ones of a live trial, by the same code."""

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        state = copy.deepcopy(state)
        found = self.fold(state, Table([record.step], rows=[record.values]))
        return state, found[0][1] if found else None

    def fold(self, state: State, table: Table) -> list[Found]:
        raise NotImplementedError


def is_named(metric: str, names: Collection[str]) -> bool:
    """Whether a required metric, or one that its wildcard matches, is among `names`."""
    if metric.endswith(WILDCARD_ENDINGS):
        return any(name.startswith(metric.rstrip("*")) for name in names)
    return metric in names


def without_metric(guards: Iterable[Guard], names: Collection[str]) -> dict[str, list[str]]:
    """Guard → its required metrics that are not among `names`, for each guard that lacks one."""
    missing = {guard.name: [metric for metric in guard.metrics if not is_named(metric, names)] for guard in guards}
    return {name: metrics for name, metrics in missing.items() if metrics}
