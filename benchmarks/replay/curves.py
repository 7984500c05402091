"""Recorded learning curves: the file format, and what lies between two recorded settings.

A recording is two files of the same name, described in benchmarks/replay/README.md: NAME.json, the header, and NAME.npz, the
curves. Every array has one row for each run; a baseline is a run with gain 0.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tune_ssim.base.files import jsonable, write_atomically

FORMAT = 1
KINDS = ("steps", "evaluations", "smoke", "smoke_again")  # prefixes of the arrays
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Run:
    """The whole curves of one training, never pruned. gain 0: the baseline. Each kind is name → values, one for each step in
    `Curves.steps_of(kind)`; NaN where a metric was absent."""

    gain: float
    max_t: float
    seed: int
    values: Mapping[str, Mapping[str, Array]] = field(repr=False)  # by kind, by metric

    def at(self, kind: str, index: int) -> dict[str, float]:
        """The metrics at one position; absent ones are left out. An infinite value is kept."""
        return {name: float(row[index]) for name, row in self.values[kind].items() if not np.isnan(row[index])}


@dataclass
class Curves:
    """header: as in the README. runs: the baselines and all recorded settings."""

    header: dict[str, Any]
    runs: list[Run]
    order: tuple[int, ...] = ()  # of the recorded seeds, for `play`; () is rising
    first: int = 0  # the seed that plays the first of them

    def of_search(self, seed: int) -> Curves:
        """The same curves for the search with this seed, which sees the recorded seeds in an order of its own."""
        order = np.random.default_rng(seed).permutation(self.seeds)
        return replace(self, order=tuple(int(one) for one in order), first=seed)

    @property
    def name(self) -> str:
        return str(self.header["name"])

    @property
    def steps(self) -> int:
        return int(self.header["steps"])

    def steps_of(self, kind: str) -> list[int]:
        """The training steps at which a kind was recorded."""
        if kind == "steps":
            return list(range(1, self.steps + 1))
        return list(self.header["evaluation_steps" if kind == "evaluations" else "smoke_steps"])

    @property
    def seeds(self) -> list[int]:
        """Seeds whose whole grid is recorded; while a recording is under way, those with the most settings."""
        counts = {run.seed: len(self.row_of(run.seed)) for run in self.baselines}
        most = max(counts.values(), default=0)
        return sorted(seed for seed, count in counts.items() if count == most)

    @property
    def baselines(self) -> list[Run]:
        return [run for run in self.runs if run.gain == 0]

    def baseline(self, seed: int) -> Run:
        return next(run for run in self.baselines if run.seed == seed)

    def row_of(self, seed: int) -> list[Run]:
        """The recorded settings of a seed, without its baseline."""
        return [run for run in self.runs if run.gain > 0 and run.seed == seed]

    @property
    def settings(self) -> list[tuple[float, float]]:
        """(gain, max_t) of the grid."""
        return sorted({(run.gain, run.max_t) for run in self.runs if run.gain > 0})

    @property
    def max_ts(self) -> list[float]:
        return sorted({run.max_t for run in self.runs if run.gain > 0})

    def find(self, gain: float, max_t: float, seed: int) -> Run | None:
        return next((run for run in self.runs if (run.gain, run.max_t, run.seed) == (gain, max_t, seed)), None)

    # -- settings off the grid

    def play(self, gain: float, max_t: float, seed: int, snap: bool = False) -> Run:
        """The curves of any setting and seed: see `Off the grid` in the README. seed: counted through `order`, from `first` on.

        snap: the nearest recorded gain instead of an interpolation."""
        order = self.order or self.seeds
        seed = order[(seed - self.first) % len(order)]
        if gain <= 0:
            return self.baseline(seed)
        row = self.row_of(seed)
        gate = min({run.max_t for run in row}, key=lambda own: abs(math.log(own / max_t)))
        column = sorted((run for run in row if run.max_t == gate), key=lambda run: run.gain)
        upper = next((run for run in column if run.gain >= gain * (1 - 1e-9)), column[-1])
        if gain >= upper.gain * (1 - 1e-9):
            return upper
        if upper is column[0]:
            lower, share = self.baseline(seed), gain / upper.gain
        else:
            lower = column[column.index(upper) - 1]
            share = math.log(gain / lower.gain) / math.log(upper.gain / lower.gain)
        if snap:
            return lower if share < 0.5 else upper
        values = {kind: _between(kind, lower.values[kind], upper.values[kind], share) for kind in KINDS}
        return Run(gain, gate, seed, values)

    # -- files

    @classmethod
    def read(cls, path: str | Path) -> Curves:
        """Reads NAME.json and NAME.npz, given either. Raises ValueError for other files."""
        path = Path(path)
        header = json.loads(path.with_suffix(".json").read_text())
        if header.get("format") != FORMAT:
            raise ValueError(f"{path}: format {header.get('format')!r} is not known (this version reads {FORMAT})")
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        runs = []
        for row, (gain, max_t, seed) in enumerate(zip(arrays["gain"], arrays["max_t"], arrays["seed"], strict=True)):
            values: dict[str, dict[str, Array]] = {kind: {} for kind in KINDS}
            for name, array in arrays.items():
                kind, _, metric = name.partition("/")
                if metric:
                    values[kind][metric] = array[row]
            runs.append(Run(float(gain), float(max_t), int(seed), values))
        return cls(header, runs)

    def write(self, path: str | Path) -> None:
        """Writes both files, each as a whole."""
        path = Path(path)
        names = sorted({(kind, name) for run in self.runs for kind in KINDS for name in run.values[kind]})
        arrays: dict[str, Any] = {
            "gain": np.array([run.gain for run in self.runs]),
            "max_t": np.array([run.max_t for run in self.runs]),
            "seed": np.array([run.seed for run in self.runs]),
        }
        for kind, name in names:
            absent = np.full(len(self.steps_of(kind)), np.nan, np.float32)
            arrays[f"{kind}/{name}"] = np.stack([run.values[kind].get(name, absent) for run in self.runs]).astype(np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        write_atomically(path.with_suffix(".npz"), packed.getvalue())
        write_atomically(path.with_suffix(".json"), (json.dumps(jsonable(self.header), indent=1, allow_nan=False) + "\n").encode())


def rows_of(records: Sequence[Mapping[str, float]]) -> dict[str, Array]:
    """Metrics by name from one mapping for each step; NaN where one is absent."""
    names = sorted({name for record in records for name in record})
    return {name: np.array([record.get(name, np.nan) for record in records], np.float32) for name in names}


def _between(kind: str, lower: Mapping[str, Array], upper: Mapping[str, Array], share: float) -> dict[str, Array]:
    """Norms and losses are interpolated in the logarithm, everything else linearly. A value that only one of the two has, or that
    is not finite, comes from the nearer one; active fractions, which depend on max_t and the batch alone, from the upper one."""
    found = {}
    for name, high in upper.items():
        low = lower.get(name, np.full_like(high, np.nan))
        if name.endswith("active_fraction"):
            found[name] = high
            continue
        nearer = low if share < 0.5 and name in lower else high
        with np.errstate(all="ignore"):
            mixed = low * (1 - share) + high * share
            if kind == "steps":
                positive = (low > 0) & (high > 0)
                mixed = np.where(positive, np.exp(np.log(low) * (1 - share) + np.log(high) * share), mixed)
            found[name] = np.where(np.isfinite(mixed), mixed, np.where(np.isnan(nearer), high, nearer)).astype(np.float32)
    return found


def recordings_option(description: str | None) -> argparse.ArgumentParser:
    """A parser with the recordings to be played: all of curves/, unless `--curves` names some."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    recorded = sorted((Path(__file__).parent / "curves").glob("*.npz"))
    parser.add_argument("--curves", type=Path, nargs="+", default=recorded, help="NAME.npz or NAME.json; all of curves/")
    return parser
