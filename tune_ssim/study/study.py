"""A study: what is trained, what may vary, what is judged and for how long, as one frozen object."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import check_name
from tune_ssim.base.yaml_source import Loc, Problems, Source, did_you_mean, dump_yaml, kind_of, read_yaml, shown
from tune_ssim.guards import Guard, KeepRule, NonFinite, NormRatio, SmokeTest, Threshold
from tune_ssim.guards.rule_pack import RulePack, load_rules
from tune_ssim.study.command_spec import CommandSpec, reading_problems
from tune_ssim.study.space import GAIN, GRAD_SCALE, MAX_T, WEIGHT, Space, find_space, load_space, setting_problem

BUILT_IN_TASKS = {
    "fundus_sr": "tune_ssim.tasks.fundus_sr:FundusSR",
    "flow_dino_kl": "tune_ssim.tasks.flow_dino_kl:FlowDinoKL",
    "two_stage_vlm": "tune_ssim.tasks.two_stage_vlm:TwoStageVLM",
    "vae_kl": "tune_ssim.tasks.vae_kl:VAEKL",
}
PATHS = {"fundus_sr": ("data", "vae", "weights")}  # keys of a built-in task's task_config that name a file or folder
DEFAULT_STUDY = "fundus_ssim"
DEFAULT_SPACE = "wide"
DEFAULT_STEPS = 200  # FACTS §2: gains that ruin the model have done so by then, and safe ones show their gain


class _Section(BaseModel):
    """Strict: the text "12" is no number and 1 is not true."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BaselineLog(_Section):
    """The log of a pixel-loss run. names: theirs → ours; held_out: numbers measured after it, e.g. `{ssim: 0.91}`."""

    file: Annotated[str, Field(min_length=1)]
    format: str | None = None
    pattern: str | list[str] | None = None
    names: dict[str, str] = Field(default_factory=dict)
    held_out: dict[str, float] = Field(default_factory=dict)


class BaselineRuns(_Section):
    """The same training with the pixel loss only (note 000 §1): `overrides` of the task's configuration make it so."""

    overrides: dict[str, Any] = Field(
        default_factory=lambda: {"pixel_loss_weight": 0.05, "pixel_loss_max_t": 0.3}  # note 000 §1.2
    )
    seeds: Annotated[int, Field(ge=1)] = 2  # DESIGN: two side by side cost no extra wall time, and give the noise floor
    log: BaselineLog | None = None  # of a run that is over, in place of runs in the search; the confirm phase has its own


