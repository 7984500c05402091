"""A checked log as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tune_ssim.cli.plain_table import PlainTable
from tune_ssim.guards.branch_report import BranchReport
from tune_ssim.guards.log_report import Alert, LogReport
from tune_ssim.guards.rule import NON_FINITE_CAUSE
from tune_ssim.results.trial_text import readable

STYLES = {
    "healthy": "bold green", "alerts": "bold red", "works": "green", "does not work": "bold red", "unknown": "yellow",
    "warn": "yellow", "probe": "cyan", "prune": "red", "abort": "bold magenta",
}  # fmt: skip
MAX_NAMES = 6  # of metrics in one line


def format_answer(report: LogReport, ascii_only: bool = False) -> Text:
    """The first line."""
    return Text(readable(report.summary, ascii_only), STYLES[report.verdict.replace("_", " ")])


def format_check(report: LogReport, ascii_only: bool = False, with_alerts: bool = True) -> RenderableType:
    """The report below its answer. `with_alerts`: False if the alerts were already printed as they arrived."""

    def show(text: str) -> str:
        return readable(text, ascii_only)

    parts: list[RenderableType] = [Text(show(_head(report)))]
    if report.branches:
        parts.append(_branches(report.branches, ascii_only))
    if with_alerts:
        parts += [format_alert(alert, ascii_only) for alert in report.alerts if not _follows(alert)]
        if followed := [alert for alert in report.alerts if _follows(alert)]:
            parts.append(_plain(Text(_list_followers(followed)), ascii_only))
    parts += [Text(show(line), "yellow") for line in _unknown(report)]
    parts += [Text(show(f"note: {line}"), "dim") for line in report.notes]
    return Group(*parts)


def _follows(alert: Alert) -> bool:
    """Whether a rule fired on non-finite values after the step at which a live trial would have ended, which adds no
    information."""
    return alert.after_end and alert.violation.cause == NON_FINITE_CAUSE


def _list_followers(alerts: Sequence[Alert]) -> str:
    names = ", ".join(f"{alert.violation.guard.split('/')[-1]} (step {alert.violation.step})" for alert in alerts)
    return f"after that, rules whose metrics became non-finite: {names}\n"


def format_alert(alert: Alert, ascii_only: bool = False) -> RenderableType:
    violation = alert.violation
    style = STYLES[violation.action]
    head = Text.assemble((f"step {violation.step}", "bold"), "  ", (violation.action, style), "  ", violation.sentence)
    again = f"; {alert.times - 1} times more, last at step {alert.last_step}" if alert.times > 1 else ""
    after = "; after the end of a live trial" if alert.after_end else ""
    source = f" ({alert.source})" if alert.source else ""
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, text in (("likely cause", violation.cause), ("try first", violation.remedy)):
        if text:
            table.add_row(Text(name, "dim"), _plain(Text(text), ascii_only))
    table.add_row(Text("rule", "dim"), _plain(Text(f"{violation.guard}{source}{again}{after}", "dim"), ascii_only))
    return Group(_plain(head, ascii_only), Padding(table, (0, 0, 1, 2)))


def _plain(text: Text, ascii_only: bool) -> Text:
    return Text(readable(text.plain, True)) if ascii_only else text


def _head(report: LogReport) -> str:
    steps = "" if report.steps is None else f", steps {report.steps[0]}-{report.steps[1]}"
    packs = ", ".join(
        pack.name + ("" if not pack.options else f" ({', '.join(f'{k} {v:g}' for k, v in pack.options.items() if v is not None)})")
        for pack in report.packs
    )
    judged = f"{len(report.judged)} of {len(report.judged) + len(report.unknown)} rules could judge"
    packs = packs or "only those of every study, no rule pack is about this log"
    return f"{report.log}: {report.records} records{steps}; {judged}; rules: {packs}"


def _branches(branches: tuple[BranchReport, ...], ascii_only: bool) -> Table:
    table = PlainTable(ascii_only).columns_of("branch", "").text_of("why")
    order = {"no": 0, "unknown": 1, "yes": 2}
    for branch in branches:
        found = sorted(branch.findings, key=lambda finding: order[finding.answer])
        verdict = Text(branch.verdict, STYLES[branch.verdict])
        table.add(branch.branch, verdict, "; ".join(finding.sentence for finding in found))
    return table


def _unknown(report: LogReport) -> Iterator[str]:
    """One line for each reason why rules could not judge: missing metrics first, then the rest."""
    absent = [unknown for unknown in report.unknown if unknown.missing]
    metrics = list(dict.fromkeys(metric for unknown in absent for metric in unknown.missing))
    if absent:
        more = f" and {len(metrics) - MAX_NAMES} more" if len(metrics) > MAX_NAMES else ""
        rules = "a rule" if len(absent) == 1 else f"{len(absent)} rules"
        yield f"unknown: no metric {', '.join(metrics[:MAX_NAMES])}{more}, so {rules} could not judge"
        if any(metric.startswith("dbg/") for metric in metrics):
            yield "  dbg/… come from gradient taps in the training: docs/probes.md; `--map theirs=ours` renames others"
    for unknown in report.unknown:
        if not unknown.missing:
            yield f"unknown: {unknown.guard}: {unknown.reason}"
