"""Specification of an external training command: the `task:` of a study that tunes a script. Does not import torch."""

from __future__ import annotations

import os
import re
import shutil
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tune_ssim.base.errors import FieldError, UserError
from tune_ssim.base.validation import Problem, Problems, Section
from tune_ssim.base.yaml_source import did_you_mean
from tune_ssim.records.readers import FORMATS, PRINTED, LineParser

# Placeholders besides the trial's own settings.
ALWAYS = ("seed", "steps", "exp_name", "exp_dir", "python", "nodes", "node_rank", "master_addr", "master_port", "gpus")
UNIQUE_PER_TRIAL = ("exp_dir", "exp_name")  # also differ between two starts of the same trial
IN_SMOKE = ("checkpoint", "step", "noise", "out")
# Values that have no effect: no scaling, no gate.
NEUTRAL = {"ssim_grad_scale": (1.0,), "ssim_loss_max_t": (None, 1.0), "pixel_loss_max_t": (None, 1.0)}
AUXILIARY_WEIGHT = re.compile(r"(ssim|pixel|kl|dino)_(\w+_)?weight")  # a weight of 0 disables the loss
# Sample values, used to validate the format specs of placeholders.
SAMPLES: dict[str, Any] = {
    **dict.fromkeys(("seed", "steps", "nodes", "node_rank", "master_port", "gpus", "step", "noise"), 1),
    **dict.fromkeys(("exp_name", "exp_dir", "python", "master_addr", "checkpoint", "out"), "x"),
}
Words = Annotated[list[str], Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConfigFile(Section):
    """A file with the trial's settings, written before the command starts.

    path: usually in `{exp_dir}`; `.json` or `.yaml`. base: a file in the same format to start from. set: dotted key → value; a
    value that is a single placeholder keeps its type."""

    path: Annotated[str, Field(min_length=1)]
    base: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)

    @field_validator("path")
    @classmethod
    def _path(cls, path: str) -> str:
        if not path.endswith((".json", ".yaml", ".yml")):
            raise ValueError(f"must end in .json or .yaml, got {path!r}")
        return path


class RecordsFrom(Section):
    """The source of per-step metrics, if the training does not report them itself.

    file: a log written by the command, in any format of `records.readers`, or a folder of TensorBoard files; default the
    command's output. Every trial needs its own log, so the path or the `cwd` must contain `{exp_dir}` or `{exp_name}`.
    pattern: regular expressions with named groups, one of them `step`, or the name of a built-in pattern.
    names: metric name in the log → ours. mlflow: a tracking URI; `mlflow.start_run()` in the command resumes a run that was
    created for the trial."""

    mlflow: Annotated[str, Field(min_length=1)] | None = None
    file: Annotated[str, Field(min_length=1)] | None = None
    format: str | None = None  # default: by the content
    pattern: str | list[str] | None = None
    names: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one(self) -> RecordsFrom:
        if self.mlflow is not None and (self.file is not None or self.pattern is not None or self.format is not None):
            raise FieldError("mlflow", "goes with names only, not with file, format or pattern")
        return self


class SmokeCommand(Section):
    """A second command that runs inference. Placeholders: `{checkpoint}`, `{step}`, `{noise}` (0 or 1), and `{out}`, an empty
    folder for its output.

    images: a glob in `{out}`; all images have the same size. references: a folder with the ground truth of each image, under
    the same file names. reconstructions: the ground truth passed through the frozen autoencoder, an upper bound for samples.
    inputs: the input of each image. examples: a folder with other real images of the same kind, if there is no ground truth.
    tokens: a file in `{out}` with a JSON list of lists of token ids below `vocabulary_size`. at_start: the checkpoint of
    step 0; without it, the first samples are judged without a reference point."""

    command: Words  # program and arguments
    images: Annotated[str, Field(min_length=1)] | None = "*.png"
    references: str | None = None
    reconstructions: str | None = None
    inputs: str | None = None
    examples: str | None = None
    tokens: str | None = None
    vocabulary_size: Annotated[int, Field(ge=1)] | None = None  # of `tokens`
    at_start: str | None = None
    timeout_s: Seconds = 1800.0  # per run; the same as silence_s

    @model_validator(mode="after")
    def _something(self) -> SmokeCommand:
        if self.images is None and self.tokens is None:
            raise FieldError("images", "must not be null where there are no tokens either")
        if (self.tokens is None) != (self.vocabulary_size is None):
            raise Problems([Problem(("tokens",), "tokens and vocabulary_size belong together")])
        return self


