"""The checkpoints that a command writes, found by the path that the study gives."""

from __future__ import annotations

import glob
import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tune_ssim.study.command_spec import as_word

STEP, ANY_FOLDERS, ANY = "\0", "\1", "\2"  # stand for `{step}`, `**/` and `*` in a filled path
GLOBS = {STEP: "*", ANY_FOLDERS: "**/", ANY: "*"}
EXPRESSIONS = {STEP: r"0*(\d+)", ANY_FOLDERS: "(?:.*/)?", ANY: "[^/]*"}


class Checkpoints:
    """The paths that match a template, e.g. `{exp_dir}/{step:07d}/*.safetensors`. Without `{step}` it is one checkpoint, which the
    command overwrites: the newest."""

    def __init__(self, template: str, fields: Mapping[str, Any], beside: Callable[[str], Path]) -> None:
        """fields: values for the template. beside: a path as written → its place."""
        filled = ""
        for literal, name, form, _ in string.Formatter().parse(template):
            filled += literal.replace("**/", ANY_FOLDERS).replace("*", ANY)
            if name is not None:
                filled += STEP if name == "step" else format(as_word(fields[name]), form or "")
        parts = re.split(f"([{STEP}{ANY_FOLDERS}{ANY}])", str(beside(filled)))
        self._glob = "".join(GLOBS.get(part, glob.escape(part)) for part in parts)
        self._expression = re.compile("".join(EXPRESSIONS.get(part, re.escape(part)) for part in parts))
        self.has_step = STEP in parts

    def found(self, newest_step: int) -> list[tuple[int, Path]]:
        """(step, path) of every checkpoint, oldest first. newest_step: the step of one that is overwritten."""
        found = []
        for path in map(Path, glob.glob(self._glob, recursive=True)):  # noqa: PTH207  (Path.glob takes no absolute pattern)
            if match := self._expression.fullmatch(str(path)):
                found.append((int(match[1]) if self.has_step else newest_step, path))
        return sorted(found, key=lambda one: (one[0], _age(one[1]), one[1]))

    def newest(self, step: int) -> Path | None:
        """The newest checkpoint that is not beyond `step`."""
        return next((path for at, path in reversed(self.found(step)) if at <= step), None)


def _age(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # moved meanwhile
        return 0


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
