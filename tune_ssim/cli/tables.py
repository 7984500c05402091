"""Tables for a terminal. Colours always repeat what the text says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tune_ssim.base.files import number
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.results.trial_text import VERDICT_STYLES, format_number, format_setting, metric_label, readable
from tune_ssim.study.space import WEIGHT, Space, gain_of
from tune_ssim.trials.quarantine import Entry
from tune_ssim.trials.summary import OBJECTIVE, TrialSummary

# Minimum terminal width → the columns that fit and leave room for the reason.
COLUMNS = {
    120: ("gain", "weight", "max_t", "grad_scale", "steps", "norm ratio", "objective", "PSNR"),
    72: ("gain", "max_t", "steps", "ratio", "objective", "PSNR"),
    0: ("gain", "objective"),
}
# Columns for a task without an SSIM loss.
OTHER_COLUMNS = {120: ("setting", "steps", "norm ratio", "objective"), 72: ("setting", "steps", "objective"), 0: ("objective",)}
WIDE = 120  # from this width on the reason has its own column
VERDICT_ORDER = list(Verdict)


def trials_table(
    summaries: Iterable[TrialSummary],
    *,
    width: int = WIDE,
    ascii_only: bool = False,
    objective: str = OBJECTIVE,
    winner: str | None = None,
) -> Table:
    """One row per trial, best first, for a terminal of `width` columns. `winner`: the trial_id to mark."""
    wide, summaries = width >= WIDE, list(summaries)
    has_ssim = any(WEIGHT in summary.config for summary in summaries) or not summaries

    def show(text: str) -> str:
        return readable(text, ascii_only)

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("trial", no_wrap=True, overflow="fold")
    names = next(names for min_width, names in (COLUMNS if has_ssim else OTHER_COLUMNS).items() if width >= min_width)
    for name in names:
        heading = metric_label(objective) if name == "objective" else name
        table.add_column(show(heading), justify="left" if name == "setting" else "right", no_wrap=True)
    if wide:
        table.add_column("verdict", no_wrap=True)
        table.add_column("why", overflow="fold", min_width=20)
    else:
        table.add_column("verdict: why", overflow="fold", min_width=10)
    for summary in best_first(summaries, objective):
        config, metrics = summary.config, summary.metrics
        mark = show("★ ") if summary.trial_id == winner else ""
        is_in_name = summary.role is Role.SEARCH or summary.trial_id.startswith(summary.role)
        role = "" if is_in_name else f" {summary.role}"
        cells = {
            "gain": format_number(gain_of(config)),
            "weight": format_number(config.get("ssim_loss_weight")),
            "max_t": format_number(config.get("ssim_loss_max_t")),
            "grad_scale": format_number(config.get("ssim_grad_scale")),
            "steps": str(summary.steps),
            "norm ratio": format_number(metrics.get("norm_ratio_max"), ".3g"),
            "objective": format_number(metrics.get(objective), "+.4f"),
            "PSNR": format_number(metrics.get("psnr"), ".2f"),
            "setting": format_setting(config),
        }
        cells["ratio"] = cells["norm ratio"]
        verdict = Text(summary.verdict.value, VERDICT_STYLES[summary.verdict])
        why = show(summary.reason)
        table.add_row(
            Text(show(f"{mark}{summary.trial_id}{role}"), "bold" if mark else ""),
            *(show(cells[name]) for name in names),
            *((verdict, Text(why)) if wide else (_joined(verdict, why),)),
        )
    return table


def _joined(verdict: Text, why: str) -> Text:
    """`pruned: total_norm is …`. A reason such as "safe to step 200" already begins with the verdict."""
    if why.startswith(verdict.plain):
        return verdict + Text(why[len(verdict) :])
    return verdict + Text(f": {why}" if why else "")


def best_first(summaries: Iterable[TrialSummary], objective: str = OBJECTIVE) -> list[TrialSummary]:
    """Sort key: verdict, then objective. Among equal verdicts a trial without an objective comes last."""

    def key(summary: TrialSummary) -> tuple[int, float]:
        value = summary.metric(objective)
        if math.isnan(value) and summary.role is Role.BASELINE:
            value = 0.0
        return VERDICT_ORDER.index(summary.verdict), math.inf if math.isnan(value) else -value

    return sorted(summaries, key=key)


def quarantine_table(entries: Iterable[Entry], ascii_only: bool = False) -> Table:
    """One row for each ruined checkpoint."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in ("id", "study", "trial", "step"):
        table.add_column(column, no_wrap=True, justify="right" if column == "step" else "left")
    table.add_column("why", overflow="fold", min_width=20)
    for entry in entries:
        cells = (entry.id[:12], entry.study, entry.trial_id, str(entry.step), entry.reason)
        table.add_row(*(Text(readable(cell, ascii_only)) for cell in cells))
    return table


def spaces_table(spaces: Iterable[Space], ascii_only: bool = False) -> Table:
    """One row for each search space, with its stages in order."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("space", no_wrap=True, style="bold")
    table.add_column("stages", overflow="fold")
    table.add_column("description", overflow="fold", ratio=1)
    for space in spaces:
        stages = "" if len(space.stages) == 1 else " → ".join(stage.name for stage in space.stages)
        table.add_row(*(Text(readable(text, ascii_only)) for text in (space.name, stages, space.description)))
    return table


def stages_table(space: Space, ascii_only: bool = False) -> Table:
    """One section for each stage of a search space: what it searches, what it fixes, what it tries first."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("stage", no_wrap=True, style="bold")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    for stage in space.stages:
        rows = [(name, str(domain)) for name, domain in stage.parameters.items()]
        rows += [(name, f"fixed at {_value_text(value)}") for name, value in stage.fixed.items()]
        for index, point in enumerate(stage.points, 1):
            numbers = ", ".join(f"{name} {_value_text(value)}" for name, value in point.items())
            rows.append((f"point {index}", f"{numbers} (gain {format_number(gain_of(point))})"))
        for index, row in enumerate(rows):
            cells = ("" if index else stage.name, *row)
            table.add_row(*(Text(readable(text, ascii_only)) for text in cells), end_section=index == len(rows) - 1)
    return table


