"""Calls a function right after a module has been imported for the first time."""

import sys
from importlib.abc import MetaPathFinder


class _Finder(MetaPathFinder):
    """Finds nothing itself: it lets the other finders find a watched module, and wraps the loader's `exec_module`."""

    def __init__(self, callbacks) -> None:
        self.callbacks = callbacks

    def find_spec(self, name, path=None, target=None):
        callback = self.callbacks.pop(name, None)
        if callback is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self or not hasattr(finder, "find_spec") else finder.find_spec(name, path, target)
            if spec is not None:
                _call_after(spec.loader, callback)
                return spec
        self.callbacks[name] = callback  # not installed
        return None


def _call_after(loader, callback) -> None:
    execute = loader.exec_module

    def exec_module(module) -> None:
        execute(module)
        callback(module)

    loader.exec_module = exec_module  # of this loader object, which serves one module


def after_import(callbacks) -> None:
    """callbacks: module name → function of the module. A module that was imported before is called back at once."""
    waiting = dict(callbacks)
    for name in list(waiting):
        if name in sys.modules:
            waiting.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _Finder(waiting))
