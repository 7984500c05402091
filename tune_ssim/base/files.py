"""Files that are never half written, JSON lines, and names that can be files."""

from __future__ import annotations

import errno
import json
import math
import numbers
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """The file is either as before or complete, also after kill -9."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:  # said of the file that was meant, not of the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_name(name: str) -> str:
    """A study's name becomes a folder and a run name; raises UserError if it cannot."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        rule = "letters, digits, '.', '_' and '-' only, at most 100, beginning with a letter or digit"
        raise UserError(f"name {name!r}: {rule}")
    return name


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """One JSON line in one write, so that a reader never sees half of it unless the machine stopped in between."""
    line = json.dumps(jsonable(value), allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if end and os.pread(descriptor, 1, end - 1) != b"\n":
            line = b"\n" + line  # the line before was torn: keep this one whole
        written = os.write(descriptor, line)
        if written < len(line):  # the disk is full: the caller must know, and the torn line is passed over by readers
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a file, if there is one; a torn line (kill -9 in the middle of a write) is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def jsonable(value: Any) -> Any:
    """Plain JSON: tuples become lists; NaN, Inf and -Inf become the strings "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)):  # NumPy's scalars are such
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Path):
        return str(value)
    return value


def number(value: Any) -> float:
    """The inverse for numbers: float("Infinity") and float("NaN") read what `jsonable` wrote."""
    return float(value)
