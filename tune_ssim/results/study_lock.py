"""The writer's lock of a study's folder: at most one process runs a study, on this machine or on any that shares the storage.

Relied on: linking a file to a name that must not be there yet, and renaming one, are atomic (POSIX; NFS too), and opening a
file fetches its attributes anew (NFS's close-to-open consistency). Not relied on: flock, lockd, clocks that agree.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from tune_ssim.base.errors import UserError

LOCK_FILE = "writer.lock"
HEARTBEAT_S = 5.0  # a sign of life costs one system call
# An NFS client may show attributes this old (nfs(5), acregmax: 60 s), so a file that is not younger proves nothing.
MAX_SILENCE_S = 60.0


@dataclass(frozen=True)
class Owner:
    """A process, as far as another one can recognise it. `started`: its start in clock ticks since boot, None where the system
    does not tell. `namespace`: the machine's boot and the process-id namespace; only within the same one does `pid` mean anything.
    """

    host: str
    namespace: str
    pid: int
    started: int | None
    since: str  # ISO 8601, local time with its offset
    token: str  # of this one acquisition

    @classmethod
    def this_process(cls) -> Owner:
        pid = os.getpid()
        since = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), _namespace(), pid, _start_of(pid), since, uuid.uuid4().hex)

    @property
    def is_here(self) -> bool:
        """Whether this process could see it."""
        return (self.host, self.namespace) == (socket.gethostname(), _namespace())

    @property
    def is_alive(self) -> bool:
        """Of one that `is_here`. Another process that was given the same id since then started later."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        return self.started is None or _start_of(self.pid) in (None, self.started)


@dataclass(frozen=True)
class _Found:
    """A lock file as it was read; `owner` is None for one that is not written yet, or was torn."""

    owner: Owner | None
    mtime: float
    inode: int

    @property
    def identity(self) -> str:
        return self.owner.token if self.owner else f"{self.inode}-{self.mtime:.6f}"


class StudyLock:
    """A context manager. Raises UserError on entry while another process runs the study; a dead owner's lock is taken over.

    An owner on this machine is dead when its process is. One elsewhere is dead after `max_silence_s` without a heartbeat, by
    the file system's own clock, and without another one during two more `heartbeat_s`: a file server may have been away.
    """

    def __init__(self, folder: Path, *, heartbeat_s: float = HEARTBEAT_S, max_silence_s: float = MAX_SILENCE_S) -> None:
        self.folder, self.heartbeat_s, self.max_silence_s = folder, heartbeat_s, max_silence_s
        self.file = folder / LOCK_FILE
        self.is_lost = False  # another process took it over, since this one was silent for too long
        self._owner: Owner | None = None
        self._descriptor = -1
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> StudyLock:
        self._owner, self._descriptor = self._acquire(self.file)
        self._heart = threading.Thread(target=self._beat, name="tune-ssim-lock", daemon=True)
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        assert self._owner is not None and self._heart is not None
        self._stop.set()
        self._heart.join(timeout=self.heartbeat_s)  # a file server that is away does not keep the process
        os.close(self._descriptor)
        _remove(self.file, self._owner.token)

    def require_held(self) -> None:
        """Raises UserError where the lock was lost: this process must not write into the study any more."""
        if self.is_lost:
            raise UserError(f"study {self.folder.name}: this process was silent for too long, and another one runs the study now")

    def _acquire(self, path: Path) -> tuple[Owner, int]:
        """A descriptor of the lock file that is now ours."""
        while True:
            with suppress(FileExistsError):
                return _create(path)
            found = _read(path)
            if found is None:  # released in this moment
                continue
            if not self._is_dead(path, found):
                raise UserError(self._refusal(found))
            # Whoever takes over from this owner must hold the lock called after it; the one that comes second finds that the
            # file is no longer the one that it judged. A process that died while it took over is taken over from in turn.
            mutex = path.with_name(f".{LOCK_FILE}.{found.identity}")
            taker, descriptor = self._acquire(mutex)
            try:
                current = _read(path)
                if current is not None and current.identity == found.identity:
                    _remove(path, found.identity)
                    with suppress(FileExistsError):
                        return _create(path)
            finally:
                os.close(descriptor)
                _remove(mutex, taker.token)

    def _is_dead(self, path: Path, found: _Found) -> bool:
        if found.owner is not None and found.owner.is_here:
            return not found.owner.is_alive
        if self._silence(found) < self.max_silence_s:
            return False
        time.sleep(2 * self.heartbeat_s)
        again = _read(path)
        return again is not None and (again.identity, again.mtime) == (found.identity, found.mtime)

    def _silence(self, found: _Found) -> float:
        """Seconds since the last heartbeat, by the clock of the file system."""
        descriptor, path = tempfile.mkstemp(dir=self.folder, prefix=".clock.")
        try:
            return os.fstat(descriptor).st_mtime - found.mtime
        finally:
            os.close(descriptor)
            Path(path).unlink()

    def _refusal(self, found: _Found) -> str:
        name, owner = self.folder.name, found.owner
        if owner is None:
            return f"study {name} is being started by another process ({self.file}); try again in {self.max_silence_s:.0f} s"
        words = f"study {name} is being run by {owner.host}, process {owner.pid}, since {owner.since}"
        if not owner.is_here:
            words += (
                f"; its last sign of life came {max(0.0, self._silence(found)):.0f} s ago, and after "
                f"{self.max_silence_s:.0f} s without one the study can be taken over"
            )
        return f"{words}; end it there, or choose another --name"

    def _beat(self) -> None:
        """Touches the file through its descriptor: never the file of another owner that took over the name."""
        while not self._stop.wait(self.heartbeat_s):
            try:
                os.utime(self._descriptor)
                found = _read(self.file)
            except OSError:  # the file server is away
                continue
            self.is_lost = found is None or self._owner is None or found.identity != self._owner.token


def _create(path: Path) -> tuple[Owner, int]:
    """Raises FileExistsError. The file appears with its whole content: an owner that is killed in between leaves no lock."""
    owner = Owner.this_process()
    whole = path.with_name(f".{path.name.lstrip('.')}.{owner.token}")
    descriptor = os.open(whole, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(descriptor, json.dumps(asdict(owner)).encode())
        os.fsync(descriptor)
        os.link(whole, path)
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        whole.unlink(missing_ok=True)
    return owner, descriptor


def _read(path: Path) -> _Found | None:
    """None for a file that is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        status, text = os.fstat(descriptor), os.read(descriptor, 65536)
    finally:
        os.close(descriptor)
    try:
        owner = Owner(**json.loads(text))
        is_whole = isinstance(owner.pid, int) and isinstance(owner.token, str) and owner.token.isalnum()
    except (ValueError, TypeError, RecursionError):
        return _Found(None, status.st_mtime, status.st_ino)
    return _Found(owner if is_whole else None, status.st_mtime, status.st_ino)


def _remove(path: Path, identity: str) -> None:
    """Removes the lock of `identity`, and of no other: it is looked at again under a name that nobody else knows."""
    found = _read(path)
    if found is None or found.identity != identity:
        return
    aside = path.with_name(f".{path.name.lstrip('.')}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    found = _read(aside)
    if found is not None and found.identity != identity:
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _namespace() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _start_of(pid: int) -> int | None:
    """Clock ticks since boot (proc(5), field 22 of stat); -1 for a process that has ended and waits for its parent; None where
    the system does not tell."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in "ZX" else int(fields[18])
