"""The `Source` protocol for logs, and the choice of a source for a path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tune_ssim.base.errors import UserError
from tune_ssim.records import Record
from tune_ssim.records.readers.event_files import HEADER, EventFiles, event_files, is_event_file, require_one_run
from tune_ssim.records.readers.json_file import JsonFile, holds_document
from tune_ssim.records.readers.line_file import LineFile
from tune_ssim.records.readers.parse_issues import ParseIssues
from tune_ssim.records.readers.parser import LINE_FORMATS, LineParser

FORMATS = ("jsonl", "json", "csv", "tensorboard", "text")
START_BYTES = 1024 * 1024  # enough to tell a JSON document from lines
PIECE = 16 * 1024
FIRST_ROW_BYTES = 8 * 1024 * 1024  # the first row must appear within this many bytes; a large model may be printed before it
MLFLOW = ("mlflow:", "runs:/")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


class Source(Protocol):
    """The records of a log that may still be growing. Steps only increase over the lifetime of a source."""

    @property
    def issues(self) -> ParseIssues: ...

    def read(self) -> list[Record]:
        """Complete records since the last call. The file need not exist yet. Never raises for bad content."""

    def finish(self) -> list[Record]:
        """All remaining records, including an unterminated last line and the pending step."""

    def held(self) -> int | None:
        """The pending step, which is held back because more rows of it may come; None if there is none."""

    def release(self) -> list[Record]:
        """Releases the pending step. Later rows of it become another record of the same step."""

    def batches(self) -> Iterator[Sequence[Record]]:
        """The records of `read`, in batches of bounded size."""


def open_source(
    path: str | Path,
    *,
    format: str | None = None,
    names: Mapping[str, str] | None = None,
    pattern: str | Sequence[str] | None = None,
) -> Source:
    """A source that reads `path` from its beginning.

    `format`: one of FORMATS; None: detected from the content once there is some. `names`: metric names in the log → ours;
    ours may be `step`. `pattern`: a built-in pattern, or regular expressions with a group `step`, see docs/logs.md.
    Raises UserError for invalid arguments, an unknown format, a compressed file, or a folder without exactly one TensorBoard
    run. The path need not exist yet."""
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise UserError(f"format: must be one of {', '.join(FORMATS)}; got {format!r}")
    if pattern is not None and format is None:
        format = "text"
    LineParser(format=format if format in LINE_FORMATS else None, names=names, pattern=pattern)  # validates the arguments
    if pattern is not None and format != "text":
        raise UserError(f"pattern: goes with format text, not with {format}")
    if str(path).startswith(MLFLOW):
        raise UserError(f"{path}: a run in MLflow is opened by tune_ssim.tracking.mlflow_source.open_run")
    return _of_kind(_kind(path, format, names), path, format, names, pattern)


def _of_kind(
    kind: str, path: Path, format: str | None, names: Mapping[str, str] | None, pattern: str | Sequence[str] | None
) -> Source:
    if kind == "tensorboard":
        return EventFiles(path, names)
    if kind == "json":
        return JsonFile(path, names)
    if kind == "lines":
        lines = LineParser(format=format if format in LINE_FORMATS else None, names=names, pattern=pattern, file_name=path.name)
        return LineFile(path, lines)
    return NotThereYet(path, names)


def _kind(path: Path, format: str | None, names: Mapping[str, str] | None) -> str:
    """`lines`, `json`, `tensorboard`, or `unknown` if the log is still empty. Raises UserError."""
    try:
        if path.is_dir():
            if format not in (None, "tensorboard"):
                raise UserError(f"{path}: a folder; {format} is a format of files")
            if format is None:
                require_one_run(path)
            return "tensorboard"
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: neither a file nor a folder; feed what comes from a pipe to a LineParser")
        start = _beginning(path, START_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{path}: compressed ({name}); unpack it first")
    if format is not None:
        return format if format in ("tensorboard", "json") else "lines"
    if not start:
        return "unknown"
    if is_event_file(start):
        return "tensorboard"
    if path.name == "trainer_state.json" or holds_document(start):
        return "json"
    looking = LineParser(names=names, file_name=path.name)
    data = start if len(start) < START_BYTES else _beginning(path, FIRST_ROW_BYTES)
    for begin in range(0, len(data), PIECE):
        looking.feed(data[begin : begin + PIECE])
        if looking.format is not None:
            return "lines"
    looking.finish()
    if looking.format is None:
        if not start.strip() or not (b"\n" in data or b"\r" in data):  # the log has just started
            return "unknown"
        raise UserError(f"{path}: {'; '.join(looking.issues.notes)}; valid formats: {', '.join(FORMATS)}")
    return "lines"


def _beginning(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file; empty if it does not exist."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except FileNotFoundError:
        return b""


class NotThereYet:
    """A path that is still empty or missing. The format is detected once there is content.

    A file in an unknown format is followed as lines, because a row may still come."""

    def __init__(self, path: Path, names: Mapping[str, str] | None) -> None:
        self.path = path
        self._names = names
        self._issues = ParseIssues()
        self._source: Source | None = None

    @property
    def issues(self) -> ParseIssues:
        return self._source.issues if self._source else self._issues

    def read(self) -> list[Record]:
        return [record for part in self.batches() for record in part]

    def finish(self) -> list[Record]:
        records = [record for part in self._batches(complete=True) for record in part]
        if self._source is None:
            self._issues.note(f"{self.path}: nothing was written there")
            return records
        return [*records, *self._source.finish()]

    def held(self) -> int | None:
        return self._source.held() if self._source else None

    def release(self) -> list[Record]:
        return self._source.release() if self._source else []

    def batches(self) -> Iterator[Sequence[Record]]:
        yield from self._batches(complete=False)

    def _batches(self, complete: bool) -> Iterator[Sequence[Record]]:
        if self._source is None:
            try:
                kind = self._look(complete)
            except OSError as error:
                self._issues.note(f"{self.path}: {error.strerror or error}")
                return
            if kind == "unknown":
                return
            self._source = _of_kind(kind, self.path, None, self._names, None)
        yield from self._source.batches()

    def _look(self, complete: bool) -> str:
        """`complete`: no more will come."""
        if self.path.is_dir():
            return "tensorboard" if event_files(self.path) else "unknown"
        start = _beginning(self.path, START_BYTES)
        if len(start) < HEADER and not (start and complete):
            return "unknown"
        if is_event_file(start):
            return "tensorboard"
        # The document may be incomplete; JsonFile itself checks whether the file has one object per line.
        return "json" if self.path.suffix == ".json" or holds_document(start) else "lines"


def read_all(
    path: str | Path,
    *,
    format: str | None = None,
    names: Mapping[str, str] | None = None,
    pattern: str | Sequence[str] | None = None,
) -> Iterator[Record]:
    """The records of a finished log, in bounded memory. Raises UserError like `open_source`, and if `path` does not exist."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    source = open_source(path, format=format, names=names, pattern=pattern)
    for part in source.batches():
        yield from part
    yield from source.finish()
