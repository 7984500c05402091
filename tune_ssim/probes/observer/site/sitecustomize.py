"""Python imports this module at start-up from PYTHONPATH. It starts the observer, then the `sitecustomize` that it hides."""

import os
import sys


def _start() -> None:
    """Loads the observer by its path, since the program's environment may not have tune_ssim."""
    import importlib.util

    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "inside")
    name = "_tune_ssim_observer"
    spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder])
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[name] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    module.start(os.environ["TUNE_SSIM_OBSERVE"])


def _chain() -> None:
    """Runs the `sitecustomize` that would have been imported without this one."""
    import importlib.machinery
    import importlib.util

    own = os.path.dirname(os.path.abspath(__file__))
    others = [path for path in sys.path if os.path.abspath(path or os.curdir) != own]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if "TUNE_SSIM_OBSERVE" in os.environ:
    try:
        _start()
    except Exception as error:  # the program must run whatever happens here
        print(f"tune_ssim: the program is not observed: {error!r}", file=sys.stderr)
_chain()
