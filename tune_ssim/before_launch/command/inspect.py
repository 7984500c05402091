"""Preflight and calibration of a command study from short starts of its command."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.before_launch.calibration import Calibration, calibrate, gates_of
from tune_ssim.before_launch.command import checks
from tune_ssim.before_launch.command.kept_starts import KeptStarts, fingerprint_of
from tune_ssim.before_launch.command.observed_weights import check_observed
from tune_ssim.before_launch.command.starts import CommandReader, Say, Start, StartJob, Starts, Take
from tune_ssim.before_launch.command.take_start import take_here
from tune_ssim.before_launch.preflight.launch import settings_of
from tune_ssim.before_launch.preflight.report import Check, Report
from tune_ssim.guards import NormRatio, SmokeTest
from tune_ssim.study.space import KNOWN
from tune_ssim.study.study import Study
from tune_ssim.trials.training import IMAGE_LOSS_KEYS

STEPS = 20  # of a preflight start; a debug run has 10 to 50 (SEEDS A5)
N_PREFLIGHT = 4  # starts with the baseline's settings: one, one more, one with another seed, and one with updates
MAX_SETTINGS = 3  # searched settings of other losses that are tested, two starts each


def inspect_command(
    study: Study,
    make: Callable[[], Any],
    take: Take | None = None,
    *,
    preflight: bool,
    calibration: bool,
    steps: int | None = None,
    kept: Path | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """The preflight report and the calibration, as plain data. Both use the same starts.

    make: the study's task. take: runs the starts, by default one after the other in a temporary folder of this machine. kept: the
    file of starts that an earlier inspection took, and that are used again; None: none are. say: gets lines on the way."""
    if take is None:
        folder, failures = Path(tempfile.mkdtemp(prefix="tune-ssim-starts-")), list[str]()

        def take_noting_failures(jobs: Sequence[StartJob]) -> Iterator[Start]:
            for start in take_here(make, study.name, folder, jobs):
                failures.extend([start.failure] if start.failure else [])
                yield start

        try:
            return inspect_command(
                study, make, take_noting_failures, preflight=preflight, calibration=calibration, steps=steps, kept=kept, say=say
            )
        finally:
            if not failures:  # their messages name the files of what was printed
                shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    planned = (N_PREFLIGHT + 2 * len(_ends_of_others(study)) if preflight else 0) + (
        _of_calibration(study) if study.calibrates else 0
    )
    starts = Starts(take, say=say, planned=planned)
    if kept is not None:
        store = KeptStarts(kept, fingerprint_of(study, make))
        starts = Starts(take, store.read(), store.write, say, planned)
    inspection = _Inspection(study, starts, steps)
    try:
        return _inspect(inspection, study, started, preflight, calibration)
    finally:
        if starts.reused:
            count = f"{len(starts.reused)} of {len(starts.taken)} starts of the command"
            say(f"{count} were taken by an earlier preflight or calibration (--fresh takes new ones)")


def _ends_of_others(study: Study) -> dict[str, list[Any]]:
    """Both ends of searched settings that are not of the auxiliary losses."""
    values: dict[str, list[Any]] = {}
    for setting in settings_of(study.space):
        for name, value in setting.items():
            if name not in KNOWN and not name.startswith(IMAGE_LOSS_KEYS):
                values.setdefault(name, []).append(value)
    ends = {name: [found[0], found[-1]] for name, found in values.items() if found[0] != found[-1]}
    return dict(list(ends.items())[:MAX_SETTINGS])


def _of_calibration(study: Study) -> int:
    """About how many starts a calibration takes, apart from those of preflight."""
    assert study.calibration is not None
    readings = 2 * len(gates_of(study, for_picture=False)) + 2
    return readings * (study.calibration.batches if study.calibration.method == "first_step" else 1)


def _inspect(inspection: _Inspection, study: Study, started: float, preflight: bool, calibration: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if preflight:
        report = Report(tuple(inspection.checks()), time.perf_counter() - started)
        found["preflight"] = report.to_dict()
        if report.status == "bad_setup":
            return found
    if calibration and study.calibrates:
        try:
            found["calibration"] = inspection.calibration().to_dict()
        except UserError:
            if not preflight or study.space.is_relative:
                raise  # otherwise the study runs without it, and the preflight report says why
    return found


class _Inspection:
    def __init__(self, study: Study, starts: Starts, steps: int | None) -> None:
        self.study, self.starts, self.seed = study, starts, study.search.seed
        self.options = study.calibration if study.calibrates else None
        # By default one start serves preflight and calibration.
        self.steps = steps or (self.options.batches if self.options is not None else STEPS)
        self._calibration: Calibration | None = None
        self._unpaired = ""

    def calibration(self) -> Calibration:
        """Raises UserError or BadSetup if the command cannot be calibrated."""
        if self._unpaired:
            raise UserError(f"calibration: {self._unpaired}; it compares settings on the same batches")
        if self._calibration is None:
            found = calibrate(self.study, reader=CommandReader(self.starts, self.seed, self.options))
            self._calibration = replace(found, findings=(*found.findings, *checks.digits_finding(list(self.starts.taken.values()))))
        return self._calibration

    def checks(self) -> Iterator[Check]:
        """Checks in the order in which to look for a cause. Ends after a start that failed."""
        disabled = self.options.disable_update if self.options is not None else {}
        config = {**self.study.task_config, **self.study.baseline_settings}
        smoke_test = next((guard for guard in self.study.guard_list if isinstance(guard, SmokeTest)), None)
        first = StartJob({**config, **disabled}, self.seed, self.steps, smoke_test=smoke_test)
        jobs = [first, replace(first, repeat=1, smoke_test=None), replace(first, seed=self.seed + 1, smoke_test=None)]
        if disabled:
            jobs.append(StartJob(config, self.seed, self.steps, is_held=False))
        baseline, again, other, *trained = self.starts(jobs)
        yield from checks.check_start(baseline, self.study.guard_list, self.study.objective.name)
        if baseline.failure:
            return
        update_off = checks.check_held(baseline, trained[0] if trained else None)
        yield update_off
        yield from check_observed(baseline.observed)
        for check in checks.check_seeds(baseline, again, other):
            if check.name == "seeds/same" and check.status == "warn":
                self._unpaired = check.sentence
            yield check
        if update_off.status == "ok":
            yield checks.check_batches(baseline, has_noise=self.study.has_ssim)
        if update_off.status == "ok" and not self._unpaired:
            yield checks.check_updates(baseline, *trained or self.starts([StartJob(config, self.seed, self.steps, is_held=False)]))
        if self.study.calibrates:
            yield from self._effects()
        yield from self._other_settings(config)

    def _effects(self) -> Iterator[Check]:
        try:
            found = self.calibration()
        except UserError as error:
            yield Check("calibration", "unknown", str(error))
        except BadSetup as error:
            lost = checks.check_weight(list(self.starts.taken.values()))
            yield lost or Check("calibration", "bad_setup", str(error), {}, "follow ssim_loss_weight to the loss that is minimised")
        else:
            yield from checks.check_effects(found.model, found.check)
            guards = (guard for guard in self.study.guard_list if isinstance(guard, NormRatio))
            yield checks.check_baseline(found.model, next(guards, NormRatio()).limit)

    def _other_settings(self, config: Mapping[str, Any]) -> Iterator[Check]:
        """Searched settings that are not of the auxiliary losses, such as a learning rate: with updates, so that they can act."""
        for name, both in _ends_of_others(self.study).items():
            jobs = [StartJob({**config, name: value}, self.seed, self.steps, is_held=False) for value in both]
            yield checks.check_setting(name, *self.starts(jobs))
