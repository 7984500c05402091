"""What a study optimises: a metric with its direction and reduction, and the margins that other metrics have to keep."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_serializer, model_validator

from tune_ssim.base.validation import Problem, Problems, Section, or_empty, problem
from tune_ssim.base.yaml_source import describe, did_you_mean
from tune_ssim.guards import KeepRule

OBJECTIVE = "delta_ssim"  # the metric that a study maximises by default
DELTA = "delta_"  # prefix of the difference to the baseline on the same seed
# Names of metrics of which less is better, at the end of a word: val_loss, rmse, eval-error/3.
_LESS_IS_BETTER = re.compile(r"(loss|error|fid|lpips|mse|mae|nll|perplexity)(?![a-z])")

Direction = Literal["maximize", "minimize"]
Name = Annotated[str, Field(min_length=1)]


class Keep(Section):
    """How much a held-out metric may get worse than the baseline: exactly one limit, on the difference or on the ratio."""

    min_delta: float | None = None  # lower limit of metric - baseline; -0.3 lets it fall by 0.3
    max_delta: float | None = None  # upper limit of the same, where less is better
    min_ratio: float | None = None  # lower limit of metric / baseline
    max_ratio: float | None = None  # upper limit of the same; 2 lets it double

    @model_validator(mode="after")
    def _exactly_one(self) -> Keep:
        if len(self.limit) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"must have exactly one of {names}; got {', '.join(self.limit) or 'none'}")
        (name, value), *_ = self.limit.items()
        if not math.isfinite(value) or (name.endswith("ratio") and value <= 0):
            message = f"must be a finite number{' > 0' if name.endswith('ratio') else ''}, got {value:g}"
            raise Problems([Problem((name,), message)])
        return self

    @property
    def limit(self) -> dict[str, float]:
        """The limit that is set, e.g. `{"min_delta": -0.3}`."""
        return {name: value for name, value in self if value is not None}

    @model_serializer
    def _as_in_a_file(self) -> dict[str, float]:
        return self.limit


def _default_keep() -> dict[str, Keep]:
    return {
        "psnr": Keep(min_delta=-0.3),  # dB, DESIGN; ruined settings lose 3 and more (FACTS §2)
        "ssim": Keep(min_delta=-0.005),  # about two standard deviations between seeds at high gains (FACTS §6)
        "flow_loss_bins": Keep(max_ratio=2.0),  # DESIGN; smoothing under clipping shows as 0.45 -> 0.8 at low t (FACTS §2)
    }


# An improvement below it is of no use: SSIM is reported with three digits, PSNR with one or two; the deviation between seeds is as
# large (FACTS §6).
SMALLEST_USEFUL = {"ssim": 0.001, "psnr": 0.05}


def _as_tuple(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


class Goal(Section):
    """`maximize` or `minimize` a metric. With `delta_` before its name: the difference to the baseline on the same seed."""

    maximize: Name | None = None  # a metric that is logged or measured at the end; the default objective is delta_ssim
    minimize: Name | None = None  # the same where less is better, e.g. val_loss

    @model_validator(mode="after")
    def _one_direction(self) -> Goal:
        if self.maximize is not None and self.minimize is not None:
            raise ValueError("has both maximize and minimize; several objectives are a list")
        if self.maximize is None and self.minimize is None:
            raise ValueError("must have maximize or minimize")
        return self

    @property
    def name(self) -> str:
        """Of the number by which settings are compared."""
        return self.minimize or self.maximize or OBJECTIVE

    @property
    def direction(self) -> Direction:
        return "maximize" if self.minimize is None else "minimize"

    @property
    def metric(self) -> str:
        """The metric without `delta_`, as the training measures it."""
        return self.name.removeprefix(DELTA)

    @property
    def delta(self) -> str:
        """Name of the metric's difference to the baseline."""
        return DELTA + self.metric

    @property
    def is_delta(self) -> bool:
        return self.name.startswith(DELTA)

    @property
    def warning(self) -> str:
        """Says that less of the maximised metric seems to be better; empty if not."""
        if self.minimize is not None or not _LESS_IS_BETTER.search(self.metric.lower()):
            return ""
        return f"objective: maximize: {self.name}: less of it seems to be better; `minimize: {self.name}` prefers small values"

    def rank(self, value: float) -> float:
        """A sort key, best first. A value that was not measured comes last."""
        return math.inf if math.isnan(value) else value if self.direction == "minimize" else -value

    def missing(self, held_out: Mapping[str, float], names: Sequence[str]) -> str:
        """Why nothing can be compared with a baseline that measured `held_out`; empty if it can. names: of everything it logged."""
        metric, others = self.metric, sorted({*names} - {*held_out})
        if metric not in held_out:
            found = [f"{what} {', '.join(ones)}" for what, ones in (("held-out", sorted(held_out)), ("logged", others)) if ones]
            guess = did_you_mean(metric, [*held_out, *others])
            close = guess if guess.startswith("; did") else ""
            words = f"the baseline did not measure {metric!r}{close}; it measured {'; '.join(found) or 'nothing'}"
            return f"objective: {self.direction}: {self.name}: {words}"
        if not math.isfinite(held_out[metric]):
            return f"objective: {self.direction}: {self.name}: the baseline's {metric} is {held_out[metric]}"
        return ""


