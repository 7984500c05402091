"""The best safe setting of a study, and the forms in which a training script can take it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import jsonable
from tune_ssim.guards import KeepRule
from tune_ssim.guards.verdict import Verdict
from tune_ssim.results.proof import CALIBRATION, PREFLIGHT, comparison, margins, read_json, read_provenance, seals
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.space import gain_of
from tune_ssim.trials.summary import OBJECTIVE, TrialSummary
from tune_ssim.version import __version__

FORMATS = ("yaml", "json", "env", "args")
SETTINGS = ("ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale")  # always exported, always first
DERIVED = ("gain", "seed")  # not settings of the loss: weight * grad_scale, and what the trial was seeded with
EXPORTED_ROLES = ("search", "confirm")

# Variables that a shell reads itself. A parameter of that name would break the shell that sources the lines.
SHELL_VARIABLES = {"PATH", "IFS", "HOME", "ENV", "CDPATH", "PWD", "OLDPWD", "PS1", "PS2", "PS4", "SHELL", "TERM", "UID"}
SHELL_PREFIXES = ("LC_", "LD_", "BASH", "PYTHON")


class NoSafeTrial(UserError):
    """The study holds nothing that may be exported; the message counts the verdicts and names the nearest miss."""


def best_safe(
    study: StudyFolder | Path | str | Iterable[TrialSummary], *, objective: str | None = None, where: str = "this study"
) -> TrialSummary:
    """The safe trial with the largest objective that the confirm phase has not refuted.

    `study`: a study's folder, its path, or summaries. `objective`: a metric's name; without it `objective.maximize` of
    the folder's study.yaml, else `delta_ssim`. What qualifies: see `ranked`. Where there was a confirm phase, only a
    setting that held there does: all its trials safe, and a mean objective above zero. Of equals the earlier one wins.

    Raises NoSafeTrial if nothing qualifies, and also if the best delta is not above zero: a setting that does not
    beat the baseline is no winner.
    """
    if isinstance(study, (str, Path)):
        study = StudyFolder(Path(study))
    if isinstance(study, StudyFolder):
        where, objective = study.name, objective or objective_of(study)
        summaries = study.trials()
    else:
        summaries, objective = list(study), objective or OBJECTIVE
    tried = [summary for summary in summaries if summary.role in EXPORTED_ROLES]
    candidates = _safe(summaries, objective)
    if not candidates:
        raise NoSafeTrial(f"{where}: no safe trial to export: {_why_none(tried, objective)}")
    best = candidates[0]
    if objective.startswith("delta_") and best.metric(objective) <= 0:
        raise NoSafeTrial(
            f"{where}: no setting beats the baseline: the best of {len(candidates)} safe trials, {best.trial_id}, "
            f"has {objective} {best.metric(objective):+.4g}; search larger gains, or keep the pixel loss"
        )
    if not any(summary.role == "confirm" for summary in summaries):
        return best
    held = [summary for summary in ranked(summaries, objective) if holds(confirmations(summary, summaries), objective)]
    if not held:
        words = "; ".join(
            _why_not_held(summary, summaries, objective) for summary in candidates if confirmations(summary, summaries)
        )
        raise NoSafeTrial(f"{where}: no finalist held in the confirm phase: {words}")
    return held[0]


def ranked(summaries: Iterable[TrialSummary], objective: str = OBJECTIVE) -> list[TrialSummary]:
    """Trials of the search that may win, the best first, each setting once.

    A trial qualifies if its verdict is `safe` (the margins of `objective.keep` are part of the verdict: a trial beyond
    them is `degraded`), its objective is finite and, where it is a difference to the baseline, above zero, and no other
    trial of the same setting was pruned or degraded."""
    return [
        summary for summary in _safe(summaries, objective) if summary.metric(objective) > 0 or not objective.startswith("delta_")
    ]


def _safe(summaries: Iterable[TrialSummary], objective: str) -> list[TrialSummary]:
    tried = [summary for summary in summaries if summary.role in EXPORTED_ROLES]
    searched = [summary for summary in tried if summary.role == "search"] or tried
    refuted = {setting_key(summary.config) for summary in searched if summary.verdict.speaks_against_setting}
    found: dict[str, TrialSummary] = {}
    for summary in sorted(searched, key=lambda s: -s.metric(objective) if math.isfinite(s.metric(objective)) else math.inf):
        key = setting_key(summary.config)
        if summary.verdict == "safe" and math.isfinite(summary.metric(objective)) and key not in refuted:
            found.setdefault(key, summary)
    return list(found.values())


def confirmations(summary: TrialSummary, summaries: Iterable[TrialSummary]) -> list[TrialSummary]:
    """The trials of the confirm phase that ran `summary`'s setting."""
    key = setting_key(summary.config)
    return [other for other in summaries if other.role == "confirm" and setting_key(other.config) == key]


