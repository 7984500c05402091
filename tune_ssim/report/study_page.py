"""A study as one HTML page that opens from disk, without a network: `tune-ssim report`.

Curves are drawn by matplotlib as SVG, which needs no script and prints well. jinja2 escapes whatever a name or a reason holds.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import write_atomically
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.report.heat_map import draw_heat_map
from tune_ssim.report.importance import importance_of
from tune_ssim.report.pareto_picture import draw_front
from tune_ssim.report.sheets import SampleSheet, sample_sheets
from tune_ssim.report.trial_curves import Curves, curves_of, draw_confirmation, draw_curves
from tune_ssim.results.pareto import pareto_front
from tune_ssim.results.proof import proof_of
from tune_ssim.results.study_folder import CALIBRATION, PREFLIGHT_PICTURE, StudyFolder
from tune_ssim.results.study_lock import is_written
from tune_ssim.results.trial_text import format_number, format_setting, metric_label, proof_line, warning_lines
from tune_ssim.results.winner import NoSafeTrial, best_safe
from tune_ssim.study.objective import Objective
from tune_ssim.study.space import MAX_T, TRIPLE, gain_of, load_space
from tune_ssim.trials.summary import TrialSummary
from tune_ssim.version import __version__

PAGE = "report.html"
SYMBOLS = {  # readable without colour
    Verdict.SAFE: "✓",
    Verdict.DEGRADED: "▽",
    Verdict.STOPPED: "■",
    Verdict.PRUNED: "✗",
    Verdict.BAD_SETUP: "⚠",
    Verdict.ERROR: "⚠",
}
COLUMNS = {"psnr": ".2f", "norm_ratio_max": ".3g"}  # beside the objectives, where any trial has them
HEADINGS = {"psnr": "PSNR, dB", "norm_ratio_max": "norm ratio, largest"}
FOLLOW_S = 5
MAX_CURVES = 100  # trials whose curves are drawn: ten kilobytes each


@dataclass(frozen=True)
class Row:
    """A trial in the table. chosen: why the search chose it. curves: SVG; empty if nothing was recorded."""

    trial: TrialSummary
    setting: str
    symbol: str
    numbers: Sequence[str]
    chosen: str
    curves: str
    is_best: bool
    is_front: bool


@dataclass
class _Log:
    """What the page needs of a study's events."""

    chosen: dict[str, str] = field(default_factory=dict)  # trial → why the search chose it
    curves: dict[str, Curves] = field(default_factory=dict)
    end: str | None = None  # None while the study runs, or after it was killed


def write_page(folder: StudyFolder, path: Path | None = None, refresh_s: int | None = None, end: str | None = None) -> Path:
    """Writes the page, by default into the study's folder. refresh_s: how often a browser loads it again, while the study runs.
    end: why it ends now, before its events say so."""
    target = path or folder.path / PAGE
    write_atomically(target, page_of(folder, refresh_s, end).encode())
    return target


def follow_study(folder: StudyFolder, path: Path | None = None) -> Path:
    """Writes the page whenever the study has written something, until it ends, is killed, or this is interrupted.

    The last page does not reload itself. Raises UserError if no trial has ended by then."""
    seen = -1
    try:
        while _read_events(folder).end is None and is_written(folder.path):
            size = folder.events_file.stat().st_size if folder.events_file.exists() else 0
            if folder.trials() and size != seen:
                write_page(folder, path, refresh_s=FOLLOW_S)
            seen = size
            time.sleep(FOLLOW_S)
    except KeyboardInterrupt:
        pass
    return write_page(folder, path)


