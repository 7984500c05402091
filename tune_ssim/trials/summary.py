"""What came out of a trial: one line of `trials.jsonl`, one object of `tune-ssim trials --json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tune_ssim.base.files import jsonable
from tune_ssim.guards.verdict import Role, Verdict

OBJECTIVE = "delta_ssim"  # what a study maximises unless it says otherwise


@dataclass
class TrialSummary:
    """A stable schema: docs/trials_schema.md. Studies of earlier versions lack some keys; `from_dict` fills them in.

    config: the settings of this trial; where the training has an SSIM loss always its ssim_loss_weight, ssim_loss_max_t and
    ssim_grad_scale. horizon: how far the verdict reaches, e.g. {"steps": 200, "batch_size": 8, "lr": 0.005}.
    evidence: {guard, step, metric, value, limit} of the violation that ended the trial, else None.
    objective: the metric that the study maximises. seed: of the training's random numbers.
    quarantined: content ids of the checkpoints that a ruined trial wrote.
    metrics: ssim, delta_ssim, psnr, norm_ratio_max, … where measured. Non-finite numbers are the strings "NaN", "Infinity",
    "-Infinity" in a file, since JSON has no others, and floats here.
    """

    trial_id: str
    verdict: Verdict
    reason: str = ""
    role: Role = Role.SEARCH
    seed: int | None = None
    objective: str = OBJECTIVE
    config: dict[str, Any] = field(default_factory=dict)
    horizon: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] | None = None
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    run_id: str | None = None

    def metric(self, name: str) -> float:
        """NaN where it was not measured."""
        value = self.metrics.get(name)
        return math.nan if value is None else float(value)

    @property
    def value(self) -> float:
        """Of the objective; NaN where it was not measured."""
        return self.metric(self.objective)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain: dict[str, Any] = jsonable({**asdict(self), "verdict": self.verdict.value, "role": self.role.value})
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialSummary:
        """Raises ValueError, naming the key, for what is no summary of a trial."""
        for name, kind in (("trial_id", str), ("verdict", str), ("config", Mapping), ("metrics", Mapping)):
            if not isinstance(data.get(name), kind):
                raise ValueError(f"{name} is missing" if name not in data else f"{name} must be a {kind.__name__.lower()}")
        known = {one.name for one in fields(cls)}
        given: dict[str, Any] = {key: value for key, value in data.items() if key in known}
        given["verdict"] = Verdict(data["verdict"])
        given["role"] = Role(data.get("role", "search"))
        given["config"] = dict(data["config"])
        try:
            given["metrics"] = {key: float(value) for key, value in data["metrics"].items() if value is not None}
        except (TypeError, ValueError):
            raise ValueError("metrics must hold numbers") from None
        return cls(**given)
