"""The proof of an exported setting: paired comparisons, margins, and the hashes of code, weights and data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import jsonable, parse_json, parse_lines
from tune_ssim.guards import KeepRule
from tune_ssim.guards.verdict import Role
from tune_ssim.results.intervals import paired, paired_on_images
from tune_ssim.results.study_folder import CALIBRATION, PREFLIGHT, PROVENANCE, START, StudyFolder
from tune_ssim.results.winner import are_copies, confirmations, holds, why_copies, why_unconfirmed
from tune_ssim.study.objective import DELTA
from tune_ssim.trials.command.dependencies import NO_CODE, WHEN_OBSERVED, WITHOUT_RUNNING
from tune_ssim.trials.summary import TrialSummary


def proof_of(summary: TrialSummary, folder: StudyFolder) -> dict[str, Any]:
    """The evidence for the setting of `summary`. `unproven` lists what is missing; if it is empty the setting is proven.

    Raises UserError if a file of the study cannot be read."""
    trials = folder.trials()
    confirmed = confirmations(summary, trials)
    baselines = [trial for trial in trials if trial.role is Role.BASELINE]
    provenance, not_covered, changed = _provenance(folder, [*confirmed, *baselines])
    study = folder.study()
    objective = folder.objective
    unproven = []
    if not holds(confirmed, objective):
        unproven.append(why_unconfirmed(confirmed, objective))
    elif are_copies(confirmed, objective):
        unproven.append(why_copies(confirmed, objective))
    if provenance is None:
        unproven.append("the study recorded no hashes of its code, weights and data")
    preflight = folder.preflight()
    if preflight is None and study.get("preflight") is not None:
        unproven.append(f"{PREFLIGHT} of the study is missing")
    unproven += changed
    limits, rules = _limits(folder)
    return {
        "confirmed": not unproven,
        "unproven": unproven,
        "trials": [trial.trial_id for trial in confirmed],
        "seeds": [trial.seed for trial in confirmed],
        "horizon": confirmed[0].horizon if confirmed else None,
        "objective": objective.name,
        **({"direction": objective.direction} if objective.direction == "minimize" else {}),
        **({"min_improvement": objective.min_improvement} if objective.min_improvement is not None else {}),
        "comparison": comparison(confirmed, baselines),
        "margins": margins(confirmed, baselines, limits, rules),
        "switched_off": [name for name in ("preflight", "calibration", "confirm") if name in study and study[name] is None],
        "preflight": preflight,
        "calibration": folder.calibration(),
        "setting": summary.settings,
        "study": study,
        "provenance": provenance,
        **({"not_covered": not_covered} if not_covered else {}),
    }


def _provenance(folder: StudyFolder, trials: Iterable[TrialSummary]) -> tuple[dict[str, str] | None, list[str], list[str]]:
    """(Subject → SHA-256, what it does not cover, what changed while the study ran). Of a command also the files that `trials` were
    seen to use."""
    recorded, start = folder.provenance(), folder.start()
    not_covered = list(start.not_covered) if start is not None else []
    seen = folder.files_seen([trial.trial_id for trial in trials])
    if recorded is None or not seen:
        return recorded, not_covered, []
    not_covered = [phrase for phrase in not_covered if phrase != WITHOUT_RUNNING and not phrase.startswith(NO_CODE)]
    not_covered.insert(0, WHEN_OBSERVED)
    found, changed = dict(recorded), []
    for name in sorted({name for files in seen for name in files}):
        digests = {files[name] for files in (recorded, *seen) if name in files}
        if len(digests) == 1:
            found[name] = digests.pop()
        elif name in recorded or name.startswith("code/"):
            changed.append(f"{name} was changed while the study ran")
        else:
            not_covered.append(f"{name}, which changes from trial to trial")
    return found, not_covered, changed


def _limits(folder: StudyFolder) -> tuple[dict[str, float], list[KeepRule]]:
    """Metric → the limit of its guard, and the margins of `objective.keep`, from the study file."""
    try:
        norm_ratio = (folder.section("guards").get("norm_ratio") or {}).get("limit")
        keep = folder.section("objective").get("keep") or {}
        rules = [KeepRule(metric, **limit) for metric, limit in keep.items()]
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder.study_file}: guards.norm_ratio or objective.keep is not what a study has: {error}") from None
    return {"smoke_used_max": 1.0} | ({"norm_ratio_max": norm_ratio} if norm_ratio else {}), rules


def comparison(confirmed: Sequence[TrialSummary], baselines: Sequence[TrialSummary] = ()) -> dict[str, Any]:
    """`paired` and the differences per seed, for every `delta_…` that all trials of the confirm phase measured; `images`:
    `paired_on_images`, where the training measured each image."""
    names = sorted(
        set.intersection(*({name for name in trial.metrics if name.startswith("delta_")} for trial in confirmed))
        if confirmed
        else set()
    )
    found: dict[str, Any] = {}
    for name in names:
        by_seed = {str(trial.seed): trial.metric(name) for trial in confirmed}
        found[name] = paired(list(by_seed.values())) | {"by_seed": by_seed}
        if differences := _on_images(name.removeprefix(DELTA), confirmed, baselines):
            found[name]["images"] = paired_on_images(differences)
    return found


def _on_images(metric: str, confirmed: Sequence[TrialSummary], baselines: Sequence[TrialSummary]) -> list[list[float]]:
    """The differences to the baseline by seed and image; empty if a run did not measure each of the same number of images."""
    by_run = {(trial.seed, trial.steps): trial.per_image.get(metric, []) for trial in baselines}
    pairs = [(trial.per_image.get(metric, []), by_run.get((trial.seed, trial.steps), [])) for trial in confirmed]
    counts = {len(values) for pair in pairs for values in pair}
    found = [[own - reference for own, reference in zip(*pair, strict=True)] for pair in pairs] if len(counts) == 1 else []
    return found if all(row and all(map(math.isfinite, row)) for row in found) else []


def margins(
    confirmed: Sequence[TrialSummary], baselines: Sequence[TrialSummary], limits: Mapping[str, Any], rules: Iterable[KeepRule]
) -> dict[str, Any]:
    """The distance of the worst trial of the confirm phase from each guard's limit and each margin of `objective.keep`.

    `limits`: metric → the limit of its guard."""
    found: dict[str, Any] = {}
    for metric, limit in limits.items():
        values = [trial.metric(metric) for trial in confirmed if metric in trial.metrics]
        if values:
            found[metric] = {"worst": max(values), "limit": limit}
    by_run = {(trial.seed, trial.steps): trial.metrics for trial in baselines}
    for rule in rules:
        for trial in confirmed:
            reference = by_run.get((trial.seed, trial.steps))
            if reference is None:
                continue
            for margin in rule.margins(trial.metrics, reference):
                name, worse = margin.metric, min if margin.is_floor else max
                worst = worse(margin.value, found[name]["worst"]) if name in found else margin.value
                found[name] = {"worst": worst, "limit": margin.limit}
    return found


def digest(value: Any) -> str:
    """SHA-256 of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(jsonable(value), sort_keys=True).encode()).hexdigest()


