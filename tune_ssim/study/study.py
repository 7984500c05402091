"""A study: what is trained, what may vary, what is judged and for how long, as one frozen object."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import check_name
from tune_ssim.base.validation import (
    Document,
    Problem,
    Problems,
    Section,
    build_dataclass,
    or_empty,
    plain_mapping,
    problem,
    unknown_keys,
    user_error,
    validate,
)
from tune_ssim.base.yaml_source import Loc, Source, describe, did_you_mean, dump_yaml, find_document, read_yaml, short_repr
from tune_ssim.guards import Guard, KeepRule, NonFinite, NormRatio, SmokeTest, Threshold
from tune_ssim.guards.rule_pack import RulePack, build_pack, load_rules
from tune_ssim.study.command_spec import CommandSpec, reading_problems
from tune_ssim.study.space import GAIN, GRAD_SCALE, MAX_T, WEIGHT, Space, find_space, load_space, setting_problem

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
DEFAULT_STEPS = 200  # FACTS §2: gains that ruin the model have done so by then, and safe ones show their gain


class BaselineLog(Section):
    """The log of a pixel-loss run. names: theirs → ours; held_out: numbers measured after it, e.g. `{ssim: 0.91}`."""

    file: Annotated[str, Field(min_length=1)]
    format: str | None = None
    pattern: str | list[str] | None = None
    names: dict[str, str] = Field(default_factory=dict)
    held_out: dict[str, float] = Field(default_factory=dict)


class BaselineRuns(Section):
    """The same training with the pixel loss only (note 000 §1): `overrides` of the task's configuration make it so."""

    overrides: dict[str, Any] = Field(
        default_factory=lambda: {"pixel_loss_weight": 0.05, "pixel_loss_max_t": 0.3}  # note 000 §1.2
    )
    seeds: Annotated[int, Field(ge=1)] = 2  # DESIGN: two side by side cost no extra wall time, and give the noise floor
    log: BaselineLog | None = None  # of a run that is over, in place of runs in the search; the confirm phase has its own


class Search(Section):
    strategy: Literal["optuna", "random"] = "optuna"  # FACTS §6: TPE finds a good safe setting twice as often as random
    trials: Annotated[int, Field(ge=1)] = 12  # FACTS §2: 63-107 s on two cores; baselines are not counted
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # NumPy's range
    concurrency: int | Literal["auto"] = 2  # trials at a time; auto: as many as the cluster's resources admit
    deterministic: bool = True  # DESIGN "Order": the same suggestions whichever trial ends first
    # Times the norm guard's limit, the `max_ratio`: settings whose predicted ratio exceeds it are not launched; None: all are.
    # Over steps 25-75 the norm is 0.5 to 1.1 times the prediction (FACTS §1, benchmarks/calibration.py): they would be pruned.
    skip_beyond: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 2.0

    @field_validator("concurrency", mode="plain")
    @classmethod
    def _concurrency(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(f"must be an integer >= 1 or auto, got {describe(value)}")


class Asha(Section):
    """Steps are training steps. (What Ray calls `max_t` here has nothing to do with `ssim_loss_max_t`.)"""

    max_steps: Annotated[int, Field(ge=1)]  # default: the trial's steps
    grace_steps: Annotated[int, Field(ge=1)] = 25  # FACTS §6
    reduction_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0  # FACTS §6


class Keep(Section):
    """How far a held-out metric may get worse than the baseline's: one limit on the difference or on the quotient."""

    min_delta: float | None = None
    max_delta: float | None = None
    min_ratio: float | None = None
    max_ratio: float | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Keep:
        if len(self.limit) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"must have exactly one of {names}; got {', '.join(self.limit) or 'none'}")
        (name, value), *_ = self.limit.items()
        if not math.isfinite(value) or (name.endswith("ratio") and value <= 0):
            problems = Problems()
            problems.add((name,), f"must be a finite number{' > 0' if name.endswith('ratio') else ''}, got {value:g}")
            problems.check()
        return self

    @property
    def limit(self) -> dict[str, float]:
        """The one that is set, e.g. `{"min_delta": -0.3}`."""
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


