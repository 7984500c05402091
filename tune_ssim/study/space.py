"""Search spaces, as frozen objects that are validated on construction.

The SSIM gradient reaches the parameters only through the decoder's output, so `ssim_loss_weight` and
`ssim_grad_scale` act through their product alone:

    gradient = g_main + gain · g_ssim(max_t),   gain = ssim_loss_weight · ssim_grad_scale

A space may therefore search `gain` with a pinned `ssim_grad_scale`; a task always gets the three numbers. With
`unit: norm_ratio` the gain is given by its effect: the predicted total_norm relative to the baseline (probes.norm_model). The
weight may be a schedule (study.weight_schedule).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter, ValidationInfo, model_validator

from tune_ssim.base.errors import UserError
from tune_ssim.base.numbers import as_float, is_number, is_same
from tune_ssim.base.validation import Document, Problem, Problems, Section, Text, or_empty, problem, unknown_keys, validate
from tune_ssim.base.yaml_source import Loc, Source, describe, did_you_mean, find_document, is_file, read_yaml
from tune_ssim.losses.schedules import SCHEDULES, Schedule
from tune_ssim.study.domains import FORMS, Choice, Domain, domain_yaml, read_domain, value_problem, value_text
from tune_ssim.study.weight_schedule import (
    WEIGHT,
    assembled,
    is_part_of_schedule,
    schedule_of,
    stage_problems,
    weight_problems,
    with_parts,
)

MAX_T, GRAD_SCALE, GAIN = "ssim_loss_max_t", "ssim_grad_scale", "gain"
WARM_UP, GRAD_CLAMP = "ssim_warmup_steps", "ssim_grad_clamp"
TRIPLE = (WEIGHT, MAX_T, GRAD_SCALE)

_AT_LEAST_0 = ("a finite number >= 0", lambda x: 0 <= x < math.inf)
_ABOVE_0 = ("a finite number > 0", lambda x: 0 < x < math.inf)
_TIME = ("above 0 and at most 1 (t = 0 is clean, t = 1 is noise)", lambda x: 0 < x <= 1)

# The settings of the auxiliary losses (note 000 §2); any other name belongs to the task, e.g. lr.
KNOWN = {
    GAIN: _ABOVE_0,
    WEIGHT: _AT_LEAST_0,
    MAX_T: _TIME,
    GRAD_SCALE: _AT_LEAST_0,
    "pixel_loss_weight": _AT_LEAST_0,
    "pixel_loss_max_t": _TIME,
    GRAD_CLAMP: _ABOVE_0,
    WARM_UP: _AT_LEAST_0,
}
OPTIONAL = (GRAD_CLAMP,)  # null switches it off


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(:[A-Za-z0-9][\w.-]*)?")


def _name(given: Any) -> str:
    if not isinstance(given, str) or not _NAME.fullmatch(given):
        raise problem(f"must be letters, digits, '.', '_' or '-', got {describe(given)}")
    return given


def _parameters(given: dict[str, Any]) -> dict[str, Domain]:
    found: dict[str, Domain] = {}
    problems = Problems()
    for name, value in given.items():
        with problems.at(name):
            found[name] = _domain(name, value)
    problems.check()
    return _ordered(found)


def _domain(name: str, given: Any) -> Domain:
    if name == WEIGHT and isinstance(given, Mapping) and set(given) & set(SCHEDULES):
        raise Problems(weight_problems(given))  # a complete one has been taken apart
    domain = read_domain(given)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) and not is_part_of_schedule(name):
        near = near_miss(name)
        guess = f"; did you mean {near!r}?" if near else ""
        raise problem(f"a parameter's name is lower_snake_case, got {name!r}{guess}")
    for value in domain.listed:
        if message := setting_problem(name, value):
            raise problem(message)
    if domain.unit is not None and name != GAIN:
        raise problem(f"`unit: {domain.unit}` is for {GAIN} only: the norm ratio that a gain gives")
    return Choice(tuple(_as_number(name, value) for value in domain.values), domain.unit) if isinstance(domain, Choice) else domain


def _fixed(given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    parameters = (info.data or {}).get("parameters")
    if isinstance(parameters, dict) and GAIN in parameters and GRAD_SCALE not in parameters:
        # A sampled gain becomes a weight, with a gradient scale of 1 unless the space sets another.
        given = {GRAD_SCALE: 1.0, **given}
    problems = Problems()
    for name, value in given.items():
        if name == WEIGHT and isinstance(value, Mapping):
            problems.found += [one.under(name) for one in weight_problems(value)]
        elif message := value_problem(value) or setting_problem(name, value):
            problems.add((name,), message, subject=name)
    problems.check()
    return _numbers(given)


Settings = Annotated[dict[str, Any], or_empty(dict)]


class Stage(Document):
    """One stage of a search: searched parameters, fixed settings, and points that are tried first."""

    name: Annotated[str, PlainValidator(_name)]  # as in `space:stage`
    parameters: Annotated[Settings, AfterValidator(_parameters)] = Field(default_factory=dict)  # by name, a Domain each
    # Settings that are the same in every trial.
    fixed: Annotated[Settings, AfterValidator(_fixed)] = Field(default_factory=dict, validate_default=True)
    # Settings that are tried first, as they are written.
    points: Annotated[tuple[Annotated[dict[str, Any], AfterValidator(_numbers)], ...], or_empty(tuple), Field(strict=False)] = ()
    description: Text = ""  # for people

    @property
    def is_relative(self) -> bool:
        """Whether its gain is given as a predicted norm ratio, which a norm model must convert to a gain."""
        return GAIN in self.parameters and self.parameters[GAIN].unit is not None

    def point_configs(self) -> list[dict[str, Any]]:
        """The points as complete settings for a task: the fixed settings, then the values of the point."""
        return [{**self.fixed, **point} for point in self.points]

    def to_yaml(self) -> dict[str, Any]:
        parameters = {name: domain_yaml(domain) for name, domain in self.parameters.items()}
        fixed = dict(self.fixed)
        if any(map(is_part_of_schedule, parameters)):  # as it was written: all numbers of a schedule in one place
            parameters |= {name: fixed.pop(name) for name in list(fixed) if is_part_of_schedule(name)}
        points = [assembled(point) for point in self.points]
        return {"parameters": assembled(parameters), "fixed": assembled(fixed), "points": points}

    def problems(self, context: Any) -> Iterator[Problem]:
        parameters, fixed = self.parameters or {}, self.fixed or {}
        of_schedule = list(stage_problems(parameters, fixed))
        if self.parameters == {} and not of_schedule:
            yield Problem(("parameters",), f"nothing to search; write e.g. `gain: {{log_uniform: [0.1, 30]}}` ({FORMS})")
        for name in parameters:
            if name in fixed:
                yield Problem(("fixed", name), "is searched and fixed at once")
        yield from of_schedule
        if GAIN in fixed:
            yield Problem(("fixed", GAIN), f"fix {WEIGHT} and {GRAD_SCALE} instead: a gain is searched")
        elif GAIN in parameters:
            for part, settings in (("parameters", parameters), ("fixed", fixed)):
                if WEIGHT in settings:
                    yield Problem((part, WEIGHT), f"cannot be combined with {GAIN}: {GAIN} = {WEIGHT} x {GRAD_SCALE}")
            if GRAD_SCALE in parameters:
                message = f"must be fixed when {GAIN} is searched: only their quotient would change"
                yield Problem(("parameters", GRAD_SCALE), message)
            elif fixed.get(GRAD_SCALE) == 0:
                yield Problem(("fixed", GRAD_SCALE), f"must be > 0 when {GAIN} is searched, got 0")
        if self.parameters is not None and self.fixed is not None:  # else every point would be reported as outside
            for index, point in enumerate(self.points or ()):
                yield from (one.under("points", index) for one in _point_problems(parameters, fixed, point))


class Space(Section):
    """A search space: stages in search order. A space without `stages:` has one stage with the name of the space."""

    name: Annotated[str, PlainValidator(_name)] = "inline"  # default: that of the file
    stages: tuple[Stage, ...]  # a stage opens only if the one before was stable but ineffective (SEEDS A5)
    description: Text = ""  # for people, shown by `tune-ssim spaces`

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, given: Any, handler: Callable[[Any], Any]) -> Any:
        """Reads a space as written in a file: with `stages`, or with the keys of its only stage at the top level."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise problem(f"a space must be a mapping or a name, got {describe(given)}")
        problems = Problems(unknown_keys(given, (*Stage.model_fields, "stages")))
        head = {key: given[key] for key in ("name", "description") if key in given}
        shared: Mapping[str, Any] = {}
        if "stages" in given:
            for key in {"parameters", "points"} & set(given):
                problems.add((key,), "belongs to a stage, since this space has `stages`")
            with problems.at("fixed"):
                shared = _fixed_by_all.validate_python(with_parts({"fixed": given.get("fixed")})["fixed"])
            items = given["stages"]
            if not isinstance(items, (list, tuple)) or not items:
                problems.add(("stages",), f"must be a list of stages, got {describe(items)}")
                items = ()
            problems.found += _twice(items, shared)
            stages = [_with_shared(item, shared) for item in items]
        else:
            own = {key: given[key] for key in ("parameters", "fixed", "points") if key in given}
            stages = [{"name": head.get("name", "inline"), **with_parts(own)}]
        with problems.at():
            built = handler({**head, "stages": tuple(stages)})
        problems.found = [_placed(one, given) for one in problems.found]
        problems.check()
        return built

    @property
    def parameter_names(self) -> list[str]:
        """The names of all parameters that any stage searches."""
        return list(_ordered({name: None for stage in self.stages for name in stage.parameters}))

    @property
    def is_relative(self) -> bool:
        """Whether any stage gives its gain as a predicted norm ratio."""
        return any(stage.is_relative for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """The stage with this name. Raises UserError that lists the stages."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UserError(f"space {self.name!r} has no stage {name!r}{did_you_mean(name, [s.name for s in self.stages])}")

    def only(self, stage: str) -> Space:
        """A copy of the space with only one stage, named `space:stage`."""
        return self.replace(name=f"{self.name}:{stage}", stages=(self.stage(stage),))

    def to_yaml(self) -> dict[str, Any]:
        """The space as a mapping with everything explicit; `load_space` of it gives an equal space."""
        head = {"name": self.name, "description": self.description}
        first = self.stages[0]
        if len(self.stages) == 1 and first.name == self.name and not first.description:
            return {**head, **first.to_yaml()}
        stages = [{"name": s.name, "description": s.description, **s.to_yaml()} for s in self.stages]
        return {**head, "stages": stages}


_fixed_by_all: TypeAdapter[dict[str, Any]] = TypeAdapter(Annotated[Settings, AfterValidator(_fixed)])


def _with_shared(stage: Any, shared: Mapping[str, Any]) -> Any:
    """A stage as in a file, merged with the settings that are fixed for the whole space."""
    if not isinstance(stage, Mapping):
        return stage
    stage = with_parts(stage)
    if not isinstance(stage.get("fixed") or {}, Mapping):
        return stage
    return {**stage, "fixed": {**shared, **(stage.get("fixed") or {})}}


def _twice(stages: Iterable[Any], shared: Mapping[str, Any]) -> Iterator[Problem]:
    """Problems for duplicate stage names, and for settings fixed by both a stage and the space."""
    names: set[Any] = set()
    for index, stage in enumerate(stages):
        is_built = isinstance(stage, Stage)
        name = stage.name if is_built else stage.get("name") if isinstance(stage, Mapping) else None
        if isinstance(name, str) and name in names:
            yield Problem(("stages", index, "name"), f"two stages are called {name!r}", subject="")
        names.add(name if isinstance(name, str) else None)
        fixed = stage.get("fixed") if isinstance(stage, Mapping) else None
        for key in fixed if isinstance(fixed, Mapping) else ():
            if key in shared:
                message = "is fixed for the whole space already"
                yield Problem(("stages", index, "fixed", key), message, subject=str(key))


def _placed(one: Problem, given: Mapping[str, Any]) -> Problem:
    """A problem of a stage with its location in the file, which has the mapping `given`, and the setting's name as subject."""
    if len(one.loc) < 3 or one.loc[0] != "stages":
        return one
    part, *names = inner = one.loc[2:]
    subject = one.subject
    if subject is None and part in ("parameters", "fixed") and names:
        subject = str(names[0])
    elif subject is None and part == "points" and names:
        subject = str(names[1]) if len(names) > 1 else "point"
    is_staged = "stages" in given
    loc: Loc = one.loc if is_staged else inner
    if any(map(is_part_of_schedule, names)):
        stage = given["stages"][one.loc[1]] if is_staged else given
        written = next((key for key in ("fixed", "parameters") if WEIGHT in (stage.get(key) or {})), part)
        loc = (*loc[: -len(names) - 1], written if part == "fixed" else part, *names)
        loc = tuple(chain.from_iterable(str(key).split(".") if is_part_of_schedule(key) else [key] for key in loc))
    return replace(one, loc=loc, subject=subject)


def resolve_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts sampled values to a task's settings: `gain` becomes `ssim_loss_weight` = gain / ssim_grad_scale (default 1), and the
    numbers of a schedule become its mapping.

    Other values are unchanged. Raises UserError if both gain and weight are given, or if the gain or the scale is invalid.
    """
    settings = assembled(values)
    if GAIN not in settings:
        return settings
    if WEIGHT in settings:
        raise UserError(f"{GAIN} and {WEIGHT} cannot both be given: {GAIN} = {WEIGHT} x {GRAD_SCALE}")
    gain, scale = settings.pop(GAIN), settings.setdefault(GRAD_SCALE, 1.0)
    if not is_number(gain) or not 0 <= gain < math.inf:
        raise UserError(f"{GAIN} must be a finite number >= 0, got {describe(gain)}")
    if not is_number(scale) or not 0 < scale < math.inf:
        raise UserError(f"{GRAD_SCALE} must be > 0 with a {GAIN}, got {describe(scale)}")
    settings[WEIGHT] = gain / scale
    return settings


def gain_of(config: Mapping[str, Any]) -> float:
    """The gain of a setting, weight · grad_scale; the default grad_scale is 1, the default weight 0. Of a schedule the largest one;
    NaN of an adaptive one, whose weight is not known before."""
    if GAIN in config:
        return float(config[GAIN])
    schedule = schedule_of(config.get(WEIGHT))
    if schedule is None:
        weight = float(config.get(WEIGHT, 0.0))
    else:
        weight = max(schedule.weights) if isinstance(schedule, Schedule) else math.nan
    return weight * float(config.get(GRAD_SCALE, 1.0))


def setting_problem(name: str, value: Any) -> str | None:
    """The error message for a setting with an unknown name or an invalid value; None if it is valid."""
    near = near_miss(name)
    if near is not None:
        return f"unknown setting {name!r}; did you mean {near!r}?"
    if name not in KNOWN:
        return None
    words, holds = KNOWN[name]
    if name == WEIGHT and isinstance(value, Mapping):
        return "; ".join(one.text() for one in weight_problems(value)) or None
    if value is None and name in OPTIONAL:
        return None
    if not is_number(value):
        return f"must be a number, got {describe(value)}"
    return None if holds(value) else f"must be {words}, got {value_text(value)}"


def near_miss(name: str) -> str | None:
    """The known setting that `name` misspells, or None.

    A misspelling omits words (`max_t`, `ssim_weight`) or has typos (`ssim_los_weight`, `max_T`). `kl_loss_weight` and
    `ms_ssim_loss_weight` are different settings, although their edit distance is smaller.
    """
    if name in KNOWN:
        return None
    words = name.lower().replace("-", "_").split("_")

    def is_misspelled(known: str) -> bool:
        parts = known.split("_")
        if len(words) == len(parts) and all(_alike(word, part) for word, part in zip(words, parts, strict=True)):
            return True
        return "".join(words) == "".join(parts) or (len(words) > 1 and set(words) <= set(parts))

    # Not of the last two: a training may have its own `warmup_steps`, or `grad_clamp`.
    candidates = [known for known in KNOWN if known not in (GRAD_CLAMP, WARM_UP) and is_misspelled(known)]
    return max(candidates, key=lambda known: difflib.SequenceMatcher(None, name, known).ratio(), default=None)


def bundled_spaces_folder() -> Path:
    """The folder of bundled spaces: inside the package in a wheel, at the repository root in a clone or editable install."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "search_spaces"
    return inside if inside.is_dir() else package.parent / "search_spaces"


def bundled_spaces() -> list[str]:
    return sorted(path.stem for path in bundled_spaces_folder().glob("*.yaml"))


def load_space(space: str | Path | Mapping[str, Any] | Source, *, relative_to: str | Path | None = None) -> Space:
    """A bundled name (`wide`), a file (`my.yaml`), either with one stage (`note_v3:conservative`), or a mapping.

    relative_to: the folder for relative paths; default the current folder.
    Raises UserError with one line per problem.
    """
    if isinstance(space, Source):
        return _read(space)
    if isinstance(space, Mapping):
        return _read(Source("space", dict(space)))
    if not isinstance(space, (str, Path)) or not str(space).strip():
        raise UserError(f"a space is a name, a path or a mapping, got {describe(space)}")
    path, stage = find_space(str(space), Path(relative_to or "."))
    loaded = _read(read_yaml(path))
    return loaded if stage is None else loaded.only(stage)


def find_space(text: str, folder: Path) -> tuple[Path, str | None]:
    """Resolves a name or path to a file and an optional stage. Raises UserError that lists the bundled spaces."""
    name, _, stage = text.rpartition(":") if ":" in text and not is_file(folder / text) else (text, "", None)
    if text.endswith(":"):
        raise UserError(f"space {text!r}: no stage after ':'")
    path = find_document("space", name, folder, bundled_spaces_folder())
    if not is_file(path) and not path.is_dir():
        raise UserError(f"{path}: no such file; bundled spaces: {', '.join(bundled_spaces())}")
    return path, stage


def _read(source: Source) -> Space:
    """Reads a space from a file. Its default name is the file's stem."""
    stem = Path(source.label).stem
    return validate(Space, source, {"name": stem if _NAME.fullmatch(stem) else "inline", **source.value})


def _point_problems(parameters: Mapping[str, Domain], fixed: Mapping[str, Any], point: Mapping[str, Any]) -> Iterator[Problem]:
    """Problems of a point. A point is a full triple that is launched as written; it must lie inside the searched ranges."""
    if GAIN in point:
        yield Problem((GAIN,), f"a point gives {WEIGHT} and {GRAD_SCALE}, not their product")
        return
    about_ssim = any(name in KNOWN and not name.startswith("pixel") for name in (*parameters, *fixed))
    is_scheduled = any(map(is_part_of_schedule, (*parameters, *fixed)))
    triple = [name for name in TRIPLE if not (name == WEIGHT and is_scheduled)]
    needed = _ordered({name: None for name in ((*triple, *parameters) if about_ssim else parameters) if name != GAIN})
    missing = [name for name in needed if name not in point]
    if missing:
        yield Problem((), f"{', '.join(missing)} missing; a point gives {', '.join(needed)}")
        return
    wrong = False
    for name, value in point.items():
        message = value_problem(value) or setting_problem(name, value)
        if not message and name not in needed and name not in fixed:
            message = f"is neither searched nor fixed in this space{did_you_mean(name, {**needed, **fixed})}"
        if message:
            wrong = True
            yield Problem((name,), message)
    if wrong:
        return
    # The norm ratio of a point is known only after calibration; the search checks it then.
    if GAIN in parameters and parameters[GAIN].unit is None and gain_of(point) not in parameters[GAIN]:
        yield Problem((), f"gain {gain_of(point):g} (= {WEIGHT} x {GRAD_SCALE}) is outside the space: {parameters[GAIN]}")
    for name, value in point.items():
        if name in parameters and value not in parameters[name]:
            yield Problem((name,), f"{value_text(value)} is outside the space: {parameters[name]}")
        # With a searched gain, a point may split weight and scale in any way: only their product matters.
        elif name in fixed and not (name == GRAD_SCALE and GAIN in parameters) and not is_same(value, fixed[name]):
            yield Problem((name,), f"{value_text(value)} is outside the space: fixed at {value_text(fixed[name])}")


def _numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in canonical order, with known settings as floats."""
    return _ordered({name: _as_number(name, value) for name, value in settings.items()})


def _as_number(name: str, value: Any) -> Any:
    """Known settings as floats, so that `1` and `1.0` are the same setting."""
    return as_float(value) if name in KNOWN and is_number(value) else value


def _alike(word: str, part: str) -> bool:
    return difflib.SequenceMatcher(None, word, part).ratio() >= 0.65  # "weigth", "gradient" for grad; not "kl" for pixel


def _ordered(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in canonical order: known ones first, then by name. So key order in a file does not affect a seeded sampler."""
    names = [name for name in (GAIN, *TRIPLE, *KNOWN) if name in settings]
    return {name: settings[name] for name in dict.fromkeys([*names, *sorted(set(settings) - set(names))])}
