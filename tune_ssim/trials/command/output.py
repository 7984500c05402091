"""What a running command reports, read from every place into records."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from statistics import fmean
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.numbers import is_number
from tune_ssim.records import EPOCH, LOSS, TOTAL_NORM, Record, is_of_training
from tune_ssim.records.readers import LineParser, Source
from tune_ssim.records.readers.parse_issues import ParseIssues
from tune_ssim.records.readers.step_counter import StepCounter
from tune_ssim.trials.channel import TAG, TrialEnd, tagged_messages
from tune_ssim.trials.command.guesses import UsualNames
from tune_ssim.trials.command.observed import ObservedRecords, Row
from tune_ssim.trials.command.settings import SettingsInForce
from tune_ssim.trials.processes import OutputLog

REPORTED = (LOSS, TOTAL_NORM)  # a command that sends one of them sends its records
MAX_LINE = 2**20  # longest line, in bytes, that is searched for tags


class PrintedRecords(Source):
    """The records in the lines that a command prints, as a `Source`. `feed` is called by the thread that reads the pipe."""

    def __init__(self, parser: LineParser) -> None:
        super().__init__(parser.rows)
        self._parser, self._lock = parser, threading.RLock()
        self._ready: list[Record] = []

    @property
    def format(self) -> str | None:
        return self._parser.format

    def feed(self, data: bytes) -> None:
        with self._lock:
            self._ready += self._parser.feed(data)

    def read(self) -> list[Record]:
        with self._lock:
            ready, self._ready = self._ready, []
            return ready

    def finish(self) -> list[Record]:
        with self._lock:
            return [*self.read(), *self._parser.finish()]

    def held(self) -> int | None:
        with self._lock:
            return self._parser.held()

    def release(self) -> list[Record]:
        with self._lock:
            return [*self.read(), *self._parser.release()]

    def batches(self) -> Iterator[Sequence[Record]]:
        yield self.read()


class GuessedRecords(PrintedRecords):
    """The same for a command of which the study does not say where its records are: lines in any known format. A command that
    reports by itself is not read in this way."""

    def __init__(self) -> None:
        super().__init__(LineParser(tagged=False))


class CommandOutput:
    """Everything that a command reports: records, settings in force, held-out metrics.

    It comes from the lines that the command prints (`take`, called by the thread that reads the pipe), from `trial_context` in it
    (`channel`), from `source`: its printed lines, a file or an MLflow run, and from the observer in its processes (`observed`).
    `collect` moves what has arrived into `records`. poll_s: time between two reads of the source."""

    def __init__(
        self,
        settings: SettingsInForce,
        log: OutputLog,
        channel: TrialEnd,
        source: Source | None,
        observed: ObservedRecords | None = None,
        poll_s: float = 0.0,
    ) -> None:
        self.settings, self.log, self.channel, self.source, self.poll_s = settings, log, channel, source, poll_s
        self.observed = observed
        self.records: list[Row] = []
        self.held_out: dict[str, float] = {}
        self.per_image: dict[str, list[float]] = {}
        self._usual_names = UsualNames()
        self._pushed = ParseIssues(unit="record")
        self._counter = StepCounter(self._pushed)
        self._looks_for_settings = settings.spec.echo != "off"
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._line = b""
        self._source_due = 0.0

    def take(self, data: bytes) -> None:
        """Takes a piece of what the command prints."""
        self.log.write(data)
        # Before the records of the same piece: the first record triggers the check of the settings.
        if self._looks_for_settings and (found := self.settings.echoes.feed(data)):
            self._messages.put({"echoed": found})
        source = self.source
        if isinstance(source, PrintedRecords):
            source.feed(data)
        self._line += data
        has_tag = TAG in self._line
        complete, _, rest = self._line.rpartition(b"\n")
        self._line = rest[-MAX_LINE:]
        for line in complete.split(b"\n") if has_tag else ():
            self._read_tagged_line(line)

    def _read_tagged_line(self, line: bytes) -> None:
        for message in tagged_messages(line):
            # A parser of JSON lines also takes tagged records, since it maps their names.
            is_parsed = isinstance(self.source, PrintedRecords) and self.source.format == "jsonl"
            if "step" not in message or not is_parsed:
                self._messages.put(message)

    def collect(self, final: bool = False) -> None:
        """Moves everything that has arrived into `records`. final: the command has ended. Raises UserError if the step
        counter began again, since later rows cannot be told from repeated ones."""
        if final and self._line:
            line, self._line = self._line, b""
            if self._looks_for_settings:
                self._messages.put({"echoed": self.settings.echoes.finish()})
            self._read_tagged_line(line)
        pushed = [self._dispatch(message) for message in self.channel.read()]
        while not self._messages.empty():
            pushed.append(self._dispatch(self._messages.get()))
        records = [record for record in pushed if record is not None]
        reports = self.settings.looked_up is not None or any(not values.keys().isdisjoint(REPORTED) for _, values in records)
        if reports and isinstance(self.source, GuessedRecords):
            self.source = None
        if self.source is not None and (final or time.monotonic() >= self._source_due):
            self._source_due = time.monotonic() + self.poll_s
            read = self.source.finish() if final else self.source.read()
            records = sorted([*records, *map(_plain, read)], key=itemgetter(0)) if records else list(map(_plain, read))
        self._add(records, final)
        for issues in self._issues:
            if issues.restarted:
                raise UserError(
                    f"the step counter began again ({issues.restarted}): if it counts the steps of an epoch, log the epoch with "
                    "them, as `epoch` (in a pattern: (?P<epoch>\\d+)), or log a step that goes on"
                )

    @property
    def _issues(self) -> list[ParseIssues]:
        return [self._pushed] if self.source is None else [self._pushed, self.source.issues]

    def _dispatch(self, message: dict[str, Any]) -> Row | None:
        """The record in a message; any other message is kept here."""
        if "step" in message:  # first: a metric of a step may have any name
            step, values = message["step"], numbers_of(message, without=("step",))
            self._pushed.lines += 1
            if is_of_training(step, values):
                return self._counter.count(step, values.get(EPOCH), self._pushed.lines), values
            return step + self._counter.earlier_steps, values
        if "effective" in message:
            self.settings.sent(message["effective"])
        elif "read" in message:
            self.settings.read(message["read"])
        elif "held_out" in message:
            numbers, per_image = held_out_of(message["held_out"])
            self.held_out |= numbers
            self.per_image |= per_image
        elif "echoed" in message:
            self.settings.printed(message["echoed"])
        return None

    def release(self) -> None:
        """Moves the step that is held back for later rows into `records`."""
        self._add(list(map(_plain, self.source.release())) if self.source is not None else [], final=True)

    def _add(self, rows: list[Row], final: bool) -> None:
        rows = [(step, self._usual_names.complete(values)) for step, values in rows]
        is_guessing = isinstance(self.source, GuessedRecords) and self.source.format is None
        is_alone = (self.source is None and self.settings.looked_up is None) or is_guessing
        self.records += rows if self.observed is None else self.observed.merge(rows, is_alone=is_alone, final=final)

    def held(self) -> int | None:
        """The newest step that is held back, because more of it may come; None if there is none."""
        held = [one.held() for one in (self.source, self.observed) if one is not None]
        return max((step for step in held if step is not None), default=None)

    def give_up(self) -> None:
        """Reads an abandoned command's output to its end, so that `problem` says what could not be read."""
        if self.source is not None:
            self.source.finish()

    def remarks(self) -> list[str]:
        """What the user should know at the end, a sentence each."""
        observed = self.observed.remarks() if self.observed is not None else []
        return [*filter(None, [self.problem()]), *self._usual_names.remarks(), *observed]

    def lines_read(self) -> str:
        """How much was read, and what of it was passed over."""
        read = ", ".join(f"{issues.lines} {issues.unit}s" for issues in self._issues if issues.lines)
        return f"read {read or 'nothing of its log'}" + (f"; {problem}" if (problem := self.problem()) else "")

    def problem(self) -> str:
        """One line about records that could not be read; empty if there are none."""
        return "; ".join(filter(None, (issues.sentence() for issues in self._issues)))

    def quote(self) -> str:
        """Where the output is kept, and its last lines."""
        last = self.log.quote()
        return f"all that it printed is in {self.log.path}" + (f", last: {last}" if last else " (nothing)")


def _plain(record: Record) -> Row:
    return record.step, dict(record.values)


def held_out_of(values: Any) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(Held-out metrics, those of each image where a value is a list of numbers)"""
    per_image = {
        str(name): list(map(float, value))
        for name, value in (values.items() if isinstance(values, Mapping) else ())
        if isinstance(value, list) and value and all(map(is_number, value))
    }
    return numbers_of(values) | {name: fmean(numbers) for name, numbers in per_image.items()}, per_image


def numbers_of(values: Any, without: Sequence[str] = ()) -> dict[str, float]:
    """The numbers in a mapping, NaN and Inf included. Other values are dropped."""
    found: dict[str, float] = {}
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if is_number(value) and name not in without:
            found[str(name)] = float(value)
    return found
