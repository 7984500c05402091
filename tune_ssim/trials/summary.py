"""The result of a trial: one line of `trials.jsonl`, one object of `tune-ssim trials --json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tune_ssim.base.files import jsonable
from tune_ssim.base.validation import JsonNumber, Problems, json_number, read_as
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.study.objective import OBJECTIVE, Direction, Objective
from tune_ssim.study.space import GAIN, GRAD_SCALE, MAX_T, TRIPLE, WEIGHT, gain_of

PROCESS_DIED = "the trial's process died"  # start of the reason of a trial without a result; a resumed study runs it again
NOT_SETTINGS = (GAIN, "seed")  # keys of a `config` that are derived from others, or the seed
WITHOUT_SSIM = {WEIGHT: 0.0, MAX_T: None, GRAD_SCALE: 1.0}  # settings of a training whose SSIM loss is off
IMAGE_LOSSES = (*TRIPLE, "pixel_loss_weight", "pixel_loss_max_t")


@dataclass(kw_only=True)
class TrialSummary:
    """A stable schema: docs/trials_schema.md. Studies of earlier versions lack some keys, which `from_dict` fills in.

    config: the settings of this trial. If the training has an SSIM loss, always with ssim_loss_weight, ssim_loss_max_t and
    ssim_grad_scale. horizon: the training length that the verdict covers, e.g. {"steps": 200, "batch_size": 8, "lr": 0.005}.
    evidence: {guard, step, metric, value, limit} of the violation that ended the trial, or None.
    objective: the metric that the study optimises, in `direction`. seed: seeds the training's random numbers.
    checked: what a safe trial was judged by, a sentence each. quarantined: content ids of the checkpoints that a ruined trial
    wrote. warnings: messages of guards with the action `warn`, and what was noticed about the training, such as log rows that were
    passed over.
    curve: (step, improvement over the baseline) at evaluations before the end. per_image: held-out metrics of each image, of
    baselines and confirmations.
    metrics: ssim, delta_ssim, psnr, norm_ratio_max, … where measured. Non-finite numbers are floats here, and the strings "NaN",
    "Infinity", "-Infinity" in a file, since JSON has no such numbers.
    """

    trial_id: str
    run_id: str | None = None
    role: Role = Role.SEARCH
    seed: int | None = None
    objective: str = OBJECTIVE
    direction: Direction = "maximize"
    config: dict[str, Any] = field(default_factory=dict)
    verdict: Verdict
    reason: str = ""
    horizon: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] | None = None
    steps: int = 0
    metrics: dict[str, JsonNumber] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)
    curve: list[tuple[int, JsonNumber]] = field(default_factory=list)
    per_image: dict[str, list[JsonNumber]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)

    def metric(self, name: str) -> float:
        """The metric's value; NaN if it was not measured."""
        return self.metrics.get(name, math.nan)

    @property
    def improvement(self) -> float:
        """See `Objective.improvement`."""
        return Objective.of(self.objective, self.direction).improvement(self.metrics)

    @property
    def is_repeated_on_resume(self) -> bool:
        """Whether it has no result yet: its process died, or it is a baseline or confirmation that could not run."""
        if self.verdict is Verdict.ERROR and self.reason.startswith(PROCESS_DIED):
            return True
        return self.role is not Role.SEARCH and self.verdict in (Verdict.ERROR, Verdict.BAD_SETUP)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings to pass to a training script: the three of an SSIM loss first, then all others."""
        first = {name: self.config[name] for name in TRIPLE if name in self.config}
        return first | {name: value for name, value in self.config.items() if name not in (*TRIPLE, *NOT_SETTINGS)}

    @property
    def gain(self) -> float:
        """weight · grad_scale; see `gain_of` for a schedule."""
        return gain_of(self.config)

    @property
    def setting_key(self) -> str:
        """The same for trials that train identically: weight and grad_scale act only through their product (SEEDS B6)."""
        if isinstance(self.config.get(WEIGHT), Mapping):
            return json.dumps(jsonable(self.settings), sort_keys=True, default=str)
        others = {name: value for name, value in self.settings.items() if name not in (WEIGHT, GRAD_SCALE)}
        return json.dumps(jsonable({**others, GAIN: f"{self.gain:.9g}"}), sort_keys=True, default=str)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; without keys that are empty, and with `direction` only if it is minimize."""
        optional = ("seed", "checked", "curve", "per_image", "warnings", "quarantined")
        left_out = [name for name in optional if vars(self)[name] in (None, [], {})]
        left_out += ["direction"] if self.direction == "maximize" else []
        plain: dict[str, Any] = jsonable({key: value for key, value in vars(self).items() if key not in left_out})
        return plain | {"role": self.role.value, "verdict": self.verdict.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialSummary:
        """Drops unknown keys. Raises ValueError, naming the key, for data that is not a trial's summary."""
        if not isinstance(data, Mapping):
            raise ValueError(f"a trial's summary must be a mapping, got {str(data)[:60]!r}")
        metrics = data.get("metrics")
        if isinstance(metrics, dict):
            data = {**data, "metrics": {name: value for name, value in metrics.items() if value is not None}}
        summary = read_as(cls, data)
        problems = Problems()
        for name in (*TRIPLE, GAIN):
            value = summary.config.get(name)
            is_schedule = name == WEIGHT and isinstance(value, Mapping)
            if name in summary.config and (name, value) != (MAX_T, None) and not is_schedule:
                with problems.at("config", name):
                    json_number(value)
        problems.check()
        return summary


def reported_config(settings: Mapping[str, Any], effective: Mapping[str, Any]) -> dict[str, Any]:
    """`config` of a summary: the settings of the trial, and the effective settings of the image losses.

    The SSIM loss's three settings are always included, unless neither the trial nor the training has its weight."""
    has_ssim = WEIGHT in effective or WEIGHT in settings
    in_force = {name: effective[name] for name in IMAGE_LOSSES if name in effective}
    return {**(WITHOUT_SSIM if has_ssim else {}), **in_force, **settings}
