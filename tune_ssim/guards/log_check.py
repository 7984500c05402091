"""Checks the log of any training with the guards of a live trial, and reports which branches work and why."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.base.yaml_source import did_you_mean
from tune_ssim.guards import Baseline, Divergence, Guard, NonFinite, NormRatio, Rule, SmokeTest, Violation, Watch
from tune_ssim.guards.branch_report import BranchFinding, BranchReport, judge_branch, series_of
from tune_ssim.guards.curves import Curve
from tune_ssim.guards.guard import WILDCARD_ENDINGS, is_named
from tune_ssim.guards.log_gaps import LossPresence, NotFinite, is_training_loss
from tune_ssim.guards.log_report import Alert, LogReport, Unknown
from tune_ssim.guards.rule_pack import Branch, RulePack, bundled_packs, load_rules
from tune_ssim.guards.watch import GRACE_RECORDS
from tune_ssim.records import LOSS, TOTAL_NORM, Record
from tune_ssim.records.metric_names import is_loss_weight, usual_names, words_of
from tune_ssim.records.readers import Source
from tune_ssim.records.readers.parse_issues import EmptyRows
from tune_ssim.records.record_table import Table

PROBED_RECORDS = 1000  # records used to infer the number of micro-batches per step from the coverage, if it is not given
# For a VAE whose metrics have other names than ours. Its KL may be a mean over the latent's dimensions: 0.1 nat a sample over 1000
# of them. The autoencoders of latent diffusion weigh it with 1e-6 on purpose (Rombach et al. 2022, G), and the log may begin when
# the reconstruction has converged, so two rules do not apply.
MEAN_KL_FLOOR = 1e-4
RULES_OF_OUR_NAMES = ("kl_hidden", "recon_flat")
# 1e4 times what losses and norms begin with: a loss that is a mean is below 100 (a cross-entropy over 1e6 words begins at 14), a
# norm below 10, and clipped at 1 as a rule.
MAX_LOSS, MAX_NORM = 1e6, 1e5
NO_OBJECTIVE = frozenset({"lr", "learning", "rate", "epoch", "time", "acc", "accuracy", "eta"})  # words of metrics that are no loss
MAX_ALERTS = 20  # alerts kept per guard; further ones are only counted
# Only their first alert is kept: what is not finite stays so, and a loss or a norm that has exploded stays high.
ONCE = (NonFinite.name, Divergence.name, NormRatio.name)
MAX_SHOWN_NAMES = 12  # metric names listed in a message
POLL_S = 0.5  # seconds between reads of a growing log


class LogCheck:
    """Checks a log: `feed` records in step order, then `report`. Memory use does not grow with the log."""

    def __init__(self, packs: Sequence[RulePack], baseline: Baseline | None = None, *, given: bool = True) -> None:
        """given: whether the user chose the packs. If False, only packs that match the log's metrics count. All packs watch from
        the first record, so it does not matter when a metric first appears."""
        self.packs, self.given = tuple(packs), given
        self._non_finite = NonFinite()
        self._general: list[Guard] = [self._non_finite, SmokeTest(), Divergence()]
        if baseline is not None:
            self._general.append(NormRatio().bind(baseline, seed=0, clipped=False))
        self._rules = {rule.name: (pack, rule) for pack in packs for rule in pack.rules}
        self.guards: tuple[Guard, ...] = (*self._general, *(rule for _, rule in self._rules.values()))
        self.watch = Watch(self.guards, strict=False)
        self.curves: dict[Any, Curve] = {}
        self.alerts: dict[str, list[Alert]] = {}
        self.records, self.first_step, self.last_step = 0, -1, -1
        self.metrics: dict[str, None] = {}  # all metrics in the log
        self._losses = LossPresence()
        self._not_finite = NotFinite()
        self.matching: set[str] = set()  # names of the packs that match the log
        of_branches = [key for pack in packs for branch in pack.branches.values() for key in series_of(branch)]
        of_guards = [metric for guard in self.guards for metric in _metrics_of(guard)]
        self._series = list(dict.fromkeys([LOSS, TOTAL_NORM, *of_branches, *of_guards]))  # the keys of the curves

    @property
    def ended(self) -> Violation | None:
        """The first violation that would have ended a live trial, or None."""
        ends = [alert.violation for alert in self._counting_alerts() if alert.violation.action.ends_trial]
        return min(ends, key=lambda violation: violation.step, default=None)

    def feed(self, records: Sequence[Record]) -> list[Alert]:
        """New alerts for these records, in order. Checking continues after a violation that would have ended a live trial."""
        if not records:
            return []
        table = Table.of(records)
        before = self.matching.copy()
        self._add_metrics(table.metrics)
        now_counting = self.matching - before
        fired = [alert for name, alerts in self.alerts.items() if self._pack_of(name) in now_counting for alert in alerts]
        new = [alert for violations in self.watch.update_table(table) for alert in self._add_alerts(violations)]
        if not self.records:
            self.first_step = table.steps[0]
        self._losses.add(table)
        self._not_finite.add(table, [name for name in table.metrics if not self._non_finite.judges(name)])
        self.records += len(table)
        self.last_step = table.steps[-1]
        for key in self._series:
            column = table.column(key) if isinstance(key, str) else table.quotient(*key)
            if column is not None:
                self.curves.setdefault(key, Curve()).add(column)
        return [*fired, *(alert for alert in new if self._counts(alert.violation.guard))]

    def report(self, log: str = "", notes: Iterable[str] = (), passed_over: int = 0, empty: EmptyRows | None = None) -> LogReport:
        """empty: the rows of the log that hold no number."""
        packs = tuple(pack for pack in self.packs if pack.name in self.matching)
        guards = [guard for guard in self.guards if self._counts(guard.name)]
        holding = {
            rule.name: (rule, self.alerts[rule.name][-1].last_step)
            for rule in guards
            if isinstance(rule, Rule) and rule.name in self.alerts and rule.holds(self.watch.state_of(rule.name))
        }
        branches = [judge_branch(pack, *branch, self.curves, holding) for pack in packs for branch in pack.branches.items()]
        generic = [] if packs else [judge_branch(None, *branch, self.curves) for branch in self._generic_branches().items()]
        ended = self.ended
        alerts = sorted(self._counting_alerts(), key=lambda alert: alert.violation.step)
        unknown = [one for guard in guards if guard.name not in self.alerts and (one := self._unknown(guard)) is not None]
        judging = [guard for guard in guards if guard.name not in {one.guard for one in unknown}]
        branches = branches or _as_parts(generic)
        return LogReport(
            log=log,
            records=self.records,
            steps=(self.first_step, self.last_step) if self.records else None,
            packs=packs,
            branches=tuple(branches),
            alerts=tuple(replace(one, after_end=ended is not None and one.violation.step > ended.step) for one in alerts),
            unknown=tuple(unknown),
            judged=tuple(guard.name for guard in judging),
            ended=ended,
            notes=(*notes, *self._not_finite.notes()),
            curves=self.curves,
            passed_over=passed_over,
            judged_metrics=self._judged_metrics(judging),
            metrics=len(self.metrics),
            doubts=(*self._losses.doubts(empty), *self._doubts(unknown)),
        )

    def _judged_metrics(self, guards: Sequence[Guard]) -> tuple[str, ...]:
        """The metrics in the log that these guards judge."""
        judged = {metric for guard in guards for metric in _metrics_of(guard)}
        judges = [guard.judges for guard in guards if isinstance(guard, NonFinite)]
        found = [name for name in self.metrics if name in judged or any(judge(name) for judge in judges)]
        return tuple(sorted(found, key=lambda name: ({LOSS: 0, TOTAL_NORM: 1}.get(name, 2), list(self.metrics).index(name))))

    def _doubts(self, unknown: Sequence[Unknown]) -> Iterator[str]:
        """Why the log is not healthy even if nothing fired."""
        for metric, curve in self.curves.items():
            limit = _largest_plausible(metric)
            lowest = min((low for low in curve.low if not math.isnan(low)), default=0.0)
            if lowest > limit:
                name = "gradient norm" if metric == TOTAL_NORM else metric
                yield f"{name} is never below {lowest:.2g} (a sound one is below {limit:.0e}): it may have diverged before this log"
        yield from (f"{one.reason}" for one in unknown if one.guard == NonFinite.name)

    def nothing_known(self) -> str | None:
        """If no guard recognises any metric of the log, the reason; else None. Usually the metrics have other names."""
        known = {metric for pack in self.packs for metric in pack.metrics}
        if any(self._counts(guard.name) for guard in self._general) or (self.matching and known & self.metrics.keys()):
            return None
        wanted = "; ".join(f"{pack.name}: {', '.join(pack.known_by)}" for pack in self.packs)
        if self.given:
            wanted = ", ".join(sorted(known)[:MAX_SHOWN_NAMES])
        likely = next((name for name in self.metrics if not words_of(name) & NO_OBJECTIVE), "theirs")
        hint = f"--map {shlex.quote(f'{likely}={LOSS}')} says that {likely} is the loss"
        return f"no rule knows any metric of this log; saw {self.saw()}; {hint}; known are {wanted}"

    def saw(self) -> str:
        """The first metrics of the log."""
        shown = ", ".join(sorted(self.metrics)[:MAX_SHOWN_NAMES]) + (", …" if len(self.metrics) > MAX_SHOWN_NAMES else "")
        return shown or "no metric at all"

    def _generic_branches(self) -> dict[str, Branch]:
        """The branches of a log that matches no pack: the loss, or else every loss term, and the norm.

        The loss of a fine-tuning may be good from the start: it need not fall but must not rise."""
        losses = [LOSS] if LOSS in self.metrics else list(filter(is_training_loss, self.metrics))
        return {
            "training" if loss == LOSS else loss: Branch(
                loss=loss, gradient=(TOTAL_NORM,), may_be_flat=True, may_rise="kl" in loss.lower()
            )
            for loss in losses or ([LOSS] if TOTAL_NORM in self.metrics else [])
        }

    def _pack_of(self, name: str) -> str:
        """The pack of a guard; empty for the guards of every study."""
        return self._rules[name][0].name if name in self._rules else ""

    def _counts(self, name: str) -> bool:
        """Whether this guard applies to the log."""
        if pack := self._pack_of(name):
            return pack in self.matching
        guard = next(guard for guard in self._general if guard.name == name)
        if isinstance(guard, NonFinite):
            return any(map(guard.judges, self.metrics))
        if isinstance(guard, Divergence):
            return LOSS in self.metrics
        return isinstance(guard, NormRatio) or any(is_named(metric, self.metrics) for metric in guard.metrics)

    def _counting_alerts(self) -> list[Alert]:
        return [alert for name, alerts in self.alerts.items() if self._counts(name) for alert in alerts]

    def _add_metrics(self, metrics: Sequence[str]) -> None:
        """Registers new metrics, and the packs that match them."""
        for name in metrics:
            if name not in self.metrics:
                self.metrics[name] = None
                if (is_training_loss(name) or is_loss_weight(name)) and name not in self._series:
                    self._series.append(name)
        if len(self.matching) < len(self.packs):
            self.matching |= {pack.name for pack in self.packs if self.given or self.metrics.keys() & pack.known_by}

    def _add_alerts(self, violations: Sequence[Violation]) -> list[Alert]:
        """Adds alerts, or counts repeats, and returns the new alerts."""
        new: list[Alert] = []
        for violation in violations:
            name = violation.guard
            alerts = self.alerts.setdefault(name, [])
            if len(alerts) < (1 if name in ONCE else MAX_ALERTS):
                source = self._rules[name][1].source if name in self._rules else ""
                alerts.append(Alert(violation, source, last_step=violation.step))
                new.append(alerts[-1])
            else:
                alerts[-1] = replace(alerts[-1], times=alerts[-1].times + 1, last_step=violation.step)
        return new

    def _unknown(self, guard: Guard) -> Unknown | None:
        missing = tuple(metric for metric in _metrics_of(guard) if metric not in self.curves)
        if missing:
            return Unknown(guard.name, f"no metric {missing[0]}", missing)
        state = self.watch.state_of(guard.name)
        if isinstance(guard, Divergence) and len(state["window"]) < guard.window:
            return Unknown(guard.name, f"{guard.window} finite records of {LOSS} are needed; the log has {len(state['window'])}")
        reason = guard.insufficient_data(state) if isinstance(guard, Rule) else guard.unjudged(state)
        return None if reason is None else Unknown(guard.name, reason.removeprefix(f"guard '{guard.name}' "))


def _largest_plausible(metric: Any) -> float:
    """The largest value that a loss or a norm of a sound training keeps up; infinite for other metrics."""
    if metric == TOTAL_NORM:
        return MAX_NORM
    return MAX_LOSS if isinstance(metric, str) and is_training_loss(metric) else math.inf


def _metrics_of(guard: Guard) -> list[str]:
    """The metrics that a guard judges, also those of an optional rule, without wildcards."""
    metrics = guard.about if isinstance(guard, Rule) else guard.metrics
    return [metric for metric in metrics if not metric.endswith(WILDCARD_ENDINGS)]


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
    loaded = [load_rules(pack) for pack in packs or bundled_packs()]
    _check_arguments(loaded, options)
    known = dict.fromkeys(metric for pack in loaded for metric in pack.metrics)
    enough = GRACE_RECORDS if follow else PROBED_RECORDS  # when following, report early
    waiting: list[Table] = []
    check: LogCheck | None = None
    notes: dict[str, str] = {}
    usual: dict[str, str] = {}

    def take(records: Sequence[Record], last: bool = False) -> None:
        nonlocal check, usual
        waiting.append(Table.of(records))
        if check is None:
            if sum(map(len, waiting)) < enough and not last:
                return
            usual = usual_names(dict.fromkeys(name for table in waiting for name in table.metrics), known)
            chosen = _load_packs(notes, packs, options, list(islice(chain.from_iterable(waiting), enough)), usual)
            check = LogCheck(chosen, baseline, given=bool(packs))
        for table in waiting:
            for alert in check.feed(table.renamed(usual)):
                if on_alert is not None:
                    on_alert(alert)
        waiting.clear()

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
    if not follow and (unused := source.rows.names.unused):
        theirs = unused[0]
        raise UserError(f"--map {theirs}=…: the log has no {theirs}{did_you_mean(theirs, sorted(check.metrics))}")
    if not follow and (nothing := check.nothing_known()):
        raise UserError(f"{label}: {nothing}" + (f"; {issues.sentence()}" if issues.sentence() else ""))
    about = [note for pack, note in notes.items() if pack in check.matching]
    about += filter(
        None, [guard.remark(check.watch.state_of(guard.name)) for guard in check.guards if isinstance(guard, NonFinite)]
    )
    about += [f"{theirs} is taken for {ours}; else `--map {theirs}=…`" for theirs, ours in usual.items()]
    return check.report(label, filter(None, [*about, issues.sentence()]), issues.repeated + issues.unread, issues.empty)


def _check_arguments(packs: Sequence[RulePack], options: Mapping[str, float]) -> None:
    """Raises UserError for an unknown option, or two packs with the same name, whose rules would be indistinguishable."""
    names = [pack.name for pack in packs]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two rule packs are called {doubles[0]}; rename one, or give it once")
    known = {name for pack in packs for name in pack.options}
    for name in options:
        if name not in known:
            raise UserError(f"--set {name}: no rule pack has this option{did_you_mean(name, sorted(known)) if known else ''}")


def _load_packs(
    notes: dict[str, str],
    packs: Sequence[str | Path],
    options: Mapping[str, float],
    first: Sequence[Record],
    usual: Mapping[str, str],
) -> list[RulePack]:
    """The packs with their options. Adds a note for each pack with an option that was inferred from the `first` records, or from
    the `usual` names."""
    chosen = []
    for name in packs or bundled_packs():
        pack = load_rules(name)
        own = {key: value for key, value in options.items() if key in pack.options}
        if "ga" not in own and (seen := _accumulation(pack, first)) is not None:
            own["ga"] = seen
            notes[pack.name] = (
                f"{pack.name}: {seen:g} micro-batches a step, as the coverage of the first records says; else --set ga=…"
            )
        theirs = next((theirs for theirs, ours in usual.items() if ours == "kl_raw"), None)
        if theirs is None or "kl_floor" not in pack.options:
            chosen.append(load_rules(name, own))
            continue
        rules = {key: rule for key, rule in pack.document["rules"].items() if key not in RULES_OF_OUR_NAMES}
        chosen.append(load_rules({**pack.document, "rules": rules}, {"kl_floor": MEAN_KL_FLOOR, **own}))
        notes[pack.name] = (
            f"{pack.name}: {theirs} may be weighted or a mean over the latent's dimensions, so it counts as vanished only below "
            f"{MEAN_KL_FLOOR:g} (--set kl_floor=0.1 for a sum in nats), and {' and '.join(RULES_OF_OUR_NAMES)} do not apply"
        )
    return chosen


def _accumulation(pack: RulePack, records: Sequence[Record]) -> float | None:
    """Micro-batches per optimiser step, inferred from the coverage of the pack's branches.

    The integer above 1 nearest to the median coverage, if they differ by at most 10 %; else None."""
    if "ga" not in pack.options:
        return None
    found = []
    for branch in pack.branches.values():
        pairs = [(record.values.get(branch.has_grad), record.values.get(branch.trainable)) for record in records]
        found += [above / below for above, below in pairs if above is not None and below]
    middle = median(found) if found else 0.0
    nearest = round(middle) if math.isfinite(middle) else 0
    return float(nearest) if nearest > 1 and abs(middle / nearest - 1) <= 0.1 else None


def _as_parts(branches: Sequence[BranchReport]) -> list[BranchReport]:
    """Relaxes reports on loss terms that are known only by name: one may rise while another falls (adversarial or reweighted
    terms)."""
    falls = any(finding.answer == "yes" for branch in branches for finding in branch.findings if finding.subject == "loss")

    def relaxed(finding: BranchFinding) -> BranchFinding:
        if not falls or finding.subject != "loss" or finding.answer != "no":
            return finding
        return replace(finding, answer="unknown", sentence=f"{finding.sentence}, while another part of the loss falls")

    return [replace(branch, findings=tuple(map(relaxed, branch.findings))) for branch in branches]