class Objective(Section):
    """`maximize` a held-out metric; a trial that breaks a `keep` rule is `degraded` and never exported."""

    maximize: Annotated[str, Field(min_length=1)] = "delta_ssim"
    keep: Annotated[dict[str, Keep], BeforeValidator(lambda given: _default_keep() if given is None else given)] = Field(
        default_factory=_default_keep
    )

    @property
    def rules(self) -> tuple[KeepRule, ...]:
        return tuple(KeepRule(metric, **rule.limit) for metric, rule in self.keep.items())


class Resources(Section):
    """Of one trial. gpus auto: one GPU where the cluster has them, else none; fractions share a GPU.

    workers: processes of one trial, as ranks of one torch process group; cpus and gpus are then those of each worker, and so is
    gpus_per_worker, which goes before gpus. nodes: on how many of them a command is started; cpus and gpus are then of each."""

    workers: Annotated[int, Field(ge=1)] = 1
    nodes: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0  # FACTS §2: one thread a process
    gpus: float | Literal["auto"] = "auto"

    @field_validator("gpus", mode="plain")
    @classmethod
    def _gpus(cls, value: Any) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value == "auto" or (is_number and 0 <= value < math.inf):
            return float(value) if is_number else value
        raise ValueError(f"must be a number >= 0 or auto, got {describe(value)}")

    @property
    def parts(self) -> int:
        """Bundles of `cpus` and `gpus` that a trial takes."""
        return self.workers * self.nodes


class Preflight(Section):
    """Before anything is launched: is the set-up sound? No options yet; `preflight: null` switches it off."""


class CalibrationOptions(Section):
    """Before anything is launched: how hard does each setting push? Measured with the update switched off."""

    batches: Annotated[int, Field(ge=1)] = 24  # medians of >= 10 active steps (FACTS §1), also behind gates that half of them pass
    grid: Annotated[list[float], Field(min_length=1)] | None = None  # of max_t; None: what the space can take
    # What leaves the weights as they are; for any launcher (FACTS §1).
    disable_update: dict[str, Any] = Field(default_factory=lambda: {"lr": 0.0})
    # gram: from the gradients themselves; readings: from total_norm alone, as any training reports it; auto: gram where it fits.
    method: Literal["auto", "gram", "readings"] = "auto"

    @field_validator("grid")
    @classmethod
    def _grid(cls, grid: list[float] | None) -> list[float] | None:
        if grid is not None and (len(set(grid)) < len(grid) or not all(0 < max_t <= 1 for max_t in grid)):
            raise ValueError(f"must be different values of max_t above 0 and at most 1, got {grid}")
        return grid


class Confirm(Section):
    """Before anything is exported: the best settings and the baseline again, with further seeds and for longer."""

    finalists: Annotated[int, Field(ge=1)] = 3  # tried in their order until one holds
    seeds: Annotated[int, Field(ge=2)] = 3  # an interval needs two; FACTS §6: the noise between seeds is as large as the gain
    steps: Annotated[int, Field(ge=1)] | None = None  # of a trial; None: ten times the search's (SEEDS A9)


class Tracking(Section):
    """MLflow; uri None: SQLite in the storage path."""

    uri: Annotated[str, Field(min_length=1)] | None = None


def default_guards() -> dict[str, Guard]:
    """Every guard that needs no limit from the user."""
    return {guard.name: guard for guard in (NormRatio(), SmokeTest(), NonFinite())}


# ---- what a file may say for each part, and what that means ----


@dataclass(frozen=True)
class _File:
    """What a study is read from. folder: where its relative paths start; the current one for a mapping.
    is_launch: the study is to be started from this machine."""

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
    config = {"steps": DEFAULT_STEPS, **plain_mapping(given)}
    problems = Problems(_setting_problems(config))
    with problems.at("steps"):
        _count(config["steps"])
    problems.check()
    file: _File | None = info.context
    return config if file is None else _with_paths(config, file, info.data.get("task"))


