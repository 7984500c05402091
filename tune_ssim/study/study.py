"""The study: what is trained, what is searched, and how trials are judged, as one frozen object that is read from a file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationInfo,
)

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import check_name
from tune_ssim.base.validation import (
    Document,
    Problem,
    Problems,
    build_dataclass,
    or_empty,
    plain_mapping,
    problem,
    unknown_keys,
    user_error,
    validate,
)
from tune_ssim.base.yaml_source import Loc, Source, describe, did_you_mean, dump_yaml, find_document, read_yaml, short_repr
from tune_ssim.guards import Divergence, Guard, NonFinite, NormRatio, SmokeTest, Threshold
from tune_ssim.guards.rule_pack import RulePack, build_pack, load_rules
from tune_ssim.guards.verdict import Action
from tune_ssim.study.command_spec import CommandSpec
from tune_ssim.study.consistency import missing_files, part_problems, part_warnings
from tune_ssim.study.objective import Objective
from tune_ssim.study.sections import (
    Asha,
    BaselineRuns,
    CalibrationOptions,
    Confirm,
    Preflight,
    Resources,
    Search,
    Tracking,
)
from tune_ssim.study.space import GAIN, GRAD_SCALE, MAX_T, WEIGHT, Space, find_space, load_space, setting_problem
from tune_ssim.study.weight_schedule import is_part_of_schedule, weight_problems

BUILT_IN_TASKS = {
    "fundus_sr": "tune_ssim.tasks.fundus_sr:FundusSR",
    "flow_dino_kl": "tune_ssim.tasks.flow_dino_kl:FlowDinoKL",
    "two_stage_vlm": "tune_ssim.tasks.two_stage_vlm:TwoStageVLM",
    "vae_kl": "tune_ssim.tasks.vae_kl:VAEKL",
}
_TASK_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
PATHS = {"fundus_sr": ("data", "vae", "weights")}  # keys of a built-in task's task_config that name a file or folder
DEFAULT_STUDY = "fundus_ssim"
DEFAULT_SPACE = "wide"
DEFAULT_STEPS = 200  # FACTS §2: by then ruinous gains have ruined the model, and safe ones show an improvement


def default_guards() -> dict[str, Guard]:
    """All guards that work without limits from the user."""
    guards: list[Guard] = [NormRatio(), SmokeTest(), NonFinite(), Divergence()]
    return {guard.name: guard for guard in guards}


# ---- each part as a file may have it ----


@dataclass(frozen=True)
class _File:
    """The origin of a study. folder: base of its relative paths; the current folder for a mapping. is_launch: the study will be
    launched from this machine."""

    source: Source
    folder: Path
    is_launch: bool = False

    def path(self, text: str) -> str:
        return str((self.folder / Path(text).expanduser()).absolute())


S = TypeVar("S")
OrDefaults = Annotated[S, or_empty(dict)]


def _study_name(given: Any) -> str:
    if not _is_name(given):
        words = "letters, digits, '.', '_' and '-' only, at most 100, beginning with a letter or digit"
        raise problem(f"{words}; got {describe(given)}")
    return given


def _count(given: Any, or_null: str = "") -> int:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise problem(f"must be an integer >= 1{or_null}, got {describe(given)}")
    return given


def _count_or_null(given: Any) -> int | None:
    return None if given is None else _count(given, " or null")


def _task(given: Any) -> str | CommandSpec:
    if isinstance(given, (Mapping, CommandSpec)):
        return CommandSpec.model_validate(given)
    if isinstance(given, str) and (given in BUILT_IN_TASKS or _TASK_PATH.fullmatch(given)):
        return given
    guess = did_you_mean(given, BUILT_IN_TASKS) if isinstance(given, str) else ""
    raise problem(f"unknown task {short_repr(given)}{guess} (your own: my_pkg.train:MyTask, or a command)")


def _task_text(task: str | CommandSpec) -> str | dict[str, Any]:
    return task.model_dump() if isinstance(task, CommandSpec) else task


def _task_config(given: Any, info: ValidationInfo) -> dict[str, Any]:
    config = {**_default_task_config(info.data), **plain_mapping(given)}
    problems = Problems(_setting_problems(config))
    with problems.at("steps"):
        if "steps" in config:
            _count(config["steps"])
    problems.check()
    file: _File | None = info.context
    return config if file is None else _with_paths(config, file, info.data.get("task"))


def _default_task_config(done: Mapping[str, Any]) -> dict[str, Any]:
    return {} if isinstance(done.get("task"), CommandSpec) else {"steps": DEFAULT_STEPS}


def _with_paths(config: dict[str, Any], file: _File, task: Any) -> dict[str, Any]:
    """Makes paths absolute, because workers run in other folders. Relative paths start from the study file.

    Paths are the values of PATHS; for a user-defined task, every value that starts with `./`, `../` or `~/`."""
    named = PATHS.get(task, ()) if isinstance(task, str) else ()

    def absolute(key: str, value: Any) -> Any:
        if not isinstance(value, str) or not value or "\0" in value:
            return value
        is_path = key in named if named else value.startswith(("./", "../", "~/"))
        return os.path.normpath(file.path(value)) if is_path else value

    return {key: absolute(key, value) for key, value in config.items()}


def _setting_problems(settings: Mapping[str, Any]) -> Iterator[Problem]:
    for key, value in settings.items():
        if key == WEIGHT and isinstance(value, Mapping):
            yield from (one.under(key) for one in weight_problems(value))
        elif message := "belongs in a space" if key == GAIN else setting_problem(key, value):
            yield Problem((key,), message)


def _usual_baseline(done: dict[str, Any]) -> BaselineRuns:
    """The default baseline: only the pixel loss; for a command without a pixel loss, no auxiliary loss."""
    usual, task = BaselineRuns(), done.get("task")
    if not isinstance(task, CommandSpec):
        return usual
    known = task.referenced_settings()
    return usual.replace(overrides={name: value for name, value in usual.overrides.items() if name in known})


def _baseline(given: Any, info: ValidationInfo) -> BaselineRuns:
    """Reads a baseline as in a file: the settings that differ from `task_config`, plus `seeds` and `log`."""
    if given is None:
        raise problem("every verdict compares with a baseline; leave the key out for the pixel loss only")
    if isinstance(given, BaselineRuns):
        Problems(_baseline_problems(given.overrides)).check()
        return given
    overrides = plain_mapping(given)
    parts = {key: overrides.pop(key) for key in ("seeds", "log") if key in overrides}
    log = parts.get("log")
    if log is not None:
        log = {"file": log} if isinstance(log, str) else log
        if isinstance(log, Mapping) and isinstance(log.get("file"), str) and log["file"] and info.context is not None:
            log = {**log, "file": info.context.path(log["file"])}
        parts["log"] = log
    problems = Problems(_baseline_problems(overrides))
    with problems.at():
        built = BaselineRuns.model_validate({**parts, "overrides": overrides})
    problems.check()
    return built


def _flat_baseline(baseline: BaselineRuns) -> dict[str, Any]:
    return {**baseline.overrides, **baseline.model_dump(include={"seeds", "log"})}


def _baseline_problems(overrides: Mapping[str, Any]) -> Iterator[Problem]:
    yield from _setting_problems(overrides)
    if overrides.get(WEIGHT):
        yield Problem((WEIGHT,), f"the baseline has no SSIM loss, got {describe(overrides[WEIGHT])}")


def _space(given: Any, info: ValidationInfo) -> Space:
    """Reads a space: a mapping, a name or a path."""
    if isinstance(given, (Mapping, Space)):
        return Space.model_validate(given)
    if not isinstance(given, str) or not given.strip():
        raise problem(f"must be a name, a path or a mapping, got {describe(given)}")
    file: _File | None = info.context
    folder = file.folder if file is not None and not file.source.option_at(("space",)) else Path()
    try:
        path, stage = find_space(given, folder)
    except UserError as error:
        raise problem(str(error)) from None
    try:
        space = load_space(path)
    except UserError as error:
        raise Problems(Problem((), line, about="line") for line in str(error).splitlines()) from None
    try:
        return space if stage is None else space.only(stage)
    except UserError as error:
        raise problem(str(error)) from None


def _scheduler(given: Any, info: ValidationInfo) -> Asha | None:
    """Reads `{asha: {...}}`; max_steps defaults to the steps of a trial."""
    if given is None or isinstance(given, Asha):
        return given
    if not isinstance(given, Mapping):
        raise problem(f"must be null or asha: {{grace_steps: 25}}, got {describe(given)}")
    problems = Problems(unknown_keys(given, ["asha"]))
    asha, built = given.get("asha", {}), None
    config = info.data.get("task_config")
    if (asha is None or isinstance(asha, Mapping)) and isinstance(config, dict):
        asha = {**({"max_steps": config["steps"]} if "steps" in config else {}), **(asha or {})}
    if "asha" in given:
        with problems.at("asha"):
            built = Asha.model_validate(asha)
    problems.check()
    return built


def _guards(given: Any, info: ValidationInfo) -> dict[str, Guard]:
    """Reads guards as in a file: options by guard name, null to turn one off, and a list of thresholds."""
    if not isinstance(given, Mapping):
        raise problem(f"must be a mapping, got {describe(given)}; `norm_ratio: null` in it switches one off")
    if info.context is None:
        return dict(given)
    problems = Problems(unknown_keys(given, [*_GUARDS, "threshold"]))
    guards: dict[str, Guard] = {}
    for name, (guard, names) in _GUARDS.items():
        options = given.get(name, {})
        if options is not None:
            with problems.at(name):
                guards[name] = build_dataclass(guard, options, names)
    thresholds = given.get("threshold") or []
    if not isinstance(thresholds, (list, tuple)):
        problems.add(("threshold",), f"must be a list, got {describe(thresholds)}")
        thresholds = []
    for index, options in enumerate(thresholds):
        with problems.at("threshold", index):
            threshold = build_dataclass(Threshold, options, _THRESHOLD)
            if threshold.name in guards:
                raise problem(f"there is a threshold for {threshold.metric!r} already")
            guards[threshold.name] = threshold
    problems.check()
    return guards


def _guard_options(guards: dict[str, Any]) -> dict[str, Any]:
    def options(guard: Any, names: tuple[str, ...]) -> dict[str, Any]:
        values = {name: getattr(guard, name) for name in names}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: value.value if isinstance(value, Action) else value for name, value in plain.items()}

    found: dict[str, Any] = {name: options(guards[name], names) if name in guards else None for name, (_, names) in _GUARDS.items()}
    thresholds = [guards[name] for name in sorted(guards) if isinstance(guards[name], Threshold)]
    return {**found, "threshold": [options(guard, _THRESHOLD) for guard in thresholds]}


def _rules(given: Any, info: ValidationInfo) -> tuple[RulePack, ...]:
    """Reads rule packs: each a name, a path or a mapping; `{pack: name, options: {...}}` sets its options."""
    if given is not None and not isinstance(given, (list, tuple)):
        raise problem(f"must be a list of rule packs, got {describe(given)}")
    packs: list[RulePack] = []
    problems = Problems()
    for index, entry in enumerate(given or ()):
        with problems.at(index):
            packs.append(entry if isinstance(entry, RulePack) else _pack(entry, info.context))
    names = [pack.name for pack in packs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.add((), f"there are two rule packs named {name!r}")
    problems.check()
    return tuple(packs)


def _pack(entry: Any, file: _File | None) -> RulePack:
    options: Mapping[str, Any] = {}
    if isinstance(entry, Mapping) and "pack" not in entry:
        stem = {} if file is None else {"name": Path(file.source.label).stem}
        return build_pack({**stem, **entry})
    if isinstance(entry, Mapping):
        Problems(unknown_keys(entry, ("pack", "options"))).check()
        entry, options = entry["pack"], entry.get("options") or {}
        if not isinstance(options, Mapping) or not isinstance(entry, str):
            raise problem("must be {pack: name or path, options: {name: number}}")
    if not isinstance(entry, str) or not entry.strip():
        raise problem(f"must be a name, a path or a mapping, got {describe(entry)}")
    try:
        return load_rules(entry, options, relative_to=None if file is None else file.folder)
    except UserError as error:
        raise problem(str(error), subject="") from None


def _calibration(given: Any, info: ValidationInfo) -> Any:
    """`update_off` is another name for `disable_update`. Without it, the updates of a command are held off from outside."""
    if not isinstance(given, Mapping):
        return given
    if "update_off" in given:
        if "disable_update" in given:
            raise problem("has both update_off and disable_update, which are one option")
        given = {**{key: value for key, value in given.items() if key != "update_off"}, "disable_update": given["update_off"]}
    return {"disable_update": {}, **given} if isinstance(info.data.get("task"), CommandSpec) else given


def _default_calibration(done: Mapping[str, Any]) -> CalibrationOptions:
    return CalibrationOptions(disable_update={}) if isinstance(done.get("task"), CommandSpec) else CalibrationOptions()


def _import_path(given: Any, info: ValidationInfo) -> str | None:
    """Makes the import path absolute, so that workers find it. The default is the study file's folder for a user-defined task,
    else None."""
    file: _File | None = info.context
    task = info.data.get("task")
    if given is None:
        if file is None or not file.source.lines or (isinstance(task, str) and task in BUILT_IN_TASKS):
            return None
        return str(file.folder.absolute())
    if not isinstance(given, str) or not given or "\0" in given:
        raise problem(f"must be a folder, got {describe(given)}")
    return given if file is None else file.path(given)


class Study(Document):
    """A study. The constructor raises ValueError for inconsistent parts; `load_study` also reports the line of each problem."""

    name: Annotated[str, PlainValidator(_study_name)]  # of its folder and its experiment; default: that of the file
    # A bundled one (BUILT_IN_TASKS: fundus_sr, vae_kl, …), module:Class, module:function, or a command.
    task: Annotated[str | CommandSpec, PlainValidator(_task), PlainSerializer(_task_text)] = "fundus_sr"
    # Settings of the training, the same in every trial, `steps` among them (200, FACTS §2; a command: until it ends by itself).
    task_config: Annotated[dict[str, Any], PlainValidator(_task_config)] = Field(default_factory=_default_task_config)
    # Settings that differ from `task_config` in the baseline, `seeds` and `log`; default the pixel loss only (note 000 §1.2).
    baseline: Annotated[BaselineRuns, PlainValidator(_baseline), PlainSerializer(_flat_baseline)] = Field(
        default_factory=_usual_baseline
    )
    # A name in `tune-ssim spaces`, `name:stage`, a file, or a mapping; default `wide`.
    space: Annotated[Space, PlainValidator(_space), PlainSerializer(Space.to_yaml)]
    search: OrDefaults[Search] = Field(default_factory=Search)  # how settings are chosen, and how many
    # asha: {…}, or none. FACTS §6: a fifth of ASHA's best picks were not fully trained.
    scheduler: Annotated[
        Asha | None, PlainValidator(_scheduler), PlainSerializer(lambda asha: asha and {"asha": asha.model_dump()})
    ] = None
    # Options by guard name; null switches one off. `divergence` too, unless the task is a bundled one.
    guards: Annotated[dict[str, Guard], PlainValidator(_guards), PlainSerializer(_guard_options)] = Field(
        default_factory=default_guards
    )
    # Additional guards from rule packs; none by default, because packs are specific to a kind of training.
    rules: Annotated[
        tuple[RulePack, ...], PlainValidator(_rules), PlainSerializer(lambda packs: [dict(pack.document) for pack in packs])
    ] = ()
    # What is improved, and what must not get worse; a list is several objectives.
    objective: Annotated[OrDefaults[Objective], BeforeValidator(Objective.read)] = Field(default_factory=Objective)
    resources: OrDefaults[Resources] = Field(default_factory=Resources)  # of one trial
    # None: off, which the proof records.
    preflight: Preflight | None = Field(default_factory=Preflight)
    # None: off, so nothing is predicted.
    calibration: Annotated[CalibrationOptions | None, BeforeValidator(_calibration)] = Field(default_factory=_default_calibration)
    confirm: Confirm | None = Field(default_factory=Confirm)  # None: off; then nothing is exported without --unproven
    # Steps between transfers from the device, and so between guard checks; 1 on CPU (DESIGN).
    report_every: Annotated[int, PlainValidator(_count)] = 1
    # Steps per result sent to Ray; None: one result every two seconds, because each costs Ray milliseconds.
    result_every: Annotated[int | None, PlainValidator(_count_or_null)] = None
    checkpoint_every: Annotated[int, PlainValidator(_count)] = 50  # steps; DESIGN
    tracking: Tracking | None = Field(default_factory=Tracking)  # None: off
    # Folder to import a user-defined task from; default the study file's folder.
    import_path: Annotated[str | None, PlainValidator(_import_path)] = Field(default=None, validate_default=True)
    _warnings: tuple[str, ...] = PrivateAttr(())

    @property
    def steps(self) -> int | None:
        """Optimiser steps of a trial; None if a command ends by itself."""
        return self.task_config.get("steps")

    @property
    def task_path(self) -> str | dict[str, Any]:
        """`module:Class` or `module:function`, or the command specification as a mapping."""
        return self.task.model_dump() if isinstance(self.task, CommandSpec) else BUILT_IN_TASKS.get(self.task, self.task)

    @property
    def guard_list(self) -> tuple[Guard, ...]:
        return (*self.guards.values(), *(rule for pack in self.rules for rule in pack.rules))

    @property
    def baseline_seeds(self) -> int:
        """Number of baseline runs in the search; 0 if `baseline.log` is given."""
        return self.baseline.seeds if self.baseline.log is None else 0

    @property
    def baseline_settings(self) -> dict[str, Any]:
        """The settings of a baseline on top of `task_config`. If the study has an SSIM loss, its weight is 0."""
        return {**self._values_without_effect(), **({WEIGHT: 0.0} if self.has_ssim else {}), **self.baseline.overrides}

    def _values_without_effect(self) -> dict[str, Any]:
        """Values for gate and scale, which have no effect without a weight but may be placeholders in a command."""
        if not isinstance(self.task, CommandSpec):
            return {}
        found: dict[str, Any] = {}
        for stage in self.space.stages:
            for name in (MAX_T, GRAD_SCALE):
                domain = stage.parameters.get(name)
                if name in stage.fixed:
                    found.setdefault(name, stage.fixed[name])
                elif domain is not None:
                    found.setdefault(name, domain.listed[-1])
        return {
            name: value for name, value in found.items() if name in self.task.referenced_settings() and name not in self.task_config
        }

    @property
    def has_ssim(self) -> bool:
        """Whether the study searches or sets the weight of an SSIM loss."""
        named = {name for stage in self.space.stages for name in (*stage.parameters, *stage.fixed)} | set(self.task_config)
        return bool({GAIN, WEIGHT} & named) or any(map(is_part_of_schedule, named))

    @property
    def calibrates(self) -> bool:
        """Whether the calibration is on and the study has an SSIM loss to measure."""
        return self.calibration is not None and self.has_ssim

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is valid and probably a mistake, each with its place in the file."""
        return self._warnings

    @property
    def demonstrations(self) -> dict[str, dict[str, Any]]:
        """Name → all settings of the trial."""
        return {name: {**self.space.stages[0].fixed, **own} for name, own in self.search.demonstrations.items()}

    @property
    def strategy(self) -> str:
        """How the settings of a space with one stage are chosen. A guided search needs a calibrated gain; without it, TPE."""
        can_guide = self.calibrates and len(self.space.stages) == 1 and GAIN in self.space.stages[0].parameters
        return "optuna" if self.search.strategy == "guided" and not can_guide else self.search.strategy

    def to_dict(self) -> dict[str, Any]:
        """The study as in a file, with everything explicit."""
        return self.model_dump()

    def problems(self, context: _File | None) -> Iterable[Problem]:
        yield from part_problems(self)
        if context is not None and context.is_launch:
            yield from missing_files(self)

    def to_yaml(self) -> str:
        """The text of a study.yaml; `load_study` reads an equal study from it."""
        return dump_yaml(self.to_dict())

    @property
    def sha256(self) -> str:
        """Digest of the content. Independent of key order, YAML layout and the folder of the user's code."""
        content = {**self.to_dict(), "import_path": None}
        # Keeps the digest of studies from before these existed.
        if not self.rules:
            del content["rules"]
        divergence, is_bundled = self.guards.get(Divergence.name), self.task in tuple(BUILT_IN_TASKS)
        if divergence == Divergence() or (divergence is None and is_bundled):  # off for these before it was on for all
            content["guards"] = {name: options for name, options in content["guards"].items() if name != Divergence.name}
        if self.objective.min_improvement == Objective.of(self.objective.name).min_improvement:
            del content["objective"]["min_improvement"]
        if not self.search.demonstrations:
            del content["search"]["demonstrations"]
        return hashlib.sha256(json.dumps(_canonical(content), sort_keys=True).encode()).hexdigest()


