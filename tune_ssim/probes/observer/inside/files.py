"""The local files that a program has imported, and the settings files that it has opened, before its first update."""

import os
import sys

from .events import guarded

SETTINGS = (".yaml", ".yml", ".json", ".toml", ".ini", ".cfg")
MAX_BYTES = 4 * 2**20  # of a settings file; a larger one is data
INSTALLED = ("site-packages", "dist-packages")

_OPENED: dict = {}  # path → None, of files that were opened for reading, in order
_STATE = {"is_told": False}


def install(events) -> None:
    """Watches what is opened until `tell` is called: before the first update, or at the end of a program without one."""
    import atexit

    sys.addaudithook(_look)
    atexit.register(guarded(events)(tell), events)


def _look(event, args) -> None:
    if event != "open" or _STATE["is_told"]:
        return
    try:
        path, mode = args[0], args[1]
        if isinstance(path, str) and path.endswith(SETTINGS) and isinstance(mode, str) and not set(mode) & set("wxa+"):
            _OPENED[os.path.abspath(path)] = None
    except Exception:  # an error here would be one of the program's `open`
        pass


def tell(events) -> None:
    """Writes the event, once."""
    if _STATE["is_told"] or int(os.environ.get("RANK", 0)):
        return
    _STATE["is_told"] = True
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] not in ("tune_ssim", __package__)]
    code = [getattr(module, "__file__", None) for module in modules]
    settings = [path for path in _OPENED if os.path.isfile(path) and os.path.getsize(path) <= MAX_BYTES]
    found = {"code": _hashes(code), "settings": _hashes(settings)}
    if any(found.values()):
        events.write("files", **found)


def _hashes(paths):
    """Path → SHA-256 of those that are neither installed nor of the standard library."""
    import hashlib

    found = {}
    for path in paths:
        if isinstance(path, str) and os.path.isabs(path) and os.path.isfile(path) and _is_local(path):
            with open(path, "rb") as file:
                found[path] = hashlib.sha256(file.read()).hexdigest()
    return found


def _is_local(path) -> bool:
    library = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
    return not path.startswith((library, own)) and not any(part in INSTALLED for part in path.split(os.sep))