def gains_table(calibration: Mapping[str, Any], ascii_only: bool = False) -> Table:
    """One row for each max_t of `Calibration.to_dict()`, with the gains for given ratios of total_norm to the baseline's."""
    gates = calibration["by_max_t"]
    ratios = list(gates[0]["gain_for"])
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", title_justify="left", title_style="bold"
    )
    table.title = "gain that gives a predicted norm ratio of"
    limit = calibration["limit"]
    marked = [f"{ratio}× (limit)" if limit is not None and float(ratio) == limit else f"{ratio}×" for ratio in ratios]
    for heading in ("max_t", "active", "inert below", *marked, "cosine"):
        table.add_column(readable(heading, ascii_only), justify="right", no_wrap=True)
    batches = len(calibration["model"]["batches"])
    for gate in gates:
        gains = [gate["inert_below"], *gate["gain_for"].values()]
        cells = [f"{gate['max_t']:g}", f"{gate['active_batches']}/{batches}"]
        cells += [format_number(gain, ".3g") for gain in gains] + [_measured(gate["cosine"], "+.2f")]
        table.add_row(*(Text(readable(cell, ascii_only)) for cell in cells))
    return table


def predictions_table(calibration: Mapping[str, Any], ascii_only: bool = False) -> Table:
    """One row for each named setting of `Calibration.to_dict()` (the notes' versions, the space's points), with its prediction."""
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", title_justify="left", title_style="bold"
    )
    table.title = "what will happen at step 0"
    table.add_column("setting", no_wrap=True)
    for heading in ("gain", "max_t", "norm ratio", "to main loss", "SSIM share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("prospects", overflow="fold")
    for named in calibration["settings"]:
        predicted = named["prediction"]
        shares = [_measured(predicted["ratio"], ".4g"), _measured(predicted["ratio_main"], ".4g")]
        shares.append(_measured(predicted["auxiliary_share"], ".2%"))
        cells = [named["name"], f"{predicted['gain']:.4g}", f"{predicted['max_t']:g}", *shares, named["judgement"]]
        table.add_row(*(Text(readable(cell, ascii_only)) for cell in cells))
    return table


def calibration_sentences(calibration: Mapping[str, Any]) -> list[str]:
    """The rest of `Calibration.to_dict()` as sentences, most important first."""
    low, high = (number(ratio) for ratio in calibration["ratios"])
    shares = {name: number(share) for name, share in calibration["shares"].items()}
    sentences = [f"{f['sentence']}; {f['remedy']}" if f["remedy"] else f["sentence"] for f in calibration["findings"]]
    space = f"the space pushes {low:.3g} to {high:.3g} times the baseline's total_norm: {shares['inert']:.0%} of it is inert"
    if calibration["limit"] is not None:
        space += f", {shares['beyond_limit']:.0%} above the norm guard's limit {calibration['limit']:g}"
    if calibration["skip_above"] is not None:
        space += f", {shares['skipped']:.0%} above {calibration['skip_above']:g} and not launched"
    sentences += [space, f"the baseline itself pushes {calibration['baseline_ratio_main']:.3g} times the main loss"]
    gradients = calibration["gradient_at_decoder"] or {}
    if {"ssim", "pixel"} <= set(gradients):
        ssim, pixel = ({name: number(value) for name, value in gradients[loss].items()} for loss in ("ssim", "pixel"))
        sentences.append(
            f"at the decoder's output the SSIM gradient is {ssim['rms'] / pixel['rms']:.3g} times the pixel loss's; "
            f"its peak is {ssim['peak_over_rms']:.3g} rms (pixel {pixel['peak_over_rms']:.3g}), and 1 % of the elements carry "
            f"{ssim['top_share']:.0%} of its squared norm (pixel {pixel['top_share']:.0%})"
        )
    check, error = calibration["check"], number(calibration["check"]["relative_error"])
    how = f"{calibration['method']}: {calibration['why']}"
    sentences.append(f"{len(check['steps'])} training steps checked it: off by at most {error:.1g} ({how})")
    if calibration["dropped_batches"]:
        sentences.append(f"batches left out, since a norm is not finite: {', '.join(map(str, calibration['dropped_batches']))}")
    sentences.append(f"took {calibration['wall_s']:.1f} s, {calibration['share_of_study']:.1%} of what the search's training takes")
    return sentences


CHECK_STYLES = {"ok": "green", "unknown": "dim", "warn": "yellow", "bad_setup": "bold magenta"}


def preflight_table(report: Mapping[str, Any], ascii_only: bool = False) -> Table:
    """One row for each check of preflight's `Report.to_dict()`, with the remedy below a warning or fault."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("check", no_wrap=True, overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("what was measured", overflow="fold", ratio=1)
    for check in report["checks"]:
        text = readable(check["sentence"], ascii_only)
        if check["remedy"] and check["status"] in ("warn", "bad_setup"):
            text += f"\n{readable(check['remedy'], ascii_only)}"
        table.add_row(Text(readable(check["name"], ascii_only)), Text(check["status"], CHECK_STYLES[check["status"]]), Text(text))
    return table


def _measured(value: Any, form: str) -> str:
    """A number, or a dash if it is NaN or the string "NaN", that is, not measured."""
    return format_number(None if math.isnan(number(value)) else number(value), form)


def _value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
