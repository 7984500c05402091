"""Runs one start of a command on this machine's resources, or on the nodes that `launch` knows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.before_launch.command.starts import Start, StartJob
from tune_ssim.before_launch.preflight.networks import check_samples
from tune_ssim.before_launch.preflight.report import Check, unknown
from tune_ssim.before_launch.preflight.subject import guarded
from tune_ssim.guards import SmokeTest
from tune_ssim.probes.observer import Observation
from tune_ssim.records import Record
from tune_ssim.trials.command.command_task import CommandTask

OUTPUT_LINES = 2000  # of the program's start, searched for warnings


def take_one(make: Callable[[], CommandTask], job: StartJob, study: str, folder: Path) -> Start:
    """Starts the command, reads `job.steps` training steps and ends it. A command that fails is a `Start` with its failure.

    folder: for its files; what it writes there can be deleted afterwards."""
    task = make()
    # A name that no other start ever has: a training may resume from whatever it finds under its name (SEEDS A10).
    name = f"{study}-start-{uuid4().hex[:8]}"
    task.identify(name, folder)
    task.is_calibrating, task.holds_updates = True, job.is_held
    task.setup(job.config, job.seed)
    records: list[Record] = []
    settings: Mapping[str, Any] = {}
    samples: tuple[Check, ...] | None = None
    failure, first_record_s, started = "", 0.0, time.monotonic()
    try:
        if job.smoke_test is not None:
            samples = tuple(guarded("smoke", partial(_samples, task, job.smoke_test))) if task.takes_samples else ()
            started = time.monotonic()
        records, first_record_s = task.first_steps(job.steps)
        settings = task.effective()
        if len(records) < job.steps:
            failure = f"the command ended after {len(records)} of {job.steps} steps" if records else "it ended without a step"
    except (UserError, BadSetup) as error:
        failure = str(error)
    wall_s = time.monotonic() - started
    reading, checkpoints = task.reading_problem(), tuple(sorted({step for step, _ in task.written()}))
    seen = task.observation
    task.close()
    return Start(
        job,
        tuple(records),
        settings,
        _head(folder / name / "output.log"),
        held=seen.held if seen is not None and seen.is_observed else None,
        observed=_plain(seen) if seen is not None else {},
        reading=reading,
        checkpoints=checkpoints,
        samples=samples,
        failure=failure,
        first_record_s=first_record_s,
        wall_s=wall_s,
    )


def _plain(seen: Observation) -> dict[str, Any]:
    return {"weights": seen.weights, "loads": seen.loads, "optimizers": seen.optimizers, "sentence": seen.sentence()}


def _samples(task: CommandTask, smoke_test: SmokeTest) -> Iterator[Check]:
    """The smoke test of the weights that the training starts from."""
    sample = task.sample()
    if sample is None:
        yield unknown("smoke", "no samples before the first step: `smoke.at_start` names no checkpoint")
    else:
        yield from check_samples(task, smoke_test, sample)


def _head(log: Path) -> tuple[str, ...]:
    if not log.exists():
        return ()
    with log.open(encoding="utf-8", errors="replace") as file:
        return tuple(line.rstrip("\n") for _, line in zip(range(OUTPUT_LINES), file, strict=False))


def take_here(make: Callable[[], CommandTask], study: str, folder: Path, jobs: Sequence[StartJob]) -> Iterator[Start]:
    """A `Take` once its first three arguments are bound: one start after the other on this machine."""
    for job in jobs:
        yield take_one(make, job, study, folder)
