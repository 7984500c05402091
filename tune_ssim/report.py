"""Tables of a study for people: rich renderables that say in words whatever they say in colour."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tune_ssim.quarantine import Entry
from tune_ssim.space import Space, gain_of
from tune_ssim.study_folder import TrialSummary
from tune_ssim.trial_text import STYLES, metric_of, number_text, readable
from tune_ssim.winner import OBJECTIVE

# What fits into so many columns and leaves room for the reason.
COLUMNS = {
    120: ("gain", "weight", "max_t", "grad_scale", "steps", "norm ratio", "ΔSSIM", "PSNR"),
    72: ("gain", "max_t", "steps", "ratio", "ΔSSIM", "PSNR"),
    0: ("gain", "ΔSSIM"),
}
WIDE = 120  # from here on the reason has a column of its own
ORDER = tuple(STYLES)  # of verdicts, best first


def trials_table(
    summaries: Iterable[TrialSummary],
    *,
    width: int = WIDE,
    ascii_only: bool = False,
    objective: str = OBJECTIVE,
    winner: str | None = None,
) -> Table:
    """One row a trial, the best first, for a terminal of `width` columns. `winner`: the trial_id to mark."""
    wide = width >= WIDE

    def show(text: str) -> str:
        return readable(text, ascii_only)

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("trial", no_wrap=True, overflow="fold")
    names = next(names for least, names in COLUMNS.items() if width >= least)
    for name in names:
        table.add_column(show(name), justify="right", no_wrap=True)
    if wide:
        table.add_column("verdict", no_wrap=True)
        table.add_column("why", overflow="fold", min_width=20)
    else:
        table.add_column("verdict: why", overflow="fold", min_width=10)
    for summary in best_first(summaries, objective):
        config, metrics = summary["config"], summary["metrics"]
        mark = show("★ ") if summary["trial_id"] == winner else ""
        told = summary["role"] == "search" or summary["trial_id"].startswith(summary["role"])
        role = "" if told else f" {summary['role']}"
        cells = {
            "gain": number_text(gain_of(config)),
            "weight": number_text(config.get("ssim_loss_weight")),
            "max_t": number_text(config.get("ssim_loss_max_t")),
            "grad_scale": number_text(config.get("ssim_grad_scale")),
            "steps": str(summary["steps"]),
            "norm ratio": number_text(metrics.get("norm_ratio_max"), ".3g"),
            "ΔSSIM": number_text(metrics.get("delta_ssim"), "+.4f"),
            "PSNR": number_text(metrics.get("psnr"), ".2f"),
        }
        cells["ratio"] = cells["norm ratio"]
        verdict = Text(summary["verdict"], STYLES.get(summary["verdict"], ""))
        why = show(summary["reason"])
        table.add_row(
            Text(show(f"{mark}{summary['trial_id']}{role}"), "bold" if mark else ""),
            *(show(cells[name]) for name in names),
            *((verdict, Text(why)) if wide else (_joined(verdict, why),)),
        )
    return table


def _joined(verdict: Text, why: str) -> Text:
    """pruned: total_norm is …; "safe to step 200" says its verdict itself."""
    if why.startswith(verdict.plain):
        return verdict + Text(why[len(verdict) :])
    return verdict + Text(f": {why}" if why else "")


def best_first(summaries: Iterable[TrialSummary], objective: str = OBJECTIVE) -> list[TrialSummary]:
    """By verdict, then by objective; a trial without one comes last of its verdict."""

    def key(summary: TrialSummary) -> tuple[int, float]:
        value = metric_of(summary, objective)
        verdict = summary["verdict"]
        if math.isnan(value) and summary["role"] == "baseline":
            value = 0.0
        return ORDER.index(verdict) if verdict in ORDER else len(ORDER), math.inf if math.isnan(value) else -value

    return sorted(summaries, key=key)


def quarantine_table(entries: Iterable[Entry], ascii_only: bool = False) -> Table:
    """One row a ruined checkpoint."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in ("id", "study", "trial", "step"):
        table.add_column(column, no_wrap=True, justify="right" if column == "step" else "left")
    table.add_column("why", overflow="fold", min_width=20)
    for entry in entries:
        cells = (entry.id[:12], entry.study, entry.trial_id, str(entry.step), entry.reason)
        table.add_row(*(Text(readable(cell, ascii_only)) for cell in cells))
    return table


def spaces_table(spaces: Iterable[Space], ascii_only: bool = False) -> Table:
    """One row a search space: its stages in their order and what it searches."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("space", no_wrap=True, style="bold")
    table.add_column("stages", overflow="fold")
    table.add_column("description", overflow="fold", ratio=1)
    for space in spaces:
        stages = "" if len(space.stages) == 1 else " → ".join(stage.name for stage in space.stages)
        table.add_row(*(Text(readable(text, ascii_only)) for text in (space.name, stages, space.description)))
    return table


def stages_table(space: Space, ascii_only: bool = False) -> Table:
    """A search space in detail: one section a stage, with what it searches, what it fixes and what it tries first."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("stage", no_wrap=True, style="bold")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    for stage in space.stages:
        rows = [(name, str(domain)) for name, domain in stage.parameters.items()]
        rows += [(name, f"fixed at {_value_text(value)}") for name, value in stage.fixed.items()]
        for index, point in enumerate(stage.points, 1):
            numbers = ", ".join(f"{name} {_value_text(value)}" for name, value in point.items())
            rows.append((f"point {index}", f"{numbers} (gain {number_text(gain_of(point))})"))
        for index, row in enumerate(rows):
            cells = ("" if index else stage.name, *row)
            table.add_row(*(Text(readable(text, ascii_only)) for text in cells), end_section=index == len(rows) - 1)
    return table


def _value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
