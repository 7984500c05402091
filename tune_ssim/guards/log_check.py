"""Checks the log of any training with the guards of a live trial, and reports which branches work and why."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.yaml_source import did_you_mean
from tune_ssim.guards import Baseline, BaselineRun, Guard, NonFinite, NormRatio, Rule, SmokeTest, Violation, Watch
from tune_ssim.guards.branch_report import BranchFinding, BranchReport, judge_branch, series_of
from tune_ssim.guards.curves import Curve
from tune_ssim.guards.rule_pack import Branch, RulePack, bundled_packs, load_rules
from tune_ssim.guards.watch import GRACE_RECORDS, WILDCARD_ENDINGS, named
from tune_ssim.records import LOSS, TOTAL_NORM, TOTAL_NORM_MAIN, Record
from tune_ssim.records.readers import Source
from tune_ssim.records.record_table import Table

SCHEMA = 1  # of `LogReport.to_json`, docs/check_schema.md
PROBED_RECORDS = 1000  # records used to infer the number of micro-batches per step from the coverage, if it is not given
MAX_ALERTS = 20  # alerts kept per guard; further ones are only counted
MAX_SHOWN_NAMES = 12  # metric names listed in a message
WORDS = re.compile(r"[a-z]+")
# Our name → words that identify the metric (one is needed), and words that may also occur in its name (Lightning, Hugging Face,
# MMEngine, DeepSpeed, fairseq).
USUAL = {
    LOSS: ({"loss"}, {"train", "training", "total", "step"}),
    TOTAL_NORM: ({"norm", "gnorm", "gradnorm"}, {"grad", "gradient", "global", "total", "train", "training"}),
}
POLL_S = 0.5  # seconds between reads of a growing log
MAX_BASELINE_RECORDS = 1_000_000  # baseline records kept in memory; about a hundred megabytes


@dataclass(frozen=True)
class Alert:
    """An alert of a guard. times: how often it fired, last at `last_step`. after_end: a live trial would have ended before it."""

    violation: Violation
    source: str = ""
    times: int = 1
    last_step: int = 0
    after_end: bool = False

    def to_json(self) -> dict[str, Any]:
        extra = {"source": self.source, "times": self.times, "last_step": self.last_step, "after_end": self.after_end}
        return asdict(self.violation) | extra


@dataclass(frozen=True)
class Unknown:
    """A guard that could not judge the log, and why."""

    guard: str
    reason: str
    missing: tuple[str, ...] = ()  # metrics that never appeared


@dataclass(frozen=True)
class LogReport:
    log: str
    records: int
    steps: tuple[int, int] | None  # first and last
    packs: tuple[RulePack, ...]
    branches: tuple[BranchReport, ...]
    alerts: tuple[Alert, ...]
    unknown: tuple[Unknown, ...]
    judged: tuple[str, ...]  # guards that could have fired
    ended: Violation | None  # the violation that would have ended a live trial
    notes: tuple[str, ...]
    curves: Mapping[Any, Curve] = field(repr=False)  # by metric, or by a pair of metrics for their ratio
    passed_over: int = 0  # skipped rows: repeated steps and lines that could not be read

    @property
    def verdict(self) -> str:
        """`alerts` if there are any; else `does_not_work` if a branch does not work; else `unknown` if no guard could judge or at
        least as many rows were skipped as read; else `healthy`."""
        if self.alerts:
            return "alerts"
        if any(branch.verdict == "does not work" for branch in self.branches):
            return "does_not_work"
        return "healthy" if self.judged and self.passed_over < self.records else "unknown"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "log": self.log,
            "verdict": self.verdict,
            "records": self.records,
            "first_step": self.steps and self.steps[0],
            "last_step": self.steps and self.steps[1],
            "rules": [{"pack": pack.name, "options": dict(pack.options)} for pack in self.packs],
            "branches": [branch.to_json() for branch in self.branches],
            "alerts": [alert.to_json() for alert in self.alerts],
            "ended": None if self.ended is None else {key: asdict(self.ended)[key] for key in ("guard", "step", "action")},
            "unknown": [asdict(unknown) for unknown in self.unknown],
            "judged": list(self.judged),
            "notes": list(self.notes),
        }


class LogCheck:
    """Checks a log: `feed` records in step order, then `report`. Memory use does not grow with the log."""

    def __init__(self, packs: Sequence[RulePack], baseline: Baseline | None = None, *, given: bool = True) -> None:
        """given: whether the user chose the packs. If False, only packs that match the log's metrics count. All packs watch from
        the first record, so it does not matter when a metric first appears."""
        self.packs, self.given = tuple(packs), given
        general: list[Guard] = [NonFinite(), SmokeTest()]
        if baseline is not None:
            general.append(NormRatio().bind(baseline, seed=0, clipped=False))
        self.guards: tuple[Guard, ...] = (*general, *(rule for pack in packs for rule in pack.rules))
        self.watch = Watch(self.guards, strict=False)
        self.curves: dict[Any, Curve] = {}
        self.alerts: dict[str, list[Alert]] = {}
        self.records, self.first_step, self.last_step = 0, -1, -1
        self._metrics: set[str] = set()  # all metrics in the log
        self._losses: list[str] = []  # loss metrics, by which a log without a matching pack is judged
        self._about: set[str] = set()  # names of the packs that match the log
        self._pack_of = {rule.name: pack.name for pack in packs for rule in pack.rules}
        branches = [key for pack in packs for branch in pack.branches for key in series_of(branch)]
        of_rules = [metric for guard in self.guards for metric in (guard.about if isinstance(guard, Rule) else guard.metrics)]
        self._series = [
            key for key in dict.fromkeys([LOSS, TOTAL_NORM, *branches, *of_rules]) if not str(key).endswith(WILDCARD_ENDINGS)
        ]
        self._sources = {guard.name: guard.source for guard in self.guards if isinstance(guard, Rule)}

    @property
    def ended(self) -> Violation | None:
        """The first violation that would have ended a live trial, or None."""
        ends = [alert.violation for alert in self._counting() if alert.violation.action.ends_trial]
        return min(ends, key=lambda violation: violation.step, default=None)

    def feed(self, records: Sequence[Record]) -> list[Alert]:
        """New alerts for these records, in order. Checking continues after a violation that would have ended a live trial."""
        if not records:
            return []
        table = Table.of(records)
        before = self._about.copy()
        self._add_metrics(table.metrics)
        fired = [alert for guard, alerts in self.alerts.items() if self._pack(guard) in self._about - before for alert in alerts]
        new = [alert for violations in self.watch.update_table(table) for alert in self._add_alerts(violations)]
        fired += [alert for alert in new if self._counts(alert.violation.guard)]
        if not self.records:
            self.first_step = table.steps[0]
        self.records += len(table)
        self.last_step = table.steps[-1]
        self._extend_curves(table)
        return fired

    def report(self, log: str = "", notes: Iterable[str] = (), passed_over: int = 0) -> LogReport:
        packs = tuple(pack for pack in self.packs if pack.name in self._about)
        guards = [guard for guard in self.guards if self._counts(guard.name)]
        holding = {
            rule.name: (rule, self.alerts[rule.name][-1].last_step)
            for rule in guards
            if isinstance(rule, Rule) and rule.name in self.alerts and rule.holds(self.watch.state_of(rule.name))
        }
        looked_at = packs or (self._any(),)
        branches = [judge_branch(pack, branch, self.curves, holding) for pack in looked_at for branch in pack.branches]
        ended = self.ended
        alerts = sorted(self._counting(), key=lambda alert: alert.violation.step)
        unknown = tuple(filter(None, map(self._unknown, guards)))
        cannot = {one.guard for one in unknown} - set(self.alerts)
        return LogReport(
            log=log,
            records=self.records,
            steps=(self.first_step, self.last_step) if self.records else None,
            packs=packs,
            branches=tuple(branches if packs else among_parts(branches)),
            alerts=tuple(replace(one, after_end=ended is not None and one.violation.step > ended.step) for one in alerts),
            unknown=tuple(one for one in unknown if one.guard in cannot),
            judged=tuple(guard.name for guard in guards if guard.name not in cannot),
            ended=ended,
            notes=tuple(notes),
            curves=self.curves,
            passed_over=passed_over,
        )

    def nothing_known(self) -> str | None:
        """If no guard recognises any metric of the log, the reason; else None. Usually the metrics have other names."""
        known = {metric for pack in self.packs for metric in pack.metrics}
        general = any(self._counts(guard) for guard in self._general)
        if general or (self._about and known & self._metrics):
            return None
        saw = ", ".join(sorted(self._metrics)[:MAX_SHOWN_NAMES]) + (", …" if len(self._metrics) > MAX_SHOWN_NAMES else "")
        wanted = "; ".join(f"{pack.name}: {', '.join(pack.known_by)}" for pack in self.packs)
        if self.given:
            wanted = ", ".join(sorted(known)[:MAX_SHOWN_NAMES])
        saw = saw or "no metric at all"
        return f"no rule knows any metric of this log; saw {saw}; known are {wanted} (`--map theirs=ours` renames)"

    def _any(self) -> RulePack:
        """A generic pack for a log that matches no pack: the loss, or else every loss term, and the norm.

        The loss of a fine-tuning may be good from the start: it need not fall but must not rise."""
        losses = [LOSS] if LOSS in self._metrics else self._losses
        branches = [
            Branch("training" if name == LOSS else name, name, (TOTAL_NORM,), may_be_flat=True, may_rise="kl" in name.lower())
            for name in losses or ([LOSS] if TOTAL_NORM in self._metrics else [])
        ]
        return RulePack("any", (), branches=tuple(branches))

    def _pack(self, guard: str) -> str:
        return self._pack_of.get(guard, "")

    def _counts(self, guard: str) -> bool:
        """Whether this guard applies to the log."""
        if pack := self._pack(guard):
            return pack in self._about
        known = self._general[guard]
        metrics = [f"{prefix}*" for prefix in known.prefixes] if isinstance(known, NonFinite) else known.metrics
        return guard == NormRatio.name or any(named(metric, self._metrics) for metric in metrics)

    @cached_property
    def _general(self) -> dict[str, Guard]:
        return {guard.name: guard for guard in self.guards if not self._pack(guard.name)}

    def _counting(self) -> list[Alert]:
        return [alert for guard, alerts in self.alerts.items() if self._counts(guard) for alert in alerts]

    def _add_metrics(self, metrics: Sequence[str]) -> None:
        """Registers new metrics, and the packs that match them."""
        if not self._metrics.issuperset(metrics):
            new = [name for name in metrics if name not in self._metrics]
            self._metrics.update(new)
            self._losses += [name for name in new if name.startswith(LOSS)]
            self._series += [name for name in self._losses if name not in self._series]
        if len(self._about) < len(self.packs):
            self._about |= {pack.name for pack in self.packs if self.given or self._metrics.intersection(pack.known_by)}

    def _add_alerts(self, violations: Sequence[Violation]) -> list[Alert]:
        """Adds alerts, or counts repeats, and returns the new alerts."""
        new: list[Alert] = []
        for violation in violations:
            name = violation.guard
            alerts = self.alerts.setdefault(name, [])
            # A non-finite metric stays non-finite, so only the first alert is kept.
            if len(alerts) < (1 if name == NonFinite.name else MAX_ALERTS):
                alerts.append(Alert(violation, self._sources.get(name, ""), 1, violation.step))
                new.append(alerts[-1])
            else:
                alerts[-1] = replace(alerts[-1], times=alerts[-1].times + 1, last_step=violation.step)
        return new

    def _extend_curves(self, table: Table) -> None:
        for key in self._series:
            column = table.column(key) if isinstance(key, str) else table.quotient(*key)
            if column is not None:
                self.curves.setdefault(key, Curve()).add(column.steps, column.values)

    def _unknown(self, guard: Guard) -> Unknown | None:
        about = guard.about if isinstance(guard, Rule) else guard.metrics
        missing = tuple(metric for metric in about if metric not in self.curves and not metric.endswith(WILDCARD_ENDINGS))
        if missing:
            return Unknown(guard.name, f"no metric {missing[0]}", missing)
        state = self.watch.state_of(guard.name)
        reason = guard.insufficient_data(state) if isinstance(guard, Rule) else guard.unjudged(state)
        return None if reason is None else Unknown(guard.name, reason.removeprefix(f"guard '{guard.name}' "))


def ours_of(metrics: Iterable[str]) -> dict[str, str]:
    """Common names of loss and gradient norm in the log → our names, if ours is missing and exactly one metric matches."""
    metrics = sorted(metrics)
    found = {}
    for ours, (one_of, others) in USUAL.items():
        words = {name: set(WORDS.findall(name.lower())) for name in metrics}
        named = [name for name in metrics if words[name] <= one_of | others and words[name] & one_of]
        if ours not in metrics and len(named) == 1:
            found[named[0]] = ours
    return found


def names_of(records: Iterable[Record]) -> set[str]:
    return {name for record in records for name in record.values}


def check_log(
    source: Source,
    *,
    packs: Sequence[str | Path] = (),
    options: Mapping[str, float] | None = None,
    baseline: Baseline | None = None,
    follow: bool = False,
    on_alert: Callable[[Alert], None] | None = None,
    label: str = "",
) -> LogReport:
    """Checks a log to its end; with `follow`, until a violation that would end a live trial, or Ctrl-C.

    packs: names or paths; default every bundled pack that matches the log's metrics. on_alert: called for each new alert.
    Raises UserError for invalid packs and options, and for a log without any known metric."""
    options = options or {}
    given = [load_rules(pack) for pack in packs]
    different(given)
    _check_options(given or [load_rules(pack) for pack in bundled_packs()], options)
    enough = GRACE_RECORDS if follow else PROBED_RECORDS  # when following, report early
    waiting: list[Record] = []
    check: LogCheck | None = None
    notes: list[str] = []
    usual: dict[str, str] = {}

    def take(records: Sequence[Record], last: bool = False) -> None:
        nonlocal check, waiting, usual
        if check is None:
            waiting.extend(records)
            if len(waiting) < enough and not last:
                return
            chosen, guessed = _load_packs(packs, options, waiting[:enough])
            notes.extend(guessed)
            check = LogCheck(chosen, baseline, given=bool(packs))
            records, waiting = waiting, []
            usual = ours_of(names_of(records))
        for alert in check.feed(Table.of(records).renamed(usual) if records else records):
            if on_alert is not None:
                on_alert(alert)

    try:
        for part in source.batches():
            take(part)
        while follow and (check is None or check.ended is None):
            time.sleep(POLL_S)
            for part in source.batches():
                take(part)
    except KeyboardInterrupt:
        if not follow:
            raise
    take(source.finish(), last=True)
    assert check is not None
    issues = source.issues
    if not follow and (nothing := check.nothing_known()):
        raise UserError(f"{label}: {nothing}" + (f"; {issues.sentence()}" if issues.sentence() else ""))
    known = {pack.name for pack in check.report().packs}
    about = [note for note in notes if note.split(":")[0] in known]
    about += [f"{theirs} is taken for {ours}; else `--map {theirs}=…`" for theirs, ours in usual.items()]
    return check.report(label, filter(None, [*about, issues.sentence()]), issues.repeated + issues.unread)


def _load_packs(
    packs: Sequence[str | Path], options: Mapping[str, float], first: Sequence[Record]
) -> tuple[list[RulePack], list[str]]:
    """The packs with their options, and notes on options that were inferred."""
    chosen, notes = [], []
    for name in packs or bundled_packs():
        pack = load_rules(name)
        seen = accumulation(pack, first) if "ga" not in options else None
        if seen is not None:
            notes.append(f"{pack.name}: {seen:g} micro-batches a step, as the coverage of the first records says; else --set ga=…")
        found = {} if seen is None else {"ga": seen}
        chosen.append(load_rules(name, found | {key: value for key, value in options.items() if key in pack.options}))
    return chosen, notes


def different(packs: Sequence[RulePack]) -> None:
    """Raises UserError if two packs have the same name, because their rules would be indistinguishable."""
    names = [pack.name for pack in packs]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two rule packs are called {doubles[0]}; rename one, or give it once")


def _check_options(packs: Sequence[RulePack], options: Mapping[str, float]) -> None:
    known = {name for pack in packs for name in pack.options}
    for name in options:
        if name not in known:
            raise UserError(f"--set {name}: no rule pack has this option{did_you_mean(name, sorted(known)) if known else ''}")


def accumulation(pack: RulePack, records: Sequence[Record]) -> float | None:
    """Micro-batches per optimiser step, inferred from the coverage of the pack's branches.

    The integer above 1 nearest to the median coverage, if they differ by at most 10 %; else None."""
    if "ga" not in pack.options:
        return None
    found = []
    for branch in pack.branches:
        pairs = [(record.values.get(branch.has_grad), record.values.get(branch.trainable)) for record in records]
        found += [above / below for above, below in pairs if above is not None and below]
    middle = median(found) if found else 0.0
    nearest = round(middle) if math.isfinite(middle) else 0
    return float(nearest) if nearest > 1 and abs(middle / nearest - 1) <= 0.1 else None


def among_parts(branches: Sequence[BranchReport]) -> list[BranchReport]:
    """Relaxes reports on loss terms that are known only by name: one may rise while another falls (adversarial or reweighted
    terms)."""
    falls = any(finding.answer == "yes" for branch in branches for finding in branch.findings if finding.subject == "loss")

    def seen(finding: BranchFinding) -> BranchFinding:
        if not falls or finding.subject != "loss" or finding.answer != "no":
            return finding
        return replace(finding, answer="unknown", sentence=f"{finding.sentence}, while another part of the loss falls")

    return [replace(branch, findings=tuple(map(seen, branch.findings))) for branch in branches]


def _all_batches(source: Source) -> Iterator[Sequence[Record]]:
    yield from source.batches()
    yield source.finish()


def baseline_of(source: Source) -> Baseline:
    """A baseline from the norms in the log of a pixel-loss run. Raises UserError if it has none."""
    series: dict[str, dict[int, float]] = {TOTAL_NORM: {}, TOTAL_NORM_MAIN: {}}
    names: dict[str, None] = {}
    usual: dict[str, str] | None = None
    for part in filter(len, _all_batches(source)):
        usual = ours_of(names_of(part)) if usual is None else usual
        for record in Table.of(part).renamed(usual):
            if len(names) < MAX_SHOWN_NAMES:
                names.update(dict.fromkeys(record.values))
            for metric, points in series.items():
                if metric in record.values and len(points) < MAX_BASELINE_RECORDS:
                    points[record.step] = record.values[metric]
    if not series[TOTAL_NORM]:
        saw = ", ".join(sorted(names)) or "no metric at all"
        raise UserError(f"the baseline's log has no metric {TOTAL_NORM}; saw {saw} (`--map theirs=ours` renames)")
    return Baseline((BaselineRun(0, {name: points for name, points in series.items() if points}, {}),))
