"""The cost of a check, estimated before it runs, and the most that it may be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.before_launch.preflight.subject import Subject, guarded

# Never too long for a check: what preflight of the bundled task may take in all, on two cores.
ALWAYS_S = 15.0
ESTIMATE = "estimated_s"  # in the evidence of a check that was not run
BACKWARD = 2.0  # a backward pass takes about twice its forward pass (Kaplan et al. 2020, section 2.1)

T = TypeVar("T")


@dataclass
class Budget:
    """What checks may cost. runs: trainings of `steps` steps in the study; max_share: of their time, for one check; None: no limit.

    seconds: of one `forward`, `decode` (of an image), `sample` and `step`, as measured once in this training."""

    subject: Subject
    steps: int
    runs: int = 1
    max_share: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, what: str, call: Callable[[], T]) -> T:
        """The result of `call`, whose seconds become the price of `what`."""
        started = time.perf_counter()
        found = call()
        self.seconds[what] = time.perf_counter() - started
        return found

    def price(self, what: str) -> float:
        """Seconds; 0 if unknown. A set-up costs what the fastest one did, since the first one also fills caches."""
        if what == "setup":
            return min(self.subject.setup_s, default=0.0)
        if what == "step":  # measured late, since it changes the weights
            return self.seconds.get("step", (1 + BACKWARD) * self.seconds.get("forward", 0.0))
        return self.seconds.get(what, 0.0)

    @property
    def study_s(self) -> float:
        return self.runs * (self.price("setup") + self.steps * self.price("step"))

    def refusal(self, name: str, **work: float) -> Check | None:
        """The check `name`, unknown, if it would cost too much; else None. work: how often it needs each thing that has a price."""
        estimate = sum(count * self.price(what) for what, count in work.items())
        if self.max_share is None or estimate <= max(ALWAYS_S, self.max_share * self.study_s):
            return None
        share = estimate / self.study_s
        sentence = (
            f"not run: it would take about {estimate:.0f} s, {share:.2g} times the study's {self.study_s:.0f} s of training; "
            f"a check may take {self.max_share:g} times (`preflight: {{max_share: {self.max_share:g}}}` in the study)"
        )
        return Check(name, "unknown", sentence, {ESTIMATE: estimate, "share": share})

    def checks(self, name: str, checks: Callable[[], Iterator[Check]], **work: float) -> Iterator[Check]:
        """The checks, guarded, unless they would cost too much."""
        refused = self.refusal(name, **work)
        if refused is None:
            yield from guarded(name, checks)
        else:
            yield refused
