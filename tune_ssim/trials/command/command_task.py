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
from tune_ssim.records import TOTAL_NORM, Record, held_out_values, is_of_training, merge
from tune_ssim.records.readers import LineParser, Source, open_source
from tune_ssim.study.command_spec import CommandSpec, fill, placeholders
from tune_ssim.trials.channel import VARIABLE, TrialEnd
from tune_ssim.trials.command.checkpoints import Checkpoints, sizes
from tune_ssim.trials.command.dependencies import Dependencies, name_of
from tune_ssim.trials.command.filled_spec import FilledSpec
from tune_ssim.trials.command.guesses import propose_logs
from tune_ssim.trials.command.observed import ObservedRecords
from tune_ssim.trials.command.output import CommandOutput, GuessedRecords, PrintedRecords, held_out_of
from tune_ssim.trials.command.process import Launch, Process, launch_here
from tune_ssim.trials.command.samples import read_samples
from tune_ssim.trials.command.settings import SettingsInForce
from tune_ssim.trials.processes import OutputLog
from tune_ssim.trials.training import NOTHING_NEW, Number, Sample, Training, same_setting

POLL_S = 0.05  # between polls of files; a training step worth tuning takes longer
MLFLOW_POLL_S = 2.0  # each poll fetches whole histories
LAST_ROWS_S = 10.0  # wait for the last step's remaining rows and checkpoint: buffered writers flush every few seconds
QUIET_S = 60.0  # without a record, before the user is told; a step rarely takes a minute
# In a trial's folder: the output, the folder of `trial_context`, and that of the observer while the command runs.
OUTPUT_LOG, CHANNEL, OBSERVED = "output.log", "channel", "observed"
MAX_GRAD_NORM = "max_grad_norm"
LEAVE_S = 2.0  # time for a loop that reads its verdict to exit by itself

OpenMLflow = Callable[[str, str, Mapping[str, str]], tuple[Source, dict[str, str]]]
"""(tracking URI, run name, log names → our names) → (the run's records, environment variables for the command)."""


def _no_mlflow(tracking_uri: str, name: str, names: Mapping[str, str]) -> tuple[Source, dict[str, str]]:
    raise UserError("records.mlflow: works only in a study")


