"""The study: what is trained, what is searched, and how trials are judged, as one frozen object that is read from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, PrivateAttr

from tune_ssim.base.validation import Document, Problem, Problems, plain_mapping, user_error, validate
from tune_ssim.base.yaml_source import Loc, Source, dump_yaml, find_document, read_yaml
from tune_ssim.guards import Divergence, Guard
from tune_ssim.guards.rule_pack import RulePack
from tune_ssim.study.command_spec import CommandSpec
from tune_ssim.study.consistency import missing_files, part_problems, part_warnings
from tune_ssim.study.fields import (
    BUILT_IN_TASKS,
    OrDefaults,
    StudyFile,
    default_baseline,
    default_calibration,
    default_guards,
    default_task_config,
    is_name,
    read_baseline,
    read_calibration,
    read_count,
    read_count_or_null,
    read_guards,
    read_import_path,
    read_name,
    read_rules,
    read_scheduler,
    read_space,
    read_task,
    read_task_config,
    write_baseline,
    write_guards,
    write_task,
)
from tune_ssim.study.objective import Objective
from tune_ssim.study.sections import Asha, BaselineRuns, CalibrationOptions, Confirm, Preflight, Resources, Search, Tracking
from tune_ssim.study.space import GAIN, GRAD_SCALE, MAX_T, WEIGHT, Space
from tune_ssim.study.weight_schedule import is_part_of_schedule

DEFAULT_STUDY = "fundus_ssim"
DEFAULT_SPACE = "wide"


class Study(Document):
    """A study. The constructor raises ValueError for inconsistent parts; `load_study` also reports the line of each problem."""

    name: Annotated[str, PlainValidator(read_name)]  # of its folder and its experiment; default: that of the file
    # A bundled one (BUILT_IN_TASKS: fundus_sr, vae_kl, …), module:Class, module:function, or a command.
    task: Annotated[str | CommandSpec, PlainValidator(read_task), PlainSerializer(write_task)] = "fundus_sr"
    # Settings of the training, the same in every trial, `steps` among them (200, FACTS §2; a command: until it ends by itself).
    task_config: Annotated[dict[str, Any], PlainValidator(read_task_config)] = Field(default_factory=default_task_config)
    # Settings that differ from `task_config` in the baseline, `seeds` and `log`; default the pixel loss only (note 000 §1.2).
    baseline: Annotated[BaselineRuns, PlainValidator(read_baseline), PlainSerializer(write_baseline)] = Field(
        default_factory=default_baseline
    )
    # A name in `tune-ssim spaces`, `name:stage`, a file, or a mapping; default `wide`.
    space: Annotated[Space, PlainValidator(read_space), PlainSerializer(Space.to_yaml)]
    search: OrDefaults[Search] = Field(default_factory=Search)  # how settings are chosen, and how many
    # asha: {…}, or none. FACTS §6: a fifth of ASHA's best picks were not fully trained.
    scheduler: Annotated[
        Asha | None, PlainValidator(read_scheduler), PlainSerializer(lambda asha: asha and {"asha": asha.model_dump()})
    ] = None
    # Options by guard name; null switches one off. norm_ratio, smoke_test, non_finite and divergence are on by default.
    guards: Annotated[dict[str, Guard], PlainValidator(read_guards), PlainSerializer(write_guards)] = Field(
        default_factory=default_guards
    )
    # Additional guards from rule packs; none by default, because packs are specific to a kind of training.
    rules: Annotated[
        tuple[RulePack, ...], PlainValidator(read_rules), PlainSerializer(lambda packs: [dict(pack.document) for pack in packs])
    ] = ()
    # What is improved, and what must not get worse; a list is several objectives.
    objective: Annotated[OrDefaults[Objective], BeforeValidator(Objective.read)] = Field(default_factory=Objective)
    resources: OrDefaults[Resources] = Field(default_factory=Resources)  # of one trial
    # None: off, which the proof records.
    preflight: Preflight | None = Field(default_factory=Preflight)
    # None: off, so nothing is predicted.
    calibration: Annotated[CalibrationOptions | None, BeforeValidator(read_calibration)] = Field(
        default_factory=default_calibration
    )
    confirm: Confirm | None = Field(default_factory=Confirm)  # None: off; then nothing is exported without --unproven
    # Steps between transfers from the device, and so between guard checks; 1 on CPU (DESIGN).
    report_every: Annotated[int, PlainValidator(read_count)] = 1
    # Steps per result sent to Ray; None: one result every two seconds, because each costs Ray milliseconds.
    result_every: Annotated[int | None, PlainValidator(read_count_or_null)] = None
    checkpoint_every: Annotated[int, PlainValidator(read_count)] = 50  # steps; DESIGN
    tracking: Tracking | None = Field(default_factory=Tracking)  # None: off
    # Folder to import a user-defined task from; default the study file's folder.
    import_path: Annotated[str | None, PlainValidator(read_import_path)] = Field(default=None, validate_default=True)
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

    def problems(self, context: StudyFile | None) -> Iterable[Problem]:
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
    given = {"name": stem if is_name(stem) else "study", "space": DEFAULT_SPACE, **given}
    found = validate(Study, source, given, StudyFile(source, folder, launch))
    found._warnings = tuple(f"{source.at(one.loc)}: {one.text()}" for one in part_warnings(found))
    return found


def _canonical(value: Any) -> Any:
    """The value with whole floats as integers, so that 2.0 equals 2."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
