"""The step counter of a training, which may begin again at each epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tune_ssim.records.readers.parse_issues import ParseIssues

MIN_RESTARTED_ROWS = 3  # rows that count up again from the first step: fewer may be a validation that counts epochs


class StepCounter:
    """Counts steps on over epochs if the counter begins again at each, and the rows name their epoch.

    If they do not, `issues.restarted` says that the counter began again: the rows could be those of an epoch, or of a training
    that was started once more."""

    def __init__(self, issues: ParseIssues) -> None:
        self.issues = issues
        self.earlier_steps = 0  # of earlier epochs
        self.begin_anew()

    def begin_anew(self) -> None:
        """Restarts at the beginning of the log."""
        self.earlier_steps = 0
        self._first = self._newest = -1  # of the present epoch, as the training counts
        self._spacing = 1  # between the newest two steps
        self._rounded_spacing: int | None = None  # the same before the first rounded step
        self._epoch = -math.inf
        self._again: list[int] = []  # consecutive rows that count up again from the first step

    def count(self, step: int, epoch: float | None, line: int) -> int:
        """The step since the beginning. line: the row's place in the log."""
        epoch = self._epoch if epoch is None or not math.isfinite(epoch) else math.floor(epoch)
        is_single = step == self._first == self._newest  # a row in each epoch
        if (step < self._newest or is_single) and epoch > self._epoch > -math.inf:
            if not self.earlier_steps:
                self.issues.note(
                    "the step counter begins again at each epoch: steps are counted over epochs (first in "
                    f"{self.issues.unit} {line}: step {step} after step {self._newest})"
                )
            self.earlier_steps += self._newest + self._spacing - min(step, self._first)
            self._first = self._newest = step
        elif step > self._newest:
            self._spacing = step - self._newest if self._newest >= 0 else 1
            self._first = step if self._first < 0 else self._first
            self._newest, self._again = step, []
        elif step < self._newest:
            self._fell_back(step, line)
        self._epoch = max(self._epoch, epoch)
        return step + self.earlier_steps

    def exact(self, step: int, unit: int) -> int:
        """The likely step of which only the first digits were printed. unit: what its last digit counts."""
        if self._rounded_spacing is None:
            self._rounded_spacing = self._spacing
        left = step + unit - self._newest
        if step > self._newest or left <= -unit:
            return step
        return self._newest + max(1, min(self._rounded_spacing, left // 2))

    def advance(self, steps: Sequence[int], epoch: float | None) -> None:
        """Counts many growing steps at once, the last of them in `epoch`."""
        for step in (steps[0], *steps[-2:]):
            self.count(step, epoch, 0)

    def _fell_back(self, step: int, line: int) -> None:
        follows = step > self._again[-1] if self._again else step <= self._first
        self._again = [*self._again, step] if follows else []
        if len(self._again) == MIN_RESTARTED_ROWS and not self.issues.restarted:
            self.issues.restarted = f"{self.issues.unit} {line}: step {step} after step {self._newest}"
