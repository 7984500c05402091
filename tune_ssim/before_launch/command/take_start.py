"""Runs one start of a command on this machine's resources, or on the nodes that `launch` knows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.before_launch.command.starts import Start, StartJob
from tune_ssim.records import Record, is_of_training
from tune_ssim.trials.command.command_task import CommandTask

OUTPUT_LINES = 2000  # of the program's start, searched for warnings


def take_start(make: Callable[[], CommandTask], job: StartJob, name: str, folder: Path) -> Start:
    """Starts the command, reads `job.steps` training steps and ends it. A command that fails is a `Start` with its failure."""
    task = make()
    task.identify(name, folder)
    task.setup(job.config, job.seed)
    records: list[Record] = []
    failure, first_record_s, started = "", 0.0, time.monotonic()
    try:
        while len(records) < job.steps:
            values = task.step()
            if values is None:
                failure = f"the command ended after {len(records)} of {job.steps} steps" if records else "it ended without a step"
                break
            first_record_s = first_record_s or time.monotonic() - started
            numbers = {key: float(value) for key, value in values.items() if key != "step"}
            if is_of_training(int(values["step"]), numbers):
                records.append(Record(int(values["step"]), numbers))
        wall_s = time.monotonic() - started
        settings: Mapping[str, Any] = task.effective()
    except (UserError, BadSetup) as error:
        failure, wall_s, settings = str(error), time.monotonic() - started, {}
    finally:
        task.close()
    output = _head(folder / name / "output.log")
    return Start(job, tuple(records), settings, output, None, {}, failure, first_record_s, wall_s)


def _head(log: Path) -> tuple[str, ...]:
    if not log.exists():
        return ()
    with log.open(encoding="utf-8", errors="replace") as file:
        return tuple(line.rstrip("\n") for _, line in zip(range(OUTPUT_LINES), file, strict=False))


def take_here(make: Callable[[], CommandTask], folder: Path) -> Callable[[Sequence[StartJob]], list[Start]]:
    """A `Take` that runs one start after the other on this machine."""
    count = 0

    def take(jobs: Sequence[StartJob]) -> list[Start]:
        nonlocal count
        found = []
        for job in jobs:
            count += 1
            found.append(take_start(make, job, f"start-{count:02d}", folder))
        return found

    return take
