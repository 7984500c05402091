"""The command line: the group of all verbs and its entry point. Imports are lazy, so that `--help` is fast."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from tune_ssim.base.errors import ENVIRONMENT, BadSetup, UserError
from tune_ssim.cli.before_launch_verbs import calibrate, preflight, recommend, spaces
from tune_ssim.cli.doctor_verb import doctor
from tune_ssim.cli.exit_codes import (
    BAD_SETUP,
    BROKEN_PIPE,
    DEBUG_VARIABLE,
    DONE,
    INTERRUPTED,
    MISTAKE,
    OURS,
    UNDECIDED,
    bug_report,
    fail,
    missing_library,
    reader_is_gone,
)
from tune_ssim.cli.log_verbs import check
from tune_ssim.cli.observe_verbs import observe
from tune_ssim.cli.options import Verbs
from tune_ssim.cli.quarantine_verbs import quarantine
from tune_ssim.cli.study_verbs import export, mirror, report, run, trials, ui, verify
from tune_ssim.cli.submit_verbs import logs, status, stop, submit
from tune_ssim.version import __version__

EPILOG = f"""\b
Exit codes:
  {DONE}    done
  {MISTAKE}    your mistake: one line says what is wrong. Also `run` and `export` when no setting is safe and beats the baseline
  {BAD_SETUP}    bad set-up: weights, data or baseline are not sound; no setting is to blame. Also `check` with alerts
  {UNDECIDED}    `check` cannot tell: too little of the log could be read or judged, or its numbers are out of all bounds.
       Also `run` when some trials have no verdict, since their process died: `tune-ssim run --resume` tries them again
  {OURS}    our bug: the traceback is in a file ({DEBUG_VARIABLE}=1 prints it)
  {INTERRUPTED}  interrupted: `tune-ssim run --resume` goes on
"""


@click.group(cls=Verbs, epilog=EPILOG, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="tune-ssim")
@click.pass_context
def cli(context: click.Context) -> None:
    """Tunes an SSIM loss for latent diffusion on Ray Tune without ruining the model.

    \b
      tune-ssim run           tune on real fundus images, a few minutes on two cores
      tune-ssim trials        what was tried, and why a trial was stopped
      tune-ssim export        the best safe setting, for a training script
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


SUBMITTED = (submit, status, logs, stop)
BEFORE_LAUNCH = (run, preflight, calibrate, recommend, doctor)
AFTERWARDS = (trials, report, export, check, observe, verify, ui, spaces, mirror, quarantine)
for verb in (*BEFORE_LAUNCH, *AFTERWARDS, *SUBMITTED):
    cli.add_command(verb)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point of the console script."""
    try:
        code = exit_code(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:  # while another end was being reported
        code = fail(INTERRUPTED, "interrupted")
    sys.exit(code)


def exit_code(arguments: list[str]) -> int:
    """Runs a verb. Converts its result or exception into an exit code and at most one line on stderr."""
    context: click.Context | None = None
    try:
        context = cli.make_context("tune-ssim", arguments)
        with context:
            cli.invoke(context)
        sys.stdout.flush()
        return DONE
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as mistake:
        where = mistake.ctx.command_path if isinstance(mistake, click.UsageError) and mistake.ctx else "tune-ssim"
        return fail(MISTAKE, f"{mistake.format_message()} (see `{where} --help`)")
    except UserError as mistake:
        return fail(MISTAKE, str(mistake))
    except BadSetup as finding:
        return fail(BAD_SETUP, f"bad set-up: {finding}")
    except (KeyboardInterrupt, click.Abort):
        return fail(INTERRUPTED, "interrupted")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and context is not None:
            needs = missing_library(context.invoked_subcommand or "tune-ssim", error.name)
            if needs is not None:
                return fail(MISTAKE, needs)
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            return BROKEN_PIPE
        if isinstance(error, OSError) and error.errno in ENVIRONMENT:
            return fail(MISTAKE, f"{error.filename or 'file system'}: {error.strerror}")
        return fail(OURS, bug_report(error, context.obj if context else None))
