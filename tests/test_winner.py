"""Which trial is exported, when none is, and whether a shell, argparse and YAML readers get the same numbers back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from small_studies import SETTING, USUAL, baseline, study, trial

from tune_ssim.base.errors import UserError
from tune_ssim.results.export import experiment_name, exported_config, format_export
from tune_ssim.results.proof import proof_of
from tune_ssim.results.verification import file_differences
from tune_ssim.results.winner import NoSafeTrial, best_safe


@pytest.mark.parametrize(
    ("trials", "winner"),
    [
        (USUAL, "00004"),
        # the baseline is safe and may be the best; it is not a setting of the search
        ((trial("a", delta_ssim=0.0011), trial("b", delta_ssim=0.9, role="baseline")), "a"),
        # confirmed under two further seeds, and a better one that was not
        ((trial("a", delta_ssim=0.9), trial("b", delta_ssim=0.1, config={"ssim_loss_weight": 3}),
          *(trial(f"c{seed}", role="confirm", config={"ssim_loss_weight": 3}) for seed in (2, 3))), "b"),
        # every verdict but safe, however good its number
        ([trial(v, v, 0.9) for v in ("degraded", "pruned", "bad_setup", "stopped", "error")]
         + [trial("a", delta_ssim=0.002, config={"ssim_loss_weight": 1.0})], "a"),
        # no number, or none that is finite
        ((trial("a", delta_ssim="NaN"), trial("b", delta_ssim="Infinity"), trial("c", metrics={}),
          trial("d", delta_ssim=None), trial("e", delta_ssim=0.1)), "e"),
        # a setting that was ruined under another seed, or by another name of the same gain
        ((trial("a", delta_ssim=0.9), trial("b", "pruned", "NaN"),
          trial("c", delta_ssim=0.1, config={"ssim_loss_weight": 3})), "c"),
        ((trial("a", delta_ssim=0.9), trial("b", "pruned", "NaN", role="confirm"),
          trial("c", delta_ssim=0.1, config={"ssim_loss_weight": 3}),
          *(trial(f"d{seed}", role="confirm", config={"ssim_loss_weight": 30, "ssim_grad_scale": 0.1}) for seed in (2, 3))), "c"),
        ((trial("a", delta_ssim=0.9), trial("b", "degraded", config={"ssim_loss_weight": 300, "ssim_grad_scale": 0.1}),
          trial("c", delta_ssim=0.1, config={"ssim_loss_weight": 3})), "c"),
        # an error of the machine says nothing about the setting
        ((trial("a", delta_ssim=0.9), trial("b", "error", "NaN")), "a"),
        # equals: the earlier
        ((trial("a"), trial("b", config={"ssim_loss_weight": 3})), "a"),
    ],
)  # fmt: skip
def test_best_safe(tmp_path: Path, trials: Any, winner: str) -> None:
    assert best_safe(trials).trial_id == winner
    assert best_safe(study(tmp_path, *trials)).trial_id == winner


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ((), "no trial of the search has ended"),
        ((baseline(),), "no trial of the search has ended"),
        (
            (baseline(), trial("a", "pruned", "NaN"), trial("b", "pruned", "NaN"), trial("c", "degraded", 0.01)),
            "2 pruned, 1 degraded; nearest miss c (degraded): PSNR is 3.1 dB below",
        ),
        ((trial("a", "pruned", "NaN", steps=3), trial("b", "pruned", "NaN", steps=9)), "nearest miss b"),
        ((trial("a", delta_ssim="NaN"),), "1 safe; the safe ones have no finite delta_ssim"),
        (
            (trial("a", delta_ssim=-0.001), trial("b", delta_ssim=-0.2, config={"lr": 1})),
            "no setting beats the baseline by more than 0.001: the best of 2",
        ),
        ((trial("a", delta_ssim=0.0),), "no setting beats the baseline"),
        ((trial("a", delta_ssim=0.0009),), "no setting beats the baseline by more than 0.001"),
        (
            (trial("a"), trial("b", role="confirm"), trial("c", "pruned", "NaN", role="confirm", seed=3)),
            "no finalist held in the confirm phase: a with seed 3 is pruned: total_norm is 32",
        ),
        (
            (trial("a"), trial("b", role="confirm", delta_ssim=-0.02), trial("c", role="confirm", delta_ssim=0.01)),
            "a has delta_ssim -0.005 [-0.1956, +0.1856] over 2 seeds, which does not beat the baseline by more than 0.001",
        ),
        ((trial("a"), trial("b", role="confirm")), "a has delta_ssim +0.005 with one seed, which shows nothing"),
    ],
)
def test_nothing_to_export(trials: Any, said: str) -> None:
    with pytest.raises(NoSafeTrial) as caught:
        best_safe(trials)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("confirmed", "said"),
    [
        ((), "it was not confirmed with further seeds"),
        ((0.01, -0.02), "tried with 2 new seeds and not confirmed: delta_ssim -0.005 [-0.1956, +0.1856]"),
        ((0.01,), "tried with 1 new seed and not confirmed: delta_ssim +0.01"),
        (("pruned",), "tried with 1 new seed and not confirmed: with seed 3 it is pruned: total_norm is 32"),
    ],
)
def test_why_a_setting_is_unproven(tmp_path: Path, confirmed: tuple[Any, ...], said: str) -> None:
    trials = [
        trial(f"c{index}", "pruned", "NaN", role="confirm", seed=3)
        if delta == "pruned"
        else trial(f"c{index}", delta_ssim=delta, role="confirm")
        for index, delta in enumerate(confirmed)
    ]
    folder = study(tmp_path, baseline(), trial("a"), *trials)
    assert proof_of(trial("a"), folder)["unproven"][0].startswith(said)


def test_the_study_says_what_is_maximised(tmp_path: Path) -> None:
    trials = (
        trial("a", metrics={"delta_ssim": 0.1, "psnr": 30.0}),
        trial("b", metrics={"delta_ssim": 0.2, "psnr": 20.0}, config={"ssim_loss_weight": 3}),
    )
    assert best_safe(study(tmp_path, *trials)).trial_id == "b"
    by_psnr = study(tmp_path, *trials, name="psnr", yaml="objective: {maximize: psnr}\n")
    assert best_safe(by_psnr).trial_id == "a"
    assert best_safe(str(by_psnr.path)).trial_id == "a"
    for foreign in ("", "objective: [\n", "objective: psnr\n", "- 1\n", "\0"):
        with pytest.raises(UserError, match=r"foreign/study\.yaml"):
            best_safe(study(tmp_path, *trials, name="foreign", yaml=foreign))


def test_exported_config(tmp_path: Path) -> None:
    folder = study(tmp_path, *USUAL)
    exported = exported_config(best_safe(folder), folder)
    assert exported["config"] == SETTING
    assert exported["gain"] == 30.0
    assert exported["proof"]["confirmed"] is False and len(exported["proof"]["unproven"]) == 2
    assert [entry["trial_id"] for entry in exported["baseline"]] == ["baseline-0", "baseline-1"]
    json.dumps(exported, allow_nan=False)

    for seed in (2, 3):
        folder.add_trial(trial(f"confirm-{seed}", role="confirm", seed=seed, delta_ssim=0.001 * seed))
    (folder.path / "provenance.json").write_text('{"code/a.py": "0123"}')
    proof = exported_config(best_safe(folder), folder)["proof"]
    assert proof["confirmed"] is True and proof["unproven"] == []
    assert proof["comparison"]["delta_ssim"]["by_seed"] == {"2": 0.002, "3": 0.003}
    assert proof["provenance"] == {"code/a.py": "0123"} and proof["setting"] == exported["config"]


ADAPTIVE = {"ssim_loss_weight": {"adaptive": {"target_ratio": 1.5}}}


def test_a_schedule_is_exported_confirmed_and_sealed(tmp_path: Path) -> None:
    one, other = trial("a", config=ADAPTIVE), trial("b", config={"ssim_loss_weight": {"adaptive": {"target_ratio": 2.0}}})
    confirmed = [trial(f"confirm-{seed}", role="confirm", seed=seed, delta_ssim=0.3, config=ADAPTIVE) for seed in (2, 3)]
    folder = study(tmp_path, baseline(), one, other, *confirmed)
    exported = exported_config(best_safe(folder), folder)
    assert exported["trial_id"] == "a" and exported["gain"] is None and exported["config"] == {**SETTING, **ADAPTIVE}
    edited = json.loads(json.dumps(exported))
    edited["config"]["ssim_loss_weight"]["adaptive"]["target_ratio"] = 3.0
    assert file_differences(exported) == [] and "ssim_loss_weight" in file_differences(edited)[0]
    (text,) = sourced(format_export(exported, "env"), ["SSIM_LOSS_WEIGHT"])
    assert json.loads(text) == ADAPTIVE["ssim_loss_weight"]


def test_settings_are_what_a_script_must_be_given() -> None:
    config = {"lr": 1e-3, "gain": 30.0, "seed": 4, "pixel_loss_weight": 0}
    assert list(trial("a", config=config).settings) == [*SETTING, "lr", "pixel_loss_weight"]


def test_experiment_names_differ_where_a_checkpoint_must_not_be_shared() -> None:
    one = trial("00004")
    names = {
        experiment_name(summary, name)
        for summary, name in [
            (one, "s"),
            (one, "s2"),
            (trial("00005"), "s"),
            (trial("00004", config={"ssim_loss_weight": 30.000001}), "s"),
            (trial("00004", config={"lr": 1e-3}), "s"),
            (trial("00004", horizon={"steps": 200, "batch_size": 8, "lr": 0.001}), "s"),
        ]
    }
    assert len(names) == 6
    assert experiment_name(one, "s") == experiment_name(trial("00004", delta_ssim=0.3), "s")
    assert experiment_name(one, "-$(touch x) ü/../y\n").startswith("touch-x-..-y--00004-")


HOSTILE = ["", " ", "a b", "$(exit 9)", "`x`", "'", '"', "\\", "a;b", "*", "-x", "--y", "ü≥", "a\nb", "#c", "~", "!"]
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


def exported_with(**config: Any) -> dict[str, Any]:
    return {"exp_name": config.pop("exp_name", "s-00004-1234abcd"), "config": {**SETTING, **config}}


def sourced(text: str, names: list[str]) -> list[str]:
    """What a real /bin/sh has in the variables after sourcing the lines."""
    script = '. ./lines.env\nfor name in "$@"; do eval "printf \'%s\\\\0\' \\"\\$$name\\""; done'
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lines.env").write_text(text, encoding="utf-8")
        done = subprocess.run(["/bin/sh", "-euc", script, "sh", *names], cwd=folder, capture_output=True, check=True, timeout=30)
    assert done.stderr == b""
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("word", HOSTILE)
def test_env_lines_survive_a_shell(word: str) -> None:
    text = format_export(exported_with(exp_name=word, optimizer=word, lr=1e-05, nesterov=True, clip=None), "env")
    names = ["SSIM_LOSS_WEIGHT", "SSIM_LOSS_MAX_T", "SSIM_GRAD_SCALE", "LR", "NESTEROV", "OPTIMIZER", "EXP_NAME"]
    assert sourced(text, names) == ["30.0", "0.3", "1.0", "1e-05", "true", word, word]


@settings(max_examples=15, deadline=None)
@given(NUMBERS, NUMBERS)
@example(1e-4, 0.1 + 0.2)
@example(5e-324, 1.7976931348623157e308)
def test_numbers_come_back_exactly(weight: float, max_t: float) -> None:
    exported = exported_with(ssim_loss_weight=weight, ssim_loss_max_t=max_t)
    assert json.loads(format_export(exported, "json"))["config"]["ssim_loss_weight"] == weight
    read = sourced(format_export(exported, "env"), ["SSIM_LOSS_WEIGHT", "SSIM_LOSS_MAX_T"])
    assert [float(text) for text in read] == [weight, max_t]


@given(NUMBERS)
@example(1e-05)
@example(1e22)
def test_both_yaml_versions_read_the_number(value: float) -> None:
    text = format_export(exported_with(ssim_loss_weight=value, note="no"), "yaml")
    for version in ("1.1", "1.2"):
        yaml = YAML(typ="safe", pure=True)
        yaml.version = version
        config = yaml.load(text)["config"]
        assert config["ssim_loss_weight"] == value, version
        assert isinstance(config["ssim_loss_weight"], float), version
        assert config["note"] == "no", version


SCRIPT = """
import argparse, json, sys
parser = argparse.ArgumentParser()
for name in ("ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale", "lr", "momentum"):
    parser.add_argument("--" + name, type=float, required=True)
