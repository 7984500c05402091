"""Verbs of a study on a distant cluster, over Ray Jobs: submit, status, logs, stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tune_ssim.base.errors import UserError
from tune_ssim.cli.output import print_json, suggest_next

if TYPE_CHECKING:
    from tune_ssim.orchestration.submitted import SubmittedStudies


def cluster_option(verb: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--address",
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        default="http://127.0.0.1:8265",
        show_default=True,
        help="The dashboard of the cluster's head; $RAY_API_SERVER_ADDRESS.",
    )(verb)


@click.command()
@click.argument("study")
@click.option("--name", help="The study's name.  [default: as in the study file]")
@click.option("--storage-path", "folder", metavar="FOLDER", required=True, help="A folder that all nodes of the cluster see.")
@cluster_option
def submit(study: str, name: str | None, folder: str, address: str) -> None:
    """Run a study on a distant cluster, without a terminal.

    Sends the study, its code, and the settings that it names. Data and weights are not sent: the cluster finds them by the paths in
    the study. A study that was started in this storage goes on. Over the network, reach the dashboard by a tunnel:
    `ssh -L 8265:127.0.0.1:8265 HEAD`.
    """
    from tune_ssim.study.study import load_study

    resolved = load_study(study, {"name": name})
    job = _submitted(address).submit(resolved, folder)
    click.echo(f"submitted {resolved.name} as {job}")
    suggest_next("logs", job, "--follow", "--address", address, why="shows its output until it ends; it goes on without you")


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="A list of objects: id, study, status, message, storage, started, ended.")
@cluster_option
def status(name: str | None, as_json: bool, address: str) -> None:
    """Say how submitted studies are doing.

    NAME: a study or a job's id; without it all of them, the latest first.
    """
    submitted = _submitted(address)
    jobs = submitted.jobs() if name is None else [submitted.find(name)]
    if as_json:
        print_json([asdict(job) for job in jobs])
        return
    for job in jobs:
        message = f"  {job.message}" if job.status == "FAILED" else ""
        click.echo(f"{job.id}  {job.status.lower()}  since {job.ended or job.started}{message}")
    if not jobs:
        click.echo("no study was submitted to this cluster")


@click.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on until the study ends. Ctrl-C ends this, not the study.")
@cluster_option
def logs(name: str | None, follow: bool, address: str) -> None:
    """Print the output of a submitted study.

    NAME: a study or a job's id; without it the latest.
    """
    submitted = _submitted(address)
    job = submitted.find(name)
    submitted.logs(job, follow, lambda text: click.echo(text, nl=False))
    if (now := submitted.find(job.id)).status == "FAILED":
        raise UserError(f"{job.id}: {now.message}")


@click.command()
@click.argument("name", required=False)
@cluster_option
def stop(name: str | None, address: str) -> None:
    """Stop a submitted study.

    It ends as with Ctrl-C. Submitted again with the same name and storage, it goes on. NAME: a study or a job's id; without it the
    latest.
    """
    submitted = _submitted(address)
    job = submitted.find(name)
    click.echo(f"{job.id}: {'stopping' if submitted.stop(job) else f'had ended already ({job.status.lower()})'}")


def _submitted(address: str) -> SubmittedStudies:
    from tune_ssim.orchestration.submitted import SubmittedStudies

    return SubmittedStudies(address)
