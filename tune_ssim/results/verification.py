"""Reads an export and compares it with what was found when it was verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import parse_json, read_whole
from tune_ssim.base.validation import problems_of, user_error
from tune_ssim.base.yaml_source import Source, parse_yaml
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.results.export import versions
from tune_ssim.results.proof import comparison, differences, seals
from tune_ssim.results.winner import are_copies, holds, why_copies
from tune_ssim.study.objective import Objective
from tune_ssim.trials.summary import TrialSummary

# An export of a study with many images and hashes; the bundled study's has 40 KB.
MAX_BYTES = 4 * 1024 * 1024
MAX_VALUES = 200_000


class _Horizon(BaseModel):
    steps: Annotated[int, Field(ge=1)]


class _Comparison(BaseModel):
    mean: float
    interval: tuple[float, float]


class _Proof(BaseModel):
    """The fields of a proof that verification needs. Further fields are allowed."""

    unproven: list[str]
    setting: dict[str, Any]
    study: Annotated[dict[str, Any], Field(min_length=1)]
    provenance: Annotated[dict[str, str], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2)]
    horizon: _Horizon
    objective: str
    direction: Literal["maximize", "minimize"] = "maximize"
    comparison: dict[str, _Comparison]
    not_covered: list[str] = []


class _Export(BaseModel):
    trial_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")]
    config: dict[str, Any]
    exported_with: dict[str, Any]
    seals: dict[str, str]
    proof: _Proof

    @model_validator(mode="after")
    def _objective_was_compared(self) -> _Export:
        compared = Objective.of(self.proof.objective, self.proof.direction).delta
        if not self.proof.unproven and compared not in self.proof.comparison:
            raise ValueError(f"proof.comparison has no {compared!r}")
        if len(set(self.proof.seeds)) < len(self.proof.seeds):
            raise ValueError("proof.seeds has a seed twice")
        return self


def read_export(path: Path) -> dict[str, Any]:
    """Reads an export in JSON or YAML with a complete proof. Raises UserError for any other file."""
    try:
        text = read_whole(path, MAX_BYTES, "an export")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    is_json = text.lstrip().startswith(b"{")
    source = Source(str(path), parse_json(path, dict)) if is_json else parse_yaml(text, str(path), MAX_BYTES, MAX_VALUES)
    exported = source.value
    if not isinstance(exported.get("proof"), dict):
        raise UserError(f"{path}: not an export of `tune-ssim export --format json` (or yaml): it has no proof")
    unproven = exported["proof"].get("unproven")
    if isinstance(unproven, list) and unproven:
        raise UserError(f"{path}: nothing to verify, it was exported as unproven: {'; '.join(map(str, unproven))}")
    try:
        _Export.model_validate(exported)
    except ValidationError as error:
        raise user_error(source, problems_of(error)[:1]) from None
    return dict(exported)


def file_differences(exported: Mapping[str, Any]) -> list[str]:
    """What was edited in the file since the export: settings with their values, everything else by its path."""
    config, confirmed = exported["config"], exported["proof"]["setting"]
    lines = [
        f"setting: {key} is {config.get(key)!r}, {confirmed.get(key)!r} was confirmed"
        for key in sorted({*config, *confirmed})
        if config.get(key) != confirmed.get(key)
    ]
    changed = [line.split(" ")[0] for line in differences(exported["seals"], seals(exported))]
    return lines + [f"{name} is not what was exported" for name in changed if not (lines and name in ("config", "proof.setting"))]


def version_notes(exported: Mapping[str, Any]) -> list[str]:
    """Libraries whose version differs here: not a fault, but a possible cause of a different result."""
    here = versions()
    return [
        f"{name} was {was}, here it is {here.get(name)}" for name, was in exported["exported_with"].items() if here.get(name) != was
    ]


def result_differences(proof: Mapping[str, Any], trials: Sequence[TrialSummary]) -> list[str]:
    """Why the trials of a repeated confirmation do not confirm the proof, one line each; empty if they do."""
    confirmed = [trial for trial in trials if trial.role == Role.CONFIRM]
    lines = [f"{trial.trial_id} is {trial.verdict}: {trial.reason}" for trial in trials if trial.verdict != Verdict.SAFE]
    if lines:
        return lines
    objective = Objective.of(proof["objective"], proof.get("direction", "maximize"))
    objective = objective.replace(min_improvement=proof.get("min_improvement"))
    if not holds(confirmed, objective):
        return [f"{objective.name} no longer beats the baseline"]
    if are_copies(confirmed, objective):
        return [why_copies(confirmed, objective)]
    recorded, again = proof["comparison"][objective.delta], comparison(confirmed)[objective.delta]
    low, high = recorded["interval"]
    if not low <= again["mean"] <= high:
        return [f"{objective.delta} is {again['mean']:+.4f} now, outside the interval [{low:+.4f}, {high:+.4f}] that was recorded"]
    return []
