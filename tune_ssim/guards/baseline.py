"""The baseline that trials are compared with: runs of the same training with only the pixel loss, stored as one JSON file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import read_whole

FORMAT = 1


@dataclass(frozen=True)
class BaselineRun:
    """The baseline run of one seed: `series[metric][step]`, its held-out `evaluation`, and its effective parameters."""

    seed: int
    series: Mapping[str, Mapping[int, float]]
    evaluation: Mapping[str, float]
    effective: Mapping[str, Any] = field(default_factory=dict)
    trial_id: str = ""
    steps: int = 0  # taken; 0 in files from before it was kept

    @property
    def last_step(self) -> int:
        """The last step that is known of it; 0 if there is none."""
        return self.steps or max((max(points) for points in self.series.values() if points), default=0)


@dataclass(frozen=True)
class Baseline:
    """Baseline runs. `runs[0]` has the study's seed; trials with that seed see the same batches and noise at every step."""

    runs: tuple[BaselineRun, ...]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("a baseline needs at least one run")

    def run_of(self, seed: int | None) -> BaselineRun | None:
        """The run with the same seed, and so the same batches; None if there is none."""
        return next((run for run in self.runs if run.seed == seed), None)

    def reference(self, seed: int | None) -> BaselineRun:
        """The run with the same seed, else the first run."""
        return self.run_of(seed) or self.runs[0]

    def noise_floor(self, metric: str) -> float | None:
        """Largest difference of a held-out metric between seeds; None with a single seed."""
        values = [run.evaluation[metric] for run in self.runs if metric in run.evaluation]
        return max(values) - min(values) if len(values) > 1 else None

    def to_bytes(self) -> bytes:
        runs = [
            {
                "seed": run.seed,
                "trial_id": run.trial_id,
                **({"steps": run.steps} if run.steps else {}),
                "evaluation": dict(run.evaluation),
                "effective": dict(run.effective),
                # float: an integer would be written differently after reading it back, which changes the digest
                "series": {
                    name: [[step, float(value)] for step, value in sorted(points.items())] for name, points in run.series.items()
                },
            }
            for run in self.runs
        ]
        return json.dumps({"format": FORMAT, "runs": runs}, sort_keys=True, indent=1).encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes) -> Baseline:
        """The baseline from the content of its file. Raises ValueError for anything else."""
        loaded = json.loads(data)
        found = loaded.get("format") if isinstance(loaded, dict) else None
        if found != FORMAT:
            raise ValueError(f"baseline format {found!r} is not known (this version reads {FORMAT})")
        try:
            return cls(
                tuple(
                    BaselineRun(
                        seed=run["seed"],
                        trial_id=run.get("trial_id", ""),
                        steps=run.get("steps", 0),
                        evaluation=run["evaluation"],
                        effective=run.get("effective", {}),
                        series={name: {int(s): float(v) for s, v in points} for name, points in run["series"].items()},
                    )
                    for run in loaded["runs"]
                )
            )
        except (AttributeError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a baseline file ({type(error).__name__}: {error})") from None

    @classmethod
    def read(cls, path: str | Path, sha256: str | None = None) -> Baseline:
        """Reads a baseline file. Raises UserError if it cannot be read or does not match `sha256`."""
        try:
            data = read_whole(Path(path))
        except FileNotFoundError:
            hint = "the storage path must be reachable under the same name from every node"
            raise UserError(f"baseline {path}: no such file; {hint}") from None
        found = hashlib.sha256(data).hexdigest()
        if sha256 is not None and found != sha256:
            raise UserError(f"baseline {path}: content has digest {found[:12]}…, expected {sha256[:12]}…")
        try:
            return cls.from_bytes(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"baseline {path}: {error}") from None