def holds(confirmed: Sequence[TrialSummary], objective: str = OBJECTIVE) -> bool:
    """Whether at least two further trials of a setting were all safe and beat the baseline on average."""
    if len(confirmed) < 2 or any(trial.verdict != "safe" for trial in confirmed):
        return False
    return not objective.startswith("delta_") or fmean(trial.metric(objective) for trial in confirmed) > 0


def _why_not_held(summary: TrialSummary, summaries: Iterable[TrialSummary], objective: str) -> str:
    confirmed = confirmations(summary, summaries)
    failed = next((trial for trial in confirmed if trial.verdict != "safe"), None)
    if failed is not None:
        return f"{summary.trial_id} with seed {failed.seed} is {failed.verdict}: {failed.reason}"
    mean = fmean(trial.metric(objective) for trial in confirmed)
    return f"{summary.trial_id} has {objective} {mean:+.4g} over {len(confirmed)} seeds"


def objective_of(folder: StudyFolder) -> str:
    """The metric that the study maximises; `delta_ssim` if its study.yaml does not say."""
    return str(study_value(folder, "objective", "maximize") or OBJECTIVE)


def study_value(folder: StudyFolder, *keys: str) -> Any:
    """One value of the study.yaml as resolved, or None. Reads no more than it must: an old study still exports."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value = YAML(typ="safe", pure=True).load(folder.study_file)
        for key in keys:
            value = value[key]
        return value
    except (OSError, YAMLError, KeyError, TypeError, UnicodeDecodeError):
        return None


def study_mapping(folder: StudyFolder) -> dict[str, Any]:
    """The study.yaml as resolved; empty if it cannot be read."""
    found = study_value(folder)
    return found if isinstance(found, dict) else {}


def setting_key(config: Mapping[str, Any]) -> str:
    """Equal for two trials that train alike: (weight, grad_scale) act only through their product (SEEDS B6)."""
    others = {key: value for key, value in config.items() if key not in (*DERIVED, "ssim_loss_weight", "ssim_grad_scale")}
    return json.dumps(jsonable({**others, "gain": f"{gain_of(config):.9g}"}), sort_keys=True, default=str)


def settings_of(summary: TrialSummary) -> dict[str, Any]:
    """What a training script must be given: the three numbers of an SSIM loss, then whatever else the configuration sets."""
    config = summary.config
    return {key: config[key] for key in SETTINGS if key in config} | {
        key: value for key, value in config.items() if key not in (*SETTINGS, *DERIVED)
    }


def experiment_name(summary: TrialSummary, study_name: str) -> str:
    """A new name for every setting and horizon, so that auto-resume cannot pick up another's checkpoint (SEEDS A10)."""
    text = json.dumps(jsonable([settings_of(summary), summary.horizon]), sort_keys=True, default=str)
    name = f"{study_name}-{summary.trial_id}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("-.")  # it becomes a folder, and a word of a command line


def exported_config(summary: TrialSummary, folder: StudyFolder) -> dict[str, Any]:
    """What `tune-ssim export` writes: plain JSON values, the three numbers at the top level of `config`, and the proof."""
    trials = folder.trials()
    baselines = [trial for trial in trials if trial.role == "baseline"]
    exported: dict[str, Any] = jsonable(
        {
            "study": folder.name,
            "trial_id": summary.trial_id,
            "exp_name": experiment_name(summary, folder.name),
            "config": settings_of(summary),
            "gain": gain_of(summary.config),
            "verdict": summary.verdict.value,
            "horizon": summary.horizon,
            "reason": summary.reason,
            "steps": summary.steps,
            "metrics": summary.metrics,
            "baseline": [{key: vars(trial)[key] for key in ("trial_id", "seed", "steps", "metrics")} for trial in baselines],
            "proof": proof_of(summary, folder),
            "exported_with": versions(),
        }
    )
    return exported | {"seals": seals(exported)}


def versions() -> dict[str, str | None]:
    return {"tune-ssim": __version__} | {name: _version(name) for name in ("torch", "ray", "optuna")}


def proof_of(summary: TrialSummary, folder: StudyFolder) -> dict[str, Any]:
    """What the setting of `summary` rests on. `unproven` says what is missing; nothing there means that it is proven."""
    trials = folder.trials()
    confirmed = confirmations(summary, trials)
    baselines = [trial for trial in trials if trial.role == "baseline"]
    provenance = read_provenance(folder)
    study = study_mapping(folder)
    objective = objective_of(folder)
    unproven = []
    if not holds(confirmed, objective):
        unproven.append("it was not confirmed with further seeds")
    if provenance is None:
        unproven.append("the study recorded no hashes of its code, weights and data")
    guards = study.get("guards") or {}
    limits = {"norm_ratio_max": (guards.get("norm_ratio") or {}).get("limit"), "smoke_used_max": 1.0}
    rules = [KeepRule(metric, **limit) for metric, limit in ((study.get("objective") or {}).get("keep") or {}).items()]
    return {
        "confirmed": not unproven,
        "unproven": unproven,
        "trials": [trial.trial_id for trial in confirmed],
        "seeds": [trial.seed for trial in confirmed],
        "horizon": confirmed[0].horizon if confirmed else None,
        "objective": objective,
        "comparison": comparison(confirmed),
        "margins": margins(confirmed, baselines, {name: limit for name, limit in limits.items() if limit}, rules),
        "switched_off": [name for name in ("preflight", "calibration", "confirm") if name in study and study[name] is None],
        "preflight": read_json(folder.path / PREFLIGHT),
        "calibration": read_json(folder.path / CALIBRATION),
        "setting": settings_of(summary),
        "study": study,
        "provenance": provenance,
    }


