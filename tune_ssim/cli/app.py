"""The command line: one verb a function. Imports lazily, so that `--help` answers at once."""

from __future__ import annotations

import errno
import io
import os
import select
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NoReturn

import click

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from tune_ssim.results.study_folder import StudyFolder

DONE, OURS, MISTAKE, BAD_SETUP, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141
DEBUG_VARIABLE = "TUNE_SSIM_DEBUG"
# Errors of the file system that no code of ours can cause or cure: a full disk, a folder that may not be written.
ENVIRONMENT = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR)

EPILOG = f"""\b
Exit codes:
  {DONE}    done
  {MISTAKE}    your mistake: one line says what is wrong. Also `export` when no trial is safe
  {BAD_SETUP}    bad set-up: weights, data or baseline are not sound; no setting is to blame. Also `check` with alerts
  {OURS}    our bug: the traceback is in a file ({DEBUG_VARIABLE}=1 prints it)
  {INTERRUPTED}  interrupted: `tune-ssim run --resume` goes on
"""


class Verbs(click.Group):
    """Lists the verbs in the order of their use, and guesses what a misspelt one was meant to be."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, context: click.Context, arguments: list[str]) -> Any:
        verb = arguments[0]
        if not verb.startswith("-") and verb not in self.commands:
            near = get_close_matches(verb, self.commands, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"unknown verb {verb!r}{meant} (there are {', '.join(self.commands)})", context)
        return super().resolve_command(context, arguments)


def _storage(context: click.Context, parameter: click.Parameter, value: str | None) -> Path:
    from tune_ssim.results.study_folder import storage_path

    path = storage_path(value)
    if path.exists() and not path.is_dir():
        raise UserError(f"storage path {path}: a file, not a folder")
    context.find_root().obj = path  # where a traceback of ours goes
    return path


def storage_option(verb: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--storage-path",
        "storage",
        metavar="FOLDER",
        callback=_storage,
        help="Where the studies are.  [default: $TUNE_SSIM_STORAGE, else ./tune_ssim_results]",
    )(verb)


def tracking_option(verb: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--tracking-uri", metavar="URI", help="MLflow's store.  [default: the study's, else SQLite in the storage path]"
    )(verb)


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


@cli.command()
@click.argument("study", required=False)
@click.option("--space", help="A search space by name, name:stage or path, in place of the study's.")
@click.option("--trials", type=click.IntRange(min=1), help="Trials of the search, without the baselines.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the search.")
@click.option("--name", help="The study's name: its folder and its MLflow run.  [default: as in the study file]")
@storage_option
@tracking_option
@click.option("--address", help="A running Ray cluster (`auto`, HOST:PORT).  [default: a local one for this study]")
@click.option("--resume", is_flag=True, help="Go on with a study; without STUDY and --name, with the latest.")
@click.option("--dry-run", is_flag=True, help="Print the study as resolved, every default included; start nothing.")
def run(
    study: str | None,
    space: str | None,
    trials: int | None,
    seed: int | None,
    name: str | None,
    storage: Path,
    tracking_uri: str | None,
    address: str | None,
    resume: bool,
    dry_run: bool,
) -> None:
    """Tune: baseline, search, prune what ruins the model.

    STUDY is a study file or the name of a bundled one. Without it: the bundled fundus study. A name that is taken gets
    a suffix, unless --resume.
    """
    from tune_ssim.results.study_folder import find_study
    from tune_ssim.study.study import load_study

    source: str | Path | None = study
    if resume and study is None:
        folder = find_study(storage, name)
        source, name = folder.study_file, folder.name
    overrides = {"space": space, "trials": trials, "seed": seed, "name": name, "tracking_uri": tracking_uri}
    resolved = load_study(source, overrides, launch=address is None)  # a cluster's nodes have programs of their own
    if dry_run:
        _print_exactly(resolved.to_yaml())
        given = [(f"--{key.replace('_', '-')}", str(value)) for key, value in overrides.items() if value is not None]
        say_next(
            "run",
            *([study] if study else []),
            *(word for pair in given for word in pair),
            why="starts it",
            to_stderr=True,
        )
        return

    from tune_ssim.orchestration.run_study import run as run_study
    from tune_ssim.results.proof import proof_of
    from tune_ssim.results.trial_text import proof_line
    from tune_ssim.results.winner import NoSafeTrial, best_safe

    console = _console(outlive_reader=True)
    started_s = time.time()
    try:
        folder = run_study(
            resolved,
            storage=storage,
            name=name,
            address=address,
            resume=resume,
            tracking_uri=tracking_uri,
            console=console,
        )
    except KeyboardInterrupt:
        _say_how_to_resume(storage, started_s, resume)
        raise
    _show_trials(folder, console)
    try:
        best = best_safe(folder)
    except NoSafeTrial as reason:
        console.print(_readable(str(reason), console), markup=False)
        say_next("trials", folder.name, why="has every reason")
    else:
        proof = proof_of(best, folder)
        console.print(_readable(f"best safe: {best.trial_id}: {best.reason}", console), markup=False)
        console.print(_readable(proof_line(proof), console), markup=False)
        option = ["--unproven"] if proof["unproven"] else []
        say_next("export", folder.name, "--format", "env", *option, why="prints it for a training script")
    say_next("ui", folder.name, why="browses the study in MLflow")


def study_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Of the verbs that look at a study before it is launched."""
    for option in (
        click.option("--address", help="Measure on a running Ray cluster, with a trial's resources.  [default: here]"),
        click.option("--seed", type=click.IntRange(min=0), help="Seed of the search."),
        click.option("--space", help="A search space by name, name:stage or path, in place of the study's."),
        click.argument("study", required=False),
    ):
        verb = option(verb)
    return verb