def require_unchanged(folder: StudyFolder) -> None:
    """Raises UserError if a result of the phases before launch is no longer what the study wrote: other settings would be tried,
    and the proof would tell of numbers that nobody measured. A study of an earlier version recorded no digests."""

    def parse(event: dict[str, Any]) -> tuple[str, str]:
        return str(event.get("path", "")), str(event.get("digest", ""))

    recorded = dict(parse_lines(folder.events_file, parse, containing='"digest"'))
    for name in (PREFLIGHT, CALIBRATION, START, PROVENANCE):
        path = folder.path / name
        if recorded.get(name) and digest(parse_json(path, dict)) != recorded[name]:
            text = "is missing"
            if path.exists():  # the digest may be what was changed
                text = f"was changed after the study wrote it, or its digest in {folder.events_file.name} was"
            raise UserError(f"{path}: {text}; put back what it held, or start a new study with --name")


def seals(exported: Mapping[str, Any]) -> dict[str, str]:
    """The digest of every part of an export, so that `verify` can name the part that was edited."""
    parts = {name: value for name, value in exported.items() if name not in ("proof", "seals")}
    return {name: digest(value) for name, value in (parts | {f"proof.{k}": v for k, v in exported["proof"].items()}).items()}


def differences(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """One line for every subject (`weights/denoiser`, `code/losses/structural.py`, …) that has changed."""
    lines = []
    for name in sorted({*recorded, *found}):
        if name not in found:
            lines.append(f"{name} is gone")
        elif name not in recorded:
            lines.append(f"{name} is new")
        elif recorded[name] != found[name]:
            lines.append(f"{name} has changed ({recorded[name][:12]}… → {found[name][:12]}…)")
    return lines