class Objective(Goal):
    """What a study optimises: a metric that is measured after the training (held-out) or logged during it.

    min_improvement: the smallest useful improvement over the baseline. A setting counts as effective if its improvement exceeds it,
    and as confirmed if the whole confidence interval does. reduction: how the values that a training logs become one: the last,
    the best, or the mean of the last n. A trial that breaks a `keep` rule is `degraded` and never exported. also: further
    objectives, of held-out metrics, for the Pareto front. In a file, a list is its first objective with the others in `also`."""

    reduction: str | dict[str, int] = "last"
    min_improvement: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # None in studies of earlier versions
    # By metric: {psnr: {min_delta: -0.3}, ssim: {min_delta: -0.005}, flow_loss_bins: {max_ratio: 2}} (DESIGN, FACTS §2, FACTS §6).
    keep: Annotated[dict[str, Keep], or_empty(_default_keep)] = Field(default_factory=_default_keep)
    also: Annotated[tuple[Goal, ...], or_empty(tuple), BeforeValidator(_as_tuple)] = ()

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        is_named = given.get("maximize") is not None or given.get("minimize") is not None
        named = given if is_named else {**given, "maximize": OBJECTIVE}
        metric = str(named.get("maximize") or named.get("minimize")).removeprefix(DELTA)
        return {"min_improvement": SMALLEST_USEFUL.get(metric, 0.0), **named}

    @field_validator("reduction", mode="plain")
    @classmethod
    def _reduction(cls, given: Any) -> Any:
        count = given.get("mean_last") if isinstance(given, Mapping) and len(given) == 1 else None
        if given in ("last", "best") or (isinstance(count, int) and not isinstance(count, bool) and count >= 1):
            return given
        raise ValueError(f"must be last, best or {{mean_last: n}} with an integer n >= 1, got {describe(given)}")

    @model_validator(mode="after")
    def _different_names(self) -> Objective:
        names = [goal.name for goal in self.goals]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"names {twice[0]} twice")
        return self

    @model_serializer
    def _as_in_a_file(self) -> dict[str, Any]:
        reduction = {} if self.reduction == "last" else {"reduction": self.reduction}
        also = {"also": [{goal.direction: goal.name} for goal in self.also]} if self.also else {}
        return {
            self.direction: self.name,
            **reduction,
            "min_improvement": self.min_improvement,
            "keep": {name: rule.limit for name, rule in self.keep.items()},
            **also,
        }

    @classmethod
    def of(cls, name: str, direction: str = "maximize") -> Objective:
        """The objective of a trial's summary, or of an export."""
        return cls(minimize=name) if direction == "minimize" else cls(maximize=name)

    @classmethod
    def read(cls, given: Any) -> Any:
        """A list of objectives as one objective with `also`; anything else unchanged. Raises Problems."""
        if not isinstance(given, (list, tuple)):
            return given
        if not given:
            raise problem("must not be empty")
        problems, first, also = Problems(), cls(), []
        with problems.at(0):
            first = cls.model_validate(given[0])
        for index, goal in enumerate(given[1:], start=1):
            with problems.at(index):
                also.append(Goal.model_validate(goal))
        problems.check()
        return first.replace(also=(*first.also, *also))

    @property
    def goals(self) -> tuple[Goal, ...]:
        """All objectives. The first decides which setting is handed over."""
        return (self, *self.also)

    @property
    def by_more_than(self) -> str:
        """` by more than 0.001`; empty without a smallest useful improvement."""
        return f" by more than {self.min_improvement:g}" if self.min_improvement else ""

    @property
    def rules(self) -> tuple[KeepRule, ...]:
        return tuple(KeepRule(metric, **rule.limit) for metric, rule in self.keep.items())

    def improvement(self, metrics: Mapping[str, float]) -> float:
        """How much better than the baseline a trial with these metrics is, above zero if it is; NaN if that was not measured."""
        delta = metrics.get(self.delta, math.nan)
        return -delta if self.direction == "minimize" else delta

    def is_improved(self, metrics: Mapping[str, float]) -> bool:
        """Whether it is usefully better than the baseline. Also true if the log of the baseline lacks the metric."""
        improvement = self.improvement(metrics)
        return improvement > (self.min_improvement or 0.0) or (math.isnan(improvement) and not self.is_delta)

    # -- of the values that a training logs

    @property
    def n_logged(self) -> int:
        """Values that the reduction needs."""
        return self.reduction["mean_last"] if isinstance(self.reduction, dict) else 1

    def remember(self, logged: Sequence[float]) -> list[float]:
        """Those of the values logged so far that the reduction of all of them depends on."""
        return [self.reduce(logged)] if self.reduction == "best" else list(logged[-self.n_logged :])

    def reduce(self, logged: Sequence[float]) -> float:
        if self.reduction == "best":
            finite = [value for value in logged if math.isfinite(value)]
            return min(finite, key=self.rank, default=math.nan)
        last = logged[-self.n_logged :]
        return sum(last) / len(last)

    def measure(self, held_out: Mapping[str, float], logged: Sequence[float]) -> dict[str, float]:
        """`held_out` with the objective's metric. If it is also logged, the held-out value counts as the last one."""
        if logged and (self.reduction != "last" or self.metric not in held_out):
            return {**held_out, self.metric: self.reduce(logged)}
        return dict(held_out)

    def problem(self, held_out: Mapping[str, float], logged: Sequence[float], names: Sequence[str]) -> str:
        """Why nothing can be compared with a baseline that measured `held_out`; empty if it can. names: of everything it logged."""
        if self.metric in held_out and self.n_logged > 1 and len(logged) < self.n_logged:
            how_often = f"{len(logged)} times" if logged else "never, it is measured once, after the training"
            return f"objective: reduction: mean_last: {self.n_logged}: the baseline logged {self.metric} {how_often}"
        return next(filter(None, (goal.missing(held_out, names) for goal in self.goals)), "")


DEFAULT_OBJECTIVE = Objective()
