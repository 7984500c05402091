"""The Training contract: what a class may leave out, and what its own methods say of its abilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from broken_tasks import Honest
from small_task import SmallTask

from tune_ssim import Task, Training
from tune_ssim.base.errors import UserError
from tune_ssim.before_launch.preflight import preflight_task
from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.trials.final_verdict import TrialPlan
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.training import CONTRACT, Abilities, as_training
from tune_ssim.trials.trial import Trial

OWN = {name: value for name, value in vars(SmallTask).items() if name in CONTRACT}
Loose = type("Loose", (), OWN)  # the contract by its method names alone, as tasks were written before there was a base class
Lame = type("Lame", (), {name: value for name, value in OWN.items() if name not in ("sample", "effective")})
LameTraining = type("LameTraining", (Training,), dict(vars(Lame)))


def test_a_class_that_does_not_inherit_is_a_training_all_the_same() -> None:
    found = load_task("test_training:Loose", str(Path(__file__).parent))
    assert issubclass(found, Training) and found.__name__ == "Loose" and found.__module__ == Loose.__module__  # type: ignore[arg-type]
    assert load_task(Loose)().abilities() == Abilities()
    records = []
    for task in (Loose(), SmallTask()):
        trial = Trial(task, TrialPlan(steps=3, guards=()))
        trial.start({"steps": 3})
        records.append(trial.advance())
        assert trial.task is task and trial.verdict is not None and trial.verdict.verdict == "safe"
    assert records[0] == records[1]
    assert preflight_task(Loose, {}, device="cpu").status == preflight_task(SmallTask, {}, device="cpu").status


@pytest.mark.parametrize("name", ["Lame", "LameTraining"])
def test_methods_that_are_missing_are_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} has no sample, effective; see tune_ssim.Training for the contract"):
        load_task(f"test_training:{name}", str(Path(__file__).parent))


def test_abilities_are_the_methods_that_a_class_has() -> None:
    honest = as_training(Honest())
    shown = {"forward", "trainable_parameters", "parts", "training_images", "fingerprints"}
    assert {name for name in vars(Abilities()) if honest.abilities().has(name)} == shown
    honest.setup({}, 0)
    assert honest.abilities().has("time_law", "forward") and not honest.abilities().has("forward", "left_out")
    assert FundusSR().abilities() == replace(Abilities(**dict.fromkeys(vars(Abilities()), True)), time_law=False)


def test_what_a_training_has_not_is_empty_or_refused() -> None:
    task = SmallTask()
    empty = (task.parts, task.trainable_parameters, task.fingerprints, task.left_out, task.written, task.ancestry)
    assert (
        not any(method() for method in empty)
        and task.sample_ema() is None
        and task.image(0) is None
        and task.where_printed("lr") is None
    )
    assert task.takes_samples and task.is_paired and task.can_resume and not task.reports_after_last_step
    for call in (task.forward, task.training_images):
        with pytest.raises(NotImplementedError, match="SmallTask has no"):
            call(1)
    assert Task is Training
