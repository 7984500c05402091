"""Recognises printed lines that are records, so that they are not parsed as settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tune_ssim.records.readers.json_lines import is_row
from tune_ssim.records.readers.printed import PAIR, PRINTED, KeyValues
from tune_ssim.records.readers.text_lines import MAX_PATTERN_TEXT, UserPattern
from tune_ssim.records.readers.values import Names

LOSS_NAMES = ("loss", "train_loss")  # measured values, never settings


class RecordLines:
    """Tests whether a line is a record. pattern, names: as for `LineParser`. printed: whether records are read from stdout.

    A line is a record if the pattern matches, if it has a step and a loss or a norm, or if it has a number called `loss`. The
    last two apply even if records come from a file, because progress is often printed as well."""

    def __init__(self, pattern: str | Sequence[str] | None, names: Mapping[str, str], printed: bool) -> None:
        self._names = Names(names)
        known = [pattern] if isinstance(pattern, str) else list(pattern or ())
        self._readers = [PRINTED[name](self._names).read for name in known if name in PRINTED]
        self._patterns = [UserPattern(text) for text in known if text not in PRINTED]
        self._any = printed and pattern is None
        if self._any:
            self._readers = [printed(self._names).read for printed in PRINTED.values()]
        self._key_values = KeyValues(self._names).read

    def takes(self, line: str) -> bool:
        line = line[:MAX_PATTERN_TEXT]
        if any(pattern.matches(line) for pattern in self._patterns):
            return True
        if any((row := read(line)) is not None and row[0] is not None for read in self._readers):
            return True
        if self._any and is_row(line, self._names) and any(f'"{name}"' in line for name in self._names.steps):
            return True
        names = [name for name, _ in PAIR.findall(line.lower())]
        if any(name in LOSS_NAMES for name in names):
            return True
        row = self._key_values(line)
        return row is not None and row[0] is not None and any(name.endswith(("loss", "norm")) for name in names)