# Guard options that a study can set; excludes values that a trial binds later (baseline, seed, clipping).
_GUARDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "norm_ratio": (NormRatio, ("limit", "window", "patience", "on_excess")),
    "smoke_test": (SmokeTest, tuple(f.name for f in fields(SmokeTest))),
    "divergence": (Divergence, ("limit", "window", "patience", "max_end_ratio")),
    "non_finite": (NonFinite, tuple(f.name for f in fields(NonFinite))),
}
_THRESHOLD = ("metric", "lower", "upper", "patience", "action")  # ratios and spans of steps need a rule


def bundled_studies_folder() -> Path:
    return Path(__file__).resolve().parent / "studies"


def bundled_studies() -> list[str]:
    return sorted(path.stem for path in bundled_studies_folder().glob("*.yaml"))


# Options of `tune-ssim run`: override name → the location in the study, and the option.
_OPTIONS: dict[str, tuple[Loc, str]] = {
    "name": (("name",), "--name"),
    "space": (("space",), "--space"),
    "trials": (("search", "trials"), "--trials"),
    "seed": (("search", "seed"), "--seed"),
    "tracking_uri": (("tracking", "uri"), "--tracking-uri"),
}
_BY_PLACE = {".".join(map(str, loc)): (loc, option) for loc, option in _OPTIONS.values()}