@cli.command()
@study_options
@click.option("--json", "as_json", is_flag=True, help="Every check with its evidence, as one object.")
def preflight(study: str | None, space: str | None, seed: int | None, address: str | None, as_json: bool) -> None:
    """Is the set-up sound? Seconds, before anything is launched.

    Tests what the training does, not what its configuration says: weights, parameters that must reach the loss, frozen
    networks, images, the precision of the SSIM, the baseline. STUDY as for `run`. Exit code 3 for a bad set-up.
    """
    from tune_ssim.before_launch.inspection import bad_lines
    from tune_ssim.study.study import load_study

    resolved = load_study(study, {"space": space, "seed": seed})
    report = _measured(resolved, address, "preflight")
    if as_json:
        import json

        _print_exactly(json.dumps(report, indent=2, allow_nan=False) + "\n")
    else:
        from tune_ssim.cli.tables import preflight_table

        console = _console()
        console.print(preflight_table(report, console.options.ascii_only))
    if report["status"] == "bad_setup":
        raise BadSetup("\n".join(bad_lines(report)))
    if resolved.calibrates and report["status"] != "unknown":  # of a process of its own nothing is known before it runs
        say_next("calibrate", *([study] if study else []), why="says how hard each setting pushes", to_stderr=as_json)
    else:
        say_next("run", *([study] if study else []), why="searches it", to_stderr=as_json)


@cli.command()
@study_options
@click.option("--json", "as_json", is_flag=True, help="Everything that was measured and predicted, as one object.")
@click.option("--picture", metavar="FILE", help="Write the heat map there as PNG.  [default: <study>_calibration.png, here]")
def calibrate(
    study: str | None, space: str | None, seed: int | None, address: str | None, as_json: bool, picture: str | None
) -> None:
    """How hard does each setting push? Seconds, with the update switched off.

    Predicts total_norm against the pixel-loss baseline for the whole space, names what is inert and what is deadly, and
    draws a heat map. STUDY as for `run`.
    """
    from tune_ssim.base.files import write_atomically
    from tune_ssim.report.heat_map import draw_heat_map
    from tune_ssim.study.study import load_study

    resolved = load_study(study, {"space": space, "seed": seed})
    target = _output_file(f"{resolved.name}_calibration.png" if picture is None else picture, "--picture")
    calibration = _measured(resolved, address, "calibration")
    if as_json:
        import json

        _print_exactly(json.dumps(calibration, indent=2, allow_nan=False) + "\n")
    else:
        from tune_ssim.cli.tables import calibration_words, gains_table, predictions_table

        console = _console()
        for table in (gains_table, predictions_table):
            console.print(table(calibration, console.options.ascii_only))
        for line in calibration_words(calibration):
            console.print(_readable(line, console), markup=False)
    assert target is not None
    write_atomically(target, draw_heat_map(calibration, resolved.space, resolved.name))
    click.echo(f"wrote {target}", err=as_json)
    say_next("run", *([study] if study else []), why="searches it", to_stderr=as_json)


