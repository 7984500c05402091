"""A training run as a command: started with a trial's settings, read while it runs, ended with all its child processes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import NothingToResume, UserError
from tune_ssim.probes.observer import EventReader, Observation, observed_environment
from tune_ssim.records import Record, held_out_values
from tune_ssim.records.readers import LineParser, Source, open_source
from tune_ssim.study.command_spec import CommandSpec, fill, placeholders
from tune_ssim.trials.channel import VARIABLE, TrialEnd
from tune_ssim.trials.command.checkpoints import Checkpoints
from tune_ssim.trials.command.command_run import CHANNEL, OBSERVED, OUTPUT_LOG, CommandRun
from tune_ssim.trials.command.dependencies import Dependencies, name_of
from tune_ssim.trials.command.filled_spec import FilledSpec
from tune_ssim.trials.command.observed import ObservedRecords
from tune_ssim.trials.command.output import CommandOutput, GuessedRecords, PrintedRecords, held_out_of
from tune_ssim.trials.command.process import Launch, launch_here
from tune_ssim.trials.command.samples import read_samples
from tune_ssim.trials.command.settings import SettingsInForce
from tune_ssim.trials.processes import OutputLog
from tune_ssim.trials.training import NOTHING_NEW, Number, Sample, Training, same_setting

MLFLOW_POLL_S = 2.0  # each poll fetches whole histories
MAX_GRAD_NORM = "max_grad_norm"

OpenMLflow = Callable[[str, str, Mapping[str, str]], tuple[Source, dict[str, str]]]
"""(tracking URI, run name, log names → our names) → (the run's records, environment variables for the command)."""


def _no_mlflow(tracking_uri: str, name: str, names: Mapping[str, str]) -> tuple[Source, dict[str, str]]:
    raise UserError("records.mlflow: works only in a study")


class CommandTask(Training):
    """A training whose steps are records of a running command, described by a `CommandSpec`.

    The command starts at the first call of `step`. Records carry the command's own step numbers, so steps may be skipped. Held-out
    metrics come from the command itself, from the evaluation command, or from the last record, whichever exists.
    """

    _run: CommandRun | None = None  # once it has started, also after its end

    def __init__(self, spec: CommandSpec, cwd: str | None = None) -> None:
        self.spec, self.home = spec, cwd
        self.launch: Launch = launch_here
        self.open_mlflow: OpenMLflow = _no_mlflow
        self.name, self.folder = "trial", Path()
        self.is_calibrating = False  # only the first steps are read
        self.holds_updates = False  # the observer leaves every weight as it is
        self._temporary_folder: Path | None = None

    # -- setup and teardown

    def identify(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        folder.mkdir(parents=True, exist_ok=True)

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.close()
        self.config, self.seed, self.step_now = dict(config), seed, 0
        self.steps = None if config.get("steps") is None else int(config["steps"])  # None: until it ends by itself
        self.smoke_at: tuple[int, ...] = ()
        self.settings = SettingsInForce(self.spec, self.config)
        self.__dict__.pop("filled", None)
        self._run = None
        self._per_image: dict[str, list[float]] = {}
        self._resume_from: Path | None = None
        self._last: dict[str, float] = {}

    @cached_property
    def filled(self) -> FilledSpec:
        """The specification with this trial's values, and a folder of its own."""
        exp_name, folder = self._fresh_folder()
        fields = {
            **self.config,
            "seed": self.seed,
            "exp_name": exp_name,
            "exp_dir": str(folder),
            "python": sys.executable,
            "gpus": len([one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]),
        }
        return FilledSpec(self.spec, fields, self.home)

    def _fresh_folder(self) -> tuple[str, Path]:
        """A name and folder never used before: a training may resume from whatever it finds under its name (SEEDS A10)."""
        if self.folder == Path():
            self._temporary_folder = Path(tempfile.mkdtemp(prefix="tune-ssim-"))
            self.folder = self._temporary_folder
        for attempt in range(1, 1000):
            name = self.name if attempt == 1 else f"{self.name}-try{attempt}"
            try:
                (self.folder / name).mkdir(parents=True)
            except FileExistsError:
                continue
            return name, self.folder / name
        raise UserError(f"command: {self.folder} is full of earlier attempts of {self.name!r}")

    def want_samples_at(self, steps: Sequence[int]) -> None:
        self.smoke_at = tuple(steps)

    @property
    def takes_samples(self) -> bool:
        """Whether there is a smoke test command. If not, the training sends samples, or there are none."""
        return self.spec.smoke is not None

    @property
    def is_paired(self) -> bool:
        """Only a training that gets or reads the seed can see the same batches as the baseline."""
        return "seed" in self.settings.used

    @property
    def reports_after_last_step(self) -> bool:
        return True

    @property
    def effective_after_first_step(self) -> bool:
        return True

    @property
    def can_resume(self) -> bool:
        return self.spec.resume is not None and self.spec.checkpoints is not None

    def close(self, verdict: str = "stopped", reason: str = "the trial is over") -> None:
        """Ends the command and every process that it started."""
        if self._run is not None:
            self._run.close(verdict, reason)
        if self._temporary_folder is not None:
            shutil.rmtree(self._temporary_folder, ignore_errors=True)
            self._temporary_folder = None

    def __del__(self) -> None:
        if self._run is not None:
            self.close()

    # -- the training

    def step(self) -> Mapping[str, Number] | None:
        """The next record with its `step`; None when the command has ended without error.

        Raises UserError when the command failed or gave no record within the timeout; BadSetup when a setting does not reach it."""
        run = self._run if self._run is not None and not self._run.is_closed else self._start()
        if not run.await_record():
            return None
        if not run.output.records:
            return NOTHING_NEW
        step, values = run.take_record()
        self.step_now = run.step_now
        self._last |= values
        return {**values, "step": step}

    def first_steps(self, count: int) -> tuple[list[Record], float]:
        """Starts the command and reads its first `count` training steps, for preflight and calibration: see `CommandRun`.

        Raises UserError or BadSetup as `step` does."""
        return self._start().first_steps(count)

    def _start(self) -> CommandRun:
        filled, records = self.filled, self.spec.records
        folder = Path(filled.fields["exp_dir"])
        channel = TrialEnd(folder / CHANNEL)
        more, poll_s = {VARIABLE: str(channel.folder)}, 0.0
        source: Source
        if records is None:
            source = GuessedRecords()
        elif records.mlflow is not None:
            source, found = self.open_mlflow(records.mlflow, filled.fields["exp_name"], records.names)
            more, poll_s = found | more, MLFLOW_POLL_S
        elif records.file is None:
            source = PrintedRecords(LineParser(pattern=records.pattern, names=records.names))
        else:
            path = filled.path(records.file)
            _require_unwritten(path)
            source = open_source(path, format=records.format, names=records.names, pattern=records.pattern)
        filled.write_config_file()
        channel.open(self.config, self.seed, self.smoke_at, self.steps, self.is_calibrating)
        resume = None if self._resume_from is None else {"checkpoint": str(self._resume_from), "step": self.step_now}
        observed, observe = None, None
        if self.spec.observe != "off":
            observe = partial(
                observed_environment,
                folder / OBSERVED,
                level=self.spec.observe,
                hold=self.holds_updates,
                weights=[filled.path(path) for path in self.spec.weights],
            )
            observed = ObservedRecords(EventReader(folder / OBSERVED), records.names if records is not None else {})
        output = CommandOutput(self.settings, OutputLog(folder / OUTPUT_LOG), channel, source, observed, poll_s)
        started_s = time.time()
        process = self.launch(lambda node: filled.invocation(node, more, resume, observe), output.take, folder)
        self._run = CommandRun(filled, process, output, steps=self.steps, step_now=self.step_now, started_s=started_s)
        return self._run

    def notice(self) -> str:
        return self._run.notice() if self._run is not None else ""

    @property
    def observation(self) -> Observation | None:
        """What the observer has seen so far; None if it is off, or before the command has started."""
        return self._run.observation if self._run is not None else None

    def lines_read(self) -> str:
        """Once the command has started: how much of its log was read, and what was passed over."""
        assert self._run is not None
        return self._run.output.lines_read()

    def reading_problem(self) -> str:
        """See `Training`."""
        if self._run is None:
            return ""
        return "; ".join(filter(None, [self._run.output.problem(), self._run.propose_logs()]))

    # -- samples, metrics and checkpoints

    def sample(self, noise: int = 0) -> Sample | None:
        """Runs the smoke test command on the newest checkpoint up to this step. None if there is no checkpoint yet."""
        spec, filled = self.spec.smoke, self.filled
        assert spec is not None
        checkpoint = self._checkpoint() if self.step_now else (spec.at_start and fill(spec.at_start, filled.fields))
        if not checkpoint:
            return None
        out = Path(tempfile.mkdtemp(prefix="samples-", dir=self.folder))
        try:
            more = {"checkpoint": str(checkpoint), "step": self.step_now, "noise": noise, "out": str(out)}
            filled.run(spec.command, more, spec.timeout_s, "the smoke test's command")
            return read_samples(spec, out, filled.beside)
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def image(self, step: int) -> bytes | None:
        return self._run.output.channel.image(step) if self._run is not None else None

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics: those sent, those printed by the evaluation command, and the last value of every other metric."""
        found = held_out_values(self._last)
        if self._run is not None:
            output = self._run.output
            output.collect()
            found |= output.held_out
            self._per_image = dict(output.per_image)
        return found | (self._run_evaluation() if self.spec.evaluate is not None else {})

    def per_image(self) -> dict[str, list[float]]:
        return self._per_image

    def _run_evaluation(self) -> dict[str, float]:
        spec = self.spec.evaluate
        assert spec is not None and self._run is not None
        checkpoint = self._checkpoint()
        if checkpoint is None and any("checkpoint" in placeholders(word) for word in spec.command):
            raise UserError(f"evaluate: there is no checkpoint at step {self.step_now}; {self._run.output.quote()}")
        more = {"step": self.step_now, "checkpoint": str(checkpoint or ""), "noise": 0, "out": ""}
        text = self.filled.run(spec.command, more, spec.timeout_s, "the evaluation's command")
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith("{")]
        try:
            numbers, per_image = held_out_of(json.loads(lines[-1]))
        except (IndexError, ValueError):
            raise UserError("the evaluation's command printed no line of JSON with numbers") from None
        self._per_image |= per_image
        return numbers

    @property
    def _checkpoints(self) -> Checkpoints | None:
        """None if the study does not say where they are, and before the command has started."""
        return self._run.checkpoints if self._run is not None else None

    def _checkpoint(self) -> Path | None:
        return None if self._checkpoints is None else self._checkpoints.newest(self.step_now)

    def written(self) -> list[tuple[int, Path]]:
        return [] if self._checkpoints is None else self._checkpoints.found(self.step_now)

    def remarks(self) -> list[str]:
        found = self._run.output.remarks() if self._run is not None else []
        if self._checkpoints is not None and not self.written():
            found.append(f"checkpoints: {self.spec.checkpoints!r} matches no file, so no ruined checkpoint is quarantined")
        return [*found, *filter(None, [self._clipping_remark()])]

    def state_dict(self) -> dict[str, Any]:
        checkpoint = self._checkpoint()
        return {"step": self.step_now, "checkpoint": str(checkpoint) if checkpoint else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.can_resume or state["checkpoint"] is None:
            raise NothingToResume("the command cannot resume: it has no `resume` arguments, or had written no checkpoint")
        self.step_now, self._resume_from = state["step"], Path(state["checkpoint"])

    def fingerprints(self) -> dict[str, str]:
        return self._dependencies.hashes()

    def files_seen(self) -> dict[str, str]:
        """Those under the names of `fingerprints`. Settings only from the working folder, and not what the trial itself wrote."""
        if self.observation is None:
            return {}
        folder, own = Path(self.filled.cwd or ".").absolute(), Path(self.filled.fields["exp_dir"]).absolute()
        found = {}
        for kind, hashes in self.observation.files.items():
            for path, digest in hashes.items():
                if not Path(path).is_relative_to(own) and (kind == "code" or Path(path).is_relative_to(folder)):
                    found[name_of(kind, Path(path), folder)] = digest
        return found

    @property
    def not_covered(self) -> list[str]:
        """What `fingerprints` leaves out, a phrase each."""
        return self._dependencies.not_covered

    @property
    def _dependencies(self) -> Dependencies:
        return Dependencies(self.spec, self.config, self.home)

    def effective(self) -> dict[str, Any]:
        """The settings in force. `max_grad_norm` is the one that was observed, and absent where nothing is known of it."""
        found, seen = self.settings.effective(), self.observation
        if seen is None and self.spec.observe != "off" and MAX_GRAD_NORM not in self.config:
            found.pop(MAX_GRAD_NORM, None)  # the command has not started
        if seen is not None and seen.is_observed and (seen.max_grad_norm is not None or MAX_GRAD_NORM not in found):
            found[MAX_GRAD_NORM] = seen.max_grad_norm
        return found

    def _clipping_remark(self) -> str:
        """Where the study names another gradient clipping than was observed."""
        stated, seen = self.settings.effective(), self.observation
        if seen is None or not seen.is_observed or MAX_GRAD_NORM not in stated:
            return ""
        told, limit = stated[MAX_GRAD_NORM], seen.max_grad_norm
        if same_setting(told, limit) or not (told or limit):
            return ""
        if limit is None:
            return f"clip_grad_norm_ was not called before the first update, but the study says {MAX_GRAD_NORM}: {told}"
        said = f"the study says {MAX_GRAD_NORM}: {told}"
        return f"gradients are clipped at {limit:g}, as observed, but {said}; the observed value is used"

    def where_printed(self, name: str) -> str | None:
        return self.settings.where_printed(name)


def _require_unwritten(path: Path) -> None:
    """Raises UserError if the records file exists before the command starts: it then belongs to another run. A resumed command has
    a new name, so its own file cannot exist yet."""
    try:
        if path.is_dir():
            old = next((file for file in path.rglob("*tfevents.*") if file.is_file() and file.stat().st_size), None)
        else:
            old = path if path.exists() and path.stat().st_size else None
    except OSError as error:
        raise UserError(f"records.file: {path}: {error.strerror or error}") from None
    if old is not None:
        raise UserError(
            f"records.file: {old} is there before the command was started: its records are another run's; remove it, or let each "
            "trial write a file of its own, with {exp_dir} or {exp_name} in its path"
        )
