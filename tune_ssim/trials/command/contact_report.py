"""What a study says when the first run of a command has taken its first steps: how it is read, and what can be judged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from statistics import median

from tune_ssim.guards import Guard, SmokeTest
from tune_ssim.guards.guard import without_metric
from tune_ssim.records import SMOKE, TOTAL_NORM, Record
from tune_ssim.study.objective import Objective
from tune_ssim.trials.command.command_task import CommandTask

STEPS = 20  # a debug run has 10 to 50 (SEEDS A5)


def first_contact(task: CommandTask, records: Sequence[Record], guards: Sequence[Guard], objective: Objective) -> Iterator[str]:
    """Lines of text. records: the first ones, in order, at least one of them."""
    names = {name for record in records for name in record.values}
    steps = [record.step for record in records]
    apart = median([later - earlier for earlier, later in itertools.pairwise(steps)] or [1])
    every = f", a record every {apart:g}" if apart > 1 else ""
    of = f" of {task.steps}" if task.steps is not None else ", until it ends by itself"
    yield f"how the command is read: steps {steps[0]} to {steps[-1]}{of}{every}; {task.lines_read()}"
    yield f"  metrics: {', '.join(sorted(name for name in names if not name.startswith(SMOKE))) or 'none'}"
    with_norm = sum(TOTAL_NORM in record.values for record in records)
    observed = task.observation.sentence() if task.observation is not None else "not observed: switched off"
    yield f"  {TOTAL_NORM}: at {with_norm} of {len(records)} records; {observed}"
    yield f"  seed: {'handed to the command' if task.is_paired else 'not handed to the command, so other seeds may be copies'}"
    if task.spec.checkpoints is not None:
        written = [str(step) for step, _ in task.written()]
        yield f"  checkpoints: {'at steps ' + ', '.join(written) if written else 'none so far'} ({task.spec.checkpoints})"
    sampled = [str(record.step) for record in records if any(name.startswith(SMOKE) for name in record.values)]
    if sampled or any(isinstance(guard, SmokeTest) for guard in guards):
        yield f"  samples: {'at steps ' + ', '.join(sampled) if sampled else 'none so far'}"
    blind = without_metric(guards, names)
    able = [guard.name for guard in guards if guard.name not in blind]
    unable = "".join(f"; {name} has no {', '.join(missing)} so far" for name, missing in blind.items())
    yield f"  guards: {', '.join(able) or 'none'} can judge{unable}"
    where = "measured" if objective.metric in names else "not measured so far: a later record or an evaluation must give it"
    yield f"  objective: {objective.direction} {objective.name}, {where}"
