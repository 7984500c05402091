"""The sections of a study: baseline, search, scheduler, resources, phases."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, field_validator

from tune_ssim.base.numbers import is_number
from tune_ssim.base.passwords import without_password
from tune_ssim.base.validation import Problems, Section
from tune_ssim.base.yaml_source import describe
from tune_ssim.study.domains import value_problem
from tune_ssim.study.space import setting_problem


class BaselineLog(Section):
    """The log of a pixel-loss run. names: name in the log → ours; held_out: metrics measured after it, e.g. `{ssim: 0.91}`."""

    file: Annotated[str, Field(min_length=1)]  # a path from the study file's folder
    format: str | None = None  # default: by the content
    pattern: str | list[str] | None = None  # as for the records of a command
    names: dict[str, str] = Field(default_factory=dict)
    held_out: dict[str, float] = Field(default_factory=dict)


class BaselineRuns(Section):
    """Baseline runs: the same training with only the pixel loss (note 000 §1), configured by `overrides` of task_config."""

    overrides: dict[str, Any] = Field(
        default_factory=lambda: {"pixel_loss_weight": 0.05, "pixel_loss_max_t": 0.3}  # note 000 §1.2
    )
    seeds: Annotated[int, Field(ge=1)] = 2  # DESIGN: two in parallel cost no extra wall time and give the noise floor
    log: BaselineLog | None = None  # a finished run instead of runs in the search; the confirm phase has its own runs


class Search(Section):
    # guided: from the calibrated start, `search.guided.GuidedSearch`; see `Study.strategy`. benchmarks/replay compares the three.
    strategy: Literal["guided", "optuna", "random"] = "guided"
    trials: Annotated[int, Field(ge=1)] = 12  # FACTS §2: 63-107 s on two cores; baselines are not counted
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # NumPy's range
    concurrency: int | Literal["auto"] = 2  # trials at a time; auto: as many as fit on the cluster
    deterministic: bool = True  # DESIGN "Order": suggestions do not depend on which trial ends first
    # Times the norm guard's limit, the `max_ratio`: settings whose predicted ratio exceeds it are not launched; None: all are.
    # Over steps 25-75 the norm is 0.5 to 1.1 times the prediction (FACTS §1, benchmarks/calibration.py): they would be pruned.
    skip_beyond: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 2.0
    demonstrations: dict[str, dict[str, Any]] = Field(default_factory=dict)  # name → settings: trials beside the search

    @field_validator("demonstrations")
    @classmethod
    def _demonstrations(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        problems = Problems()
        for name, settings in given.items():
            for key, value in settings.items():
                if message := value_problem(value) or setting_problem(key, value):
                    problems.add((name, key), message, subject=key)
        problems.check()
        return given

    @field_validator("concurrency", mode="plain")
    @classmethod
    def _concurrency(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(f"must be an integer >= 1 or auto, got {describe(value)}")


class Asha(Section):
    """Steps are training steps. (What Ray calls `max_t` here has nothing to do with `ssim_loss_max_t`.)"""

    max_steps: Annotated[int, Field(ge=1)]  # default: the trial's steps
    grace_steps: Annotated[int, Field(ge=1)] = 25  # FACTS §6
    reduction_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0  # FACTS §6


class Resources(Section):
    """Resources of one trial. gpus: `auto` is one GPU if the cluster has any, else none; fractions share a GPU.

    workers: processes of one trial, as ranks of one torch process group; cpus and gpus are then per worker. gpus_per_worker
    overrides gpus. nodes: number of nodes on which a command is started; cpus and gpus are then per node."""

    workers: Annotated[int, Field(ge=1)] = 1
    nodes: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # None: `gpus`
    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0  # FACTS §2: one thread a process
    gpus: float | Literal["auto"] = "auto"

    @field_validator("gpus", mode="plain")
    @classmethod
    def _gpus(cls, value: Any) -> Any:
        if value == "auto" or (is_number(value) and 0 <= value < math.inf):
            return value if value == "auto" else float(value)
        raise ValueError(f"must be a number >= 0 or auto, got {describe(value)}")

    @property
    def parts(self) -> int:
        """Number of bundles of `cpus` and `gpus` that a trial needs."""
        return self.workers * self.nodes


class Preflight(Section):
    """Setup checks before launch; `preflight: null` turns them off. max_share: a check that would take a larger share of the
    training time of the search and its baselines is not run, but `unknown`, unless it takes less than 15 s."""

    # The most expensive check of the bundled study takes 2 of 63 to 107 s (FACTS §2, benchmarks/preflight.py).
    max_share: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05


class CalibrationOptions(Section):
    """Calibration before launch: measures the gradient norm of each setting, with updates disabled."""

    batches: Annotated[int, Field(ge=1)] = 24  # medians of >= 10 active steps (FACTS §1), also behind gates that half of them pass
    grid: Annotated[list[float], Field(min_length=1)] | None = None  # values of max_t; None: from the space
    # Settings that keep the weights unchanged, with any launcher (FACTS §1). Also `update_off`. For a command the default is none:
    # its updates are held off from outside.
    disable_update: dict[str, Any] = Field(default_factory=lambda: {"lr": 0.0})
    # gram: from the gradients; readings: from total_norm only, which any training reports; auto: gram where possible.
    # first_step: for a command whose updates can be held off in no way; each of the `batches` is a start with another seed.
    method: Literal["auto", "gram", "readings", "first_step"] = "auto"

    @field_validator("grid")
    @classmethod
    def _grid(cls, grid: list[float] | None) -> list[float] | None:
        if grid is not None and (len(set(grid)) < len(grid) or not all(0 < max_t <= 1 for max_t in grid)):
            raise ValueError(f"must be different values of max_t above 0 and at most 1, got {grid}")
        return grid


class Confirm(Section):
    """Confirmation before export: reruns the best settings and the baseline with more seeds and for longer."""

    finalists: Annotated[int, Field(ge=1)] = 3  # tried in order until one is confirmed
    seeds: Annotated[int, Field(ge=2)] = 3  # an interval needs two; FACTS §6: the noise between seeds is as large as the gain
    steps: Annotated[int, Field(ge=1)] | None = None  # steps per trial; None: ten times those of the search (SEEDS A9)


class Tracking(Section):
    """MLflow tracking. uri: default SQLite in the storage path; its password is never written to a file."""

    uri: Annotated[str, Field(min_length=1), PlainSerializer(without_password)] | None = None
