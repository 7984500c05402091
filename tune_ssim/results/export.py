"""Export of a setting for a training script: YAML, JSON, shell variables, command-line arguments."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import jsonable
from tune_ssim.guards.verdict import Role
from tune_ssim.results.proof import proof_of, require_unchanged, seals
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.space import WEIGHT
from tune_ssim.trials.summary import TrialSummary
from tune_ssim.version import __version__

FORMATS = ("yaml", "json", "env", "args")

# Variables with a meaning to the shell. A parameter of that name would break a shell that sources the lines.
SHELL_VARIABLES = {"PATH", "IFS", "HOME", "ENV", "CDPATH", "PWD", "OLDPWD", "PS1", "PS2", "PS4", "SHELL", "TERM", "UID"}
SHELL_PREFIXES = ("LC_", "LD_", "BASH", "PYTHON")


def experiment_name(summary: TrialSummary, study_name: str) -> str:
    """A unique name for each setting and horizon, so that a script that resumes by name finds no other checkpoint (SEEDS A10)."""
    text = json.dumps(jsonable([summary.settings, summary.horizon]), sort_keys=True, default=str)
    name = f"{study_name}-{summary.trial_id}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("-.")  # it becomes a folder's name and an argument


def exported_config(summary: TrialSummary, folder: StudyFolder) -> dict[str, Any]:
    """What `tune-ssim export` writes, as plain JSON values: the setting in `config`, its result, and the proof.

    Raises UserError if the proof's files were changed."""
    require_unchanged(folder)
    trials = folder.trials()
    baselines = [trial for trial in trials if trial.role is Role.BASELINE]
    exported: dict[str, Any] = jsonable(
        {
            "study": folder.name,
            "trial_id": summary.trial_id,
            "exp_name": experiment_name(summary, folder.name),
            "config": summary.settings,
            "gain": None if math.isnan(summary.gain) else summary.gain,  # of an adaptive weight there is none
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


def format_export(exported: Mapping[str, Any], format: str) -> str:
    """`exported_config` as text that ends in a newline. `format`: yaml, json, env or args.

    Numbers are written with `repr`, so that reading them back gives the very same float. In env and args a null
    parameter is left out. Raises UserError for a parameter that the format cannot express.
    """
    if format == "json":
        return json.dumps(exported, indent=2, allow_nan=False) + "\n"
    if format == "yaml":
        from tune_ssim.base.yaml_source import dump_yaml

        return dump_yaml(exported, for_any_reader=True)
    if format == "env":
        return _env_lines(exported)
    if format == "args":
        return _arguments(exported["config"]) + "\n"
    raise UserError(f"format {format!r} is not one of {', '.join(FORMATS)}")


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
        lines[name] = _argument(key, value)
    lines["EXP_NAME"] = exported["exp_name"]
    missing = exported.get("proof", {}).get("unproven") or []
    head = f"# UNPROVEN: {'; '.join(missing)}\n" if missing else ""
    return head + "".join(f"{name}={shlex.quote(value)}\n" for name, value in lines.items())


def _arguments(config: Mapping[str, Any]) -> str:
    words: list[str] = []
    for key, value in config.items():
        if value is None:
            continue
        word = _argument(key, value)
        # argparse takes "-1e-05" for an option unless it is joined with "=".
        words += [f"--{key}={word}"] if word.startswith("-") else [f"--{key}", word]
    return shlex.join(words)


def _argument(key: str, value: Any) -> str:
    """One value as text; a schedule of the weight as JSON. Raises UserError for lists and other mappings, which have no standard
    form."""
    if key == WEIGHT and isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        if "\0" in value:
            raise UserError(f"parameter {key!r} contains a NUL character; use --format json or yaml")
        return value
    if isinstance(value, (int, float)):
        return repr(value)
    raise UserError(f"parameter {key!r} is a {type(value).__name__}; use --format json or yaml")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
