"""Short starts of a command. Each runs a few steps at one setting and shows its records, settings and output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.before_launch.readings import Reading
from tune_ssim.guards import SmokeTest
from tune_ssim.probes.norm_model import Array
from tune_ssim.records import ACTIVE_FRACTION, TOTAL_NORM, Record
from tune_ssim.study.sections import CalibrationOptions


@dataclass(frozen=True)
class StartJob:
    """config: the command's settings. steps: optimiser steps to read. is_held: the observer holds the updates off. repeat: tells
    equal jobs apart, each of which is run. smoke_test: judges the samples of step 0, if there is a command for it."""

    config: Mapping[str, Any]
    seed: int
    steps: int
    is_held: bool = True
    repeat: int = 0
    smoke_test: SmokeTest | None = None

    @property
    def key(self) -> str:
        return json.dumps([dict(self.config), self.seed, self.steps, self.is_held, self.repeat], sort_keys=True, default=str)


@dataclass(frozen=True)
class Start:
    """What a start showed.

    records: of its training steps, in order. settings: those that it echoed, otherwise as given. output: its first lines.
    held: whether the observer saw the weights unchanged after every step; None if it could not look. observed: what the observer
    reports besides records. reading: what could not be read, as one line. checkpoints: the steps of those it wrote. samples: checks
    of step 0, None if they were not asked for. failure: why it ended before its last step; empty if it did not."""

    job: StartJob
    records: tuple[Record, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    output: tuple[str, ...] = ()
    held: bool | None = None
    observed: Mapping[str, Any] = field(default_factory=dict)
    reading: str = ""
    checkpoints: tuple[int, ...] = ()
    samples: tuple[Check, ...] | None = None
    failure: str = ""
    first_record_s: float = 0.0
    wall_s: float = 0.0

    def values(self, name: str) -> Array:
        """`[step]`, NaN at steps without it."""
        return np.array([record.values.get(name, np.nan) for record in self.records[: self.job.steps]])

    @property
    def step_s(self) -> float:
        return (self.wall_s - self.first_record_s) / max(1, len(self.records) - 1)


Take = Callable[[Sequence[StartJob]], Iterable[Start]]
"""Runs starts, side by side where there is room, and yields each when it has ended."""
Say = Callable[[str], None]


class Starts:
    """Takes starts of one study, each job once: calibration uses those that preflight took.

    kept: of earlier inspections of the study. keep: gets all starts after each new one. planned: about how many there will be."""

    def __init__(
        self,
        take: Take,
        kept: Sequence[Start] = (),
        keep: Callable[[Sequence[Start]], None] = lambda starts: None,
        say: Say = lambda line: None,
        planned: int = 0,
    ) -> None:
        self._take, self._keep, self._say, self._planned = take, keep, say, planned
        self._kept = {start.job.key: start for start in kept}
        self._is_timed = False
        self.taken: dict[str, Start] = {}
        self.reused: set[str] = set()

    def __call__(self, jobs: Sequence[StartJob]) -> list[Start]:
        for job in jobs:
            kept = self._kept.get(job.key)
            if job.key not in self.taken and kept is not None and (job.smoke_test is None or kept.samples is not None):
                self.taken[job.key] = kept
                self.reused.add(job.key)
        new = {job.key: job for job in jobs if job.key not in self.taken}
        if new:
            self._take_new(list(new.values()))
        return [self.taken[job.key] for job in jobs]

    def _take_new(self, jobs: Sequence[StartJob]) -> None:
        if not self._is_timed:
            count = max(len(jobs), self._planned - len(self._kept))
            self._say(f"about {count} start{'s' * (count > 1)} of the command, {jobs[0].steps} steps each after its start-up")
        for start in self._take(jobs):
            self.taken[start.job.key] = start
            self._keep([*{**self._kept, **self.taken}.values()])
            if not self._is_timed:
                self._say(
                    f"about {start.wall_s:.0f} s each, judging by the first one ({start.first_record_s:.0f} s until its first step)"
                )
                self._is_timed = True


class CommandReader:
    """Takes the readings of a calibration from starts of the command: see `readings.Reader`.

    Where the observer holds the updates off, or `disable_update` does, one start gives all batches. Otherwise only the norm of
    the first step is measured before an update, and each batch is a start with another seed."""

    def __init__(self, starts: Starts, seed: int, options: CalibrationOptions | None) -> None:
        self.starts, self.seed = starts, seed
        self._is_disabled = options is not None and bool(options.disable_update)
        self._first_step_only = options is not None and options.method == "first_step"

    def __call__(self, configs: Sequence[Mapping[str, Any]], batches: int) -> list[Reading]:
        if self._first_step_only:
            seeds = range(self.seed, self.seed + batches)
            groups = [[StartJob(config, seed, 1, is_held=False) for seed in seeds] for config in configs]
            self.starts([job for jobs in groups for job in jobs])  # all at once, so that they may run side by side
            return [self._reading(self.starts(jobs), 1) for jobs in groups]
        starts = self.starts([StartJob(config, self.seed, batches) for config in configs])
        if not self._is_disabled and any(start.held is None and not start.failure for start in starts):
            raise UserError(
                "calibration: the program cannot be observed, so its weight updates cannot be disabled; name a setting that "
                "disables them, e.g. `calibration: {update_off: {lr: 0}}` with {lr} in the command, or have only first steps "
                "read, one start a batch, with `calibration: {method: first_step, batches: 4}`"
            )
        return [self._reading([start], batches) for start in starts]

    def _reading(self, starts: Sequence[Start], steps: int) -> Reading:
        for start in starts:
            _require_complete(start, steps)
        norms, active = (np.concatenate([start.values(name) for start in starts]) for name in (TOTAL_NORM, ACTIVE_FRACTION))
        clipping = starts[0].settings.get("max_grad_norm")
        return Reading(norms, active, float(np.mean([start.step_s for start in starts])), clipping)


def _require_complete(start: Start, steps: int) -> None:
    """Raises UserError unless the start gave a total_norm at `steps` steps; BadSetup if its updates were not held off."""
    if start.failure:
        raise UserError(f"calibration: a start of the command ended early: {start.failure}")
    found = np.count_nonzero(~np.isnan(start.values(TOTAL_NORM)))
    if not found:
        seen = ", ".join(sorted({name for record in start.records for name in record.values})) or "nothing"
        raise UserError(f"calibration: no {TOTAL_NORM} in the command's records, and none could be observed; saw {seen}")
    if found < steps:
        raise UserError(f"calibration: {found} of {steps} steps of the command have a {TOTAL_NORM}: print it at every step")
    if start.job.is_held and start.held is False:
        raise BadSetup("calibration: the command's weights changed although its updates were held off")


def significant_digits(values: Sequence[float]) -> int:
    """The number of significant digits that suffices to write all of the finite values: those of a printed log."""
    finite = [value for value in values if np.isfinite(value)]
    return next((n for n in range(1, 17) if all(float(f"{value:.{n}g}") == value for value in finite)), 17)
