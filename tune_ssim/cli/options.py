"""Options shared by several verbs, and the group of verbs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tune_ssim.base.errors import UserError

if TYPE_CHECKING:
    from tune_ssim.study.study import Study


class Verbs(click.Group):
    """A group that lists its verbs in order of use and suggests the closest one for a misspelt name."""

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
    context.find_root().obj = path  # the folder for the traceback of a bug
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


def fresh_option(verb: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--fresh", is_flag=True, help="Start a command anew, whatever an earlier preflight or calibrate kept.")(
        verb
    )


def forget_starts(storage: Path, study: str) -> None:
    from tune_ssim.before_launch.command.kept_starts import starts_file

    starts_file(storage, study).unlink(missing_ok=True)


@dataclass(frozen=True)
class ChosenStudy:
    """A study to be inspected before launch, as the command line names it."""

    study: str | None
    storage: Path
    fresh: bool
    space: str | None
    seed: int | None
    address: str | None

    @property
    def arguments(self) -> list[str]:
        """The same study in another command line."""
        options = (("--space", self.space), ("--seed", self.seed), ("--address", self.address))
        given = [word for option, value in options if value is not None for word in (option, str(value))]
        return [*([self.study] if self.study else []), *given]

    def load(self) -> Study:
        from tune_ssim.study.study import load_study

        return load_study(self.study, {"space": self.space, "seed": self.seed})


def study_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments of preflight, calibrate and recommend. The verb gets them as one `ChosenStudy`."""

    @wraps(verb)
    def with_chosen(**arguments: Any) -> Any:
        chosen = ChosenStudy(**{field.name: arguments.pop(field.name) for field in fields(ChosenStudy)})
        return verb(chosen, **arguments)

    options = (
        click.option("--address", help="Measure on a running Ray cluster, with a trial's resources.  [default: here]"),
        click.option("--seed", type=click.IntRange(min=0), help="Seed of the search."),
        click.option("--space", help="A search space by name, name:stage or path, in place of the study's."),
        fresh_option,
        storage_option,
        click.argument("study", required=False),
    )
    decorated: Callable[..., Any] = with_chosen
    for option in options:
        decorated = option(decorated)
    return decorated
