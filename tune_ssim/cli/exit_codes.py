"""Exit codes of the command line, and their messages."""

from __future__ import annotations

import os
import select
import sys
import tempfile
import traceback
from pathlib import Path
from textwrap import shorten

import click

from tune_ssim.base.extras import install_hint, is_installed
from tune_ssim.base.passwords import hide_password
from tune_ssim.cli.output import discard_stdout

DONE, OURS, MISTAKE, BAD_SETUP, UNDECIDED, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 4, 130, 141
DEBUG_VARIABLE = "TUNE_SSIM_DEBUG"


def fail(code: int, message: str) -> int:
    """Prints the message, one line per problem (a study file may have several), and returns the code."""
    for line in filter(None, map(str.strip, message.splitlines())):
        try:
            click.echo("error: " + "".join(letter if letter.isprintable() else " " for letter in line), err=True)
        except BrokenPipeError:
            break
    return code


def missing_library(verb: str, module: str | None) -> str | None:
    """`run needs Ray: pip install 'tune-ssim[ray]'`; None if no extra of this package installs the missing module."""
    if verb in ("run", "verify") and install_hint(module) and not is_installed("ray"):
        return f"{verb} needs {install_hint('ray')}; for the bundled studies 'tune-ssim[all]'"  # also installs the other libraries
    hint = install_hint(module)
    return hint and f"{verb} needs {hint}"


def bug_report(error: Exception, storage: Path | None) -> str:
    """Writes the traceback to a file in the storage path or the temporary folder. Returns the message to print."""
    text = hide_password("".join(traceback.format_exception(error)))
    if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
        click.echo(text, err=True)
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]  # Ray puts whole tracebacks into a message
    message = f"a bug of tune-ssim, not of yours: {type(error).__name__}: {shorten(hide_password(line), 300)}"
    try:
        folder = storage if storage is not None and storage.is_dir() else None
        descriptor, path = tempfile.mkstemp(dir=folder, prefix="tune-ssim-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return f"{message}; {DEBUG_VARIABLE}=1 shows the traceback"
    return f"{message}; traceback in {path}"


def reader_is_gone() -> bool:
    """Whether stdout is a closed pipe (`| head`). Then the interpreter must not flush it again at exit."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False
    if gone:
        discard_stdout()
    return gone