def _measured(study: Any, address: str | None, phase: str) -> dict[str, Any]:
    """One phase before launch as plain data: in this process, or with a trial's resources on a cluster."""
    from tune_ssim.base.files import jsonable

    wanted = {"preflight": phase == "preflight", "calibration": phase == "calibration", "provenance": False}
    with _console(to_stderr=True).status(f"{phase} of {study.name}"):
        if address is None:
            from tune_ssim.before_launch.inspection import inspect_here

            found = inspect_here(study, **wanted)
        else:
            from tune_ssim.orchestration.run_study import inspect_on

            found = inspect_on(study, address=address, **wanted)
    if phase not in found:
        from tune_ssim.before_launch.inspection import NO_CALIBRATION

        raise UserError(NO_CALIBRATION)
    return dict(jsonable(found[phase]))


@cli.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="A stable list of objects: docs/trials_schema.md.")
@storage_option
def trials(name: str | None, as_json: bool, storage: Path) -> None:
    """List the trials, each with its verdict and why.

    The best come first. NAME: the study; without it the latest.
    """
    from tune_ssim.base.files import jsonable
    from tune_ssim.results.study_folder import find_study

    folder = find_study(storage, name)
    if as_json:
        import json

        from tune_ssim.tracking.mirror import run_ids

        mirrored = run_ids(folder, folder.tracking_uri)
        summaries = [trial.to_dict() | {"run_id": trial.run_id or mirrored.get(trial.trial_id)} for trial in folder.trials()]
        _print_exactly(json.dumps(jsonable(summaries), indent=2, allow_nan=False) + "\n")
    else:
        _show_trials(folder, _console())
    say_next("export", folder.name, why="writes the best safe setting", to_stderr=as_json)


@cli.command()
@click.argument("name", required=False)
@click.option("--format", "form", type=click.Choice(["yaml", "json", "env", "args"]), default="yaml", show_default=True)
@click.option("-o", "--output", metavar="FILE", help="Write there, whole or not at all, instead of to stdout.")
@click.option("--unproven", is_flag=True, help="Also a setting that no confirm phase has confirmed; the file says so.")
@storage_option
def export(name: str | None, form: str, output: str | None, unproven: bool, storage: Path) -> None:
    """Print the best safe setting of a study.

    Only a setting that was `safe`, beat the baseline, and held in the confirm phase with further seeds; never one that
    was ruinous in another trial. If there is none, the exit code is 2 and the reason is said.

    \b
      env    SSIM_LOSS_WEIGHT=… lines, to be sourced by a shell; EXP_NAME is new for every setting
      args   --ssim_loss_weight … in one line, for a torchrun script
      json, yaml   the setting with its verdict, horizon, metrics and proof: `tune-ssim verify` checks it again
    """
    from tune_ssim.base.files import write_atomically
    from tune_ssim.results.export import exported_config, format_export
    from tune_ssim.results.study_folder import find_study
    from tune_ssim.results.winner import best_safe

    target = _output_file(output)
    folder = find_study(storage, name)
    exported = exported_config(best_safe(folder), folder)
    if missing := exported["proof"]["unproven"]:
        words = f"{folder.name}: {exported['trial_id']} is unproven: {'; '.join(missing)}"
        if not unproven:
            raise UserError(f"{words}; `--unproven` exports it all the same and says so in the file")
        click.echo(f"warning: {words}", err=True)
    text = format_export(exported, form)
    if target is None:
        _print_exactly(text)
    else:
        write_atomically(target, text.encode())
        click.echo(f"wrote {target}")
    say_next("ui", folder.name, why="shows what it was chosen from", to_stderr=target is None)


