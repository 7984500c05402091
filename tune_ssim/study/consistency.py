"""Consistency checks between the parts of a study. Every problem has its location."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_ssim.base.validation import Problem
from tune_ssim.base.yaml_source import Loc, describe, did_you_mean
from tune_ssim.guards import SmokeTest
from tune_ssim.losses.schedules import NO_CLAMP
from tune_ssim.study.command_spec import CommandSpec, placeholders, reading_problems
from tune_ssim.study.domains import Domain
from tune_ssim.study.objective import DEFAULT_OBJECTIVE, Objective
from tune_ssim.study.space import GAIN, GRAD_CLAMP, GRAD_SCALE, MAX_T, WEIGHT, Space
from tune_ssim.study.weight_schedule import assembled, is_part_of_schedule, with_parts

if TYPE_CHECKING:
    from tune_ssim.study.study import Study


def part_problems(study: Study) -> Iterator[Problem]:
    """Problems between the parts of a study. A part that is invalid by itself is None here."""
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
                    message = f"is {own}, but the space {study.space.name!r} fixes it at {value}; set it in one place"
                    yield Problem(("task_config", key), message)
            if WEIGHT in (study.task_config or {}) and any(map(is_part_of_schedule, (*stage.parameters, *stage.fixed))):
                message = f"is set here, but the space {study.space.name!r} gives it a schedule; set it in one place"
                yield Problem(("task_config", WEIGHT), message)
        yield from _clamp_problems(study, study.space)
        stages = len(study.space.stages)
        if study.search is not None and study.search.trials < stages:
            message = f"a space with {stages} stages needs at least {stages} trials, got {study.search.trials}"
            yield Problem(("search", "trials"), message)
        if study.space.is_relative and study.calibration is None:
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
    if study.confirm is not None and study.confirm.steps is not None and study.task_config is not None and steps is None:
        message = "cannot be told to the command, which runs to its own end: leave it out, or say task_config: {steps: N} too"
        yield Problem(("confirm", "steps"), message)
    asha = study.scheduler
    if asha is not None and steps is not None:
        if asha.max_steps > steps:
            message = f"must be at most the trial's {steps} steps, got {asha.max_steps}"
            yield Problem(("scheduler", "asha", "max_steps"), message)
        if asha.grace_steps > asha.max_steps:
            message = f"must be at most max_steps ({asha.max_steps}), got {asha.grace_steps}"
            yield Problem(("scheduler", "asha", "grace_steps"), message)


def _clamp_problems(study: Study, space: Space) -> Iterator[Problem]:
    """Problems for an adaptive weight with a clamped gradient that are given in different parts."""
    config = study.task_config or {}
    in_config = ("task_config", WEIGHT if config.get(GRAD_CLAMP) is None else GRAD_CLAMP)
    trials: list[tuple[Loc, dict[str, Any]]] = [(in_config, {**stage.fixed, **stage.parameters}) for stage in space.stages]
    for name, own in study.demonstrations.items() if study.search is not None else ():
        trials.append((("search", "demonstrations", name, GRAD_CLAMP) if GRAD_CLAMP in own else in_config, own))
    seen: set[Loc] = set()
    for place, own in trials:
        settings = assembled({**config, **own})
        weight = settings.get(WEIGHT)
        is_adaptive = GAIN not in settings and isinstance(weight, Mapping) and "adaptive" in weight
        if is_adaptive and settings.get(GRAD_CLAMP) is not None and place not in seen:
            seen.add(place)
            yield Problem(place, NO_CLAMP, subject=GRAD_CLAMP)


def _command_problems(study: Study, task: CommandSpec) -> Iterator[Problem]:
    has_settings = study.space is not None and study.baseline is not None and study.task_config is not None
    for loc, message in task.problems(
        _values_of(study) if has_settings else None
    ):  # else names may be missing only for that reason
        yield Problem(("task", *loc), message)
    if study.task_config is not None and study.steps is None:
        for loc, template, _ in task.templates():
            if "steps" in placeholders(template):
                message = f"{template!r} needs a number of steps: say task_config: {{steps: N}}"
                yield Problem(("task", *loc), message)
    yield from _schedules(study, task)
    yield from _unused(study, task)
    if has_settings:
        # Settings of every trial. Without a weight, gate and scale have no effect and get any value (`Study.baseline_settings`).
        always = {*study.task_config, *study.baseline.overrides, WEIGHT, MAX_T, GRAD_SCALE}
        for name in sorted((task.referenced_settings() & set(_values_of(study))) - always):
            yield Problem(("baseline",), f"has no {name}, which the command uses: set it here, or in task_config")
    if task.records is not None and task.smoke is None and SmokeTest.name in (study.guards or ()):
        message = "nothing makes samples: give the task a `smoke: {command: [...]}`, or set smoke_test: null"
        yield Problem(("guards", "smoke_test"), message)
    if study.scheduler is not None and task.evaluate is None:
        message = "asha needs held-out numbers while the training goes on: an `evaluate: {command: [...]}`"
        yield Problem(("scheduler",), message)


def _schedules(study: Study, task: CommandSpec) -> Iterator[Problem]:
    """Problems for a schedule of the weight, which only a program that asks `trial_context` can get."""
    stages = study.space.stages if study.space is not None else ()
    places = [("space", name) for stage in stages for name in (*stage.parameters, *stage.fixed) if is_part_of_schedule(name)]
    places += [("task_config", WEIGHT)] if isinstance((study.task_config or {}).get(WEIGHT), Mapping) else []
    if places and (task.records is not None or WEIGHT in task.referenced_settings()):
        message = (
            f"a command gets numbers, and a schedule of {WEIGHT} changes it from step to step. Let the program compute the weight "
            "from settings with names of your own, e.g. parameters: {target_ratio: {log_uniform: [1.5, 4]}} with "
            f'"--target_ratio={{target_ratio}}" in its command; or read t.config["{WEIGHT}"] of `trial_context` in it, which '
            "`tune_ssim.losses.DecodedLoss` takes as it is"
        )
        yield Problem((places[0][0],) if places[0][0] == "space" else places[0], message)


def part_warnings(study: Study) -> Iterator[Problem]:
    """What is valid, and probably a mistake."""
    for goal in study.objective.goals:
        if goal.warning:
            yield Problem(("objective", goal.direction), goal.warning, "")
    yield from _misspelt_margins(study.objective)
    if study.steps is not None:
        yield from _too_long_schedules(study, study.steps)
    yield from _seed_warnings(study)


def _misspelt_margins(objective: Objective) -> Iterator[Problem]:
    """Warnings for `keep` rules whose name is close to a known metric. Only the baseline shows what a training measures."""
    known = [*DEFAULT_OBJECTIVE.keep, *(goal.metric for goal in objective.goals)]
    for name in objective.keep:
        guess = did_you_mean(name, known)
        is_other = any(one in name or name in one for one in known)  # ms_ssim, flow_loss
        if guess.startswith("; did") and not is_other:
            message = f"may be misspelt{guess} A rule for a metric that the training does not measure has no effect"
            yield Problem(("objective", "keep", name), message)


def _too_long_schedules(study: Study, steps: int) -> Iterator[Problem]:
    """Warnings for schedules of the weight with more steps than a trial."""
    weight = study.task_config.get(WEIGHT)
    own = with_parts({"fixed": {WEIGHT: weight}})["fixed"] if isinstance(weight, Mapping) else {}
    parts: list[tuple[Loc, Mapping[str, Any]]] = [(("task_config",), own)]
    for index, stage in enumerate(study.space.stages):
        place: Loc = ("space",) if len(study.space.stages) == 1 else ("space", "stages", index)
        written = "parameters" if any(map(is_part_of_schedule, stage.parameters)) else "fixed"
        parts.append(((*place, written), {**stage.fixed, **stage.parameters}))
    for place, settings in parts:
        for name, value in settings.items():
            if is_part_of_schedule(name) and name.endswith(".steps"):
                longest = max(value.listed) if isinstance(value, Domain) else value
                if longest > steps:
                    message = f"{longest:g} is more than the trial's {steps} steps: the schedule does not reach its end"
                    yield Problem((*place, *name.split(".")), message, subject=name)


def _seed_warnings(study: Study) -> Iterator[Problem]:
    """Warnings about too few seeds, and about a command that trains several times with the same one."""
    if study.confirm is not None and study.confirm.seeds == 2:  # Student's t at 97.5 % with one and two degrees of freedom
        message = "the 95 % interval of 2 seeds is 12.7 standard errors to each side, that of 3 seeds 4.3: 2 rarely confirm"
        yield Problem(("confirm", "seeds"), message)
    task = study.task
    if not isinstance(task, CommandSpec) or task.records is None or "seed" in task.referenced_settings():
        return  # without `records` it may be a loop that asks `trial_context` for its seed
    for name, seeds in (("confirm", study.confirm.seeds if study.confirm else 0), ("baseline", study.baseline_seeds)):
        if seeds > 1:
            message = (
                f"the command does not get {{seed}}, so that the {seeds} seeds of `{name}` are {seeds} starts of one training: "
                "copies that prove nothing, unless the program draws new random numbers at each start: put it where it belongs, "
                'e.g. "--seed={seed}"'
            )
            yield Problem(("task", "command"), message)
            return


def missing_files(study: Study) -> Iterator[Problem]:
    """Programs and logs that are missing on this machine. Programs are not checked for several nodes, which may differ."""
    if isinstance(study.task, CommandSpec) and study.resources is not None and study.resources.nodes == 1:
        for loc, message in study.task.missing_programs(study.import_path):
            yield Problem(("task", *loc), message)
    log = study.baseline.log if study.baseline is not None else None
    if log is not None and not Path(log.file).exists():
        yield Problem(("baseline", "log"), f"{log.file}: no such file")


def _values_of(study: Study) -> dict[str, list[Any]]:
    """Setting → example values, for every setting of the study's trials."""
    found: dict[str, list[Any]] = {}
    baseline = study.baseline.overrides if study.baseline is not None else {}
    for settings in (study.task_config or {}, baseline, *(values for _, values in _of_space(study))):
        for name, value in settings.items():
            found.setdefault(name, []).append(value)
    return found


def _of_space(study: Study) -> Iterator[tuple[str, dict[str, Any]]]:
    """(verb for messages, setting → value) of every value in the space; for ranges, of their bounds."""
    for stage in study.space.stages if study.space is not None else ():
        for name, domain in stage.parameters.items():
            if is_part_of_schedule(name):
                continue  # see `_schedules`
            if name == GAIN:  # a gain becomes a weight and a scale
                yield "varies", {WEIGHT: 0.5, GRAD_SCALE: 1.0, MAX_T: 1.0}
                continue
            for value in domain.listed:
                yield "varies", {name: value}
        yield "fixes", {name: value for name, value in stage.fixed.items() if not is_part_of_schedule(name)}
        for point in stage.points:
            yield "has a point with", {name: value for name, value in point.items() if name != GAIN}


def _unused(study: Study, task: CommandSpec) -> Iterator[Problem]:
    """Problems for settings that the command does not use; they would never reach the training."""
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
