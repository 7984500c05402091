"""A training run as a command: started with a trial's settings, read while it runs, ended with all its child processes."""

from __future__ import annotations

import glob
import json
import os
import queue
import re
import shutil
import socket
import string
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tune_ssim.base.errors import BadSetup, NothingToResume, UserError
from tune_ssim.base.yaml_source import dump_yaml, read_yaml
from tune_ssim.records import Record, held_out_values, is_of_training
from tune_ssim.records.readers import LineParser, Source, open_source
from tune_ssim.study.command_spec import CommandSpec, as_word, fill, fill_all, fill_value, is_neutral, placeholders
from tune_ssim.trials.channel import TAG, VARIABLE, TrialEnd, tagged_messages
from tune_ssim.trials.command.echoes import Echoes
from tune_ssim.trials.processes import OutputLog, SupervisedProcess, quote_of
from tune_ssim.trials.processes.output_log import QUOTED_FROM
from tune_ssim.trials.training import Number, Sample, Training

POLL_S = 0.05  # between polls of files; a training step worth tuning takes longer
ANY_STEP = "\0"  # placeholder for a step in a path
MLFLOW_POLL_S = 2.0  # each poll fetches whole histories
MAX_LINE = 2**20  # longest line, in bytes, that is searched for tags
LAST_ROWS_S = 10.0  # wait for the last step's remaining rows and checkpoint: buffered writers flush every few seconds
LEAVE_S = 2.0  # time for a loop that reads its verdict to exit by itself


class Process(Protocol):
    """A running command: `SupervisedProcess` here, `NodesProcess` on several nodes."""

    def wait(self, timeout: float | None = None) -> bool: ...
    def stop(self) -> None: ...
    def describe_exit(self) -> str: ...
    @property
    def has_ended(self) -> bool: ...
    @property
    def exit_code(self) -> int | None: ...
    @property
    def failure(self) -> BaseException | None:
        """The exception that the output callback raised; later output was not read."""
        ...


@dataclass(frozen=True)
class Invocation:
    """The command to start; nodes differ only in the node's fields. environment: added to the existing one."""

    argv: list[str]
    environment: dict[str, str]
    cwd: str | None
    grace_s: float


Launch = Callable[[Callable[[Mapping[str, Any]], Invocation], Callable[[bytes], None], Path], Process]
"""Takes (render: a node's fields → its invocation, callback for the first node's output, folder for the other nodes' output)."""


OpenMLflow = Callable[[str, str, Mapping[str, str]], tuple[Source, dict[str, str]]]
"""(tracking URI, run name, log names → our names) → (the run's records, environment variables for the command)."""


def _no_mlflow(tracking_uri: str, name: str, names: Mapping[str, str]) -> tuple[Source, dict[str, str]]:
    raise UserError("records.mlflow: works only in a study")


