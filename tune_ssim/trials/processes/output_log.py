"""The output of a command, kept in files of bounded size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

PART_BYTES = 32 * 2**20  # size of one file; three are kept, so endless output does not fill the disk
ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


QUOTED_FROM = 60  # number of last lines searched for a traceback: a launcher may print more after it
QUOTE_LINES, QUOTE_CHARACTERS, QUOTE_WIDTH = 5, 400, 200
FRAME = re.compile(r"\s*(Traceback \(most recent call last\)|File \".*\", line \d+)")
RAISED = re.compile(r"[A-Za-z_][\w.]*(: |$)")  # `ValueError: the data is gone`, at the beginning of a line
MARKS = re.compile(r"[\s^~|+-]+")  # caret lines of a traceback, and horizontal rules


def quote_of(lines: Sequence[str]) -> str:
    """The last lines joined into at most QUOTE_CHARACTERS. The exception of a Python traceback comes first."""
    lines = [" ".join(line.split())[:QUOTE_WIDTH] if not line[:1].isspace() else line for line in lines if line.strip()]
    frames = [at for at, line in enumerate(lines) if FRAME.match(line)]
    raised = next((at for at in range(frames[-1] + 1, len(lines)) if RAISED.match(lines[at])), None) if frames else None
    first = [] if raised is None else [lines[raised].strip()]
    rest = [line.strip()[:QUOTE_WIDTH] for at, line in enumerate(lines) if at != raised and not MARKS.fullmatch(line)]
    kept: list[str] = []
    room = QUOTE_CHARACTERS - sum(map(len, first))
    for line in reversed(rest[-(QUOTE_LINES - len(first)) :]):
        room -= len(line) + 3
        if room < 0:
            break
        kept.insert(0, line)
    return " | ".join([*first, *kept])


class OutputLog:
    """Appends to `path`. The beginning stays in `path.first`, the latest output is in `path`, preceded by `path.1`; `dropped` bytes
    are missing between them."""

    def __init__(self, path: Path, part_bytes: int = PART_BYTES) -> None:
        self.path, self.part_bytes = path, part_bytes
        self.dropped = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._size = path.stat().st_size

    @property
    def first(self) -> Path:
        return self.path.with_name(self.path.name + ".first")

    @property
    def before(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def write(self, data: bytes) -> None:
        if self._size and self._size + len(data) > self.part_bytes:
            self._rotate()
        self._file.write(data)
        self._size += len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def last_lines(self, count: int = 5, width: int = 300) -> list[str]:
        """The last non-empty lines, as text that a terminal can show."""
        self._file.flush()
        text = b""
        for path in (self.before, self.path):
            if path.exists():
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - 64 * 1024))
                    text += file.read()
        plain = ANSI.sub("", text.decode(errors="replace")).replace("\r", "\n")
        lines = [
            "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line.rstrip()) for line in plain.split("\n")
        ]
        return [line[:width] for line in lines if line.strip()][-count:]

    def quote(self) -> str:
        """See `quote_of`; empty if nothing was printed."""
        return quote_of(self.last_lines(QUOTED_FROM))

    def _rotate(self) -> None:
        self._file.close()
        if not self.first.exists():
            self.path.rename(self.first)
        else:
            if self.before.exists():
                self.dropped += self.before.stat().st_size
            self.path.rename(self.before)
        self._file = self.path.open("ab")
        self._size = 0
