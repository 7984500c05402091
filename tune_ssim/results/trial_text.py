"""A trial's summary as text, for the live table, the reports and the messages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich.text import Text

from tune_ssim.guards.keep_rule import DISPLAY_NAMES
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.study.objective import DELTA, Objective
from tune_ssim.study.space import GAIN, WEIGHT, gain_of
from tune_ssim.study.weight_schedule import schedule_text
from tune_ssim.trials.summary import TrialSummary

VERDICT_STYLES = {
    Verdict.SAFE: "green",
    Verdict.DEGRADED: "yellow",
    Verdict.STOPPED: "cyan",
    Verdict.PRUNED: "red",
    Verdict.BAD_SETUP: "bold magenta",
    Verdict.ERROR: "bold red",
}
# ASCII replacements for other characters in reasons and headings.
ASCII = str.maketrans(
    {"Δ": "d", "≥": ">=", "≤": "<=", "×": "x", "·": "*", "…": "...", "–": "-", "—": "-", "−": "-", "★": "*", "◆": "o", "→": "->"}
    | {"±": "+-", "’": "'", "“": '"', "”": '"', "σ": "sigma", "μ": "mu"}
)


def verdict_line(summary: TrialSummary, ascii_only: bool = False) -> Text:
    """One line about a trial that has ended."""
    value = summary.metric(summary.objective)
    what = format_setting(summary.config) if summary.role is Role.SEARCH else summary.role
    is_shown = math.isfinite(value) and summary.role is not Role.BASELINE
    result = f"  {metric_label(summary.objective)} {format_objective(summary.objective, value)}" if is_shown else ""
    return Text.assemble(
        (f"{summary.verdict:<9}", VERDICT_STYLES[summary.verdict]),
        (f" {readable(summary.trial_id, ascii_only)}", "bold"),
        readable(f"  {what}{result}", ascii_only),
        (readable(f"  {summary.reason}", ascii_only), "dim"),
    )


def warning_lines(summaries: Iterable[TrialSummary]) -> list[str]:
    """One line for each kind of warning, with the trials that have it. Warnings that differ only in numbers are of one kind."""
    kinds: dict[str, tuple[str, list[str]]] = {}
    for summary in summaries:
        for warning in summary.warnings:
            kind = re.sub(r"[-+.\de]*\d", "#", warning)
            kinds.setdefault(kind, (warning, []))[1].append(summary.trial_id)
    lines = []
    for warning, trials in kinds.values():
        trials = list(dict.fromkeys(trials))
        more = f" and {len(trials) - 1} more" if len(trials) > 1 else ""
        lines.append(f"{trials[0]}{more}: {warning}")
    return lines


def proof_line(proof: Mapping[str, Any]) -> str:
    """`confirmed with 3 new seeds, 400 steps each: ΔSSIM +0.0042 [+0.0031, +0.0053] (95 %)`"""
    if proof["unproven"]:
        return f"unproven: {'; '.join(proof['unproven'])}"
    objective = Objective.of(proof["objective"], proof.get("direction", "maximize"))
    found = proof["comparison"].get(objective.delta)
    text = f"confirmed with {len(proof['seeds'])} new seeds, {proof['horizon']['steps']} steps each"
    if found and found["interval"]:
        name = metric_label(objective.delta)
        low, high = found["interval"]
        text += f": {name} {found['mean']:+.4f} [{low:+.4f}, {high:+.4f}] ({100 * found['level']:.0f} %)"
        if images := found.get("images"):
            text += f", {_of_images(images)}"
    return text


def _of_images(found: Mapping[str, Any]) -> str:
    """What `intervals.paired_on_images` found."""
    if found["n"] == 1:
        return "all on one held-out image"
    low, high = found["interval"]
    return f"over {found['n']} held-out images as well [{low:+.4f}, {high:+.4f}]"


def metric_label(name: str) -> str:
    """`ΔSSIM` for delta_ssim, `Δelbo` for delta_elbo."""
    short = name.removeprefix("delta_")
    return ("Δ" if short != name else "") + DISPLAY_NAMES.get(short, short)


def format_setting(config: Mapping[str, Any]) -> str:
    """`gain 30 @ 0.3`; for a training without an SSIM loss, all settings by name."""
    if GAIN not in config and WEIGHT not in config:
        return ", ".join(f"{name} {format_number(value)}" for name, value in config.items())
    weight = config.get(WEIGHT)
    push = schedule_text(weight) if isinstance(weight, Mapping) else f"gain {format_number(gain_of(config))}"
    return f"{push} @ {format_number(config.get('ssim_loss_max_t'))}"


def format_objective(name: str, value: Any) -> str:
    """A difference with its sign; the number itself otherwise."""
    return format_number(value, "+.4f" if name.startswith(DELTA) else ".5g")


def format_number(value: Any, form: str = ".4g") -> str:
    """A number as text; a dash if it was not measured; NaN and Infinity by name."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return schedule_text(value)
    return format(value, form)


def readable(text: str, ascii_only: bool = False) -> str:
    """One line without control characters, since names and reasons come from files; ASCII if `ascii_only`."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text.translate(ASCII).encode("ascii", "replace").decode() if ascii_only else text