def _with_paths(config: dict[str, Any], file: _File, task: Any) -> dict[str, Any]:
    """Files and folders as absolute paths, since workers run elsewhere. They are meant relative to the study file: the values of
    PATHS, and for a task of one's own every value that begins with `./`, `../` or `~/`."""
    named = PATHS.get(task, ()) if isinstance(task, str) else ()

    def absolute(key: str, value: Any) -> Any:
        if not isinstance(value, str) or not value or "\0" in value:
            return value
        is_path = key in named if named else value.startswith(("./", "../", "~/"))
        return os.path.normpath(file.path(value)) if is_path else value

    return {key: absolute(key, value) for key, value in config.items()}


def _setting_problems(settings: Mapping[str, Any]) -> Iterator[Problem]:
    for key, value in settings.items():
        message = "belongs in a space" if key == GAIN else setting_problem(key, value)
        if message:
            yield Problem((key,), message)


def _usual_baseline(done: dict[str, Any]) -> BaselineRuns:
    """A script that has no pixel loss has a baseline without any auxiliary loss."""
    usual, task = BaselineRuns(), done.get("task")
    if not isinstance(task, CommandSpec):
        return usual
    known = task.referenced_settings()
    return usual.replace(overrides={name: value for name, value in usual.overrides.items() if name in known})


def _baseline(given: Any, info: ValidationInfo) -> BaselineRuns:
    """As in a file: the settings that differ from `task_config`, beside `seeds` and `log`."""
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
    """Written out, or the name or path of one."""
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
    """`{asha: {...}}`, which lasts as long as a trial unless it says otherwise."""
    if given is None or isinstance(given, Asha):
        return given
    if not isinstance(given, Mapping):
        raise problem(f"must be null or asha: {{grace_steps: 25}}, got {describe(given)}")
    problems = Problems(unknown_keys(given, ["asha"]))
    asha, built = given.get("asha", {}), None
    config = info.data.get("task_config")
    if (asha is None or isinstance(asha, Mapping)) and isinstance(config, dict):
        asha = {"max_steps": config["steps"], **(asha or {})}
    if "asha" in given:
        with problems.at("asha"):
            built = Asha.model_validate(asha)
    problems.check()
    return built


def _guards(given: Any, info: ValidationInfo) -> dict[str, Guard]:
    """Of a file: options by the guard's name, null for off, and a list of thresholds."""
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
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    found: dict[str, Any] = {name: options(guards[name], names) if name in guards else None for name, (_, names) in _GUARDS.items()}
    thresholds = [guards[name] for name in sorted(guards) if isinstance(guards[name], Threshold)]
    return {**found, "threshold": [options(guard, _THRESHOLD) for guard in thresholds]}


def _rules(given: Any, info: ValidationInfo) -> tuple[RulePack, ...]:
    """Each a name, a path, or a pack written out; {pack: name, options: {...}} sets a pack's options."""
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


def _not_for_commands(given: Any, info: ValidationInfo) -> Any:
    if given is not None and isinstance(info.data.get("task"), CommandSpec):
        raise problem("looks into the task's own process; a command has another one: leave it out")
    return given


def _unless_command(section: type[S]) -> Any:
    """By default on, and off for a command."""
    return Field(default_factory=lambda done: None if isinstance(done.get("task"), CommandSpec) else section())