parser.add_argument("--optimizer")
parser.add_argument("--clip", type=float)
print(json.dumps(vars(parser.parse_args())))
"""


@pytest.mark.parametrize("word", HOSTILE)
def test_args_reach_argparse_through_a_shell(tmp_path: Path, word: str) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    text = format_export(exported_with(lr=1e-05, momentum=-1e-05, optimizer=word, clip=None), "args")
    assert text.endswith("\n")
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} train.py {text}"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
        timeout=30,
    )
    assert json.loads(done.stdout) == {**SETTING, "lr": 1e-05, "momentum": -1e-05, "optimizer": word, "clip": None}


@pytest.mark.parametrize(
    ("config", "form", "said"),
    [
        ({"path": "x"}, "env", "'path' cannot be a shell variable"),
        ({"ld_preload": "x"}, "env", "'ld_preload' cannot"),
        ({"a b": 1}, "env", "'a b' cannot"),
        ({"x; rm": 1}, "env", "cannot be a shell variable"),
        ({"lr": 1, "LR": 2}, "env", "LR is taken"),
        ({"exp_name_": 1, "EXP_NAME": 1}, "env", "EXP_NAME is taken"),
        ({"betas": [0.9, 0.99]}, "args", "'betas' is a list"),
        ({"betas": [0.9, 0.99]}, "env", "'betas' is a list"),
        ({"x": "a\0b"}, "args", "NUL"),
        ({}, "toml", "'toml' is not one of yaml, json, env, args"),
    ],
)
def test_what_a_form_cannot_carry(config: dict[str, Any], form: str, said: str) -> None:
    exported = {"exp_name": "s", "config": {**SETTING, **config}}
    with pytest.raises(UserError, match=said):
        format_export(exported, form)