@cli.command()
@click.argument("log")
@click.option(
    "--rules", "packs", multiple=True, metavar="PACK",
    help="A bundled rule pack or a .yaml file; may be repeated.  [default: by the names of the metrics]",
)  # fmt: skip
@click.option("--set", "options", multiple=True, metavar="NAME=NUMBER", help="An option of a rule pack, such as ga=4.")
@click.option("--baseline", metavar="LOG", help="The pixel-loss run's log: its gradient norm is compared with.")
@click.option("--map", "names", multiple=True, metavar="THEIRS=OURS", help="A metric's name in the log and in the rules.")
@click.option("--pattern", multiple=True, metavar="REGEX", help="How a line of a text log is read: docs/logs.md.")
@click.option("--follow", is_flag=True, help="Watch a growing log until Ctrl-C, or until a rule would end the run.")
@click.option("--json", "as_json", is_flag=True, help="A stable object: docs/check_schema.md.")
@click.option("--picture", metavar="FILE", help="Draw the curves, with the alerts marked, as PNG.")
def check(
    log: str,
    packs: tuple[str, ...],
    options: tuple[str, ...],
    baseline: str | None,
    names: tuple[str, ...],
    pattern: tuple[str, ...],
    follow: bool,
    as_json: bool,
    picture: str | None,
) -> None:
    """Is every branch of the loss working? Reads the log of any training.

    LOG: CSV, JSONL, JSON or text, a TensorBoard file or folder, or mlflow:RUN_ID. The guards of a live trial say what
    works, what does not, the likely cause and what to try first. Exit code 3 when there are alerts, or
    a branch does not work.
    """
    from tune_ssim.cli.check_text import alert_words, check_words
    from tune_ssim.cli.log_arguments import open_log, pairs
    from tune_ssim.guards.log_check import baseline_of, check_log

    target = None if picture is None else _output_file(picture, "--picture")
    if target is not None and target.suffix.lower() != ".png":
        raise UserError(f"--picture {picture}: a PNG is written; end the name with .png")
    renamed, console = pairs("--map", names), _console()
    ascii_only = console.options.ascii_only
    compared = None if baseline is None else baseline_of(open_log(baseline, renamed, pattern))
    report = check_log(
        open_log(log, renamed, pattern, follow=follow),
        packs=packs,
        options=pairs("--set", options, float),
        baseline=compared,
        follow=follow,
        on_alert=(lambda alert: console.print(alert_words(alert, ascii_only))) if follow and not as_json else None,
        label=log,
    )
    if as_json:
        import json

        from tune_ssim.base.files import jsonable

        _print_exactly(json.dumps(jsonable(report.to_json()), indent=2, allow_nan=False) + "\n")
    else:
        console.print(check_words(report, ascii_only, with_alerts=not follow))
    if target is not None:
        from tune_ssim.base.files import write_atomically
        from tune_ssim.report.check_picture import draw_check

        write_atomically(target, draw_check(report))
        click.echo(f"wrote {target}", err=as_json)
    elif not as_json:
        say_next("check", log, "--picture", "check.png", why="draws the curves with the alerts marked")
    if report.verdict in ("alerts", "does_not_work"):
        raise click.exceptions.Exit(BAD_SETUP)


@cli.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--address", help="A running Ray cluster (`auto`, HOST:PORT).  [default: a local one]")
@click.option("--json", "as_json", is_flag=True, help="What was found, as one object.")
def verify(file: Path, address: str | None, as_json: bool) -> None:
    """Check an export again: same code, weights, data and setting, and does it still hold?

    FILE: written by `tune-ssim export --format json` or yaml. Compares the hashes in it with what is here, then runs the
    confirmation again. If anything differs the exit code is 3 and every difference is said.
    """
    from tune_ssim.orchestration.verification import read_export, version_notes
    from tune_ssim.orchestration.verification import verify as verify_export

    exported = read_export(file)
    for line in version_notes(exported):
        click.echo(f"note: {line}", err=True)
    found, trials = verify_export(exported, address=address, console=_console(to_stderr=as_json))
    if as_json:
        import json

        from tune_ssim.base.files import jsonable

        report = {"file": str(file), "holds": not found, "differences": found, "trials": [trial.to_dict() for trial in trials]}
        _print_exactly(json.dumps(jsonable(report), indent=2, allow_nan=False) + "\n")
    if found:
        raise BadSetup("\n".join(f"{file}: {line}" for line in found))
    confirmed = ", ".join(trial.trial_id for trial in trials if trial.role == "confirm")
    click.echo(f"{file}: code, weights, data and setting are the ones it was proven with; {confirmed} hold", err=as_json)


@cli.command()
@click.argument("name", required=False)
@click.option("--port", type=click.IntRange(0, 65535), default=5000, show_default=True)
@tracking_option
@storage_option
def ui(name: str | None, port: int, tracking_uri: str | None, storage: Path) -> None:
    """Browse a study in MLflow.

    Prints a link that shows its trials with their verdicts. Listens on 127.0.0.1 only. Ctrl-C ends it.
    """
    from tune_ssim.results.study_folder import find_study
    from tune_ssim.tracking.mlflow_ui import serve_ui

    study: str | None = name
    if tracking_uri is None or name is not None:
        folder = find_study(storage, name)
        study, tracking_uri = folder.name, tracking_uri or folder.tracking_uri
    say_next("export", *([study] if study else []), why="writes the best safe setting", to_stderr=True)
    try:
        serve_ui(storage, tracking_uri, name=study, port=port)
    except KeyboardInterrupt:
        click.echo()  # the way to end it; nothing to resume


