"""The writer lock of a study's folder. At most one process runs a study, across all machines that share the storage.

It relies on atomic hard links (to a name that must not exist) and renames (POSIX; NFS too), and on fresh attributes when a file is
opened (NFS's close-to-open consistency). It does not rely on flock, lockd or synchronised clocks.
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
from tune_ssim.base.files import open_regular

LOCK_FILE = "writer.lock"
HEARTBEAT_S = 5.0  # a heartbeat costs one system call
# NFS clients cache attributes for up to 60 s (nfs(5), acregmax), so a shorter silence proves nothing.
MAX_SILENCE_S = 60.0


@dataclass(frozen=True)
class Owner:
    """Identifies a process to other processes. `started`: its start in clock ticks since boot, None if the system does not
    report it. `namespace`: the machine's boot id and the process-id namespace, within which `pid` is valid.
    """

    host: str
    namespace: str
    pid: int
    started: int | None
    since: str  # ISO 8601, local time with its offset
    token: str  # unique to this acquisition

    @classmethod
    def this_process(cls) -> Owner:
        pid = os.getpid()
        since = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), _namespace(), pid, _start_of(pid), since, uuid.uuid4().hex)

    @property
    def is_here(self) -> bool:
        """Whether this process can see it."""
        return (self.host, self.namespace) == (socket.gethostname(), _namespace())

    @property
    def is_alive(self) -> bool:
        """Whether an owner that `is_here` is alive. A later process with the same id has a later start time."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # a process of another user
        return self.started is None or _start_of(self.pid) in (None, self.started)


@dataclass(frozen=True)
class _Found:
    """A lock file as read; `owner` is None if the file is not written yet or truncated."""

    owner: Owner | None
    mtime: float
    inode: int

    @property
    def identity(self) -> str:
        return self.owner.token if self.owner else f"{self.inode}-{self.mtime:.6f}"


class StudyLock:
    """A context manager. Raises UserError on entry while another process runs the study; a dead owner's lock is taken over.

    An owner on this machine is dead if its process is. One elsewhere is dead after `max_silence_s` without a heartbeat, by the
    file system's clock, and none during two more `heartbeat_s`, since the file server may have been unreachable.
    """

    def __init__(self, folder: Path, *, heartbeat_s: float = HEARTBEAT_S, max_silence_s: float = MAX_SILENCE_S) -> None:
        self.folder, self.heartbeat_s, self.max_silence_s = folder, heartbeat_s, max_silence_s
        self.file = folder / LOCK_FILE
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
        self._heart.join(timeout=self.heartbeat_s)  # an unreachable file server must not block the exit
        os.close(self._descriptor)
        _remove(self.file, self._owner.token)

    @property
    def is_lost(self) -> bool:
        """Whether another process took over, since this one was silent for too long. Reads the file."""
        try:
            found = _read(self.file)
        except OSError:  # the file server is unreachable
            return False
        return found is None or self._owner is None or found.identity != self._owner.token

    def require_held(self) -> None:
        """Raises UserError if the lock was lost, so that this process stops writing into the study."""
        if self.is_lost:
            raise UserError(f"study {self.folder.name}: this process was silent for too long, and another one runs the study now")

    def _acquire(self, path: Path) -> tuple[Owner, int]:
        """Acquires the lock. Returns a descriptor of the lock file."""
        while True:
            with suppress(FileExistsError):
                return _create(path)
            found = _read(path)
            if found is None:  # released just now
                continue
            if not self._is_dead(path, found):
                raise UserError(self._refusal(found))
            # A takeover from this owner needs a second lock named after it. The slower of two processes then finds that the
            # lock file is no longer the one it judged. A process that died during a takeover is itself taken over from.
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
                f"{self.max_silence_s:.0f} s without one the study can be taken over ({self.file})"
            )
        return f"{words}; end it there, or choose another --name"

    def _beat(self) -> None:
        """Touches the file through its descriptor, so never the file of a later owner."""
        while not self._stop.wait(self.heartbeat_s):
            with suppress(OSError):  # the file server is unreachable
                os.utime(self._descriptor)


def is_written(folder: Path) -> bool:
    """Whether a process holds the lock. One on another machine counts as alive."""
    found = _read(folder / LOCK_FILE)
    return found is not None and (found.owner is None or not found.owner.is_here or found.owner.is_alive)


def _create(path: Path) -> tuple[Owner, int]:
    """Creates the lock file atomically with its content, so a kill leaves no partial lock. Raises FileExistsError."""
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
    """Reads a lock file; None if it does not exist."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return None
    with file:
        status, text = os.fstat(file.fileno()), file.read(65536)
    try:
        owner = Owner(**json.loads(text))
        is_whole = isinstance(owner.pid, int) and isinstance(owner.token, str) and owner.token.isalnum()
    except (ValueError, TypeError, RecursionError):
        return _Found(None, status.st_mtime, status.st_ino)
    return _Found(owner if is_whole else None, status.st_mtime, status.st_ino)


def _remove(path: Path, identity: str) -> None:
    """Removes the lock only if it has this `identity`. It is renamed to a unique name first and checked again."""
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
    """Clock ticks since boot (proc(5), field 22 of stat); -1 for a zombie process; None if the system
    does not report it."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in "ZX" else int(fields[18])
