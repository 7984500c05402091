# ruff: noqa: E501  (tables: one case a line)
"""The study file: defaults with their origin, overrides by the same rules, and one clear line for every mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tune_ssim.base.errors import UserError
from tune_ssim.base.yaml_source import dump_yaml, parse_yaml
from tune_ssim.guards import Divergence, NonFinite, NormRatio, SmokeTest, Threshold
from tune_ssim.study.objective import Keep, Objective
from tune_ssim.study.sections import Asha, BaselineRuns, CalibrationOptions, Resources, Search, Tracking
from tune_ssim.study.space import load_space
from tune_ssim.study.study import Study, bundled_studies, bundled_studies_folder, load_study

# Reading a study takes tens of milliseconds: few examples, and no minutes of shrinking when one fails.
QUICK: dict[str, Any] = {
    "deadline": None,
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str | bytes, name: str = "s.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# ---- what a study is ----


def test_the_bundled_study() -> None:
    study = load_study()
    assert study == load_study("fundus_ssim")
    assert (study.name, study.task_path, study.steps) == ("fundus-ssim", "tune_ssim.tasks.fundus_sr:FundusSR", 200)
    assert study.task_config == {"preset": "sgd", "steps": 200}
    assert study.baseline_settings == {
        "ssim_loss_weight": 0.0,
        "pixel_loss_weight": 0.05,  # SEEDS A6
        "pixel_loss_max_t": 0.3,
        "measure_main_norm": True,
    }
    assert study.baseline_seeds == 1
    assert study.space == load_space("wide")
    # It shows the guards at work, also on settings that are known to ruin the model.
    assert (study.strategy, study.search.trials, study.search.seed, study.search.concurrency) == ("guided", 12, 0, 2)
    assert study.calibration == CalibrationOptions(batches=24, disable_update={"lr": 0.0})
    assert study.guard_list == (NormRatio(), SmokeTest(), NonFinite())
    assert study.objective.keep["psnr"].limit == {"min_delta": -0.3}
    assert study.tracking == Tracking(uri=None) and study.scheduler is None


@pytest.mark.parametrize(
    ("name", "preset"), [("fundus_ssim", "sgd"), ("fundus_adamw_clip", "adamw_clip"), ("fundus_adamw_hot", "adamw_hot")]
)
def test_bundled_studies_differ_in_their_preset(name: str, preset: str) -> None:
    assert name in bundled_studies()
    assert load_study(name).task_config["preset"] == preset


def test_what_is_left_out_has_a_default(written: Any) -> None:
    study = load_study(written("task: fundus_sr\n", "my_study.yaml"))
    assert study == Study(name="my-study", space=load_space("wide"))


def test_settings_beyond_twice_the_limit_are_not_launched_unless_told(written: Any) -> None:
    assert load_study(written("task: fundus_sr")).search.skip_beyond == 2
    assert load_study(written("search: {skip_beyond: null}")).search.skip_beyond is None
    assert load_study(written("search: {skip_beyond: 5}")).search.skip_beyond == 5


def test_a_gain_in_relative_units_needs_the_calibration(written: Any) -> None:
    inline = "space:\n  parameters:\n    gain: {unit: norm_ratio, log_uniform: [1.1, 3]}\n    ssim_loss_max_t: {choice: [0.1]}\n"
    assert load_study(written(inline)).space.is_relative
    assert load_study(written("calibration: null\n")).calibration is None
    with pytest.raises(UserError, match=r"s\.yaml:1: calibration: is null, but the space 'inline' gives its gain as a norm ratio"):
        load_study(written("calibration: null\n" + inline))
    with pytest.raises(UserError, match="the space 'moderate' gives its gain as a norm ratio"):
        load_study(written("calibration: null"), {"space": "moderate"})


def test_an_objective_keeps_its_default_margins_unless_told(written: Any) -> None:
    assert load_study(written("objective: {maximize: psnr}")).objective == Objective(maximize="psnr")
    assert load_study(written("objective: {keep: {}}")).objective.keep == {}
    (rule,) = load_study(written("objective: {keep: {fid: {max_ratio: 1.1}}}")).objective.rules
    assert (rule.metric, rule.max_ratio, rule.min_delta) == ("fid", 1.1, None)


def test_guards_off_on_and_added(written: Any) -> None:
    text = (
        "guards:\n  norm_ratio: null\n  smoke_test: {at: [0, 10], consecutive: 1}\n  threshold:\n    - {metric: loss, upper: 3}\n"
    )
    guards = load_study(written(text)).guards
    assert guards == {
        "smoke_test": SmokeTest(at=(0, 10), consecutive=1),
        "non_finite": NonFinite(),
        "divergence": Divergence(),
        "threshold:loss": Threshold("loss", upper=3),
    }


def test_asha_lasts_as_long_as_a_trial_unless_told(written: Any) -> None:
    assert load_study(written("task_config: {steps: 50}\nscheduler: {asha: {}}")).scheduler == Asha(max_steps=50)
    assert load_study(written("scheduler: {asha: {max_steps: 100, grace_steps: 10}}")).scheduler == Asha(
        max_steps=100, grace_steps=10
    )


def test_a_space_inline_beside_the_file_and_by_name(written: Any, tmp_path: Path) -> None:
    inline = load_study(written("space:\n  parameters: {lr: {log_uniform: [1e-5, 1e-3]}}\n"))
    assert inline.space.name == "inline" and inline.baseline_settings.get("ssim_loss_weight") is None
    (tmp_path / "sub").mkdir()
    written("name: near\nparameters: {lr: {choice: [1, 2]}}\n", "sub/near.yaml")
    assert load_study(written("space: near.yaml", "sub/s.yaml")).space.name == "near"
    assert load_study(written("space: note_v3:moderate")).space.stages[0].name == "moderate"


def test_a_task_of_ones_own_is_looked_for_beside_the_study(written: Any, tmp_path: Path) -> None:
    study = load_study(written("task: my_pkg.train:MyTask"))
    assert (study.task_path, study.import_path) == ("my_pkg.train:MyTask", str(tmp_path))
    assert load_study(written("task: my_pkg.train:MyTask\nimport_path: src")).import_path == str(tmp_path / "src")
    assert load_study(written("task: fundus_sr")).import_path is None


def test_a_study_from_python() -> None:
    assert load_study({"search": {"trials": 3}}).search.trials == 3
    with pytest.raises(ValueError, match=r"task_config\.steps: must be an integer >= 1, got 0"):
        Study(name="s", space=load_space("wide"), task_config={"steps": 0})
    with pytest.raises(UserError, match="plain values"):
        load_study({"task_config": {"model": object()}})


# ---- round trip ----


def reloaded(study: Study, path: Path) -> Study:
    path.write_text(study.to_yaml(), encoding="utf-8")
    return load_study(path)


@pytest.mark.parametrize("name", ["fundus_ssim", "fundus_adamw_clip", "fundus_adamw_hot"])
@pytest.mark.parametrize("space", ["wide", "note_v2", "note_v3:assertive"])
def test_the_resolved_study_is_the_same_study(name: str, space: str, tmp_path: Path) -> None:
    study = load_study(name, {"space": space})
    again = reloaded(study, tmp_path / "elsewhere.yaml")
    assert again == study and again.sha256 == study.sha256 and again.to_yaml() == study.to_yaml()


@settings(max_examples=15, **QUICK)
@given(
    search=st.builds(
        Search,
        strategy=st.sampled_from(["optuna", "random"]),
        trials=st.integers(4, 1000),
        seed=st.integers(0, 2**32 - 1),
        concurrency=st.integers(1, 99) | st.just("auto"),
        deterministic=st.booleans(),
        skip_beyond=st.none() | st.floats(0.1, 100),
    ),
    calibration=st.none()
    | st.builds(
        CalibrationOptions,
        batches=st.integers(1, 99),
        grid=st.none() | st.lists(st.floats(0.01, 1), min_size=1, unique=True),
        disable_update=st.sampled_from([{}, {"lr": 0}, {"optimizer": "none", "lr": 0.0}]),
        method=st.sampled_from(["auto", "gram", "readings"]),
    ),
    guards=st.lists(
        st.sampled_from(
            [
                NormRatio(limit=3.5, on_excess="warn"),
                SmokeTest(at=(0, 7)),
                NonFinite(prefixes=("loss",)),
                Threshold("loss", upper=2),
                Threshold("kl_raw", lower=-1, patience=3, action="warn"),
            ]
        ),
        unique_by=lambda guard: guard.name,
    ),
    keep=st.dictionaries(st.sampled_from(["psnr", "no", "1e-4", "a b"]), st.floats(-9, 9).map(lambda x: Keep(min_delta=x))),
    extra=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=6).map(lambda text: "x" + text),
        st.floats(allow_nan=False) | st.text(max_size=6).filter(lambda t: t.isprintable()) | st.booleans() | st.none(),
        max_size=3,
    ),
    tracking=st.sampled_from([None, Tracking(), Tracking(uri="http://127.0.0.1:5000")]),
    scheduler=st.sampled_from([None, Asha(max_steps=150), Asha(max_steps=200, reduction_factor=2)]),
    gpus=st.sampled_from(["auto", 0.0, 0.5]),
)  # fmt: skip
def test_any_study_survives_yaml(tmp_path: Path, guards: list[Any], keep: Any, extra: Any, gpus: Any, **parts: Any) -> None:
    study = load_study_once().replace(
        guards={guard.name: guard for guard in guards},
        objective=Objective(keep=keep),
        task_config=extra,
        baseline=BaselineRuns(overrides=extra, seeds=3),
        resources=Resources(gpus=gpus),
        **parts,
    )
    again = reloaded(study, tmp_path / "s.yaml")
    assert again == study and again.sha256 == study.sha256


def load_study_once(cache: list[Study] = []) -> Study:  # noqa: B006  (one read for all examples)
    if not cache:
        cache.append(load_study(None, {"space": "note_v3"}))
    return cache[0]


def test_the_digest_is_of_the_content(written: Any) -> None:
    one = load_study(written("name: a\nsearch: {trials: 5, seed: 1}\n"))
    other = load_study(written("# a comment\nsearch:\n  seed: 1\n  trials: 5\nname: a\n"))
    assert one.sha256 == other.sha256
    assert one.sha256 != load_study(written("name: a\nsearch: {trials: 5, seed: 2}\n")).sha256


# ---- the command line's overrides ----


def test_overrides_win_and_none_leaves_the_studys_own() -> None:
    study = load_study(None, {"trials": 4, "seed": 7, "name": "mine", "space": "note_v3", "tracking_uri": None})
    assert (study.search.trials, study.search.seed, study.name, study.space.name) == (4, 7, "mine", "note_v3")
    assert study.search.concurrency == 2 and study.tracking == Tracking()
    assert load_study(None, {"search.trials": 4, "tracking.uri": "sqlite:///x.db"}).tracking == Tracking(uri="sqlite:///x.db")
    assert load_study({"tracking": None}, {"tracking_uri": "file:x"}).tracking == Tracking(uri="file:x")


def test_a_space_on_the_command_line_starts_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "near.yaml").write_text("parameters: {lr: {choice: [1, 2]}}\n")
    monkeypatch.chdir(tmp_path)
    assert load_study(None, {"space": "near.yaml"}).space.name == "near"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"trials": 0}, "--trials: must be >= 1, got 0"),
        ({"search.trials": 3, "space": "note_v2"}, "--trials: a space with 4 stages needs at least 4 trials, got 3"),
        ({"seed": -1}, "--seed: must be >= 0, got -1"),
        ({"seed": 2**32}, "--seed: must be < 4.29497e+09, got 4294967296"),
        ({"name": "a/b"}, "--name: letters, digits, '.', '_' and '-' only"),
        ({"space": "wid"}, "--space: unknown space 'wid'; did you mean 'wide'?"),
        (
            {"space": "note_v3:aggresive"},
            "--space: space 'note_v3' has no stage 'aggresive'; did you mean 'aggressive'?",
        ),
        ({"space": "no.yaml"}, "--space: no.yaml: no such file"),
        ({"tracking_uri": ""}, "--tracking-uri: must not be empty"),
    ],
)
def test_a_wrong_option_is_named(overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        load_study(None, overrides)
    assert str(error.value).startswith(says)


# ---- mistakes: file text → what the one line must hold ----

BAD = [
    ("", "s.yaml: is empty"),
    ("hello", "s.yaml:1: must be a mapping"),
    ("a: [", "s.yaml:1: not valid YAML"),
    (b"\x80\x02}q\0.", "s.yaml: is not a text file"),
    ("gurads: {}", "s.yaml:1: unknown key 'gurads'; did you mean 'guards'?"),
    ("xyz: {}", "s.yaml:1: unknown key 'xyz'; valid: name, task, task_config, baseline, space"),
    ("name: 3", "s.yaml:1: name: letters, digits"),
    ("name: ../x", "s.yaml:1: name: letters, digits"),
    ("task: fundus_s", "s.yaml:1: task: unknown task 'fundus_s'; did you mean 'fundus_sr'?"),
    ("task: my_pkg.train", "s.yaml:1: task: unknown task 'my_pkg.train'; valid: fundus_sr, flow_dino_kl, two_stage_vlm, vae_kl (your own: my_pkg.train:MyTask, or a command)"),
    ("task: {command: torchrun}", "s.yaml:1: task.command: must be a list, got 'torchrun'"),
    ("task: {command: [python, '{lr}']}", "s.yaml:1: task.command.1: no setting 'lr' for the braces in '{lr}'; there are"),
    ("task: {command: [a, '{steps!r}']}", "s.yaml:1: task.command.1: '{steps!r}': the braces hold no name of a setting"),
    ("task: {comand: [a]}", "s.yaml:1: task: unknown key 'comand'"),
    ("task: 3", "s.yaml:1: task: unknown task 3"),
    ("import_path: 3", "s.yaml:1: import_path: must be a folder, got 3"),
    ("task_config: [1]", "s.yaml:1: task_config: must be a mapping, got [1] (a list)"),
    ("task_config:\n  steps: 0", "s.yaml:2: task_config.steps: must be an integer >= 1, got 0"),
    ("task_config: {steps: 1e3}", "s.yaml:1: task_config.steps: must be an integer >= 1, got 1000.0"),
    ("task_config: {steps: '9'}", "s.yaml:1: task_config.steps: must be an integer >= 1, got '9' (text)"),
    ("task_config: {max_t: 0.1}", "s.yaml:1: task_config.max_t: unknown setting 'max_t'; did you mean 'ssim_loss_max_t'?"),
    ("task_config: {ssim_loss_max_t: 2}", "s.yaml:1: task_config.ssim_loss_max_t: must be above 0 and at most 1"),
    ("task_config: {gain: 2}", "s.yaml:1: task_config.gain: belongs in a space"),
    ("task_config:\n  pixel_loss_weight: 0.05", "s.yaml:2: task_config.pixel_loss_weight: is 0.05, but the space 'wide' fixes it at 0.0"),
    ("task_config:\n  ssim_grad_clamp: 0.1\nspace: {parameters: {ssim_loss_weight: {adaptive: {target_ratio: {uniform: [1, 5]}}}}}",
     "s.yaml:2: ssim_grad_clamp: cannot be combined with an adaptive ssim_loss_weight"),
    ("task_config:\n  ssim_loss_weight: {adaptive: {target_ratio: 2}}\nspace: {parameters: {ssim_grad_clamp: {uniform: [1, 2]}}}",
     "s.yaml:2: ssim_grad_clamp: cannot be combined with an adaptive ssim_loss_weight"),
    ("task_config:\n  ssim_loss_weight: {adaptive: {target_ratio: 2}}\n  ssim_grad_clamp: 0.1\nspace: {parameters: {ssim_loss_max_t: {choice: [0.3, 1]}}}",
     "s.yaml:3: ssim_grad_clamp: cannot be combined with an adaptive ssim_loss_weight"),
    ("task_config:\n  ssim_loss_weight: {adaptive: {target_ratio: 2}}\nspace: {parameters: {ssim_loss_max_t: {choice: [0.3, 1]}}}\n"
     "search: {demonstrations: {x: {ssim_grad_clamp: 0.1}}}", "s.yaml:4: ssim_grad_clamp: cannot be combined with an adaptive"),
    ("baseline: null", "s.yaml:1: baseline: every verdict compares with a baseline"),
    ("baseline: {log: {path: x}}", "s.yaml:1: baseline.log: unknown key 'path'"),
    ("baseline: {log: 3}", "s.yaml:1: baseline.log"),
    ("baseline: {seeds: 0}", "s.yaml:1: baseline.seeds: must be >= 1, got 0"),
    ("baseline: {pixel_loss_weight: -1}", "s.yaml:1: baseline.pixel_loss_weight: must be a finite number >= 0, got -1"),
    ("baseline: {ssim_loss_weight: 0.1}", "s.yaml:1: baseline.ssim_loss_weight: the baseline has no SSIM loss, got 0.1"),
    ("space: wid", "s.yaml:1: space: unknown space 'wid'; did you mean 'wide'?"),
    ("space: gone.yaml", "gone.yaml: no such file; bundled spaces: aggressive, assertive, conservative, flow_dino_kl, moderate, note_v2, note_v3, two_stage_vlm, vae_kl, wide"),
    ("space: [wide]", "s.yaml:1: space: must be a name, a path or a mapping, got ['wide'] (a list)"),
    ("space: null", "s.yaml:1: space: must be a name, a path or a mapping, got nothing (null)"),
    ("name: s\nspace:\n  parameters:\n    gain: {log_uniform: [3, 1]}", "s.yaml:4: gain: lower (3) must be below upper (1)"),
    ("space: note_v3\nsearch: {trials: 2}", "s.yaml:2: search.trials: a space with 4 stages needs at least 4 trials, got 2"),
    ("search: 3", "s.yaml:1: search: must be a mapping, got 3"),
    ("search: {trails: 3}", "s.yaml:1: search: unknown key 'trails'; did you mean 'trials'?"),
    ("search: {trials: '12'}", "s.yaml:1: search.trials: must be an integer, got '12' (text)"),
    ("search: {trials: 12.5}", "s.yaml:1: search.trials: must be an integer, got 12.5"),
    ("search: {trials: true}", "s.yaml:1: search.trials: must be an integer, got true"),
    ("search: {strategy: tpe}", "s.yaml:1: search.strategy: must be one of 'guided', 'optuna', 'random', got 'tpe' (text)"),
    ("search: {concurrency: 0}", "s.yaml:1: search.concurrency: must be an integer >= 1 or auto, got 0"),
    ("search: {deterministic: no}", "s.yaml:1: search.deterministic: must be true or false, got 'no' (text)"),
    ("scheduler: asha", "s.yaml:1: scheduler: must be null or asha:"),
    ("scheduler: {hyperband: {}}", "s.yaml:1: scheduler: unknown key 'hyperband'; valid: asha"),
    ("scheduler:\n  asha: {max_t: 3}", "s.yaml:2: scheduler.asha: unknown key 'max_t'"),
    ("scheduler: {asha: {max_steps: 500}}", "s.yaml:1: scheduler.asha.max_steps: must be at most the trial's 200 steps, got 500"),
    ("scheduler: {asha: {max_steps: 9}}", "s.yaml:1: scheduler.asha.grace_steps: must be at most max_steps (9), got 25"),
    ("scheduler: {asha: {reduction_factor: 1}}", "s.yaml:1: scheduler.asha.reduction_factor: must be > 1, got 1"),
    ("guards: null", "s.yaml:1: guards: must be a mapping, got nothing (null); `norm_ratio: null` in it switches one off"),
    ("guards: {norm_rato: {}}", "s.yaml:1: guards: unknown key 'norm_rato'; did you mean 'norm_ratio'?"),
    ("guards:\n  norm_ratio: {limit: 0.5}", "s.yaml:2: guards.norm_ratio.limit: must be a finite number above 1, got 0.5"),
    ("guards:\n  norm_ratio: {limit: high}", "s.yaml:2: guards.norm_ratio.limit: must be a number, got 'high' (text)"),
    ("guards:\n  norm_ratio: {windw: 3}", "s.yaml:2: guards.norm_ratio: unknown key 'windw'; did you mean 'window'?"),
    ("guards:\n  norm_ratio: {clipped: true}", "s.yaml:2: guards.norm_ratio: unknown key 'clipped'"),
    ("guards:\n  norm_ratio: {on_excess: kill}", "s.yaml:2: guards.norm_ratio.on_excess: must be one of 'auto', 'prune'"),
    ("guards:\n  smoke_test:\n    at:\n      - 0\n      - x", "s.yaml:5: guards.smoke_test.at.1: must be an integer, got 'x' (text)"),
    ("guards: {smoke_test: {at: 3}}", "s.yaml:1: guards.smoke_test.at: must be a list, got 3"),
    ("guards: {smoke_test: {at: [-1]}}", "s.yaml:1: guards.smoke_test.at: must list steps >= 0, got [-1]"),
    ("guards: {non_finite: true}", "s.yaml:1: guards.non_finite: must be a mapping, got true"),
    ("guards: {threshold: {metric: loss}}", "s.yaml:1: guards.threshold: must be a list"),
    ("guards: {threshold: [{upper: 1}]}", "s.yaml:1: guards.threshold.0: metric is missing"),
    ("guards: {threshold: [{metric: a, lower: 2, upper: 1}]}", "s.yaml:1: guards.threshold.0.lower: must be below upper (1.0), got 2.0"),
    ("guards: {threshold: [{metric: a}, {metric: a}]}", "s.yaml:1: guards.threshold.1: there is a threshold for 'a' already"),
    ("objective: {maximise: psnr}", "s.yaml:1: objective: unknown key 'maximise'; did you mean 'maximize'?"),
    ("objective: {maximize: ''}", "s.yaml:1: objective.maximize: must not be empty"),
    ("objective: {keep: [psnr]}", "s.yaml:1: objective.keep: must be a mapping, got ['psnr'] (a list)"),
    ("objective:\n  keep:\n    psnr: -0.3", "s.yaml:3: objective.keep.psnr: must be a mapping, got -0.3"),
    ("objective: {keep: {psnr: {}}}", "s.yaml:1: objective.keep.psnr: must have exactly one of min_delta, max_delta"),
    ("objective: {keep: {psnr: {min_delta: 1, max_ratio: 2}}}", "got min_delta, max_ratio"),
    ("objective: {keep: {psnr: {min_dleta: 1}}}", "s.yaml:1: objective.keep.psnr: unknown key 'min_dleta'; did you mean 'min_delta'?"),
    ("objective: {keep: {psnr: {max_ratio: 0}}}", "s.yaml:1: objective.keep.psnr.max_ratio: must be a finite number > 0, got 0"),
    ("resources: {cpus: 0}", "s.yaml:1: resources.cpus: must be > 0, got 0"),
    ("resources: {gpus: many}", "s.yaml:1: resources.gpus: must be a number >= 0 or auto, got 'many' (text)"),
    ("report_every: 0", "s.yaml:1: report_every: must be an integer >= 1, got 0"),
    ("result_every: yes", "s.yaml:1: result_every: must be an integer >= 1 or null, got 'yes' (text)"),
    ("checkpoint_every: null", "s.yaml:1: checkpoint_every: must be an integer >= 1, got nothing (null)"),
    ("tracking: {url: x}", "s.yaml:1: tracking: unknown key 'url'; did you mean 'uri'?"),
    ("tracking: mlruns", "s.yaml:1: tracking: must be a mapping, got 'mlruns' (text)"),
]  # fmt: skip


DOUBTFUL = [
    ("objective:\n  keep: {psrn: {min_delta: -0.1}}", "s.yaml:2: objective.keep.psrn: may be misspelt; did you mean 'psnr'?"),
    ("objective: {maximize: score, keep: {scroe: {min_delta: 0}}}", "s.yaml:1: objective.keep.scroe: may be misspelt; did you mean 'score'?"),
    ("task_config: {steps: 30}\nspace:\n  parameters:\n    ssim_loss_weight: {linear: {start: 1, end: {uniform: [1, 2]}, steps: 31}}",
     "s.yaml:4: ssim_loss_weight.linear.steps: 31 is more than the trial's 30 steps: the schedule does not reach its end"),
    ("task_config: {steps: 30}\nspace:\n  parameters:\n    ssim_loss_weight: {warm_up: {value: 1, steps: {choice: [9, 60]}}}",
     "s.yaml:4: ssim_loss_weight.warm_up.steps: 60 is more than the trial's 30 steps: the schedule does not reach its end"),
    ("task_config:\n  steps: 30\n  ssim_loss_weight: {warm_up: {value: 1, steps: 31}}\nspace: {parameters: {ssim_loss_max_t: {uniform: [0.1, 1]}}}",
     "s.yaml:3: ssim_loss_weight.warm_up.steps: 31 is more than the trial's 30 steps: the schedule does not reach its end"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), DOUBTFUL)
def test_what_is_doubtful_is_a_warning(written: Any, text: str, says: str) -> None:
    (warning,) = load_study(written(text)).warnings
    assert says in warning


@pytest.mark.parametrize(
    "text",
    [
        "objective: {keep: {ms_ssim: {min_delta: 0}, flow_loss: {max_ratio: 2}, flow_loss_bins/0: {max_ratio: 2}, lpips: {max_delta: 0}}}",
        "task_config: {steps: 30}\nspace: {parameters: {ssim_loss_weight: {warm_up: {value: {uniform: [1, 2]}, steps: 30}}}}",
    ],
)
def test_what_is_usual_is_no_warning(written: Any, text: str) -> None:
    assert load_study(written(text)).warnings == ()


BAD_CALIBRATION = [
    ("search: {skip_beyond: 0}", "s.yaml:1: search.skip_beyond: must be > 0, got 0"),
    ("search: {skip_beyond: .inf}", "s.yaml:1: search.skip_beyond: must be a finite number"),
    ("calibration: {batches: 0}", "s.yaml:1: calibration.batches: must be >= 1, got 0"),
    ("calibration: {grid: [0.1, 0.1]}", "s.yaml:1: calibration.grid: must be different values of max_t above 0 and at most 1, got"),
    ("calibration: {grid: [0, 0.1]}", "s.yaml:1: calibration.grid: must be different values of max_t"),
    ("calibration: {grid: []}", "s.yaml:1: calibration.grid: must not be empty, got [] (a list)"),
    ("calibration: {grid: 0.1}", "s.yaml:1: calibration.grid: must be a list, got 0.1"),
    (
        "calibration: {method: exact}",
        "s.yaml:1: calibration.method: must be one of 'auto', 'gram', 'readings', 'first_step', got 'exact'",
    ),
    ("calibration: {disable_update: 0}", "s.yaml:1: calibration.disable_update: must be a mapping, got 0"),
    ("calibration: {batch: 3}", "s.yaml:1: calibration: unknown key 'batch'; did you mean 'batches'?"),
    ("calibration: 3", "s.yaml:1: calibration: must be a mapping, got 3"),
]


@pytest.mark.parametrize(("text", "says"), BAD + BAD_CALIBRATION)
def test_a_mistake_is_one_line_that_says_where(written: Any, tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(UserError) as error:
        load_study(written(text))
    message = str(error.value).replace(f"{tmp_path}/", "")
    assert says in message, message
    assert "\n" not in message.replace("\n… and", "") or len(message.splitlines()) < 4


@pytest.mark.parametrize(
    ("study", "says"),
    [
        ("nowhere.yaml", "nowhere.yaml: no such file"),
        ("fundus_ssm", "unknown study 'fundus_ssm'; did you mean 'fundus_ssim'?"),
        (
            "zzz",
            "unknown study 'zzz'; valid: flow_dino_kl, fundus_adamw_clip, fundus_adamw_hot, fundus_ssim, two_stage_vlm, vae_kl",
        ),
        ("/", "/: is a folder, not a file"),
        ("", "unknown study ''"),
        ("x\0.yaml", "cannot be read"),
    ],
)
def test_a_study_that_is_not_there(study: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        load_study(study)
    assert says in str(error.value)


def test_a_mistake_in_the_spaces_own_file_names_that_file(written: Any) -> None:
    written("name: near\nparameters:\n  gain: {uniform: [2, 1]}\n", "near.yaml")
    with pytest.raises(UserError, match=r"near\.yaml:3: gain: lower \(2\) must be below upper \(1\)"):
        load_study(written("space: near.yaml\n"))


def test_all_mistakes_of_a_file_come_at_once_in_its_order(written: Any, tmp_path: Path) -> None:
    text = "search: {trials: 0}\nspace:\n  parameters: {gain: {uniform: [2, 1]}}\nreport_every: 0\nfoo: 1\n"
    with pytest.raises(UserError) as error:
        load_study(written(text))
    assert [line.split(": ")[0] for line in str(error.value).replace(f"{tmp_path}/", "").splitlines()] == [
        "s.yaml:1", "s.yaml:3", "s.yaml:4", "s.yaml:5",
    ]  # fmt: skip


@settings(max_examples=60, **QUICK)
@given(data=st.data())
def test_a_mutilated_study_is_a_study_or_a_user_error(written: Any, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([*_texts(), *[text for text, _ in BAD if isinstance(text, str)]]))
    pieces = [
        "",
        ":",
        "\n",
        "- ",
        "{",
        "}",
        "[",
        "]",
        "~",
        "1e999",
        "-1",
        "'",
        "&a ",
        "*a",
        "? ",
        "!",
        "\t",
        "true",
        "#",
    ]
    for _ in range(data.draw(st.integers(1, 4))):
        start, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 12))
        text = text[:start] + data.draw(st.sampled_from(pieces) | st.text(max_size=3)) + text[start + length :]
    try:
        assert isinstance(load_study(written(text.encode("utf-8", "replace"))), Study)
    except UserError as error:
        assert str(error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["asha", "psnr", "at", "x"]), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, **QUICK)
@given(st.sampled_from([
    ("task",), ("name",), ("task_config",), ("task_config", "steps"), ("baseline",), ("baseline", "seeds"), ("space",), ("space", "stages"),
    ("space", "parameters"), ("space", "points"), ("space", "fixed"), ("search",), ("search", "concurrency"), ("search", "seed"),
    ("scheduler",), ("scheduler", "asha"), ("guards",), ("guards", "norm_ratio"), ("guards", "smoke_test", "at"), ("guards", "threshold"),
    ("objective",), ("objective", "keep"), ("objective", "keep", "psnr"), ("resources", "gpus"), ("tracking",), ("report_every",),
    ("import_path",),
]), VALUES)  # fmt: skip
def test_a_wrong_type_anywhere_is_a_user_error(place: tuple[str, ...], value: Any) -> None:
    document: Any = value
    for key in reversed(place):
        document = {key: document}
    try:
        assert isinstance(load_study(document), Study)
    except UserError as error:
        assert str(error)


def _texts(cache: list[str] = []) -> list[str]:  # noqa: B006  (made once)
    if not cache:
        cache.append((bundled_studies_folder() / "fundus_ssim.yaml").read_text(encoding="utf-8"))
        cache.append(load_study().to_yaml())
    return cache


@given(st.dictionaries(st.sampled_from(["a", "no", "1e-4", "", "~", "- x", "#", "a: b"]), VALUES, min_size=1, max_size=3))
@example({"a": [{"x": 1.0, "y": "\x85\U0009a235K"}], "no": "a b\u2028c \u2029 d"})
@settings(max_examples=60, **QUICK)
def test_what_is_dumped_is_read_back(value: dict[str, Any]) -> None:
    try:
        text = dump_yaml(value)
    except UnicodeEncodeError:
        return
    assert parse_yaml(text, "s.yaml").value == value


def test_reading_a_study_imports_nothing_heavy() -> None:
    code = "import sys, tune_ssim.study.study as s; s.load_study(); print([m for m in ('torch', 'ray', 'mlflow', 'optuna') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_relative_units_need_a_calibration(written: Any) -> None:
    """Nothing else turns the ratio into a gain. A command is calibrated too, with its updates held off from outside."""
    task = "task: {command: [x, '{ssim_loss_weight}', '{ssim_loss_max_t}', '{ssim_grad_scale}']}\nspace: moderate\n"
    with pytest.raises(UserError, match="gives its gain as a norm ratio, which needs it"):
        load_study(written(task + "calibration: null\n"))
    calibration = load_study(written(task)).calibration
    assert calibration is not None and calibration.disable_update == {}


def test_update_off_is_another_name_for_disable_update(written: Any) -> None:
    calibration = load_study(written("calibration: {update_off: {learning_rate: 0}}\n")).calibration
    assert calibration is not None and calibration.disable_update == {"learning_rate": 0}
    with pytest.raises(UserError, match=r"s.yaml:1: calibration: has both update_off and disable_update"):
        load_study(written("calibration: {update_off: {lr: 0}, disable_update: {lr: 0}}\n"))


def test_what_is_wrong_in_a_part_and_between_parts_comes_at_once(written: Any) -> None:
    with pytest.raises(UserError) as error:
        load_study(written("search: {trials: 0}\nconfirm: {steps: 5}\ntask: fundus_s\nresources: {nodes: 2}\nfoo: 1\n"))
    found = [line.split("s.yaml:")[1] for line in str(error.value).splitlines()]
    assert [line[:24] for line in found] == [
        "1: search.trials: must b", "2: confirm.steps: must b", "3: task: unknown task 'f", "5: unknown key 'foo'; va",
    ]  # fmt: skip


def test_a_copy_with_other_values_is_checked_too() -> None:
    study = load_study_once()
    assert study.replace(report_every=3).report_every == 3
    with pytest.raises(ValueError, match="report_every: must be an integer >= 1, got 0"):
        study.replace(report_every=0)
    with pytest.raises(ValueError, match=r"search\.trials: a space with 4 stages needs at least 4 trials, got 1"):
        study.replace(search=study.search.replace(trials=1))


def test_a_study_of_an_earlier_version_keeps_its_digest() -> None:
    """Resuming compares it. The digest is what version 0.1 printed for this file."""
    study = load_study(Path(__file__).parent / "old_studies" / "small" / "study.yaml")
    assert study.sha256 == "b3933d1f1247dc1295e6cb34f31a22b8caaa296a7655d595de9d9f96e7d5294e"
