"""Prune when the gradient norm exceeds the pixel-loss baseline's (notes 000 §5.2: "10x and more" is a red flag)."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import Literal

from tune_ssim.base.errors import check_field
from tune_ssim.guards.baseline import Baseline
from tune_ssim.guards.guard import Guard, State
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records import ACTIVE_FRACTION, STEP_SKIPPED, TOTAL_NORM, TOTAL_NORM_MAIN, Record

MIN_WINDOW = 3  # records of a log that has few: the smallest median that a single outlier does not decide


def window_for(records: int, window: int, patience: int) -> int:
    """The window for a run of so many records: `window`, unless the run is too short to be judged by it."""
    return window if records >= window + patience - 1 else min(window, max(MIN_WINDOW, records // 2))


@dataclass(frozen=True)
class RequireTotalNorm(Guard):
    """Stands in for `NormRatio` in a baseline run: there is nothing to compare with yet, but enough total_norm is required.

    needed: records that a trial must have to be judged, if the log does not have every step."""

    needed: int = 0
    name = "norm_ratio"
    metrics = (TOTAL_NORM,)

    def init(self) -> State:
        return {"records": 0, "last_step": 0}

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        if TOTAL_NORM in record.values and record.step > state["last_step"]:
            state = {"records": state["records"] + 1, "last_step": record.step}
        return state, None

    def unjudged(self, state: State) -> str | None:
        records, spacing = state["records"], round(state["last_step"] / max(1, state["records"]))
        if spacing < 2 or records >= self.needed:
            return None
        return (
            f"guard '{self.name}': {TOTAL_NORM} is logged every {spacing} steps, {records} times in {state['last_step']} steps, "
            f"and a trial needs {self.needed} to be judged: log it more often, train longer, or switch the guard off "
            "(norm_ratio: null)"
        )


@dataclass(frozen=True)
class NormRatio(Guard):
    """Limits the median pre-clip `total_norm` of the last `window` active steps, relative to the baseline on the same steps.

    Uses medians because norms are heavy-tailed, and only active steps because with few samples under `max_t` most steps have
    no SSIM gradient. Judges from the first full window on, because the ratio falls again after a collapse.

    If steps cannot be paired (another seed, or a log without the active fraction), it uses the baseline's median over the same
    range of steps, or over all steps if the baseline logged fewer than `window` steps in that range. The message then says
    "unpaired".
    """

    limit: float = 10.0  # note 000 §5.2
    window: int = 10  # active steps; FACTS §1: tails dominate the mean, but not the median of >= 10
    patience: int = 2  # consecutive windows (one per active step) above the limit; one outlier batch is not evidence
    on_excess: Literal["auto", "prune", "probe", "warn"] = "auto"  # auto: probe under gradient clipping, else prune
    baseline: Baseline | None = field(default=None, repr=False)
    seed: int | None = None  # the trial's seed; selects the baseline run with the same batches
    clipped: bool = False  # the training clips its gradient, so a high norm alone is not evidence of harm

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by the study's loader)
    name = "norm_ratio"
    metrics = (TOTAL_NORM,)

    def __post_init__(self) -> None:
        check_field(math.isfinite(self.limit) and self.limit > 1, "limit", "must be a finite number above 1", self.limit)
        check_field(self.window >= 1, "window", "must be >= 1 active steps", self.window)
        check_field(self.patience >= 1, "patience", "must be >= 1", self.patience)
        is_known = self.on_excess in ("auto", "prune", "probe", "warn")
        check_field(is_known, "on_excess", "must be auto, prune, probe or warn", self.on_excess)

    def bind(self, baseline: Baseline, seed: int | None, clipped: bool) -> NormRatio:
        """The guard of a trial. The window follows a log that does not have every step."""
        bound = replace(self, baseline=baseline, seed=seed, clipped=clipped)
        steps, _, _ = bound._finite[TOTAL_NORM]
        is_sparse = bool(steps) and steps[-1] >= 2 * len(steps)
        return replace(bound, window=window_for(len(steps), self.window, self.patience)) if is_sparse else bound

    @property
    def required(self) -> RequireTotalNorm:
        """The guard of the baseline's own run."""
        return RequireTotalNorm(min(self.window, MIN_WINDOW) + self.patience - 1)

    @property
    def action(self) -> Action:
        if self.on_excess == "auto":
            return Action.PROBE if self.clipped else Action.PRUNE
        return Action(self.on_excess)

    def init(self) -> State:
        return {
            "window": [], "activity_known": False, "excess": 0, "active_steps": 0, "wait": 0,
            "max_ratio": None, "max_ratio_main": None,
        }  # fmt: skip

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        norm = record.values.get(TOTAL_NORM)
        if norm is None or record.values.get(STEP_SKIPPED) or record.values.get(ACTIVE_FRACTION, 1.0) <= 0:
            return state, None
        if state["window"] and record.step <= state["window"][-1][0]:
            return state, None  # a step that is logged twice counts once
        window = [*state["window"], [record.step, norm if not math.isnan(norm) else math.inf]][-self.window :]
        state = {
            **state, "window": window, "activity_known": ACTIVE_FRACTION in record.values,
            "active_steps": state["active_steps"] + 1, "wait": max(0, state["wait"] - 1),
        }  # fmt: skip
        if len(window) < self.window or self.baseline is None:
            return state, None

        ratio, paired = self._ratio(state, TOTAL_NORM)
        ratio_main, _ = self._ratio(state, TOTAL_NORM_MAIN)
        state["max_ratio"] = _largest(state["max_ratio"], ratio)
        state["max_ratio_main"] = _largest(state["max_ratio_main"], ratio_main)
        state["excess"] = state["excess"] + 1 if ratio is not None and ratio > self.limit else 0
        if ratio is None or state["excess"] < self.patience or state["wait"]:
            return state, None
        # After a warning, or a probe that found nothing, wait a full window before firing again.
        state["wait"] = self.window
        main = "" if ratio_main is None else f", {ratio_main:.3g}x the main loss alone"
        return state, Violation(
            guard=self.name,
            step=record.step,
            metric=TOTAL_NORM,
            value=ratio,
            limit=self.limit,
            action=self.action,
            sentence=(
                f"total_norm is {ratio:.3g}x the baseline's (limit {self.limit:g}; "
                f"{'paired' if paired else 'unpaired'} median of {len(window)} active steps "
                f"up to step {record.step}{main})"
            ),
            remedy="lower the gain (ssim_loss_weight x ssim_grad_scale) or ssim_loss_max_t",
        )

    def unjudged(self, state: State) -> str | None:
        if self.baseline is None:
            return f"guard '{self.name}' has no baseline to compare with"
        needed = self.window + self.patience - 1  # the minimum to fire
        if state["active_steps"] < needed:
            return (
                f"guard '{self.name}' saw {state['active_steps']} active steps and needs {needed}: "
                "train longer, raise ssim_loss_max_t or the batch size"
            )
        if state["max_ratio"] is None:
            return f"guard '{self.name}': the baseline has no {TOTAL_NORM} above zero to compare with"
        return None

    def summary(self, state: State) -> dict[str, float]:
        """`norm_ratio_max`, and `norm_ratio_main_max` if the baseline measured it."""
        found = {"norm_ratio_max": state["max_ratio"], "norm_ratio_main_max": state["max_ratio_main"]}
        return {name: value for name, value in found.items() if value is not None}

    def current(self, state: State) -> float | None:
        """The ratio of the latest window, for display."""
        if self.baseline is None or len(state["window"]) < self.window:
            return None
        return self._ratio(state, TOTAL_NORM)[0]

    @cached_property
    def _finite(self) -> dict[str, tuple[list[int], list[float], float]]:
        """metric → (steps, finite norms, their median or 0). Cached, so that a long baseline is sorted only once."""
        assert self.baseline is not None
        found = {}
        for metric in (TOTAL_NORM, TOTAL_NORM_MAIN):
            series = self.baseline.reference(self.seed).series.get(metric, {})
            steps = sorted(step for step, norm in series.items() if math.isfinite(norm))
            norms = [series[step] for step in steps]
            found[metric] = steps, norms, median(norms) if norms else 0.0
        return found

    def _ratio(self, state: State, metric: str) -> tuple[float | None, bool]:
        """The median norm of the window relative to the baseline's median of `metric`, and whether the steps are paired."""
        assert self.baseline is not None
        window = state["window"]
        run = self.baseline.reference(self.seed)
        series = run.series.get(metric, {})
        shared = [(norm, series[step]) for step, norm in window if math.isfinite(series.get(step, math.nan))]
        is_paired = state["activity_known"] and run.seed == self.seed and len(shared) >= 0.8 * len(window)
        if is_paired:
            above, below = median(norm for norm, _ in shared), median(norm for _, norm in shared)
        else:
            steps, norms, of_all = self._finite[metric]
            near = norms[bisect_left(steps, window[0][0]) : bisect_right(steps, window[-1][0])]
            above, below = median(norm for _, norm in window), median(near) if len(near) >= len(window) else of_all
        return (above / below if below > 0 else None), is_paired


def _largest(one: float | None, other: float | None) -> float | None:
    values = [value for value in (one, other) if value is not None]
    return max(values) if values else None
