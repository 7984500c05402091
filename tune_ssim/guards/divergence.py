"""Prune when the loss has diverged: it is finite, and far above where it began and above the baseline's."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median

from tune_ssim.base.errors import check_field
from tune_ssim.guards.baseline import Baseline
from tune_ssim.guards.guard import Found, Guard, State
from tune_ssim.guards.norm_ratio import window_for
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records import LOSS, STEP_SKIPPED, Record
from tune_ssim.records.record_table import Column, Table

NO_SCALE = 0.01  # of the baseline's own fall: a smaller difference does not count, since a loss near zero has no scale


@dataclass(frozen=True)
class Divergence(Guard):
    """Limits the median `loss` of the last `window` records, relative to the larger of the baseline's first loss and its median
    over the same steps.

    Where the trial's loss has other terms than the baseline's (`has_other_terms`: another weight of an auxiliary loss), its own
    first loss is the reference instead, times the rise of the baseline's loss since its first. Without a baseline, in a baseline
    run and in a log, the reference is the median of its own first `window` losses, if that is positive."""

    limit: float = 10.0  # as for the norm (note 000 §5.2) and the flow loss of a collapsed model (FACTS §2)
    window: int = 10  # records; FACTS §1: medians of >= 10
    patience: int = 2  # consecutive windows above the limit
    max_end_ratio: float | None = 2.0  # of the last window to the baseline's; DESIGN: the margin of flow_loss_bins
    baseline: Baseline | None = field(default=None, repr=False)
    seed: int | None = None  # the trial's seed; selects the baseline run with the same batches
    has_other_terms: bool = False

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by the study's loader)
    name = "divergence"
    metrics = ()  # a training that logs no loss is not judged by it, and its verdict does not list it

    def __post_init__(self) -> None:
        check_field(math.isfinite(self.limit) and self.limit > 1, "limit", "must be a finite number above 1", self.limit)
        check_field(self.window >= 1, "window", "must be >= 1 records", self.window)
        check_field(self.patience >= 1, "patience", "must be >= 1", self.patience)
        is_ratio = self.max_end_ratio is None or self.max_end_ratio > 1
        check_field(is_ratio, "max_end_ratio", "must be above 1 or null", self.max_end_ratio)

    def bind(self, baseline: Baseline, seed: int | None, has_other_terms: bool) -> Divergence:
        bound = replace(self, baseline=baseline, seed=seed, has_other_terms=has_other_terms)
        return replace(bound, window=window_for(len(bound._series[0]), self.window, self.patience))

    def init(self) -> State:
        """early: the first losses, of which the median is the reference where there is no baseline."""
        return {"first": None, "early": [], "window": [], "excess": 0, "max_ratio": None}

    def fold(self, state: State, table: Table) -> list[Found]:
        column = table.column(LOSS)
        if column is None:
            return []
        begin = column.rows[0] + 2 * self.window
        found = super().fold(state, table[:begin])
        rest = table[begin:]
        column = rest.column(LOSS)
        if column is not None and self._is_calm(state, rest, column):
            newest = zip(column.steps[-self.window :], column.values[-self.window :], strict=True)
            state["window"] = [*state["window"], *map(list, newest)][-self.window :]
            return found
        return [*found, *((begin + row, violation) for row, violation in super().fold(state, rest))]

    def _is_calm(self, state: State, table: Table, column: Column) -> bool:
        """Whether no loss in a later part of a log is above the limit, so that no window is."""
        reference = None if self.baseline is not None else self._reference(state)
        if reference is None or STEP_SKIPPED in table.metrics or not column.all_finite or state["excess"]:
            return False
        if not state["window"] or column.steps[0] <= state["window"][-1][0]:
            return False
        return max(max(column.values), *(loss for _, loss in state["window"])) <= self.limit * reference

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        loss = record.values.get(LOSS)
        is_repeated = bool(state["window"]) and record.step <= state["window"][-1][0]
        if loss is None or not math.isfinite(loss) or record.values.get(STEP_SKIPPED) or is_repeated:
            return state, None
        window = [*state["window"], [record.step, loss]][-self.window :]
        early = state["early"] if len(state["early"]) >= self.window else [*state["early"], loss]
        state = {**state, "window": window, "early": early, "first": loss if state["first"] is None else state["first"]}
        reference = self._reference(state)
        if len(window) < self.window or reference is None:
            return state, None
        now = median(value for _, value in window)
        ratio = 1 + (now - reference) / abs(reference)  # of positive losses their quotient
        is_excess = ratio > self.limit
        state["excess"] = state["excess"] + 1 if is_excess else 0
        if self.baseline is not None:
            state["max_ratio"] = max(ratio, state["max_ratio"] or -math.inf)
        if state["excess"] < self.patience:
            return state, None
        what = "its own first" if self.has_other_terms else "the baseline's"
        if self.baseline is None:
            what = f"that of its first {self.window} records"
        over = f"median of {len(window)} records up to step {record.step}"
        sentence = f"loss is {now:.4g}, {ratio:.3g}x {what} (limit {self.limit:g}; {over})"
        cause, remedy = "steps that are too large: the training has diverged", "lower the learning rate, or clip the gradient"
        return state, Violation(self.name, record.step, LOSS, ratio, self.limit, Action.PRUNE, sentence, remedy, cause)

    def end_ratio(self, state: State) -> float | None:
        """The last window's median relative to the baseline's over the same steps; None if they cannot be compared."""
        _, losses = self._series
        if self.has_other_terms or not state["window"] or not losses:
            return None
        now, below = median(value for _, value in state["window"]), self._median_near(state["window"])
        if now - below <= NO_SCALE * abs(losses[0] - below):
            return min(1.0, now / below) if below > 0 else 1.0
        return 1 + (now - below) / abs(below) if below else math.inf

    def summary(self, state: State) -> dict[str, float]:
        """`loss_ratio_max`, and `loss_ratio_end`: see `end_ratio`."""
        found = {"loss_ratio_max": state["max_ratio"], "loss_ratio_end": self.end_ratio(state)}
        return {name: value for name, value in found.items() if value is not None}

    @cached_property
    def _series(self) -> tuple[list[int], list[float]]:
        """Steps and losses of the baseline."""
        series = self.baseline.reference(self.seed).series.get(LOSS, {}) if self.baseline is not None else {}
        finite = sorted((step, loss) for step, loss in series.items() if math.isfinite(loss))
        return [step for step, _ in finite], [loss for _, loss in finite]

    def _reference(self, state: State) -> float | None:
        if self.baseline is None:
            start = median(state["early"]) if len(state["early"]) >= self.window else 0.0
            return start if start > 0 else None
        _, losses = self._series
        if not losses:
            return None
        near = self._median_near(state["window"])
        if not self.has_other_terms:
            return max(losses[0], near) or None
        rise = max(1.0, near / losses[0]) if losses[0] > 0 else 1.0
        return state["first"] * rise if state["first"] > 0 else None

    def _median_near(self, window: list[list[float]]) -> float:
        """The baseline's median over the steps of the window, or its last loss before them."""
        steps, losses = self._series
        begin, end = bisect_left(steps, window[0][0]), bisect_right(steps, window[-1][0])
        return median(losses[begin:end]) if begin < end else losses[max(0, begin - 1)]
