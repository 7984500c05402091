"""What a study optimises: any metric, in either direction, from every kind of training; and what is made of it afterwards."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_studies import LOSS, run, study
from hypothesis import given
from hypothesis import strategies as st
from ray import tune
from small_studies import SMALL
from test_cli import tune_ssim

from tune_ssim.base.errors import UserError
from tune_ssim.cli.tables import best_first
from tune_ssim.guards.verdict import Verdict
from tune_ssim.orchestration.ray_executor import _Controls, _scheduler
from tune_ssim.orchestration.retries import Retries
from tune_ssim.orchestration.verification import verify
from tune_ssim.results.events import Event
from tune_ssim.results.export import exported_config
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.trial_text import proof_line, verdict_line
from tune_ssim.results.winner import best_safe, ranked
from tune_ssim.study.objective import Objective
from tune_ssim.study.sections import Asha
from tune_ssim.study.study import load_study
from tune_ssim.tracking.leaderboard import Leaderboard
from tune_ssim.trials.summary import TrialSummary

# ---- as it is written


@pytest.mark.parametrize(
    ("written", "name", "direction"),
    [
        ({}, "delta_ssim", "maximize"),
        ({"maximize": "psnr"}, "psnr", "maximize"),
        ({"minimize": "val_loss", "reduction": {"mean_last": 5}}, "val_loss", "minimize"),
        ({"minimize": "delta_fid", "reduction": "best", "keep": {}}, "delta_fid", "minimize"),
    ],
)
def test_an_objective_is_read_and_written(written: dict[str, Any], name: str, direction: str) -> None:
    loaded = load_study({**SMALL, "objective": written})
    assert (loaded.objective.name, loaded.objective.direction) == (name, direction)
    assert load_study(loaded.to_dict()).objective == loaded.objective


def test_a_reduction_is_written_only_if_it_is_another() -> None:
    assert list(load_study(SMALL).to_dict()["objective"]) == ["maximize", "min_improvement", "keep"]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{maximize: a, minimize: b}", "s.yaml:2: objective: has both maximize and minimize; several objectives are a list"),
        ("{minimise: a}", "s.yaml:2: objective: unknown key 'minimise'; did you mean 'minimize'?"),
        ("{minimize: 3}", "s.yaml:2: objective.minimize: must be text, got 3"),
        ("{reduction: first}", "s.yaml:2: objective.reduction: must be last, best or {mean_last: n} with an integer n >= 1, "),
        ("{reduction: {mean_last: 0}}", "s.yaml:2: objective.reduction: must be last, best or {mean_last: n}"),
        ("{reduction: {mean: 3}}", "s.yaml:2: objective.reduction: must be last, best or {mean_last: n}"),
    ],
)  # fmt: skip
def test_errors_have_their_line(tmp_path: Path, written: str, said: str) -> None:
    (tmp_path / "s.yaml").write_text(f"name: s\nobjective: {written}\n")
    with pytest.raises(UserError) as caught:
        load_study(tmp_path / "s.yaml")
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["loss", "val_loss", "delta_val_loss", "eval/valLoss", "FID", "lpips/vgg", "rmse", "test-error"])
def test_a_loss_that_is_maximised_is_warned_of(name: str) -> None:
    assert f"`minimize: {name}`" in Objective(maximize=name).warning
    assert Objective(minimize=name).warning == ""


@pytest.mark.parametrize("name", ["delta_ssim", "psnr", "lossless_size", "confidence", "score", "f1"])
def test_others_are_not(name: str) -> None:
    assert Objective(maximize=name).warning == ""


NUMBERS = st.floats(allow_nan=True, width=32)
REDUCTIONS: Any = st.one_of(st.just("last"), st.just("best"), st.integers(1, 4).map(lambda n: {"mean_last": n}))


@given(st.lists(NUMBERS, min_size=1), REDUCTIONS, st.sampled_from(["maximize", "minimize"]))
def test_what_is_remembered_is_enough(values: list[float], reduction: Any, direction: str) -> None:
    objective = Objective(**{direction: "m", "reduction": reduction})
    logged: list[float] = []
    for value in values:
        logged = objective.remember([*logged, value])
    assert len(logged) <= 4
    assert objective.reduce(logged) == pytest.approx(objective.reduce(values), nan_ok=True)


def test_reductions() -> None:
    def reduce(reduction: Any, **name: str) -> float:
        return Objective(reduction=reduction, **(name or {"minimize": "m"})).reduce([3.0, math.nan, 1.0, 2.0])

    assert (reduce("last"), reduce("best"), reduce("best", maximize="m"), reduce({"mean_last": 2})) == (2.0, 1.0, 3.0, 1.5)
    assert math.isnan(reduce({"mean_last": 3}))


# ---- from every kind of training

# Minimises (w - 3)² / 2 from w = 0; its "val_loss" first falls, then oscillates more the higher the rate. {lr} of 0.5 is best.
TRAIN = """
import json, sys
lr, steps, w = float(sys.argv[1]), 20, 0.0
for step in range(1, steps + 1):
    w -= lr * (w - 3)
    print(f"step {step}: loss {(w - 3) ** 2:.9g}" + (f" val_loss {(w - 3) ** 2 + lr * (step % 2):.9g}" if step % 2 == 0 else ""))
