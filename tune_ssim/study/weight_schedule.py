"""A schedule of `ssim_loss_weight` in a space: each of its numbers is a setting of its own, so that each can be searched.

    ssim_loss_weight: {adaptive: {target_ratio: {log_uniform: [1.5, 4]}, max_weight: 1000}}

is read as the parameter `ssim_loss_weight.adaptive.target_ratio` and the fixed setting `ssim_loss_weight.adaptive.max_weight`. A
training gets the mapping again, with numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from tune_ssim.base.validation import Problem, Problems
from tune_ssim.losses.schedules import NO_CLAMP, SCHEDULES, Adaptive, Schedule, read_schedule
from tune_ssim.study.domains import Domain

WEIGHT = "ssim_loss_weight"
_PREFIX = WEIGHT + "."


def is_part_of_schedule(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(_PREFIX)


def with_parts(stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage as in a file, with the numbers of a schedule as settings. Numbers in `parameters` that are not searched are fixed."""
    found = {**stage, **{part: _taken_apart(stage[part]) for part in ("parameters", "fixed") if part in stage}}
    if isinstance(stage.get("points"), (list, tuple)):
        found["points"] = [_taken_apart(point) for point in stage["points"]]
    parameters, fixed = found.get("parameters"), found.get("fixed") or {}
    if isinstance(parameters, Mapping) and isinstance(fixed, Mapping):
        given = {name for name, value in parameters.items() if is_part_of_schedule(name) and not isinstance(value, Mapping)}
        found["parameters"] = {name: value for name, value in parameters.items() if name not in given}
        found["fixed"] = {**fixed, **{name: parameters[name] for name in parameters if name in given}}
    return found


def _taken_apart(settings: Any) -> Any:
    weight = settings.get(WEIGHT) if isinstance(settings, Mapping) else None
    if not isinstance(weight, Mapping) or len(weight) != 1:
        return settings
    ((kind, numbers),) = weight.items()
    if not isinstance(numbers, Mapping) or not numbers or not all(isinstance(name, str) for name in (kind, *numbers)):
        return settings
    parts = {f"{_PREFIX}{kind}.{name}": value for name, value in numbers.items()}
    return {name: value for name, value in settings.items() if name != WEIGHT} | parts


def assembled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the parts of a schedule as the mapping that a training gets."""
    found = {name: value for name, value in settings.items() if not is_part_of_schedule(name)}
    schedule: dict[str, dict[str, Any]] = {}
    for name in settings:
        if is_part_of_schedule(name):
            _, kind, number = name.split(".", 2)
            schedule.setdefault(kind, {})[number] = settings[name]
    return found | ({WEIGHT: schedule} if schedule else {})


def schedules_across(parameters: Mapping[str, Domain], fixed: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The schedules of a stage: with `count` values of each searched number, the largest and the smallest among them, if only one
    number is searched, else with two values of each. Empty if its weight is a number."""
    searched = {name: domain for name, domain in parameters.items() if is_part_of_schedule(name)}
    own = {name: value for name, value in fixed.items() if is_part_of_schedule(name)}
    grids = [domain.grid(count if len(searched) == 1 else 2) for domain in searched.values()]
    if not (searched or own):
        return []
    return [assembled({**own, **dict(zip(searched, values, strict=True))})[WEIGHT] for values in product(*grids)]


def schedule_text(weight: Mapping[str, Any]) -> str:
    """`adaptive, target_ratio 2`"""
    return ", ".join(f"{kind}, " + ", ".join(f"{name} {value:.4g}" for name, value in one.items()) for kind, one in weight.items())


def schedule_of(weight: Any) -> Schedule | Adaptive | None:
    """The schedule of a setting's value; None if it is a number."""
    return read_schedule(weight) if isinstance(weight, Mapping) else None


def weight_problems(weight: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a schedule of numbers."""
    problems = Problems()
    with problems.at():
        read_schedule(weight)
        ((kind, numbers),) = weight.items()
        for name in ("value", "start", "end"):
            if numbers.get(name, 0) < 0:
                problems.add((kind, name), f"a weight must be >= 0, got {numbers[name]:g}")
    return problems.found


def stage_problems(parameters: Mapping[str, Domain], fixed: Mapping[str, Any]) -> Iterator[Problem]:
    """Problems of the schedule of a stage: each number is checked with every value that the file names."""
    listed = {name: [value] for name, value in fixed.items() if is_part_of_schedule(name)}
    listed |= {name: list(domain.listed) for name, domain in parameters.items() if is_part_of_schedule(name)}
    if not listed:
        return
    place = {name: ("parameters" if name in parameters else "fixed", name) for name in listed}
    for part, settings in (("parameters", parameters), ("fixed", fixed)):
        for name in (WEIGHT, "gain"):
            if name in settings:
                hint = "; for a gain that rises there is ssim_warmup_steps" if name == "gain" else ""
                yield Problem((part, name), f"cannot be combined with a schedule of {WEIGHT}{hint}")
    kinds = list(dict.fromkeys(name.split(".")[1] for name in listed))
    if len(kinds) > 1:
        yield Problem(place[list(listed)[-1]], f"a weight has one schedule, got {' and '.join(kinds)}")
        return
    seen: set[tuple[str, str]] = set()
    for varied, values in listed.items():
        for value in values:
            numbers = {name.split(".", 2)[2]: own[0] for name, own in listed.items()} | {varied.split(".", 2)[2]: value}
            for one in weight_problems({kinds[0]: numbers}):
                name = ".".join(map(str, (WEIGHT, *one.loc[:2])))
                loc = place.get(name, place[varied] if kinds[0] in SCHEDULES else next(iter(place.values())))
                if (name, one.message) not in seen:
                    seen.add((name, one.message))
                    yield Problem(loc, one.message, subject=name)
    if kinds == ["adaptive"]:
        for part, settings in (("parameters", parameters), ("fixed", fixed)):
            if settings.get("ssim_grad_clamp") is not None:
                yield Problem((part, "ssim_grad_clamp"), NO_CLAMP)
