"""Which files the proof of a command covers, and that a change of each is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_studies import ARGUMENTS, DESCENT, LOSS, run, study

from tune_ssim.base.errors import UserError
from tune_ssim.orchestration.verification import verify
from tune_ssim.results.export import exported_config, format_export
from tune_ssim.results.proof import proof_of
from tune_ssim.results.verification import read_export
from tune_ssim.results.winner import best_safe
from tune_ssim.study.command_spec import CommandSpec
from tune_ssim.trials.command.dependencies import Dependencies

FILES = {
    "train.py": "import os, torch, helpers\nfrom models.unet import Unet\nimport lib",
    "helpers.py": "import numpy",
    "models/__init__.py": "",
    "models/unet.py": "from . import blocks\nfrom ..outside import no",
    "models/blocks.py": "import helpers, models.attention",
    "models/attention.py": "this is no Python",
    "unused.py": "",
    "path/lib.py": "",
    "run.sh": "#!/bin/bash\nexec python train.py $*",
    "base.yaml": "a: 1",
    "start.pt": "weights",
    "images/0.png": "x",
}
CODE = ["helpers.py", "models/__init__.py", "models/attention.py", "models/blocks.py", "models/unet.py", "path/lib.py", "train.py"]
PATH = {"environment": {"PYTHONPATH": "path"}}


def of(folder: Path, *words: str, **more: Any) -> Dependencies:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    spec = CommandSpec.model_validate({"command": list(words), **PATH, **more})
    return Dependencies(spec, {"lr": 0.1, "config": "base.yaml"}, str(folder))


@pytest.mark.parametrize(
    ("words", "more", "found"),
    [
        (["{python}", "train.py", "--lr={lr}"], {}, [*CODE]),
        (["torchrun", "--nproc-per-node=2", "train.py"], {}, [*CODE]),
        (["bash", "run.sh"], {}, [*CODE, "run.sh"]),
        (["./run.sh"], {}, [*CODE, "run.sh"]),
        (["{python}", "-m", "models.blocks"], {}, [name for name in CODE if name.startswith(("models", "helpers"))][:4]),
        (["{python}", "-m", "tune_ssim.trials.command.call_function", "helpers:main"], {}, ["helpers.py"]),
        (["{python}", "helpers.py"], {"smoke": {"command": ["{python}", "path/lib.py"]}}, ["helpers.py", "path/lib.py"]),
        (["some_program", "--lr={lr}"], {}, []),
    ],
)
def test_the_code_of_a_command(tmp_path: Path, words: list[str], more: dict[str, Any], found: list[str]) -> None:
    files = of(tmp_path, *words, **more).files
    assert sorted(name.removeprefix("code/") for name in files if name.startswith("code/")) == sorted(found)


def test_other_files_of_a_command(tmp_path: Path) -> None:
    found = of(tmp_path, "{python}", "helpers.py", "--from=start.pt", "images", "--out={exp_dir}", weights=["start.pt"])
    assert sorted(found.files) == ["code/helpers.py", "settings/base.yaml", "weights/start.pt"]
    assert found.not_covered == [
        "files that the program opens by itself, and modules that it imports by a name made at run time",
        "installed packages: numpy",
        "folders among its arguments: images (`task: {data: [FOLDER]}` covers one)",
        "its data, since the study does not name them (`task: {data: [FILE]}`)",
    ]
    found = of(tmp_path, "{python}", "helpers.py", "images", weights=["start.pt"], data=["images"])
    assert len(found.not_covered) == 2 and "data/images" in found.files
    before = found.hashes()
    (tmp_path / "images" / "1.png").write_text("x")
    assert {name for name, digest in found.hashes().items() if before[name] != digest} == {"data/images"}
    with pytest.raises(UserError, match=r"task: data: .*/videos: no such file or folder"):
        of(tmp_path, "{python}", "helpers.py", data=["videos"])


HELPED = """
from noise import START
import importlib, json
exec("OPTIONS = json.load(open('opened.json'))")
importlib.import_module("".join(["plug", "in"]))
json.dump({}, open("state.json", "w"))
""" + DESCENT.replace("w = random.Random(seed), 5.0", "w = random.Random(seed), START").replace(
    '"score": -', '"score": draw.random() / 100 - '
)


def test_verify_names_the_file_that_has_changed(tmp_path: Path) -> None:
    (tmp_path / "noise.py").write_text("START = 5.0")
    given = study(
        tmp_path,
        HELPED,
        (*ARGUMENTS, "--config=base.yaml"),
        task={"records": {"pattern": LOSS}, "data": ["data"]},
        objective={"maximize": "delta_score"},
        confirm={"seeds": 8, "steps": 30},
    )
    for name in ("base.yaml", "opened.json", "plugin.py"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "data").mkdir()
    folder = run(given, tmp_path / "results")
    (tmp_path / "best.yaml").write_text(format_export(exported_config(best_safe(folder), folder), "yaml"))
    exported = read_export(tmp_path / "best.yaml")
    assert [phrase.split()[0] for phrase in exported["proof"]["not_covered"]] == ["data", "its"]
    assert verify(exported, in_process=True)[0] == []
    named = {"noise.py": "code", "base.yaml": "settings", "train.py": "code", "data/new": "data"}
    seen = {"plugin.py": "code", "opened.json": "settings"}  # by the observer alone
    for name, what in (seen | named).items():
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b""
        (tmp_path / name).write_bytes(before + b"# changed")
        found, trials = verify(json.loads(json.dumps(exported)), in_process=True)
        assert [line.split(" has changed")[0] for line in found] == [f"{what}/{name}".removesuffix("/new")] and trials == []
        (tmp_path / name).write_bytes(before)
    folder.add_files_seen("baseline-0", {"code/plugin.py": "0"})
    assert proof_of(best_safe(folder), folder)["unproven"] == ["code/plugin.py was changed while the study ran"]
