"""The verb `check`, which reads the log of any training."""

from __future__ import annotations

import click

from tune_ssim.base.errors import UserError
from tune_ssim.base.extras import require
from tune_ssim.cli.exit_codes import BAD_SETUP, DONE, UNDECIDED
from tune_ssim.cli.output import make_console, output_file, print_json, suggest_next


@click.command()
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
@click.option("--exit-zero", is_flag=True, help="Exit code 0 whatever is found; 2 for a log that cannot be read.")
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
    exit_zero: bool,
    picture: str | None,
) -> None:
    """Is every branch of the loss working? Reads the log of any training.

    LOG: CSV, JSONL, JSON or text, a TensorBoard file or folder, or mlflow:RUN_ID. The guards of a live trial say what
    works, what does not, the likely cause and what to try first. The first line is the answer. Exit code 0: healthy;
    3: there are alerts, or a branch does not work; 4: unknown.
    """
    from tune_ssim.cli.check_text import format_alert, format_answer, format_check
    from tune_ssim.cli.log_arguments import open_log, pairs
    from tune_ssim.guards.baseline_log import baseline_of_source
    from tune_ssim.guards.log_check import check_log

    target = None if picture is None else output_file(picture, "--picture")
    if target is not None and target.suffix.lower() != ".png":
        raise UserError(f"--picture {picture}: a PNG is written; end the name with .png")
    if target is not None:
        require("matplotlib")  # checked before the log is read
    renamed, console = pairs("--map", names), make_console()
    ascii_only = console.options.ascii_only
    compared = None if baseline is None else baseline_of_source(open_log(baseline, renamed, pattern), f"--baseline {baseline}")
    report = check_log(
        open_log(log, renamed, pattern, follow=follow),
        packs=packs,
        options=pairs("--set", options, float),
        baseline=compared,
        follow=follow,
        on_alert=(lambda alert: console.print(format_alert(alert, ascii_only))) if follow and not as_json else None,
        label=log,
    )
    if as_json:
        print_json(report.to_json())
    else:
        console.print(format_answer(report, ascii_only), soft_wrap=True)  # one line, for programs that read the first one
        console.print(format_check(report, ascii_only, with_alerts=not follow))
    if target is not None:
        from tune_ssim.base.files import write_atomically
        from tune_ssim.report.check_picture import draw_check

        write_atomically(target, draw_check(report))
        click.echo(f"wrote {target}", err=as_json)
    elif not as_json:
        suggest_next("check", log, "--picture", "check.png", why="draws the curves with the alerts marked")
    code = {"healthy": DONE, "unknown": UNDECIDED}.get(report.verdict, BAD_SETUP)
    if code != DONE and not exit_zero:
        raise click.exceptions.Exit(code)
