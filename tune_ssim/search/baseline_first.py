"""Runs the baseline first, then the trials of a search, which are compared with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tune_ssim.base.files import write_atomically
from tune_ssim.base.numbers import is_same
from tune_ssim.guards import Baseline, BaselineRun
from tune_ssim.guards.verdict import Role
from tune_ssim.search.search import Done, Outcome, Search, Suggestion, Wait
from tune_ssim.study.space import resolve_settings
from tune_ssim.trials.job import BaselineFile, TrialJob

RUNS = "runs"  # subfolder of the baseline's folder, with one file per run
MIN_EQUAL_FAILURES = 2  # DESIGN: a failing baseline, or two identical set-up errors, stop the study


class BaselineFirst:
    """Creates the jobs of a phase: first the baseline (one run per seed, in parallel), then those of `search`, with the
    baseline's file.

    baseline_settings: the settings of the baseline; must include every key that the space searches. seeds: the first is the seed of
    the study, with which later trials run, so that they see the same batches. A suggestion with another seed waits for a baseline
    run with it. folder: for the baseline's files; every node must
    reach it under this path. baseline: an existing one. runs: in a resumed phase, the existing baseline runs by trial id.
    previous: in a resumed phase, the outcomes of earlier trials by trial id. The calls of `ask` and `tell` are then replayed, and
    only missing trials become jobs. max_trials: without the baseline, with previous trials.

    If a baseline fails, or the first two trials to end fail in the same way, the phase is over and `failure` gives the reason.
    After one trial has succeeded, a failure is blamed on its setting and ends only that trial."""

    def __init__(
        self,
        search: Search,
        baseline_settings: Mapping[str, Any],
        *,
        folder: str | Path,
        seeds: Sequence[int] = (0, 1),
        baseline: Baseline | None = None,
        runs: Mapping[str, BaselineRun] | None = None,
        searched: Sequence[str] = (),
        prefix: str = "",
        storage: str | Path | None = None,
        study: str | None = None,
        previous: Mapping[str, Outcome] | None = None,
        max_trials: int | None = None,
    ) -> None:
        if baseline is None and not seeds:
            raise ValueError("a baseline needs at least one seed")
        self.search = search
        self.baseline_settings, self.seeds, self.folder = dict(baseline_settings), list(seeds), Path(folder)
        self.searched, self.prefix, self.max_trials = tuple(searched), prefix, max_trials
        self.storage, self.study = None if storage is None else str(storage), study
        self.previous = dict(previous or {})
        self.failure = ""
        self.end_reason = ""  # why the search ended before its last trial
        self._runs = dict(runs or {})
        self._asked: set[str] = set(self._runs)  # baseline runs
        self._pending: Suggestion | None = None  # waits for a baseline run with its seed
        self._slots: dict[str, int] = {}  # trial id → slot in the search
        self._n_trials = 0
        self._failures: dict[str, int] = {}  # count by reason
        self._one_came_through = any(outcome.was_judged for outcome in self.previous.values())
        self.baseline_file: BaselineFile | None = None
        if baseline is not None:
            self.baseline_file = self._write(baseline)
        else:
            self._combine()

    def ask(self) -> TrialJob | Wait | Done:
        if self.failure:
            return Done(self.failure, failed=True)
        if self.baseline_file is None:
            return self._next_baseline()
        while self._pending is not None or self.max_trials is None or self._n_trials < self.max_trials:
            suggestion, self._pending = self._pending or self.search.ask(), None
            if isinstance(suggestion, Wait):
                return suggestion
            if isinstance(suggestion, Done):
                self.end_reason = suggestion.reason
                return suggestion
            if suggestion.seed is not None and suggestion.seed not in self.seeds:
                self.seeds.append(suggestion.seed)
                self._pending, self.baseline_file = suggestion, None
                self._combine()
                return self.ask()
            self._n_trials += 1
            job = TrialJob(
                suggestion.trial_id or f"trial-{suggestion.slot:02d}",
                suggestion.settings,
                role=suggestion.role,
                seed=suggestion.seed if suggestion.seed is not None else self.seeds[0] if self.seeds else 0,
                slot=suggestion.slot,
                stage=suggestion.stage,
                searched=self.searched or tuple(suggestion.settings),
                baseline=self.baseline_file,
                storage=self.storage,
                study=self.study,
                reason=suggestion.reason,
                rival=suggestion.rival,
            )
            job = self._replay(job)
            self._slots[job.trial_id] = suggestion.slot
            if (outcome := self.previous.get(job.trial_id)) is None:
                return job
            self.search.tell(suggestion.slot, outcome)
        return Done()

    def tell(self, trial_id: str, outcome: Outcome) -> None:
        self._count_failure(trial_id, outcome)
        if trial_id in self._slots:
            self.search.tell(self._slots[trial_id], outcome)
        elif trial_id in self._baseline_ids:
            if outcome.baseline is None:
                self.failure = self.failure or outcome.reason
                return
            self._write(outcome.baseline, RUNS)  # written at once, so that a study stopped now need not run it again
            self._runs[trial_id] = outcome.baseline.runs[0]
            self._combine()

    @property
    def _baseline_ids(self) -> list[str]:
        return [f"{self.prefix}baseline-{index}" for index in range(len(self.seeds))]

    def _next_baseline(self) -> TrialJob | Wait:
        for index, name in enumerate(self._baseline_ids):
            if name not in self._asked:
                self._asked.add(name)
                return TrialJob(
                    name,
                    self.baseline_settings,
                    role=Role.BASELINE,
                    seed=self.seeds[index],
                    slot=index,
                    storage=self.storage,
                    study=self.study,
                )
        return Wait()

    def _combine(self) -> None:
        """The baseline from all its runs, in the order of the seeds."""
        if set(self._baseline_ids) <= set(self._runs):
            self.baseline_file = self._write(Baseline(tuple(self._runs[name] for name in self._baseline_ids)))

    def _write(self, baseline: Baseline, below: str = "") -> BaselineFile:
        path = self.folder / below / f"{baseline.sha256}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, baseline.to_bytes())
        return BaselineFile(str(path), baseline.sha256)

    def _replay(self, job: TrialJob) -> TrialJob:
        """The job with the id of an earlier trial that ran these settings; without one, with an id that is free."""
        trial_id, attempt = job.trial_id, 1
        while (outcome := self.previous.get(job.trial_id)) is not None and not self._ran(job, outcome):
            attempt += 1
            job = replace(job, trial_id=f"{trial_id}-{attempt}")
        return job

    def _ran(self, job: TrialJob, outcome: Outcome) -> bool:
        """Whether `outcome` is of the job. Without a fixed order a sampler may make other suggestions. The result of the earlier
        trial is still useful, so its settings replace the suggestion, unless the search refuses them."""
        asked = resolve_settings(job.settings)
        if all(is_same(value, outcome.settings.get(name)) for name, value in asked.items()):
            return True
        return job.slot is not None and self.search.replace(job.slot, outcome.settings)

    def _count_failure(self, trial_id: str, outcome: Outcome) -> None:
        is_baseline = trial_id in self._baseline_ids
        self._one_came_through |= not is_baseline and outcome.was_judged
        if outcome.failed and not outcome.died and not self._one_came_through:
            kind = re.sub(r"[-+.\de]*\d", "#", outcome.reason)  # equal except for numbers, which differ between trials
            self._failures[kind] = self._failures.get(kind, 0) + 1
            if self._failures[kind] >= MIN_EQUAL_FAILURES and not self.failure:
                self.failure = f"two trials failed with the same error: {outcome.reason}"
