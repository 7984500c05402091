"""A VAE of one's own: real AutoencoderKL and AutoencoderTiny folders, saved by diffusers; most is skipped without it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_image_folder import folder_of

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.before_launch.preflight import images, networks
from tune_ssim.probes import compare_with_file
from tune_ssim.tasks.diffusers_vae import CONFIG_FILE, WEIGHTS_FILE, load_diffusers_vae
from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.tasks.pretrain_fundus import main, pretrain

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Saves a random one: `(kind, levels, **config) → folder`; it reduces 2^(levels - 1)-fold."""
    diffusers = pytest.importorskip("diffusers")

    def make(kind: str = "AutoencoderKL", levels: int = 3, **config: Any) -> Path:
        folder = tmp_path_factory.mktemp("vae")
        torch.manual_seed(0)
        if kind == "AutoencoderKL":
            blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
            shape = {"block_out_channels": (8,) * levels, "norm_num_groups": 4, "layers_per_block": 1, **blocks}
        else:
            width, count = (8,) * levels, (1,) * levels
            shape = {"encoder_block_out_channels": width, "decoder_block_out_channels": width}
            shape |= {"num_encoder_blocks": count, "num_decoder_blocks": count}
        getattr(diffusers, kind)(**shape, **config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("data") / "images", 8)


def arguments(out: Path, **given: Any) -> argparse.Namespace:
    usual = {"data": None, "data_side": None, "vae": None, "crop": 32, "width": 16, "vae_steps": 2, "flow_steps": 2}
    return argparse.Namespace(out=out, **{**usual, **given})


