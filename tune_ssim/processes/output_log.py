"""What a command printed, kept on disk within bounds."""

from __future__ import annotations

import re
from pathlib import Path

PART_BYTES = 32 * 2**20  # of one file; three are kept, so that a command that prints for ever does not fill the disk
ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class OutputLog:
    """Appends to `path`. What came first stays in `path.first`, the latest is in `path` and before it `path.1`; `dropped` bytes
    are between them."""

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
        """The last lines that say something, as text that a terminal can show."""
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