@cli.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON: a list, or one object for NAME.")
def spaces(name: str | None, as_json: bool) -> None:
    """List the search spaces, or show one.

    NAME: a bundled space, or the path of a .yaml file; NAME:STAGE shows one stage.
    """
    from tune_ssim.study.space import bundled_spaces, load_space

    found = [load_space(name)] if name else [load_space(bundled) for bundled in bundled_spaces()]
    if as_json:
        import json

        # Everything explicit, as `run --dry-run` has it; always with stages, so that a reader needs one form only.
        data = [
            {
                "name": space.name,
                "description": space.description,
                "stages": [{"name": stage.name, "description": stage.description, **stage.to_yaml()} for stage in space.stages],
            }
            for space in found
        ]
        _print_exactly(json.dumps(data[0] if name else data, indent=2, allow_nan=False) + "\n")
    else:
        from tune_ssim.cli.tables import spaces_table, stages_table

        console = _console()
        ascii_only = console.options.ascii_only
        if name:
            console.print(_readable(found[0].description, console), markup=False)
            console.print(stages_table(found[0], ascii_only))
        else:
            console.print(spaces_table(found, ascii_only))
    if name:
        say_next("run", "--space", name, why="searches it", to_stderr=as_json)
    elif found:
        say_next("spaces", found[0].name, why="shows its ranges", to_stderr=as_json)


@cli.command()
@click.argument("name", required=False)
@tracking_option
@storage_option
def mirror(name: str | None, tracking_uri: str | None, storage: Path) -> None:
    """Write a study into MLflow again.

    For a store that was away while the study ran. Doing it twice changes nothing.
    """
    from tune_ssim.results.study_folder import find_study
    from tune_ssim.tracking.mirror import mirror_study

    folder = find_study(storage, name)
    uri = tracking_uri or folder.tracking_uri
    done, line = mirror_study(folder, uri, progress=lambda text: click.echo(text, err=True))
    if not done:
        raise UserError(f"{folder.name}: {line}")
    click.echo(line)
    say_next("ui", folder.name, *(["--tracking-uri", tracking_uri] if tracking_uri else []), why="browses it")


@cli.group(cls=Verbs)
def quarantine() -> None:
    """Checkpoints of ruined trials: nothing is trained on from them.

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
        import json

        _print_exactly(json.dumps([asdict(entry) for entry in entries], indent=2) + "\n")
        return
    console = _console()
    if not entries:
        console.print("nothing is in quarantine", markup=False)
        return
    from tune_ssim.cli.tables import quarantine_table

    console.print(quarantine_table(entries, console.options.ascii_only))
    say_next("quarantine", "why", entries[-1].id[:12], why="says more; a file or folder may be given too")


@quarantine.command("why")
@click.argument("what", metavar="FILE|FOLDER|ID")
@storage_option
def quarantine_why(what: str, storage: Path) -> None:
    """Say why a file, a checkpoint folder or an id is in quarantine, or that it is not."""
    from tune_ssim.trials.quarantine import Ledger

    if not what.strip():
        raise UserError("quarantine why: give a file, a checkpoint folder or an id")
    ledger, console = Ledger(storage), _console()
    try:
        lines = ledger.why(what)
        refusal = ledger.check(what) if Path(what).exists() else None
    except BadSetup as error:  # here a file that is no checkpoint is a wrong argument
        raise UserError(str(error)) from None
    for line in lines:
        console.print(_readable(f"{line.time}  {line.id[:12]}  {line}", console), markup=False)
    if Path(what).exists():
        console.print(_readable(str(refusal) if refusal else f"{what}: not in quarantine", console), markup=False)


@quarantine.command("release")
@click.argument("id")
@click.option("--reason", required=True, help="Why it may be used after all; kept in the ledger.")
@storage_option
def quarantine_release(id: str, reason: str, storage: Path) -> None:
    """Lift a quarantine, for a reason that is kept."""
    from tune_ssim.trials.quarantine import Ledger

    released = Ledger(storage).release(id, reason)
    click.echo(f"{released.id[:12]} released: {released.reason}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point of the console script."""
    sys.exit(exit_code(sys.argv[1:] if arguments is None else list(arguments)))