def made(**config: Any) -> FundusSR:
    task = FundusSR()
    task.setup({"crop": 32, "width": 16, "batch_size": 2, **config}, 0, "cpu")
    return task


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({}, [0.0] * 4, [1 / 0.18215] * 4),
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, [0.25] * 4, [2.0] * 4),
        (
            {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 1.0, 4.0]},
            [1.0, 2.0, 3.0, 4.0],
            [2.0, 4.0, 2.0, 8.0],
        ),
    ],
)
def test_latents_are_standardised_as_the_config_says(
    autoencoder: Make, config: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    vae = load_diffusers_vae(autoencoder(**config))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = vae.inner.encode(x).latent_dist.mode()
    channels = (1, 4, 1, 1)
    expected = (z - torch.tensor(mean).view(channels)) / torch.tensor(std).view(channels)
    assert torch.allclose(vae.encode(x), expected, atol=1e-6)
    assert torch.allclose(vae.decode(vae.encode(x)), vae.inner.decode(z).sample, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "levels", "channels"), [("AutoencoderKL", 4, 16), ("AutoencoderKL", 2, 3), ("AutoencoderTiny", 3, 4)]
)
def test_the_task_takes_any_reduction_and_number_of_channels(
    autoencoder: Make, data: Path, tmp_path: Path, kind: str, levels: int, channels: int
) -> None:
    folder = autoencoder(kind, levels, latent_channels=channels)
    pretrain(arguments(tmp_path / "w", data=data, vae=folder))
    task = made(data=str(data), vae=str(folder), weights=str(tmp_path / "w"))
    factor = 2 ** (levels - 1)
    assert (task.vae.factor, task.vae.latent_channels) == (factor, channels)
    before = [parameter.clone() for parameter in task.vae.parameters()]
    metrics = task.step()
    assert float(metrics["loss_flow"]) > 0 and all(parameter.grad is None for parameter in task.vae.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, task.vae.parameters(), strict=True))
    assert task._batch(1)[3].shape == (2, channels, 32 // factor, 32 // factor)
    assert task.sample().images.shape == (32, 3, 32, 32) and task.evaluate()["psnr"] > 0
    parts = made(data=str(data), vae=str(folder), weights=str(tmp_path / "w")).parts()
    assert compare_with_file(parts["vae"].module, parts["vae"].weights).equal
    assert compare_with_file(parts["denoiser"].module, parts["denoiser"].weights).equal
    assert {check.name for check in networks.check_weights(task)} == {"weights/vae", "weights/denoiser"}


def test_a_denoiser_that_does_not_fit_is_named_with_the_remedy(autoencoder: Make, data: Path, tmp_path: Path) -> None:
    one, other = autoencoder(), autoencoder(scaling_factor=0.5)
    config = {"data": str(data), "vae": str(one)}
    with pytest.raises(UserError, match=r"bundled VAE's latents only; pretrain one with `.* --data .* --vae .* --crop 32"):
        made(**config)
    assert made(**config, pretrained=False).step()  # on purpose from nothing
    pretrain(arguments(tmp_path, data=data, vae=one))
    assert {path.name for path in tmp_path.iterdir()} == {"fundus_denoiser.safetensors", "SHA256SUMS"}
    assert made(**config, weights=str(tmp_path)).step()
    with pytest.raises(BadSetup, match="was trained on the latents of another VAE; pretrain one with"):
        made(data=str(data), vae=str(other), weights=str(tmp_path))
    with pytest.raises(UserError, match=r"holds a denoiser and no fundus_vae.safetensors; say vae:"):
        made(data=str(data), weights=str(tmp_path))
    with pytest.raises(UserError, match="crop must be a multiple of 16 with this VAE"):
        made(**{**config, "vae": str(autoencoder(levels=4)), "crop": 24, "weights": str(tmp_path)})


def test_latents_of_another_size_are_said_before_launch(autoencoder: Make, data: Path) -> None:
    task = made(data=str(data), vae=str(autoencoder(scaling_factor=1e-3)), pretrained=False)
    (check,) = images.check_data(task)
    assert (check.name, check.status) == ("latents/statistics", "warn") and "unit deviation" in (check.remedy or "")
    (bundled,) = images.check_data(made(crop=48, width=48))
    assert bundled.status == "ok"


def spoilt(folder: Path, how: str) -> Path:
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    tensors = load_file(weights)
    if how == "missing":
        del tensors["decoder.conv_in.weight"]
    elif how == "unexpected":
        tensors["another"] = torch.zeros(2)
    elif how == "mismatched":
        tensors["decoder.conv_in.weight"] = torch.zeros(2, 2)
    save_file(tensors, weights, metadata={"format": "pt"})
    if how == "torn":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "pickled":
        weights.rename(folder / "diffusion_pytorch_model.bin")
    elif how == "class":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "VQModel"}))
    elif how == "grey":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 1}))
    return folder


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("missing", BadSetup, "1 missing keys: decoder.conv_in.weight"),
        ("unexpected", BadSetup, "1 unexpected keys: another"),
        ("mismatched", BadSetup, "decoder.conv_in.weight"),
        ("torn", BadSetup, "vae: "),
        ("pickled", UserError, "there is diffusion_pytorch_model.bin: save it again"),
        ("class", UserError, "_class_name 'VQModel'; valid: AutoencoderKL, AutoencoderTiny"),
        ("grey", BadSetup, "encoder.conv_in.weight"),
    ],
)
def test_folders_that_cannot_be_used(autoencoder: Make, how: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_diffusers_vae(spoilt(autoencoder(), how))


def test_what_can_be_said_without_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_diffusers_vae(tmp_path / "nowhere")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match=r"no config.json; .*vae has one"):
        load_diffusers_vae(tmp_path)
    with pytest.raises(UserError, match="not JSON"):
        load_diffusers_vae(tmp_path / "vae")
    (tmp_path / "vae" / CONFIG_FILE).write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "vae" / WEIGHTS_FILE).touch()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'tune-ssim\[diffusers\]'"):
        load_diffusers_vae(tmp_path / "vae")


def test_pretraining_for_other_images(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (data / "torn.png").write_bytes((data / "00.png").read_bytes()[:500])
    flags = {"--data": data, "--out": tmp_path / "w", "--crop": 32, "--width": 16, "--vae-steps": 3, "--flow-steps": 3}
    monkeypatch.setattr(sys, "argv", ["pretrain_fundus", *(str(word) for pair in flags.items() for word in pair)])
    main()
    out, err = capsys.readouterr()
    (data / "torn.png").unlink()
    assert "1 file cannot be used: torn.png" in err and f"  weights: {tmp_path / 'w'}" in err
    assert json.loads(out.splitlines()[-1])["stage"] == "held out"
    task = made(data=str(data), weights=str(tmp_path / "w"))
    assert max(abs(mean) for mean in task.latent_statistics()[0]) < 0.5
    flags["--data"] = tmp_path / "nowhere"
    monkeypatch.setattr(sys, "argv", ["pretrain_fundus", *(str(word) for pair in flags.items() for word in pair)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "no such folder" in capsys.readouterr().err
