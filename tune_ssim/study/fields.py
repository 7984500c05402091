"""Each key of a study file: how it is read, its default, and how it is written again."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ValidationInfo

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import check_name
from tune_ssim.base.validation import Problem, Problems, build_dataclass, or_empty, plain_mapping, problem, unknown_keys
from tune_ssim.base.yaml_source import Source, describe, did_you_mean, short_repr
from tune_ssim.guards import Divergence, Guard, NonFinite, NormRatio, SmokeTest, Threshold
from tune_ssim.guards.rule_pack import RulePack, build_pack, load_rules
from tune_ssim.guards.verdict import Action
from tune_ssim.study.command_spec import CommandSpec
from tune_ssim.study.sections import Asha, BaselineRuns, CalibrationOptions
from tune_ssim.study.space import GAIN, WEIGHT, Space, find_space, load_space, setting_problem
from tune_ssim.study.weight_schedule import weight_problems

BUILT_IN_TASKS = {
    "fundus_sr": "tune_ssim.tasks.fundus_sr:FundusSR",
    "flow_dino_kl": "tune_ssim.tasks.flow_dino_kl:FlowDinoKL",
    "two_stage_vlm": "tune_ssim.tasks.two_stage_vlm:TwoStageVLM",
    "vae_kl": "tune_ssim.tasks.vae_kl:VAEKL",
}
_TASK_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
PATHS = {"fundus_sr": ("data", "vae", "weights")}  # keys of a built-in task's task_config that name a file or folder
DEFAULT_STEPS = 200  # FACTS §2: by then ruinous gains have ruined the model, and safe ones show an improvement
# Guard options that a study can set; excludes values that a trial binds later (baseline, seed, clipping).
GUARD_OPTIONS: dict[str, tuple[type, tuple[str, ...]]] = {
    "norm_ratio": (NormRatio, ("limit", "window", "patience", "on_excess")),
    "smoke_test": (SmokeTest, tuple(f.name for f in fields(SmokeTest))),
    "divergence": (Divergence, ("limit", "window", "patience", "max_end_ratio")),
    "non_finite": (NonFinite, tuple(f.name for f in fields(NonFinite))),
}
THRESHOLD_OPTIONS = ("metric", "lower", "upper", "patience", "action")  # ratios and spans of steps need a rule


def default_guards() -> dict[str, Guard]:
    """All guards that work without limits from the user."""
    guards: list[Guard] = [NormRatio(), SmokeTest(), NonFinite(), Divergence()]
    return {guard.name: guard for guard in guards}


@dataclass(frozen=True)
class StudyFile:
    """The origin of a study. folder: base of its relative paths; the current folder for a mapping. is_launch: the study will be
    launched from this machine."""

    source: Source
    folder: Path
    is_launch: bool = False

    def path(self, text: str) -> str:
        return str((self.folder / Path(text).expanduser()).absolute())


S = TypeVar("S")
OrDefaults = Annotated[S, or_empty(dict)]


def read_name(given: Any) -> str:
    if not is_name(given):
        words = "letters, digits, '.', '_' and '-' only, at most 100, beginning with a letter or digit"
        raise problem(f"{words}; got {describe(given)}")
    return given


def read_count(given: Any, or_null: str = "") -> int:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise problem(f"must be an integer >= 1{or_null}, got {describe(given)}")
    return given


def read_count_or_null(given: Any) -> int | None:
    return None if given is None else read_count(given, " or null")


def read_task(given: Any) -> str | CommandSpec:
    if isinstance(given, (Mapping, CommandSpec)):
        return CommandSpec.model_validate(given)
    if isinstance(given, str) and (given in BUILT_IN_TASKS or _TASK_PATH.fullmatch(given)):
        return given
    guess = did_you_mean(given, BUILT_IN_TASKS) if isinstance(given, str) else ""
    raise problem(f"unknown task {short_repr(given)}{guess} (your own: my_pkg.train:MyTask, or a command)")


def write_task(task: str | CommandSpec) -> str | dict[str, Any]:
    return task.model_dump() if isinstance(task, CommandSpec) else task


def read_task_config(given: Any, info: ValidationInfo) -> dict[str, Any]:
    config = {**default_task_config(info.data), **plain_mapping(given)}
    problems = Problems(_setting_problems(config))
    with problems.at("steps"):
        if "steps" in config:
            read_count(config["steps"])
    problems.check()
    file: StudyFile | None = info.context
    return config if file is None else _with_paths(config, file, info.data.get("task"))


def default_task_config(done: Mapping[str, Any]) -> dict[str, Any]:
    return {} if isinstance(done.get("task"), CommandSpec) else {"steps": DEFAULT_STEPS}


def _with_paths(config: dict[str, Any], file: StudyFile, task: Any) -> dict[str, Any]:
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


def default_baseline(done: dict[str, Any]) -> BaselineRuns:
    """The default baseline: only the pixel loss; for a command without a pixel loss, no auxiliary loss."""
    usual, task = BaselineRuns(), done.get("task")
    if not isinstance(task, CommandSpec):
        return usual
    known = task.referenced_settings()
    return usual.replace(overrides={name: value for name, value in usual.overrides.items() if name in known})


def read_baseline(given: Any, info: ValidationInfo) -> BaselineRuns:
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


def write_baseline(baseline: BaselineRuns) -> dict[str, Any]:
    return {**baseline.overrides, **baseline.model_dump(include={"seeds", "log"})}


def _baseline_problems(overrides: Mapping[str, Any]) -> Iterator[Problem]:
    yield from _setting_problems(overrides)
    if overrides.get(WEIGHT):
        yield Problem((WEIGHT,), f"the baseline has no SSIM loss, got {describe(overrides[WEIGHT])}")


def read_space(given: Any, info: ValidationInfo) -> Space:
    """Reads a space: a mapping, a name or a path."""
    if isinstance(given, (Mapping, Space)):
        return Space.model_validate(given)
    if not isinstance(given, str) or not given.strip():
        raise problem(f"must be a name, a path or a mapping, got {describe(given)}")
    file: StudyFile | None = info.context
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


def read_scheduler(given: Any, info: ValidationInfo) -> Asha | None:
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


def read_guards(given: Any, info: ValidationInfo) -> dict[str, Guard]:
    """Reads guards as in a file: options by guard name, null to turn one off, and a list of thresholds."""
    if not isinstance(given, Mapping):
        raise problem(f"must be a mapping, got {describe(given)}; `norm_ratio: null` in it switches one off")
    if info.context is None:
        return dict(given)
    problems = Problems(unknown_keys(given, [*GUARD_OPTIONS, "threshold"]))
    guards: dict[str, Guard] = {}
    for name, (guard, names) in GUARD_OPTIONS.items():
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
            threshold = build_dataclass(Threshold, options, THRESHOLD_OPTIONS)
            if threshold.name in guards:
                raise problem(f"there is a threshold for {threshold.metric!r} already")
            guards[threshold.name] = threshold
    problems.check()
    return guards


def write_guards(guards: dict[str, Any]) -> dict[str, Any]:
    def options(guard: Any, names: tuple[str, ...]) -> dict[str, Any]:
        values = {name: getattr(guard, name) for name in names}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: value.value if isinstance(value, Action) else value for name, value in plain.items()}

    found: dict[str, Any] = {
        name: options(guards[name], names) if name in guards else None for name, (_, names) in GUARD_OPTIONS.items()
    }
    thresholds = [guards[name] for name in sorted(guards) if isinstance(guards[name], Threshold)]
    return {**found, "threshold": [options(guard, THRESHOLD_OPTIONS) for guard in thresholds]}


def read_rules(given: Any, info: ValidationInfo) -> tuple[RulePack, ...]:
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


def _pack(entry: Any, file: StudyFile | None) -> RulePack:
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


def read_calibration(given: Any, info: ValidationInfo) -> Any:
    """`update_off` is another name for `disable_update`. Without it, the updates of a command are held off from outside."""
    if not isinstance(given, Mapping):
        return given
    if "update_off" in given:
        if "disable_update" in given:
            raise problem("has both update_off and disable_update, which are one option")
        given = {**{key: value for key, value in given.items() if key != "update_off"}, "disable_update": given["update_off"]}
    return {"disable_update": {}, **given} if isinstance(info.data.get("task"), CommandSpec) else given


def default_calibration(done: Mapping[str, Any]) -> CalibrationOptions:
    return CalibrationOptions(disable_update={}) if isinstance(done.get("task"), CommandSpec) else CalibrationOptions()


def read_import_path(given: Any, info: ValidationInfo) -> str | None:
    """Makes the import path absolute, so that workers find it. The default is the study file's folder for a user-defined task,
    else None."""
    file: StudyFile | None = info.context
    task = info.data.get("task")
    if given is None:
        if file is None or not file.source.lines or (isinstance(task, str) and task in BUILT_IN_TASKS):
            return None
        return str(file.folder.absolute())
    if not isinstance(given, str) or not given or "\0" in given:
        raise problem(f"must be a folder, got {describe(given)}")
    return given if file is None else file.path(given)


def is_name(name: Any) -> bool:
    try:
        return isinstance(name, str) and bool(check_name(name))
    except UserError:
        return False
