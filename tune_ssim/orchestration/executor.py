"""The interface of executors, which run the trials of a study with Ray Tune or in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tune_ssim.orchestration.recorder import StudyRecorder
from tune_ssim.search.search import Done, Outcome, Wait
from tune_ssim.study.sections import Asha
from tune_ssim.study.study import Study
from tune_ssim.trials.job import TrialJob
from tune_ssim.trials.trial_run import TrialSpec


class JobSearch(Protocol):
    """A search that returns whole jobs: `search.baseline_first.BaselineFirst`."""

    def ask(self) -> TrialJob | Wait | Done: ...

    def tell(self, trial_id: str, outcome: Outcome) -> None: ...


@dataclass(frozen=True)
class Phase:
    """The trials of a study that are executed together. name: of the folder. concurrency: trials at a time."""

    name: str
    spec: TrialSpec
    concurrency: int
    scheduler: Asha | None = None


class Executor(Protocol):
    """A context manager that executes trials. All executors give the same jobs, verdicts and folder.

    is_sequential: one trial runs at a time, whatever the search's concurrency."""

    is_sequential: bool

    def describe(self) -> str:
        """One line that describes where trials run."""

    def concurrency(self, study: Study) -> int:
        """Trials at a time, as the search plans them. Raises UserError if not even one fits."""

    def inspect(
        self, study: Study, *, preflight: bool, calibration: bool, provenance: bool, steps: int | None = None, **of_starts: Any
    ) -> dict[str, Any]:
        """The checks before launch, run where a trial would run: see `before_launch.inspection`."""

    def run(self, phase: Phase, search: JobSearch, recorder: StudyRecorder) -> None:
        """Executes jobs until the search is done, or until Ctrl-C, after which `recorder.unfinished` is not empty."""

    def __enter__(self) -> Executor: ...

    def __exit__(self, *error: object) -> None: ...
