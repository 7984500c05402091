"""A log that the study does not describe: usual names of its metrics, and the files in which it may be."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from tune_ssim.base.errors import UserError
from tune_ssim.records.metric_names import usual_names
from tune_ssim.records.readers import open_source

LOG_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".log", ".txt", ".out")
EVENT_FILE = "events.out.tfevents"
MAX_FILES, MAX_SECONDS = 20_000, 2.0  # looked at before giving up: the folder may hold a data set
MAX_LOG_BYTES = 2**26  # a larger file is not read only to be proposed
MAX_PROPOSED = 3


class UsualNames:
    """Adds `loss` and `total_norm` to values that have them under another common name, once it is clear which one is meant."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self.found: dict[str, str] = {}  # log name → ours

    def complete(self, values: Mapping[str, float]) -> dict[str, float]:
        if not self._seen.issuperset(values):
            self._seen.update(values)
            self.found = {theirs: ours for theirs, ours in usual_names(self._seen).items() if ours not in self._seen} | self.found
        return {**{ours: values[theirs] for theirs, ours in self.found.items() if theirs in values}, **values}

    def remarks(self) -> list[str]:
        return [f"{theirs} is taken for {ours}; else `records: {{names: {{…: {ours}}}}}`" for theirs, ours in self.found.items()]


def propose_logs(folders: Sequence[Path], exp_dir: Path, since_s: float, own: Collection[str]) -> str:
    """Names the logs that were written in `folders` since then (seconds since the epoch), as settings of the study; empty if there
    are none. own: names of files and folders that are not the command's."""
    found = []
    for path in _written(folders, since_s, own):
        try:
            records = len(open_source(path).finish()) if path.is_dir() or path.stat().st_size <= MAX_LOG_BYTES else 0
        except (OSError, UserError):
            continue
        if records:
            is_own = path.is_relative_to(exp_dir)
            place = f'"{{exp_dir}}/{path.relative_to(exp_dir)}"' if is_own else str(path)
            found.append(f"`records: {{file: {place}}}`" + ("" if is_own else " (once it is in {exp_dir}: now trials share it)"))
        if len(found) == MAX_PROPOSED:
            break
    return f"it wrote a log: {' or '.join(found)}" if found else ""


def _written(folders: Sequence[Path], since_s: float, own: Collection[str]) -> Iterator[Path]:
    """Files that may be logs, and folders of TensorBoard files."""
    began, looked_at, seen = time.monotonic(), 0, set()
    for folder in folders:
        for place, folders_in, names in os.walk(folder):
            folders_in[:] = [name for name in folders_in if name not in own]
            looked_at += len(names)
            if looked_at > MAX_FILES or time.monotonic() - began > MAX_SECONDS:
                return
            for name in sorted(set(names) - set(own)):
                path = Path(place, name)
                is_event_file = EVENT_FILE in name
                found = path.parent if is_event_file else path
                try:
                    is_new = found not in seen and path.stat().st_mtime >= since_s
                except OSError:
                    continue
                if is_new and (is_event_file or path.suffix.lower() in LOG_SUFFIXES):
                    seen.add(found)
                    yield found
