"""Follows a text file that may grow, be truncated, or be replaced by a new file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tune_ssim.records import Record
from tune_ssim.records.readers.parser import LineParser
from tune_ssim.records.readers.reader import Source

CHUNK_BYTES = 1024 * 1024  # bytes per read; only the records of one chunk are in memory
TAIL_BYTES = 64  # the last bytes read are compared again before the next read, to detect a rewritten file

WAS_REPLACED = "the log was replaced while it was read: repeated steps are skipped"
WAS_REWRITTEN = "the log was rewritten while it was read: repeated steps are skipped"


class LineFile(Source):
    """Follows `path`, which need not exist yet."""

    def __init__(self, path: Path, parser: LineParser) -> None:
        super().__init__(parser.rows)
        self.path = path
        self._parser = parser
        self._file: io.FileIO | None = None
        self._offset = 0  # read so far
        self._identity: list[int] | None = None  # device and inode
        self._tail = b""  # the last bytes before the offset

    def finish(self) -> list[Record]:
        return [*self.read(), *self._parser.finish()]

    def batches(self) -> Iterator[Sequence[Record]]:
        try:
            for data in self._new_bytes():
                yield from self._parser.feed_batches(data)
        except OSError as error:
            self.issues.note(f"{self.path}: {error.strerror or error}")
            self._close()

    def _new_bytes(self) -> Iterator[bytes]:
        if not self._open():
            return
        self._restart_if_rewritten()
        yield from self._read_to_end()
        if self._was_replaced():  # by now the old file has been read to its end
            self._close()
            if self._open():
                self._begin_anew(WAS_REPLACED)
                yield from self._read_to_end()

    def _open(self) -> bool:
        """False if there is no file (yet)."""
        if self._file is not None:
            return True
        try:
            self._file = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            return False
        status = os.fstat(self._file.fileno())
        identity = [status.st_dev, status.st_ino]
        if self._identity not in (None, identity):
            self._begin_anew(WAS_REPLACED)
        self._identity = identity
        return True

    def _read_to_end(self) -> Iterator[bytes]:
        """Reads up to the current end of the file, so that it ends even if the log grows as fast as it is read."""
        assert self._file is not None
        end = os.fstat(self._file.fileno()).st_size
        self._file.seek(self._offset)
        while self._offset < end:
            data = self._file.read(min(CHUNK_BYTES, end - self._offset))
            if not data:
                return
            self._offset += len(data)
            self._tail = (self._tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]
            yield data

    def _restart_if_rewritten(self) -> None:
        assert self._file is not None
        self._file.seek(self._offset - len(self._tail))
        if self._file.read(len(self._tail)) != self._tail:
            self._begin_anew(WAS_REWRITTEN)

    def _was_replaced(self) -> bool:
        try:
            status = self.path.stat()
        except FileNotFoundError:  # moved away, with no new file yet
            return False
        return [status.st_dev, status.st_ino] != self._identity

    def _begin_anew(self, reason: str) -> None:
        self._offset, self._tail = 0, b""
        self._parser.begin_anew(reason)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._close()
