"""Checks that steps depend on (seed, n) only: when repeated, after a resume, and with other calls in between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tune_ssim.before_launch.preflight.report import Check, broken, ok
from tune_ssim.before_launch.preflight.subject import Failure, call, numbers
from tune_ssim.testing.metrics import check_metrics, describe_kind
from tune_ssim.testing.subject import ClassUnderTest, Numbers, attributes
from tune_ssim.trials.checkpoint import load_checkpoint, save_checkpoint, tensors_of

GENERATORS = (
    "draw every random number of step n from torch.Generator().manual_seed(…) made of (seed, n) "
    "(numpy.random.SeedSequence([seed, n, stream]) mixes them well)"
)
LOOKS = 5  # inspections of a run, two steps apart, since a change of the optimiser shows one step later


class Run:
    """A run with a checkpoint after k steps. steps: metrics of at least 2k steps. saved: None if no checkpoint could be made.
    comparable: whether another run with the same configuration and seed is identical."""

    def __init__(self, subject: ClassUnderTest, k: int, folder: Path) -> None:
        self.k, self.folder = k, folder
        self.findings: list[Check] = []
        self.comparable = True
        self.saved: dict[str, str] | None = None  # digests of the attributes at the checkpoint
        task = subject.make()
        first = call(task, "step")
        self.findings.extend(check_metrics(first))
        self.steps: list[Numbers] = [numbers(first), *subject.steps(task, k - 1)]
        self.findings.extend(self._save(subject, task))
        self.steps += subject.steps(task, max(k, 2 * LOOKS - k))

    @property
    def broken(self) -> set[str]:
        """Names of checks already broken, whose consequences need not be reported."""
        return {finding.name for finding in self.findings if finding.status == "broken"}

    def _save(self, subject: ClassUnderTest, task: Any) -> Iterator[Check]:
        if "state_dict" in subject.broken_methods:
            return
        try:
            state = call(task, "state_dict")
            if not isinstance(state, dict):
                remedy = "return a dict of tensors and JSON values"
                yield broken("state_dict", f"state_dict() returned {describe_kind(state)}", remedy)
                return
            save_checkpoint(self.folder, state)
        except TypeError as error:
            remedy = (
                "store tensors (torch.from_numpy, generator.get_state()), numbers, texts, and dicts and lists of these; "
                "of an object its state_dict()"
            )
            yield broken("state_dict", f"state_dict() cannot be stored without pickle: {error}", remedy)
            return
        except Failure as error:
            yield broken("state_dict", str(error), error.remedy)
            return
        if count := len(tensors_of(state)):
            self.saved = attributes(task)
            yield ok("state_dict", f"state_dict() holds only tensors ({count}) and JSON values")
        else:
            yield broken("state_dict", "state_dict() holds no tensor", "add the weights and the optimiser's state to it")


def check_repeatable(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    """Checks that the same seed gives the same numbers, even if other code draws from the global generators."""
    shaken = subject.steps(subject.make(chance=1), run.k, shake=True)
    difference = subject.difference(run.steps, shaken)
    if not difference:
        yield ok("random/repeatable", f"the same seed gives the same {run.k} steps {_how(subject)}")
        return
    again = subject.difference(run.steps, subject.steps(subject.make(), run.k))
    if again:
        run.comparable = False
        sentence = f"the same seed gives other numbers the second time ({again})"
        remedy = f"find what differs: time, unseeded generators, state kept on the class, threads of a loader; {GENERATORS}"
    else:
        sentence = f"the steps depend on the global random generators ({difference})"
        remedy = f"{GENERATORS}; before dropout, torch.manual_seed of the same number"
    yield broken("random/repeatable", sentence, remedy)


def check_seed(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    other = subject.steps(subject.make(seed=subject.seed + 1), 1)
    if subject.difference(run.steps, other):
        yield ok("random/seed", "another seed gives other numbers")
        return
    sentence = f"seeds {subject.seed} and {subject.seed + 1} give the same first step: new seeds would measure no noise at all"
    yield broken("random/seed", sentence, "make the random numbers of step n depend on (seed, n)")


def check_resume(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    """Checks that a fresh instance that loads the checkpoint continues as the run did."""
    if run.saved is None or "load_state_dict" in subject.broken_methods:
        return  # reported already
    task, name = subject.make(chance=2), "state_dict/resume"
    try:
        call(task, "load_state_dict", load_checkpoint(run.folder))
    except Failure as error:
        hint = "; tuples come back as lists" if "tuple" in str(error) else ""
        yield broken(name, str(error), error.remedy + hint)
        return
    restored = attributes(task)
    lost = ", ".join([f"self.{key}" for key, digest in run.saved.items() if restored.get(key) != digest][:6])
    difference = subject.difference(run.steps[run.k :], subject.steps(task, run.k), run.k + 1)
    if not difference:
        yield ok(name, f"resumed from a checkpoint after step {run.k}, the next {run.k} steps are the same {_how(subject)}")
        return
    changed = f"; loading does not restore {lost}" if lost else ""
    everything = "all that the next step depends on: weights, momentum, averages, schedules, the step's number"
    yield broken(
        name,
        f"a run resumed after step {run.k} continues differently ({difference}){changed}",
        f"save and load {lost or everything}",
    )


def check_afresh(subject: ClassUnderTest, run: Run) -> Iterator[Check]:
    """Checks that setup() on a trained instance rebuilds everything."""
    task = subject.make()
    subject.steps(task, 1)
    subject.set_up(task)
    if difference := subject.difference(run.steps, subject.steps(task, 1)):
        sentence = f"a second setup() of the same instance does not start afresh ({difference})"
        remedy = "build model, optimiser, loaders and the step's number in setup(), not in __init__ or on the class"
        yield broken("setup/afresh", sentence, remedy)
    else:
        yield ok("setup/afresh", "setup() builds everything afresh")


def _how(subject: ClassUnderTest) -> str:
    return "bit for bit" if subject.exact else "within rounding"