def _import_path(given: Any, info: ValidationInfo) -> str | None:
    """Absolute, so that workers find it too; only a task of one's own, in a study with a file, has one by default."""
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
    """Raises ValueError when built with parts that do not fit together; `load_study` also gives the line of each problem."""

    name: Annotated[str, PlainValidator(_study_name)]
    # A key of BUILT_IN_TASKS, module:Class, module:function, or a command.
    task: Annotated[str | CommandSpec, PlainValidator(_task), PlainSerializer(_task_text)] = "fundus_sr"
    task_config: Annotated[dict[str, Any], PlainValidator(_task_config)] = Field(default_factory=lambda: {"steps": DEFAULT_STEPS})
    baseline: Annotated[BaselineRuns, PlainValidator(_baseline), PlainSerializer(_flat_baseline)] = Field(
        default_factory=_usual_baseline
    )
    space: Annotated[Space, PlainValidator(_space), PlainSerializer(Space.to_yaml)]
    search: OrDefaults[Search] = Field(default_factory=Search)
    # FACTS §6: a fifth of ASHA's best picks were not fully trained.
    scheduler: Annotated[
        Asha | None, PlainValidator(_scheduler), PlainSerializer(lambda asha: asha and {"asha": asha.model_dump()})
    ] = None
    # By the guard's name; absent: off.
    guards: Annotated[dict[str, Guard], PlainValidator(_guards), PlainSerializer(_guard_options)] = Field(
        default_factory=default_guards
    )
    # Further guards, as packs; none by default: not every training is one that a pack is about.
    rules: Annotated[
        tuple[RulePack, ...], PlainValidator(_rules), PlainSerializer(lambda packs: [dict(pack.document) for pack in packs])
    ] = ()
    objective: OrDefaults[Objective] = Field(default_factory=Objective)
    resources: OrDefaults[Resources] = Field(default_factory=Resources)
    # None: off, and the proof says so.
    preflight: Annotated[Preflight | None, BeforeValidator(_not_for_commands)] = _unless_command(Preflight)
    # None: off; then nothing is predicted.
    calibration: Annotated[CalibrationOptions | None, BeforeValidator(_not_for_commands)] = _unless_command(CalibrationOptions)
    confirm: Confirm | None = Field(default_factory=Confirm)  # None: off; then nothing is exported without --unproven
    # Steps between transfers from the device, and so between verdicts; 1 on CPU (DESIGN).
    report_every: Annotated[int, PlainValidator(_count)] = 1
    # Steps per result that Ray sees; None: one in two seconds (a result costs it milliseconds).
    result_every: Annotated[int | None, PlainValidator(_count_or_null)] = None
    checkpoint_every: Annotated[int, PlainValidator(_count)] = 50  # steps; DESIGN
    tracking: Tracking | None = Field(default_factory=Tracking)  # None: off
    # A folder in which to look for one's own task; default the study file's.
    import_path: Annotated[str | None, PlainValidator(_import_path)] = Field(default=None, validate_default=True)

    @property
    def steps(self) -> int:
        """Optimiser steps of a trial."""
        return self.task_config["steps"]

    @property
    def task_path(self) -> str | dict[str, Any]:
        """`module:Class` or `module:function`, or how the command is run."""
        return self.task.model_dump() if isinstance(self.task, CommandSpec) else BUILT_IN_TASKS.get(self.task, self.task)

    @property
    def guard_list(self) -> tuple[Guard, ...]:
        return (*self.guards.values(), *(rule for pack in self.rules for rule in pack.rules))

    @property
    def baseline_seeds(self) -> int:
        """Baseline runs of the search; none where their log is at hand."""
        return self.baseline.seeds if self.baseline.log is None else 0

    @property
    def baseline_settings(self) -> dict[str, Any]:
        """What a baseline sets on top of `task_config`: no SSIM loss, where the study has one at all."""
        return {**self._untouched(), **({WEIGHT: 0.0} if self.has_ssim else {}), **self.baseline.overrides}

    def _untouched(self) -> dict[str, Any]:
        """A command has a place for every setting, also for those that mean nothing without a weight: any value will do."""
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
        """Whether the study says anything about the weight of an SSIM loss."""
        named = {name for stage in self.space.stages for name in (*stage.parameters, *stage.fixed)} | set(self.task_config)
        return bool({GAIN, WEIGHT} & named)

    @property
    def calibrates(self) -> bool:
        """Whether the calibration is on and has something to measure."""
        return self.calibration is not None and self.has_ssim

    def to_dict(self) -> dict[str, Any]:
        """As in a file, with everything explicit."""
        return self.model_dump()

    def problems(self, context: _File | None) -> Iterable[Problem]:
        yield from _problems(self)
        if context is not None and context.is_launch:
            yield from _missing(self)

    def to_yaml(self) -> str:
        """The text of a study.yaml; `load_study` reads an equal study from it."""
        return dump_yaml(self.to_dict())

    @property
    def sha256(self) -> str:
        """Of the content: the order of keys, the YAML's layout and where the user's code lies mean nothing."""
        content = {**self.to_dict(), "import_path": None}
        if not self.rules:
            del content["rules"]  # as before there were any
        return hashlib.sha256(json.dumps(_canonical(content), sort_keys=True).encode()).hexdigest()


