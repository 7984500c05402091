"""Verbs that inspect a study before launch: preflight, calibrate, recommend, spaces."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tune_ssim.base.errors import BadSetup
from tune_ssim.cli.options import ChosenStudy, forget_starts, study_options
from tune_ssim.cli.output import make_console, output_file, print_json, print_line, suggest_next

if TYPE_CHECKING:
    from tune_ssim.study.study import Study


@click.command()
@study_options
@click.option(
    "--steps", type=click.IntRange(min=2), metavar="N", help="Of each start of a command.  [default: those of the calibration]"
)
@click.option("--json", "as_json", is_flag=True, help="Every check with its evidence, as one object.")
def preflight(chosen: ChosenStudy, steps: int | None, as_json: bool) -> None:
    """Is the set-up sound? Seconds, before anything is launched; for a command, a few of its start-ups.

    Tests what the training does, not what its configuration says: weights, parameters that must reach the loss, frozen
    networks, images, the precision of the SSIM, the baseline. STUDY as for `run`. Exit code 3 for a bad set-up.
    """
    from tune_ssim.before_launch.inspection import bad_lines

    study = chosen.load()
    report = _inspect(study, chosen, "preflight", steps)
    if as_json:
        print_json(report)
    else:
        from tune_ssim.cli.tables import preflight_table

        console = make_console()
        console.print(preflight_table(report, console.options.ascii_only))
    if report["status"] == "bad_setup":
        raise BadSetup("\n".join(bad_lines(report)))
    if study.calibrates:
        suggest_next("calibrate", *chosen.arguments, why="says how hard each setting pushes", to_stderr=as_json)
    else:
        suggest_next("run", *chosen.arguments, why="searches it", to_stderr=as_json)


@click.command()
@study_options
@click.option("--json", "as_json", is_flag=True, help="Everything that was measured and predicted, as one object.")
@click.option("--picture", metavar="FILE", help="Write the heat map there as PNG.  [default: <study>_calibration.png, here]")
def calibrate(chosen: ChosenStudy, as_json: bool, picture: str | None) -> None:
    """How hard does each setting push? Seconds, with the update switched off.

    Predicts total_norm against the pixel-loss baseline for the whole space, names settings that have no effect and settings
    that would be pruned, and draws a heat map. STUDY as for `run`.
    """
    from tune_ssim.base.files import write_atomically
    from tune_ssim.report.heat_map import draw_heat_map

    study = chosen.load()
    target = output_file(f"{study.name}_calibration.png" if picture is None else picture, "--picture")
    calibration = _inspect(study, chosen, "calibration")
    if as_json:
        print_json(calibration)
    else:
        from tune_ssim.cli.tables import calibration_sentences, gains_table, predictions_table

        console = make_console()
        for table in (gains_table, predictions_table):
            console.print(table(calibration, console.options.ascii_only))
        for line in calibration_sentences(calibration):
            print_line(line, console)
    assert target is not None
    write_atomically(target, draw_heat_map(calibration, study.space, study.name))
    click.echo(f"wrote {target}", err=as_json)
    suggest_next("run", *chosen.arguments, why="searches it", to_stderr=as_json)


@click.command()
@study_options
@click.option("--json", "as_json", is_flag=True, help="The setting and its prediction, as one object.")
def recommend(chosen: ChosenStudy, as_json: bool) -> None:
    """A setting to start from, by the calibration alone: no trial is run, and nothing is proven.

    It is the first one that a guided search tries: at the space's largest ssim_loss_max_t, the gain whose predicted norm is
    twice the baseline's. STUDY as for `run`.
    """
    from tune_ssim.base.errors import UserError
    from tune_ssim.orchestration.before_launch import recommended
    from tune_ssim.results.trial_text import format_setting

    study = chosen.load()
    if study.strategy != "guided":
        raise UserError(
            f"{study.name}: a recommendation needs calibration, a space of one stage with a `gain`, and search.strategy: guided"
        )
    settings, prediction = recommended(study, _inspect(study, chosen, "calibration"))
    if as_json:
        print_json({"study": study.name, "settings": settings, "prediction": asdict(prediction), "proven": False})
    else:
        console = make_console()
        print_line(f"{format_setting(settings)}: predicted norm ratio {prediction.ratio:.3g}", console)
        evidence = "with five recorded trainings such a setting had 0.95 of the best in the median, and harmed one"
        print_line(f"not tried: {evidence} (docs/search.md)", console)
    suggest_next("run", *chosen.arguments, why="tries it and its neighbours", to_stderr=as_json)


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON: a list, or one object for NAME.")
def spaces(name: str | None, as_json: bool) -> None:
    """List the search spaces, or show one.

    NAME: a bundled space, or the path of a .yaml file; NAME:STAGE shows one stage.
    """
    from tune_ssim.study.space import bundled_spaces, load_space

    found = [load_space(name)] if name else [load_space(bundled) for bundled in bundled_spaces()]
    if as_json:
        # All defaults explicit, as in `run --dry-run`; always with stages, so that programs read one format.
        data = [
            {
                "name": space.name,
                "description": space.description,
                "stages": [{"name": stage.name, "description": stage.description, **stage.to_yaml()} for stage in space.stages],
            }
            for space in found
        ]
        print_json(data[0] if name else data)
    else:
        from tune_ssim.cli.tables import spaces_table, stages_table

        console = make_console()
        ascii_only = console.options.ascii_only
        if name:
            print_line(found[0].description, console)
            console.print(stages_table(found[0], ascii_only))
        else:
            console.print(spaces_table(found, ascii_only))
    if name:
        suggest_next("run", "--space", name, why="searches it", to_stderr=as_json)
    elif found:
        suggest_next("spaces", found[0].name, why="shows its ranges", to_stderr=as_json)


def _inspect(study: Study, chosen: ChosenStudy, phase: str, steps: int | None = None) -> dict[str, Any]:
    """The result of preflight or calibration as plain data, measured here or on a cluster with a trial's resources."""
    from tune_ssim.base.files import jsonable
    from tune_ssim.before_launch.command.kept_starts import starts_file

    wanted: dict[str, Any] = {"preflight": phase == "preflight", "calibration": phase == "calibration", "provenance": False}
    if chosen.fresh:
        forget_starts(chosen.storage, study.name)
    console = make_console(to_stderr=True)
    wanted |= {
        "steps": steps,
        "kept": starts_file(chosen.storage, study.name),
        "say": lambda line: print_line(line, console),
    }
    with console.status(f"{phase} of {study.name}"):
        if chosen.address is None:
            from tune_ssim.before_launch.inspection import inspect_here

            found = inspect_here(study, **wanted)
        else:
            from tune_ssim.orchestration.phases import inspect_on

            found = inspect_on(study, address=chosen.address, **wanted)
    return dict(jsonable(found[phase]))
