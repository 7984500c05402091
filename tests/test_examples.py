"""The recipes in `examples/`: the scripts run, their logs are read, their flags do what the READMEs say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_image_folder import folder_of

from tune_ssim.records.readers import LineParser, open_source
from tune_ssim.study.command_spec import ALWAYS
from tune_ssim.study.study import load_study
from tune_ssim.trials.command.process import free_port

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def run(folder: Path, *words: object, **environment: str) -> str:
    """Both streams merged, as a launcher merges them."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), **environment},
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
    words = ("train.py", *usual, "--batch_size", 4, *words)
    if ranks > 1:
        return run(folder, *TORCHRUN, f"--nproc_per_node={ranks}", *words)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    return run(folder, *words, **alone)  # what torchrun sets, without a second interpreter


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
    resumed = ("--resume_from", checkpoints / "0000002", "--resume_model_only", "False")
    again = records(train(bagel, *setting, "--total_steps", 5, "--exp_name", "b", *resumed))
    assert list(again) == [3, 4] and again[4]["total_norm"] == pytest.approx(whole[4]["total_norm"], rel=1e-4)
    trap = train(bagel, *setting, "--total_steps", 6, "--exp_name", "a", "--auto_resume", "True")
    assert list(records(trap)) == [5] and "a/checkpoints/0000004/model.safetensors" in trap


@pytest.mark.e2e  # what is read and resumed is tested above
def test_a_bagel_style_run_starts_from_averaged_weights_and_on_two_ranks(bagel: Path) -> None:
    setting = ("--ssim_loss_weight", 30, "--ssim_loss_max_t", 1.0)
    whole = records(train(bagel, *setting, "--total_steps", 1, "--exp_name", "a"))
    # finetune_from_ema with model_only: averaged weights of zeros were trained. Two ranks see two batches.
    start = load_file(bagel / "data" / "start" / "model.safetensors")
    shutil.copytree(bagel / "data" / "start", bagel / "data" / "other")
    zeros = {name: torch.zeros_like(value) for name, value in start.items()}
    save_file(zeros, bagel / "data" / "other" / "ema.safetensors", metadata={"format": "pt"})
    other = ("--resume_from", "data/other", "--finetune_from_ema", "True", "--total_steps", 1)
    averaged = records(train(bagel, *setting, *other, "--exp_name", "c"))
    assert averaged[0]["loss_flow"] > 2 * whole[0]["loss_flow"]
    two = records(train(bagel, *setting, "--total_steps", 1, "--exp_name", "d", ranks=2))
    assert two[0]["loss_flow"] != whole[0]["loss_flow"] and two[0]["loss_flow"] < 2 * whole[0]["loss_flow"]


@pytest.mark.slow
def test_a_diffusers_training_runs_resumes_and_samples(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path / "diffusers_train"
    shutil.copytree(EXAMPLES / "diffusers_train", folder, ignore=shutil.ignore_patterns("__pycache__"))
    folder_of(folder / "images", 6)
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = diffusers.AutoencoderKL(block_out_channels=[8] * 3, norm_num_groups=4, layers_per_block=1, **blocks)
    vae.save_pretrained(folder / "vae")
    common = ("--pretrained_vae", "vae", "--train_data_dir", "images", "--resolution", 32)
    flags = (*common, "--train_batch_size", 2, "--unet_channels", 16, 16, "--checkpointing_steps", 2)
    flags += ("--ssim_loss_weight", 30, "--ssim_loss_max_t", 1.0)
    echoed = json.loads(run(folder, "train.py", *flags, "--max_train_steps", 4).splitlines()[0])
    assert (echoed["ssim_loss_weight"], echoed["ssim_loss_max_t"]) == (30, 1.0)
    whole = {record.step: dict(record.values) for record in open_source(folder / "out" / "log.jsonl").finish()}
    assert list(whole) == [1, 2, 3, 4]
    assert whole[4].keys() >= {"loss", "loss_flow", "loss_ssim", "total_norm", "ssim_active_fraction"}
    resumed = ("--resume_from_checkpoint", "out/checkpoint-2", "--output_dir", "again", "--max_train_steps", 4)
    run(folder, "train.py", *flags, *resumed)
    again = {record.step: dict(record.values) for record in open_source(folder / "again" / "log.jsonl").finish()}
    assert list(again) == [3, 4] and again[4]["total_norm"] == pytest.approx(whole[4]["total_norm"], rel=1e-4)
    unet = "out/checkpoint-4/unet"
    last = run(folder, "sample.py", *common, "--unet", unet, "--out", "samples", "--references", "references", "--evaluate")
    assert json.loads(last.splitlines()[-1]).keys() == {"ssim", "psnr"}
    pictures = [sorted(path.name for path in (folder / name).iterdir()) for name in ("samples", "references")]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 16


@pytest.mark.parametrize(("name", "rate"), [("bagel_style", "lr"), ("diffusers_train", "learning_rate")])
def test_the_studies_reach_every_setting(name: str, rate: str) -> None:
    study = load_study(EXAMPLES / name / "study.yaml")
    assert not isinstance(study.task, str)
    assert set(study.task.referenced_settings()) >= {
        "ssim_loss_weight", "ssim_loss_max_t", "ssim_grad_scale", "pixel_loss_weight", "pixel_loss_max_t", rate, "seed", "exp_dir"
    }  # fmt: skip
    flags = {
        word[2:].partition("=")[0]: word.partition("=")[2] for word in study.task.command if word.startswith("--") and "=" in word
    }
    assert study.task.echo == "required"
    assert all(
        flags[setting] == "{" + setting + "}" for setting in {**study.task_config, **study.baseline_settings} if setting in flags
    )
    assert not {setting for setting in study.task_config if setting != "steps"} - set(flags)
    told = {**study.task_config, **study.baseline_settings}
    assert study.task.referenced_settings() <= {*told, *ALWAYS}  # a baseline has a value for every placeholder, and so has a trial
    stage = study.space.stages[0]
    launched = {*study.task_config, *stage.fixed, *stage.parameters, "ssim_loss_weight"}  # which is the gain over the scale
    assert study.task.referenced_settings() <= {*launched, *ALWAYS}
    folder = EXAMPLES / name
    scripts = [word for command in (study.task.command, study.task.smoke.command) for word in command if word.endswith(".py")]
    assert len(scripts) == 2 and all((folder / script).is_file() for script in scripts)
