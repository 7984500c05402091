"""What a running study shows, as far as whoever executes it is concerned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tune_ssim.trials.summary import TrialSummary


class Progress(Protocol):
    """The methods may be called from any thread, and as often as there are records."""

    def phase(self, text: str) -> None:
        """What the study is doing now."""

    def say(self, line: str) -> None:
        """A line that stays."""

    def expect(self, total: int | None, done: int | None = None) -> None:
        """Trials to come in this phase, None where that is open; `done` of them ended in an earlier start."""

    def trial_started(self, trial_id: str, settings: Mapping[str, Any]) -> None: ...

    def trial_progress(self, trial_id: str, step: int, steps: int, norm_ratio: float | None = None) -> None: ...

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
