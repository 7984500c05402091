"""Several objectives: how they are written, what the Pareto front is, and where it is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML
from small_studies import SMALL, baseline, study, trial

from tune_ssim.base.errors import UserError
from tune_ssim.cli.app import exit_code
from tune_ssim.orchestration.phases import run_study
from tune_ssim.results.pareto import pareto_front
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.results.winner import NoSafeTrial, best_safe, chosen
from tune_ssim.study.objective import Goal, Objective
from tune_ssim.study.study import load_study
from tune_ssim.trials.summary import TrialSummary

BOTH = Objective(maximize="delta_ssim", also=(Goal(maximize="psnr"),))


def made(trial_id: str, delta_ssim: float, psnr: float, verdict: str = "safe", **more: Any) -> TrialSummary:
    config = {"mark": trial_id}
    return trial(trial_id, verdict, metrics={"delta_ssim": delta_ssim, "psnr": psnr}, **{"config": config, **more})


# ---- as it is written


@pytest.mark.parametrize(
    "written",
    [
        [{"maximize": "delta_ssim", "keep": {"lpips": {"max_ratio": 1.1}}}, {"maximize": "psnr"}, {"minimize": "fid"}],
        {"maximize": "delta_ssim", "keep": {"lpips": {"max_ratio": 1.1}}, "also": [{"maximize": "psnr"}, {"minimize": "fid"}]},
    ],
)
def test_a_list_is_its_first_objective_and_others(written: Any) -> None:
    loaded = load_study({**SMALL, "objective": written})
    assert [(goal.direction, goal.name) for goal in loaded.objective.goals] == [
        ("maximize", "delta_ssim"), ("maximize", "psnr"), ("minimize", "fid"),
    ]  # fmt: skip
    assert list(loaded.objective.keep) == ["lpips"] and loaded.objective.min_improvement == 0.001
    assert load_study(loaded.to_dict()).objective == loaded.objective


def test_the_objectives_on_the_page_are_read() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "objective.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S) if block.startswith("objective:")]
    one, several = (load_study({**SMALL, **YAML(typ="safe").load(block)}).objective for block in blocks)
    assert (one.direction, one.name, one.also) == ("minimize", "val_loss", ())
    assert [goal.name for goal in several.goals] == ["delta_ssim", "psnr"] and list(several.keep) == ["psnr", "flow_loss_bins"]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("[]", "s.yaml:2: objective: must not be empty"),
        ("[3]", "s.yaml:2: objective.0: must be a mapping, got 3"),
        ("[{maximize: a}, {}]", "s.yaml:2: objective.1: must have maximize or minimize"),
        ("[{maximize: a}, {maximise: b}]", "s.yaml:2: objective.1: unknown key 'maximise'; did you mean 'maximize'?"),
        ("[{maximize: a}, {maximize: b, keep: {}}]", "s.yaml:2: objective.1: unknown key 'keep'"),
        ("[{maximize: a}, {minimize: a}]", "s.yaml:2: objective: names a twice"),
        ("{also: [{maximize: delta_ssim}]}", "s.yaml:2: objective: names delta_ssim twice"),
        ("{also: 3}", "s.yaml:2: objective.also: must be a list, got 3"),
    ],
)
def test_errors_have_their_line(tmp_path: Path, written: str, said: str) -> None:
    (tmp_path / "s.yaml").write_text(f"name: s\nobjective: {written}\n")
    with pytest.raises(UserError) as caught:
        load_study(tmp_path / "s.yaml")
    assert said in str(caught.value)


def test_a_further_objective_must_be_measured() -> None:
    found = BOTH.problem({"ssim": 0.9, "psnrs": 30.0}, [], ["loss"])
    assert found.startswith("objective: maximize: psnr: the baseline did not measure 'psnr'; did you mean 'psnrs'?")
    assert BOTH.problem({"ssim": 0.9, "psnr": 30.0}, [], []) == ""


# ---- the front


def test_the_front_is_of_safe_settings() -> None:
    trials = [
        baseline(),
        made("best ssim", 0.009, 30.0),
        made("best psnr", 0.002, 32.0),
        made("between", 0.005, 31.0),
        made("worse than between", 0.004, 30.9),
        made("broke a keep rule", 0.02, 33.0, "degraded"),
        made("not measured", 0.008, float("nan")),
    ]
    assert [one.trial_id for one in pareto_front(trials, BOTH)] == ["best ssim", "between", "best psnr"]
    less = Objective(maximize="delta_ssim", also=(Goal(minimize="psnr"),))
    assert [one.trial_id for one in pareto_front(trials, less)] == ["best ssim"]
    assert pareto_front(trials, Objective()) == []
    assert best_safe(trials, objective=BOTH).trial_id == "best ssim"  # the first objective decides


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_by_its_definition(values: list[tuple[int, int]]) -> None:
    trials = [trial(str(n), config={"lr": n}, metrics={"delta_ssim": a, "psnr": b}) for n, (a, b) in enumerate(values)]
    front = {one.trial_id for one in pareto_front(trials, BOTH)}
    for n, (a, b) in enumerate(values):
        is_dominated = any(c >= a and d >= b and (c, d) != (a, b) for c, d in values)
        assert (str(n) in front) is not is_dominated


# ---- where it is shown


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    trials = (made("a", 0.009, 30.0), made("b", 0.002, 32.0), made("c", 0.001, 31.0), made("d", 0.02, 33.0, "degraded"))
    return study(tmp_path, *trials, yaml="name: fundus-ssim\nobjective: {maximize: delta_ssim, also: [{maximize: psnr}]}\n")


@pytest.fixture
def printed(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> Any:
    def output(*arguments: str) -> str:
        assert exit_code([*arguments, "--storage-path", str(folder.path.parent)]) == 0
        return capsys.readouterr().out

    return output


def test_trials_mark_the_front(printed: Callable[..., str]) -> None:
    listed = json.loads(printed("trials", "--json"))
    assert {one["trial_id"]: one["pareto_front"] for one in listed} == {"a": True, "b": True, "c": False, "d": False}
    table = printed("trials")
    assert "★ ◆ a" in table and "◆ b" in table and "◆ c" not in table
    assert "◆ Pareto front of ΔSSIM, PSNR: a, b" in table


def test_another_trial_is_chosen(folder: StudyFolder, printed: Callable[..., str]) -> None:
    assert json.loads(printed("export", "--trial", "b", "--unproven", "--format", "json"))["trial_id"] == "b"
    with pytest.raises(NoSafeTrial, match="d is degraded: PSNR is"):
        chosen(folder, "d")
    with pytest.raises(UserError, match="no trial 'bb' of the search; did you mean 'b'"):
        chosen(folder, "bb")


def test_a_setting_that_another_trial_refuted_is_not_chosen(tmp_path: Path) -> None:
    ruined = study(tmp_path, trial("a"), trial("confirm-a-0", "pruned", role="confirm"))
    with pytest.raises(NoSafeTrial, match="a: its setting was not safe in another trial: confirm-a-0 is pruned"):
        chosen(ruined, "a")


# ---- a whole study

GOALS = [
    {"maximize": "delta_ssim", "keep": {"psnr": {"min_delta": -100}}},
    {"maximize": "psnr"},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return run_study(load_study({**SMALL, "objective": GOALS}), storage=tmp_path_factory.mktemp("storage"), in_process=True)


def test_a_study_with_two_objectives(finished: StudyFolder) -> None:
    trials, objective = finished.trials(), finished.objective
    front = pareto_front(trials, objective)
    assert [goal.name for goal in objective.goals] == ["delta_ssim", "psnr"]
    assert best_safe(finished).trial_id == front[0].trial_id
    assert len(front) > 1, "the two objectives of the small task disagree"
    psnrs = [one.metric("psnr") for one in front]
    assert psnrs == sorted(psnrs)  # worse in the first, better in the second


def test_the_front_is_drawn_and_logged(finished: StudyFolder) -> None:
    with Image.open(finished.path / "pareto.png") as picture:
        assert picture.size == (775, 625)
    assert [event["path"] for event in finished.events() if event["event"] == "file"].count("pareto.png") == 1


def test_an_objective_that_the_training_lacks_ends_the_study(tmp_path: Path) -> None:
    lacking = load_study({**SMALL, "objective": [*GOALS, {"minimize": "lpips"}]})
    with pytest.raises(UserError, match="objective: minimize: lpips: the baseline did not measure 'lpips'; it measured"):
        run_study(lacking, storage=tmp_path, in_process=True)
