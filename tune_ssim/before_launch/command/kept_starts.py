"""Starts of a command that `preflight`, `calibrate` and `run` of one study share: a JSON file in the storage path."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tune_ssim.base.files import jsonable, number, read_whole, write_atomically
from tune_ssim.before_launch.command.starts import Start, StartJob
from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.guards import SmokeTest
from tune_ssim.records import Record
from tune_ssim.study.study import Study
from tune_ssim.version import __version__

FORMAT = 1


def starts_file(storage: Path, study: str) -> Path:
    return storage / ".starts" / f"{study}.json"


class KeptStarts:
    """path: the file. fingerprint: of everything that the starts depend on apart from their jobs (`fingerprint_of`)."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    def read(self) -> list[Start]:
        """Empty if the file is missing, damaged or of another fingerprint: then starts are taken anew. A start that read a weights
        file which has changed since is left out."""
        try:
            found = json.loads(read_whole(self.path))
            if (found["format"], found["fingerprint"]) != (FORMAT, self.fingerprint):
                return []
            return [_start_of(one) for one in found["starts"] if one["files"] == _stamps(one["observed"])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []

    def write(self, starts: Iterable[Start]) -> None:
        """Replaces the file. Starts that failed are not kept. Where nothing can be written, nothing is kept."""
        content = {"format": FORMAT, "fingerprint": self.fingerprint, "starts": [_plain(one) for one in starts if not one.failure]}
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(jsonable(content)).encode())


def fingerprint_of(study: Study, make: Callable[[], Any]) -> str:
    """Of the command, its files, weights and data, and how it is observed and launched."""
    task = make()
    task.setup({**study.task_config, **study.baseline_settings}, study.search.seed)
    smoke_test = study.guards.get(SmokeTest.name)
    parts = [study.task_path, study.import_path, task.fingerprints(), str(smoke_test), study.resources.model_dump()]
    return hashlib.sha256(json.dumps([__version__, sys.executable, *parts], sort_keys=True, default=str).encode()).hexdigest()


def _plain(start: Start) -> dict[str, Any]:
    job = start.job
    return {
        **vars(start),
        "job": {**vars(job), "smoke_test": None},
        "records": [record.to_json() for record in start.records],
        "samples": start.samples and [vars(check) for check in start.samples],
        "files": _stamps(start.observed),
    }


def _start_of(plain: Mapping[str, Any]) -> Start:
    records = [Record(step, {name: number(value) for name, value in values.items()}) for step, values in plain["records"]]
    samples = plain["samples"]
    return Start(
        **{
            **{name: value for name, value in plain.items() if name != "files"},
            "job": StartJob(**plain["job"]),
            "records": tuple(records),
            "output": tuple(plain["output"]),
            "checkpoints": tuple(plain["checkpoints"]),
            "samples": None if samples is None else tuple(Check(**_check(check)) for check in samples),
        }
    )


def _check(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {**plain, "evidence": {name: number(value) for name, value in plain["evidence"].items()}}


def _stamps(observed: Mapping[str, Any]) -> dict[str, Any]:
    """Weights file that the program opened → its size and time of modification."""
    paths = {file["path"] for module in observed.get("weights", ()) for file in module["files"]}
    paths |= {load["path"] for load in observed.get("loads", ()) if load.get("path")}
    found: dict[str, Any] = {}
    for path in sorted(paths):
        try:
            stat = Path(path).stat()
            found[path] = [stat.st_size, stat.st_mtime_ns]
        except OSError:
            found[path] = None
    return found
