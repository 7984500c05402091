"""A trial: a training watched by guards, run until it finishes, is pruned or fails. No Ray, no MLflow."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tune_ssim.base.errors import UserError
from tune_ssim.base.tensor_file import Contents
from tune_ssim.guards import (
    Baseline,
    BaselineRun,
    Divergence,
    Guard,
    MissingMetric,
    NormRatio,
    SmokeTest,
    Violation,
    Watch,
)
from tune_ssim.guards.log_gaps import LossPresence
from tune_ssim.guards.verdict import Action, Role, Verdict
from tune_ssim.probes import file_contents, tensor_contents
from tune_ssim.records import (
    ACTIVE_FRACTION,
    LOSS,
    NORM_RATIO,
    SMOKE,
    SMOKE_AGAIN,
    TOTAL_NORM,
    TOTAL_NORM_MAIN,
    Record,
    is_of_training,
    merge,
)
from tune_ssim.records.record_table import Table
from tune_ssim.trials.checkpoint import load_checkpoint, save_checkpoint, tensors_of
from tune_ssim.trials.final_verdict import (
    OF_MARGINS,
    Judgement,
    TrialPlan,
    guards_that_judged,
    guards_without_loss,
    harm_of,
    margins_of,
    not_measured,
    rules_without_metric,
    unwatched_end,
)
from tune_ssim.trials.sample_check import require_kind, require_range, statistics_of
from tune_ssim.trials.sample_grid import draw_grid
from tune_ssim.trials.training import AUXILIARY_KEYS, NOTHING_NEW, Number, as_training, same_setting

LOSS_TERM = re.compile("weight(?!_decay)|lambda|alpha|coef|gain|scale")  # in the name of a setting that weighs a part of the loss
NOTHING_COMPARED = (
    "only NaN was checked: no metric was compared with the baseline, so a ruined training would go unnoticed; let it log its loss "
    "or total_norm, make samples, or measure what `objective.keep` names"
)


class Trial:
    """`start`, then `advance` until `verdict` is set. After `save` and `load` at any step it continues bit for bit."""

    def __init__(self, task: Any, plan: TrialPlan) -> None:
        """task: a `Training`, or an object with its seven methods."""
        self.task, self.plan = as_training(task), plan
        self.verdict: Judgement | None = None

    def start(
        self,
        config: Mapping[str, Any],
        *,
        seed: int = 0,
        role: Role | str = Role.SEARCH,
        baseline: Baseline | None = None,
        searched: Collection[str] = (),
        rival: tuple[int, float] | None = None,
        device: str | None = None,
    ) -> None:
        """Sets up the training from scratch. `baseline` None: nothing to compare with (a baseline run), so no norm guard.

        `searched`: keys in which the trial may differ from the baseline, in addition to those of the auxiliary losses. `rival`:
        (step, improvement over the baseline); the trial is stopped if its own improvement at that step is smaller."""
        self.config, self.seed, self.role, self.baseline = dict(config), seed, Role(role), baseline
        self.task.setup(config, seed, device)
        self.searched = tuple(searched)
        self.effective = dict(self.task.effective())
        self.step, self.unpaired = 0, ""
        self.verdict = self._check_effective() or self._check_baseline()
        self.series: dict[str, dict[int, float]] = {}
        self.warnings: list[Violation] = []
        self.checked: tuple[str, ...] = ()  # what was compared and held, of a trial that is safe
        self.remarks: tuple[str, ...] = ()  # once it has ended
        self.images: dict[int, bytes] = {}
        self.records_before_error: list[Record] = []
        self.wrote: list[dict[str, Any]] = []  # contents of checkpoints, for the quarantine ledger
        self.logged: list[float] = []  # values of the objective's metric that its reduction needs
        self.logged_names: set[str] = set()
        self.losses = LossPresence()
        self.rival = rival
        self.curve: list[tuple[int, float]] = []  # improvement over the baseline at evaluations before the end
        self.first_active: int | None = None  # until this step a trial equals the baseline bit for bit
        self.parents = self.task.ancestry()
        self.watch = Watch(self._bound_guards())
        self.first_record_seen = False
        self.first_step_past_end: int | None = None
        if self.smoke_test is not None:
            self.task.want_samples_at(self.smoke_test.at)

    @property
    def paired(self) -> bool:
        """Whether the baseline saw the same batches, step by step."""
        return not self.unpaired

    def advance(self, steps: int | None = None) -> list[Record]:
        """Takes at most `steps` optimiser steps (None: to the end) and returns their records. Sets `verdict` at the end.

        Exceptions of the training propagate; earlier records of the call are in `records_before_error`."""
        made: list[Record] = []
        pending: list[tuple[int, Mapping[str, Number]]] = []
        try:
            self._advance(steps, made, pending)
        except BaseException:
            with suppress(Exception):  # values on a failed device cannot be read
                made += _resolve(pending)
            self.records_before_error = merge(made)
            raise
        return merge(made)

    def _advance(self, steps: int | None, made: list[Record], pending: list[tuple[int, Mapping[str, Number]]]) -> None:
        """`pending`: steps whose metrics are still on the device."""
        if self.verdict is not None:
            return
        end = self.plan.last_step if steps is None else min(self.plan.last_step, self.step + steps)
        if self.step == 0 and self._takes_samples and self.watch.state_of(SmokeTest.name)["start"] is None:
            self._smoke(made)
        ended = False
        read_to_end = self.task.reports_after_last_step and end == self.plan.last_step
        while self.verdict is None and not ended and (self.step < end or read_to_end):
            metrics, before = self.task.step(), self.step
            if metrics is NOTHING_NEW:
                break
            at = before + 1 if metrics is None else int(metrics.get("step", before + 1))
            if metrics is None or at > self.plan.last_step:
                ended = True
                self.first_step_past_end = at if metrics is not None else None
            else:
                if self.task.effective_after_first_step and not self.first_record_seen:
                    self.first_record_seen = is_of_training(at, metrics.keys() - {"step"})
                    self._check_again()
                self.step = max(before, at)
                pending.append((at, {name: value for name, value in metrics.items() if name != "step"}))
            smoke_due = self._takes_samples and not ended and self._due(before)
            if smoke_due or len(pending) == self.plan.report_every or self.step >= end or ended:
                records = _resolve(pending)
                pending.clear()
                self._judge(records, made)
                if smoke_due and self.verdict is None:
                    self._smoke(made)
            if self.verdict is None and self._evaluation_due(before, ended):
                self._judge([*_resolve(pending), Record(self.step, {self.plan.objective.metric: self._held_out()})], made)
                pending.clear()
        if pending and self.verdict is None:
            self._judge(_resolve(pending), made)
        if self.verdict is None and ended and self.plan.steps is None and self._takes_samples:
            self._smoke(made, again=True)  # only now the last step is known
        if self.verdict is None and (ended or (self.step >= self.plan.last_step and not self.task.reports_after_last_step)):
            self.verdict = replace(self._finish(), per_image=self._per_image())
        if self.verdict is not None and self.task.reports_after_last_step:
            self.task.close(self.verdict.verdict.value, self.verdict.reason)
            self.remarks += tuple(self.task.remarks())
            self._note_files()

    def summary_metrics(self) -> dict[str, float]:
        """What the guards have measured and, at the end, the held-out metrics and their differences to the baseline."""
        found: dict[str, float] = {}
        for guard in self.watch.guards:
            if isinstance(guard, (NormRatio, SmokeTest, Divergence)):
                found |= guard.summary(self.watch.state_of(guard.name))
        return found | dict(self.verdict.metrics if self.verdict else {})

    def norm_ratio(self) -> float | None:
        """The norm ratio of the latest window, for display."""
        for guard in self.watch.guards:
            if isinstance(guard, NormRatio):
                return guard.current(self.watch.state_of(guard.name))
        return None

    def horizon(self) -> dict[str, Any]:
        """The training length that the verdict covers."""
        names = ("batch_size", "optimizer", "lr", "max_grad_norm", "precision")
        return {"steps": self.step, **{name: self.effective[name] for name in names if name in self.effective}}

    def baseline_run(self, trial_id: str = "") -> BaselineRun:
        """This run as a baseline run for later trials. Raises ValueError unless it is a baseline that ended safe."""
        if self.role != Role.BASELINE or self.verdict is None or self.verdict.verdict != Verdict.SAFE:
            raise ValueError("only a baseline run that ended safe can be compared with")
        return BaselineRun(self.seed, self.series, self.verdict.metrics, self.effective, trial_id, self.step)

    def harm(self) -> float:
        """See `harm_of`."""
        if self.verdict is None:
            return 0.0
        violation = self.verdict.violation
        return harm_of(self.verdict.verdict, violation.evidence() if violation else None, self.step, self.plan.steps)

    def save(self, folder: Path) -> None:
        trial = {
            "step": self.step, "seed": self.seed, "role": self.role.value, "config": self.config,
            "watch": self.watch.state_dict(), "warnings": [asdict(warning) for warning in self.warnings],
            "baseline": None if self.baseline is None else self.baseline.sha256,
            "series": {name: [[step, value] for step, value in points.items()] for name, points in self.series.items()},
            "first_active": self.first_active, "logged": self.logged, "curve": self.curve, "losses": self.losses.state_dict(),
            "verdict": None if self.verdict is None else asdict(self.verdict),
        }  # fmt: skip
        save_checkpoint(folder, {"task": self.task.state_dict(), "trial": trial}, self.parents)
        self.note_contents(folder)

    def note_contents(self, folder: Path | None = None) -> None:
        """Adds the hashes of the current state to `wrote`, so that a ruined checkpoint is recognised under any name."""
        tensors = tensors_of(self.task.state_dict()) if self.first_active is not None else {}
        if tensors:
            self._note(self.step, folder, tensor_contents(tensors))

    def _note_files(self) -> None:
        """Adds the checkpoint files that a process wrote, once it has ended: those of a ruined trial and of the sound baseline."""
        assert self.verdict is not None
        wanted = self.verdict.verdict == Verdict.PRUNED or (self.role == Role.BASELINE and self.verdict.verdict == Verdict.SAFE)
        for step, path in self.task.written() if wanted else ():
            if (contents := file_contents(path)) is not None:
                self._note(step, path, contents)

    def _note(self, step: int, path: Path | None, contents: Contents) -> None:
        found = {"step": step, "path": path and str(path), "contents": asdict(contents), "parents": list(self.parents)}
        self.wrote.append(found)

    def load(self, folder: Path) -> None:
        """Resumes from a checkpoint of a trial with the same configuration, after `start`."""
        state = load_checkpoint(folder)
        trial = state["trial"]
        for name, mine in (("config", self.config), ("seed", self.seed), ("role", self.role)):
            if trial[name] != mine:
                raise UserError(f"checkpoint {folder}: its {name} is {trial[name]!r}, this trial's is {mine!r}")
        digest = None if self.baseline is None else self.baseline.sha256
        if trial["baseline"] != digest:
            raise UserError(f"checkpoint {folder}: it was judged against another baseline")
        self.task.load_state_dict(state["task"])
        try:
            self._load_state(trial)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"checkpoint {folder}: saved by another version ({error})") from None
        self.note_contents(folder)

    def _load_state(self, trial: Mapping[str, Any]) -> None:
        self.watch.load_state_dict(trial["watch"])
        self.warnings = [Violation(**warning) for warning in trial["warnings"]]
        self.series = {name: dict(points) for name, points in trial["series"].items()}
        self.first_active, self.logged = trial["first_active"], trial.get("logged", [])
        self.curve = [(step, value) for step, value in trial.get("curve", [])]
        if "losses" in trial:  # not in a checkpoint of an earlier version
            self.losses.load_state_dict(trial["losses"])
        self.step = trial["step"]
        if (verdict := trial["verdict"]) is not None:  # saved after the end: nothing to resume
            violation = verdict["violation"]
            self.verdict = Judgement(
                **{**verdict, "verdict": Verdict(verdict["verdict"]), "violation": violation and Violation(**violation)}
            )

    # -- verdicts

    def _check_again(self) -> None:
        """Repeats the checks of `start`, with the settings and pairing known from the training's first record."""
        self.effective = dict(self.task.effective())
        self.verdict = self._check_effective() or self._check_baseline()
        self.watch.rebind(self._bound_guards())

    @property
    def _takes_samples(self) -> bool:
        """Whether this trial takes samples for a smoke test. If not, they arrive in the records, or no guard judges them."""
        return self.smoke_test is not None and self.task.takes_samples

    def _due(self, before: int) -> bool:
        """Whether a smoke test was due after one of the steps since `before`."""
        assert self.smoke_test is not None
        return any(self.smoke_test.due(step, self.plan.last_step) for step in range(before + 1, self.step + 1))

    @property
    def smoke_test(self) -> SmokeTest | None:
        return next((guard for guard in self.watch.guards if isinstance(guard, SmokeTest)), None)

    def _bound_guards(self) -> list[Guard]:
        """The guards for this trial. Without a baseline (as in a baseline run) nothing is compared."""
        clipped = self.effective.get("max_grad_norm") is not None
        bound: list[Guard] = []
        for guard in self.plan.guards:
            if isinstance(guard, NormRatio) and self.role == Role.BASELINE:
                bound.append(guard.required)
            elif isinstance(guard, NormRatio) and self.baseline is not None:
                bound.append(guard.bind(self.baseline, self.seed if self.paired else None, clipped))
            elif isinstance(guard, Divergence) and self.baseline is not None:
                bound.append(guard.bind(self.baseline, self.seed if self.paired else None, self._has_other_loss_terms))
            elif not isinstance(guard, NormRatio):
                bound.append(guard)
        return bound

    @property
    def _has_other_loss_terms(self) -> bool:
        """Whether a weight of the loss differs from the baseline's, so that their values cannot be compared."""
        assert self.baseline is not None
        reference = self.baseline.reference(self.seed).effective
        return any(
            not same_setting(self.effective[name], reference[name])
            for name in set(self.effective) & set(reference)
            if name.startswith(AUXILIARY_KEYS) or LOSS_TERM.search(name)
        )

    def _check_effective(self) -> Judgement | None:
        """Checks that the requested settings are in force (in one known training the comments said 0.1, the script passed 1)."""
        for name, asked in self.config.items():
            if name in self.effective and not same_setting(asked, self.effective[name]):
                in_force = self.effective[name]
                line = self.task.where_printed(name)
                words = f"{name} was set to {asked!r} but {in_force!r} is in force: the parameter does not reach the training"
                if line:
                    words += f"; it printed {line!r}"
                return Judgement(Verdict.BAD_SETUP, words)
        return None

    def _check_baseline(self) -> Judgement | None:
        """Checks that the baseline is the same training except for the auxiliary loss. If a searched key of the optimiser differs,
        the comparison continues unpaired."""
        if self.baseline is None:
            return None
        self.unpaired = ""
        reference = self.baseline.reference(self.seed).effective
        for name in sorted(set(self.effective) & set(reference)):
            if name.startswith(AUXILIARY_KEYS) or same_setting(self.effective[name], reference[name]):
                continue
            if name not in self.searched:
                words = f"{name} is {self.effective[name]!r} here and {reference[name]!r} in the baseline: not comparable"
                return Judgement(Verdict.BAD_SETUP, words)
            self.unpaired = "a searched key of the optimiser differs from the baseline's"
        if not self.task.is_paired:
            self.unpaired = "the batches are the command's own: it does not get the seed"
        return None

    def _judge(self, records: Sequence[Record], made: list[Record]) -> None:
        """Judges records one by one. Records after a violation that ends the trial are discarded."""
        for record in records:
            try:
                violations = self.watch.update(record)
            except MissingMetric as error:
                made.append(record)
                self.verdict = Judgement(Verdict.ERROR, self._missing(error))
                return
            ratio = self.norm_ratio() if TOTAL_NORM in record.values else None
            made.append(record if ratio is None else Record(record.step, {**record.values, NORM_RATIO: ratio}))
            self._keep_image(record)
            self._keep_series(record)
            self._keep_objective(record)
            self._keep_names(record)
            if self.first_active is None and TOTAL_NORM in record.values and record.values.get(ACTIVE_FRACTION, 1.0) > 0:
                self.first_active = record.step
            for violation in violations:
                if violation.action is Action.PROBE:
                    self.warnings.append(violation)
                    self._probe(violation, made)
                elif violation.action is Action.WARN:
                    self.warnings.append(violation)
                else:
                    self._end_with(violation)
                if self.verdict is not None:
                    return

    def _missing(self, error: MissingMetric) -> str:
        """The error, with the log lines that could not be parsed: the value may have been printed as text."""
        problem = self.task.reading_problem()
        return f"{error}; {problem}" if problem else str(error)

    def _keep_image(self, record: Record) -> None:
        """Keeps the picture of samples that arrived in the records."""
        arrived = (
            self.smoke_test is not None and not self.task.takes_samples and any(name.startswith(SMOKE) for name in record.values)
        )
        if arrived and (image := self.task.image(record.step)) is not None:
            self.images[record.step] = image

    def _keep_series(self, record: Record) -> None:
        """Keeps the norms and losses of a baseline run, for comparison in later trials."""
        if self.role == Role.BASELINE:
            for name in (TOTAL_NORM, TOTAL_NORM_MAIN, LOSS):
                if name in record.values:
                    self.series.setdefault(name, {})[record.step] = record.values[name]

    def _keep_objective(self, record: Record) -> None:
        objective = self.plan.objective
        if (value := record.values.get(objective.metric)) is not None:
            self.logged = objective.remember([*self.logged, value])
            if self.role == Role.BASELINE:
                self.series.setdefault(objective.metric, {})[record.step] = value
            elif self.baseline is not None and record.step != self.plan.steps:
                self._compare(record.step, value)

    def _keep_names(self, record: Record) -> None:
        names = {name for name in record.values if not name.startswith((SMOKE, SMOKE_AGAIN))}
        if names or not record.values:  # of the training, not of samples alone
            self.logged_names |= names
            self.losses.add(Table([record.step], rows=[record.values]))

    def _evaluation_due(self, before: int, ended: bool) -> bool:
        return not (ended or self.task.reports_after_last_step) and any(
            before < step <= self.step for step in self.plan.evaluate_at
        )

    def _held_out(self) -> float:
        """The objective's metric now. Raises UserError if it is not evaluated."""
        name, found = self.plan.objective.metric, self.task.evaluate()
        if name not in found:
            raise UserError(f"step {self.step}: no held-out {name} in the evaluation, found {', '.join(found) or 'nothing'}")
        return float(found[name])

    def _compare(self, step: int, value: float) -> None:
        """Compares with the baseline at the same step, and with the rival. Stops the trial if it is behind."""
        assert self.baseline is not None
        objective = self.plan.objective
        reference = self.baseline.reference(self.seed).series.get(objective.metric, {}).get(step)
        if reference is None or not math.isfinite(value - reference):
            return
        improvement = objective.improvement({objective.delta: value - reference})
        self.curve.append((step, improvement))
        if self.rival is not None and step == self.rival[0] and improvement < self.rival[1]:
            behind = f"its improvement is {improvement:+.4g} there, the best trial so far had {self.rival[1]:+.4g}"
            self.verdict = Judgement(Verdict.STOPPED, f"stopped at step {step}, since it is behind: {behind}")

    def measure(self) -> dict[str, float]:
        """Held-out metrics, and the objective's metric if the training logs it."""
        return self.plan.objective.measure(self.task.evaluate(), self.logged)

    def _probe(self, cause: Violation, made: list[Record]) -> None:
        """Runs a smoke test at once. The training continues unless both noise draws fail."""
        record = self._smoke_record(again=True) if self._takes_samples else None
        if record is None:
            self._end_with(replace(cause, action=Action.PRUNE))
            return
        made.append(record)
        for violation in self.watch.update(record):
            if not violation.action.ends_trial:
                self.warnings.append(violation)
                continue
            self._end_with(replace(violation, sentence=f"{violation.sentence} (tested because {cause.sentence})"))

    def _last_step_of_baseline(self) -> int:
        assert self.baseline is not None
        return self.baseline.reference(self.seed).last_step

    def _end_with(self, violation: Violation) -> None:
        is_baseline = self.role == Role.BASELINE
        words = f"the baseline itself fails: {violation.sentence}" if is_baseline and self.step else violation.sentence
        ruined = violation.action is Action.ABORT or is_baseline
        self.step = violation.step
        self.verdict = Judgement(Verdict.BAD_SETUP if ruined else Verdict.PRUNED, words, violation)

    def _smoke(self, made: list[Record], again: bool = False) -> None:
        record = self._smoke_record(again)
        if record is not None:
            self._judge([record], made)

    def _smoke_record(self, again: bool = False) -> Record | None:
        """Statistics of fixed samples. At the last step, or with `again`, a failure is retried with the second noise draw. None if
        there is nothing to sample from yet."""
        guard = self.smoke_test
        assert guard is not None
        sample = self.task.sample(0)
        if sample is None:
            return None
        require_kind(sample)
        require_range(sample)
        values = statistics_of(sample)
        if self.plan.image_grids and len(sample.images):
            self.images[self.step] = draw_grid(sample)
        record = {SMOKE + name: value for name, value in values.items()}
        start = self.watch.state_of(guard.name)["start"] or values
        if (
            (again or self.step >= self.plan.last_step)
            and guard.findings(values, start)
            and (second := self.task.sample(1)) is not None
        ):
            record |= {SMOKE_AGAIN + name: value for name, value in statistics_of(second).items()}
        return Record(self.step, record)

    def _finish(self) -> Judgement:
        """The verdict after the last step, if no guard has ended the trial."""
        if self.first_step_past_end is not None and not self.step:
            return Judgement(
                Verdict.ERROR,
                f"the training's first record after step 0 is at step {self.first_step_past_end}, but the trial has "
                f"{self.plan.steps} steps: nothing of it could be judged; let it "
                "log more often, or raise `steps` (a count of images or tokens is no step)",
            )
        try:
            unjudged = [*self.watch.finish(), *unwatched_end(self.watch, self.losses)]
        except MissingMetric as error:
            return Judgement(Verdict.ERROR, self._missing(error))
        if self.baseline is not None and self.step < (last := self._last_step_of_baseline()) and self.step < self.plan.last_step:
            words = f"the training ended by itself at step {self.step}, the baseline's at {last}: not comparable"
            return Judgement(Verdict.ERROR, words)
        found = self.measure()
        reference = {} if self.baseline is None else self.baseline.reference(self.seed).evaluation
        compared = dict.fromkeys(("ssim", "psnr", *(goal.metric for goal in self.plan.objective.goals)))
        deltas = {f"delta_{name}": found[name] - reference[name] for name in compared if name in found and name in reference}
        metrics, words = found | deltas, f"safe to step {self.step}"
        if unjudged:
            return Judgement(Verdict.ERROR, "; ".join(unjudged), metrics=metrics)
        self.remarks += tuple(guards_without_loss(self.watch, self.losses, self.logged_names))
        self.remarks += tuple(rules_without_metric(self.plan, found if self.baseline is None else reference))
        if self.baseline is None:
            if self.plan.requires_objective and (
                problem := self.plan.objective.problem(found, self.logged, list(self.logged_names))
            ):
                return Judgement(Verdict.ERROR, problem, metrics=metrics)
            return Judgement(Verdict.SAFE, words, metrics=metrics)
        margins = list(margins_of(self.plan, self.watch, self.baseline, found, reference))
        if broken := [margin for margin in margins if margin.is_broken]:
            worst = max(broken, key=lambda margin: margin.harm)
            words = worst.sentence
            violation = Violation(OF_MARGINS, self.step, worst.metric, worst.value, worst.limit, Action.WARN, words)
            return Judgement(Verdict.DEGRADED, words, violation, metrics)
        if lost := not_measured(self.plan, found, reference):
            words = f"objective.keep: the baseline measured {', '.join(lost)}, this trial did not"
            return Judgement(Verdict.ERROR, words, metrics=metrics)
        self.checked = (*guards_that_judged(self.watch), *(margin.sentence for margin in margins))
        if not self.checked:
            return Judgement(Verdict.ERROR, NOTHING_COMPARED, metrics=metrics)
        how = f" (unpaired: {self.unpaired})" if self.unpaired else ""
        return Judgement(Verdict.SAFE, f"{words}: no guard fired, nothing worse than the margins{how}", metrics=metrics)

    def _per_image(self) -> dict[str, list[float]]:
        if self.role is Role.SEARCH:
            return {}
        return {name: list(map(float, values)) for name, values in self.task.per_image().items()}


def _resolve(pending: Sequence[tuple[int, Mapping[str, Number]]]) -> list[Record]:
    """Metrics of several steps, with one copy from the device."""
    tensors = [value for _, metrics in pending for value in metrics.values() if isinstance(value, torch.Tensor)]
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))
    together = [tensor.detach().double().reshape(()).to(device, non_blocking=True) for tensor in tensors]
    numbers = iter(torch.stack(together).tolist() if together else [])
    return [
        Record(
            step,
            {name: next(numbers) if isinstance(value, torch.Tensor) else float(value) for name, value in metrics.items()},
        )
        for step, metrics in pending
    ]