class Search(_Section):
    strategy: Literal["optuna", "random"] = "optuna"  # FACTS §6: TPE finds a good safe setting twice as often as random
    trials: Annotated[int, Field(ge=1)] = 12  # FACTS §2: 63-107 s on two cores; baselines are not counted
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # NumPy's range
    concurrency: int | Literal["auto"] = 2  # trials at a time; auto: as many as the cluster's resources admit
    deterministic: bool = True  # DESIGN "Order": the same suggestions whichever trial ends first
    # Times the norm guard's limit: settings predicted beyond are listed, not launched; None launches everything. Over steps 25-75
    # the norm is 0.5 to 1.1 times the prediction (FACTS §1, benchmarks/calibration.py), so what is left out would be pruned.
    skip_beyond: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 2.0

    @field_validator("concurrency", mode="plain")
    @classmethod
    def _concurrency(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(f"must be an integer >= 1 or auto, got {kind_of(value)}")


class Asha(_Section):
    """Steps are training steps. (What Ray calls `max_t` here has nothing to do with `ssim_loss_max_t`.)"""

    max_steps: Annotated[int, Field(ge=1)]  # default: the trial's steps
    grace_steps: Annotated[int, Field(ge=1)] = 25  # FACTS §6
    reduction_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0  # FACTS §6


class Keep(_Section):
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
            raise ValueError(f"{name} must be a finite number{' > 0' if name.endswith('ratio') else ''}, got {value:g}")
        return self

    @property
    def limit(self) -> dict[str, float]:
        """The one that is set, e.g. `{"min_delta": -0.3}`."""
        return {name: value for name, value in self if value is not None}


def _default_keep() -> dict[str, Keep]:
    return {
        "psnr": Keep(min_delta=-0.3),  # dB, DESIGN; ruined settings lose 3 and more (FACTS §2)
        "ssim": Keep(min_delta=-0.005),  # about two standard deviations between seeds at high gains (FACTS §6)
        "flow_loss_bins": Keep(max_ratio=2.0),  # DESIGN; smoothing under clipping shows as 0.45 -> 0.8 at low t (FACTS §2)
    }


class Objective(_Section):
    """`maximize` a held-out metric; a trial that breaks a `keep` rule is `degraded` and never exported."""

    maximize: Annotated[str, Field(min_length=1)] = "delta_ssim"
    keep: dict[str, Keep] = Field(default_factory=_default_keep)

    @property
    def rules(self) -> tuple[KeepRule, ...]:
        return tuple(KeepRule(metric, **rule.limit) for metric, rule in self.keep.items())


class Resources(_Section):
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
        raise ValueError(f"must be a number >= 0 or auto, got {kind_of(value)}")

    @property
    def parts(self) -> int:
        """Bundles of `cpus` and `gpus` that a trial takes."""
        return self.workers * self.nodes


class Preflight(_Section):
    """Before anything is launched: is the set-up sound? No options yet; `preflight: null` switches it off."""


class CalibrationOptions(_Section):
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


class Confirm(_Section):
    """Before anything is exported: the best settings and the baseline again, with further seeds and for longer."""

    finalists: Annotated[int, Field(ge=1)] = 3  # tried in their order until one holds
    seeds: Annotated[int, Field(ge=2)] = 3  # an interval needs two; FACTS §6: the noise between seeds is as large as the gain
    steps: Annotated[int, Field(ge=1)] | None = None  # of a trial; None: ten times the search's (SEEDS A9)


class Tracking(_Section):
    """MLflow; uri None: SQLite in the storage path."""

    uri: Annotated[str, Field(min_length=1)] | None = None


def default_guards() -> dict[str, Guard]:
    """Every guard that needs no limit from the user."""
    return {guard.name: guard for guard in (NormRatio(), SmokeTest(), NonFinite())}


@dataclass(frozen=True)
class Study:
    """Raises ValueError when built with parts that do not fit together; `load_study` says the line too."""

    name: str
    space: Space
    task: str | CommandSpec = "fundus_sr"  # a key of BUILT_IN_TASKS, module:Class, module:function, or a command
    task_config: Mapping[str, Any] = field(default_factory=lambda: {"steps": DEFAULT_STEPS})
    baseline: BaselineRuns = field(default_factory=BaselineRuns)
    search: Search = field(default_factory=Search)
    scheduler: Asha | None = None  # FACTS §6: a fifth of ASHA's best picks were not fully trained
    guards: Mapping[str, Guard] = field(default_factory=default_guards)  # by the guard's name; absent = off
    rules: tuple[RulePack, ...] = ()  # further guards, as packs; none: not every training is one that a pack is about
    objective: Objective = field(default_factory=Objective)
    resources: Resources = field(default_factory=Resources)
    preflight: Preflight | None = field(default_factory=Preflight)  # None: off, and the proof says so
    calibration: CalibrationOptions | None = field(default_factory=CalibrationOptions)  # None: off; then nothing is predicted
    confirm: Confirm | None = field(default_factory=Confirm)  # None: off; then nothing is exported without --unproven
    report_every: int = 1  # steps between transfers from the device, and so between verdicts; 1 on CPU (DESIGN)
    result_every: int | None = None  # steps per result that Ray sees; None: one in two seconds (a result costs it milliseconds)
    checkpoint_every: int = 50  # steps; DESIGN
    tracking: Tracking | None = field(default_factory=Tracking)  # None: off
    import_path: str | None = None  # a folder in which to look for one's own task; default the study file's

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_config", {"steps": DEFAULT_STEPS, **self.task_config})
        for loc, message in _problems(self):
            raise ValueError(f"study {self.name!r}: {'.'.join(map(str, loc))}: {message}")

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
        return {name: value for name, value in found.items() if name in self.task.reached() and name not in self.task_config}

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
        thresholds = [self.guards[name] for name in sorted(self.guards) if isinstance(self.guards[name], Threshold)]
        guards: dict[str, Any] = {
            name: _options(self.guards[name], names) if name in self.guards else None for name, (_, names) in _GUARDS.items()
        }
        guards["threshold"] = [_options(guard, _THRESHOLD) for guard in thresholds]
        keep = {metric: rule.limit for metric, rule in self.objective.keep.items()}
        return {
            "name": self.name,
            "task": self.task.model_dump() if isinstance(self.task, CommandSpec) else self.task,
            "task_config": dict(self.task_config),
            "baseline": {
                **self.baseline.overrides,
                "seeds": self.baseline.seeds,
                "log": None if self.baseline.log is None else self.baseline.log.model_dump(),
            },
            "space": self.space.to_yaml(),
            "search": self.search.model_dump(),
            "scheduler": None if self.scheduler is None else {"asha": self.scheduler.model_dump()},
            "guards": guards,
            "rules": [dict(pack.document) for pack in self.rules],
            "objective": {"maximize": self.objective.maximize, "keep": keep},
            "resources": self.resources.model_dump(),
            "preflight": None if self.preflight is None else self.preflight.model_dump(),
            "calibration": None if self.calibration is None else self.calibration.model_dump(),
            "confirm": None if self.confirm is None else self.confirm.model_dump(),
            "report_every": self.report_every,
            "result_every": self.result_every,
            "checkpoint_every": self.checkpoint_every,
            "tracking": None if self.tracking is None else self.tracking.model_dump(),
            "import_path": self.import_path,
        }

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
        path = _find(DEFAULT_STUDY if study is None else study)
        source, folder = read_yaml(path), path.parent
    for key, value in (overrides or {}).items():
        if value is not None:
            loc, option = {**_BY_PLACE, **_OPTIONS}[key]
            source = source.overridden(loc, value, option)
    return _parse(source, folder, launch)


def _find(study: str | Path) -> Path:
    name = str(study)
    if name in bundled_studies():
        return bundled_studies_folder() / f"{name}.yaml"
    if isinstance(study, Path) or name.endswith((".yaml", ".yml")) or "/" in name or (name and _exists(name)):
        return Path(name).expanduser()
    raise UserError(f"unknown study {shown(name)}{did_you_mean(name, bundled_studies())} (a path ends in .yaml)")


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


# ---- from a document to objects; every problem with its line ----


def _parse(source: Source, folder: Path, launch: bool) -> Study:
    problems, data = Problems(source), source.value
    problems.unknown_keys((), data, [f.name for f in fields(Study)])
    defaults = {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default
        for f in fields(Study)
        if not (f.default is MISSING and f.default_factory is MISSING)
    }
    stem = Path(source.label).stem.replace("_", "-")
    found: dict[str, Any] = {**defaults, "name": stem if _is_name(stem) else "study"}
    found |= {key: data[key] for key in ("name", "task", "report_every", "result_every", "checkpoint_every") if key in data}
    if isinstance(data.get("task"), Mapping):
        spec = _section(problems, ("task",), data["task"], CommandSpec)
        found["task"] = defaults["task"] if spec is None else spec  # what is wrong with it is on the list by now
    found["space"] = _space(problems, source, folder)
    found["task_config"] = {"steps": DEFAULT_STEPS, **_settings(problems, "task_config", data.get("task_config"))}
    found["task_config"] = _with_paths(found["task_config"], folder if source.lines else Path(), found["task"])
    found["baseline"] = _baseline(problems, data, found["task"], folder)
    for key, model in (("search", Search), ("resources", Resources)):
        found[key] = _section(problems, (key,), data.get(key) or {}, model)
    found["scheduler"] = _scheduler(problems, data.get("scheduler"), found["task_config"]["steps"])
    found["guards"] = _guards(problems, data.get("guards", {}))
    found["rules"] = _rules(problems, source, folder)
    found["objective"] = _objective(problems, data.get("objective") or {})
    optional = {"tracking": Tracking, "preflight": Preflight, "calibration": CalibrationOptions, "confirm": Confirm}
    for key, section in optional.items():
        given = data.get(key, {})
        if isinstance(found["task"], CommandSpec) and key in ("preflight", "calibration"):
            if data.get(key) is not None:
                problems.add((key,), "looks into the task's own process; a command has another one: leave it out")
            given = None
        found[key] = None if given is None else _section(problems, (key,), given, section)
    found["import_path"] = _import_path(problems, data, folder if source.lines else None, found["task"])
    for loc, message in _problems(SimpleNamespace(**found)):
        problems.add(loc, message)
    for loc, message in _missing(SimpleNamespace(**found)) if launch else ():
        problems.add(loc, message)
    problems.check()
    return Study(**found)


def _missing(study: Any) -> Iterator[tuple[Loc, str]]:
    """What is not on this machine; of several nodes the others may look different."""
    if isinstance(study.task, CommandSpec) and study.resources is not None and study.resources.nodes == 1:
        for place, wrong in study.task.missing_programs(study.import_path):
            yield ("task", *place), wrong
    log = study.baseline.log if study.baseline is not None else None
    if log is not None and not Path(log.file).exists():
        yield ("baseline", "log"), f"{log.file}: no such file"


def _space(problems: Problems, source: Source, folder: Path) -> Space | None:
    given = source.value.get("space", DEFAULT_SPACE)
    try:
        if isinstance(given, Mapping):
            return load_space(source.part("space"))
        if not isinstance(given, (str, Path)) or not str(given).strip():
            problems.add(("space",), f"must be a name, a path or a mapping, got {kind_of(given)}")
            return None
        start = Path() if source.option_at(("space",)) else folder
        try:
            path, stage = find_space(str(given), start)
        except UserError as error:
            problems.add(("space",), str(error))
            return None
        space = load_space(path)
    except UserError as error:  # the space's own file or lines
        problems.include(error)
        return None
    try:
        return space if stage is None else space.only(stage)
    except UserError as error:
        problems.add(("space",), str(error))
        return None


def _settings(problems: Problems, key: str, value: Any) -> dict[str, Any]:
    """A mapping of plain values for the task; nothing at all is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        problems.add((key,), f"must be a mapping, got {kind_of(value)}")
        return {}
    try:
        return json.loads(json.dumps(dict(value)))  # lists for tuples, text for keys: what a file can say
    except (TypeError, ValueError) as error:
        problems.add((key,), f"must hold plain values: {error}")
        return {}


def _with_paths(config: dict[str, Any], folder: Path, task: Any) -> dict[str, Any]:
    """Files and folders as absolute paths, since workers run elsewhere. They are meant relative to the study file: the values of
    PATHS, and for a task of one's own every value that begins with `./`, `../` or `~/`."""
    named = PATHS.get(task, ()) if isinstance(task, str) else ()

    def absolute(key: str, value: Any) -> Any:
        if not isinstance(value, str) or not value or "\0" in value:
            return value
        is_path = key in named if named else value.startswith(("./", "../", "~/"))
        return os.path.normpath((folder / Path(value).expanduser()).absolute()) if is_path else value

    return {key: absolute(key, value) for key, value in config.items()}


def _baseline(problems: Problems, data: Mapping[str, Any], task: Any, folder: Path | None) -> BaselineRuns | None:
    if "baseline" not in data:
        usual = BaselineRuns()
        if not isinstance(task, CommandSpec):
            return usual
        # A script that has no pixel loss has a baseline without any auxiliary loss.
        told = {name: value for name, value in usual.overrides.items() if name in task.reached()}
        return usual.model_copy(update={"overrides": told})
    if data["baseline"] is None:
        problems.add(("baseline",), "every verdict compares with a baseline; leave the key out for the pixel loss only")
        return None
    overrides = _settings(problems, "baseline", data["baseline"])
    given = {"seeds": overrides.pop("seeds")} if "seeds" in overrides else {}
    if overrides.get("log") is None:
        overrides.pop("log", None)
    else:
        log = overrides.pop("log")
        log = {"file": log} if isinstance(log, str) else log
        if isinstance(log, Mapping) and isinstance(log.get("file"), str) and log["file"] and folder is not None:
            log = {**log, "file": str((folder / Path(log["file"]).expanduser()).absolute())}
        read = _section(problems, ("baseline", "log"), log, BaselineLog)
        given["log"] = None if read is None else read.model_dump()
    return _section(problems, ("baseline",), {**given, "overrides": overrides}, BaselineRuns)


def _scheduler(problems: Problems, value: Any, steps: Any) -> Asha | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        problems.add(("scheduler",), f"must be null or asha: {{grace_steps: 25}}, got {kind_of(value)}")
        return None
    problems.unknown_keys(("scheduler",), value, ["asha"])
    if "asha" not in value:
        return None
    asha = value["asha"] if value["asha"] is not None else {}
    if isinstance(asha, Mapping) and "max_steps" not in asha and _is_count(steps):
        asha = {**asha, "max_steps": steps}
    return _section(problems, ("scheduler", "asha"), asha, Asha)


def _guards(problems: Problems, value: Any) -> dict[str, Guard]:
    if not isinstance(value, Mapping):
        problems.add(("guards",), f"must be a mapping, got {kind_of(value)}; `norm_ratio: null` in it switches one off")
        return {}
    problems.unknown_keys(("guards",), value, [*_GUARDS, "threshold"])
    guards: dict[str, Guard] = {}
    for name, (guard, names) in _GUARDS.items():
        options = value.get(name, {})
        if options is not None:
            guards[name] = _section(problems, ("guards", name), options, guard, names)
    thresholds = value.get("threshold") or []
    if not isinstance(thresholds, (list, tuple)):
        problems.add(("guards", "threshold"), f"must be a list, got {kind_of(thresholds)}")
        thresholds = []
    for index, options in enumerate(thresholds):
        loc: Loc = ("guards", "threshold", index)
        threshold = _section(problems, loc, options, Threshold, _THRESHOLD)
        if threshold is not None and threshold.name in guards:
            problems.add(loc, f"there is a threshold for {threshold.metric!r} already")
        elif threshold is not None:
            guards[threshold.name] = threshold
    return guards


def _rules(problems: Problems, source: Source, folder: Path) -> tuple[RulePack, ...]:
    """Each a name, a path, or a pack written out; {pack: name, options: {...}} sets a pack's options."""
    given = source.value.get("rules")
    given = [] if given is None else given
    if not isinstance(given, (list, tuple)):
        problems.add(("rules",), f"must be a list of rule packs, got {kind_of(given)}")
        return ()
    packs: list[RulePack] = []
    for index, entry in enumerate(given):
        loc: Loc = ("rules", index)
        try:
            if isinstance(entry, Mapping) and "pack" in entry:
                problems.unknown_keys(loc, entry, ("pack", "options"))
                options = entry.get("options") or {}
                if not isinstance(options, Mapping) or not isinstance(entry["pack"], str):
                    problems.add(loc, "must be {pack: name or path, options: {name: number}}")
                    continue
                packs.append(load_rules(entry["pack"], options, relative_to=folder))
            elif isinstance(entry, Mapping):
                packs.append(load_rules(source.part("rules", index)))
            elif isinstance(entry, str) and entry.strip():
                packs.append(load_rules(entry, relative_to=folder))
            else:
                problems.add(loc, f"must be a name, a path or a mapping, got {kind_of(entry)}")
        except UserError as error:
            if isinstance(entry, Mapping) and "pack" not in entry:
                problems.include(error)
            else:
                problems.add(loc, str(error), subject="")
    names = [pack.name for pack in packs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.add(("rules",), f"there are two rule packs named {name!r}")
    return tuple(packs)


def _objective(problems: Problems, value: Any) -> Objective | None:
    if not isinstance(value, Mapping) or value.get("keep") is None:
        given = {key: item for key, item in value.items() if key != "keep"} if isinstance(value, Mapping) else value
        return _section(problems, ("objective",), given, Objective)
    keep, rules = value["keep"], {}
    if not isinstance(keep, Mapping):
        problems.add(("objective", "keep"), f"must be a mapping from metrics to limits, got {kind_of(keep)}")
        keep = {}
    for metric, limit in keep.items():
        rules[metric] = _section(problems, ("objective", "keep", metric), limit, Keep)
    plain = {key: item for key, item in value.items() if key != "keep"}
    objective = _section(problems, ("objective",), plain, Objective)
    return objective if objective is None else objective.model_copy(update={"keep": rules})


def _import_path(problems: Problems, data: Mapping[str, Any], folder: Path | None, task: Any) -> str | None:
    """Absolute, so that workers find it too; only a task of one's own, in a study with a file, has one by default."""
    given = data.get("import_path")
    if given is None:
        return str(folder.absolute()) if folder is not None and not (isinstance(task, str) and task in BUILT_IN_TASKS) else None
    if not isinstance(given, str) or not given or "\0" in given:
        problems.add(("import_path",), f"must be a folder, got {kind_of(given)}")
        return None
    return str(((folder or Path()) / Path(given).expanduser()).absolute())


def _section(problems: Problems, loc: Loc, value: Any, model: type, names: tuple[str, ...] = ()) -> Any:
    """`model` built from a mapping, or None and the reasons. `names`: the keys allowed, default all fields."""
    before = len(problems)
    if not isinstance(value, Mapping):
        problems.add(loc, f"must be a mapping, got {kind_of(value)}")
        return None
    valid = names or tuple(model.model_fields)  # type: ignore[attr-defined]
    problems.unknown_keys(loc, value, valid)
    known = {key: item for key, item in value.items() if key in valid}
    try:
        # Through JSON: only there does pydantic's strict mode take lists for tuples and mappings for dataclasses.
        built = _adapter(model).validate_json(json.dumps(known), strict=True)
    except TypeError as error:
        problems.add(loc, f"must hold plain values: {error}")
        return None
    except ValidationError as error:
        for detail in error.errors():
            where, message = _words(detail, known)
            problems.add((*loc, *where), message)
        return None
    return built if len(problems) == before else None


@lru_cache
def _adapter(model: type) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _words(detail: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Loc, str]:
    """A pydantic error in our own words, and its place."""
    loc, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    got = f", got {kind_of(detail['input'])}"
    if kind == "value_error":
        message = str(context["error"])
        # A check of the whole object begins with the name of the option it is about.
        option = message.split(" ", 1)[0]
        if not loc and option in given:
            return (option,), message.removeprefix(option + " ") if message.startswith(option + " must") else message
        return loc, message
    if kind in ("missing", "missing_argument"):
        return loc[:-1], f"{loc[-1]} is missing"
    comparisons = {"greater_than_equal": (">=", "ge"), "greater_than": (">", "gt"), "less_than": ("<", "lt")}
    if kind in comparisons:
        sign, key = comparisons[kind]
        return loc, f"must be {sign} {context[key]:g}{got}"
    words = {
        "int_type": "must be an integer",
        "int_from_float": "must be an integer",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "string_too_short": "must not be empty",
        "tuple_type": "must be a list",
        "list_type": "must be a list",
        "too_short": "must not be empty",
        "dict_type": "must be a mapping",
    }
    if kind == "literal_error":
        return loc, f"must be one of {context['expected'].replace(' or ', ', ')}{got}"
    return loc, words.get(kind, detail["msg"][:1].lower() + detail["msg"][1:]) + got


# ---- what must hold between the parts of a study ----


def _problems(study: Any) -> Iterator[tuple[Loc, str]]:
    """Everything wrong with the parts together, each with its place; parts that are None were reported already."""
    if not _is_name(study.name):
        got = kind_of(study.name)
        yield (
            ("name",),
            f"letters, digits, '.', '_' and '-' only, at most 100, beginning with a letter or digit; got {got}",
        )
    if isinstance(study.task, CommandSpec):
        whole = study.space is not None and study.baseline is not None  # else a name may be missing for that alone
        for place, wrong in study.task.problems(_values_of(study) if whole else None):
            yield ("task", *place), wrong
        yield from _untold(study)
        if whole:
            # What every trial has; without a weight the gate and the scale mean nothing, and get some value (`_untouched`).
            always = {*study.task_config, *study.baseline.overrides, WEIGHT, MAX_T, GRAD_SCALE}
            for name in sorted((study.task.reached() & _settings_of(study)) - always):
                yield ("baseline",), f"has no {name}, which the command is told: set it here, or in task_config"
        if study.task.records is not None and study.task.smoke is None and SmokeTest.name in study.guards:
            yield (
                ("guards", "smoke_test"),
                "nothing makes samples: give the task a `smoke: {command: [...]}`, or say smoke_test: null",
            )
    elif not isinstance(study.task, str) or not (study.task in BUILT_IN_TASKS or _is_path(study.task)):
        guess = did_you_mean(study.task, BUILT_IN_TASKS) if isinstance(study.task, str) else ""
        yield ("task",), f"unknown task {shown(study.task)}{guess} (your own: my_pkg.train:MyTask, or a command)"
    for key in ("report_every", "result_every", "checkpoint_every"):
        may_be = " or null" if key == "result_every" else ""
        if not (_is_count(getattr(study, key)) or (may_be and getattr(study, key) is None)):
            yield (key,), f"must be an integer >= 1{may_be}, got {kind_of(getattr(study, key))}"
    steps = study.task_config["steps"]
    if not _is_count(steps):
        yield ("task_config", "steps"), f"must be an integer >= 1, got {kind_of(steps)}"
    overrides = {} if study.baseline is None else study.baseline.overrides
    for part, settings in (("task_config", study.task_config), ("baseline", overrides)):
        for key, value in settings.items():
            message = "belongs in a space" if key == GAIN else setting_problem(key, value)
            if message:
                yield (part, key), message
    if study.baseline is not None and study.baseline.log is not None:
        for place, wrong in reading_problems(study.baseline.log.pattern, study.baseline.log.format):
            yield ("baseline", "log", *place), wrong
    if overrides.get(WEIGHT):
        yield ("baseline", WEIGHT), f"the baseline has no SSIM loss, got {kind_of(overrides[WEIGHT])}"
    if study.space is not None:
        for stage in study.space.stages:
            for key, value in stage.fixed.items():
                if key in study.task_config and study.task_config[key] != value:
                    own = kind_of(study.task_config[key])
                    where = f"the space {study.space.name!r} fixes it at {value}"
                    yield ("task_config", key), f"is {own}, but {where}; say it in one place"
        stages = len(study.space.stages)
        if study.search is not None and study.search.trials < stages:
            yield (
                ("search", "trials"),
                f"a route of {stages} stages needs at least {stages} trials, got {study.search.trials}",
            )
        if study.space.is_relative and study.calibration is None:
            yield ("calibration",), f"is null, but the space {study.space.name!r} gives its gain as a norm ratio, which needs it"
    if study.resources is not None and study.task is not None:
        is_command = isinstance(study.task, CommandSpec)
        if is_command and study.resources.workers > 1:
            yield ("resources", "workers"), "a command starts its own workers, e.g. by torchrun; `nodes` is how often it is started"
        if not is_command and study.resources.nodes > 1:
            yield ("resources", "nodes"), "is for commands; a task in Python has `workers`"
    confirm = study.confirm
    if confirm is not None and confirm.steps is not None and _is_count(steps) and confirm.steps < steps:
        yield ("confirm", "steps"), f"must be at least the trial's {steps} steps, got {confirm.steps}"
    asha = study.scheduler
    if asha is not None and isinstance(study.task, CommandSpec) and study.task.evaluate is None:
        yield (
            ("scheduler",),
            "asha needs held-out numbers while the training goes on: an `evaluate: {command: [...]}`",
        )
    if asha is not None and _is_count(steps):
        if asha.max_steps > steps:
            yield ("scheduler", "asha", "max_steps"), f"must be at most the trial's {steps} steps, got {asha.max_steps}"
        if asha.grace_steps > asha.max_steps:
            got = f"got {asha.grace_steps}"
            yield ("scheduler", "asha", "grace_steps"), f"must be at most max_steps ({asha.max_steps}), {got}"


def _settings_of(study: Any) -> set[str]:
    """Every setting that a trial of the study has."""
    return set(_values_of(study))


def _values_of(study: Any) -> dict[str, list[Any]]:
    """Every setting that a trial of the study has, with values that it takes."""
    found: dict[str, list[Any]] = {}
    baseline = study.baseline.overrides if study.baseline is not None else {}
    for settings in (study.task_config, baseline, *(values for _, values in _of_space(study))):
        for name, value in settings.items():
            found.setdefault(name, []).append(value)
    return found


def _of_space(study: Any) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _untold(study: Any) -> Iterator[tuple[Loc, str]]:
    """Settings that reach nothing: every trial that has one would be a bad set-up."""
    said: set[str] = set()
    hint = 'but the command is not told: put {{{0}}} where it belongs, e.g. "--{0}={{{0}}}"'
    for how, values in _of_space(study):
        for name in study.task.untold({name: [value] for name, value in values.items()}):
            if name not in said:
                said.add(name)
                what = name if how == "varies" else f"{name} {values[name]!r}"
                yield ("task", "command"), f"the space {how} {what}, {hint.format(name)}, or take a space without it"
    overrides = study.baseline.overrides if study.baseline is not None else {}
    for part, settings in (("task_config", study.task_config), ("baseline", overrides)):
        for name in study.task.untold({name: [value] for name, value in settings.items()}):
            if name not in said:
                said.add(name)
                yield (part, name), f"is {kind_of(settings[name])}, {hint.format(name)}"


def _is_name(name: Any) -> bool:
    try:
        return isinstance(name, str) and bool(check_name(name))
    except UserError:
        return False


def _is_path(task: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", task) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _options(guard: Any, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(guard, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _canonical(value: Any) -> Any:
    """2.0 is the number 2."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
