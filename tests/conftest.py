"""One thread a process, as in a trial; quiet libraries. Nothing here catches or hides a fault."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("no_deadline")

# Before any test module imports torch, ray or mlflow: they read these once, and worker processes inherit them.
os.environ["OMP_NUM_THREADS"] = "1"  # torch takes its number of threads from it
os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; unset, it warns at each start
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_worker_niceness", "0")  # else a study waits for whatever the other half of the tests is doing

# A shell that starts this in the background has SIGINT ignored, and children inherit that: Ctrl-C could not be tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# About a minute or more each. With `-n 3 --dist loadfile` they begin first, the longest of all first; the others fill the gaps.
LONG = (
    *("test_readme.py", "test_run_study.py", "test_command.py", "test_in_process.py", "test_tracking.py", "test_parts.py"),
    *("test_preflight.py", "test_observer.py", "test_testing.py", "test_calibrate.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the files of the most tests, not of the longest
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(Path(item.path).name, len(LONG)))
