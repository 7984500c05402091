"""TensorBoard event files: TFRecord frames with one event each.

A frame: length (8 bytes, little-endian), masked CRC-32C of the length (4), the event, its masked CRC-32C (4).
https://www.tensorflow.org/tutorials/load_data/tfrecord

This is our own reader because `check` must install without extras: `tensorboard` alone adds nine packages and 150 MB. Its
EventFileLoader also stops at the first damaged frame, where this one skips and counts.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from tune_ssim.base.errors import UserError
from tune_ssim.records import Record
from tune_ssim.records.readers.protobuf import scalars
from tune_ssim.records.readers.reader import Source
from tune_ssim.records.readers.rows import Rows

CHUNK_BYTES = 256 * 1024
MAX_EVENT_BYTES = 64 * 1024 * 1024  # a longer event (images, a graph) is skipped unread
HEADER, FOOTER = 12, 4  # bytes of a frame before and after its event
NONZERO = re.compile(rb"[^\0]")
FILE_NAME = re.compile(r"tfevents\.(\d+)")


class EventFiles(Source):
    """The scalars of an event file, or of all event files in a folder, ordered by the timestamps in their names.

    A resumed run has several files. Files may grow and new files may appear. Events with a wrong checksum are skipped;
    after a broken frame, reading continues at the next valid one."""

    def __init__(self, path: Path, names: Mapping[str, str] | None = None) -> None:
        super().__init__(Rows(names))
        self.issues.unit = "event"
        self.path = path
        self._offsets: dict[str, int] = {}  # file name → bytes read so far

    def finish(self) -> list[Record]:
        records = super().finish()
        for file in self._files():
            rest = file.stat().st_size - self._offsets.get(file.name, 0)
            if rest > 0:
                self.issues.note(f"{file.name}: the last {rest} bytes are not a complete event")
        return records

    def batches(self) -> Iterator[list[Record]]:
        try:
            for file in self._files():
                yield from self._read(file)
        except OSError as error:
            self.issues.note(f"{error.filename or self.path}: {error.strerror or error}")

    def _files(self) -> list[Path]:
        if self.path.is_dir():
            return find_event_files(self.path) or [file for run in runs_inside(self.path) for file in find_event_files(run)]
        return [self.path] if self.path.exists() else []

    def _read(self, path: Path) -> Iterator[list[Record]]:
        size, offset = path.stat().st_size, self._offsets.get(path.name, 0)
        if size < offset:
            offset = self._offsets[path.name] = 0
            self.rows.steps.begin_anew()
            self.issues.note(f"{path.name} was truncated while it was read: repeated steps are skipped")
        if size == offset:
            return
        with path.open("rb") as file:
            while offset < size:
                file.seek(offset)
                used = self._take_frames(file, size - offset)
                offset += used
                self._offsets[path.name] = offset
                yield self.rows.steps.take()
                if not used:
                    return

    def _take_frames(self, file: BinaryIO, available: int) -> int:
        """Takes the events of the next chunk. Returns the number of bytes consumed; 0 if there is no complete frame yet."""
        data = file.read(min(CHUNK_BYTES, available))
        at = 0
        while at + HEADER <= len(data):
            length = frame_length(data, at)
            if length is None:
                found = next_frame(data, at + 1)
                if found is None and (at or len(data) == available):
                    return at  # a gap that may still be filled
                found = found or len(data) - HEADER + 1
                self._skip(f"{found - at} bytes are not an event")
                at = found
                continue
            frame = HEADER + length + FOOTER
            if at + frame > len(data):
                if at or frame > available:
                    return at
                if length > MAX_EVENT_BYTES:
                    self._skip(f"an event of {length // 2**20} MiB")
                    return frame
                data += file.read(frame - len(data))
                continue
            self._take_event(data[at + HEADER : at + HEADER + length], data[at + frame - FOOTER : at + frame])
            at += frame
        return at

    def _take_event(self, event: bytes, checksum: bytes) -> None:
        self.issues.lines += 1
        try:
            step, found = scalars(event)
        except ValueError as error:
            self.issues.skip(self.issues.lines, "", f"not an event ({error})")
            return
        if not found:
            return
        # Check the checksum only of events with scalars: images are large and never used.
        if struct.unpack("<I", checksum)[0] != masked_crc32c(event):
            self.issues.skip(self.issues.lines, found[0][0], "its checksum is wrong")
            return
        values = {self.rows.names[tag]: value for tag, value in found}
        self.rows.add(step, values, self.issues.lines, found[0][0])

    def _skip(self, reason: str) -> None:
        self.issues.lines += 1
        self.issues.skip(self.issues.lines, "", reason)


def find_event_files(folder: Path) -> list[Path]:
    """The event files directly in a folder, ordered by the timestamps in their names."""
    found = [file for file in folder.iterdir() if FILE_NAME.search(file.name) and file.is_file()]
    return sorted(found, key=lambda file: (int(FILE_NAME.search(file.name)[1]), file.name))  # type: ignore[index]


def runs_inside(folder: Path) -> list[Path]:
    return sorted({file.parent for file in folder.rglob("*tfevents.*") if file.is_file()})


def require_one_run(folder: Path) -> None:
    """Raises UserError unless `folder` has exactly one run: event files directly in it, or in one subfolder."""
    if find_event_files(folder):
        return
    inside = runs_inside(folder)
    if len(inside) > 1:
        shown = ", ".join(str(run.relative_to(folder)) for run in inside[:8])
        raise UserError(f"{folder}: {len(inside)} TensorBoard runs; name one of them: {shown}")
    if not inside:
        raise UserError(f"{folder}: a folder without TensorBoard event files; give a log file, or a folder with files *tfevents*")


def is_event_file(start: bytes) -> bool:
    """Whether a file with these first bytes consists of TFRecord frames."""
    return len(start) >= HEADER and frame_length(start, 0) is not None


def frame_length(data: bytes, at: int) -> int | None:
    """Length of the event in the frame that starts at `at`; None if no valid frame starts there."""
    length, checksum = struct.unpack_from("<QI", data, at)
    return length if checksum == _length_checksum(length) else None


def next_frame(data: bytes, at: int) -> int | None:
    """Offset of the next valid frame at or after `at`; None if there is none."""
    while at + HEADER <= len(data):
        # Events are shorter than 4 GiB, which is cheaper to check than a checksum.
        if data[at + 4 : at + 8] == b"\0\0\0\0":
            if frame_length(data, at) is not None:
                return at
            nonzero = NONZERO.search(data, at)  # a run of zeros may be long
            at = max(at, nonzero.start() - 4 if nonzero else len(data))
        at += 1
    return None


@functools.lru_cache(maxsize=4096)
def _length_checksum(length: int) -> int:
    return masked_crc32c(struct.pack("<Q", length))


def masked_crc32c(data: bytes) -> int:
    checksum, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        checksum = table[(checksum ^ byte) & 255] ^ (checksum >> 8)
    checksum ^= 0xFFFFFFFF
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _crc_table() -> list[int]:
    """CRC-32C (Castagnoli) of each byte, reflected polynomial 0x82F63B78, RFC 3720 appendix B.4."""
    table = list(range(256))
    for _ in range(8):
        table = [(value >> 1) ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table
