"""Verbs of the quarantine ledger: quarantine list, why, release."""

from __future__ import annotations

from pathlib import Path

import click

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.cli.exit_codes import BAD_SETUP
from tune_ssim.cli.options import Verbs, storage_option
from tune_ssim.cli.output import make_console, print_json, print_line, suggest_next


@click.group(cls=Verbs)
def quarantine() -> None:
    """Checkpoints of ruined trials, which no training may start from.

    They are known by the content of their tensors, whatever their name.
    """


@quarantine.command("list")
@click.option("--json", "as_json", is_flag=True, help="A list of objects.")
@storage_option
def quarantine_list(as_json: bool, storage: Path) -> None:
    """List what is in quarantine."""
    from dataclasses import asdict

    from tune_ssim.trials.quarantine import Ledger

    entries = Ledger(storage).entries()
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    console = make_console()
    if not entries:
        print_line("nothing is in quarantine", console)
        return
    from tune_ssim.cli.tables import quarantine_table

    console.print(quarantine_table(entries, console.options.ascii_only))
    suggest_next("quarantine", "why", entries[-1].id[:12], why="says more; a file or folder may be given too")


@quarantine.command("why")
@click.argument("what", metavar="FILE|FOLDER|ID")
@storage_option
def quarantine_why(what: str, storage: Path) -> None:
    """Say why a file, a checkpoint folder or an id is in quarantine, or that it is not.

    Exit code 3 if it is, 0 if it is not or was released.
    """
    from tune_ssim.trials.quarantine import Ledger

    if not what.strip():
        raise UserError("quarantine why: give a file, a checkpoint folder or an id")
    ledger, console = Ledger(storage), make_console()
    try:
        lines = ledger.why(what)
        refusal = ledger.check(what) if Path(what).exists() else None
        in_force = refusal is not None or bool({line.id for line in lines} & {entry.id for entry in ledger.entries()})
    except BadSetup as error:  # here a file that is not a checkpoint is a wrong argument
        raise UserError(str(error)) from None
    for line in lines:
        print_line(f"{line.time}  {line.id[:12]}  {line}", console)
    if Path(what).exists():
        print_line(str(refusal) if refusal else f"{what}: not in quarantine", console)
    if in_force:
        raise click.exceptions.Exit(BAD_SETUP)


@quarantine.command("release")
@click.argument("id")
@click.option("--reason", required=True, help="Why it may be used after all; kept in the ledger.")
@storage_option
def quarantine_release(id: str, reason: str, storage: Path) -> None:
    """Lift a quarantine, for a reason that is kept."""
    from tune_ssim.trials.quarantine import Ledger

    released = Ledger(storage).release(id, reason)
    click.echo(f"{released.id[:12]} released: {released.reason}")
