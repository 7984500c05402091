"""What a node reports about itself.

Sent to the nodes by value, since theirs may be another version of this package: it uses the standard library only."""

import fcntl
import hashlib
import os
import platform
import resource
import shutil
import socket
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "tune-ssim")


def facts_of_node(storage: str, marker: str, import_path: str | None, has_gpus: bool) -> dict[str, Any]:
    """marker: name of a file that the driver has written into the storage path. import_path: the folder of the task's code."""
    package = util.find_spec("tune_ssim")
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "time_s": time.time(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "code": _code(package.submodule_search_locations[0]) if package and package.submodule_search_locations else None,
        "task_code": _code(import_path) if import_path else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "free": {folder: shutil.disk_usage(folder).free for folder in ("/tmp", "/dev/shm") if Path(folder).is_dir()},
        "has_nvidia": Path("/dev/nvidia0").exists(),
        "storage": _storage(Path(storage), marker),
    }
    if has_gpus:
        found["cuda"] = _cuda()
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _code(folder: str) -> str | None:
    """A hash of the Python files in the folder and its subfolders; None without the folder."""
    if not Path(folder).is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([*Path(folder).glob("*.py"), *Path(folder).glob("*/*.py")]):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _storage(storage: Path, marker: str) -> dict[str, Any]:
    """Whether the driver's file is seen, what prevents writing, and how long a lock takes."""
    found: dict[str, Any] = {"is_shared": (storage / marker).exists(), "error": "", "lock_s": 0.0}
    if not found["is_shared"]:
        return found
    found["free"] = shutil.disk_usage(storage).free
    mine = storage / f"{marker}.{socket.gethostname()}.{os.getpid()}"
    began_s = time.monotonic()
    try:
        with mine.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write("written by a node")
        mine.unlink()
    except OSError as error:
        found["error"] = error.strerror or str(error)
    found["lock_s"] = time.monotonic() - began_s
    return found


def _cuda() -> str:
    """What prevents torch from using the node's GPUs; empty if nothing does."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs only"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds no usable GPU (driver too old?)"
