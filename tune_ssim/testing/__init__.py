"""A conformance suite for your own trainings: checks that `MyTask` implements `tune_ssim.Training` correctly.

    from tune_ssim.testing import check_task

    def test_my_task():
        check_task(MyTask, {"batch_size": 2}).raise_if_broken()

Preflight checks a set-up; this suite checks a class: missing methods, return values, whether steps depend on (seed, n) only, and
whether a resumed run equals an uninterrupted one. It trains a few dozen steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tune_ssim.base.errors import UserError
from tune_ssim.before_launch.preflight.report import Check
from tune_ssim.before_launch.preflight.subject import Failure, describe_error, guarded
from tune_ssim.testing.findings import Finding, TaskReport, broken, ok, unknown
from tune_ssim.testing.inference import check_looking_on
from tune_ssim.testing.runs import Run, check_afresh, check_repeatable, check_resume, check_seed, checkpoint_folder
from tune_ssim.testing.settings import check_clipping, check_effective, check_setup, check_still, check_weight
from tune_ssim.testing.signatures import check_class, check_methods
from tune_ssim.testing.subject import ClassUnderTest, global_generators_kept
from tune_ssim.trials.load_training import load_task

__all__ = ["Finding", "TaskReport", "check_task"]

STEPS_OF_A_TRIAL = 200  # passed to setup(), as in a study (study.DEFAULT_STEPS); only a few are taken
DISABLE_UPDATE = {"lr": 0.0}  # required: a learning rate of 0 leaves the weights unchanged
CHECKS: dict[str, Callable[[ClassUnderTest, Run], Iterator[Check]]] = {
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


def check_task(
    task: str | type,
    config: Mapping[str, Any] | None = None,
    *,
    steps: int = 3,
    seed: int = 0,
    device: str | None = None,
    disable_update: Mapping[str, Any] = DISABLE_UPDATE,
) -> TaskReport:
    """Sets `task` (a class, or "module:Class") up about twenty times with `config`, as a study does, and trains `steps` steps
    before and after a checkpoint. Faults of the task become findings with a remedy, never exceptions.

    config: a small one is fast; `steps` (the length of a trial) is added. device: as given to setup(). disable_update: the settings
    that switch the update off. The global random generators are restored. Raises ValueError for `steps` below 3."""
    if steps < 3:
        raise ValueError(f"check_task: steps={steps!r}; expected at least 3: something is looked at before each of the first five")
    started = time.perf_counter()
    with global_generators_kept():
        name = task if isinstance(task, str) else getattr(task, "__name__", type(task).__name__)
        settings = {"steps": STEPS_OF_A_TRIAL, **(config or {})}
        findings = tuple(_findings(task, settings, seed, device, disable_update, steps))
    return TaskReport(findings, time.perf_counter() - started, str(name))


def _findings(
    task: str | type, config: Mapping[str, Any], seed: int, device: str | None, still: Mapping[str, Any], steps: int
) -> Iterator[Check]:
    """Findings in the order in which to fix them: what exists, what it accepts, what it does."""
    if isinstance(task, str):
        try:
            loaded = load_task(task)
        except UserError as error:
            yield broken("class", str(error), "give the class, or module:Class of an importable module")
            return
        except Exception as error:  # raised while the user's module is imported
            yield broken("class", f"{task.partition(':')[0]} cannot be imported: {describe_error(error)}", "mend the module")
            return
        if not isinstance(loaded, type):
            sentence = f"{task} is a function: it reports through trial_context(), and no class is to be checked"
            yield broken("class", sentence, "give module:Class; a function is tried out by a study of a few steps")
            return
        task = loaded
    found = list(check_class(task))
    yield from found
    if found[-1].status == "broken":
        return
    methods = list(check_methods(task))
    lacking = frozenset(finding.name.removeprefix("method/") for finding in methods if finding.status == "broken")
    yield from (finding for finding in methods if finding.status == "broken")
    if not lacking:
        yield ok("methods", f"the {len(methods)} methods are there, and can be called as a trial calls them")
    if "setup" in lacking:
        return
    subject = ClassUnderTest(task, config, seed, device, still, lacking)
    found = list(guarded("setup", lambda: check_setup(subject), "broken"))
    yield from found
    if any(finding.name == "setup" and finding.status != "ok" for finding in found) or "step" in lacking:
        return
    if "effective" not in lacking:
        yield from guarded("effective", lambda: check_effective(subject), "broken")
    yield from _training(subject, steps)


def _training(subject: ClassUnderTest, steps: int) -> Iterator[Check]:
    with checkpoint_folder() as folder:
        try:
            run = Run(subject, steps, Path(folder))
        except Failure as error:
            yield broken("step", str(error), error.remedy)
            return
        except Exception as error:  # without a run nothing is known, which is not a pass
            yield broken(
                "step", f"the steps could not be measured: {describe_error(error)}", "see tune_ssim.Training for what is expected"
            )
            return
        yield from run.findings
        if "step" in run.broken:
            return
        # Each check records what is broken, so that one fault is reported once.
        for name, check in CHECKS.items():
            if name == "random/seed" and "random/repeatable" in run.broken:
                yield unknown(
                    "resume",
                    "a resumed run cannot be compared, nor a run that is looked at",
                    "mend random/repeatable first",
                )
                return
            found = list(guarded(name, partial(check, subject, run), "broken"))
            run.findings.extend(found)
            yield from found
            if not run.comparable:
                return
