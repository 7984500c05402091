"""Rule packs: YAML files that describe the known failures of one kind of training, loaded as guards.

docs/rules.md describes the keys; tune_ssim/guards/rule_packs/ has the bundled packs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, PrivateAttr, ValidationInfo, model_validator

from tune_ssim.base.errors import UserError
from tune_ssim.base.numbers import is_number
from tune_ssim.base.validation import Problem, Problems, Section, Text, checked, problem, validate
from tune_ssim.base.yaml_source import Loc, Source, describe, did_you_mean, find_document, read_yaml, short_repr
from tune_ssim.guards import EpochMean, FirstValue, MovingMean, Rule, Threshold, Trend
from tune_ssim.guards.condition import Condition
from tune_ssim.guards.verdict import Action

LIMITS = ("above", "below", "outside", "off")
# Valid keys of a condition, by its kind.
CONDITION_KEYS = {
    "value": ("metric", *LIMITS, "by", "over", "records", "steps", "after"),
    "first": ("metric", "of", *LIMITS, "by"),
    "mean": ("metric", "of", *LIMITS, "by", "over", "steps", "after", "from_start"),
    "epoch mean": ("metric", "of", *LIMITS, "by", "epoch", "steps_per_epoch"),
    "trend": ("metric", "trend", "steps", "by", "settled", "after"),
}
CONDITIONS: dict[str, Any] = {
    "value": Threshold, "first": FirstValue, "mean": MovingMean, "epoch mean": EpochMean, "trend": Trend,
}  # fmt: skip
MAX_STEP = 2**63 - 1  # as TensorBoard and MLflow store it
PLACEHOLDER = re.compile(r"\{\w+\}")


def bundled_packs_folder() -> Path:
    return Path(__file__).resolve().parent / "rule_packs"


def bundled_packs() -> list[str]:
    return sorted(path.stem for path in bundled_packs_folder().glob("*.yaml"))


def load_rules(
    pack: str | Path | Mapping[str, Any] | Source,
    options: Mapping[str, float] | None = None,
    *,
    relative_to: str | Path | None = None,
) -> RulePack:
    """Loads a pack from a bundled name (`vae_kl`), a file (`mine.yaml`), or a mapping.

    options: values for the options of the pack (`{"ga": 4}`). relative_to: the folder for relative paths; default the current
    folder. Raises UserError with one line per problem.
    """
    if isinstance(pack, Mapping):
        source = Source("rules", dict(pack))
    elif isinstance(pack, Source):
        source = pack
    elif isinstance(pack, (str, Path)) and str(pack).strip():
        source = read_yaml(find_document("rule pack", str(pack), Path(relative_to or "."), bundled_packs_folder()))
    else:
        raise UserError(f"a rule pack is a name, a path or a mapping, got {describe(pack)}")
    stem = Path(source.label).stem
    declared = source.value.get("options") or {}
    for key, value in (options or {}).items():
        if not isinstance(declared, Mapping) or key not in declared:
            guess = did_you_mean(key, declared) if declared and isinstance(declared, Mapping) else "; it has none"
            raise UserError(f"rule pack {stem}: no option {short_repr(key)}{guess}")
        if not is_number(value):
            raise UserError(f"rule pack {stem}: option {key}: must be a number, got {describe(value)}")
    document = {"name": stem, **source.value}
    if options:
        document["options"] = {**declared, **options}
    return validate(RulePack, source, document, context={})


def build_pack(document: Mapping[str, Any]) -> RulePack:
    """A pack from a mapping as in a file. Raises ValidationError."""
    return RulePack.model_validate(document, context={})


# ---- the file format ----


def _names(given: Any) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise problem(f"must be a metric or a list of metrics, got {describe(given)}")
    return tuple(names)


def _number(given: Any, info: ValidationInfo) -> Any:
    """A number, or `$name` for the value of an option. Only `steps_per_epoch` may have an option without a value."""
    if isinstance(given, str) and given.startswith("$"):
        options: dict[str, float | None] = info.context["options"]  # type: ignore[index]
        if given[1:] not in options:
            guess = did_you_mean(given[1:], options) if options else "; the pack has no options"
            raise problem(f"{given} is not an option of the pack{guess}")
        if options[given[1:]] is None:
            if info.field_name == "steps_per_epoch":
                return None
            raise problem(f"the option {given} has no value; give the pack one")
        given = options[given[1:]]
    if not is_number(given):
        raise problem(f"must be a number, got {describe(given)}")
    if isinstance(given, float) and not math.isfinite(given):
        raise problem(f"must be a finite number, got {describe(given)}")
    return given


def _whole(given: Any, info: ValidationInfo) -> Any:
    number = _number(given, info)
    if number is not None and (number != int(number) or abs(number) > MAX_STEP):
        raise problem(f"must be an integer, got {describe(number)}")
    return None if number is None else int(number)


def _bounds(given: Any, info: ValidationInfo) -> tuple[Any, ...]:
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        raise problem(f"must be [lower, upper], got {describe(given)}")
    problems, found = Problems(), []
    for index, bound in enumerate(given):
        with problems.at(index):
            found.append(_number(bound, info))
    problems.check()
    return tuple(found)


def _options(given: Any, info: ValidationInfo) -> dict[str, float | None]:
    if given is not None and not isinstance(given, Mapping):
        raise problem(f"must be a mapping from names to numbers, got {describe(given)}")
    options = dict(given or {})
    info.context["options"] = options  # type: ignore[index]
    Problems(
        Problem((key,), f"must be a number or null, got {describe(value)}")
        for key, value in options.items()
        if value is not None and not is_number(value)
    ).check()
    return options


def _when(given: Any, info: ValidationInfo) -> tuple[_Condition, ...]:
    is_one = isinstance(given, Mapping)
    if not is_one and (not isinstance(given, (list, tuple)) or not given):
        raise problem(f"must be a condition or a list of them, got {describe(given)}")
    problems, found = Problems(), []
    for index, condition in enumerate([given] if is_one else given):
        with problems.at(*(() if is_one else (index,))):
            found.append(_Condition.model_validate(condition, context=info.context))
    problems.check()
    return tuple(found)


def _plain_name(given: Any) -> str:
    if not isinstance(given, str) or not given:
        raise problem(f"must be text, got {describe(given)}")
    if "/" in given or given != given.strip():
        raise problem(f"must be a plain name, got {short_repr(given)}")
    return " ".join(given.split())


Metric = Annotated[Text, Field(min_length=1)]
Names = Annotated[tuple[str, ...], PlainValidator(_names)]  # one name or a list of them
Number = Annotated[float | None, PlainValidator(_number)]
Whole = Annotated[int | None, PlainValidator(_whole)]


class _Condition(Section):
    metric: Metric  # its name in the log
    of: Literal["first", "mean", "epoch mean"] | None = None  # what is compared instead of each value
    trend: Literal["rising", "not falling"] | None = None  # judged over `steps`, by more than `by`
    above: Number = None  # holds above it; NaN counts as out of bounds, here and below
    below: Number = None  # holds below it
    outside: Annotated[tuple[float, float] | None, PlainValidator(_bounds)] = None  # [lower, upper]: holds out of this range
    off: Number = None  # holds further from it than the share `by`
    by: Number = None  # a share of `off`, or of the level of a trend (there 0.03 by default)
    over: Metric | None = None  # the quotient metric / over is judged
    records: Whole = None  # in so many records in a row; 1 by default
    steps: Whole = None  # in every record of so many training steps; of a mean or a trend: the window
    after: Whole = None  # from this step on
    epoch: Whole = None  # only the mean of this one
    steps_per_epoch: Whole = None  # for logs without the metric `epoch`
    settled: Number = None  # a plateau below this share of the highest level is no finding
    from_start: bool | None = None  # judges the first window only

    @property
    def kind(self) -> str:
        return "trend" if self.trend is not None else self.of or "value"

    @model_validator(mode="after")
    def _can_be_built(self) -> _Condition:
        keys = CONDITION_KEYS[self.kind]
        what = {"value": "a value", "trend": "a trend"}.get(self.kind, f"the {self.kind}")
        problems = Problems()
        for key in sorted(self.model_fields_set - set(keys)):
            problems.add((key,), f"does not go with {what}, which takes {', '.join(keys)}")
        problems.check()
        self.build({})
        return self

    def build(self, place: Mapping[str, str]) -> Condition:
        """The condition for one combination of `for_each` values."""
        given = {key: value for key in CONDITION_KEYS[self.kind] if (value := getattr(self, key)) is not None}
        if self.kind != "trend":
            given = {key: value for key, value in given.items() if key not in ("of", *LIMITS, "by")} | self._band()
        if "records" in given:
            given["patience"] = given.pop("records")
        given |= {key: _filled(given[key], place) for key in ("metric", "over") if key in given}
        try:
            built: Condition = CONDITIONS[self.kind](**given, action=Action.WARN)  # the rule's action overrides it
        except ValueError as error:
            raise problem(str(error)) from None
        return built

    def _band(self) -> dict[str, float]:
        """The healthy range."""
        limits = [key for key in LIMITS if getattr(self, key) is not None]
        if len(limits) != 1:
            raise problem(f"must have exactly one of {', '.join(LIMITS)} (or a trend); got {', '.join(limits) or 'none'}")
        if (self.by is not None) != (self.off is not None):
            raise problem("off and by go together: off by more than this share, as in `off: 1, by: 0.1`")
        if self.off is not None and self.by is not None:
            if not self.by > 0:
                Problems([Problem(("by",), f"must be a share above 0, got {describe(self.by)}")]).check()
            lower, upper = sorted((self.off * (1 - self.by), self.off * (1 + self.by)))
            return {"lower": lower, "upper": upper}
        if self.outside is not None:
            return dict(zip(("lower", "upper"), self.outside, strict=True))
        return {"upper": self.above} if self.above is not None else {"lower": self.below}  # type: ignore[dict-item]


class _Rule(Section):
    when: Annotated[tuple[_Condition, ...], PlainValidator(_when)]  # a condition, or a list of them that must hold at once
    action: Action = Action.WARN  # in a study: warn, probe (a smoke test), prune the trial, or abort the study
    sentence: Text = ""  # what is wrong
    cause: Text = ""  # the likely one
    remedy: Text = ""  # what to try first
    source: Text = ""  # where the limit comes from
    optional: bool = False  # true: a training without the metric is no error
    # One rule for each value; `{tag}` in metrics and texts becomes the value.
    for_each: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _knows_its_placeholders(self) -> _Rule:
        problems = Problems()
        names = ", ".join(f"{{{key}}}" for key in self.for_each) or "none: the rule has no for_each"
        for loc, text in self._texts():
            unknown = PLACEHOLDER.search(_filled(text, dict.fromkeys(self.for_each, "")))
            if unknown:
                problems.add(loc, f"{unknown[0]} is not a name of for_each; there are {names}")
        problems.check()
        return self

    def _texts(self) -> Iterator[tuple[Loc, str]]:
        for key in ("sentence", "cause", "remedy", "source"):
            yield (key,), getattr(self, key)
        for index, condition in enumerate(self.when):
            where: Loc = ("when", index) if len(self.when) > 1 else ("when",)
            yield (*where, "metric"), condition.metric
            yield (*where, "over"), condition.over or ""

    def rules(self, name: str) -> Iterator[Rule]:
        """One rule for every combination of `for_each` values."""
        for values in product(*self.for_each.values()):
            place = dict(zip(self.for_each, values, strict=True))
            texts = {key: _filled(getattr(self, key), place) for key in ("sentence", "cause", "remedy", "source")}
            when = tuple(condition.build(place) for condition in self.when)
            yield Rule(":".join([name, *values]), when, self.action, **texts, optional=self.optional)


class Branch(Section):
    """A branch of the loss, and the metrics that show whether it works: its loss falls, its gradient is not zero, and all of its
    parameters get a gradient in every micro-batch (SEEDS C5). An empty field means that there is no such metric. The first
    metric of `gradient` that is in the log is used."""

    loss: Metric  # must fall
    gradient: Names = ()  # must not be zero
    has_grad: Metric = ""  # parameters that got a gradient, as GradientTaps counts them
    trainable: Metric = ""  # parameters that should get one
    may_be_flat: bool = False  # the loss of a fine-tuning may be good from the start
    may_rise: bool = False  # a regulariser such as the KL may settle above its start

    @model_validator(mode="after")
    def _has_a_coverage_or_none(self) -> Branch:
        if bool(self.has_grad) != bool(self.trainable):
            raise problem("has_grad and trainable go together: the coverage is their quotient")
        return self

    @property
    def metrics(self) -> list[str]:
        return [name for name in (self.loss, *self.gradient, self.has_grad, self.trainable) if name]


class RulePack(Section):
    """A set of guards. known_by: the pack matches a log that has at least one of these metrics. branches: by name."""

    name: Annotated[str, PlainValidator(_plain_name)]  # default: that of the file
    description: Text = ""  # for people
    known_by: Names = ()
    # Numbers that the rules name as `$name`; a study or `check --set` may change them.
    options: Annotated[dict[str, float | None], PlainValidator(_options)] = Field(default=None, validate_default=True)
    branches: dict[str, Branch] = Field(default_factory=dict)
    forms: Annotated[dict[str, _Rule], Field(min_length=1, alias="rules")]  # by name
    _document: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, given: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(given, cls):
            return given
        pack = checked(given, cls.valid_keys(), handler)
        pack._document = dict(given)
        return pack

    @model_validator(mode="after")
    def _names_are_unique(self) -> RulePack:
        names = [rule.name for rule in self.rules]
        doubles = sorted({name for name in names if names.count(name) > 1})
        Problems(Problem(("rules",), f"two rules are called {short_repr(name)}") for name in doubles).check()
        return self

    @property
    def document(self) -> dict[str, Any]:
        """The mapping from which `load_rules` reads the same pack."""
        return self._document

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(rule for name, form in self.forms.items() for rule in form.rules(f"{self.name}/{name}"))

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of the rules and branches."""
        of_rules = [metric for rule in self.rules for metric in rule.about]
        return tuple(dict.fromkeys([*of_rules, *(metric for branch in self.branches.values() for metric in branch.metrics)]))


def _filled(text: str, place: Mapping[str, str]) -> str:
    """The text with its placeholders replaced by one combination of `for_each` values."""
    for key, word in place.items():
        text = text.replace("{" + key + "}", word)
    return text
