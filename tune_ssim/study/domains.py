"""The domains of searched parameters: log-uniform, uniform, and a choice of values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tune_ssim.base.numbers import as_float, is_number, is_same
from tune_ssim.base.validation import Problems, problem, unknown_keys
from tune_ssim.base.yaml_source import describe, short_repr

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

NORM_RATIO = "norm_ratio"  # the one unit besides plain numbers, for a gain: the predicted total_norm relative to the baseline
FORMS = "log_uniform: [lower, upper], uniform: [lower, upper] or choice: [value, …]"


@dataclass(frozen=True)
class Interval:
    """The closed interval from `lower` to `upper`. Raises ValueError, when it is made, for invalid bounds."""

    lower: float
    upper: float
    unit: str | None = None
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        _check_unit(self.unit)
        for side in ("lower", "upper"):
            value = vars(self)[side]
            if not is_number(value):
                raise problem(f"{side} must be a number, got {describe(value)}")
            if not math.isfinite(as_float(value)):
                raise problem(f"{side} must be finite, got {as_float(value):g}")
            object.__setattr__(self, side, float(value))
        if not self.lower < self.upper:
            raise problem(f"lower ({self.lower:g}) must be below upper ({self.upper:g})")

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return self.lower, self.upper

    @property
    def listed(self) -> tuple[float, ...]:
        """The values that the file names: both bounds of a range, or all choices."""
        return self.bounds

    @property
    def upper_values(self) -> tuple[float, ...]:
        """The upper bound of a range, or all choices: the values to try where larger is more."""
        return (self.upper,)

    def __contains__(self, value: Any) -> bool:
        """Whether a value is in the domain, up to rounding."""
        return is_number(value) and (self.lower <= value <= self.upper or any(is_same(value, bound) for bound in self.bounds))

    def clip(self, value: float) -> float:
        """The nearest value in the domain."""
        return min(max(float(value), self.lower), self.upper)

    def at(self, u: float) -> float:
        """The value at the quantile `u` in [0, 1]."""
        raise NotImplementedError

    def grid(self, count: int) -> list[float]:
        """`count` values of a range at even quantiles, bounds included; or all choices."""
        return [self.lower, *(self.at(index / (count - 1)) for index in range(1, count - 1)), self.upper]

    def to_optuna(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.lower, self.upper, log=self.kind == LogUniform.kind)

    def __str__(self) -> str:
        return f"{_unit_words(self.unit)}{self.kind.replace('_', '-')} in [{self.lower:g}, {self.upper:g}]"


@dataclass(frozen=True)
class LogUniform(Interval):
    """Log-uniform: 0 < lower < upper."""

    kind: ClassVar[str] = "log_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lower <= 0:
            raise problem(f"lower must be > 0 on a logarithmic scale, got {self.lower:g}")

    def at(self, u: float) -> float:
        return self.clip(math.exp(math.log(self.lower) + u * (math.log(self.upper) - math.log(self.lower))))


@dataclass(frozen=True)
class Uniform(Interval):
    """Uniform: lower < upper."""

    kind: ClassVar[str] = "uniform"

    def at(self, u: float) -> float:
        return self.lower + u * (self.upper - self.lower)


@dataclass(frozen=True)
class Choice:
    """One of `values`: numbers, text, true or false, without duplicates. The methods are those of `Interval`."""

    values: tuple[Any, ...]
    unit: str | None = None
    kind: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        _check_unit(self.unit)
        if not isinstance(self.values, (list, tuple)):
            raise problem(f"choice must be a list of values, got {describe(self.values)}")
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values:
            raise problem("choice must have at least one value")
        for index, value in enumerate(self.values):
            message = value_problem(value) if value is not None else "must be a single value, got nothing (null)"
            if message:
                raise problem(message)
            if any(is_same(value, other) for other in self.values[:index]):
                raise problem(f"choice has {short_repr(value)} twice")

    @property
    def bounds(self) -> tuple[float, float]:
        return float(min(self.values)), float(max(self.values))

    @property
    def listed(self) -> tuple[Any, ...]:
        return self.values

    @property
    def upper_values(self) -> tuple[Any, ...]:
        return self.values

    def __contains__(self, value: Any) -> bool:
        return any(is_same(value, own) for own in self.values)

    def clip(self, value: Any) -> Any:
        same = [own for own in self.values if is_same(own, value)]
        return same[0] if same else min(self.values, key=lambda own: abs(own - value))

    def at(self, u: float) -> Any:
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]

    def grid(self, count: int) -> list[Any]:
        return list(self.values)

    def to_optuna(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(list(self.values))

    def __str__(self) -> str:
        return f"{_unit_words(self.unit)}one of {', '.join(map(value_text, self.values))}"


Domain = LogUniform | Uniform | Choice
DOMAINS: dict[str, Any] = {kind.kind: kind for kind in (LogUniform, Uniform, Choice)}


def domain_yaml(domain: Domain) -> dict[str, Any]:
    return {**({} if domain.unit is None else {"unit": domain.unit}), domain.kind: list(domain.listed)}


def read_domain(given: Any) -> Domain:
    """A domain as written in a file, e.g. `{log_uniform: [0.1, 30]}`. Raises Problems."""
    if isinstance(given, Domain):
        return given
    if not isinstance(given, Mapping):
        raise problem(f"must say how to search it, {FORMS}; got {describe(given)}")
    Problems(unknown_keys(given, [*DOMAINS, "unit"])).check()
    kinds = [key for key in given if key != "unit"]
    if len(kinds) != 1:
        raise problem(f"must have exactly one of {', '.join(DOMAINS)}; got {', '.join(kinds) or 'none'}")
    (kind,), unit, problems = kinds, given.get("unit"), Problems()
    with problems.at("unit"):
        _check_unit(unit)
    problems.check()
    values = given[kind]
    with problems.at(kind):
        if kind == Choice.kind:
            return Choice(values, unit)
        if not isinstance(values, (list, tuple)) or len(values) != 2:
            raise problem(f"{kind} must be [lower, upper], got {describe(values)}")
        built: Domain = DOMAINS[kind](*values, unit)
        return built
    raise problems


def _unit_words(unit: str | None) -> str:
    return "" if unit is None else "predicted norm ratio, "


def _check_unit(unit: Any) -> None:
    if unit is not None and unit != NORM_RATIO:
        raise problem(f"`unit` must be {NORM_RATIO}, or left out, got {describe(unit)}")


def value_problem(value: Any) -> str | None:
    """The error message for a value that is no setting; None if it is one."""
    if value is not None and not isinstance(value, (int, float, str, bool)):
        return f"must be a single value, got {describe(value)}"
    return "NaN is not a setting" if isinstance(value, float) and math.isnan(value) else None


def value_text(value: Any) -> str:
    return f"{as_float(value):g}" if is_number(value) else str(value)