def format_export(exported: Mapping[str, Any], form: str) -> str:
    """`exported_config` as text that ends in a newline. `form`: yaml, json, env or args.

    Numbers are written with `repr`, so that reading them back gives the very same float. In env and args a null is an
    option that is not given. Raises UserError for a parameter that the form cannot carry.
    """
    if form == "json":
        return json.dumps(exported, indent=2, allow_nan=False) + "\n"
    if form == "yaml":
        return _yaml(exported)
    if form == "env":
        return _env_lines(exported)
    if form == "args":
        return _arguments(exported["config"]) + "\n"
    raise UserError(f"format {form!r} is not one of {', '.join(FORMATS)}")


def _yaml(exported: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = False, False, 4096  # type: ignore[assignment]
    # Readers of YAML 1.1 (PyYAML) and 1.2 must agree: to the former 1e-05 is a string and `no` is False.
    yaml.representer.add_representer(float, lambda to, value: to.represent_scalar(_FLOAT, _dotted(repr(value))))
    yaml.representer.add_representer(str, lambda to, text: to.represent_scalar(_STR, text, style=_quotes(text)))
    stream = io.StringIO()
    yaml.dump(dict(exported), stream)
    return stream.getvalue()


_FLOAT, _STR = "tag:yaml.org,2002:float", "tag:yaml.org,2002:str"


def _quotes(text: str) -> str | None:
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_ .,/()-]*", text) and not text.endswith(" ")
    return None if plain and not re.fullmatch(r"(?i)y|n|yes|no|on|off|true|false|null", text) else '"'


def _dotted(text: str) -> str:
    """1e-05 -> 1.0e-05"""
    return re.sub(r"^(-?\d+)e", r"\1.0e", text)


def _env_lines(exported: Mapping[str, Any]) -> str:
    lines: dict[str, str] = {}
    for key, value in exported["config"].items():
        if value is None:
            continue
        name = key.upper()  # ssim_grad_scale -> SSIM_GRAD_SCALE, as the notes' scripts call it
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) or name in SHELL_VARIABLES or name.startswith(SHELL_PREFIXES):
            raise UserError(f"parameter {key!r} cannot be a shell variable; use --format args, json or yaml")
        if name in lines or name == "EXP_NAME":
            raise UserError(f"parameter {key!r}: the shell variable {name} is taken; use --format args, json or yaml")
        lines[name] = _word(key, value)
    lines["EXP_NAME"] = exported["exp_name"]
    missing = exported.get("proof", {}).get("unproven") or []
    head = f"# UNPROVEN: {'; '.join(missing)}\n" if missing else ""
    return head + "".join(f"{name}={shlex.quote(value)}\n" for name, value in lines.items())


def _arguments(config: Mapping[str, Any]) -> str:
    words: list[str] = []
    for key, value in config.items():
        if value is None:
            continue
        word = _word(key, value)
        # argparse takes "-1e-05" for an option unless it is tied to its own.
        words += [f"--{key}={word}"] if word.startswith("-") else [f"--{key}", word]
    return shlex.join(words)


def _word(key: str, value: Any) -> str:
    """One word of a command line. Lists and tables have no agreed form there."""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        if "\0" in value:
            raise UserError(f"parameter {key!r} contains a NUL character; use --format json or yaml")
        return value
    if isinstance(value, (int, float)):
        return repr(value)
    raise UserError(f"parameter {key!r} is a {type(value).__name__}; use --format json or yaml")


def _why_none(tried: list[TrialSummary], objective: str) -> str:
    if not tried:
        return "no trial of the search has ended"
    counts = Counter(summary.verdict for summary in tried)
    parts = [", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())]
    if counts[Verdict.SAFE]:
        parts.append(f"the safe ones have no finite {objective}, or another trial of the same setting was ruined")
    measured = [summary for summary in tried if math.isfinite(summary.metric(objective))]
    nearest = max(measured or tried, key=lambda summary: summary.metric(objective) if measured else summary.steps)
    parts.append(f"nearest miss {nearest.trial_id} ({nearest.verdict}): {nearest.reason}")
    return "; ".join(parts)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
