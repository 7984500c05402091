"""Output of the verbs: text, tables, JSON, and a hint to the next command."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tune_ssim.base.errors import UserError
from tune_ssim.base.passwords import without_password

if TYPE_CHECKING:
    from rich.console import Console


def suggest_next(*words: str, why: str, to_stderr: bool = False) -> None:
    """Prints the next useful command, ready to paste, without passwords."""
    context = click.get_current_context()
    if context.get_parameter_source("storage") is click.core.ParameterSource.COMMANDLINE:
        words = (*words, "--storage-path", str(context.params["storage"]))
    click.echo(f"next: tune-ssim {shlex.join(map(without_password, words))}  # {why}", err=to_stderr)


def discard_stdout() -> None:
    """Redirects all further output to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def make_console(outlive_reader: bool = False, to_stderr: bool = False) -> Console:
    """A rich console. It honours NO_COLOR, writes wide lines to a pipe, and replaces characters missing in the encoding by `?`.

    When the reader of a pipe closes it, a listing ends; with `outlive_reader` (for a study) the process goes on without output.
    """
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            if not outlive_reader:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            discard_stdout()

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Output(highlight=False, stderr=to_stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Output(highlight=False, stderr=to_stderr, width=200)
    return console


def readable(text: str, console: Console) -> str:
    from tune_ssim.results.trial_text import readable

    return readable(text, console.options.ascii_only)


def print_line(text: str, console: Console) -> None:
    """Wrapped in a terminal only: a pipe has no width, and a command broken into two lines cannot be pasted."""
    console.print(readable(text, console), markup=False, soft_wrap=not console.is_terminal)


def print_exactly(text: str) -> None:
    """Writes to stdout as UTF-8 whatever the locale, for other programs."""
    stream, rest = sys.stdout.buffer, memoryview(text.encode())
    while rest:
        rest = rest[stream.write(rest) :]  # with PYTHONUNBUFFERED the stream is raw and may accept only a part
    stream.flush()


def print_json(value: Any) -> None:
    """Writes JSON to stdout, with the strings "NaN" and "Infinity" for non-finite numbers."""
    from tune_ssim.base.files import jsonable

    print_exactly(json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def output_file(output: str | None, option: str = "--output") -> Path | None:
    """The path to write to; None for stdout. Raises UserError if no file can be written there."""
    if output is None or output == "-":
        return None
    path = Path(output)
    if not output.strip():
        raise UserError(f"{option}: give a file's name")
    if path.is_dir():
        raise UserError(f"{option} {output}: a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {output}: not a regular file")
    if not path.parent.is_dir():
        raise UserError(f"{option} {output}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {output}: {path.parent} may not be written")
    return path
