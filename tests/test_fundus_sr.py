"""The bundled task keeps the contract of a task: same batches for every setting, exact resuming, parameters really in force."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.guards import SmokeTest
from tune_ssim.records import Record
from tune_ssim.tasks import fundus_images, fundus_sr
from tune_ssim.tasks.fundus_networks import VAE, Denoiser
from tune_ssim.tasks.fundus_sr import PRESETS, WEIGHTS, FundusSR, load_weights
from tune_ssim.trials.checkpoint import load_checkpoint, save_checkpoint
from tune_ssim.trials.sample_check import statistics_of

SSIM = {"ssim_loss_weight": 30.0, "ssim_loss_max_t": 0.3}


def made(seed: int = 0, **config: object) -> FundusSR:
    task = FundusSR()
    task.setup(config, seed, "cpu")
    return task


def test_batches_depend_on_seed_and_step_only() -> None:
    one, other = made(), made(**SSIM, lr=0.1)
    for _ in range(3):
        one.step(), other.step()
    for a, b in zip(one._batch(7), other._batch(7), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one._batch(7)[0], one._batch(8)[0])
    assert not torch.equal(one._batch(7)[0], made(seed=1)._batch(7)[0])


def test_train_and_held_out_do_not_overlap() -> None:
    images = fundus_images.load_fundus_images()
    photo_rows = images.train.shape[1] + images.held_out.shape[1]
    assert photo_rows == 705 and images.train.shape[1] == int(0.7 * 705)
    train_rows = images.train_origins[:, 0] + fundus_images.CROP
    assert int(train_rows.max()) <= images.train.shape[1]
    assert images.train.min() >= 0 and images.train.max() <= 1


@pytest.mark.parametrize(
    ("preset", "precision"),
    [*((preset, precision) for preset in PRESETS for precision in ("float32", "bf16")), ("sgd", "fp16")],
)
def test_presets_and_precisions_train(preset: str, precision: str) -> None:
    task = made(preset=preset, precision=precision, **SSIM)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    norms = [float(task.step()["total_norm"]) for _ in range(2)]
    assert any(torch.isfinite(torch.tensor(norms)))
    assert any(not torch.equal(before[name], value) for name, value in task.model.state_dict().items())
    assert task.effective()["max_grad_norm"] == PRESETS[preset]["max_grad_norm"]


def test_fp16_skips_a_step_without_failing() -> None:
    task = made(precision="fp16", **SSIM)
    task.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # sure to overflow
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    metrics = task.step()
    assert float(metrics["step_skipped"]) == 1.0
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())
    assert task.scaler.get_scale() < 2.0**40


def test_decoder_is_frozen_and_denoiser_gets_the_ssim_gradient() -> None:
    task = made(**SSIM)
    before = hashlib.sha256(b"".join(p.numpy().tobytes() for p in task.vae.state_dict().values())).hexdigest()
    plain = made()
    task.step(), plain.step()
    after = hashlib.sha256(b"".join(p.numpy().tobytes() for p in task.vae.state_dict().values())).hexdigest()
    assert before == after
    assert all(parameter.grad is None for parameter in task.vae.parameters())
    assert any(not torch.equal(a.grad, b.grad) for a, b in zip(task.model.parameters(), plain.model.parameters(), strict=True))


ADAPTIVE = {"ssim_loss_weight": {"adaptive": {"target_ratio": 1.0}}, "ssim_loss_max_t": 0.3, "ssim_warmup_steps": 5, "crop": 32}


@pytest.mark.parametrize("setting", [SSIM, ADAPTIVE])
def test_a_saved_task_goes_on_to_the_bit(setting: dict[str, object], tmp_path: Path) -> None:
    straight = made(preset="adamw_clip", **setting)
    for _ in range(6):
        last = straight.step()
    first = made(preset="adamw_clip", **setting)
    for _ in range(3):
        first.step()
    save_checkpoint(tmp_path / "c", first.state_dict())
    second = made(preset="adamw_clip", **setting)
    second.load_state_dict(load_checkpoint(tmp_path / "c"))
    for _ in range(3):
        resumed = second.step()
    assert float(resumed["loss"]) == float(last["loss"])
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), straight.model.parameters(), strict=True))


def test_sampling_and_evaluation_leave_the_training_untouched() -> None:
    watched, plain = made(**SSIM), made(**SSIM)
    watched.sample(0), watched.sample(1), watched.evaluate()
    assert float(watched.step()["loss"]) == float(plain.step()["loss"])
    assert watched.model.training


def test_gain_is_one_degree_of_freedom() -> None:
    one = made(ssim_loss_weight=100.0, ssim_grad_scale=0.01, ssim_loss_max_t=0.3)
    other = made(ssim_loss_weight=1.0, ssim_grad_scale=1.0, ssim_loss_max_t=0.3)
    for _ in range(5):
        a, b = one.step(), other.step()
        assert float(a["total_norm"]) == pytest.approx(float(b["total_norm"]), rel=1e-4)


def test_bundled_weights_are_the_recorded_ones_and_better_than_nothing() -> None:
    recorded = dict(reversed(line.split()) for line in (WEIGHTS / "SHA256SUMS").read_text().splitlines())
    for name, digest in recorded.items():
        assert hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() == digest
    trained = made()
    from_file = load_file(WEIGHTS / "fundus_denoiser.safetensors")
    assert all(torch.equal(from_file[name], value) for name, value in trained.model.state_dict().items())
    pretrained, random = trained.evaluate(), made(pretrained=False).evaluate()
    assert 0.3 < pretrained["high_frequency"] < 1 and pretrained["flow_loss"] < random["flow_loss"]
    assert trained.per_image() == {name: [pytest.approx(pretrained[name])] for name in ("ssim", "psnr")}  # crops of one photograph
    # Bicubic interpolation has 0.747 and 30.6 dB, the autoencoder's reconstruction 0.879 and 31.2 dB. Random weights have 0.819:
    # smooth blobs of the right colour, which SSIM hardly tells from a restoration; the input does.
    assert pretrained["ssim"] > 0.86 and pretrained["psnr"] > 30
    assert random["ssim"] < pretrained["ssim"] - 0.03 and random["psnr"] < pretrained["psnr"] - 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_weights_fail_the_smoke_test_at_step_0(seed: int) -> None:
    found = statistics_of(made(seed, pretrained=False).sample())
    guard = SmokeTest()
    _, violation = guard.update(guard.init(), Record(0, {f"smoke/{name}": value for name, value in found.items()}))
    assert violation is not None and violation.action == "abort"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"presett": "sgd"}, "unknown key 'presett'"),
        ({"preset": "adam"}, "preset 'adam'; valid: sgd"),
        ({"precision": "int8"}, "precision 'int8'"),
        ({"t_law": "beta"}, "t_law 'beta'"),
        ({"lr": -1e-3}, "lr must be a finite number >= 0, got -0.001"),
        ({"lr": "fast"}, "lr must be a finite number >= 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"ssim_loss_weight": -1.0}, "ssim_loss_weight"),
        ({"ssim_loss_max_t": 0}, "ssim_loss_max_t"),
        ({"ssim_grad_scale": float("nan")}, "ssim_grad_scale"),
        ({"weights": "/nowhere"}, "no such file"),
    ],
)
def test_bad_configurations_are_named(config: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(**config)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes((WEIGHTS / "fundus_vae.safetensors").read_bytes()[:5000])
    save_file(Denoiser().state_dict(), tmp_path / "other.safetensors")
    for name in ("torn", "other"):
        with pytest.raises(BadSetup, match=name):
            load_weights(VAE(), tmp_path / f"{name}.safetensors")
    (tmp_path / "fundus_vae.safetensors").write_bytes((WEIGHTS / "fundus_vae.safetensors").read_bytes())
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  fundus_vae.safetensors\n")
    with pytest.raises(BadSetup, match="is not the recorded"):
        load_weights(VAE(), tmp_path / "fundus_vae.safetensors")


def test_law_of_t() -> None:
    uniform = torch.cat([made()._batch(n)[-1] for n in range(1, 60)])
    shifted = torch.cat([made(t_law="shifted_sigmoid_normal", timestep_shift=3.0)._batch(n)[-1] for n in range(1, 60)])
    assert 0.2 < float((uniform <= 0.3).float().mean()) < 0.4
    assert float((shifted <= 0.3).float().mean()) < 0.1  # expected: 2.6 %
    assert fundus_sr.FLOW_BINS == 5


def test_the_forward_pass_is_the_one_of_the_step() -> None:
    setting = {"ssim_loss_weight": 30.0, "ssim_loss_max_t": 1.0}
    watched, stepped = made(**setting), made(**setting)
    forward = watched.forward(1)
    auxiliary = forward.auxiliary()
    recorded = stepped.step()
    assert float(recorded["loss_flow"]) == pytest.approx(forward.main.item(), rel=1e-6)
    assert float(recorded["loss_ssim"]) == pytest.approx(auxiliary.loss_ssim.item(), rel=1e-6)
    assert float(recorded["loss"]) == pytest.approx((forward.main + auxiliary.total).item(), rel=1e-6)


def test_a_learning_rate_of_zero_leaves_the_weights() -> None:
    still = made(lr=0)
    before = {name: value.clone() for name, value in still.model.state_dict().items()}
    assert float(still.step()["total_norm"]) > 0
    assert all(torch.equal(value, before[name]) for name, value in still.model.state_dict().items())


@pytest.mark.parametrize(("image", "crop"), [("immunohistochemistry", 32), ("microaneurysms", 24), ("coffee", 64)])
def test_other_images_and_crops(image: str, crop: int) -> None:
    task = made(image=image, crop=crop, batch_size=2)
    assert task.step()["loss_flow"] > 0
    assert task.sample().images.shape[1:] == (3, crop, crop)
    assert task.training_images(1).shape == (2, 3, crop, crop)


def test_averaged_weights(tmp_path: Path) -> None:
    task = made(ema_decay=0.9)
    task.step()
    raw, averaged = task.model.conv_in.weight, task.ema.conv_in.weight
    assert not torch.equal(raw, averaged)
    again = made(ema_decay=0.9)
    again.load_state_dict(task.state_dict())
    assert torch.equal(again.ema.conv_in.weight, averaged)
    assert set(task.parts()) == {"vae", "denoiser", "denoiser_ema"}
    for name in ("fundus_vae", "fundus_denoiser"):
        (tmp_path / f"{name}.safetensors").write_bytes((WEIGHTS / f"{name}.safetensors").read_bytes())
    save_file(task.ema.state_dict(), tmp_path / "fundus_denoiser_ema.safetensors")
    from_ema = made(weights=str(tmp_path), finetune_from_ema=True)
    assert torch.equal(from_ema.model.conv_in.weight, averaged)
    assert from_ema.parts()["denoiser"].weights == tmp_path / "fundus_denoiser_ema.safetensors"


def test_fingerprints_change_with_the_data() -> None:
    mine, other = made(), made()
    assert mine.fingerprints() == other.fingerprints()
    other.images = fundus_images.FundusImages(
        mine.images.train, mine.images.held_out + 1 / 255, mine.images.train_origins, mine.images.held_out_origins
    )
    changed = {name for name, digest in other.fingerprints().items() if digest != mine.fingerprints()[name]}
    assert changed == {"data/held_out", "data/evaluation"}
