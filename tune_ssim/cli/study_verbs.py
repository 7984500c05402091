"""Verbs of a study: run, trials, export, verify, ui, mirror."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tune_ssim.base.errors import BadSetup, StudyInterrupted, UserError
from tune_ssim.cli.exit_codes import UNDECIDED
from tune_ssim.cli.options import forget_starts, fresh_option, storage_option, tracking_option
from tune_ssim.cli.output import make_console, output_file, print_exactly, print_json, print_line, suggest_next

if TYPE_CHECKING:
    from rich.console import Console

    from tune_ssim.results.study_folder import StudyFolder

MAX_ROWS = 50  # of the table after `run`


@click.command()
@click.argument("study", required=False)
@click.option("--space", help="A search space by name, name:stage or path, in place of the study's.")
@click.option("--trials", type=click.IntRange(min=1), help="Trials of the search, without the baselines.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the search.")
@click.option("--name", help="The study's name: its folder and its MLflow run.  [default: as in the study file]")
@storage_option
@tracking_option
@click.option("--address", help="A running Ray cluster (`auto`, HOST:PORT).  [default: a local one for this study]")
@click.option("--in-process", is_flag=True, help="Without Ray, trial by trial in this process: breakpoint() works.")
@click.option("--resume", is_flag=True, help="Go on with a study; without STUDY and --name, with the latest.")
@click.option("--resume-if-started", is_flag=True, help="--resume if the study was started, else start it: for batch systems.")
@fresh_option
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
    in_process: bool,
    resume: bool,
    resume_if_started: bool,
    fresh: bool,
    dry_run: bool,
) -> None:
    """Tune: baseline, search, prune what ruins the model.

    STUDY is a study file or the name of a bundled one. Without it: the bundled fundus study. A name that is taken gets
    a suffix, unless --resume. If no setting is safe and better than the baseline, the exit code is 2 and the reason is printed.
    """
    from tune_ssim.results.study_folder import StudyFolder, find_study
    from tune_ssim.study.study import load_study

    if in_process and address is not None:
        raise UserError("--in-process and --address cannot be given together")
    source: str | Path | None = study
    if resume and study is None:
        folder = find_study(storage, name)
        source, name = folder.study_file, folder.name
    overrides = {"space": space, "trials": trials, "seed": seed, "name": name, "tracking_uri": tracking_uri}
    resolved = load_study(source, overrides, launch=address is None)  # the nodes of a cluster may have other programs
    resume = resume or (resume_if_started and StudyFolder(storage / (name or resolved.name)).study_file.exists())
    if dry_run:
        print_exactly(resolved.to_yaml())
        for warning in resolved.warnings:
            click.echo(f"warning: {warning}", err=True)
        given = [(f"--{key.replace('_', '-')}", str(value)) for key, value in overrides.items() if value is not None]
        suggest_next(
            "run",
            *([study] if study else []),
            *(word for pair in given for word in pair),
            why="starts it",
            to_stderr=True,
        )
        return

    from tune_ssim.cli.launch import run as run_study
    from tune_ssim.results.proof import proof_of
    from tune_ssim.results.trial_text import proof_line
    from tune_ssim.results.winner import NoSafeTrial, best_safe

    if fresh:
        forget_starts(storage, resolved.name)
    console = make_console(outlive_reader=True)
    try:
        folder = run_study(
            resolved,
            storage=storage,
            name=name,
            address=address,
            in_process=in_process,
            resume=resume,
            tracking_uri=tracking_uri,
            console=console,
        )
    except StudyInterrupted as stop:
        suggest_next("run", "--resume", "--name", stop.study, why="goes on where it stopped", to_stderr=True)
        raise
    _show_trials(folder, console, most=MAX_ROWS)
    try:
        best = best_safe(folder)
    except NoSafeTrial:
        suggest_next("trials", folder.name, why="shows every reason")
        _report_failures(folder)
        raise
    proof = proof_of(best, folder)
    print_line(f"best safe: {best.trial_id}: {best.reason}", console)
    print_line(proof_line(proof), console)
    option = ["--unproven"] if proof["unproven"] else []
    suggest_next("export", folder.name, "--format", "env", *option, why="prints it for a training script")
    suggest_next("ui", folder.name, why="browses the study in MLflow")
    if not _report_failures(folder):
        click.get_current_context().exit(UNDECIDED)


def _report_failures(folder: StudyFolder) -> bool:
    """Prints a line about trials that failed, if there are any. Returns whether all were judged."""
    from tune_ssim.guards.verdict import Verdict

    trials = folder.trials()
    if died := [trial.trial_id for trial in trials if trial.is_repeated_on_resume]:
        count = "1 trial has" if len(died) == 1 else f"{len(died)} trials have"
        again = f"`tune-ssim run --resume --name {folder.name}` tries again"
        click.echo(f"{count} no verdict, since the process died ({', '.join(died)}): {again}", err=True)
        return False
    if failed := [trial.trial_id for trial in trials if trial.verdict is Verdict.ERROR]:
        count = "1 trial" if len(failed) == 1 else f"{len(failed)} trials"
        click.echo(f"{count} ended with an error ({', '.join(failed)}): `tune-ssim trials {folder.name}` shows it", err=True)
    return True


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="A stable list of objects: docs/trials_schema.md.")
@storage_option
def trials(name: str | None, as_json: bool, storage: Path) -> None:
    """List the trials, each with its verdict and why.

    The best come first. NAME: the study; without it the latest.
    """
    from tune_ssim.results.study_folder import find_study

    folder = find_study(storage, name)
    if as_json:
        from tune_ssim.results.pareto import pareto_front
        from tune_ssim.tracking.mirror import run_ids

        mirrored = run_ids(folder, folder.tracking_uri)
        found, objective = folder.trials(), folder.objective
        front = pareto_front(found, objective)
        print_json(
            [
                trial.to_dict()
                | {"run_id": trial.run_id or mirrored.get(trial.trial_id)}
                | ({"pareto_front": trial in front} if objective.also else {})
                for trial in found
            ]
        )
    else:
        _show_trials(folder, make_console())
    suggest_next("export", folder.name, why="writes the best safe setting", to_stderr=as_json)


@click.command()
@click.argument("name", required=False)
@click.option("--format", "form", type=click.Choice(["yaml", "json", "env", "args"]), default="yaml", show_default=True)
@click.option("-o", "--output", metavar="FILE", help="Write to this file (never half of it) instead of stdout.")
@click.option(
    "--trial", "trial_id", metavar="TRIAL", help="This trial's setting instead of the best, e.g. another of the Pareto front."
)
@click.option("--unproven", is_flag=True, help="Also export a setting that no confirm phase has confirmed; the file says so.")
@storage_option
def export(name: str | None, form: str, output: str | None, trial_id: str | None, unproven: bool, storage: Path) -> None:
    """Print the best safe setting of a study.

    Only a setting that was `safe`, beat the baseline, and held in the confirm phase with further seeds; never one that
    was ruinous in another trial. If there is none, the exit code is 2 and the reason is printed.

    \b
      env    SSIM_LOSS_WEIGHT=… lines, to be sourced by a shell; EXP_NAME is new for every setting
      args   --ssim_loss_weight … in one line, for a torchrun script
      json, yaml   the setting with its verdict, horizon, metrics and proof: `tune-ssim verify` checks it again
    """
    from tune_ssim.base.files import write_atomically
    from tune_ssim.results.export import exported_config, format_export
    from tune_ssim.results.study_folder import find_study
    from tune_ssim.results.winner import best_safe, chosen

    target = output_file(output)
    folder = find_study(storage, name)
    exported = exported_config(best_safe(folder) if trial_id is None else chosen(folder, trial_id), folder)
    if missing := exported["proof"]["unproven"]:
        words = f"{folder.name}: {exported['trial_id']} is unproven: {'; '.join(missing)}"
        if not unproven:
            raise UserError(f"{words}; `--unproven` exports it all the same and says so in the file")
        click.echo(f"warning: {words}", err=True)
    text = format_export(exported, form)
    if target is None:
        print_exactly(text)
    else:
        write_atomically(target, text.encode())
        click.echo(f"wrote {target}")
    suggest_next("ui", folder.name, why="shows what it was chosen from", to_stderr=target is None)


@click.command()
@click.argument("name", required=False)
@click.option("-o", "--output", metavar="FILE", help="Write to this file.  [default: report.html in the study's folder]")
@click.option("--follow", is_flag=True, help="Write it again every few seconds until the study ends; the page reloads itself.")
@storage_option
def report(name: str | None, output: str | None, follow: bool, storage: Path) -> None:
    """Write a study as one HTML page: the setting to use, its proof, every trial, samples.

    The page needs no network and no server. It is also made at the end of every `run`, and logged to MLflow.
    """
    from tune_ssim.base.extras import require
    from tune_ssim.report.study_page import follow_study, write_page
    from tune_ssim.results.study_folder import find_study

    for library in ("jinja2", "matplotlib", "PIL"):
        require(library)
    target, folder = output_file(output), find_study(storage, name)
    path = follow_study(folder, target) if follow else write_page(folder, target)
    click.echo(f"wrote {path}")
    suggest_next("trials", folder.name, why="lists the same trials here")


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--address", help="A running Ray cluster (`auto`, HOST:PORT).  [default: a local one]")
@click.option(
    "--storage-path",
    "storage",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="TUNE_SSIM_STORAGE",
    help="For the files of the trials; with --address every node must reach it.  [default: $TUNE_SSIM_STORAGE, else temporary]",
)
@click.option("--in-process", is_flag=True, help="Without Ray, trial by trial in this process.")
@click.option("--json", "as_json", is_flag=True, help="What was found, as one object.")
def verify(file: Path, address: str | None, storage: Path | None, in_process: bool, as_json: bool) -> None:
    """Check an export again: same code, weights, data and setting, and does it still hold?

    FILE: written by `tune-ssim export --format json` or yaml. Compares the hashes in it with what is here, then runs the
    confirmation again. If anything differs, the exit code is 3 and every difference is printed.
    """
    from tune_ssim.cli.live_table import LiveTable
    from tune_ssim.guards.verdict import Role
    from tune_ssim.orchestration.verification import verify as verify_export
    from tune_ssim.results.verification import read_export, version_notes

    exported = read_export(file)
    left_out = [f"not covered: {phrase}" for phrase in exported["proof"].get("not_covered") or ()]
    for line in (*version_notes(exported), *left_out):
        click.echo(f"note: {line}", err=True)
    with LiveTable(None, make_console(to_stderr=as_json)) as table:
        found, trials = verify_export(
            exported,
            address=address,
            storage=storage and storage.absolute(),
            in_process=in_process,
            progress=table,
        )
    if as_json:
        report = {"file": str(file), "holds": not found, "differences": found, "trials": [trial.to_dict() for trial in trials]}
        print_json(report)
    if found:
        raise BadSetup("\n".join(f"{file}: {line}" for line in found))
    confirmed = ", ".join(trial.trial_id for trial in trials if trial.role is Role.CONFIRM)
    click.echo(f"{file}: code, weights, data and setting are the ones it was proven with; {confirmed} hold", err=as_json)


@click.command()
@click.argument("name", required=False)
@click.option("--port", type=click.IntRange(0, 65535), default=5000, show_default=True)
@tracking_option
@storage_option
def ui(name: str | None, port: int, tracking_uri: str | None, storage: Path) -> None:
    """Browse a study in MLflow.

    Prints a link that shows its trials with their verdicts. Listens on 127.0.0.1 only. Ctrl-C ends it.
    """
    from tune_ssim.base.extras import require
    from tune_ssim.results.study_folder import find_study
    from tune_ssim.tracking.mlflow_ui import serve_ui

    require("mlflow")
    study: str | None = name
    if tracking_uri is None or name is not None:
        folder = find_study(storage, name)
        study, tracking_uri = folder.name, tracking_uri or folder.tracking_uri
    suggest_next("export", *([study] if study else []), why="writes the best safe setting", to_stderr=True)
    try:
        serve_ui(storage, tracking_uri, name=study, port=port)
    except KeyboardInterrupt:
        click.echo()  # Ctrl-C ends it normally


@click.command()
@click.argument("name", required=False)
@tracking_option
@storage_option
def mirror(name: str | None, tracking_uri: str | None, storage: Path) -> None:
    """Write a study into MLflow again.

    For a store that could not be reached while the study ran. Doing it twice changes nothing.
    """
    from tune_ssim.base.extras import require
    from tune_ssim.results.study_folder import find_study
    from tune_ssim.tracking.mirror import mirror_study

    require("mlflow")
    folder = find_study(storage, name)
    uri = tracking_uri or folder.tracking_uri
    shown = ""

    def show(text: str) -> None:
        nonlocal shown
        if text != shown:
            click.echo(text, err=True)
        shown = text

    done, line = mirror_study(folder, uri, progress=show)
    if not done:
        raise UserError(f"{folder.name}: {line}")
    click.echo(line)
    suggest_next("ui", folder.name, *(["--tracking-uri", tracking_uri] if tracking_uri else []), why="browses it")


def _show_trials(folder: StudyFolder, console: Console, most: int | None = None) -> None:
    """The table of trials and what else is to be known of them. most: rows, best first; None shows all."""
    from tune_ssim.cli.tables import FRONT, trials_table
    from tune_ssim.results.events import end_of, ended_trials
    from tune_ssim.results.pareto import pareto_front
    from tune_ssim.results.trial_text import format_setting, metric_label, warning_lines
    from tune_ssim.results.winner import NoSafeTrial, best_safe

    summaries = folder.trials()
    stopped = f"; it was {end}" if (end := end_of(folder)).startswith("interrupted") else ""
    if not summaries:
        if lost := ended_trials(folder):
            raise UserError(
                f"{folder.trials_file}: lacks {len(lost)} trials that ended, by {folder.events_file.name}; "
                f"`tune-ssim run --resume --name {folder.name}` restores them"
            )
        print_line(f"{folder.name}: no trial has ended yet{stopped}", console)
        return
    try:
        winner = best_safe(folder).trial_id
    except NoSafeTrial:
        winner = None
    objective = folder.objective
    front = [summary.trial_id for summary in pareto_front(summaries, objective)]
    console.print(
        trials_table(
            summaries,
            width=console.width,
            ascii_only=console.options.ascii_only,
            objective=objective,
            winner=winner,
            front=front,
            most=most,
        )
    )
    if most is not None and len(summaries) > most:
        print_line(f"the best {most} of {len(summaries)}; `tune-ssim trials {folder.name}` shows all", console)
    if front:
        names = ", ".join(metric_label(goal.name) for goal in objective.goals)
        print_line(f"{FRONT} Pareto front of {names}: {', '.join(front)}", console)
    for line in warning_lines(summaries):
        print_line(f"warning: {line}", console)
    for skipped in folder.skipped():
        print_line(f"not launched: {format_setting(skipped.config)}: {skipped.sentence}", console)
    if stopped:
        print_line(f"{folder.name}{stopped}".replace("; it", ""), console)