def page_of(folder: StudyFolder, refresh_s: int | None = None, end: str | None = None) -> str:
    """The page. Raises UserError for files that cannot be read, and if no trial has ended."""
    from jinja2 import Environment, PackageLoader

    trials, objective = folder.trials(), folder.objective
    if not trials:
        raise UserError(f"{folder.name}: no trial has ended yet")
    log = _read_events(folder)
    log.end = log.end if end is None else end
    best, why_none = _best(folder)
    proof = proof_of(best, folder) if best else None
    preflight, given = folder.preflight(), folder.study()
    columns = _columns(trials, objective)
    front = pareto_front(trials, objective)
    on_front = {trial.trial_id for trial in front}
    baselines = [trial for trial in trials if trial.role is Role.BASELINE]
    environment = Environment(loader=PackageLoader("tune_ssim.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("study.html").render(
        name=folder.name,
        version=__version__,
        refresh_s=refresh_s if log.end is None else None,
        end=log.end,
        objective=metric_label(objective.name),
        best=best,
        setting={name: _pasteable(value) for name, value in best.settings.items()} if best else {},
        why_none=why_none,
        proof=proof,
        proof_line=proof_line(proof) if proof else "",
        counts=_counts(trials),
        preflight=preflight,
        preflight_is_off="preflight" in given and given["preflight"] is None,
        findings=[check for check in (preflight or {}).get("checks", []) if check.get("status") != "ok"],
        looked_at=_picture(looked_at.read_bytes()) if (looked_at := folder.path / PREFLIGHT_PICTURE).exists() else "",
        heat_map=_heat_map(folder, trials),
        columns=[HEADINGS.get(name, metric_label(name)) for name in columns],
        has_gain=any(format_setting(trial.config).startswith("gain") for trial in trials),
        rows=[
            _row(trial, columns, log, best, place, _baseline_of(trial, baselines), trial.trial_id in on_front)
            for place, trial in enumerate(_in_order(trials, objective))
        ],
        importance=importance_of(trials, objective, load_space(given["space"])) if "space" in given else {},
        sheets=_sheets(folder, trials, best, objective),
        confirmation=draw_confirmation(proof, objective) if proof else "",
        front=_picture(draw_front(trials, front, objective)) if front else "",
        warnings=warning_lines(trials),
        skipped=[(format_setting(one.config), one.sentence) for one in folder.skipped()],
        hashes=folder.provenance() or {},
        study_file=folder.study_file.read_text() if folder.study_file.exists() else "",
        horizon=best.horizon if best else {},
    )


def _best(folder: StudyFolder) -> tuple[TrialSummary | None, str]:
    try:
        return best_safe(folder), ""
    except NoSafeTrial as error:
        return None, str(error)


def _heat_map(folder: StudyFolder, trials: Sequence[TrialSummary]) -> str:
    calibration = folder.calibration()
    if calibration is None:
        return ""
    if "space" not in (study := folder.study()):
        raise UserError(f"{folder.study_file}: has no space, which its calibration is about")
    try:
        return _picture(draw_heat_map(calibration, load_space(study["space"]), trials=_gains_of(trials)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder.path / CALIBRATION}: not what a calibration has: {error}") from None


def _pasteable(value: object) -> str:
    """As `export` writes it: a schedule as JSON."""
    return json.dumps(value) if isinstance(value, Mapping) else format_number(value, ".6g")


def _gains_of(trials: Sequence[TrialSummary]) -> list[tuple[Verdict, float, float]]:
    """(verdict, gain, max_t) of the trials of the search that have an SSIM loss of constant weight."""
    found = []
    for trial in trials:
        gain, max_t = gain_of(trial.config) if set(TRIPLE) <= set(trial.config) else math.nan, trial.config.get(MAX_T)
        if trial.role is Role.SEARCH and isinstance(max_t, (int, float)) and math.isfinite(gain) and gain > 0:
            found.append((trial.verdict, gain, float(max_t)))
    return found


def _counts(trials: Sequence[TrialSummary]) -> str:
    """`3 safe, 2 pruned, 1 stopped`, of the search."""
    counts = Counter(trial.verdict for trial in trials if trial.role is Role.SEARCH)
    return ", ".join(f"{counts[verdict]} {verdict.replace('_', ' ')}" for verdict in Verdict if counts[verdict])


def _columns(trials: Sequence[TrialSummary], objective: Objective) -> dict[str, str]:
    """Metric → format of the columns with numbers."""
    goals = {goal.name: "+.4f" if goal.is_delta else ".5g" for goal in objective.goals}
    return goals | {name: form for name, form in COLUMNS.items() if any(name in trial.metrics for trial in trials)}


def _in_order(trials: Sequence[TrialSummary], objective: Objective) -> list[TrialSummary]:
    """The search, best first, then baselines and the confirm phase."""
    roles = (Role.SEARCH, Role.BASELINE, Role.CONFIRM)
    return sorted(trials, key=lambda one: (roles.index(one.role), one.verdict.rank, objective.rank(one.metric(objective.name))))


def _row(
    trial: TrialSummary,
    columns: Mapping[str, str],
    log: _Log,
    best: TrialSummary | None,
    place: int,
    reference: str,
    is_front: bool,
) -> Row:
    values = [(trial.metric(name), form) for name, form in columns.items()]
    own, baseline = log.curves.get(trial.trial_id), log.curves.get(reference)
    return Row(
        trial=trial,
        setting="baseline" if trial.role is Role.BASELINE else format_setting(trial.config),
        symbol=SYMBOLS[trial.verdict],
        numbers=[format_number(value, form) if math.isfinite(value) else "–" for value, form in values],
        chosen=log.chosen.get(trial.trial_id, ""),
        curves=draw_curves(own, baseline, _limit(trial)) if own and place < MAX_CURVES else "",
        is_best=best is not None and trial.trial_id == best.trial_id,
        is_front=is_front,
    )


def _baseline_of(trial: TrialSummary, baselines: Sequence[TrialSummary]) -> str:
    """The baseline with the same seed, of the confirm phase for one of its trials; empty if there is none."""
    if trial.role is Role.BASELINE:
        return ""
    same = [one.trial_id for one in baselines if one.seed == trial.seed]
    is_confirmed = trial.role is Role.CONFIRM
    return next((name for name in same if name.startswith("confirm-") == is_confirmed), "")


def _limit(trial: TrialSummary) -> float | None:
    """The norm ratio at which the norm guard ended the trial."""
    evidence = trial.evidence or {}
    return float(evidence["limit"]) if evidence.get("guard") == "norm_ratio" and "limit" in evidence else None


def _sheets(
    folder: StudyFolder, trials: Sequence[TrialSummary], best: TrialSummary | None, objective: Objective
) -> list[SampleSheet]:
    """Baseline, best, then one after the other as in the table; each verdict once before any comes twice."""
    ordered = [one for one in _in_order(trials, objective) if one.role is Role.SEARCH]
    first_of_verdict = list({one.verdict: one for one in reversed(ordered)}.values())
    baselines = [one for one in trials if one.role is Role.BASELINE][:1]
    chosen = [*baselines, *([best] if best else []), *reversed(first_of_verdict), *ordered]
    return sample_sheets(folder, list({one.trial_id: one for one in chosen}.values()))


def _read_events(folder: StudyFolder) -> _Log:
    log = _Log()
    for event in folder.events():
        kind, trial_id = event.get("event"), event.get("trial_id", "")
        if kind == "study":
            log.end = None  # a resumed study runs again
        elif kind == "trial" and event.get("reason"):
            log.chosen[trial_id] = event["reason"]
        elif kind == "end":
            log.end = event.get("reason", "")
    log.curves = curves_of(folder.events())
    return log


def _picture(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
