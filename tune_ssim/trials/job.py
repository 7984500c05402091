"""A trial to be run: its settings, role, seed and baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tune_ssim.guards import Baseline
from tune_ssim.guards.verdict import Role


@dataclass(frozen=True)
class BaselineFile:
    """A baseline's path, which every node must be able to read, and its hash."""

    path: str
    sha256: str

    def read(self) -> Baseline:
        """Raises UserError if the file has changed."""
        return Baseline.read(self.path, self.sha256)


@dataclass(frozen=True)
class TrialJob:
    """One trial: its id and role, its settings, and the baseline it is compared with.

    settings: as the search suggests them; on the worker they override the study's `task_config`.
    searched: keys in which it may differ from the baseline, in addition to those of the auxiliary losses. baseline: None for a
    baseline run and for a trial without one. storage, study: location of the quarantine ledger and of the study's folder; None for
    a trial outside a study. reason: why the search chose this trial, as text. rival: (step, improvement) of another trial; this one
    is stopped if its improvement over the baseline at that step is smaller.
    """

    trial_id: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    role: Role = Role.SEARCH
    seed: int = 0
    slot: int | None = None  # position in the order of suggestions
    stage: str | None = None
    searched: tuple[str, ...] = ()
    baseline: BaselineFile | None = None
    storage: str | None = None
    study: str | None = None
    reason: str = ""
    rival: tuple[int, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"settings": dict(self.settings), "role": self.role.value, "searched": list(self.searched)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialJob:
        baseline = data.get("baseline")
        return cls(
            **{
                **data,
                "role": Role(data["role"]),
                "searched": tuple(data["searched"]),
                "rival": tuple(data["rival"]) if data.get("rival") else None,
                "baseline": BaselineFile(**baseline) if baseline else None,
            }
        )
