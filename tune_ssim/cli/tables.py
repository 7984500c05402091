"""Tables for a terminal. Colours always repeat what the text says."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from tune_ssim.base.files import number
from tune_ssim.cli.plain_table import PlainTable
from tune_ssim.guards.verdict import Role
from tune_ssim.results.trial_text import VERDICT_STYLES, format_number, format_objective, format_setting, metric_label, readable
from tune_ssim.study.domains import value_text
from tune_ssim.study.objective import DEFAULT_OBJECTIVE, Objective
from tune_ssim.study.space import WEIGHT, Space, gain_of
from tune_ssim.trials.quarantine import Entry
from tune_ssim.trials.summary import TrialSummary

# Minimum terminal width → the columns that fit and leave room for the reason.
COLUMNS = {
    120: ("gain", "weight", "max_t", "grad_scale", "steps", "norm ratio", "objective", "PSNR"),
    72: ("gain", "max_t", "steps", "ratio", "objective", "PSNR"),
    0: ("gain", "objective"),
}
# Columns for a task without an SSIM loss.
OTHER_COLUMNS = {120: ("setting", "steps", "norm ratio", "objective"), 72: ("setting", "steps", "objective"), 0: ("objective",)}
MEASURED = {"norm ratio": "norm_ratio_max", "ratio": "norm_ratio_max", "PSNR": "psnr"}  # columns that need a metric
FRONT = "◆"  # mark of a trial on the Pareto front
WIDE = 120  # from this width on the reason has its own column


def trials_table(
    summaries: Iterable[TrialSummary],
    *,
    width: int = WIDE,
    ascii_only: bool = False,
    objective: Objective = DEFAULT_OBJECTIVE,
    winner: str | None = None,
    front: Collection[str] = (),
    most: int | None = None,
) -> Table:
    """One row per trial, best first, for a terminal of `width` columns. `winner`: the trial_id to mark. `front`: those on the
    Pareto front. most: rows at most."""
    wide, summaries = width >= WIDE, list(summaries)
    table = PlainTable(ascii_only).columns_of("trial", overflow="fold")
    names, goals = _columns(summaries, width, objective), [goal.name for goal in objective.goals]
    for name in names:
        table.columns_of(metric_label(name) if name in goals else name, justify="left" if name == "setting" else "right")
    if wide:
        table.columns_of("verdict").text_of("why", min_width=20)
    else:
        table.text_of("verdict: why", min_width=10)
    for summary in best_first(summaries, objective)[:most]:
        config, metrics = summary.config, summary.metrics
        is_in_name = summary.role is Role.SEARCH or summary.trial_id.startswith(summary.role)
        label = summary.trial_id if is_in_name else f"{summary.trial_id} {summary.role}"
        is_winner = summary.trial_id == winner
        weight = config.get(WEIGHT)
        is_schedule = isinstance(weight, Mapping)
        norm_ratio = format_number(metrics.get("norm_ratio_max"), ".3g")
        cells = {
            "gain": format_number(weight if is_schedule else gain_of(config)),
            "weight": format_number(None if is_schedule else weight),
            "max_t": format_number(config.get("ssim_loss_max_t")),
            "grad_scale": format_number(config.get("ssim_grad_scale")),
            "steps": str(summary.steps),
            "norm ratio": norm_ratio,
            "ratio": norm_ratio,
            "PSNR": format_number(metrics.get("psnr"), ".2f"),
            "setting": format_setting(config),
        }
        cells |= {name: format_objective(name, metrics.get(name)) for name in goals}
        mark = f"{'★ ' if is_winner else ''}{FRONT + ' ' if summary.trial_id in front else ''}"
        verdict = Text(summary.verdict.value, VERDICT_STYLES[summary.verdict])
        why = readable(summary.reason, ascii_only)
        table.add(
            Text(readable(f"{mark}{label}", ascii_only), "bold") if is_winner else readable(f"{mark}{label}", ascii_only),
            *(cells[name] for name in names),
            *((verdict, why) if wide else (_joined(verdict, why),)),
        )
    return table


def _columns(summaries: Sequence[TrialSummary], width: int, objective: Objective) -> list[str]:
    """Headings, with the name of a metric for each objective. A narrow terminal has only the first objective."""
    has_ssim = any(WEIGHT in summary.config for summary in summaries) or not summaries
    min_width, names = next(item for item in (COLUMNS if has_ssim else OTHER_COLUMNS).items() if width >= item[0])
    goals = [goal.name for goal in (objective.goals if min_width else (objective,))]
    measured = {name for summary in summaries for name in summary.metrics}
    found: list[str] = []
    for name in names:
        if name == "objective":
            found += goals
        elif name not in MEASURED or (MEASURED[name] in measured and MEASURED[name] not in goals):
            found.append(name)
    return found


def _joined(verdict: Text, why: str) -> Text:
    """`pruned: total_norm is …`. A reason such as "safe to step 200" already begins with the verdict."""
    if why.startswith(verdict.plain):
        return verdict + Text(why[len(verdict) :])
    return verdict + Text(f": {why}" if why else "")


def best_first(summaries: Iterable[TrialSummary], objective: Objective = DEFAULT_OBJECTIVE) -> list[TrialSummary]:
    """Sort key: verdict, then objective. Among equal verdicts a trial without an objective comes last."""

    def key(summary: TrialSummary) -> tuple[int, float]:
        value = summary.metric(objective.name)
        if objective.is_delta and summary.role is Role.BASELINE:
            value = 0.0
        return summary.verdict.rank, objective.rank(value)

    return sorted(summaries, key=key)


def quarantine_table(entries: Iterable[Entry], ascii_only: bool = False) -> Table:
    """One row for each ruined checkpoint."""
    table = PlainTable(ascii_only).columns_of("id", "study", "trial").numbers_of("step").text_of("why", min_width=20)
    for entry in entries:
        table.add(entry.id[:12], entry.study, entry.trial_id, str(entry.step), entry.reason)
    return table


def spaces_table(spaces: Iterable[Space], ascii_only: bool = False) -> Table:
    """One row for each search space, with its stages in order."""
    table = PlainTable(ascii_only).columns_of("space", style="bold").text_of("stages").text_of("description", ratio=1)
    for space in spaces:
        table.add(space.name, " → ".join(stage.name for stage in space.stages if len(space.stages) > 1), space.description)
    return table


def stages_table(space: Space, ascii_only: bool = False) -> Table:
    """One section for each stage of a search space: what it searches, what it fixes, what it tries first."""
    table = PlainTable(ascii_only).columns_of("stage", style="bold").columns_of("setting").text_of("value")
    for stage in space.stages:
        rows = [(name, str(domain)) for name, domain in stage.parameters.items()]
        rows += [(name, f"fixed at {value_text(value)}") for name, value in stage.fixed.items()]
        for index, point in enumerate(stage.points, 1):
            numbers = ", ".join(f"{name} {value_text(value)}" for name, value in point.items())
            gain = f" (gain {format_number(gain_of(point))})" if WEIGHT in point else ""
            rows.append((f"point {index}", numbers + gain))
        for index, row in enumerate(rows):
            table.add("" if index else stage.name, *row, end_section=index == len(rows) - 1)
    return table


def gains_table(calibration: Mapping[str, Any], ascii_only: bool = False) -> Table:
    """One row for each max_t of `Calibration.to_dict()`, with the gains for given ratios of total_norm to the baseline's."""
    gates, limit = calibration["by_max_t"], calibration["limit"]
    ratios = [f"{ratio}×{' (limit)' if float(ratio) == limit else ''}" for ratio in gates[0]["gain_for"]]
    table = PlainTable(ascii_only, title="gain that gives a predicted norm ratio of", gap=2)
    table.numbers_of("max_t", "active", "inert below", *ratios, "cosine")
    for gate in gates:
        gains = [format_number(gain, ".3g") for gain in (gate["inert_below"], *gate["gain_for"].values())]
        active = f"{gate['active_batches']}/{len(calibration['model']['batches'])}"
        table.add(f"{gate['max_t']:g}", active, *gains, _measured(gate["cosine"], "+.2f"))
    return table


