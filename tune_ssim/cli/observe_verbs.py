"""The verb `observe`, which runs any program and records what its optimiser does."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from tune_ssim.base.errors import UserError
from tune_ssim.cli.output import output_file, suggest_next

POLL_S = 0.5  # between looks at the events; a person reads the file afterwards


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-o", "--out", default="observed.jsonl", show_default=True, metavar="FILE", help="Records, one JSON object a line.")
@click.option("--full", is_flag=True, help="Norm and coverage of every top-level module too.")
@click.option("--hold", is_flag=True, help="Hold the updates off: the program runs, its weights stay as they are.")
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="End the program after N optimiser steps.")
@click.option(
    "--weights",
    multiple=True,
    metavar="FILE",
    help="A checkpoint that the weights should equal before the first update; may be repeated.",
)
def observe(command: tuple[str, ...], out: str, full: bool, hold: bool, steps: int | None, weights: tuple[str, ...]) -> None:
    """Run a PyTorch program unchanged and record its gradient norms.

    COMMAND after `--`: tune-ssim observe -- torchrun --nproc_per_node=2 train.py. Nothing in the program changes, and its numbers
    stay the same. Losses that it prints in a known form are recorded too. The exit code is the program's.
    """
    from tune_ssim.base.files import write_atomically
    from tune_ssim.probes.observer import EventReader, observed_environment
    from tune_ssim.records import Record, merge
    from tune_ssim.records.readers import LineParser
    from tune_ssim.trials.command.observed import ObservedRecords
    from tune_ssim.trials.command.output import PrintedRecords
    from tune_ssim.trials.processes import SupervisedProcess

    target = output_file(out, "--out")
    if target is None:
        raise UserError("--out -: the program's own output goes there; name a file")
    for file in weights:
        if not Path(file).exists():
            raise UserError(f"--weights {file}: no such file")
    if shutil.which(command[0]) is None:
        raise UserError(f"observe: no program {command[0]!r} in the PATH")
    with tempfile.TemporaryDirectory(prefix="tune-ssim-observe-") as folder:
        extra = observed_environment(Path(folder), os.environ, level="full" if full else "norms", hold=hold, weights=weights)
        reader, printed = EventReader(Path(folder)), PrintedRecords(LineParser())
        observed, rows = ObservedRecords(reader, {}), []

        def take(data: bytes) -> None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            printed.feed(data)

        def add(found: list[Record], final: bool = False) -> None:
            rows.extend(observed.merge([(one.step, dict(one.values)) for one in found], is_alone=False, final=final))

        process = SupervisedProcess(list(command), take, environment={**os.environ, **extra}, cwd=None)
        try:
            while not process.wait(POLL_S):
                add(printed.read())
                if steps is not None and reader.observation.steps >= steps:
                    break
        finally:
            process.stop()
        add(printed.finish(), final=True)
    records = merge(Record(step, values) for step, values in rows)
    lines = [json.dumps({"step": one.step, **one.values}) for one in records[:steps]]
    write_atomically(target, "".join(f"{line}\n" for line in lines).encode())
    seen = reader.observation
    click.echo(seen.sentence(), err=True)
    for line in [*observed.remarks(), *weights_lines(seen.weights)]:
        click.echo(line, err=True)
    if lines:
        click.echo(f"wrote {target}: {len(lines)} records", err=True)
        suggest_next("check", str(target), why="judges them", to_stderr=True)
    if process.exit_code and (steps is None or seen.steps < steps):
        raise click.exceptions.Exit(process.exit_code if process.exit_code > 0 else 128 - process.exit_code)


def weights_lines(weights: list[Any]) -> list[str]:
    """One line for each module: how much of it trains, and how it compares with the files that were opened or named."""
    found = []
    for module in weights:
        line = f"{module['module']}: {module['trainable']} of {module['tensors']} tensors are trained"
        for file in module["files"]:
            name = Path(file["path"]).name
            line += f"; {file['equal']} of {file['of']} equal {name}"
            if file["missing"]:
                line += f", {file['missing']} are not in it ({', '.join(file['missing_names'][:3])})"
        if module["in_no_file"] and module["files"]:
            line += f"; {module['in_no_file']} come from no file ({', '.join(module['in_no_file_names'][:3])})"
        found.append(line)
    return found
