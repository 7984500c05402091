"""A conformance suite for your own trainings: checks that `MyTask` implements `tune_ssim.Training` correctly.

    from tune_ssim.testing import check_task

    def test_my_task():
        check_task(MyTask, {"batch_size": 2}).raise_if_broken()

Preflight checks a set-up; this suite checks a class: missing methods, return values, whether steps depend on (seed, n) only, and
whether a resumed run equals an uninterrupted one. Settings are judged by preflight's own checks. It trains a few dozen steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.before_launch.preflight import DISABLE_UPDATE
from tune_ssim.before_launch.preflight.report import MARKS, Check, Report, broken, ok, unknown
from tune_ssim.before_launch.preflight.subject import Failure, describe_error, guarded
from tune_ssim.testing.inference import check_looking_on
from tune_ssim.testing.runs import Run, check_afresh, check_repeatable, check_resume, check_seed
from tune_ssim.testing.settings import check_clipping, check_effective, check_setup, check_still, check_weight
from tune_ssim.testing.signatures import check_class, check_methods
from tune_ssim.testing.subject import ClassUnderTest, global_generators_kept
from tune_ssim.trials.load_training import load_task

__all__ = ["TaskReport", "check_task"]

STEPS_OF_A_TRIAL = 200  # passed to setup(), as in a study (study.fields.DEFAULT_STEPS); only a few are taken
# Each check sees in its `Run` what is broken already, so that one fault is reported once.
CHECKS: dict[str, Callable[[ClassUnderTest, Run], Iterator[Check]]] = {
    "effective": check_effective,
    "random/repeatable": check_repeatable,
    "still": check_still,
    "step/total_norm/clipping": check_clipping,
    "ssim_loss_weight": check_weight,
    # The following checks compare whole runs.
    "random/seed": check_seed,
    "setup/afresh": check_afresh,
    "state_dict/resume": check_resume,
    "untouched": check_looking_on,
}


@dataclass(frozen=True)
class TaskReport(Report):
    """All findings about one class, in the order in which to fix them."""

    task: str = ""

    @property
    def findings(self) -> tuple[Check, ...]:
        return self.checks

    @property
    def ok(self) -> bool:
        """Whether nothing is broken. Unmeasured checks do not count."""
        return not self.of("broken")

    def raise_if_broken(self) -> None:
        """Raises AssertionError listing everything broken, for use at the end of a test."""
        if found := self.of("broken"):
            raise AssertionError("\n".join((f"{self.task} does not implement tune_ssim.Training correctly:", *map(str, found))))

    def to_dict(self) -> dict[str, Any]:
        findings = [{name: value for name, value in asdict(check).items() if name != "evidence"} for check in self.checks]
        return {"task": self.task, "ok": self.ok, "seconds": self.seconds, "findings": findings}

    def __str__(self) -> str:
        counts = {status: len(self.of(status)) for status in MARKS}
        summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        lines = (str(check).replace("\n", "\n  ") for check in self.checks)
        return "\n".join((f"{self.task}: {summary} ({self.seconds:.1f} s)", *(f"  {line}" for line in lines)))


def check_task(
    task: str | type,
    config: Mapping[str, Any] | None = None,
    *,
    steps: int = 3,
    seed: int = 0,
    device: str | None = None,
    disable_update: Mapping[str, Any] = DISABLE_UPDATE,
) -> TaskReport:
    """Sets `task` (a class, or "module:Class") up about thirty times with `config`, as a study does, and trains `steps` steps
    before and after a checkpoint. Faults of the task become findings with a remedy, never exceptions.

    config: a small one is fast; `steps` (the length of a trial) is added. device: as given to setup(). disable_update: the settings
    that switch the update off. The global random generators are restored. Raises ValueError for `steps` below 3."""
    if steps < 3:
        raise ValueError(f"check_task: steps={steps!r}; expected at least 3, since methods are called between the first five steps")
    started = time.perf_counter()
    with global_generators_kept():
        name = task if isinstance(task, str) else getattr(task, "__name__", type(task).__name__)
        settings = {"steps": STEPS_OF_A_TRIAL, **(config or {})}
        findings = tuple(_findings(task, settings, seed, device, disable_update, steps))
    return TaskReport(findings, time.perf_counter() - started, str(name))


def _findings(
    task: str | type, config: Mapping[str, Any], seed: int, device: str | None, disable_update: Mapping[str, Any], steps: int
) -> Iterator[Check]:
    """Findings in the order in which to fix them: what exists, what it accepts, what it does."""
    if isinstance(task, str):
        try:
            loaded = load_task(task)
        except UserError as error:
            yield broken("class", str(error), "pass the class, or module:Class of an importable module")
            return
        except Exception as error:  # raised while the user's module is imported
            yield broken("class", f"{task.partition(':')[0]} cannot be imported: {describe_error(error)}", "fix the module")
            return
        if not isinstance(loaded, type):
            sentence = f"{task} is a function: it reports through trial_context(), so there is no class to check"
            yield broken("class", sentence, "pass module:Class; try a function out with a study of a few steps")
            return
        task = loaded
    found = list(check_class(task))
    yield from found
    if found[-1].status == "broken":
        return
    methods = list(check_methods(task))
    missing = [finding for finding in methods if finding.status == "broken"]
    yield from missing
    broken_methods = frozenset(finding.name.removeprefix("method/") for finding in missing)
    if not missing:
        yield ok("methods", f"all {len(methods)} methods exist, and can be called as a trial calls them")
    if "setup" in broken_methods:
        return
    subject = ClassUnderTest(task, config, seed, device, disable_update, broken_methods=broken_methods)
    found = list(guarded("setup", lambda: check_setup(subject), "broken"))
    yield from found
    if any(finding.name == "setup" and finding.status != "ok" for finding in found) or "step" in broken_methods:
        return
    yield from _training(subject, steps)


def _training(subject: ClassUnderTest, steps: int) -> Iterator[Check]:
    with TemporaryDirectory(prefix="tune_ssim_check_") as folder:
        try:
            run = Run(subject, steps, Path(folder))
        except Failure as error:
            yield broken("step", str(error), error.remedy)
            return
        except Exception as error:  # without a run nothing is known, which is not a pass
            remedy = "see tune_ssim.Training for what is expected"
            yield broken("step", f"the steps could not be measured: {describe_error(error)}", remedy)
            return
        yield from run.findings
        if "step" in run.broken:
            return
        for name, check in CHECKS.items():
            if name == "random/seed" and "random/repeatable" in run.broken:
                yield unknown("resume", "runs cannot be compared, so resuming is not checked", "fix random/repeatable first")
                return
            found = list(guarded(name, partial(check, subject, run), "broken"))
            run.findings.extend(found)
            yield from found
            if not run.comparable:
                return