print("TUNE_SSIM " + json.dumps({"held_out": {"score": -abs(w - 3)}}))
"""
RECORDS = {"pattern": LOSS + r"( val_loss (?P<val_loss>\S+))?"}
RATES = {"name": "rates", "parameters": {"lr": {"choice": [0.05, 0.5, 0.02]}}}
SLOWER = {**RATES, "parameters": {"lr": {"choice": [0.09, 0.095]}}}  # than the baseline, within the margin of the loss
PUSHED = """
import tune_ssim
def train():
    with tune_ssim.trial_context() as t:
        lr, w = t.config["lr"], 0.0
        t.seed
        for step in range(1, 21):
            w -= lr * (w - 3)
            t.report(step=step, loss=(w - 3) ** 2, **({} if step % 2 else {"val_loss": (w - 3) ** 2}))
        t.held_out(score=-abs(w - 3))
"""
TASK = """
from tune_ssim import Training
class Descent(Training):
    def setup(self, config, seed, device=None):
        self.config, self.w, self.n = dict(config), seed / 100, 0
    def step(self):
        self.n, self.w = self.n + 1, self.w - self.config["lr"] * (self.w - 3)
        loss = (self.w - 3) * (self.w - 3)
        return {"loss": loss, **({} if self.n % 2 else {"val_loss": loss})}
    def evaluate(self):
        return {"score": -abs(self.w - 3)}
    def sample(self, noise=0):
        return None
    def state_dict(self):
        return {"w": self.w, "n": self.n}
    def load_state_dict(self, state):
        self.w, self.n = state["w"], state["n"]
    def effective(self):
        return {"lr": self.config["lr"]}
"""


def command(folder: Path, **changes: Any) -> dict[str, Any]:
    return rates(study(folder, TRAIN, ("{lr}",), task={"records": RECORDS}), **changes)


def file(folder: Path, **changes: Any) -> dict[str, Any]:
    """A program that writes its log to a file."""
    script = TRAIN.replace("import json, sys", "import json, os, sys\nsys.stdout = open(os.path.join(sys.argv[2], 'log.txt'), 'w')")
    records = {**RECORDS, "file": "{exp_dir}/log.txt"}
    given = study(folder, script.replace('print("TUNE', 'print("_'), ("{lr}", "{exp_dir}"), task={"records": records})
    return rates(given, **changes)


def pushed(folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / "pushed_rates.py").write_text(PUSHED)
    return rates({**study(folder), "task": "pushed_rates:train", "import_path": str(folder)}, **changes)


def in_python(folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / "descent_task.py").write_text(TASK)
    return rates({**study(folder), "task": "descent_task:Descent", "import_path": str(folder)}, **changes)


def rates(given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Three learning rates; the baseline's is the second best."""
    return {
        **given,
        "task_config": {"steps": 20},
        "baseline": {"lr": 0.1, "seeds": 1},
        "space": RATES,
        "search": {"trials": 6, "strategy": "random", "concurrency": 1},
        **changes,
    }


@pytest.mark.parametrize("door", [command, file, pushed, in_python], ids=lambda door: door.__name__)
def test_the_lowest_loss_wins_whatever_the_training_is(tmp_path: Path, door: Callable[..., dict[str, Any]]) -> None:
    folder = run(door(tmp_path, objective={"minimize": "val_loss", "keep": {}}), tmp_path / "results")
    best, summaries = best_safe(folder), folder.trials()
    assert best.config["lr"] == 0.5
    found = {summary.config["lr"]: summary for summary in summaries}
    assert found[0.5].metrics["val_loss"] < found[0.1].metrics["val_loss"] < found[0.05].metrics["val_loss"]
    assert found[0.5].metrics["delta_val_loss"] == found[0.5].metrics["val_loss"] - found[0.1].metrics["val_loss"] < 0
    assert [summary.config["lr"] for summary in ranked(summaries, folder.objective)] == [
        0.5
    ]  # the others are worse than the baseline


