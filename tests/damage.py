"""What a file may hold instead of what this package wrote, and what every command must then do about it.

`damaged` is a Hypothesis strategy of mutations of a real file; `at_place` puts something else than a file in its place.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from small_studies import SMALL

from tune_ssim.base.yaml_source import parse_yaml
from tune_ssim.cli.app import exit_code
from tune_ssim.orchestration.phases import run_study
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.study import Study, load_study

LIMIT_S = 60  # far longer than any command here takes; a hang is longer
MARK = "\x01here\x01"

# Tokens in place of a JSON value, also such that no JSON has.
TOKENS = (
    "null", "true", "-1", "0", "1.5", "1e999", "NaN", "-Infinity", "9" * 400, "9" * 5000, '""', '"7"', '"NaN"', '"safe"',
    '"../../x"', '"\\u0000"', '"\\ud800"', '"' + "x" * 2000 + '"', "[]", "{}", "[[]]", '[1, "a"]', '{"a": 1}', '{"a": 1, "a": 2}',
    "[" * 60 + "]" * 60, "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, "?", "",
)  # fmt: skip
WHOLE = (
    b"", b"\n", b"\0" * 64, b"{}", b"[]", b"null", b"3", b'"text"', b"plain words\n", b"\x89PNG\r\n\x1a\n\0\0", b"PK\x03\x04",
    b"\xff\xfe\x00\xd8", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"a: &a [*a]\n", b"<html><body>404</body></html>",
    b"version https://git-lfs.github.com/spec/v1\n", b"- 1\n- 2\n", b"%PDF-1.4\n", b"x,y\n1,2\n",
    b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)),
)  # fmt: skip


class Content(bytes):
    """Bytes with a short name, since Hypothesis formats the arguments of a strategy."""

    def __repr__(self) -> str:
        return f"{len(self)} bytes"


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """`original` with one or two faults in it."""
    kinds = [_whole, _cut, _bytes, _encoding, _lines, _value, _value, _value, _value]
    found = draw(st.sampled_from(kinds))(draw, original)
    return found if draw(st.integers(0, 3)) else draw(st.sampled_from(kinds))(draw, found)


def _whole(draw: st.DrawFn, original: bytes) -> bytes:
    return draw(st.sampled_from(WHOLE) | st.binary(max_size=40))


def _cut(draw: st.DrawFn, original: bytes) -> bytes:
    end = draw(st.integers(0, len(original)))
    return original[:end] if draw(st.booleans()) else original[end:]


def _bytes(draw: st.DrawFn, original: bytes) -> bytes:
    start = draw(st.integers(0, len(original)))
    end = min(len(original), start + draw(st.integers(0, 20)))
    return original[:start] + draw(st.binary(max_size=8) | st.sampled_from([b"\0", b"\n", b'"', b"{", b"}", b","])) + original[end:]


def _encoding(draw: st.DrawFn, original: bytes) -> bytes:
    text = original.decode("utf-8", "replace")
    encoding = draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "cp037"]))
    if encoding == "cp037":
        return text.encode("cp037", "replace")
    return text.encode(encoding, "replace") if draw(st.booleans()) else original.replace(b"\n", b"\r\n")


def _lines(draw: st.DrawFn, original: bytes) -> bytes:
    lines = original.splitlines(keepends=True) or [b""]
    at, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
    action = draw(st.sampled_from(["remove", "double", "swap", "foreign"]))
    if action == "remove":
        del lines[at]
    elif action == "double":
        lines.insert(other, lines[at])
    elif action == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines.insert(at, draw(st.sampled_from(WHOLE)).split(b"\n")[0] + b"\n")
    return b"".join(lines)


def _value(draw: st.DrawFn, original: bytes) -> bytes:
    """A value of a JSON or YAML document, or of one line of JSON, becomes another one, or its key does."""
    documents = _documents(original)
    if not documents:
        return _bytes(draw, original)
    at = draw(st.integers(0, len(documents) - 1))
    start, end, value = documents[at]
    value = json.loads(json.dumps(value))
    holders = [(holder, key) for holder, key in _places(value) if draw(st.integers(0, 2)) or holder is value] or [*_places(value)]
    if not holders:
        return _whole(draw, original)
    holder, key = draw(st.sampled_from(holders))
    action = draw(st.sampled_from(["replace", "replace", "replace", "text", "remove", "rename", "twice", "more"]))
    token = draw(st.sampled_from(TOKENS))
    if action == "text":
        token = json.dumps(str(holder[key]))
    if action == "remove":
        del holder[key]
    elif isinstance(holder, dict) and action == "rename":
        holder[str(key) + "x"] = holder.pop(key)
    elif isinstance(holder, dict) and action == "more":
        holder["further"] = MARK
    elif isinstance(holder, dict) and action == "twice":
        holder[str(key) + MARK] = holder[key]
    else:
        holder[key] = MARK
    text = json.dumps(value, indent=1 if b"\n" in original[start:end] else None)
    marked = json.dumps(MARK)
    text = text.replace(marked, token).replace(marked[1:], '"')
    return original[:start] + text.encode() + original[end:]


def _documents(original: bytes) -> list[tuple[int, int, Any]]:
    """(start, end, value) of the document, or of each line that is one."""
    with contextlib.suppress(ValueError, RecursionError):
        return [(0, len(original), json.loads(original))]
    found, start = [], 0
    for line in original.splitlines(keepends=True):
        with contextlib.suppress(ValueError, RecursionError):
            found.append((start, start + len(line.rstrip(b"\r\n")), json.loads(line)))
        start += len(line)
    if not found:
        with contextlib.suppress(ValueError, RecursionError):
            found = [(0, len(original), parse_yaml(original, "any").value)]
    return [one for one in found if isinstance(one[2], (dict, list))]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


# ---- something else than a file


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(120 * 1024 * 1024)


def _socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{folder}/{path.name}")  # the name of a socket is at most 107 bytes long
    finally:
        os.close(folder)


LARGE = "120 MB of zeros"
PLACES: dict[str, Callable[[Path], Any]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "dangling link": lambda path: path.symlink_to(path.with_name("absent")),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "socket": _socket,
    LARGE: _sparse,
}


# ---- commands


@dataclass(frozen=True)
class Ran:
    """How a command ended in this process."""

    code: int
    stdout: str
    stderr: str

    @property
    def problem(self) -> str:
        """What no file may cause; empty if it did not happen."""
        for words in ("a bug of tune-ssim", "Traceback (most recent"):
            if words in self.stderr or words in self.stdout:
                return self.stderr
        return "" if self.code in (0, 2, 3, 4) else f"exit code {self.code}: {self.stderr}"


class Hangs(BaseException):
    pass


def command(*arguments: str) -> Ran:
    """Runs a command in this process. Raises Hangs."""

    def stop(*_: object) -> None:
        raise Hangs(" ".join(arguments))

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = exit_code(list(arguments))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Ran(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))  # type: ignore[attr-defined]


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    """As if Matplotlib were not installed: a page takes seconds."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "matplotlib"}
    for name in before:
        del sys.modules[name]
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["matplotlib"]
        sys.modules.update(before)


