"""The recipes in `examples/`: the scripts run, their logs are read, their flags do what the READMEs say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tune_ssim.sources import LineParser
from tune_ssim.study import load_study

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def run(folder: Path, *words: object) -> str:
    """Both streams merged, as a launcher merges them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def bagel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as its README leaves it: prepared and patched."""
    folder = tmp_path_factory.mktemp("examples") / "bagel_style"
    shutil.copytree(EXAMPLES / "bagel_style", folder, ignore=shutil.ignore_patterns("data", "results", "__pycache__"))
    run(folder, "prepare.py", "--out", "data", "--language_steps", 5)
    patched = apply((folder / "train.py").read_text(), (folder / "total_norm.diff").read_text())
    (folder / "train.py").write_text(patched)
    return folder


def apply(text: str, diff: str) -> str:
    """A unified diff of one hunk that only adds lines."""
    hunk = diff.split("@@\n", 1)[1].splitlines()
    before, after = ("\n".join(line[1:] for line in hunk if line[0] in kinds) for kinds in (" ", " +"))
    assert text.count(before) == 1
    return text.replace(before, after)


def train(folder: Path, *words: object, ranks: int = 1) -> str:
    usual = ("--vae_path", "data/vae.safetensors", "--resume_from", "data/start", "--resume_model_only", "True")
    return run(folder, *TORCHRUN, f"--nproc_per_node={ranks}", "train.py", *usual, "--batch_size", 4, *words)


def records(log: str) -> dict[int, dict[str, float]]:
    parser = LineParser(pattern="bagel")
    found = [*parser.feed(log.encode()), *parser.finish()]
    return {record.step: dict(record.values) for record in found}


@pytest.mark.slow
def test_a_bagel_style_run_is_read_and_resumes_as_its_readme_says(bagel: Path) -> None:
    setting = ("--ssim_loss_weight", 30, "--ssim_loss_max_t", 1.0, "--save_every", 2)
    log = train(bagel, *setting, "--total_steps", 5, "--exp_name", "a")
    whole = records(log)
    assert log.count("(step=0000003)") == 2 and list(whole) == [0, 1, 2, 3, 4]
    assert whole[3].keys() >= {"loss_flow", "loss_ce", "loss_ssim", "total_norm", "ssim_active_fraction"}
    assert whole[3]["ssim_active_fraction"] == 1
    checkpoints = bagel / "results" / "a" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["0000002", "0000004"]
    assert {path.name for path in (checkpoints / "0000002").iterdir()} == {"model.safetensors", "ema.safetensors", "optimizer.pt"}

    # resumed: the same numbers; auto_resume: the newest checkpoint under the name wins over resume_from
    again = records(
        train(bagel, *setting, "--total_steps", 5, "--exp_name", "b", "--resume_from", checkpoints / "0000002", "--resume_model_only", "False")
    )  # fmt: skip
    assert list(again) == [3, 4] and again[4]["total_norm"] == pytest.approx(whole[4]["total_norm"], rel=1e-4)
    trap = train(bagel, *setting, "--total_steps", 6, "--exp_name", "a", "--auto_resume", "True")
    assert list(records(trap)) == [5] and f"{'a'}/checkpoints/0000004/model.safetensors" in trap


@pytest.mark.slow
def test_averaged_weights_only_with_model_only_and_two_ranks_see_two_batches(bagel: Path) -> None:
    start = load_file(bagel / "data" / "start" / "model.safetensors")
    other = bagel / "data" / "other"
    shutil.copytree(bagel / "data" / "start", other)
    ruined = {name: torch.zeros_like(value) for name, value in start.items()}
    from safetensors.torch import save_file

    save_file(ruined, other / "ema.safetensors", metadata={"format": "pt"})
    flags = ("--resume_from", other, "--total_steps", 1, "--finetune_from_ema", "True")
    averaged = records(train(bagel, *flags, "--exp_name", "c", ranks=2))
    raw = records(train(bagel, *flags[:4], "--exp_name", "d", ranks=2))
    assert averaged[0]["loss_flow"] > 2 * raw[0]["loss_flow"]  # the zeros were trained
    one = records(train(bagel, *flags[:4], "--exp_name", "e"))
    assert one[0]["loss_flow"] != raw[0]["loss_flow"]


@pytest.mark.parametrize("name", ["bagel_style"])
def test_the_studies_reach_every_setting(name: str) -> None:
    study = load_study(EXAMPLES / name / "study.yaml")
    assert not isinstance(study.task, str)
    assert set(study.task.reached()) >= {
        "ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale", "pixel_loss_weight", "pixel_loss_max_t", "lr", "seed", "exp_name"
    }  # fmt: skip
    folder = EXAMPLES / name
    scripts = [word for command in (study.task.command, study.task.smoke.command) for word in command if word.endswith(".py")]
    assert len(scripts) == 2 and all((folder / script).is_file() for script in scripts)
