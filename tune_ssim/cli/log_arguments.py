"""Arguments of `tune-ssim check`: the log, and `name=value` options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.records.readers import Source, open_source
from tune_ssim.records.readers.source import MLFLOW


def open_log(log: str, names: Mapping[str, str], pattern: Sequence[str] = (), *, follow: bool = False) -> Source:
    """A file, a folder or `mlflow:RUN_ID`. Raises UserError for a file that does not exist, unless it is followed."""
    if log.startswith(MLFLOW):
        from tune_ssim.tracking.mlflow_source import open_run

        return open_run(log, names=names)
    if not follow and not _exists(Path(log)):
        raise UserError(f"{log}: no such file")
    return open_source(log, names=names, pattern=list(pattern) or None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long or contains a NUL
        return False


def pairs(option: str, given: Iterable[str], kind: Callable[[str], Any] = str) -> dict[str, Any]:
    """`name=value` arguments of a command-line option. Raises UserError."""
    found: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.rpartition("=")
        try:
            if not (name and sign and value):
                raise ValueError
            found[name] = kind(value)
        except ValueError:
            number = " with a number" if kind is float else ""
            raise UserError(f"{option}: must be name=value{number}, got {text!r}") from None
    return found