@dataclass
class Template:
    """A finished study, and copies of it to be damaged."""

    root: Path
    study: Study
    folder: StudyFolder
    n_copies: int = field(default=0)

    @classmethod
    def make(cls, root: Path) -> Template:
        changes = {
            "calibration": {"batches": 12},
            "preflight": {},
            "task_config": {"steps": 20},
            "search": {"trials": 3, "seed": 0, "concurrency": 2},
            "confirm": {"finalists": 1, "seeds": 2, "steps": 30},
            "guards": {"smoke_test": {"at": [0, 10]}},
        }
        study = load_study({**SMALL, **changes})
        with without_pictures():
            folder = run_study(study, storage=root / "template", in_process=True)
        shutil.rmtree(folder.path / "images")
        return cls(root, study, folder)

    @contextlib.contextmanager
    def copy(self) -> Iterator[StudyFolder]:
        self.n_copies += 1
        storage = self.root / f"copy{self.n_copies}"
        shutil.copytree(self.folder.path.parent, storage, symlinks=True)
        try:
            yield StudyFolder(storage / self.folder.name)
        finally:
            shutil.rmtree(storage)


def resumed(folder: StudyFolder, arguments: Sequence[str] = ()) -> Ran:
    with without_pictures():
        return command("run", "--resume", "--in-process", "--storage-path", str(folder.path.parent), *arguments)
