"""Rule packs: what experience with one kind of training says about its log, as YAML, loaded into guards.

docs/rules.md describes the keys; tune_ssim/guards/rule_packs/ holds the bundled ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.yaml_source import Loc, Problems, Source, did_you_mean, kind_of, read_yaml, shown
from tune_ssim.guards import EpochMean, FirstValue, MovingMean, Rule, Threshold, Trend
from tune_ssim.guards.condition import Condition
from tune_ssim.guards.violation import ACTIONS

PACK_KEYS = ("name", "description", "known_by", "options", "branches", "rules")
RULE_KEYS = ("when", "action", "sentence", "cause", "remedy", "source", "optional", "for_each")
BRANCH_KEYS = ("loss", "gradient", "has_grad", "trainable", "may_be_flat", "may_rise")
LIMITS = ("above", "below", "outside", "off")
# What a condition may say, by its kind.
CONDITION_KEYS = {
    "value": ("metric", *LIMITS, "by", "over", "records", "steps", "after"),
    "first": ("metric", "of", *LIMITS, "by"),
    "mean": ("metric", "of", *LIMITS, "by", "over", "steps", "after", "from_start"),
    "epoch mean": ("metric", "of", *LIMITS, "by", "epoch", "steps_per_epoch"),
    "trend": ("metric", "trend", "steps", "by", "settled", "after"),
}
ALL_CONDITION_KEYS = tuple(dict.fromkeys(key for keys in CONDITION_KEYS.values() for key in keys))
MAY_BE_MISSING = ("steps_per_epoch",)  # then the log has to say it
MAX_STEP = 2**63 - 1  # as TensorBoard and MLflow store it
PLACE = re.compile(r"\{\w+\}")
TRENDS = ("rising", "not falling")


@dataclass(frozen=True)
class Branch:
    """A part of the loss and how to see that it works: its loss falls, its gradient is there, and all of its parameters get
    one in every micro-batch (SEEDS C5). Names of metrics; empty: the pack does not say. Of `gradient`, the first that a log
    has counts."""

    name: str
    loss: str
    gradient: tuple[str, ...] = ()
    has_grad: str = ""
    trainable: str = ""
    may_be_flat: bool = False  # a fine-tuning starts where it is good: its loss need not fall
    may_rise: bool = False  # a regulariser such as the KL works where it settles, above where it began as well


@dataclass(frozen=True)
class RulePack:
    """`rules` are guards. `known_by`: metrics of which a log must have one for the pack to be about it. `document`: what
    `load_rules` reads the same pack from."""

    name: str
    rules: tuple[Rule, ...]
    description: str = ""
    known_by: tuple[str, ...] = ()
    options: Mapping[str, float | None] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Everything that the rules and branches look at."""
        of_rules = [metric for rule in self.rules for metric in rule.about]
        of_branches = [name for b in self.branches for name in (b.loss, *b.gradient, b.has_grad, b.trainable) if name]
        return tuple(dict.fromkeys([*of_rules, *of_branches]))


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
    """A bundled name (`vae_kl`), a file (`mine.yaml`), or a mapping.

    options: values for the pack's own (`{"ga": 4}`). relative_to: the folder that a relative path starts from; default the
    current one. Raises UserError with a line for each problem.
    """
    if isinstance(pack, Mapping):
        source = Source("rules", dict(pack))
    elif isinstance(pack, Source):
        source = pack
    elif isinstance(pack, (str, Path)) and str(pack).strip():
        source = read_yaml(find_pack(str(pack), Path(relative_to or ".")))
    else:
        raise UserError(f"a rule pack is a name, a path or a mapping, got {kind_of(pack)}")
    return _Parser(source, dict(options or {})).pack()


def find_pack(text: str, folder: Path) -> Path:
    """The file that a name or path means. Raises UserError naming the bundled packs."""
    if text in bundled_packs():
        return bundled_packs_folder() / f"{text}.yaml"
    if text.endswith((".yaml", ".yml")) or "/" in text:
        return folder / Path(text).expanduser()
    raise UserError(f"unknown rule pack {shown(text)}{did_you_mean(text, bundled_packs())} (a path ends in .yaml)")


