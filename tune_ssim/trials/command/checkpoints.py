"""The checkpoints that a command writes, found by the path that the study gives."""

from __future__ import annotations

import glob
import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tune_ssim.study.command_spec import as_word

ANY_STEP = "\0"  # placeholder for a step in a path


def newest_checkpoint(template: str, fields: Mapping[str, Any], place: Callable[[str], Path], step: int) -> Path | None:
    """The matching path with the highest step not above `step`."""
    found = checkpoints(template, fields, place)
    return found[max(upto)] if (upto := [at for at in found if at <= step]) else None


def checkpoints(template: str, fields: Mapping[str, Any], place: Callable[[str], Path]) -> dict[int, Path]:
    """The paths that match the template, by step."""
    pieces = []
    for literal, name, form, _ in string.Formatter().parse(template):
        pieces.append(literal)
        if name is not None:
            pieces.append(ANY_STEP if name == "step" else format(as_word(fields[name]), form or ""))
    parts = str(place("".join(pieces))).split(ANY_STEP)
    expression = re.compile(r"0*(\d+)".join(re.escape(part) for part in parts))
    found: dict[int, Path] = {}
    for path in sorted(glob.glob("*".join(glob.escape(part) for part in parts))):  # noqa: PTH207  (Path.glob takes no absolute pattern)
        if match := expression.fullmatch(path):
            found[int(match[1])] = Path(path)
    return found


def sizes(path: Path) -> list[tuple[str, int, int]]:
    """(file, bytes, modification time in ns) for each file of a checkpoint. These change while it is being written."""
    found = []
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        try:
            status = file.stat()
        except OSError:  # moved meanwhile
            continue
        found.append((str(file), status.st_size, status.st_mtime_ns))
    return found
