"""Hashes of everything a result depends on: the code that trains and judges, the loaded weights, the data."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_ssim.probes import content_id, tensor_hashes
from tune_ssim.trials.training import Training

# The parts of this package that affect a result. Changes to tables or messages do not invalidate a proof.
DECIDES = ("losses", "probes", "guards", "tasks", "records/record.py", "trials/trial.py", "trials/training.py", "trials/command")


def fingerprints(task: Training, import_path: str | None = None) -> dict[str, str]:
    """Subject → SHA-256, for a task after its set-up: `code/…`, `weights/<part>`, `data/…`.

    Weights are hashed as they are in memory, independent of the order and names of tensors. Code is the relevant part of this
    package and every loaded user module under `import_path` or in the task's package."""
    found = code_fingerprints({**_package_files(), **_own_files(type(task), import_path)})
    for name, part in task.parts().items():
        found[f"weights/{name}"] = content_id(tensor_hashes(part.module.state_dict()))
    return found | dict(task.fingerprints())


def code_fingerprints(files: Mapping[str, Path]) -> dict[str, str]:
    return {f"code/{name}": hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


def _package_files() -> dict[str, Path]:
    package = Path(__file__).resolve().parents[1]
    files = [path for name in DECIDES for path in ([package / name] if name.endswith(".py") else (package / name).rglob("*.py"))]
    return {path.relative_to(package).as_posix(): path for path in files}


def _own_files(task: type, import_path: str | None) -> dict[str, Path]:
    top = task.__module__.split(".")[0]
    if top == "tune_ssim":
        return {}
    root = Path(import_path).resolve() if import_path else None
    files: dict[str, Path] = {}
    for name, module in list(sys.modules.items()):
        file: Any = getattr(module, "__file__", None)
        if not file or not file.endswith(".py") or name.split(".")[0] == "tune_ssim" or name == "__main__":
            continue
        if not Path(file).is_absolute():
            continue  # torch.classes calls itself "_classes.py", which would be a file of the folder that we happen to run in
        path = Path(file).resolve()
        inside = root is not None and path.is_relative_to(root) and "site-packages" not in path.parts
        if inside or name.split(".")[0] == top:
            files[f"{name.replace('.', '/')}.py"] = path
    return files
