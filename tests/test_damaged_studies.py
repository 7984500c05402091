"""Folders that hold something else than what a run writes: one line names the file, and nothing is claimed as proven."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_studies import USUAL, study, trial
from test_cli import mistake, tune_ssim

from tune_ssim.base.errors import UserError
from tune_ssim.base.files import append_line
from tune_ssim.results.events import EventWriter
from tune_ssim.results.export import exported_config
from tune_ssim.results.proof import digest, require_unchanged
from tune_ssim.results.study_folder import Skipped, StudyFolder
from tune_ssim.results.winner import NoSafeTrial, best_safe

CONFIRMED = (*USUAL, *(trial(f"confirm-{seed}", delta_ssim=seed / 500, role="confirm", seed=seed) for seed in (2, 3)))
GARBAGE = (b"plain words\n", b"\x89PNG\r\n\x1a\n\0", b"[1, 2]\n", b"3\n", b'{"a": 1}\n', b'{"a": 1}{"b": 2}\n')


def proven(storage: Path) -> StudyFolder:
    folder = study(storage, *CONFIRMED)
    (folder.path / "provenance.json").write_text('{"code/a.py": "0123"}')
    assert exported_config(best_safe(folder), folder)["proof"]["unproven"] == []
    return folder


def test_a_calibration_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    """It decides which settings are tried, and it is in the proof. Another layout of the same numbers is no change."""
    folder = proven(tmp_path)
    calibration = {"model": {"alpha": 0.5}, "settings": [{"gain": 1.0, "norm_ratio": "NaN"}]}
    EventWriter(folder).file("calibration.json", "before_launch", digest(calibration))
    file = folder.path / "calibration.json"
    file.write_text(json.dumps(calibration, indent=1))
    require_unchanged(folder)
    file.write_text(json.dumps(calibration).replace("0.5", "0.6"))
    for refused in (lambda: require_unchanged(folder), lambda: exported_config(best_safe(folder), folder)):
        with pytest.raises(UserError, match=r"calibration\.json: was changed .*, or its digest in events\.jsonl was; put back"):
            refused()
    file.unlink()
    with pytest.raises(UserError, match=r"calibration\.json: is missing"):
        require_unchanged(folder)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_foreign_line_among_the_trials(tmp_path: Path, garbage: bytes) -> None:
    folder = proven(tmp_path)
    lines = folder.trials_file.read_bytes().splitlines(keepends=True)
    folder.trials_file.write_bytes(b"".join([*lines[:3], garbage, *lines[3:]]))
    with pytest.raises(UserError, match=r"fundus-ssim/trials\.jsonl:4: "):
        folder.trials()


@pytest.mark.parametrize("arguments", [["trials"], ["trials", "--json"], ["export"]])
def test_the_command_line_names_the_line(tmp_path: Path, arguments: list[str]) -> None:
    folder = proven(tmp_path)
    folder.trials_file.write_bytes(b"plain words\n" + folder.trials_file.read_bytes())
    mistake(tune_ssim(*arguments, cwd=tmp_path), "fundus-ssim/trials.jsonl:1: not JSON")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"verdict": "great"},
            "verdict: must be one of 'safe', 'degraded', 'stopped', 'pruned', 'bad_setup', 'error', got 'great'",
        ),
        ({"verdict": None}, "verdict: must be one of 'safe', 'degraded', 'stopped', 'pruned', 'bad_setup', 'error', got nothing"),
        ({"role": "king"}, "role: must be one of 'baseline', 'search', 'confirm', got 'king'"),
        ({"config": [1]}, "config: must be a mapping, got [1]"),
        ({"config": {"ssim_loss_weight": "much"}}, "config.ssim_loss_weight: must be a number, got 'much'"),
        ({"metrics": {"delta_ssim": "much"}}, "metrics.delta_ssim: must be a number, got 'much'"),
        ({"metrics": {"delta_ssim": 10**400}}, "metrics.delta_ssim: must be a number"),
        ({"steps": "200"}, "steps: must be an integer, got '200'"),
        ({"seed": True}, "seed: must be an integer"),
        ({"trial_id": 7}, "trial_id: must be text, got 7"),
    ],
)
def test_a_trial_with_a_foreign_value(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = proven(tmp_path)
    with folder.trials_file.open("a") as file:
        file.write(json.dumps(trial("00009").to_dict() | change) + "\n")
    with pytest.raises(UserError) as said:
        folder.trials()
    assert f"trials.jsonl:{len(CONFIRMED) + 1}: {words}" in str(said.value)


def test_what_a_killed_writer_leaves_is_passed_over(tmp_path: Path) -> None:
    folder = proven(tmp_path)
    whole = folder.trials_file.read_bytes()
    folder.trials_file.write_bytes(whole + whole.splitlines()[0][:100])
    assert [one.to_dict() for one in folder.trials()] == [one.to_dict() for one in CONFIRMED]
    assert folder.add_trial(trial("later"))
    assert [one.trial_id for one in folder.trials()] == [*(one.trial_id for one in CONFIRMED), "later"]


@pytest.mark.parametrize("garbage", [*GARBAGE, b"", b"[", b"a: [\n", b"x: &a [*a]\n", b"objective: psnr\n", b"guards: [1]\n"])
def test_a_foreign_study_file(tmp_path: Path, garbage: bytes) -> None:
    folder = proven(tmp_path)
    folder.study_file.write_bytes(garbage)
    if garbage == b'{"a": 1}\n':  # YAML, of a study without an objective
        assert best_safe(folder)
    else:
        with pytest.raises(UserError, match=r"fundus-ssim/study\.yaml"):
            exported_config(best_safe(folder), folder)


@pytest.mark.parametrize("name", ["provenance.json", "preflight.json", "calibration.json"])
@pytest.mark.parametrize("garbage", [*GARBAGE[:5], b"", b'{\n "a": 1,\n b}', b'{"a": 1'])
def test_a_foreign_file_of_the_proof(tmp_path: Path, name: str, garbage: bytes) -> None:
    folder = proven(tmp_path)
    (folder.path / name).write_bytes(garbage)
    with pytest.raises(UserError, match=rf"fundus-ssim/{name}"):
        exported_config(best_safe(folder), folder)


def test_the_line_of_a_syntax_error_is_named(tmp_path: Path) -> None:
    folder = proven(tmp_path)
    (folder.path / "preflight.json").write_text('{\n "status": "ok",\n "checks": [}\n')
    mistake(tune_ssim("export", cwd=tmp_path), "fundus-ssim/preflight.json:3: not JSON")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("trial_id", "verdict", "role", "config", "metrics", "seed", "steps", "evidence", "horizon", "reason", "objective")
KEYS += ("stage", "predicted_ratio", "sentence", "step", "contents", "parents", "hashes", "distinctive", "path", "checks", "model")
WORDS = st.sampled_from(["t", "safe", "pruned", "baseline", "confirm", "NaN", "", "ssim_loss_weight"])
OBJECTS = st.dictionaries(
    st.sampled_from(KEYS),
    WORDS | VALUES | st.dictionaries(WORDS, VALUES | st.lists(VALUES, max_size=2), max_size=3)
    | st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES | st.dictionaries(WORDS, VALUES), max_size=3), max_size=2),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(OBJECTS, max_size=4), st.data())
def test_no_trial_that_can_be_read_breaks_what_is_made_of_it(
    tmp_path_factory: pytest.TempPathFactory, changes: list[dict[str, Any]], data: st.DataObject
) -> None:
    folder = study(tmp_path_factory.mktemp("any"))
    for index, change in enumerate(changes):
        base = data.draw(st.sampled_from(CONFIRMED)).to_dict() | {"trial_id": str(index)}
        with folder.trials_file.open("a") as file:
            file.write(json.dumps(base | change) + "\n")
    try:
        exported_config(best_safe(folder), folder)
    except NoSafeTrial:
        pass
    except UserError as error:
        assert str(error).startswith(str(folder.trials_file))


def test_what_was_not_launched_comes_back(tmp_path: Path) -> None:
    folder = study(tmp_path)
    one = Skipped("wide", {"gain": 3000.0}, 25.5, "it would push too hard")
    append_line(folder.skipped_file, asdict(one))
    append_line(folder.skipped_file, asdict(one))  # a search that is resumed repeats it
    assert folder.skipped() == [one]
