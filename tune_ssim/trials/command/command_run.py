"""One start of a command: its next record, or the reason why there is none."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from tune_ssim.base.errors import UserError
from tune_ssim.probes.observer import EventReader, Observation
from tune_ssim.records import TOTAL_NORM, Record, is_of_training, merge
from tune_ssim.study.command_spec import fill
from tune_ssim.trials.command.checkpoints import Checkpoints, sizes
from tune_ssim.trials.command.filled_spec import FilledSpec
from tune_ssim.trials.command.guesses import propose_logs
from tune_ssim.trials.command.observed import Row
from tune_ssim.trials.command.output import CommandOutput, PrintedRecords
from tune_ssim.trials.command.process import Process

POLL_S = 0.05  # between polls of files; a training step worth tuning takes longer
LAST_ROWS_S = 10.0  # wait for the last step's remaining rows and checkpoint: buffered writers flush every few seconds
QUIET_S = 60.0  # without a record, before the user is told; a step rarely takes a minute
LEAVE_S = 2.0  # time for a loop that reads its verdict to exit by itself
# In a trial's folder: the output, the folder of `trial_context`, and that of the observer while the command runs.
OUTPUT_LOG, CHANNEL, OBSERVED = "output.log", "channel", "observed"


class CommandRun:
    """A command that was started. steps: of the training; None if it ends by itself. step_now: its last step, or the one that it
    resumes from. started_s: seconds since the epoch."""

    def __init__(
        self,
        filled: FilledSpec,
        process: Process,
        output: CommandOutput,
        *,
        steps: int | None,
        step_now: int,
        started_s: float,
    ) -> None:
        self.spec, self.filled, self.settings = filled.spec, filled, output.settings
        self.process, self.output = process, output
        self.steps, self.step_now, self.started_s = steps, step_now, started_s
        self.folder = Path(filled.fields["exp_dir"])
        self.is_closed = False
        self._first_record_seen = False
        self._released_late = False  # the last record was released by a timeout
        self._last_change: tuple[object, float] = (None, 0.0)  # state of the last step's output, and the time of its last change
        self._waiting_since: float | None = None  # for the next record
        self._quiet_after = -1  # the step after which the user was told that there is no record
        self._notice = ""

    @property
    def is_trial_loop(self) -> bool:
        """Whether the command reports through `trial_context`, and so reads its verdict."""
        return self.settings.looked_up is not None

    @property
    def observation(self) -> Observation | None:
        """What the observer has seen so far; None if it is off."""
        return self.output.observed.observation if self.output.observed is not None else None

    @property
    def checkpoints(self) -> Checkpoints | None:
        """None if the study does not say where they are."""
        if self.spec.checkpoints is None:
            return None
        return Checkpoints(self.spec.checkpoints, self.filled.fields, self.filled.beside)

    def close(self, verdict: str, reason: str) -> None:
        """Ends the command and every process that it started."""
        if self.is_closed:
            return
        self.is_closed = True
        if not self.process.has_ended:
            self.output.channel.close(verdict, reason)
            if self.is_trial_loop:
                self.process.wait(LEAVE_S)
        self.process.stop()
        self.output.log.close()
        shutil.rmtree(self.folder / OBSERVED, ignore_errors=True)  # its steps are in the records

    def take_record(self) -> Row:
        """The next record of `output`. Raises BadSetup if it is one of the training and a setting has not reached the command."""
        self._waiting_since = None
        step, values = self.output.records.pop(0)
        self._first_record_seen = True
        if is_of_training(step, values):
            self.settings.require_used(self.output.quote())
        self.step_now = max(self.step_now, step)
        return step, values

    def await_record(self) -> bool:
        """Waits until `output` has a record, or the user is to be told that there is none. False: the command has ended without
        error, or has nothing more to report."""
        process, output = self.process, self.output
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
                self._require_good_end()
                self.settings.require_used(output.quote())
                return False
            late = time.monotonic() > deadline
            if late or self._has_settled():
                output.release()
                if output.records:
                    self._released_late = late
                    break
                if self.steps is not None and self.step_now >= self.steps:
                    return False  # all steps are done
                raise UserError(self._why_silent(limit))
            if self._is_quiet():
                of = "" if self.steps is None else f" of {self.steps}"
                self._notice = (
                    f"no record for {QUIET_S:g} s after step {self._quiet_after}{of}, and the command still runs "
                    f"({process.place}); it is ended after {limit:g} s (task: silence_s)"
                )
                return True
            time.sleep(POLL_S)
        return True

    def _is_quiet(self) -> bool:
        """Whether to tell the user that there is no record: once in the middle of a training, and once at its end."""
        step = max(self.step_now, self.output.held() or 0)
        is_told = self._quiet_after >= (0 if self.steps is None or step < self.steps else self.steps)
        assert self._waiting_since is not None
        if is_told or not self._first_record_seen or time.monotonic() - self._waiting_since < QUIET_S:
            return False
        self._quiet_after = step
        return True

    def notice(self) -> str:
        """What the user should know now; each notice is returned once."""
        notice, self._notice = self._notice, ""
        return notice

    def first_steps(self, count: int) -> tuple[list[Record], float]:
        """The records of the first `count` training steps, or fewer if the command ended well before, and the seconds until the
        first. It does not wait for rows of a log that come later than the steps."""
        started, first_s = time.monotonic(), 0.0
        process, output = self.process, self.output
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
                raise UserError(self._why_silent(limit))
            time.sleep(POLL_S)
        if not ended:
            output.release()
        elif len(found) < count:
            self._require_good_end()
        self.settings.require_used(output.quote())
        rows = merge(Record(step, values) for step, values in output.records)
        rows = [row for row in rows if is_of_training(row.step, row.values)][:count]
        return self._with_observed_norms(rows), first_s

    def _with_observed_norms(self, rows: list[Record]) -> list[Record]:
        """The same with the observed total_norm, which has all its digits, if every step was observed."""
        reader = EventReader(self.folder / OBSERVED)
        norms = [row.values[TOTAL_NORM] for row in merge(reader.read()) if TOTAL_NORM in row.values]
        if len(norms) < len(rows):
            return rows
        return [Record(row.step, {**row.values, TOTAL_NORM: norm}) for row, norm in zip(rows, norms, strict=False)]

    def _has_settled(self) -> bool:
        """Whether a training that has logged its last step but does not exit (a hanging teardown, an upload) is complete. A
        checkpoint that is still being written delays this; other output does not."""
        if self.is_trial_loop or self.steps is None:  # it may still send samples, or more steps
            return False
        held = self.output.held() == self.steps  # a later step may be a misread number
        # Held-out metrics may still arrive: from the checkpoint that the evaluation reads, or from the training itself.
        evaluable = self.spec.checkpoints is not None if self.spec.evaluate is not None else bool(self.output.held_out)
        if not held and not (self.step_now >= self.steps and evaluable):
            return False
        made: list[tuple[str, int, int]] = []
        if self.checkpoints is not None and (self.spec.smoke is not None or self.spec.evaluate is not None):
            last = [path for step, path in self.checkpoints.found(self.steps) if step == self.steps]
            if not last:  # an older one would be judged instead
                return False
            made = sizes(last[-1])
        now = time.monotonic()
        if self._last_change[0] != (held, made):
            self._last_change = (held, made), now
        return now - self._last_change[1] > LAST_ROWS_S

    def _require_good_end(self) -> None:
        if self._first_record_seen and self.process.exit_code in self.spec.exit_codes:
            return
        after = f"after step {self.step_now}" if self._first_record_seen else "without a record"
        failed_in_loop = self.is_trial_loop and self.process.exit_code != 0  # it would have reported
        hint = "" if self._first_record_seen or failed_in_loop else self._where_looked()
        if self._first_record_seen and (self.process.exit_code or 0) > 0:
            codes = sorted({*self.spec.exit_codes, self.process.exit_code or 0})
            hint = f" (if this is how it ends when all is well: `exit_codes: {codes}`)"
        raise UserError(f"the command ended {after}, {self.process.describe_exit()}{hint}; {self.output.quote()}")

    def _why_silent(self, limit: float) -> str:
        if self._first_record_seen:
            hint = "" if self.steps else f" (if that was its last step: task_config: {{steps: {self.step_now}}})"
            return f"the command gave no record after step {self.step_now} for {limit:g} s{hint}; {self.output.quote()}"
        hint = ""
        if self.output.source is not None:
            self.output.give_up()
            hint = self._where_looked()
        return f"the command gave no record for {limit:g} s{hint}; {self.output.quote()}"

    def _where_looked(self) -> str:
        records = self.spec.records
        if records is None:
            where = "nothing was reported through tune_ssim.trial_context, and no line TUNE_SSIM {json} was printed"
        elif records.file is not None:
            where = f"looked in {fill(records.file, self.filled.fields)}"
        else:
            where = "looked in its output" if records.mlflow is None else "looked in its run in MLflow"
        return f" ({'; '.join(filter(None, [where, self.output.problem(), self.propose_logs()]))})"

    def propose_logs(self) -> str:
        """Names the logs that the command wrote, if it printed no record."""
        source = self.output.source
        if not isinstance(source, PrintedRecords) or source.rows.steps.last >= 0:
            return ""
        folders = [self.folder, Path(self.filled.cwd or ".")]
        return propose_logs(folders, self.folder, self.started_s, own=(OUTPUT_LOG, CHANNEL, OBSERVED))
