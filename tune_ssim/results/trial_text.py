"""A trial's summary in words and numbers, for the live table, the reports and the messages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from tune_ssim.guards.keep_rule import SHOWN_NAMES
from tune_ssim.study.space import GAIN, WEIGHT, gain_of
from tune_ssim.trials.summary import TrialSummary

# Best verdict first.
STYLES = {
    "safe": "green",
    "degraded": "yellow",
    "stopped": "cyan",
    "pruned": "red",
    "bad_setup": "bold magenta",
    "error": "bold red",
}
# What reasons and headings hold beyond ASCII, for a terminal that cannot show it.
PLAIN = str.maketrans(
    {"Δ": "d", "≥": ">=", "≤": "<=", "×": "x", "·": "*", "…": "...", "–": "-", "—": "-", "−": "-", "★": "*", "→": "->"}
    | {"±": "+-", "’": "'", "“": '"', "”": '"', "σ": "sigma", "μ": "mu"}
)


def verdict_line(summary: TrialSummary, ascii_only: bool = False) -> Text:
    """A trial that has ended, in one line."""
    objective = summary.objective
    delta = summary.metric(objective)
    what = setting_text(summary.config) if summary.role == "search" else summary.role
    found = f"  {shown_metric(objective)} {delta:+.4f}" if math.isfinite(delta) and summary.role != "baseline" else ""
    return Text.assemble(
        (f"{summary.verdict:<9}", STYLES.get(summary.verdict, "")),
        (f" {readable(summary.trial_id, ascii_only)}", "bold"),
        readable(f"  {what}{found}", ascii_only),
        (readable(f"  {summary.reason}", ascii_only), "dim"),
    )


def proof_line(proof: Mapping[str, Any]) -> str:
    """confirmed with 3 new seeds, 400 steps each: ΔSSIM +0.0042 [+0.0031, +0.0053] (95 %)"""
    if proof["unproven"]:
        return f"unproven: {'; '.join(proof['unproven'])}"
    found = proof["comparison"].get(proof["objective"])
    text = f"confirmed with {len(proof['seeds'])} new seeds, {proof['horizon']['steps']} steps each"
    if found and found["interval"]:
        name = shown_metric(proof["objective"])
        low, high = found["interval"]
        text += f": {name} {found['mean']:+.4f} [{low:+.4f}, {high:+.4f}] ({100 * found['level']:.0f} %)"
    return text


def shown_metric(name: str) -> str:
    """ΔSSIM for delta_ssim, Δelbo for delta_elbo"""
    short = name.removeprefix("delta_")
    return ("Δ" if short != name else "") + SHOWN_NAMES.get(short, short)


def setting_text(config: Mapping[str, Any]) -> str:
    """gain 30 @ 0.3; of a task without an SSIM loss every setting by its name"""
    if GAIN not in config and WEIGHT not in config:
        return ", ".join(f"{name} {number_text(value)}" for name, value in config.items())
    return f"gain {number_text(gain_of(config))} @ {number_text(config.get('ssim_loss_max_t'))}"


def number_text(value: Any, form: str = ".4g") -> str:
    """A number to read; a dash where it was not measured; NaN and Infinity by name."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return format(value, form)


def readable(text: str, ascii_only: bool = False) -> str:
    """One line without control characters (names and reasons come from files), in ASCII if need be."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text.translate(PLAIN).encode("ascii", "replace").decode() if ascii_only else text
