"""Guards record by record, without columns: the reference that the folds over tables are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tune_ssim.guards import EpochMean, FirstValue, Guard, MovingMean, NonFinite, Rule, Threshold, Trend, Violation
from tune_ssim.guards.trend import BUFFER
from tune_ssim.records import Record

State = dict[str, Any]


def violations_of(guards: Sequence[Guard], records: Sequence[Record]) -> tuple[list[list[Violation]], dict[str, State]]:
    """The violations of each record that has some, the gravest first; and the guards' states at the end."""
    states = {guard.name: guard.init() for guard in guards}
    found = []
    for record in records:
        of_record = [violation for guard in guards if (violation := step(guard, states[guard.name], record)) is not None]
        found.append(sorted(of_record, key=lambda violation: -violation.action.severity))
    return [violations for violations in found if violations], states


def step(guard: Any, state: State, record: Record) -> Violation | None:
    """Changes `state`."""
    if isinstance(guard, Rule):
        return rule_step(guard, state, record)
    if isinstance(guard, NonFinite | EpochMean):
        return guard._advance(state, record)
    if isinstance(guard, FirstValue):
        return first_value_step(guard, state, record)
    value = measured(record, guard.metric, None if isinstance(guard, Trend) else guard.over)
    if value is None or record.step <= state["last_step"]:
        return None
    if isinstance(guard, Threshold):
        return threshold_step(guard, state, record.step, value)
    return (
        moving_mean_step(guard, state, record.step, value)
        if isinstance(guard, MovingMean)
        else trend_step(guard, state, record, value)
    )


def measured(record: Record, metric: str, over: str | None) -> float | None:
    value = record.values.get(metric)
    if value is None or over is None:
        return value
    below = record.values.get(over)
    if below is None:
        return None
    if below:
        return value / below
    return value if not value or math.isnan(value) else math.copysign(math.inf, value)


def rule_step(rule: Rule, state: State, record: Record) -> Violation | None:
    found = [step(condition, part, record) for condition, part in zip(rule.when, state["parts"], strict=True)]
    if len(found) == 1:
        return rule.finding(state) if found[0] is not None else None
    held, state["holds"] = state["holds"], all(part["holds"] for part in state["parts"])
    return rule.finding(state) if state["holds"] and not held else None


def first_value_step(guard: FirstValue, state: State, record: Record) -> Violation | None:
    value = record.values.get(guard.metric)
    if value is None or state["step"] is not None:
        return None
    state |= {"step": record.step, "value": value, "holds": not guard.lower <= value <= guard.upper}
    return guard.finding(state) if state["holds"] else None


def threshold_step(guard: Threshold, state: State, at: int, value: float) -> Violation | None:
    state |= {"last_step": at, "records": state["records"] + 1}
    if state["first_step"] is None:
        state["first_step"] = at
    if guard.lower <= value <= guard.upper:
        state |= {"outside": 0, "holds": False}
        return None
    state |= {"since": state["since"] if state["outside"] else at, "outside": state["outside"] + 1, "value": value}
    held = state["holds"]
    state["holds"] = held or (state["outside"] >= guard.patience and at - state["since"] + 1 >= guard.steps)
    return guard.finding(state) if state["holds"] and not held else None


def moving_mean_step(guard: MovingMean, state: State, at: int, value: float) -> Violation | None:
    violation = guard._close(state, at) if at >= state["end"] else None
    state |= {"sum": state["sum"] + value, "count": state["count"] + 1, "last_step": at}
    return violation


def trend_step(guard: Trend, state: State, record: Record, value: float) -> Violation | None:
    state["last_step"] = record.step
    if math.isnan(value):
        value, state["nan"] = math.inf, True
    state["values"].append(value)
    closes = record.step >= state["end"] or len(state["values"]) == BUFFER
    return guard._close(state, record.step) if closes else None
