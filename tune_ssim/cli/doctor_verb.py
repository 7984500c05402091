"""The verb that examines a cluster."""

from __future__ import annotations

from pathlib import Path

import click

from tune_ssim.base.errors import BadSetup
from tune_ssim.cli.options import storage_option, tracking_option
from tune_ssim.cli.output import make_console, print_json, print_line


@click.command()
@click.argument("study", required=False)
@click.option("--address", default="auto", show_default=True, help="A running Ray cluster (`auto`, HOST:PORT).")
@storage_option
@tracking_option
@click.option("--json", "as_json", is_flag=True, help="The findings and what every node reported, as one object.")
def doctor(study: str | None, address: str, storage: Path, tracking_uri: str | None, as_json: bool) -> None:
    """What is wrong with a Ray cluster and its storage? Seconds; one small task on every node.

    Versions and code that differ between nodes, storage that is not shared, clocks, GPUs that torch cannot use, authentication,
    disk, the tracking server. STUDY as for `run`: its resources and its code are checked too. `run` does the same before it starts
    on a cluster. Exit code 3 for a problem, 0 with warnings only.
    """
    from tune_ssim.orchestration.doctor import Finding, examine
    from tune_ssim.study.study import load_study

    resolved = load_study(study, {}, launch=False)
    uri = tracking_uri or (resolved.tracking.uri if resolved.tracking is not None else None)
    report = examine(resolved, address, storage, uri)
    findings = [Finding(**one) for one in report["findings"]]
    problems = [one.sentence for one in findings if one.level == "problem"]
    if as_json:
        print_json(report)
    else:
        console = make_console()
        for one in findings:
            if one.level == "warning":
                print_line(f"warning: {one.sentence}", console)
        if not problems:
            count = len(report["nodes"])
            print_line(f"{count} {'node is' if count == 1 else 'nodes are'} fit for a study", console)
    if problems:
        raise BadSetup("\n".join(problems))