# Options of each guard that a study sets; what a trial binds later (baseline, seed, clipping) is not among them.
_GUARDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "norm_ratio": (NormRatio, ("limit", "window", "patience", "on_excess")),
    "smoke_test": (SmokeTest, tuple(f.name for f in fields(SmokeTest))),
    "non_finite": (NonFinite, tuple(f.name for f in fields(NonFinite))),
}
_THRESHOLD = ("metric", "lower", "upper", "patience", "action")  # a ratio, or a span of steps, is a rule


def bundled_studies_folder() -> Path:
    return Path(__file__).resolve().parent / "studies"


def bundled_studies() -> list[str]:
    return sorted(path.stem for path in bundled_studies_folder().glob("*.yaml"))


# Options of `tune-ssim run` by the place in the study that they override.
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

    overrides: `name`, `space`, `trials`, `seed`, `tracking_uri` (or their places: `search.trials`, …), judged by the
    same rules; None leaves the study's own value. A path in a file starts from the file's folder, one in `overrides`
    from the current one. launch: it is to be started from this machine, so programs and the baseline's log must be there.
    Raises UserError with a line for each problem.
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
    return validate(Study, source, given, _File(source, folder, launch))


# ---- what must hold between the parts of a study ----


def _problems(study: Study) -> Iterator[Problem]:
    """Everything wrong with the parts together. A part that is wrong itself is None here."""
    is_command = isinstance(study.task, CommandSpec)
    steps = None if study.task_config is None else study.steps
    if isinstance(study.task, CommandSpec):
        yield from _command_problems(study, study.task)
    if study.baseline is not None and study.baseline.log is not None:
        log = study.baseline.log
        yield from (Problem(("baseline", "log", *loc), message) for loc, message in reading_problems(log.pattern, log.format))
    if study.space is not None:
        for stage in study.space.stages:
            for key, value in stage.fixed.items():
                if key in (study.task_config or {}) and study.task_config[key] != value:
                    own = describe(study.task_config[key])
                    message = f"is {own}, but the space {study.space.name!r} fixes it at {value}; say it in one place"
                    yield Problem(("task_config", key), message)
        stages = len(study.space.stages)
        if study.search is not None and study.search.trials < stages:
            message = f"a route of {stages} stages needs at least {stages} trials, got {study.search.trials}"
            yield Problem(("search", "trials"), message)
        if study.space.is_relative and study.calibration is None and not is_command:
            message = f"is null, but the space {study.space.name!r} gives its gain as a norm ratio, which needs it"
            yield Problem(("calibration",), message)
    if study.resources is not None and study.task is not None:
        if is_command and study.resources.workers > 1:
            message = "a command starts its own workers, e.g. by torchrun; `nodes` is how often it is started"
            yield Problem(("resources", "workers"), message)
        if not is_command and study.resources.nodes > 1:
            yield Problem(("resources", "nodes"), "is for commands; a task in Python has `workers`")
    if study.confirm is not None and steps is not None and study.confirm.steps is not None and study.confirm.steps < steps:
        yield Problem(("confirm", "steps"), f"must be at least the trial's {steps} steps, got {study.confirm.steps}")
    asha = study.scheduler
    if asha is not None and steps is not None:
        if asha.max_steps > steps:
            message = f"must be at most the trial's {steps} steps, got {asha.max_steps}"
            yield Problem(("scheduler", "asha", "max_steps"), message)
        if asha.grace_steps > asha.max_steps:
            message = f"must be at most max_steps ({asha.max_steps}), got {asha.grace_steps}"
            yield Problem(("scheduler", "asha", "grace_steps"), message)