def predictions_table(calibration: Mapping[str, Any], ascii_only: bool = False) -> Table:
    """One row for each named setting of `Calibration.to_dict()` (the notes' versions, the space's points), with its prediction."""
    table = PlainTable(ascii_only, title="what will happen at step 0", gap=2).columns_of("setting")
    table.numbers_of("gain", "max_t", "norm ratio", "to main loss", "SSIM share").text_of("prospects")
    for named in calibration["settings"]:
        predicted = named["prediction"]
        numbers = [f"{predicted['gain']:.4g}", f"{predicted['max_t']:g}"]
        numbers += [_measured(predicted["ratio"], ".4g"), _measured(predicted["ratio_main"], ".4g")]
        table.add(named["name"], *numbers, _measured(predicted["auxiliary_share"], ".2%"), named["judgement"])
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
    share = f", {share:.1%} of what the search's training takes" if (share := calibration["share_of_study"]) else ""
    sentences.append(f"took {calibration['wall_s']:.1f} s{share}")
    return sentences


CHECK_STYLES = {"ok": "green", "unknown": "dim", "warn": "yellow", "bad_setup": "bold magenta"}


def preflight_table(report: Mapping[str, Any], ascii_only: bool = False) -> Table:
    """One row for each check of preflight's `Report.to_dict()`, with the remedy below a warning or fault."""
    table = PlainTable(ascii_only).columns_of("check", overflow="fold").columns_of("verdict").numbers_of("s")
    table.text_of("what was measured", ratio=1)
    for check in report["checks"]:
        cost = format_number(check.get("seconds") or None, ".1f")  # of a report that is older than this number: none
        lines = [check["sentence"]]
        if check["remedy"] and check["status"] in ("warn", "bad_setup"):
            lines.append(check["remedy"])
        text = Text("\n".join(readable(line, ascii_only) for line in lines))
        table.add(check["name"], Text(check["status"], CHECK_STYLES[check["status"]]), cost, text)
    return table


def _measured(value: Any, form: str) -> str:
    """A number, or a dash if it is NaN or the string "NaN", that is, not measured."""
    return format_number(None if math.isnan(number(value)) else number(value), form)