def load_study(
    study: str | Path | Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None, *, launch: bool = False
) -> Study:
    """A bundled name, a file, a mapping, or None for the bundled fundus study.

    overrides: `name`, `space`, `trials`, `seed`, `tracking_uri` (or their locations: `search.trials`, …), validated in the
    same way; None keeps the study's value. Paths in a file start from the file's folder, paths in `overrides` from the
    current folder. launch: the study will be launched from this machine, so programs and the baseline's log must exist.
    Raises UserError with one line per problem.
    """
    folder = Path()
    if isinstance(study, Mapping):
        source = Source("study", dict(study))
    else:
        is_path = isinstance(study, Path)
        name = DEFAULT_STUDY if study is None else str(study)
        path = Path(name).expanduser() if is_path else find_document("study", name, Path(), bundled_studies_folder())
        source, folder = read_yaml(path), path.parent
    for key, value in (overrides or {}).items():
        if value is not None:
            loc, option = {**_BY_PLACE, **_OPTIONS}[key]
            source = source.overridden(loc, value, option)
    problems = Problems()
    given: dict[str, Any] = {}
    for key, value in source.value.items():
        with problems.at(key):
            given |= plain_mapping({key: value})
    if problems.found:
        raise user_error(source, problems.found)
    stem = Path(source.label).stem.replace("_", "-")
    given = {"name": stem if _is_name(stem) else "study", "space": DEFAULT_SPACE, **given}
    found = validate(Study, source, given, _File(source, folder, launch))
    found._warnings = tuple(f"{source.at(one.loc)}: {one.text()}" for one in part_warnings(found))
    return found


def _is_name(name: Any) -> bool:
    try:
        return isinstance(name, str) and bool(check_name(name))
    except UserError:
        return False


def _canonical(value: Any) -> Any:
    """The value with whole floats as integers, so that 2.0 equals 2."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