def launch_here(render: Callable[[Mapping[str, Any]], Invocation], on_output: Callable[[bytes], None], folder: Path) -> Process:
    """Starts the command on this machine only."""
    what = render({"nodes": 1, "node_rank": 0, "master_addr": "127.0.0.1", "master_port": free_port("127.0.0.1")})
    environment = {**os.environ, **what.environment}
    return SupervisedProcess(what.argv, on_output, environment=environment, cwd=what.cwd, grace_s=what.grace_s)


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


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
        self._temporary_folder: Path | None = None
        self._parsing = threading.Lock()  # the thread that reads the pipe feeds the parser

    # -- setup and teardown

    def identify(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        folder.mkdir(parents=True, exist_ok=True)

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        self.close()
        self.config, self.seed, self.step_now = dict(config), seed, 0
        self.steps = int(config["steps"])
        self.smoke_at: tuple[int, ...] = ()
        self._reset()

    def _reset(self) -> None:
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._records: list[tuple[int, dict[str, float]]] = []
        self._parser: LineParser | None = None
        self._source: Source | None = None
        self._source_every, self._source_due = 0.0, 0.0
        self._channel: TrialEnd | None = None
        self._line = b""
        self._echoes = Echoes(self.config, self.spec)
        self._in_force: set[str] = set()  # settings sent by `in_force`: they take precedence over printed ones
        self._resume_from: Path | None = None
        self.fields: dict[str, Any] = {}  # values for the command's templates, once it has started
        self._stated: dict[str, Any] = {}  # settings as the training sent or printed them
        self._settings_read: set[str] | None = None  # settings that a `trial_context` loop looked up; None without such a loop
        self._held_out: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._first_record_seen = False
        self._is_checked = False  # whether the settings reached the training
        self._released_late = False  # the last record was released by a timeout
        self._last_change: tuple[Any, float] = (None, 0.0)  # state of the last step's output, and the time of its last change

    def want_samples_at(self, steps: Sequence[int]) -> None:
        self.smoke_at = tuple(steps)

    @property
    def takes_samples(self) -> bool:
        """Whether there is a smoke test command. If not, the training sends samples, or there are none."""
        return self.spec.smoke is not None

    @property
    def is_paired(self) -> bool:
        """Only a training that gets or reads the seed can see the same batches as the baseline."""
        return "seed" in self.spec.referenced_settings() | (self._settings_read or set())

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
        process, self._process = self._process, None
        if process is not None:
            channel = self._channel
            if channel is not None and not process.has_ended:
                channel.close(verdict, reason)
                if self._settings_read is not None:  # a `trial_context` loop reads the verdict
                    process.wait(LEAVE_S)
            process.stop()
            self.log.close()
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
        assert self._process is not None
        limit = self.spec.silence_s if self._first_record_seen else self.spec.first_record_s
        deadline = time.monotonic() + (0.0 if self._released_late else limit)
        self._released_late = False
        while not self._records:
            ended = self._process.has_ended  # checked before the last read, so that the read is complete
            self._collect(final=ended)
            if self._records:
                break
            if self._process.failure is not None:
                raise self._process.failure
            if ended:
                self._require_good_end()
                self._require_settings_used()
                return None
            settled, late = self._has_settled(), time.monotonic() > deadline
            if settled or late:
                self._release()
                if self._records:
                    self._released_late = late
                    break
                if self.step_now >= self.steps:
                    return None  # all steps are done
                hint = ""
                if not self._first_record_seen and (self._parser is not None or self._source is not None):
                    self._finish_readers()
                    hint = self._where_looked()
                what = f"no record after step {self.step_now}" if self._first_record_seen else "no record"
                raise UserError(f"the command gave {what} for {limit:g} s{hint}; {self._quote()}")
            self._wait()
        step, values = self._records.pop(0)
        self._first_record_seen = True
        if is_of_training(step, values):
            self._require_settings_used()
        self.step_now = max(self.step_now, step)
        self._last |= values
        return {**values, "step": step}

    def _start(self) -> None:
        exp_name, folder = self._fresh_folder()
        self.fields = {
            **self.config,
            "seed": self.seed,
            "exp_name": exp_name,
            "exp_dir": str(folder),
            "python": sys.executable,
            "gpus": len([one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]),
        }
        self.exp_folder = folder
        self.log = OutputLog(folder / "output.log")
        self._channel = TrialEnd(folder / "channel")
        self._channel.open(self.config, self.seed, self.smoke_at, self.steps)
        records = self.spec.records
        self._run_environment: dict[str, str] = {}
        if records is not None and records.mlflow is not None:
            self._source, self._run_environment = self.open_mlflow(records.mlflow, exp_name, records.names)
            self._source_every = MLFLOW_POLL_S
        elif records is not None and records.file is None:
            self._parser = LineParser(pattern=records.pattern, names=records.names)
        elif records is not None and records.file is not None:
            path = self._path(fill(records.file, self.fields))
            _require_unwritten(path)
            self._source = open_source(path, format=records.format, names=records.names, pattern=records.pattern)
        if self.spec.config_file is not None:
            self._write_config_file()
        self._process = self.launch(self._invocation, self._take_output, folder)

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

    def _invocation(self, node: Mapping[str, Any]) -> Invocation:
        fields = {**self.fields, **node}
        argv = fill_all(self.spec.command, fields)
        if self._resume_from is not None and self.spec.resume:
            argv += fill_all(self.spec.resume, {**fields, "checkpoint": str(self._resume_from), "step": self.step_now})
        own = {name: fill(str(value), fields) for name, value in self.spec.environment.items()}
        environment = {
            "PYTHONUNBUFFERED": "1",  # lines arrive as they are printed, not in 8 KB blocks
            "EXP_NAME": str(fields["exp_name"]),
            **self._run_environment,
            **own,
            VARIABLE: str(self.exp_folder / "channel"),
        }
        return Invocation(argv, environment, self._cwd(), self.spec.grace_s)

    def _cwd(self) -> str | None:
        if self.spec.cwd is None:
            return self.home
        return str(Path(self.home or ".", fill(self.spec.cwd, self.fields)).absolute())

    def _path(self, text: str) -> Path:
        return Path(self._cwd() or ".", text)

    def _write_config_file(self) -> None:
        """Writes the base configuration with the trial's values, in the format that the file name implies."""
        spec = self.spec.config_file
        assert spec is not None
        path = self._path(fill(spec.path, self.fields))
        contents: Any = read_yaml(self._path(spec.base)).value if spec.base else {}  # JSON is YAML 1.2
        if not isinstance(contents, dict):
            raise UserError(f"{spec.base}: must be a mapping to be a base for the trial's settings")
        for key, template in spec.set.items():
            *parents, last = key.split(".")
            place = contents
            for parent in parents:
                place = place.setdefault(parent, {})
                if not isinstance(place, dict):
                    raise UserError(f"config_file: {key}: {parent!r} is no mapping in {spec.base}")
            place[last] = fill_value(template, self.fields)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(contents, indent=1) if path.suffix == ".json" else dump_yaml(contents, for_any_reader=True), encoding="utf-8"
        )

    # -- output of the command

    def _take_output(self, data: bytes) -> None:
        """Runs in the thread that reads the pipe."""
        self.log.write(data)
        # Before the records of the same chunk: the first record triggers the check of the settings.
        if self.spec.echo != "off" and (found := self._echoes.feed(data)):
            self._messages.put({"echoed": found})
        if self._parser is not None:
            with self._parsing:
                for record in self._parser.feed(data):
                    self._messages.put({**record.values, "step": record.step})
        self._line += data
        looks = TAG in self._line
        complete, _, rest = self._line.rpartition(b"\n")
        self._line = rest[-MAX_LINE:]
        for line in complete.split(b"\n") if looks else ():
            self._read_tagged_line(line)

    def _read_tagged_line(self, line: bytes) -> None:
        for message in tagged_messages(line):
            # A parser of JSON lines also takes tagged records, since it maps their names.
            if "step" not in message or self._parser is None or self._parser.format != "jsonl":
                self._messages.put(message)

    def _collect(self, final: bool = False) -> None:
        """Moves everything that has arrived, from all sources, into `_records`."""
        if final and self._line:
            line, self._line = self._line, b""
            if self.spec.echo != "off":
                self._messages.put({"echoed": self._echoes.finish()})
            self._read_tagged_line(line)
        if self._channel is not None:
            for message in self._channel.read():
                self._dispatch(message)
        while not self._messages.empty():
            self._dispatch(self._messages.get())
        if final and self._parser is not None:  # the held-back step comes last
            self._add_records(self._parser.finish())
        if self._source is not None and (final or time.monotonic() >= self._source_due):
            self._source_due = time.monotonic() + self._source_every
            self._add_records(self._source.finish() if final else self._source.read())

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "step" in message:  # first: a metric of a step may have any name
            self._records.append((message["step"], numbers_of(message, without=("step",))))
        elif "effective" in message:
            stated = message["effective"] if isinstance(message["effective"], dict) else {}
            self._stated |= stated
            self._in_force |= set(stated)
        elif "read" in message:
            looked_up = message["read"] if isinstance(message["read"], list) else []
            self._settings_read = (self._settings_read or set()) | {str(name) for name in looked_up}
        elif "held_out" in message:
            self._held_out |= numbers_of(message["held_out"])
        elif "echoed" in message:
            self._stated |= {name: value for name, value in message["echoed"].items() if name not in self._in_force}

    def _add_records(self, records: Iterable[Record]) -> None:
        self._records += [(record.step, dict(record.values)) for record in records]

    def _release(self) -> None:
        """Moves the step that is held back for later rows into `_records`."""
        if self._parser is not None:
            with self._parsing:
                for record in self._parser.release():
                    self._messages.put({**record.values, "step": record.step})
            self._collect()
        elif self._source is not None:
            self._add_records(self._source.release())

    def _has_settled(self) -> bool:
        """Whether a training that has logged its last step but does not exit (a hanging teardown, an upload) is complete. A
        checkpoint that is still being written delays this; other output does not."""
        reader = self._source or self._parser
        if reader is None or self._settings_read is not None:  # a `trial_context` loop may still send samples
            return False
        held = reader.held() == self.steps  # a later step may be a misread number
        # Held-out metrics may still arrive: from the checkpoint that the evaluation reads, or from the training itself.
        evaluable = self.spec.checkpoints is not None if self.spec.evaluate is not None else bool(self._held_out)
        if not held and not (self.step_now >= self.steps and evaluable):
            return False
        made: list[tuple[str, int, int]] = []
        if self.spec.checkpoints is not None and (self.spec.smoke is not None or self.spec.evaluate is not None):
            checkpoint = self.written().get(self.steps)
            if checkpoint is None:  # an older one would be judged instead
                return False
            made = _sizes(checkpoint)
        now = time.monotonic()
        if self._last_change[0] != (held, made):
            self._last_change = (held, made), now
        return now - self._last_change[1] > LAST_ROWS_S

    def _wait(self) -> None:
        assert self._process is not None
        if self._process.has_ended:
            return
        time.sleep(POLL_S)

    def _require_good_end(self) -> None:
        process = self._process
        assert process is not None
        if not self._first_record_seen or process.exit_code != 0:
            after = f"after step {self.step_now}" if self._first_record_seen else "without a record"
            failed_in_loop = self._settings_read is not None and process.exit_code != 0  # it would have reported
            hint = "" if self._first_record_seen or failed_in_loop else self._where_looked()
            raise UserError(f"the command ended {after}, {process.describe_exit()}{hint}; {self._quote()}")

    def _finish_readers(self) -> None:
        """Flushes the readers of an abandoned command, so that they note what they could not read."""
        with self._parsing:
            for reader in (self._parser, self._source):
                if reader is not None:
                    reader.finish()

    def reading_problem(self) -> str:
        """See `Training`."""
        reader = self._source or self._parser
        return reader.issues.sentence() if reader is not None else ""

    def _where_looked(self) -> str:
        records = self.spec.records
        if records is None:
            return " (nothing was reported through tune_ssim.trial_context, and no line TUNE_SSIM {json} was printed)"
        where = "in its output"
        if records.file is not None:
            where = f"in {fill(records.file, self.fields)}"
        elif records.mlflow is not None:
            where = "in its run in MLflow"
        problem = self.reading_problem()
        return f" (looked {where}; {problem})" if problem else f" (looked {where})"

    def _quote(self) -> str:
        last = self.log.quote()
        return f"all that it printed is in {self.log.path}" + (f", last: {last}" if last else " (nothing)")

    def _require_settings_used(self) -> None:
        """Raises BadSetup for a setting of the trial that the command neither gets nor looks up, or that it does not print when
        `echo: required` is set. Checked once: at the first record of the training itself, or at the end."""
        if self._is_checked:
            return
        self._is_checked = True
        known = self.spec.referenced_settings() | (self._settings_read or set()) | set(self._stated) | {"steps"}
        for name, value in self.config.items():
            if name not in known and not is_neutral(name, value):
                raise BadSetup(
                    f"{name} is set to {value!r} but does not reach the training: put {{{name}}} into the command, its "
                    f"environment or its config file, or read it with trial_context().config[{name!r}]"
                )
        if self.spec.echo == "required":
            silent = sorted(
                name for name in self.spec.referenced_settings() & set(self.config) - {"steps"} if name not in self._stated
            )
            if silent:
                raise BadSetup(
                    f"the command does not print {silent[0]}: it is not known to have reached the training (echo: required); "
                    f"print it as {silent[0]}=…, or with trial_context().in_force({silent[0]}=…); {self._quote()}"
                )

    # -- samples, metrics and checkpoints

    def sample(self, noise: int = 0) -> Sample | None:
        """Runs the smoke test command on the newest checkpoint up to this step. None if there is no checkpoint yet."""
        spec = self.spec.smoke
        assert spec is not None
        checkpoint = self._checkpoint() if self.step_now else (spec.at_start and fill(spec.at_start, self._idle_fields()))
        if not checkpoint:
            return None
        fields = self._idle_fields() | {"checkpoint": str(checkpoint), "step": self.step_now, "noise": noise}
        out = Path(tempfile.mkdtemp(prefix="samples-", dir=self.folder if self.folder != Path() else None))
        try:
            self._run(spec.command, fields | {"out": str(out)}, spec.timeout_s, "the smoke test's command")
            return self._read_samples(out)
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def _idle_fields(self) -> dict[str, Any]:
        """Template fields known before the command has started."""
        own = {"exp_name": self.name, "exp_dir": str(self.folder / self.name), "python": sys.executable, "gpus": 0}
        return {**own, **self.config, "seed": self.seed, **self.fields}

    def _checkpoint(self) -> Path | None:
        template = self.spec.checkpoints
        return None if template is None else newest_checkpoint(template, self.fields, self._path, self.step_now)

    def written(self) -> dict[int, Path]:
        """Existing checkpoints by step."""
        template = self.spec.checkpoints
        return {} if template is None or not self.fields else checkpoints(template, self.fields, self._path)

    def _run(self, words: Sequence[str], fields: Mapping[str, Any], timeout_s: float, what: str) -> str:
        """Runs a command and returns its standard output. Raises UserError unless it exits with 0 in time."""
        node = {"nodes": 1, "node_rank": 0, "master_addr": "127.0.0.1", "master_port": free_port("127.0.0.1")}
        argv = fill_all(words, {**fields, **node})
        output: list[bytes] = []
        process = SupervisedProcess(
            argv,
            output.append,
            environment={**os.environ, "PYTHONUNBUFFERED": "1"},
            cwd=self._cwd() if self.spec.cwd is None or self.fields else self.home,
            grace_s=self.spec.grace_s,
        )
        try:
            in_time = process.wait(timeout_s)
        finally:
            process.stop()
        text = b"".join(output).decode(errors="replace")
        if not in_time or process.exit_code != 0:
            how = process.describe_exit() if in_time else f"not done after {timeout_s:g} s"
            raise UserError(f"{what} failed, {how}: {quote_of(text.splitlines()[-QUOTED_FROM:]) or 'it printed nothing'}")
        return text

    def _read_samples(self, out: Path) -> Sample:
        spec = self.spec.smoke
        assert spec is not None
        images = read_images(sorted(out.glob(spec.images)), f"{spec.images} in {{out}}") if spec.images else None
        names = [path.relative_to(out) for path in sorted(out.glob(spec.images))] if spec.images else []

        def images_of(folder: str | None) -> torch.Tensor | None:
            return read_images([self._path(folder) / name for name in names], folder) if folder else None

        ids = None
        if spec.tokens is not None:
            try:
                rows = json.loads((out / spec.tokens).read_bytes())
                ids = torch.tensor([-1 if token is None else int(token) for row in rows for token in row])
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"smoke: {spec.tokens}: not a JSON list of lists of token ids ({error})") from None
        examples = None
        if spec.examples is not None:
            folder = self._path(spec.examples)
            examples = read_images(
                sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES), spec.examples
            )
        if images is None:
            images = torch.zeros(0, 3, 1, 1)
        return Sample(
            images,
            references=images_of(spec.references),
            reconstructions=images_of(spec.reconstructions),
            inputs=images_of(spec.inputs),
            examples=examples,
            token_ids=ids,
            vocabulary_size=spec.vocabulary_size,
        )

    def image(self, step: int) -> bytes | None:
        return self._channel.image(step) if self._channel is not None else None

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics: those sent, those printed by the evaluation command, and the last value of every other metric."""
        self._collect()
        found = held_out_values(self._last) | self._held_out
        spec = self.spec.evaluate
        if spec is not None:
            checkpoint = self._checkpoint()
            if checkpoint is None and any("checkpoint" in placeholders(word) for word in spec.command):
                raise UserError(f"evaluate: there is no checkpoint at step {self.step_now}; {self._quote()}")
            fields = self.fields | {"step": self.step_now, "checkpoint": str(checkpoint or ""), "noise": 0, "out": ""}
            text = self._run(spec.command, fields, spec.timeout_s, "the evaluation's command")
            lines = [line.strip() for line in text.splitlines() if line.strip().startswith("{")]
            try:
                found |= numbers_of(json.loads(lines[-1]))
            except (IndexError, ValueError):
                raise UserError("the evaluation's command printed no line of JSON with numbers") from None
        return found

    def state_dict(self) -> dict[str, Any]:
        checkpoint = self._checkpoint() if self.fields else None
        return {"step": self.step_now, "checkpoint": str(checkpoint) if checkpoint else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.can_resume or state["checkpoint"] is None:
            raise NothingToResume("the command cannot resume: it has no `resume` arguments, or had written no checkpoint")
        self.step_now, self._resume_from = state["step"], Path(state["checkpoint"])

    def effective(self) -> dict[str, Any]:
        """The settings as the training sent or printed them, otherwise as it got them."""
        return {"max_grad_norm": None, **self.spec.known, **self.config, **self._stated}

    def where_printed(self, name: str) -> str | None:
        return None if name in self._in_force else self._echoes.lines.get(name)


def _sizes(path: Path) -> list[tuple[str, int, int]]:
    """(file, bytes, modification time in ns) for each file of a checkpoint. These change while it is being written."""
    found = []
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        try:
            status = file.stat()
        except OSError:  # moved meanwhile
            continue
        found.append((str(file), status.st_size, status.st_mtime_ns))
    return found


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


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def read_images(paths: Sequence[Path], what: str) -> torch.Tensor:
    """`[n, 3, H, W]` in [0, 1]. Raises UserError for files that are not images, or differ in size."""
    import numpy as np
    from PIL import Image

    if not paths:
        raise UserError(f"smoke: no images: {what}")
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1))
        except (OSError, ValueError) as error:
            raise UserError(f"smoke: {path}: {error}") from None
    sizes = sorted({(image.shape[1], image.shape[2]) for image in images})
    if len(sizes) > 1:
        raise UserError(f"smoke: images of one size are needed, {what} has {sizes[0]} and {sizes[-1]}")
    return torch.stack(images)


def newest_checkpoint(template: str, fields: Mapping[str, Any], place: Callable[[str], Path], step: int) -> Path | None:
    """The matching path with the highest step not above `step`."""
    found = checkpoints(template, fields, place)
    return found[max(upto)] if (upto := [at for at in found if at <= step]) else None


def checkpoints(template: str, fields: Mapping[str, Any], place: Callable[[str], Path]) -> dict[int, Path]:
    """The paths that match the template, by step."""
    pieces = []
    for literal, name, form, _ in string.Formatter().parse(template):
        pieces.append(literal)
        if name is not None:
            pieces.append(ANY_STEP if name == "step" else format(as_word(fields[name]), form or ""))
    parts = str(place("".join(pieces))).split(ANY_STEP)
    expression = re.compile(r"0*(\d+)".join(re.escape(part) for part in parts))
    found: dict[int, Path] = {}
    for path in sorted(glob.glob("*".join(glob.escape(part) for part in parts))):  # noqa: PTH207  (Path.glob takes no absolute pattern)
        if match := expression.fullmatch(path):
            found[int(match[1])] = Path(path)
    return found


def numbers_of(values: Any, without: Sequence[str] = ()) -> dict[str, float]:
    """The numbers in a mapping, NaN and Inf included. Other values are dropped."""
    found: dict[str, float] = {}
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in without:
            found[str(name)] = float(value)
    return found
