"""Adapters from our searches to Ray Tune searchers, for studies and for your own `tune.Tuner`."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch as RayOptunaSearch
from ray.tune.utils.util import unflatten_dict

from tune_ssim.base.errors import UserError
from tune_ssim.before_launch.forecast import gain_at
from tune_ssim.guards import Baseline
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.orchestration.executor import JobSearch
from tune_ssim.orchestration.ray_job import config_of, outcome_of
from tune_ssim.probes.norm_model import NormModel
from tune_ssim.results.study_folder import Skipped
from tune_ssim.search import baseline_first, optuna_search, staged
from tune_ssim.search.search import Done, Outcome, Suggestion, Wait
from tune_ssim.study.domains import LogUniform, Uniform
from tune_ssim.study.objective import OBJECTIVE, Objective
from tune_ssim.study.space import GAIN, MAX_T, Space, Stage
from tune_ssim.trials.job import TrialJob


def param_space(space: Space | Stage, model: NormModel | None = None) -> dict[str, Any]:
    """A space as Ray domains, for `tune.Tuner(param_space=…)`: trainables made by `make_trainable` understand `gain`.

    A gain with `unit: norm_ratio` needs a calibrated `model`. It is then a function of the other domains, which Ray's own random
    search resolves; a searcher with its own distributions needs `GuardedOptunaSearch(stage, model=model)` instead.
    Raises ValueError for a space of several stages, UserError if a model is needed but missing."""
    stages = space.stages if isinstance(space, Space) else (space,)
    if len(stages) != 1:
        raise ValueError(f"the space has {len(stages)} stages: pick one, or use StagedSearch")
    ranges = {LogUniform.kind: tune.loguniform, Uniform.kind: tune.uniform}
    domains: dict[str, Any] = dict(stages[0].fixed)
    for name, parameter in stages[0].parameters.items():
        is_range = parameter.kind in ranges
        domains[name] = ranges[parameter.kind](*parameter.bounds) if is_range else tune.choice(list(parameter.listed))
    if stages[0].is_relative:
        if model is None:
            raise UserError(f"stage {stages[0].name!r} gives its gain as a norm ratio: calibrate first and pass the norm model")
        domains[GAIN] = tune.sample_from(_GainFromRatio(model, domains[GAIN]))
    return domains


class _GainFromRatio:
    """Computes the gain that has the sampled norm ratio, given the other settings of a configuration."""

    def __init__(self, model: NormModel, ratio: Any) -> None:
        self.model, self.ratio = model, ratio

    def __call__(self, spec: Any) -> float:
        config = spec.config if "config" in spec else spec
        # As attributes, so that Ray samples them first.
        others = {name: getattr(config, name) for name in (MAX_T, "pixel_loss_weight") if name in config}
        return gain_at(self.model, self.ratio.sample(), others)


def _objective(metric: str, mode: str | None) -> Objective:
    return Objective(minimize=metric) if mode == "min" else Objective(maximize=metric)


class _AskTell(Searcher):
    """A search with ask and tell as a Ray searcher. Its state is the sequence of calls, which is replayed into a new searcher."""

    def __init__(self, metric: str | None, mode: str | None) -> None:
        """mode: `max` or `min`."""
        super().__init__(metric=metric, mode=mode)
        self.reason = ""  # why the search ended by itself
        self._running: dict[str, Any] = {}  # Ray's id → what was asked
        # (Ray's id, its outcome, or None for a call of `suggest`)
        self._calls: MutableSequence[tuple[str, dict[str, Any] | None]] = []

    def _ask(self) -> Any:
        """A suggestion or a job, or Wait or Done."""
        raise NotImplementedError

    def _tell(self, asked: Any, outcome: Outcome) -> None:
        raise NotImplementedError

    def _config(self, asked: Any) -> dict[str, Any]:
        return config_of(asked)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        asked = self._ask()
        if isinstance(asked, Done):
            self.reason = asked.reason
            return Searcher.FINISHED
        if isinstance(asked, Wait):
            return None
        self._running[trial_id] = asked
        self._calls.append((trial_id, None))
        return self._config(asked)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Does nothing: a search must not depend on the progress of running trials."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._running:
            self._complete(trial_id, outcome_of(result, _objective(str(self.metric), self.mode), error))

    def _complete(self, trial_id: str, outcome: Outcome) -> None:
        self._calls.append((trial_id, outcome.to_dict()))
        self._tell(self._running.pop(trial_id), outcome)

    def _replay(self, calls: Sequence[tuple[str, dict[str, Any] | None]]) -> None:
        for trial_id, outcome in calls:
            if outcome is None:
                self.suggest(trial_id)
            else:
                self._complete(trial_id, Outcome.from_dict(outcome))

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(json.dumps(list(self._calls)))

    def restore(self, checkpoint_path: str) -> None:
        """Restores into a new searcher made with the same arguments."""
        self._replay(json.loads(Path(checkpoint_path).read_text()))


class JobSearcher(_AskTell):
    """Gives the jobs of a study to Ray Tune. A study is resumed from its own folder, never from Ray's snapshot."""

    def __init__(self, search: JobSearch, objective: Objective) -> None:
        super().__init__(objective.name, objective.direction[:3])
        self.search = search
        self._calls = deque(maxlen=0)  # none is replayed

    def _ask(self) -> TrialJob | Wait | Done:
        return self.search.ask()

    def _tell(self, asked: TrialJob, outcome: Outcome) -> None:
        if outcome.verdict is None and not outcome.died:  # a scheduler ended it: nothing is known against the setting
            outcome = Outcome(Verdict.STOPPED, harm=0.0)
        self.search.tell(asked.trial_id, outcome)

    def restore(self, checkpoint_path: str) -> None:
        raise UserError("a study is resumed by `tune-ssim run --resume`, not by Ray")

    def __getstate__(self) -> dict[str, Any]:
        """For Ray's snapshot, which is never restored."""
        return {**vars(self), "search": None}


