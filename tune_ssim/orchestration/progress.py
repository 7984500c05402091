"""The progress display of a running study, as an interface for executors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tune_ssim.trials.summary import TrialSummary


class Progress(Protocol):
    """Progress display. Its methods may be called from any thread, as often as there are records."""

    def phase(self, text: str) -> None:
        """Sets the current phase of the study."""

    def say(self, line: str) -> None:
        """Prints a permanent line."""

    def expect(self, total: int | None, done: int | None = None) -> None:
        """Sets the number of trials in this phase, None if unknown. `done` of them ended in an earlier start."""

    def trial_started(self, trial_id: str, settings: Mapping[str, Any]) -> None: ...

    def trial_progress(self, trial_id: str, step: int, steps: int, norm_ratio: float | None = None) -> None:
        """`steps`: 0 if the number is not known yet."""

    def trial_ended(self, summary: TrialSummary) -> None: ...


class NoProgress:
    """Shows nothing."""

    def phase(self, text: str) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def expect(self, total: int | None, done: int | None = None) -> None:
        pass

    def trial_started(self, trial_id: str, settings: Mapping[str, Any]) -> None:
        pass

    def trial_progress(self, trial_id: str, step: int, steps: int, norm_ratio: float | None = None) -> None:
        pass

    def trial_ended(self, summary: TrialSummary) -> None:
        pass
