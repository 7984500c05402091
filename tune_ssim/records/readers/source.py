"""Opens a log of any format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tune_ssim.base.errors import UserError
from tune_ssim.records import Record
from tune_ssim.records.metric_names import is_loss_like
from tune_ssim.records.readers.event_files import HEADER, EventFiles, find_event_files, is_event_file, require_one_run
from tune_ssim.records.readers.json_file import JsonFile, holds_document, holds_lines
from tune_ssim.records.readers.line_file import LineFile
from tune_ssim.records.readers.parser import LINE_FORMATS, LineParser
from tune_ssim.records.readers.reader import Source
from tune_ssim.records.readers.rows import Rows

FORMATS = ("jsonl", "json", "csv", "tensorboard", "text")
START_BYTES = 1024 * 1024  # enough to tell a JSON document from lines
PIECE = 16 * 1024
FIRST_ROW_BYTES = 8 * 1024 * 1024  # the first row must appear within this many bytes; a large model may be printed before it
BARS = "progress_bars"
MLFLOW = ("mlflow:", "runs:/")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


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
    if pattern is not None and format not in (None, "text"):
        raise UserError(f"pattern: goes with format text, not with {format}")
    parser = LineParser(format=format if format in LINE_FORMATS else None, names=names, pattern=pattern)
    if str(path).startswith(MLFLOW):
        raise UserError(f"{path}: a run in MLflow is opened by tune_ssim.tracking.mlflow_source.open_run")
    try:
        _require_readable(path, format, names, pattern)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if format == "tensorboard" or path.is_dir():
        return EventFiles(path, names)
    if format in LINE_FORMATS or pattern is not None:
        return LineFile(path, parser)
    return DetectedSource(path, names, format)


def _require_readable(path: Path, format: str | None, names: Mapping[str, str] | None, pattern: str | Sequence[str] | None) -> None:
    """Raises UserError if the content so far is not a log."""
    if path.is_dir():
        if format is None and pattern is None:
            require_one_run(path)
        elif format != "tensorboard":
            raise UserError(f"{path}: a folder; {format or 'text'} is a format of files")
        return
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: neither a file nor a folder; feed what comes from a pipe to a LineParser")
    start = _beginning(path, START_BYTES)
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{path}: compressed ({name}); unpack it first")
    if format is not None or pattern is not None or is_event_file(start) or holds_document(start):
        return
    if path.name == "trainer_state.json":
        return
    parser = LineParser(names=names, file_name=path.name)
    data = start if len(start) < START_BYTES else _beginning(path, FIRST_ROW_BYTES)
    for begin in range(0, len(data), PIECE):
        parser.feed(data[begin : begin + PIECE])
        if parser.format is not None:
            return
    parser.finish()
    has_just_started = not start.strip() or not (b"\n" in data or b"\r" in data)
    if parser.format is None and not has_just_started:
        raise UserError(f"{path}: {'; '.join(parser.issues.notes)}; valid formats: {', '.join(FORMATS)}")


def _beginning(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file; empty if it does not exist."""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except FileNotFoundError:
        return b""


class DetectedSource(Source):
    """A log whose format is detected from its content, once there is some. `format`: "json" for one document or one object per
    line; None for any."""

    def __init__(self, path: Path, names: Mapping[str, str] | None, format: str | None) -> None:
        super().__init__(Rows(names))
        self.path = path
        self._names, self._format = names, format
        self._source: Source | None = None

    def batches(self) -> Iterator[Sequence[Record]]:
        if source := self._detect():
            yield from source.batches()

    def finish(self) -> list[Record]:
        if source := self._detect(is_complete=True):
            return source.finish()
        self.issues.note(f"{self.path}: nothing was written there")
        return []

    def _detect(self, is_complete: bool = False) -> Source | None:
        """is_complete: no more will come."""
        if self._source is None:
            try:
                self._source = self._choose(is_complete)
            except OSError as error:
                self.issues.note(f"{self.path}: {error.strerror or error}")
            if self._source is not None:
                self.rows = self._source.rows
        return self._source

    def _choose(self, is_complete: bool) -> Source | None:
        if self.path.is_dir():
            return EventFiles(self.path, self._names) if find_event_files(self.path) else None
        start = _beginning(self.path, START_BYTES)
        if not start or (len(start) < HEADER and not is_complete):
            return None
        if self._format is None and is_event_file(start):
            return EventFiles(self.path, self._names)
        is_json = self._format == "json" or self.path.suffix == ".json"
        has_lines = holds_lines(start + b"\n" if is_complete else start)
        if holds_document(start) or (is_json and is_complete and not has_lines):
            return JsonFile(self.path, self._names)
        if is_json and not has_lines:
            return None
        without = [BARS] if b"%|" in start and _has_losses(start) else []
        format = "jsonl" if is_json else None
        return LineFile(self.path, LineParser(format=format, names=self._names, file_name=self.path.name, without=without))


def _has_losses(start: bytes) -> bool:
    """Whether a log with this beginning has losses elsewhere than in progress bars."""
    parser = LineParser(without=[BARS])
    records = [*parser.feed(start), *parser.finish()]
    return any(is_loss_like(name) for record in records for name in record.values)


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
    for part in open_source(path, format=format, names=names, pattern=pattern).all_batches():
        yield from part
