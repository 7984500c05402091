"""The quarantine ledger: ruined checkpoints, from which no training may start, whatever the file name (note 003, SEEDS D4).

The ledger is <storage>/quarantine.jsonl: one event per line, append-only. A checkpoint is identified by its content, that is the
hashes of the tensors that its training changed, and by the parents that descendants declare. Renaming a file or its keys has no
effect.

A copy in half precision is recognised, also after it was saved in float32 or float64 again.

Unless declared, these are not recognised: a tensor that was sliced, concatenated, transposed, averaged or blended with another, or
quantised to 8 bits, and a file of only short vectors and constants (`probes.weights.MIN_DISTINCT`).
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.base.files import append_line, parse_lines
from tune_ssim.base.tensor_file import Contents, TensorFile, content_id
from tune_ssim.base.validation import read_as

LEDGER = "quarantine.jsonl"
MIN_ID_LENGTH = 6  # fewest digits of an abbreviated id on the command line
SHORT_ID_LENGTH = 12  # digits of an id in messages


@dataclass(frozen=True)
class Entry:
    """One ruined checkpoint. `tensors`: SHA-256 of those that its training changed. `parents`: content ids it was trained from."""

    id: str
    time: str  # ISO 8601, UTC
    study: str
    trial_id: str
    step: int
    reason: str
    guard: str | None
    parents: Sequence[str]
    tensors: Sequence[str]
    path: str | None = None  # file or folder where it was written

    def __str__(self) -> str:
        guard = f" ({self.guard})" if self.guard else ""
        return f"trial {self.trial_id} of study {self.study} wrote it at step {self.step} and was ruined: {self.reason}{guard}"


@dataclass(frozen=True)
class Release:
    """Lifts the quarantine of all earlier entries with this `id`."""

    id: str
    time: str
    reason: str
    who: str

    def __str__(self) -> str:
        return f"released by {self.who}: {self.reason}"


@dataclass(frozen=True)
class Refusal:
    """Why `where` may not be used. `how`: its relation to a ruined checkpoint."""

    where: str
    how: str
    entry: Entry

    def __str__(self) -> str:
        short = self.entry.id[:SHORT_ID_LENGTH]
        return (
            f"{self.where}: quarantined: {self.how} {short}; {self.entry}; start from other weights, "
            f"or lift it with `tune-ssim quarantine release {short}`"
        )


@dataclass(frozen=True)
class Entered:
    """The result of `add`. `entry` is None if there was nothing to enter; `sentence` explains it."""

    entry: Entry | None
    sentence: str


class Ledger:
    """The ledger file. Safe under concurrent processes and machines that share the storage path, and under kills at any moment."""

    def __init__(self, storage: str | Path) -> None:
        self.file = Path(storage) / LEDGER

    def add(
        self,
        contents: Contents,
        *,
        sound: Iterable[Contents],
        study: str,
        trial_id: str,
        step: int,
        reason: str,
        guard: str | None = None,
        parents: Iterable[str] = (),
        path: str | Path | None = None,
    ) -> Entered:
        """Enters what a ruined trial wrote. The entry is on disk when this returns. Repeating the call adds no second line.

        `sound`: the training's state before its first step, its weight files, raw and EMA, and anything else known to be sound,
        such as what the baseline wrote at the same step (until its first active step a trial equals the baseline bit for
        bit). Their tensors are never entered, at any precision. If no other tensor is left, nothing is entered. Raises
        ValueError if `sound` is empty, since the starting weights would then be entered.
        """
        spared: set[str] = set()
        for known in sound:
            spared.update(known.hashes.values(), *known.distinctive.values())
        if not spared:
            raise ValueError("`sound` is empty: give the hashes of the starting weights, or they would be quarantined too")
        trained = [versions for own, versions in contents.distinctive.items() if own not in spared]
        tensors = sorted(set().union(*trained) - spared)
        short = contents.id[:SHORT_ID_LENGTH]
        if not tensors:
            return Entered(None, f"{short}: not quarantined: this training changed none of its tensors")
        entry = Entry(
            contents.id, _now(), study, trial_id, step, _one_line(reason), guard, [*dict.fromkeys(parents)], tensors,
            None if path is None else str(path),
        )  # fmt: skip
        with self._locked() as descriptor:
            before = self._in_force(lambda line: line.id == entry.id)
            if set(tensors) <= {value for line in before for value in line.tensors}:
                return Entered(before[-1], f"{short}: already quarantined")
            self._append(descriptor, "quarantine", entry)
        return Entered(entry, f"{short}: quarantined, known by {len(trained)} tensors")

    def release(self, id: str, reason: str, who: str | None = None) -> Release:
        """Lifts a quarantine. `id` may be abbreviated. Raises UserError for an id not in force, or without a reason."""
        if not reason.strip():
            raise UserError("a release needs a reason: it stays in the ledger")
        with self._locked() as descriptor:
            release = Release(_resolve(id, self.entries(), self.file), _now(), _one_line(reason), who or _user())
            self._append(descriptor, "release", release)
        return release

    def entries(self) -> list[Entry]:
        """The entries in force, oldest first."""
        return self._in_force(lambda entry: True)

    def history(self) -> list[Entry | Release]:
        """All entries and releases ever written, oldest first."""
        return list(self._lines())

    def why(self, what: str | Path) -> list[Entry | Release]:
        """The history of a file, a checkpoint folder or an id; empty for a clean file. Raises UserError for an unknown id,
        BadSetup for a file that is not a checkpoint."""
        if isinstance(what, Path) or Path(what).exists():
            ids = {refusal.entry.id for refusal in self._refusals_of(Path(what))}
        else:
            ids = {_resolve(what, self._lines(), self.file)}
        return [line for line in self._lines() if line.id in ids]

    def check(self, path: str | Path) -> Refusal | None:
        """`path`: a safetensors file, or a folder of them (a checkpoint). Raises BadSetup for anything else."""
        return next(iter(self._refusals_of(Path(path))), None)

    def check_hashes(self, hashes: Mapping[str, str], parents: Collection[str] = (), where: str = "weights") -> Refusal | None:
        """The same for tensors in memory, which cannot be replaced between check and use."""
        return next(iter(self._refusals(where, hashes, parents)), None)

    def require_clean(self, path: str | Path) -> None:
        """Raises BadSetup, with the reason, if `path` is quarantined or not a checkpoint."""
        if refusal := self.check(path):
            raise BadSetup(str(refusal))

    # -- reading and writing

    def _refusals_of(self, path: Path) -> list[Refusal]:
        where, hashes, parents = _read(path)
        found = self._refusals(where, hashes, parents)
        if found or not self.file.exists():
            return found
        narrowed = [TensorFile.open(file).narrowed() for file in _files(path)]
        return self._refusals(where, {name: digest for file in narrowed for digest, name in file.items()}, ())

    def _refusals(self, where: str, hashes: Mapping[str, str], parents: Collection[str]) -> list[Refusal]:
        """Refusals, the most direct relation first: same content, then a shared tensor, then a declared parent."""
        own, ancestors, names = content_id(hashes), set(parents), {value: name for name, value in hashes.items()}
        content, tensor, descent = [], [], []
        for entry in self._in_force(
            lambda entry: entry.id == own or entry.id in ancestors or not names.keys().isdisjoint(entry.tensors)
        ):
            if entry.id == own:
                content.append(Refusal(where, "the same tensors as", entry))
            elif name := next((names[value] for value in entry.tensors if value in names), None):
                tensor.append(Refusal(where, f"its tensor {name!r} is from", entry))
            else:
                descent.append(Refusal(where, "it declares to be made from", entry))
        return content + tensor + descent

    def _in_force(self, concerns: Callable[[Entry], bool]) -> list[Entry]:
        """Entries that `concerns` accepts and that were not released later. Keeps nothing else in memory, since ledgers grow."""
        found: list[Entry] = []
        for line in self._lines():
            if isinstance(line, Release):
                found = [entry for entry in found if entry.id != line.id]
            elif concerns(line):
                found.append(line)
        return found

    def _lines(self) -> Iterator[Entry | Release]:
        try:
            yield from parse_lines(self.file, _parse)
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror or error}") from None

    def _append(self, descriptor: int, action: str, line: Entry | Release) -> None:
        is_new = os.fstat(descriptor).st_size == 0
        append_line(self.file, {"action": action, **asdict(line)})
        os.fsync(descriptor)
        if is_new:  # the directory entry of a new file must be synced too
            folder = os.open(self.file.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Allows one writer at a time, so that no line is appended to a truncated one. The lock ends with its process."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


KINDS: dict[str, type[Entry] | type[Release]] = {"quarantine": Entry, "release": Release}


def _parse(line: Mapping[str, Any]) -> Entry | Release:
    """Raises ValueError for a line that is not from a ledger."""
    kind = KINDS.get(str(line.get("action")))
    if kind is None:
        raise ValueError(f"not a line of a quarantine ledger: {str(line)[:100]}")
    return read_as(kind, line)


def _resolve(id: str, lines: Iterable[Entry | Release], where: Path) -> str:
    """The only id that starts with `id`. Raises UserError if there are none or several."""
    if len(id) < MIN_ID_LENGTH:
        raise UserError(f"id {id!r}: give at least {MIN_ID_LENGTH} digits, or the path of a file that exists")
    known = list(dict.fromkeys(line.id for line in lines))
    found = [whole for whole in known if whole.startswith(id.lower())]
    if len(found) > 1:
        raise UserError(f"id {id!r}: {len(found)} in {where} begin so; give more digits")
    if not found:
        listed = ", ".join(whole[:SHORT_ID_LENGTH] for whole in known[-5:]) or "none"
        raise UserError(f"id {id!r} is not in {where}, and no file has that name; the latest ids: {listed}")
    return found[0]


def _files(path: Path) -> list[Path]:
    """A safetensors file, or all in a folder. Hidden files are unfinished and skipped."""
    files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith(".")) if path.is_dir() else [path]
    if not files:
        raise BadSetup(f"{path}: holds no *.safetensors file")
    return files


def _read(path: Path) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """Name, hashes and declared parents of a safetensors file, or of all in a folder."""
    files = _files(path)
    hashes: dict[str, str] = {}
    parents: list[str] = []
    for opened in map(TensorFile.open, files):
        prefix = f"{opened.path.name}:" if len(files) > 1 else ""
        hashes |= {prefix + name: value for name, value in opened.hashes().items()}
        parents += opened.parents()
    return str(path), hashes, tuple(dict.fromkeys(parents))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"
