"""Who is tried next: the baseline first, then suggestions that learn from pruned trials, in an order that does not depend on
which trial happens to end first."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from scipy.stats import qmc

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import append_line, write_atomically
from tune_ssim.before_launch.forecast import forecast, gain_at, skip_sentence
from tune_ssim.guards import Baseline, BaselineRun
from tune_ssim.orchestration.trainable import CONTEXT
from tune_ssim.probes.norm_model import NormModel
from tune_ssim.results.study_folder import Skipped
from tune_ssim.results.trial_text import shown_metric
from tune_ssim.study.space import GAIN, Choice, LogUniform, Space, Stage, Uniform, gain_of, resolve_settings
from tune_ssim.trials.summary import OBJECTIVE

HARM = "harm"  # the constraint's name in Optuna; feasible <= 0
MAX_SKIPPED_IN_A_ROW = 200  # less than a second of suggestions (TPE takes 3 ms, FACTS §3)


def param_space(space: Space | Stage, model: NormModel | None = None) -> dict[str, Any]:
    """A space as Ray domains, for `tune.Tuner(param_space=…)`: trainables made by `make_trainable` understand `gain`.

    A gain with `unit: norm_ratio` needs a calibrated `model`. It is then a function of the other domains, which Ray's own random
    search resolves; a searcher with distributions of its own needs `GuardedOptunaSearch(stage, model=model)` instead.
    Raises ValueError for a route of several stages, UserError without a model that is needed."""
    stages = space.stages if isinstance(space, Space) else (space,)
    if len(stages) != 1:
        raise ValueError(f"a route of {len(stages)} stages is not one space: pick a stage, or use StagedSearch")
    domains: dict[str, Any] = dict(stages[0].fixed)
    for name, parameter in stages[0].parameters.items():
        if isinstance(parameter, LogUniform):
            domains[name] = tune.loguniform(parameter.lower, parameter.upper)
        elif isinstance(parameter, Uniform):
            domains[name] = tune.uniform(parameter.lower, parameter.upper)
        else:
            domains[name] = tune.choice(list(parameter.values))
    if stages[0].is_relative:
        domains[GAIN] = tune.sample_from(_GainFromRatio(_needed(model, stages[0]), domains[GAIN]))
    return domains


def _least_ratio(model: NormModel, stage: Stage) -> float:
    """The mildest that the stage has, as predicted."""
    if stage.is_relative:
        domain = stage.parameters[GAIN]
        return float(min(domain.values) if isinstance(domain, Choice) else domain.lower)
    return forecast(model, Space(name=stage.name, stages=(stage,))).widest[0]


class _GainFromRatio:
    """The gain that gives the other settings of a configuration a sampled norm ratio."""

    def __init__(self, model: NormModel, ratio: Any) -> None:
        self.model, self.ratio = model, ratio

    def __call__(self, spec: Any) -> float:
        config = spec.config if "config" in spec else spec
        names = ("ssim_loss_max_t", "pixel_loss_weight")
        # As attributes: only so does Ray see that it must draw them first.
        return gain_at(self.model, self.ratio.sample(), {name: getattr(config, name) for name in names if name in config})


def _needed(model: NormModel | None, stage: Stage) -> NormModel:
    if model is None:
        raise UserError(f"stage {stage.name!r} gives its gain as a norm ratio: calibrate first and pass the norm model")
    return model


def _distribution(parameter: LogUniform | Uniform | Choice) -> optuna.distributions.BaseDistribution:
    if isinstance(parameter, Choice):
        return optuna.distributions.CategoricalDistribution(parameter.values)
    return optuna.distributions.FloatDistribution(parameter.lower, parameter.upper, log=isinstance(parameter, LogUniform))


class GuardedOptunaSearch(OptunaSearch):
    """Optuna that knows about pruning: a pruned trial is told PRUNED with a graded constraint, a degraded one COMPLETE with one.

    Starts with the stage's points as written, then `n_latin` points of a Latin hypercube (each parameter's range is cut into
    `n_latin` equal parts, one point in each: a small budget covers a range of six decades for every seed), then the sampler.

    deterministic: suggestion k is made from exactly the results of the slots <= k - 2 * concurrency, told in the order of the
    slots, whichever trial ends first. Intermediate results are never forwarded. Not promised under ASHA or PBT, which stop
    trials by wall-clock order.

    `stage` None: the distributions come from the Tuner's `param_space`, as with Ray's own OptunaSearch.

    model: what a calibration measured. It turns norm ratios into gains where the stage gives them so, and with `skip_above`
    (`limit` is the norm guard's) settings that are predicted beyond are put on the list `skipped` instead of being launched:
    the sampler is told that they are harmful, and asked again. They do not count as trials. If nothing but such settings comes,
    the search ends and `reason` says so. skip_log: a file to which each of them is appended at once, for `read_skipped`: the list
    of a search that Ray restores is out of reach. Raises UserError where a stage holds nothing that could be launched.
    """

    def __init__(
        self,
        stage: Stage | None = None,
        *,
        metric: str = OBJECTIVE,
        mode: str = "max",
        sampler: optuna.samplers.BaseSampler | None = None,
        seed: int = 0,
        n_latin: int = 6,  # with the bundled space's three points: one under Optuna's ten start-up trials of TPE
        concurrency: int = 1,
        deterministic: bool = True,
        model: NormModel | None = None,
        limit: float | None = None,
        skip_above: float | None = None,
        skip_log: str | Path | None = None,
    ) -> None:
        if sampler is None:
            # After the points and the Latin hypercube TPE takes over; its own random start-up would only repeat them.
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=n_latin)
        distributions = {name: _distribution(p) for name, p in stage.parameters.items()} if stage else None
        self.stage = stage
        self.concurrency, self.deterministic = concurrency, deterministic
        self.model, self.limit, self.skip_above, self.skip_log = model, limit, skip_above, skip_log
        self.skipped: list[Skipped] = []
        self.reason = ""  # why the search ended by itself
        if stage is not None:
            self._check_stage(stage)
        self._slots: list[str] = []  # trial ids in the order of their suggestion
        self._waiting: dict[str, dict[str, Any]] = {}  # results that are not told yet
        self._told = 0  # slots told so far (deterministic)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        super().__init__(space=distributions, metric=metric, mode=mode, sampler=sampler)
        if stage and distributions:
            for point in stage.points:
                place = self._in_space(point, stage)
                self._ot_study.enqueue_trial(place, user_attrs={"as_written": dict(point)}, skip_if_exists=False)
            for point in _latin_hypercube(stage, n_latin, seed):
                self._ot_study.enqueue_trial(point)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.deterministic and not self._tell_in_order(len(self._slots) - 2 * self.concurrency):
            return None  # Ray asks again
        for _ in range(MAX_SKIPPED_IN_A_ROW):
            suggestion = super().suggest(trial_id)
            if suggestion is None:
                return None
            config = self._launchable(trial_id, suggestion)
            if config is not None:
                self._slots.append(trial_id)
                return config
        self.reason = f"{MAX_SKIPPED_IN_A_ROW} suggestions in a row were not launched; the last: {self.skipped[-1].sentence}"
        return str(Searcher.FINISHED)

    def _launchable(self, trial_id: str, suggestion: Mapping[str, Any]) -> dict[str, Any] | None:
        """The suggestion as a task takes it; None if it is skipped."""
        if self.stage is None:
            config = dict(suggestion)
        else:
            written = self._ot_trials[trial_id].user_attrs.get("as_written")
            sampled = {**self.stage.fixed, **(written if written is not None else suggestion)}
            if written is None and self.stage.is_relative:
                ratio = float(sampled[GAIN])
                try:
                    sampled[GAIN] = gain_at(_needed(self.model, self.stage), ratio, sampled)
                except ValueError as error:
                    without = {name: value for name, value in sampled.items() if name != GAIN}  # it is a ratio still
                    self._skip(trial_id, without, ratio, str(error))
                    return None
            config = resolve_settings(sampled)
        if self.model is None or self.skip_above is None or self.limit is None:
            return config
        prediction = self.model.predict_setting(config)
        if prediction.clamped or not prediction.ratio > self.skip_above:  # a NaN is no evidence against it
            return config
        sentence = skip_sentence(prediction, self.skip_above, self.limit)
        self._skip(trial_id, config, prediction.ratio, sentence, harm=math.log10(prediction.ratio / self.limit))
        return None

    def _skip(self, trial_id: str, config: dict[str, Any], ratio: float, sentence: str, harm: float | None = None) -> None:
        trial = self._ot_trials.pop(trial_id)
        if harm is None:
            self._ot_study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            trial.set_constraint(HARM, harm)
            self._ot_study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        skipped = Skipped(self.stage.name if self.stage else "", config, ratio, sentence)
        self.skipped.append(skipped)
        if self.skip_log is not None:
            append_line(Path(self.skip_log), asdict(skipped))

    def _check_stage(self, stage: Stage) -> None:
        """Raises UserError unless something in the stage can be launched."""
        if stage.is_relative:
            model, problems = _needed(self.model, stage), []
            domain = stage.parameters[GAIN]
            top = max(domain.values) if isinstance(domain, Choice) else domain.upper
            gates = stage.parameters.get("ssim_loss_max_t")
            for gate in gates.values if isinstance(gates, Choice) else [None]:
                setting = stage.fixed if gate is None else {**stage.fixed, "ssim_loss_max_t": gate}
                if gate is None and gates is not None:  # a range of gates: its widest end
                    setting = {**stage.fixed, "ssim_loss_max_t": gates.upper}  # type: ignore[union-attr]
                try:
                    gain_at(model, float(top), setting)
                    break
                except ValueError as error:
                    problems.append(str(error))
            else:
                raise UserError(f"stage {stage.name!r}: no setting can be launched: {problems[-1]}")
        if self.model is not None and self.skip_above is not None and self.limit is not None:
            least = _least_ratio(self.model, stage)
            if least > self.skip_above:
                raise UserError(
                    f"stage {stage.name!r}: every setting is predicted beyond {self.skip_above:g} "
                    f"({self.skip_above / self.limit:g}x the norm guard's limit): the mildest has {least:.3g}x the baseline's "
                    "total_norm; lower the gain, use `unit: norm_ratio`, or set search.skip_beyond: null"
                )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: what a sampler learns must not depend on how far other trials happen to be."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self._ot_trials or trial_id in self._completed_trials or trial_id in self._waiting:
            return
        keep = ("verdict", HARM, self.metric, "error")
        self._waiting[trial_id] = {key: (result or {}).get(key) for key in keep} | {"error": error}
        if not self.deterministic:
            self._tell(trial_id)

    def _tell_in_order(self, last_slot: int) -> bool:
        """Tells slots up to and with `last_slot`; False while one of them is still running."""
        while self._told <= last_slot:
            trial_id = self._slots[self._told]
            if trial_id not in self._waiting:
                return False
            self._tell(trial_id)
            self._told += 1
        return True

    def _tell(self, trial_id: str) -> None:
        result, trial = self._waiting.pop(trial_id), self._ot_trials[trial_id]
        self._completed_trials.add(trial_id)
        value = result[self.metric]
        verdict = result["verdict"]
        complete = value is not None and math.isfinite(value) and verdict in (None, "safe", "degraded")
        if result["error"] or verdict in ("error", "bad_setup"):
            self._ot_study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return
        harm = result[HARM]
        trial.set_constraint(HARM, harm if harm is not None and math.isfinite(harm) else (0.0 if complete else 1.0))
        if complete:
            self._ot_study.tell(trial, value)
        else:  # pruned by a guard, or stopped by a scheduler
            self._ot_study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def impose(self, trial_id: str, config: Mapping[str, Any]) -> bool:
        """Another configuration in place of the latest suggestion, which is forgotten; False if it is outside the space."""
        if self.stage is None or trial_id not in self._ot_trials:
            return False
        try:
            place = self._in_space(config, self.stage)
            self._ot_study.enqueue_trial(place)
        except (KeyError, ValueError, UserError):
            return False
        self._ot_study.tell(self._ot_trials.pop(trial_id), state=optuna.trial.TrialState.FAIL)
        return super().suggest(trial_id) is not None

    def _in_space(self, point: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
        """A full triple in the coordinates that the stage searches. Raises UserError if its norm ratio lies outside."""
        place = {name: gain_of(point) if name == GAIN else point[name] for name in stage.parameters}
        if not stage.is_relative:
            return place
        ratio, domain = _needed(self.model, stage).predict_setting({**stage.fixed, **point}).ratio, stage.parameters[GAIN]
        if ratio not in domain:
            where = f"stage {stage.name!r}: the point gain {gain_of(point):g} @ {point['ssim_loss_max_t']:g}"
            raise UserError(f"{where} has a predicted norm ratio of {ratio:.4g}, outside the space: {domain}")
        return {**place, GAIN: ratio if isinstance(domain, Choice) else min(max(ratio, domain.lower), domain.upper)}


def _latin_hypercube(stage: Stage, count: int, seed: int) -> list[dict[str, Any]]:
    if count < 1 or not stage.parameters:
        return []
    unit = qmc.LatinHypercube(d=len(stage.parameters), rng=seed).random(count)
    return [
        {name: _at(parameter, float(u)) for (name, parameter), u in zip(stage.parameters.items(), row, strict=True)} for row in unit
    ]


def _at(parameter: LogUniform | Uniform | Choice, u: float) -> Any:
    """The value at the quantile `u` in [0, 1)."""
    if isinstance(parameter, Choice):
        return parameter.values[int(u * len(parameter.values))]
    if isinstance(parameter, Uniform):
        return parameter.lower + u * (parameter.upper - parameter.lower)
    value = math.exp(math.log(parameter.lower) + u * (math.log(parameter.upper) - math.log(parameter.lower)))
    return min(max(value, parameter.lower), parameter.upper)


class StagedSearch(Searcher):
    """A route: the stages of a space one after the other, conservative to aggressive, each with its own searcher.

    The next stage is opened only if the one before was stable *but ineffective* (note 000 §5.1): a stage with a harmful trial
    ends the route, and so does one that already beats the baseline by more than `effective_above`.
    """

    def __init__(self, space: Space, trials: int, *, effective_above: float = 0.0, **search: Any) -> None:
        super().__init__(metric=search.get("metric", OBJECTIVE), mode="max")
        if trials < len(space.stages):
            raise ValueError(f"a route of {len(space.stages)} stages needs at least as many trials, got {trials}")
        self.space, self.effective_above = space, effective_above
        share, more = divmod(trials, len(space.stages))
        self.budgets = [share + (index < more) for index in range(len(space.stages))]
        self.search = dict(search)
        self.stage_index = 0
        self._skipped_before: list[Skipped] = []
        self.reason = ""  # why the route ended before its last stage
        self._searcher = self._make()
        self._suggested: list[str] = []
        self._results: dict[str, dict[str, Any]] = {}

    def _make(self) -> GuardedOptunaSearch:
        stage = self.space.stages[self.stage_index]
        n_latin = max(0, min(self.search.get("n_latin", 6), self.budgets[self.stage_index] - len(stage.points)))
        return GuardedOptunaSearch(stage, **{**self.search, "n_latin": n_latin})

    @property
    def skipped(self) -> list[Skipped]:
        """Of all stages so far: suggestions that were not launched."""
        return [*self._skipped_before, *self._searcher.skipped]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if len(self._suggested) == self.budgets[self.stage_index]:
            if len(self._results) < len(self._suggested):
                return None
            self.reason = self._reason_to_stop()
            if self.reason or self.stage_index + 1 == len(self.space.stages):
                return Searcher.FINISHED
            skipped = self.skipped
            self.stage_index += 1
            try:
                searcher = self._make()
            except UserError as error:  # nothing in it can be launched
                self.reason = str(error)
                return Searcher.FINISHED
            self._skipped_before = skipped
            self._searcher, self._suggested, self._results = searcher, [], {}
        suggestion = self._searcher.suggest(trial_id)
        if isinstance(suggestion, str):
            self.reason = f"stage {self.space.stages[self.stage_index].name!r}: {self._searcher.reason}"
            return suggestion
        if suggestion is None:
            return None
        self._suggested.append(trial_id)
        return {**suggestion, CONTEXT: {"stage": self.space.stages[self.stage_index].name}}

    def impose(self, trial_id: str, config: Mapping[str, Any]) -> bool:
        return self._searcher.impose(trial_id, config)

    def _reason_to_stop(self) -> str:
        name = self.space.stages[self.stage_index].name
        verdicts = [result.get("verdict") for result in self._results.values()]
        if any(verdict in ("pruned", "degraded") for verdict in verdicts):
            return f"stage {name!r} had a harmful trial: the route is not relaxed further"
        best = max((result.get(self.metric) or -math.inf for result in self._results.values()), default=-math.inf)
        if math.isfinite(best) and best > self.effective_above:
            return f"stage {name!r} is effective ({shown_metric(str(self.metric))} {best:+.4f}): no need to push harder"
        return ""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: see GuardedOptunaSearch."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._suggested:
            self._results[trial_id] = {key: (result or {}).get(key) for key in ("verdict", self.metric)}
        self._searcher.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        # Ray's own snapshot, written by this process's user in the study's folder.
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))


class BaselineFirst(Searcher):
    """Hands out the baseline (one trial a seed, side by side), waits for it, then gives every later trial its path and digest.

    baseline_config: settings of the baseline; a key that the space searches must be in it. seeds[0] is the study's own: later
    trials run with it and see the same batches. prefix: of the baselines' names. folder: where the file goes; every node must
    reach it under that path. storage: where the ledger of ruined checkpoints is, and the study's folder, called `study`. past: of
    a study that is resumed, how its trials ended, by their names: the inner searcher is asked and told as it was then, and hands
    out what is missing. If a baseline fails, or the first two trials that end fail alike, the search is over and `failure` says
    why: once one came through, what fails is the setting's fault, and costs its own trial only.
    """

    def __init__(
        self,
        searcher: Searcher,
        baseline_config: Mapping[str, Any],
        *,
        folder: str | Path,
        seeds: Sequence[int] = (0, 1),
        baseline: Baseline | None = None,
        searched: Sequence[str] = (),
        prefix: str = "",
        storage: str | Path | None = None,
        study: str | None = None,
        past: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(metric=searcher.metric, mode=searcher.mode)
        if baseline is None and not seeds:
            raise ValueError("a baseline needs at least one seed")
        self.searcher = searcher
        self.baseline_config, self.seeds, self.folder = dict(baseline_config), list(seeds), str(folder)
        self.searched, self.prefix = list(searched), prefix
        named = {} if study is None else {"study": study}
        self.shared = named if storage is None else {"storage": str(storage), **named}
        self.past = dict(past or {})
        self._inner_ids: dict[str, str] = {}  # Ray's ids → those of the inner searcher
        self.failure = ""
        self._baseline_trials: list[str] = []
        self._runs: dict[str, str] = {}  # trial id → Baseline of one run, as JSON
        self._pointer: dict[str, str] | None = None  # {path, sha256}
        self._setup_errors: dict[str, int] = {}
        self._came_through = any(one.get("role") != "baseline" and _has_verdict(one) for one in self.past.values())
        self._n_suggested = 0
        if baseline is not None:
            self._write(baseline)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return bool(self.searcher.set_search_properties(metric, mode, config, **spec))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.failure:
            return Searcher.FINISHED
        if self._pointer is None:
            index = len(self._baseline_trials)
            if index >= len(self.seeds):
                return None  # the others wait for the baseline
            self._baseline_trials.append(trial_id)
            name, seed = f"{self.prefix}baseline-{index}", self.seeds[index]
            context = {"trial_id": name, "role": "baseline", "seed": seed, "slot": index, **self.shared}
            return {**self.baseline_config, CONTEXT: context}
        while True:
            slot = self._n_suggested
            inner_id = f"slot-{slot}"
            suggestion = self.searcher.suggest(inner_id)
            if suggestion is None or suggestion == Searcher.FINISHED:
                return suggestion
            self._n_suggested += 1
            given = suggestion.get(CONTEXT, {})
            name = given.get("trial_id", f"trial-{slot:02d}")
            if not self._was_run(name, inner_id, suggestion):
                break
        self._inner_ids[trial_id] = inner_id
        context = {
            "trial_id": name,
            "role": "search",
            "seed": self.seeds[0] if self.seeds else 0,
            "slot": slot,
            "baseline": self._pointer,
            **self.shared,
            "searched": self.searched or [key for key in suggestion if key != CONTEXT],
        }
        return {**suggestion, CONTEXT: {**context, **given}}

    def _was_run(self, name: str, inner_id: str, suggestion: Mapping[str, Any]) -> bool:
        """Whether the trial of this slot is among the past; then the inner searcher is told how it ended."""
        past = self.past.get(name)
        if past is None:
            return False
        asked = resolve_settings({key: value for key, value in suggestion.items() if key != CONTEXT})
        same = all(_equal(value, past["config"].get(key)) for key, value in asked.items())
        # Without a fixed order a sampler may come to other suggestions; what was run is still worth knowing.
        if not same and not (hasattr(self.searcher, "impose") and self.searcher.impose(inner_id, past["config"])):
            return False
        self.searcher.on_trial_complete(inner_id, dict(past))
        return True

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._inner_ids:
            self.searcher.on_trial_result(self._inner_ids[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        result = result or {}
        verdict, reason = result.get("verdict"), str(result.get("reason") or "the trial's process died")
        is_baseline = trial_id in self._baseline_trials
        self._came_through |= not is_baseline and not error and _has_verdict(result)
        if verdict in ("bad_setup", "error") and not self._came_through:
            kind = re.sub(r"[-+.\de]*\d", "#", reason)  # alike but for the numbers, which are the trials' own
            self._setup_errors[kind] = self._setup_errors.get(kind, 0) + 1
            if self._setup_errors[kind] >= 2 and not self.failure:
                self.failure = f"two trials failed alike: {reason}"
        if not is_baseline:
            if trial_id in self._inner_ids:
                self.searcher.on_trial_complete(self._inner_ids[trial_id], result, error)
            return
        if error or "baseline_run" not in result:
            self.failure = reason
            return
        self._runs[trial_id] = result["baseline_run"]
        if len(self._runs) == len(self.seeds):
            runs: list[BaselineRun] = []
            for baseline_trial in self._baseline_trials:
                runs += Baseline.from_bytes(self._runs[baseline_trial].encode()).runs
            self._write(Baseline(tuple(runs)))

    def _write(self, baseline: Baseline) -> None:
        path = Path(self.folder) / f"{baseline.sha256}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, baseline.to_bytes())
        self._pointer = {"path": str(path), "sha256": baseline.sha256}

    @property
    def skipped(self) -> list[Skipped]:
        """Suggestions that were not launched."""
        return list(getattr(self.searcher, "skipped", []))

    @property
    def baseline(self) -> Baseline | None:
        return Baseline.read(**self._pointer) if self._pointer else None

    # Ray saves wrappers by get_state and the innermost searcher by save.

    def get_state(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "searcher"}

    def set_state(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def save(self, checkpoint_path: str) -> None:
        self.searcher.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        self.searcher.restore(checkpoint_path)


def _has_verdict(result: Mapping[str, Any]) -> bool:
    """Of a training that could be judged."""
    return result.get("verdict") in ("safe", "degraded", "pruned", "stopped")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)