def test_a_difference_of_any_metric_and_the_best_value(tmp_path: Path) -> None:
    """The last value says 0.5; the first values of a training that moves little are the highest."""
    objective = {"maximize": "delta_loss", "reduction": "best", "keep": {}}
    guards = {"norm_ratio": None, "smoke_test": None, "divergence": {"max_end_ratio": None}}
    folder = run(in_python(tmp_path, objective=objective, guards=guards), tmp_path / "results")
    by_rate = {summary.config["lr"]: summary.metrics["delta_loss"] for summary in folder.trials() if summary.role == "search"}
    assert by_rate[0.05] == pytest.approx((3 * 0.95) ** 2 - (3 * 0.9) ** 2)
    assert best_safe(folder).config["lr"] == 0.02


def test_the_mean_of_the_last_values(tmp_path: Path) -> None:
    folder = run(in_python(tmp_path, objective={"minimize": "val_loss", "reduction": {"mean_last": 3}}), tmp_path / "results")
    baseline = folder.trials()[0]
    assert baseline.metrics["val_loss"] == pytest.approx(sum((3 * 0.9**n) ** 2 for n in (16, 18, 20)) / 3)


# ---- what is known when the baseline ends


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"minimize": "val_los"}, "objective: minimize: val_los: the baseline did not measure 'val_los'; did you mean 'val_loss'?; "
         "it measured held-out score; logged loss, val_loss"),
        ({"maximize": "delta_accuracy"}, "objective: maximize: delta_accuracy: the baseline did not measure 'accuracy'; it"),
        ({"minimize": "val_loss", "reduction": {"mean_last": 11}},
         "objective: reduction: mean_last: 11: the baseline logged val_loss 10 times"),
        ({"maximize": "score", "reduction": {"mean_last": 2}}, "the baseline logged score never, it is measured once"),
    ],
)  # fmt: skip
def test_an_objective_that_is_not_measured_ends_the_study_with_its_baseline(
    tmp_path: Path, objective: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(in_python(tmp_path, objective=objective), tmp_path / "results")
    assert said in str(caught.value)
    assert [trial.role for trial in StudyFolder(tmp_path / "results" / "rates").trials()] == ["baseline"]


def test_a_baseline_without_a_finite_objective_compares_with_nothing(tmp_path: Path) -> None:
    given = in_python(tmp_path, objective={"minimize": "loss"}, baseline={"lr": 1e200, "seeds": 1})
    with pytest.raises(UserError, match=r"objective: minimize: loss: the baseline's loss is (nan|inf)"):
        run({**given, "guards": {"norm_ratio": None, "smoke_test": None, "non_finite": None}}, tmp_path / "results")


def test_the_log_of_a_baseline_is_reduced_alike(tmp_path: Path) -> None:
    """And a metric that it lacks is asked for."""
    rows = [{"step": n, "loss": 1.0, "total_norm": 1.0, "val_loss": 1.0 / n} for n in range(1, 21)]
    (tmp_path / "pixel.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = {"log": str(tmp_path / "pixel.jsonl"), "lr": 0.1}
    objective = {"minimize": "val_loss", "reduction": {"mean_last": 2}}
    folder = run(in_python(tmp_path, objective=objective, baseline=log), tmp_path / "results")
    (one, *_) = folder.trials()
    assert one.metrics["val_loss"] - one.metrics["delta_val_loss"] == pytest.approx((1 / 19 + 1 / 20) / 2)
    given = in_python(tmp_path, objective={"maximize": "delta_score"}, baseline=log, name="lacks")
    with pytest.raises(
        UserError, match=r"did not measure 'score'; it measured held-out val_loss; say it in baseline.log: .*held_out"
    ):
        run(given, tmp_path / "results")


# ---- what is made of it


@pytest.fixture(scope="module")
def confirmed(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    folder = tmp_path_factory.mktemp("confirmed")
    given = in_python(folder, objective={"minimize": "val_loss", "keep": {}}, confirm={"seeds": 2, "steps": 20}, preflight=None)
    return run(given, folder / "results")


def test_it_is_confirmed_exported_and_verified(confirmed: StudyFolder) -> None:
    best = best_safe(confirmed)
    exported = exported_config(best, confirmed)
    proof = exported["proof"]
    assert proof["unproven"] == [] and (proof["objective"], proof["direction"]) == ("val_loss", "minimize")
    assert proof["comparison"]["delta_val_loss"]["mean"] < 0
    assert "Δval_loss -" in proof_line(proof)
    assert verify(exported, in_process=True)[0] == []


def test_tables_and_mlflow_put_the_lowest_first(confirmed: StudyFolder) -> None:
    searched = [summary for summary in best_first(confirmed.trials(), confirmed.objective) if summary.role == "search"]
    assert [summary.config["lr"] for summary in searched] == sorted((s.config["lr"] for s in searched), reverse=True)
    board = Leaderboard("rates")
    for line in confirmed.events_file.read_bytes().splitlines():
        event = Event.read(line)
        assert event is not None
        board.add(event)
    assert board.study_name().startswith("rates: best lr 0.5, val_loss ")
    names = [summary["config"]["lr"] for _, summary in board.ranked() if summary["role"] == "search"]
    assert names == [summary.config["lr"] for summary in searched]
    text = board.text("1", "key", {})
    assert "| setting | verdict | reason | val\\_loss |" in text and "PSNR" not in text


def test_what_a_study_of_learning_rates_says_has_nothing_of_ssim(confirmed: StudyFolder) -> None:
    storage = confirmed.path.parent
    for width in ("60", "100", "200"):
        shown = tune_ssim("trials", "rates", cwd=storage, COLUMNS=width).stdout.lower().split("next:")[0]
        assert "lr 0.5" in shown or width == "60"
        for word in ("ssim", "gain", "max_t", "psnr", "pixel"):
            assert word not in shown, word
    assert all("ssim" not in name for summary in confirmed.trials() for name in summary.config)
    (one, *_) = [summary for summary in confirmed.trials() if summary.role == "search"]
    assert "gain" not in verdict_line(one).plain


def test_a_study_that_hands_over_nothing_does_not_exit_0(tmp_path: Path) -> None:
    given = in_python(tmp_path, objective={"minimize": "val_loss"}, space=SLOWER)
    (tmp_path / "rates.yaml").write_text(load_study(given).to_yaml())
    done = tune_ssim("run", "rates.yaml", "--in-process", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: rates: no setting beats the baseline: the best of 2 safe trials, "
    ) and "search other settings, or keep the baseline's" in done.stderr  # fmt: skip
    assert "has val_loss 0.166 (delta_val_loss +0.033)" in done.stderr


def test_a_maximised_loss_is_warned_of_before_anything_runs(tmp_path: Path) -> None:
    given = in_python(tmp_path, objective={"maximize": "val_loss"}, space=SLOWER)
    (tmp_path / "rates.yaml").write_text(load_study(given).to_yaml())
    done = tune_ssim("run", "rates.yaml", "--in-process", cwd=tmp_path)
    warning = "objective: maximize: val_loss: less of it seems to be better; `minimize: val_loss` prefers small values"
    assert done.returncode == 0 and re.search(rf"^warning: rates\.yaml:\d+: {re.escape(warning)}$", done.stdout, re.M)
    dry = tune_ssim("run", "rates.yaml", "--dry-run", cwd=tmp_path)
    assert dry.stderr.splitlines()[0].endswith(warning)


def test_asha_follows_the_direction() -> None:
    for objective in (Objective(minimize="val_loss"), Objective(maximize="psnr")):
        controls = _Controls(tune.PlacementGroupFactory([{"CPU": 1}]), 1, Retries(str, print))
        scheduler: Any = _scheduler(Asha(max_steps=40), controls, objective)
        assert (scheduler._mode, scheduler._metric) == (objective.direction[:3], "held_out_now")


def test_a_trial_says_its_direction_only_where_it_minimises() -> None:
    summary = TrialSummary(
        trial_id="a", verdict=Verdict.SAFE, objective="val_loss", direction="minimize", metrics={"delta_val_loss": -1.0}
    )
    assert summary.to_dict()["direction"] == "minimize" and summary.improvement == 1.0
    assert TrialSummary.from_dict(summary.to_dict()) == summary
    assert "direction" not in TrialSummary(trial_id="a", verdict=Verdict.SAFE).to_dict()
    with pytest.raises(ValueError, match="direction"):
        TrialSummary.from_dict({**summary.to_dict(), "direction": "up"})