class CommandTask(Training):
    """A training whose steps are records of a running command, described by a `CommandSpec`.

    The command starts at the first call of `step`. Records carry the command's own step numbers, so steps may be skipped. Held-out
    metrics come from the command itself, from the evaluation command, or from the last record, whichever exists.
    """

    _process: Process | None = None

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
        self._output: CommandOutput | None = None
        self._per_image: dict[str, list[float]] = {}
        self._resume_from: Path | None = None
        self._last: dict[str, float] = {}
        self._first_record_seen = False
        self._released_late = False  # the last record was released by a timeout
        self._last_change: tuple[Any, float] = (None, 0.0)  # state of the last step's output, and the time of its last change
        self._waiting_since: float | None = None  # for the next record
        self._quiet_after = -1  # the step after which the user was told that there is no record
        self._notice = ""

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

    @property
    def _is_trial_loop(self) -> bool:
        """Whether the command reports through `trial_context`, and so reads its verdict."""
        return self.settings.looked_up is not None

    def close(self, verdict: str = "stopped", reason: str = "the trial is over") -> None:
        """Ends the command and every process that it started."""
        process, self._process = self._process, None
        if process is not None:
            assert self._output is not None
            if not process.has_ended:
                self._output.channel.close(verdict, reason)
                if self._is_trial_loop:
                    process.wait(LEAVE_S)
            process.stop()
            self._output.log.close()
            shutil.rmtree(Path(self.filled.fields["exp_dir"], OBSERVED), ignore_errors=True)  # its steps are in the records
        if self._temporary_folder is not None:
            shutil.rmtree(self._temporary_folder, ignore_errors=True)
            self._temporary_folder = None

    def __del__(self) -> None:
        if self._process is not None:
            self.close()

    # -- the training

    def step(self) -> Mapping[str, Number] | None:
        """The next record with its `step`; None when the command has ended without error.

        Raises UserError when the command failed or gave no record within the timeout; BadSetup when a setting does not reach it."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._output is not None
        if not self._await_record(self._process, self._output):
            return None
        if not self._output.records:
            return NOTHING_NEW
        self._waiting_since = None
        step, values = self._output.records.pop(0)
        self._first_record_seen = True
        if is_of_training(step, values):
            self.settings.require_used(self._output.quote())
        self.step_now = max(self.step_now, step)
        self._last |= values
        return {**values, "step": step}

    def first_steps(self, count: int) -> tuple[list[Record], float]:
        """Starts the command and reads its first `count` training steps, for preflight and calibration. Returns their records, or
        fewer if the command ended well before, and the seconds until the first.

        It does not wait for rows of a log that come later than the steps. Raises UserError or BadSetup as `step` does."""
        started, first_s = time.monotonic(), 0.0
        self._start()
        process, output = self._process, self._output
        assert process is not None and output is not None
        while True:
            ended = process.has_ended
            output.collect(final=ended)
            seen = self.observation.steps if self.observation is not None else 0
            found = {step for step, values in output.records if is_of_training(step, values)}
            self._first_record_seen = bool(seen or output.records)
            if self._first_record_seen:
                first_s = first_s or time.monotonic() - started
            if ended or len(found) >= count or seen > count:
                break
            if process.failure is not None:
                raise process.failure
            limit = self.spec.silence_s if self._first_record_seen else self.spec.first_record_s
            if time.monotonic() - started > limit:
                raise UserError(self._why_silent(output, limit))
            time.sleep(POLL_S)
        if not ended:
            output.release()
        elif len(found) < count:
            self._require_good_end(process, output)
        self.settings.require_used(output.quote())
        rows = merge(Record(step, values) for step, values in output.records)
        rows = [row for row in rows if is_of_training(row.step, row.values)][:count]
        return self._with_observed_norms(rows), first_s

    def _with_observed_norms(self, rows: list[Record]) -> list[Record]:
        """The same with the observed total_norm, which has all its digits, if every step was observed."""
        reader = EventReader(Path(self.filled.fields["exp_dir"], OBSERVED))
        norms = [row.values[TOTAL_NORM] for row in merge(reader.read()) if TOTAL_NORM in row.values]
        if len(norms) < len(rows):
            return rows
        return [Record(row.step, {**row.values, TOTAL_NORM: norm}) for row, norm in zip(rows, norms, strict=False)]

    def _start(self) -> None:
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
        self._output = CommandOutput(self.settings, OutputLog(folder / OUTPUT_LOG), channel, source, observed, poll_s)
        self._started_s = time.time()
        self._process = self.launch(lambda node: filled.invocation(node, more, resume, observe), self._output.take, folder)

    def _await_record(self, process: Process, output: CommandOutput) -> bool:
        """Waits until `output` has a record, or the user is to be told that there is none. False: the command has ended without
        error, or has nothing more to report."""
        limit = self.spec.silence_s if self._first_record_seen else self.spec.first_record_s
        self._waiting_since = self._waiting_since or time.monotonic()
        deadline = self._waiting_since + (0.0 if self._released_late else limit)
        self._released_late = False
        while not output.records:
            ended = process.has_ended  # checked before the last read, so that the read is complete
            output.collect(final=ended)
            if output.records:
                break
            if process.failure is not None:
                raise process.failure
            if ended:
                self._require_good_end(process, output)
                self.settings.require_used(output.quote())
                return False
            late = time.monotonic() > deadline
            if late or self._has_settled(output):
                output.release()
                if output.records:
                    self._released_late = late
                    break
                if self.steps is not None and self.step_now >= self.steps:
                    return False  # all steps are done
                raise UserError(self._why_silent(output, limit))
            if self._is_quiet(output):
                of = "" if self.steps is None else f" of {self.steps}"
                self._notice = (
                    f"no record for {QUIET_S:g} s after step {self._quiet_after}{of}, and the command still runs "
                    f"({process.place}); it is ended after {limit:g} s (task: silence_s)"
                )
                return True
            time.sleep(POLL_S)
        return True

    def _is_quiet(self, output: CommandOutput) -> bool:
        """Whether to tell the user that there is no record: once in the middle of a training, and once at its end."""
        step = max(self.step_now, output.held() or 0)
        is_told = self._quiet_after >= (0 if self.steps is None or step < self.steps else self.steps)
        assert self._waiting_since is not None
        if is_told or not self._first_record_seen or time.monotonic() - self._waiting_since < QUIET_S:
            return False
        self._quiet_after = step
        return True

    def notice(self) -> str:
        notice, self._notice = self._notice, ""
        return notice

    def _has_settled(self, output: CommandOutput) -> bool:
        """Whether a training that has logged its last step but does not exit (a hanging teardown, an upload) is complete. A
        checkpoint that is still being written delays this; other output does not."""
        if self._is_trial_loop or self.steps is None:  # it may still send samples, or more steps
            return False
        held = output.held() == self.steps  # a later step may be a misread number
        # Held-out metrics may still arrive: from the checkpoint that the evaluation reads, or from the training itself.
        evaluable = self.spec.checkpoints is not None if self.spec.evaluate is not None else bool(output.held_out)
        if not held and not (self.step_now >= self.steps and evaluable):
            return False
        made: list[tuple[str, int, int]] = []
        if self._checkpoints is not None and (self.spec.smoke is not None or self.spec.evaluate is not None):
            last = [path for step, path in self._checkpoints.found(self.steps) if step == self.steps]
            if not last:  # an older one would be judged instead
                return False
            made = sizes(last[-1])
        now = time.monotonic()
        if self._last_change[0] != (held, made):
            self._last_change = (held, made), now
        return now - self._last_change[1] > LAST_ROWS_S

    def _require_good_end(self, process: Process, output: CommandOutput) -> None:
        if self._first_record_seen and process.exit_code in self.spec.exit_codes:
            return
        after = f"after step {self.step_now}" if self._first_record_seen else "without a record"
        failed_in_loop = self._is_trial_loop and process.exit_code != 0  # it would have reported
        hint = "" if self._first_record_seen or failed_in_loop else self._where_looked(output)
        if self._first_record_seen and (process.exit_code or 0) > 0:
            codes = sorted({*self.spec.exit_codes, process.exit_code or 0})
            hint = f" (if this is how it ends when all is well: `exit_codes: {codes}`)"
        raise UserError(f"the command ended {after}, {process.describe_exit()}{hint}; {output.quote()}")

    def _why_silent(self, output: CommandOutput, limit: float) -> str:
        if self._first_record_seen:
            hint = "" if self.steps else f" (if that was its last step: task_config: {{steps: {self.step_now}}})"
            return f"the command gave no record after step {self.step_now} for {limit:g} s{hint}; {output.quote()}"
        hint = ""
        if output.source is not None:
            output.give_up()
            hint = self._where_looked(output)
        return f"the command gave no record for {limit:g} s{hint}; {output.quote()}"

    def _where_looked(self, output: CommandOutput) -> str:
        records = self.spec.records
        if records is None:
            where = "nothing was reported through tune_ssim.trial_context, and no line TUNE_SSIM {json} was printed"
        elif records.file is not None:
            where = f"looked in {fill(records.file, self.filled.fields)}"
        else:
            where = "looked in its output" if records.mlflow is None else "looked in its run in MLflow"
        return f" ({'; '.join(filter(None, [where, output.problem(), self._propose_logs()]))})"

    def _propose_logs(self) -> str:
        """Names the logs that the command wrote, if it printed no record."""
        source = self._output.source if self._output is not None else None
        if not isinstance(source, PrintedRecords) or source.rows.steps.last >= 0:
            return ""
        exp_dir = Path(self.filled.fields["exp_dir"])
        own = (OUTPUT_LOG, CHANNEL, OBSERVED)
        return propose_logs([exp_dir, Path(self.filled.cwd or ".")], exp_dir, self._started_s, own)

    @property
    def observation(self) -> Observation | None:
        """What the observer has seen so far; None if it is off, or before the command has started."""
        return self._output.observed.observation if self._output is not None and self._output.observed is not None else None

    def lines_read(self) -> str:
        """Once the command has started: how much of its log was read, and what was passed over."""
        assert self._output is not None
        return self._output.lines_read()

    def reading_problem(self) -> str:
        """See `Training`."""
        if self._output is None:
            return ""
        return "; ".join(filter(None, [self._output.problem(), self._propose_logs()]))

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
        return self._output.channel.image(step) if self._output is not None else None

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics: those sent, those printed by the evaluation command, and the last value of every other metric."""
        found = held_out_values(self._last)
        if self._output is not None:
            self._output.collect()
            found |= self._output.held_out
            self._per_image = dict(self._output.per_image)
        return found | (self._run_evaluation() if self.spec.evaluate is not None else {})

    def per_image(self) -> dict[str, list[float]]:
        return self._per_image

    def _run_evaluation(self) -> dict[str, float]:
        spec = self.spec.evaluate
        assert spec is not None and self._output is not None
        checkpoint = self._checkpoint()
        if checkpoint is None and any("checkpoint" in placeholders(word) for word in spec.command):
            raise UserError(f"evaluate: there is no checkpoint at step {self.step_now}; {self._output.quote()}")
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
        if self.spec.checkpoints is None or self._output is None:
            return None
        return Checkpoints(self.spec.checkpoints, self.filled.fields, self.filled.beside)

    def _checkpoint(self) -> Path | None:
        return None if self._checkpoints is None else self._checkpoints.newest(self.step_now)

    def written(self) -> list[tuple[int, Path]]:
        return [] if self._checkpoints is None else self._checkpoints.found(self.step_now)

    def remarks(self) -> list[str]:
        found = self._output.remarks() if self._output is not None else []
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
            return f"clip_grad_norm_ was not called before the first update, and {MAX_GRAD_NORM} is said to be {told}"
        return f"gradients are clipped at {limit:g}, as observed, and {MAX_GRAD_NORM} is said to be {told}; the observed one counts"

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