def _command_problems(study: Study, task: CommandSpec) -> Iterator[Problem]:
    has_settings = study.space is not None and study.baseline is not None and study.task_config is not None
    for loc, message in task.problems(_values_of(study) if has_settings else None):  # else a name may be missing for that alone
        yield Problem(("task", *loc), message)
    yield from _unused(study, task)
    if has_settings:
        # What every trial has; without a weight the gate and the scale mean nothing, and get some value (`_untouched`).
        always = {*study.task_config, *study.baseline.overrides, WEIGHT, MAX_T, GRAD_SCALE}
        for name in sorted((task.referenced_settings() & set(_values_of(study))) - always):
            yield Problem(("baseline",), f"has no {name}, which the command uses: set it here, or in task_config")
    if task.records is not None and task.smoke is None and SmokeTest.name in (study.guards or ()):
        message = "nothing makes samples: give the task a `smoke: {command: [...]}`, or set smoke_test: null"
        yield Problem(("guards", "smoke_test"), message)
    if study.scheduler is not None and task.evaluate is None:
        message = "asha needs held-out numbers while the training goes on: an `evaluate: {command: [...]}`"
        yield Problem(("scheduler",), message)


def _missing(study: Study) -> Iterator[Problem]:
    """What is not on this machine; of several nodes the others may look different."""
    if isinstance(study.task, CommandSpec) and study.resources is not None and study.resources.nodes == 1:
        for loc, message in study.task.missing_programs(study.import_path):
            yield Problem(("task", *loc), message)
    log = study.baseline.log if study.baseline is not None else None
    if log is not None and not Path(log.file).exists():
        yield Problem(("baseline", "log"), f"{log.file}: no such file")


def _values_of(study: Study) -> dict[str, list[Any]]:
    """Every setting that a trial of the study has, with values that it takes."""
    found: dict[str, list[Any]] = {}
    baseline = study.baseline.overrides if study.baseline is not None else {}
    for settings in (study.task_config or {}, baseline, *(values for _, values in _of_space(study))):
        for name, value in settings.items():
            found.setdefault(name, []).append(value)
    return found


def _of_space(study: Study) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, setting → value): every value that the space names, and the bounds of those that it draws."""
    for stage in study.space.stages if study.space is not None else ():
        for name, domain in stage.parameters.items():
            if name == GAIN:  # the weight is drawn; the gate and the scale stand elsewhere
                yield "varies", {WEIGHT: 0.5, GRAD_SCALE: 1.0, MAX_T: 1.0}
                continue
            for value in domain.listed:
                yield "varies", {name: value}
        yield "fixes", dict(stage.fixed)
        for point in stage.points:
            yield "has a point with", {name: value for name, value in point.items() if name != GAIN}


def _unused(study: Study, task: CommandSpec) -> Iterator[Problem]:
    """Settings that the command does not use: every trial that has one would be a bad set-up."""
    seen: set[str] = set()
    hint = 'but the command does not use it: put {{{0}}} where it belongs, e.g. "--{0}={{{0}}}"'
    for how, values in _of_space(study):
        for name in task.unused_settings({name: [value] for name, value in values.items()}):
            if name not in seen:
                seen.add(name)
                what = name if how == "varies" else f"{name} {values[name]!r}"
                message = f"the space {how} {what}, {hint.format(name)}, or take a space without it"
                yield Problem(("task", "command"), message)
    overrides = study.baseline.overrides if study.baseline is not None else {}
    for part, settings in (("task_config", study.task_config or {}), ("baseline", overrides)):
        for name in task.unused_settings({name: [value] for name, value in settings.items()}):
            if name not in seen:
                seen.add(name)
                yield Problem((part, name), f"is {describe(settings[name])}, {hint.format(name)}")


def _is_name(name: Any) -> bool:
    try:
        return isinstance(name, str) and bool(check_name(name))
    except UserError:
        return False


def _canonical(value: Any) -> Any:
    """2.0 is the number 2."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