def exit_code(arguments: list[str]) -> int:
    """Runs a verb and turns however it ends into a code and at most one line on stderr."""
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
        return _fail(MISTAKE, f"{mistake.format_message()} (see `{where} --help`)")
    except UserError as mistake:
        return _fail(MISTAKE, str(mistake))
    except BadSetup as finding:
        return _fail(BAD_SETUP, f"bad set-up: {finding}")
    except (KeyboardInterrupt, click.Abort):
        return _fail(INTERRUPTED, "interrupted")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return BROKEN_PIPE
        if isinstance(error, OSError) and error.errno in ENVIRONMENT:
            return _fail(MISTAKE, f"{error.filename or 'file system'}: {error.strerror}")
        return _fail(OURS, _bug(error, context.obj if context else None))


def _fail(code: int, message: str) -> int:
    """One line a problem: a study file may have several."""
    for line in filter(None, map(str.strip, message.splitlines())):
        try:
            click.echo("error: " + "".join(letter if letter.isprintable() else " " for letter in line), err=True)
        except BrokenPipeError:
            break
    return code


def _bug(error: Exception, storage: Path | None) -> str:
    text = "".join(traceback.format_exception(error))
    if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
        click.echo(text, err=True)
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]  # Ray puts whole tracebacks into a message
    said = f"a bug of tune-ssim, not of yours: {type(error).__name__}: {shorten(line, 300)}"
    try:
        folder = storage if storage is not None and storage.is_dir() else None
        descriptor, path = tempfile.mkstemp(dir=folder, prefix="tune-ssim-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return f"{said}; {DEBUG_VARIABLE}=1 shows the traceback"
    return f"{said}; traceback in {path}"


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads (`| head`). Then the interpreter must not flush it again at exit."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False
    if gone:
        _discard_stdout()
    return gone


def _discard_stdout() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def say_next(*words: str, why: str, to_stderr: bool = False) -> None:
    """The next useful command, as it can be pasted."""
    context = click.get_current_context()
    if context.get_parameter_source("storage") is click.core.ParameterSource.COMMANDLINE:
        words = (*words, "--storage-path", str(context.params["storage"]))
    click.echo(f"next: tune-ssim {shlex.join(words)}  # {why}", err=to_stderr)


def _say_how_to_resume(storage: Path, started_s: float, resumed: bool) -> None:
    from tune_ssim.results.study_folder import find_study

    try:
        folder = find_study(storage, None)
    except UserError:
        return  # nothing was begun
    if resumed or folder.study_file.stat().st_mtime >= started_s:
        say_next("run", "--resume", "--name", folder.name, why="goes on where it stopped", to_stderr=True)


def _show_trials(folder: StudyFolder, console: Console) -> None:
    from tune_ssim.cli.tables import trials_table
    from tune_ssim.results.trial_text import setting_text
    from tune_ssim.results.winner import NoSafeTrial, best_safe

    summaries = folder.trials()
    if not summaries:
        console.print(f"{folder.name}: no trial has ended yet", markup=False)
        return
    try:
        winner = best_safe(folder).trial_id
    except NoSafeTrial:
        winner = None
    console.print(
        trials_table(
            summaries,
            width=console.width,
            ascii_only=console.options.ascii_only,
            objective=folder.objective,
            winner=winner,
        )
    )
    for skipped in folder.skipped():
        console.print(_readable(f"not launched: {setting_text(skipped.config)}: {skipped.sentence}", console), markup=False)


def _console(outlive_reader: bool = False, to_stderr: bool = False) -> Console:
    """stdout with rich: NO_COLOR is honoured, a pipe gets wide lines, and a letter that the encoding lacks is a `?`.

    When nobody reads the pipe any more, a listing ends; a study goes on in silence (`outlive_reader`).
    """
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            if not outlive_reader:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            _discard_stdout()

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Output(highlight=False, stderr=to_stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Output(highlight=False, stderr=to_stderr, width=200)
    return console


def _readable(text: str, console: Console) -> str:
    from tune_ssim.results.trial_text import readable

    return readable(text, console.options.ascii_only)


def _print_exactly(text: str) -> None:
    """UTF-8 whatever the locale, since a program reads it."""
    stream, rest = sys.stdout.buffer, memoryview(text.encode())
    while rest:
        rest = rest[stream.write(rest) :]  # with PYTHONUNBUFFERED the stream is raw and may take a part only
    stream.flush()


def _output_file(output: str | None, option: str = "--output") -> Path | None:
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
