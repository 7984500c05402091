"""Optuna search that learns from pruned trials. Its suggestions do not depend on which trial ends first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from scipy.stats import qmc

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import append_line
from tune_ssim.before_launch.forecast import forecast_space, gain_at, predicted, skip_sentence
from tune_ssim.guards.verdict import Verdict
from tune_ssim.probes.norm_model import NormModel
from tune_ssim.results.study_folder import Skipped
from tune_ssim.search.search import Done, Outcome, Suggestion, Wait
from tune_ssim.study.objective import Goal
from tune_ssim.study.space import GAIN, MAX_T, Space, Stage, gain_of, resolve_settings

HARM = "harm"  # name of the constraint in Optuna; feasible if <= 0
MAX_SKIPPED_IN_A_ROW = 200  # less than a second of suggestions (TPE takes 3 ms, FACTS §3)
DEFAULT_LATIN_POINTS = 6  # with the bundled space's three points: one below the ten start-up trials of Optuna's TPE


class OptunaSearch:
    """Suggests settings of one stage: its listed points, then `n_latin` points of a Latin hypercube, then those of the sampler.

    A pruned trial is reported to Optuna as PRUNED and a degraded one as COMPLETE, both with a graded constraint (FACTS §3): how far
    beyond the guard's limit or the `keep` rule they were. Each parameter's range is cut into `n_latin` equal parts with one point
    in each, so that a small budget covers a range of six decades for every seed.

    deterministic: suggestion k uses exactly the results of the slots <= k - 2 * concurrency, reported in slot order, whichever
    trial ends first. Not guaranteed under ASHA or PBT, which stop trials by wall-clock order.

    distributions: Optuna distributions by name, instead of a stage. also: further objectives; the sampler then searches the Pareto
    front. model: the calibrated norm model, which converts norm ratios into gains for a stage with `unit: norm_ratio`. limit: of
    the norm guard. max_ratio: settings whose predicted ratio exceeds it are not launched but listed in `skipped`; they are reported
    to the sampler as harmful, and it is asked again. They do not count as trials. skip_log: a file to which each is appended.

    Raises UserError if no setting of the stage can be launched.
    """

    def __init__(
        self,
        stage: Stage | None = None,
        distributions: Mapping[str, BaseDistribution] | None = None,
        *,
        direction: Literal["maximize", "minimize"] = "maximize",
        also: Sequence[Goal] = (),
        sampler: optuna.samplers.BaseSampler | None = None,
        seed: int = 0,
        n_latin: int = DEFAULT_LATIN_POINTS,
        concurrency: int = 1,
        deterministic: bool = True,
        model: NormModel | None = None,
        limit: float | None = None,
        max_ratio: float | None = None,
        skip_log: str | Path | None = None,
    ) -> None:
        self.stage = stage
        self.concurrency, self.deterministic = concurrency, deterministic
        self.model, self.limit, self.max_ratio = model, limit, max_ratio
        self.skip_log = None if skip_log is None else Path(skip_log)
        self.skipped: list[Skipped] = []
        if stage is not None:
            self._check_stage(stage)
            distributions = {name: domain.to_optuna() for name, domain in stage.parameters.items()}
        self.distributions = dict(distributions or {})
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # TPE takes over after the points and the hypercube, which replace its random start-up.
        sampler = sampler or optuna.samplers.TPESampler(seed=seed, n_startup_trials=n_latin)
        self.also = tuple(also)
        directions = [direction, *(goal.direction for goal in also)]
        self.study = optuna.create_study(directions=directions, sampler=sampler, pruner=optuna.pruners.NopPruner())
        self._trials: list[optuna.Trial] = []  # by slot
        self._waiting: dict[int, Outcome] = {}  # by slot, not yet reported to Optuna
        self._n_told = 0  # slots told so far, in deterministic order
        if stage is not None and stage.parameters:
            for point in stage.points:
                self.study.enqueue_trial(
                    self._coordinates(point, stage), user_attrs={"as_written": dict(point)}, skip_if_exists=False
                )
            for place in latin_hypercube(stage, n_latin, seed):
                self.study.enqueue_trial(place)

    def ask(self) -> Suggestion | Wait | Done:
        if self.deterministic and not self._tell_up_to(len(self._trials) - 2 * self.concurrency):
            return Wait()
        for _ in range(MAX_SKIPPED_IN_A_ROW):
            trial = self.study.ask(self.distributions)
            settings = self._launchable(trial)
            if settings is not None:
                self._trials.append(trial)
                return Suggestion(len(self._trials) - 1, settings, self.stage.name if self.stage else None)
        return Done(f"{MAX_SKIPPED_IN_A_ROW} suggestions in a row were not launched; the last: {self.skipped[-1].sentence}")

    def tell(self, slot: int, outcome: Outcome) -> None:
        self._waiting[slot] = outcome
        if not self.deterministic:
            self._tell(slot)

    def replace(self, slot: int, settings: Mapping[str, Any]) -> bool:
        """False for settings outside the space."""
        if self.stage is None or slot != len(self._trials) - 1:
            return False
        try:
            place = self._coordinates(settings, self.stage)
        except (KeyError, ValueError, UserError):
            return False
        if any(value not in self.stage.parameters[name] for name, value in place.items()):
            return False  # Optuna itself only warns
        self.study.tell(self._trials[slot], state=TrialState.FAIL)
        self.study.enqueue_trial(place, user_attrs={"replaces": slot}, skip_if_exists=False)
        earlier = []  # of the queue: Optuna takes the oldest first
        while (trial := self.study.ask(self.distributions)).user_attrs.get("replaces") != slot:
            earlier.append(trial)
        for queued in earlier:
            self.study.enqueue_trial(queued.params, user_attrs=queued.user_attrs, skip_if_exists=False)
            self.study.tell(queued, state=TrialState.FAIL)
        self._trials[slot] = trial
        return True

    def _tell_up_to(self, last_slot: int) -> bool:
        """Reports all slots up to `last_slot` to Optuna. False while one of them is still running."""
        while self._n_told <= last_slot:
            if self._n_told not in self._waiting:
                return False
            self._tell(self._n_told)
            self._n_told += 1
        return True

    def _tell(self, slot: int) -> None:
        outcome, trial = self._waiting.pop(slot), self._trials[slot]
        if outcome.failed:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        values = [outcome.value, *(outcome.metrics.get(goal.name, math.nan) for goal in self.also)]
        complete = all(map(math.isfinite, values)) and outcome.verdict in (None, Verdict.SAFE, Verdict.DEGRADED)
        trial.set_constraint(HARM, outcome.harm if math.isfinite(outcome.harm) else (0.0 if complete else 1.0))
        if complete:
            self.study.tell(trial, values)
        else:  # pruned by a guard, or stopped by a scheduler
            self.study.tell(trial, state=TrialState.PRUNED)

    def _launchable(self, trial: optuna.Trial) -> dict[str, Any] | None:
        """The settings in the form that a training takes; None if they are skipped."""
        if self.stage is None:
            return dict(trial.params)
        written = trial.user_attrs.get("as_written")
        sampled = {**self.stage.fixed, **(trial.params if written is None else written)}
        if written is None and self.stage.is_relative:
            ratio = float(sampled.pop(GAIN))
            try:
                sampled[GAIN] = gain_at(_needed(self.model, self.stage), ratio, sampled)
            except ValueError as error:
                self._skip(trial, Skipped(self.stage.name, sampled, ratio, str(error)))
                return None
        settings = resolve_settings(sampled)
        if self.model is None or self.max_ratio is None or self.limit is None:
            return settings
        prediction = predicted(self.model, settings)
        if prediction.clamped or not prediction.ratio > self.max_ratio:  # NaN is no evidence of harm
            return settings
        sentence = skip_sentence(prediction, self.max_ratio, self.limit)
        skipped = Skipped(self.stage.name, settings, prediction.ratio, sentence)
        self._skip(trial, skipped, harm=math.log10(prediction.ratio / self.limit))
        return None

    def _skip(self, trial: optuna.Trial, skipped: Skipped, harm: float | None = None) -> None:
        if harm is None:
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_constraint(HARM, harm)
            self.study.tell(trial, state=TrialState.PRUNED)
        self.skipped.append(skipped)
        if self.skip_log is not None:
            append_line(self.skip_log, asdict(skipped))

    def _check_stage(self, stage: Stage) -> None:
        """Raises UserError if no setting of the stage can be launched."""
        if stage.is_relative:
            model, problems = _needed(self.model, stage), []
            domain, gates = stage.parameters[GAIN], stage.parameters.get(MAX_T)
            for max_t in gates.upper_values if gates else [stage.fixed.get(MAX_T)]:
                try:
                    gain_at(model, domain.bounds[1], stage.fixed if max_t is None else {**stage.fixed, MAX_T: max_t})
                    break
                except ValueError as error:
                    problems.append(str(error))
            else:
                raise UserError(f"stage {stage.name!r}: no setting can be launched: {problems[-1]}")
        if self.model is not None and self.max_ratio is not None and self.limit is not None:
            lowest = _lowest_ratio(self.model, stage)
            if lowest > self.max_ratio:
                raise UserError(
                    f"stage {stage.name!r}: the predicted ratio of every setting exceeds {self.max_ratio:g} "
                    f"({self.max_ratio / self.limit:g}x the norm guard's limit): the mildest has {lowest:.3g}x the baseline's "
                    "total_norm; lower the gain, use `unit: norm_ratio`, or set search.skip_beyond: null"
                )

    def _coordinates(self, point: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
        """Converts a full setting to the parameters that the stage searches. Raises UserError if its norm ratio lies outside."""
        place = {name: gain_of(point) if name == GAIN else point[name] for name in stage.parameters}
        if not stage.is_relative:
            return place
        ratio, domain = predicted(_needed(self.model, stage), {**stage.fixed, **point}).ratio, stage.parameters[GAIN]
        if ratio not in domain:
            where = f"stage {stage.name!r}: the point gain {gain_of(point):g} @ {point[MAX_T]:g}"
            raise UserError(f"{where} has a predicted norm ratio of {ratio:.4g}, outside the space: {domain}")
        return {**place, GAIN: domain.clip(ratio)}


def latin_hypercube(stage: Stage, count: int, seed: int) -> Sequence[dict[str, Any]]:
    if count < 1 or not stage.parameters:
        return []
    unit = qmc.LatinHypercube(d=len(stage.parameters), rng=seed).random(count)
    return [{name: domain.at(float(u)) for (name, domain), u in zip(stage.parameters.items(), row, strict=True)} for row in unit]


def _lowest_ratio(model: NormModel, stage: Stage) -> float:
    """The lowest predicted norm ratio in the stage."""
    if stage.is_relative:
        return stage.parameters[GAIN].bounds[0]
    return forecast_space(model, Space(name=stage.name, stages=(stage,))).widest[0]


def _needed(model: NormModel | None, stage: Stage) -> NormModel:
    if model is None:
        raise UserError(f"stage {stage.name!r} gives its gain as a norm ratio: calibrate first and pass the norm model")
    return model