class _Parser:
    """From a document to a pack; every problem with its line."""

    def __init__(self, source: Source, given: dict[str, float]) -> None:
        self.source, self.given, self.problems = source, given, Problems(source)
        self.options: dict[str, float | None] = {}

    def pack(self) -> RulePack:
        data, problems = self.source.value, self.problems
        if not isinstance(data, Mapping):
            raise UserError(f"{self.source.at()}: a rule pack must be a mapping, got {kind_of(data)}")
        problems.unknown_keys((), data, PACK_KEYS)
        stem = Path(self.source.label).stem
        name = self.text(("name",), data.get("name", stem), least=1)
        if "/" in name or name != name.strip():
            problems.add(("name",), f"must be a plain name, got {shown(name)}")
        self.read_options(data.get("options"))
        known_by = self.names(("known_by",), data.get("known_by", []))
        branches = tuple(self.branches(data.get("branches", {})))
        rules = tuple(self.rules(name, data.get("rules")))
        description = self.text(("description",), data.get("description", ""))
        names = [rule.name for rule in rules]
        for double in sorted({rule for rule in names if names.count(rule) > 1}):
            problems.add(("rules",), f"two rules are called {shown(double)}")
        problems.check()
        document = {**data, "name": name} | ({"options": dict(self.options)} if self.options else {})
        return RulePack(name, rules, description, tuple(known_by), self.options, branches, document)

    def read_options(self, declared: Any) -> None:
        declared = {} if declared is None else declared
        if not isinstance(declared, Mapping):
            self.problems.add(("options",), f"must be a mapping from names to numbers, got {kind_of(declared)}")
            return
        for key, value in declared.items():
            if value is not None and not _is_number(value):
                self.problems.add(("options", key), f"must be a number or null, got {kind_of(value)}")
                value = None
            self.options[key] = value
        for key, value in self.given.items():
            if key not in declared:
                what = did_you_mean(key, declared) if declared else "; it has none"
                raise UserError(f"rule pack {Path(self.source.label).stem}: no option {shown(key)}{what}")
            if not _is_number(value):
                raise UserError(f"rule pack {Path(self.source.label).stem}: option {key}: must be a number, got {kind_of(value)}")
            self.options[key] = value

    def branches(self, data: Any) -> Iterator[Branch]:
        if not isinstance(data, Mapping):
            self.problems.add(("branches",), f"must be a mapping from names to metrics, got {kind_of(data)}")
            return
        for name, metrics in data.items():
            loc: Loc = ("branches", name)
            if not isinstance(metrics, Mapping):
                self.problems.add(loc, f"must be a mapping, got {kind_of(metrics)}")
                continue
            self.problems.unknown_keys(loc, metrics, BRANCH_KEYS)
            if "loss" not in metrics:
                self.problems.add(loc, "loss is missing: the metric that falls when the branch learns")
            elif ("has_grad" in metrics) != ("trainable" in metrics):
                self.problems.add(loc, "has_grad and trainable go together: the coverage is their quotient")
            else:
                texts = {
                    key: self.text((*loc, key), metrics[key], 1) for key in BRANCH_KEYS[:4] if key in metrics and key != "gradient"
                }
                flags = {key: metrics.get(key, False) is True for key in ("may_be_flat", "may_rise")}
                for key in flags:
                    if not isinstance(metrics.get(key, False), bool):
                        self.problems.add((*loc, key), f"must be true or false, got {kind_of(metrics[key])}")
                gradient = tuple(self.names((*loc, "gradient"), metrics.get("gradient", [])))
                may_be_flat, may_rise = flags.values()
                yield Branch(name, gradient=gradient, may_be_flat=may_be_flat, may_rise=may_rise, **texts)

    def names(self, loc: Loc, value: Any) -> list[str]:
        """One name or a list of them."""
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) and name for name in value):
            self.problems.add(loc, f"must be a metric or a list of metrics, got {kind_of(value)}")
            return []
        return list(value)

    def rules(self, pack: str, data: Any) -> Iterator[Rule]:
        if not isinstance(data, Mapping) or not data:
            self.problems.add(("rules",), f"must be a mapping from names to rules, got {kind_of(data)}")
            return
        for name, rule in data.items():
            loc: Loc = ("rules", name)
            if not isinstance(rule, Mapping):
                self.problems.add(loc, f"must be a mapping, got {kind_of(rule)}")
                continue
            self.problems.unknown_keys(loc, rule, RULE_KEYS)
            for place in self.places((*loc, "for_each"), rule.get("for_each", {})):
                yield from self.rule(":".join([f"{pack}/{name}", *place.values()]), loc, rule, place)

    def places(self, loc: Loc, data: Any) -> list[dict[str, str]]:
        """Every combination of what `for_each` lists; one without names where there is none."""
        if not isinstance(data, Mapping):
            self.problems.add(loc, f"must be a mapping from a name to a list, got {kind_of(data)}")
            return []
        for key, values in data.items():
            if not isinstance(key, str):
                self.problems.add((*loc, key), f"must be a name, got {kind_of(key)}")
                return []
            if not isinstance(values, (list, tuple)) or not values or not all(isinstance(value, str) for value in values):
                self.problems.add((*loc, key), f"must be a list of names, got {kind_of(values) if values else 'an empty list'}")
                return []
        return [dict(zip(data, values, strict=True)) for values in product(*data.values())]

    def rule(self, name: str, loc: Loc, data: Mapping[str, Any], place: Mapping[str, str]) -> Iterator[Rule]:
        before = len(self.problems)
        when = data.get("when")
        if isinstance(when, Mapping):
            conditions = [self.condition((*loc, "when"), when, place)]
        elif isinstance(when, (list, tuple)) and when:
            conditions = [self.condition((*loc, "when", index), part, place) for index, part in enumerate(when)]
        else:
            self.problems.add(
                loc, f"when must be a condition or a list of them, got {kind_of(when)}" if when else "when is missing"
            )
            return
        action = data.get("action", "warn")
        if action not in ACTIONS:
            guess = did_you_mean(action, ACTIONS)
            self.problems.add((*loc, "action"), f"must be one of {', '.join(ACTIONS)}, got {kind_of(action)}{guess}")
        optional = data.get("optional", False)
        if not isinstance(optional, bool):
            self.problems.add((*loc, "optional"), f"must be true or false, got {kind_of(optional)}")
        texts = {key: self.text((*loc, key), data.get(key, ""), place=place) for key in ("sentence", "cause", "remedy", "source")}
        if len(self.problems) == before and None not in conditions:
            yield Rule(name, tuple(filter(None, conditions)), action, **texts, optional=optional)

    def condition(self, loc: Loc, data: Any, place: Mapping[str, str]) -> Condition | None:
        if not isinstance(data, Mapping):
            self.problems.add(loc, f"must be a mapping, got {kind_of(data)}")
            return None
        before = len(self.problems)
        self.problems.unknown_keys(loc, data, ALL_CONDITION_KEYS)
        kind = "trend" if "trend" in data else data.get("of", "value")
        if not isinstance(kind, str) or kind not in CONDITION_KEYS:
            self.problems.add((*loc, "of"), f"must be first, mean or epoch mean, got {kind_of(kind)}")
            return None
        for key in data:
            if key in ALL_CONDITION_KEYS and key not in CONDITION_KEYS[kind]:
                what = "a value" if kind == "value" else "a trend" if kind == "trend" else f"the {kind}"
                self.problems.add((*loc, key), f"does not go with {what}, which takes {', '.join(CONDITION_KEYS[kind])}")
        if "metric" not in data:
            self.problems.add(loc, "metric is missing")
        given = {key: self.value((*loc, key), key, data[key], place) for key in data if key in CONDITION_KEYS[kind]}
        given = {key: value for key, value in given.items() if value is not None and key != "of"}
        if kind != "trend":
            given |= self.band(loc, given, data)
            given = {key: value for key, value in given.items() if key not in (*LIMITS, "by")}
        if len(self.problems) > before:
            return None
        if "records" in given:
            given["patience"] = given.pop("records")
        classes = {"value": Threshold, "first": FirstValue, "mean": MovingMean, "epoch mean": EpochMean, "trend": Trend}
        try:
            built: Condition = classes[kind](**given, action="warn")  # the rule's own action counts
        except ValueError as error:
            self.problems.add(loc, str(error))
            return None
        return built

    def value(self, loc: Loc, key: str, value: Any, place: Mapping[str, str]) -> Any:
        if key in ("metric", "over", "of"):
            return self.text(loc, value, 1, place)
        if key == "trend":
            if value not in TRENDS:
                self.problems.add(loc, f"must be one of {', '.join(TRENDS)}, got {kind_of(value)}{did_you_mean(value, TRENDS)}")
            return value
        if key == "from_start":
            if not isinstance(value, bool):
                self.problems.add(loc, f"must be true or false, got {kind_of(value)}")
            return value
        if key == "outside":
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                self.problems.add(loc, f"must be [lower, upper], got {kind_of(value)}")
                return None
            return [self.number((*loc, index), bound) for index, bound in enumerate(value)]
        return self.number(loc, value, whole=key in ("records", "steps", "after", "epoch", "steps_per_epoch"))

    def number(self, loc: Loc, value: Any, whole: bool = False) -> Any:
        """A number, or `$name`: the value of an option."""
        if isinstance(value, str) and value.startswith("$"):
            if value[1:] not in self.options:
                what = did_you_mean(value[1:], self.options) if self.options else "; the pack has no options"
                self.problems.add(loc, f"{value} is no option of the pack{what}")
                return None
            option = value
            value = self.options[value[1:]]
            if value is None and loc[-1] not in MAY_BE_MISSING:
                self.problems.add(loc, f"the option {option} has no value; give one to the pack, or say null here")
            if value is None:
                return None
        if not _is_number(value):
            self.problems.add(loc, f"must be a number, got {kind_of(value)}")
            return None
        try:
            is_finite = math.isfinite(value)
        except OverflowError:
            is_finite = False
        if not is_finite:
            self.problems.add(loc, f"must be a finite number, got {kind_of(value)}")
            return None
        if whole and (value != int(value) or abs(value) > MAX_STEP):
            self.problems.add(loc, f"must be an integer, got {kind_of(value)}")
            return None
        return int(value) if whole else value

    def band(self, loc: Loc, given: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, float]:
        """The bounds within which all is well."""
        limits = [key for key in LIMITS if key in given]
        if not limits and any(key in data for key in LIMITS):
            return {}  # it was no number, which was said
        if len(limits) != 1:
            self.problems.add(loc, f"must have exactly one of {', '.join(LIMITS)} (or a trend); got {', '.join(limits) or 'none'}")
            return {}
        if ("by" in given) != (limits == ["off"]):
            self.problems.add(loc, "off and by go together: off by more than this share, as in `off: 1, by: 0.1`")
            return {}
        value = given[limits[0]]
        if limits == ["off"] and not given["by"] > 0:
            self.problems.add((*loc, "by"), f"must be a share above 0, got {kind_of(given['by'])}")
            return {}
        if limits == ["off"]:
            lower, upper = sorted((value * (1 - given["by"]), value * (1 + given["by"])))
            return {"lower": lower, "upper": upper}
        if limits == ["outside"]:
            return dict(zip(("lower", "upper"), value, strict=True)) if None not in value else {}
        return {"upper" if limits == ["above"] else "lower": value}

    def text(self, loc: Loc, value: Any, least: int = 0, place: Mapping[str, str] | None = None) -> str:
        if not isinstance(value, str) or len(value) < least:
            self.problems.add(loc, f"must be text, got {kind_of(value)}")
            return ""
        for key, word in (place or {}).items():
            value = value.replace("{" + key + "}", word)
        if place is not None and (unknown := PLACE.search(value)):
            names = ", ".join(f"{{{key}}}" for key in place) or "none: the rule has no for_each"
            self.problems.add(loc, f"{unknown[0]} stands for nothing; known are {names}")
        return " ".join(value.split())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