class EvaluateCommand(Section):
    """A command that measures held-out metrics. Its last printed JSON line is the result, e.g. {"ssim": 0.91, "psnr": 31.2}."""

    command: Words  # program and arguments, with the placeholders of a smoke command
    timeout_s: Seconds = 1800.0  # per run; the same as silence_s


class CommandSpec(Section):
    """An external training command.

    command: program and arguments; not run through a shell. `{name}` is replaced by a setting of the trial, or one of `seed
    steps exp_name exp_dir python nodes node_rank master_addr master_port gpus`; `{name:.3e}` formats it, `{{` is a brace.

    environment: additional variables; `EXP_NAME` is always set and unique per trial. cwd: default the study's folder.
    observe: measure gradient norms in the command's own processes, through their environment alone, if they train with PyTorch;
    `full`: also for each top-level module. weights: checkpoint files that the networks must equal before the first update.
    data: files and folders that it reads. A proof covers both, the scripts, what they import, and all files in the command line.
    echo: compare parameters that the command prints (`name=value`, `name: value`, JSON) with the trial's settings; `required`:
    a parameter that is not printed stops the study. known: values that the script hard-codes, e.g.
    `{max_grad_norm: 1.0, batch_size: 8}`. checkpoints: the path of the checkpoint at `{step}`, or of one
    that is overwritten; `*` is any text. resume: extra arguments to resume from `{checkpoint}`; without them a trial whose process
    died restarts under a new name. exit_codes: those of a training that has ended well.
    """

    command: Words
    environment: dict[str, str | int | float] = Field(default_factory=dict)
    cwd: Annotated[str, Field(min_length=1)] | None = None
    config_file: ConfigFile | None = None  # a file with the settings, written for each trial
    records: RecordsFrom | None = None  # None: records that it pushes, or prints after the tag TUNE_SSIM
    weights: list[str] = Field(default_factory=list)
    data: list[str] = Field(default_factory=list)
    observe: Literal["norms", "full", "off"] = "norms"  # FACTS §2: the total norm costs 0.9 % of a step
    echo: Literal["auto", "required", "off"] = "auto"
    known: dict[str, Any] = Field(default_factory=dict)
    checkpoints: Annotated[str, Field(min_length=1)] | None = None
    smoke: SmokeCommand | None = None  # makes samples from a checkpoint; without it there is no smoke test
    evaluate: EvaluateCommand | None = None  # measures held-out metrics; without it those that the training logs count
    resume: list[str] | None = None
    exit_codes: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: [0])
    grace_s: Seconds = 10.0  # between TERM and KILL
    first_record_s: Seconds = 1800.0  # enough to load a model of many GB
    silence_s: Seconds = 1800.0  # PyTorch's own timeout for collectives is 10 to 30 minutes

    @model_validator(mode="after")
    def _readable(self) -> CommandSpec:
        problems = Problems()
        for place, template, _ in self.templates():
            try:
                placeholders(template)
            except ValueError as error:
                problems.add(place, f"{template!r}: {error}; write a literal brace twice")
        problems.check()
        return self

    def templates(self) -> Iterator[tuple[tuple[str | int, ...], str, bool]]:
        """(place, template, is_extra) of all text with placeholders; is_extra: it belongs to the smoke test, the evaluation, the
        checkpoints or the resume arguments."""
        yield from ((("command", index), word, False) for index, word in enumerate(self.command))
        yield from ((("environment", name), value, False) for name, value in self.environment.items() if isinstance(value, str))
        if self.config_file is not None:
            yield ("config_file", "path"), self.config_file.path, False
            yield from ((("config_file", "set", key), v, False) for key, v in self.config_file.set.items() if isinstance(v, str))
        for name in ("weights", "data"):
            yield from (((name, index), path, False) for index, path in enumerate(getattr(self, name)))
        for name in ("cwd", "checkpoints"):
            if getattr(self, name) is not None:
                yield (name,), getattr(self, name), name == "checkpoints"
        if self.records is not None and self.records.file is not None:
            yield ("records", "file"), self.records.file, False
        for name, words in (
            ("smoke", self.smoke.command if self.smoke else ()),
            ("evaluate", self.evaluate.command if self.evaluate else ()),
        ):
            yield from (((name, "command", index), word, True) for index, word in enumerate(words))
        yield from ((("resume", index), word, True) for index, word in enumerate(self.resume or ()))

    def problems(self, settings: Mapping[str, Sequence[Any]] | None) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """(place, message) of each problem. settings: name → possible values of a trial's settings; None: not known."""
        if self.records is not None:
            yield from (
                (("records", *place), wrong) for place, wrong in reading_problems(self.records.pattern, self.records.format)
            )
        if settings is None:
            return
        for place, template, in_smoke in self.templates():
            valid = list(dict.fromkeys([*sorted(settings), *ALWAYS, *(IN_SMOKE if in_smoke else ())]))
            unknown = [name for name in placeholders(template) if name not in valid]
            if unknown:
                yield place, f"no setting {unknown[0]!r} for the braces in {template!r}; there are {', '.join(valid)}"
                continue
            samples = {**SAMPLES, **{name: values[0] for name, values in settings.items() if values}}
            tried = [{**samples, name: value} for name in placeholders(template) for value in settings.get(name, ())]
            misfit = next(filter(None, (_misfit(template, values) for values in tried or [samples])), None)
            if misfit is not None:
                yield place, misfit
        if self.records is not None and self.records.file is not None and self._shares(self.records.file):
            name = os.path.basename(self.records.file) or "log"  # noqa: PTH119  (a template, no path yet)
            yield (
                ("records", "file"),
                f"{self.records.file!r} is one file for several trials, and each would be judged by the others' records: let the "
                f'command write, and say here, "{{exp_dir}}/{name}", or another path with {{exp_dir}} or {{exp_name}} in it',
            )

    def unused_settings(self, settings: Mapping[str, Sequence[Any]]) -> list[str]:
        """Settings that have an effect but no placeholder in the command. Empty for a command that pushes its records, because it
        can read its settings itself."""
        if self.records is None:
            return []
        known = {"steps", *self.referenced_settings()}
        return [name for name, values in settings.items() if name not in known and not all(is_neutral(name, v) for v in values)]

    def missing_programs(self, home: str | None) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """(place, message) of each program that is missing on this machine. home: the working folder if there is no `cwd`."""
        cwd = Path(home or ".", self.cwd or "")
        if self.cwd is not None and placeholders(self.cwd):
            return
        if not cwd.is_dir():
            yield ("cwd",) if self.cwd else ("command",), f"the working folder {str(cwd)!r} does not exist"
            return
        commands = {"smoke": self.smoke and self.smoke.command, "evaluate": self.evaluate and self.evaluate.command}
        for name, words in {"": self.command, **commands}.items():
            if not words or placeholders(words[0]) or (not name and "PATH" in self.environment):
                continue
            program = words[0].replace("{{", "{").replace("}}", "}")
            own = cwd / program
            if "/" in program:
                if not os.access(own, os.X_OK) or own.is_dir():
                    what = "cannot be executed" if own.exists() else "does not exist"
                    yield (*filter(None, (name,)), "command", 0), f"the program {program!r} {what} (looked in {cwd})"
            elif shutil.which(program) is None:
                hint = f"; {own} is meant by ./{program}" if own.is_file() else ""
                yield (*filter(None, (name,)), "command", 0), f"no program {program!r} in the PATH{hint}"

    def _shares(self, file: str) -> bool:
        """Whether two trials may have the same path. Settings do not make it unique, because all baselines share them."""
        is_absolute = file.startswith("{exp_dir}")  # exp_dir is absolute
        path = os.path.normpath(file if is_absolute else os.path.join(self.cwd or "", file))  # noqa: PTH118  (`..` may leave the folder)
        return not set(placeholders(path)) & set(UNIQUE_PER_TRIAL)

    def referenced_settings(self) -> set[str]:
        """Names of the placeholders in the command, its environment and its config file."""
        elsewhere = ("cwd", "records", "weights", "data")
        parts = (template for place, template, in_smoke in self.templates() if not in_smoke and place[0] not in elsewhere)
        return {name for template in parts for name in placeholders(template)}