class _SearchAdapter(_AskTell):
    """A plain search as a Ray searcher."""

    search: optuna_search.OptunaSearch | staged.StagedSearch | None

    @property
    def skipped(self) -> list[Skipped]:
        """Suggestions that were not launched."""
        return [] if self.search is None else self.search.skipped

    def _ask(self) -> Suggestion | Wait | Done:
        assert self.search is not None, "without a stage the space comes from the Tuner's param_space"
        return self.search.ask()

    def _tell(self, asked: Suggestion, outcome: Outcome) -> None:
        assert self.search is not None
        self.search.tell(asked.slot, outcome)

    def _config(self, asked: Suggestion) -> dict[str, Any]:
        return dict(unflatten_dict(dict(asked.settings)))


class GuardedOptunaSearch(_SearchAdapter):
    """Optuna search that learns from pruned trials, for your own `tune.Tuner`. Options: see `search.optuna_search.OptunaSearch`.

    `stage` None: the distributions come from the Tuner's `param_space`, as with Ray's own OptunaSearch."""

    search: optuna_search.OptunaSearch | None

    def __init__(self, stage: Stage | None = None, *, metric: str = OBJECTIVE, mode: str = "max", **options: Any) -> None:
        super().__init__(metric, mode)
        if "skip_above" in options:  # its name in the first version
            options["max_ratio"] = options.pop("skip_above")
        self._options = {**options, "direction": _objective(metric, mode).direction}
        self.search = None if stage is None else optuna_search.OptunaSearch(stage, **self._options)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        if self.search is not None:
            return False
        if metric:
            self._metric = metric
        if mode:
            self._mode = mode
            self._options["direction"] = _objective(str(metric), mode).direction
        self.search = optuna_search.OptunaSearch(distributions=RayOptunaSearch.convert_search_space(config), **self._options)
        return True


class StagedSearch(_SearchAdapter):
    """Staged search for your own `tune.Tuner`: see `search.staged.StagedSearch`."""

    search: staged.StagedSearch

    def __init__(self, space: Space, trials: int, *, metric: str = OBJECTIVE, mode: str = "max", **options: Any) -> None:
        super().__init__(metric, mode)
        self.search = staged.StagedSearch(space, trials, objective=_objective(metric, mode), **options)


class _RaySearch:
    """Any Ray searcher as a plain search; slots serve as trial ids. suggested: by slot; a replay takes them from here."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher, self.suggested, self._n_asked = searcher, list[dict[str, Any]](), 0

    def ask(self) -> Suggestion | Wait | Done:
        slot = self._n_asked
        if slot == len(self.suggested):
            settings = self.searcher.suggest(slot_name(slot))
            if settings is None:
                return Wait()
            if isinstance(settings, str):
                return Done()
            self.suggested.append(settings)
        self._n_asked += 1
        return Suggestion(slot, self.suggested[slot])

    def tell(self, slot: int, outcome: Outcome) -> None:
        """Does nothing: `BaselineFirst` forwards Ray's own result, which has more than an outcome."""

    def replace(self, slot: int, settings: Mapping[str, Any]) -> bool:
        return False


def slot_name(slot: int) -> str:
    return f"slot-{slot}"


class BaselineFirst(_AskTell):
    """Runs the baseline first, then the suggestions of any Ray searcher, for your own `tune.Tuner`.

    See `search.baseline_first.BaselineFirst` for the arguments. Trials made by `make_trainable` are compared with the baseline."""

    def __init__(
        self,
        searcher: Searcher,
        baseline_config: Mapping[str, Any],
        *,
        folder: str | Path,
        seeds: Sequence[int] = (0, 1),
        baseline: Baseline | None = None,
        searched: Sequence[str] = (),
        storage: str | Path | None = None,
    ) -> None:
        super().__init__(searcher.metric, searcher.mode)
        self.searcher = searcher  # the name by which Ray finds what it wraps
        self._inner = _RaySearch(searcher)
        self._jobs = baseline_first.BaselineFirst(
            self._inner, baseline_config, folder=folder, seeds=seeds, baseline=baseline, searched=searched, storage=storage
        )

    @property
    def failure(self) -> str:
        return self._jobs.failure

    @property
    def skipped(self) -> list[Skipped]:
        """Suggestions that were not launched."""
        return self.searcher.skipped if isinstance(self.searcher, _SearchAdapter) else []

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return bool(self.searcher.set_search_properties(metric, mode, config, **spec))

    def _ask(self) -> TrialJob | Wait | Done:
        return self._jobs.ask()

    def _tell(self, asked: TrialJob, outcome: Outcome) -> None:
        self._jobs.tell(asked.trial_id, outcome)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        job = self._running.get(trial_id)
        if job is not None and job.role is not Role.BASELINE:
            self.searcher.on_trial_result(slot_name(job.slot), result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job = self._running.get(trial_id)
        if job is not None and job.role is not Role.BASELINE:
            self.searcher.on_trial_complete(slot_name(job.slot), result, error)
        super().on_trial_complete(trial_id, result, error)

    # Ray saves and restores the innermost searcher with `save` and `restore`, and what wraps it with these two.

    def get_state(self) -> dict[str, Any]:
        return {"calls": self._calls, "suggested": self._inner.suggested}

    def set_state(self, state: dict[str, Any]) -> None:
        self._inner.suggested = list(state["suggested"])
        self._replay(state["calls"])

    def save(self, checkpoint_path: str) -> None:
        self.searcher.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        self.searcher.restore(checkpoint_path)
