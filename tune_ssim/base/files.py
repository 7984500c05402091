"""Atomic file writes, JSON Lines, and names that are safe as file names."""

from __future__ import annotations

import errno
import itertools
import json
import math
import numbers
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tune_ssim.base.errors import UserError

# Far larger than any JSON document or line that this package writes. Quickly rejects a file that was passed by mistake.
MAX_JSON_BYTES = 64 * 1024 * 1024


def write_atomically(path: Path, data: bytes) -> None:
    """Writes the file atomically: even after kill -9 it has either the old or the complete new content."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:  # name the target file in the error, not the temporary one
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


def describe_disk(path: Path) -> str:
    """The disk of a folder: where it is mounted, and how much of it is free."""
    place = next((one for one in (path, *path.parents) if one.is_mount()), path)
    usage = shutil.disk_usage(place)
    return f"the disk at {place}, {usage.free / 1e6:,.0f} of {usage.total / 1e6:,.0f} MB free"


def check_name(name: str) -> str:
    """The name, if it is valid as a folder name and a run name. Raises UserError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        rule = "letters, digits, '.', '_' and '-' only, at most 100, beginning with a letter or digit"
        raise UserError(f"name {name!r}: {rule}")
    return name


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Appends one JSON line in a single write, so a reader sees a partial line only after a machine crash."""
    line = json.dumps(jsonable(value), allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        _require_regular(descriptor, path)
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if end and os.pread(descriptor, 1, end - 1) != b"\n":
            line = b"\n" + line  # the previous line is truncated: start a new one
        written = os.write(descriptor, line)
        if written < len(line):  # the disk is full: report it; readers skip the truncated line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading. Raises FileNotFoundError if there is none, UserError if it is not a regular file: reading a pipe or
    a device may never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        if not path.is_symlink():
            raise
        raise UserError(f"{path}: a link to {path.readlink()}, which does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        _require_regular(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _require_regular(descriptor: int, path: Path) -> None:
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
        raise UserError(f"{path}: is {kind}, not a file")


def read_whole(path: Path, max_bytes: int = MAX_JSON_BYTES, kind: str = "a JSON document") -> bytes:
    """The content of a file. Raises like `open_regular`, and UserError if it cannot be read or is larger than `max_bytes`. kind: of
    file, for the message."""
    with open_regular(path) as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > max_bytes:
        raise UserError(f"{path}: is larger than {max_bytes // 1024} KiB, too large for {kind}")
    return content


T = TypeVar("T")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in a file. See `parse_lines` for errors and truncated lines."""
    return parse_lines(path, dict)


def parse_lines(path: Path, parse: Callable[[dict[str, Any]], T], containing: str = "") -> Iterator[T]:
    """Applies `parse` to every JSON object in a file; yields nothing if the file does not exist.

    containing: parse only lines that contain this JSON text. Truncated lines are skipped, because they come from a writer
    that was killed. Raises UserError with the line number for any other line that is not a JSON object, and if `parse`
    raises ValueError, KeyError or TypeError."""
    wanted = containing.encode()
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        for number in itertools.count(1):
            where = f"{path}:{number}"
            try:
                line = file.readline(MAX_JSON_BYTES)
            except OSError as error:
                raise UserError(f"{where}: cannot be read: {error.strerror or error}") from None
            if not line:
                return
            if len(line) == MAX_JSON_BYTES:
                raise UserError(f"{where}: not a JSON object: the line is longer than {MAX_JSON_BYTES // 1024**2} MiB")
            line = line.strip(b" \t\r\n\0")  # some file systems leave zeros after a power failure
            if line and wanted in line and (value := _load(line, where)) is not None:
                yield _parsed(value, parse, where)


def parse_json(path: Path, parse: Callable[[dict[str, Any]], T]) -> T | None:
    """Applies `parse` to the JSON object in a file; None if the file does not exist. Raises UserError like `parse_lines`."""
    try:
        text = read_whole(path)
    except FileNotFoundError:
        return None
    value = _load(text, str(path))
    if value is None:
        raise UserError(f"{path}: its end is missing")
    return _parsed(value, parse, str(path))


def _load(text: bytes, where: str) -> dict[str, Any] | None:
    """The JSON object in `text`; None if it is truncated."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeated_keys)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            if error.doc.startswith("{") and _is_truncated(error):
                return None
            if error.lineno > 1:
                where = f"{where}:{error.lineno}"
        raise UserError(f"{where}: not JSON ({error}): {_beginning(text)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object: {_beginning(text)}")
    return value


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return found


def _is_truncated(error: json.JSONDecodeError) -> bool:
    """Whether the text ends at the error, or within the value that starts there."""
    is_start_of_value = re.fullmatch(r"[-+.\w]*|\\?u?[0-9a-fA-F]{0,4}", error.doc[error.pos :])
    return error.msg.startswith("Unterminated string") or is_start_of_value is not None


def _parsed(value: dict[str, Any], parse: Callable[[dict[str, Any]], T], where: str) -> T:
    try:
        return parse(value)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        problem = f"{error.args[0]} is missing" if isinstance(error, KeyError) else "; ".join(str(error).splitlines())
        raise UserError(f"{where}: {problem}") from None


def _beginning(text: bytes) -> str:
    words = text[:80].decode("utf-8", "replace")
    return repr(words) if len(text) <= 80 else f"{words!r}…"


def jsonable(value: Any) -> Any:
    """`value` as plain JSON. Tuples become lists; NaN, Inf and -Inf become "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)):  # includes NumPy scalars
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Path):
        return str(value)
    return value


def number(value: Any) -> float:
    """The number that `jsonable` wrote, including "NaN" and "Infinity"."""
    return float(value)