def is_neutral(name: str, value: Any) -> bool:
    """Whether a setting with this value has no effect, so that it need not reach the training."""
    return value in NEUTRAL.get(name, ()) or (AUXILIARY_WEIGHT.fullmatch(name) is not None and value == 0)


def reading_problems(pattern: str | Sequence[str] | None, format: str | None) -> Iterator[tuple[tuple[str, ...], str]]:
    """(place, message) of each problem with the format and pattern of a log."""
    if format is not None and format not in FORMATS:
        yield ("format",), f"unknown format {format!r}{did_you_mean(format, FORMATS)}"
        return
    if pattern is None:
        return
    if isinstance(pattern, str) and re.fullmatch(r"\w+", pattern) and pattern not in PRINTED:
        yield ("pattern",), f"no built-in pattern {pattern!r}{did_you_mean(pattern, PRINTED)}"
        return
    try:
        LineParser(pattern=pattern, format="text" if format is None else format if format in ("text", "jsonl", "csv") else None)
    except UserError as error:
        yield ("pattern",), str(error).removeprefix("pattern: ")


def _misfit(template: str, values: Mapping[str, Any]) -> str | None:
    try:
        fill(template, values)
    except UserError as error:
        return str(error).removeprefix("command: ")
    return None


def placeholders(template: str) -> list[str]:
    """Names in braces. Raises ValueError for unbalanced braces, and for anything in them but a name and a format spec."""
    names = []
    for _, name, format_spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or conversion or "{" in (format_spec or ""):
            raise ValueError(f"the braces hold no name of a setting: {name!r}")
        names.append(name)
    return names


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with its placeholders filled. Raises UserError for a missing value or an unsuitable format spec."""
    for name in placeholders(template):
        if name not in values:
            raise UserError(f"command: this trial has no value for the braces in {template!r}; it has {', '.join(sorted(values))}")
    words = {name: as_word(value) for name, value in values.items()}
    try:
        return string.Formatter().vformat(template, (), words)
    except (ValueError, TypeError) as error:
        shown = ", ".join(f"{name} = {values[name]!r}" for name in dict.fromkeys(placeholders(template)))
        raise UserError(f"command: the format in {template!r} does not fit {shown}: {error}") from None


def fill_value(template: Any, values: Mapping[str, Any]) -> Any:
    """Like `fill`, but a template that is a single placeholder returns the value itself, with its type."""
    if not isinstance(template, str):
        return template
    names = placeholders(template)
    text = fill(template, values)
    return values[names[0]] if len(names) == 1 and template == f"{{{names[0]}}}" else text


def fill_all(templates: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    return [fill(template, values) for template in templates]


class _Word(str):
    """The text of a value that still accepts the format specs of the value."""

    value: Any

    def __format__(self, format_spec: str) -> str:
        return format(self.value, format_spec) if format_spec else str(self)


def as_word(value: Any) -> _Word:
    """A value as text: numbers as in Python, true and false as in YAML, None as the empty string."""
    text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    word = _Word(text)
    word.value = value
    return word
