"""Reads the events of observed processes while they are written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune_ssim.base.files import number
from tune_ssim.records import TOTAL_NORM, Record

RANK_TOLERANCE = 1e-3  # relative; ranks compute one norm in different orders


@dataclass
class Observation:
    """What has been seen so far. weights, loads, optimizers: the events of the first rank, as written.

    files: path → SHA-256 of local modules that were imported, and of settings files that were opened, before the first update.
    max_grad_norm: of the first step's clip_grad_norm_; None where nothing was clipped by it.
    held: whether the weights were unchanged after every held step that was compared; None without one. offset: the program's own
    step minus the number of updates when it logged; None if it has not logged."""

    processes: int = 0
    world_size: int = 1
    hooked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    optimizers: list[Mapping[str, Any]] = field(default_factory=list)
    weights: list[Mapping[str, Any]] = field(default_factory=list)
    loads: list[Mapping[str, Any]] = field(default_factory=list)
    loggers: list[str] = field(default_factory=list)
    files: dict[str, dict[str, str]] = field(default_factory=lambda: {"code": {}, "settings": {}})
    steps: int = 0
    max_grad_norm: float | None = None
    held: bool | None = None
    offset: int | None = None

    @property
    def is_observed(self) -> bool:
        """Whether an optimiser step was seen."""
        return self.steps > 0

    def sentence(self) -> str:
        """One line: what is observed and what could not be."""
        if not self.processes:
            return (
                "not observed: no Python process of it imports torch, or it clears PYTHONPATH (as python -I and -S do), so the "
                "observer is not in it"
            )
        if not self.steps:
            return "not observed: no step of a torch optimiser was seen" + "".join(f"; {note}" for note in self.notes)
        names = ", ".join(dict.fromkeys(self.hooked))
        ranks = f" on {self.world_size} ranks" if self.world_size > 1 else ""
        logged = f"; metrics from {', '.join(self.loggers)}" if self.loggers else ""
        return f"observed {self.steps} steps{ranks}; hooked: {names}{logged}" + "".join(f"; {note}" for note in self.notes)


class EventReader:
    """Reads the folder of events incrementally. Values are those of rank 0; other ranks are compared with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.observation = Observation()
        self._offsets: dict[Path, int] = {}
        self._ranks: dict[Path, int] = {}
        self._norms: dict[int, float] = {}  # of rank 0, by step

    def read(self) -> list[Record]:
        """New records: of each optimiser step, and of what the program handed to its logger, under the number of updates so far.
        Several records may have one step."""
        found = []
        for path in sorted(self.folder.glob("*.jsonl")):
            for event in self._new_events(path):
                record = self._take(path, event)
                if record is not None:
                    found.append(record)
        return found

    def _new_events(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            data = file.read()
        complete, _, _ = data.rpartition(b"\n")  # a line may still be written
        self._offsets[path] = self._offsets.get(path, 0) + (len(complete) + 1 if complete else 0)
        for line in complete.splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # a process was killed within a line
                continue
            if isinstance(event, dict):
                yield event

    def _take(self, path: Path, event: dict[str, Any]) -> Record | None:
        seen, kind = self.observation, event.get("event")
        if kind == "start":
            self._ranks[path] = int(event.get("rank", 0))
            seen.processes += 1
            seen.world_size = max(seen.world_size, int(event.get("world_size", 1)))
        rank = self._ranks.get(path, 0)
        if kind == "held":
            seen.held = bool(event["unchanged"]) and seen.held is not False
        elif kind == "step" and rank:
            self._compare(int(event["step"]), event["values"], rank)
        elif rank:
            return None
        elif kind == "step":
            values = {name: number(value) for name, value in event["values"].items()}
            if not event.get("optimizer"):
                seen.steps = max(seen.steps, int(event["step"]))
                self._norms[int(event["step"])] = values.get(TOTAL_NORM, float("nan"))
            return Record(int(event["step"]), values)
        elif kind == "logged":
            seen.offset = int(event["step"]) - int(event["at"]) if seen.offset is None else seen.offset
            if event["source"] not in seen.loggers:
                seen.loggers.append(event["source"])
            # Before any update, as in a program without a torch optimiser, there is only the program's own step.
            step = int(event["at"]) or max(0, int(event["step"]))
            return Record(step, {name: number(value) for name, value in event["values"].items()})
        elif kind == "hooked":
            seen.hooked.append(event["name"])
        elif kind == "note":
            seen.notes.append(event["text"])
        elif kind == "optimizer":
            seen.optimizers.append(event)
        elif kind == "files":
            for what, hashes in seen.files.items():
                hashes.update(event[what])
        elif kind == "clipping":
            seen.max_grad_norm = seen.max_grad_norm if event["optimizer"] else event["max_norm"]
        elif kind == "weights":
            seen.weights.append(event)
        elif kind in ("read", "load_state_dict"):
            seen.loads.append(event)
        return None

    def _compare(self, step: int, values: Mapping[str, Any], rank: int) -> None:
        ours, theirs = self._norms.pop(step, None), number(values.get(TOTAL_NORM, float("nan")))
        note = f"rank {rank} has another total_norm than rank 0: the gradients are not averaged over the ranks"
        if (
            ours is not None
            and abs(ours - theirs) > RANK_TOLERANCE * max(abs(ours), abs(theirs))
            and note not in self.observation.notes
        ):
            self.observation.notes.append(note)
