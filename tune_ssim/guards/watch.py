"""Runs all guards of a trial over its records."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

from tune_ssim.guards.guard import ForeignGuard, Found, Guard, State, is_named
from tune_ssim.guards.violation import Violation
from tune_ssim.records import Record
from tune_ssim.records.record_table import Table

GRACE_RECORDS = 20  # records (distinct steps) within which every required metric must appear
MAX_SHOWN_NAMES = 50  # metric names kept for the message of MissingMetric


class MissingMetric(ValueError):
    """A required metric of a guard never appeared, so the guard cannot pass."""


@dataclass
class Watch:
    """Feeds records to guards. `update` takes records in step order and returns violations; the state is plain JSON.

    strict: raise MissingMetric if a required metric never appears. If False, the caller must report what could not be
    judged."""

    guards: Sequence[Guard]
    strict: bool = True
    _states: dict[str, Any] = field(init=False)
    _records: int = field(init=False, default=0)  # distinct steps; a step logged twice or in two parts counts once
    _last_step: int = field(init=False, default=-1)
    _names: list[str] = field(init=False, default_factory=list)
    _absent: dict[str, list[str]] = field(init=False)  # guard → its required metrics that have not appeared yet, if there are any

    def __post_init__(self) -> None:
        self.guards = _adopted(self.guards)
        names = [guard.name for guard in self.guards]
        if len(set(names)) != len(names):
            raise ValueError(f"guards must have different names, got {names}")
        self._states = {guard.name: guard.init() for guard in self.guards}
        self._find_absent()

    def update(self, record: Record) -> list[Violation]:
        """The violations for a record, most severe first. Raises MissingMetric if a required metric is absent from the first
        records."""
        if record.step > self._last_step:
            if self._records >= GRACE_RECORDS and self.strict and self._absent:
                self._require(f"the first {self._records} records", self._last_step)
            self._records += 1
            self._last_step = record.step
        if self.strict and self._absent:
            self._remember(record.values)
        found = self._fold(Table([record.step], rows=[record.values]))
        return found[0] if found else []

    def update_table(self, table: Table) -> list[list[Violation]]:
        """Like `update` for each record: lists of violations, in record order, for the records that have any."""
        if self.strict or not table.grows or not table or table.steps[0] <= self._last_step:
            return [found for found in map(self.update, table) if found]
        self._records += len(table)
        self._last_step = table.steps[-1]
        return self._fold(table)

    def _fold(self, table: Table) -> list[list[Violation]]:
        found: list[Found] = []
        for guard in self.guards:
            found += guard.fold(self._states[guard.name], table)
        found.sort(key=lambda one: (one[0], -one[1].action.severity))
        return [[violation for _, violation in of_row] for _, of_row in groupby(found, key=itemgetter(0))]

    def fold(self, records: Iterable[Record]) -> list[Violation]:
        """Violations up to and including the first that ends the run. Later records are not processed."""
        found: list[Violation] = []
        for record in records:
            found += self.update(record)
            if any(violation.action.ends_trial for violation in found):
                break
        return found

    def finish(self) -> list[str]:
        """At the end of a run: the reasons why guards could not judge. Raises MissingMetric."""
        if self.strict:
            self._require(f"all {self._records} records")
        reasons = [guard.unjudged(self._states[guard.name]) for guard in self.guards]
        return [reason for reason in reasons if reason]

    def state_of(self, name: str) -> dict[str, Any]:
        return self._states[name]

    def state_dict(self) -> dict[str, Any]:
        state = {"states": self._states, "names": self._names, "records": self._records, "last_step": self._last_step}
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state["states"]) != set(self._states):
            raise ValueError(f"saved guards {sorted(state['states'])} are not this trial's {sorted(self._states)}")
        for guard in self.guards:
            if not _is_of_form(state["states"][guard.name], guard.init()):
                raise ValueError(f"guard '{guard.name}': its saved state is another version's; begin the trial anew")
        state = copy.deepcopy(state)
        self._states, self._names = state["states"], state["names"]
        self._records, self._last_step = state["records"], state["last_step"]
        self._find_absent()

    def rebind(self, guards: Sequence[Guard]) -> None:
        """Replaces the guards by the same guards with other parameters and keeps their states. Raises ValueError if the names
        differ."""
        if [guard.name for guard in guards] != [guard.name for guard in self.guards]:
            raise ValueError(f"guards {[guard.name for guard in guards]} are not {[guard.name for guard in self.guards]}")
        self.guards = _adopted(guards)

    def _remember(self, metrics: Collection[str]) -> None:
        """Records metric names: all that a guard requires, and up to MAX_SHOWN_NAMES others for messages."""
        for name in sorted(set(metrics).difference(self._names)):
            is_required = any(is_named(metric, [name]) for absent in self._absent.values() for metric in absent)
            if is_required or len(self._names) < MAX_SHOWN_NAMES:
                self._names.append(name)
        self._find_absent()

    def _find_absent(self) -> None:
        absent = {guard.name: [metric for metric in guard.metrics if not is_named(metric, self._names)] for guard in self.guards}
        self._absent = {name: metrics for name, metrics in absent.items() if metrics}

    def _require(self, where: str, step: float = math.inf) -> None:
        """Raises MissingMetric if a required metric is absent."""
        for guard in self.guards:
            if guard.name in self._absent and step > guard.expected_by:
                saw = ", ".join(sorted(self._names)) or "no metric at all"
                raise MissingMetric(f"guard '{guard.name}': metric '{self._absent[guard.name][0]}' absent from {where}; saw {saw}")


def _adopted(guards: Sequence[Guard]) -> Sequence[Guard]:
    return [guard if isinstance(guard, Guard) else ForeignGuard(guard) for guard in guards]


def _is_of_form(saved: State, fresh: State) -> bool:
    """Whether a saved state has all keys of a fresh state, including the states of a rule's conditions."""
    parts = zip(saved.get("parts", ()), fresh.get("parts", ()), strict=False)
    return set(fresh) <= set(saved) and all(_is_of_form(*pair) for pair in parts)
