"""The three further tasks keep the contract, and each shows the ruin that its note describes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_studies import trial
from torch import nn

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.cli.tables import trials_table
from tune_ssim.guards import Baseline, KeepRule, NormRatio
from tune_ssim.probes import tensor_contents
from tune_ssim.results.trial_text import format_setting, metric_label, verdict_line
from tune_ssim.study.objective import Objective
from tune_ssim.study.study import load_study
from tune_ssim.tasks import patch_captions as captions
from tune_ssim.tasks.flow_dino_kl import TAGS, FlowDinoKL
from tune_ssim.tasks.photo_patches import PATCH, PHOTOS, load_photo, load_photo_patches
from tune_ssim.tasks.two_stage_vlm import TwoStageVLM
from tune_ssim.tasks.vae_kl import VAEKL
from tune_ssim.trials.checkpoint import load_checkpoint, save_checkpoint
from tune_ssim.trials.final_verdict import TrialPlan
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.quarantine import Ledger
from tune_ssim.trials.sample_check import statistics_of
from tune_ssim.trials.trial import Trial

TASKS: dict[str, type] = {"vae_kl": VAEKL, "flow_dino_kl": FlowDinoKL, "two_stage_vlm": TwoStageVLM}
# Of each task: a few steps of everything it does, and a setting that its study searches.
SHORT: dict[str, dict[str, Any]] = {"vae_kl": {}, "flow_dino_kl": {}, "two_stage_vlm": {"stage1_steps": 3}}
SEARCHED: dict[str, dict[str, Any]] = {
    "vae_kl": {"kl_alpha": 0.1},
    "flow_dino_kl": {"dino_alpha": 5.0, "kl_weight": 0.1},
    "two_stage_vlm": {"stage1_lr": 1e-3, "lr": 1e-2},
}


def made(name: str, seed: int = 0, **config: Any) -> Any:
    task = TASKS[name]()
    task.setup({"steps": 8, **SHORT[name], **config}, seed, "cpu")
    return task


def weights(task: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in task.trainable_parameters()]


@pytest.mark.parametrize("name", TASKS)
def test_batches_depend_on_seed_and_step_only(name: str) -> None:
    one, other = made(name), made(name, **SEARCHED[name])
    for _ in range(5):
        one.step(), other.step()
    assert torch.equal(one.training_images(7), other.training_images(7))
    assert not torch.equal(one.training_images(7), one.training_images(8))
    assert not torch.equal(one.training_images(7), made(name, seed=1).training_images(7))


@pytest.mark.parametrize("name", TASKS)
def test_a_saved_task_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    straight, first, second = made(name), made(name), made(name)
    for _ in range(8):
        last = straight.step()
    for _ in range(4):
        first.step()
    save_checkpoint(tmp_path / "c", first.state_dict())
    second.load_state_dict(load_checkpoint(tmp_path / "c"))
    for _ in range(4):
        resumed = second.step()
    assert float(resumed["loss"]) == float(last["loss"])
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(straight), strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_inference_leaves_the_training_untouched(name: str) -> None:
    watched, plain = made(name), made(name)
    sample = watched.sample(0)
    assert sample.images.shape[1:] == (3, PATCH, PATCH)
    assert set(statistics_of(sample)) and all(isinstance(value, float) for value in watched.evaluate().values())
    assert watched.evaluate() == watched.evaluate()
    assert float(watched.step()["loss"]) == float(plain.step()["loss"])


@pytest.mark.parametrize("name", TASKS)
def test_what_was_asked_for_is_in_force(name: str) -> None:
    asked = {"steps": 8, **SHORT[name], **SEARCHED[name]}
    task = made(name, **asked)
    assert asked.items() <= task.effective().items()
    for _ in range(6):
        task.step()
    assert asked.items() <= task.effective().items()


@pytest.mark.parametrize("name", TASKS)
def test_a_learning_rate_of_zero_changes_nothing(name: str) -> None:
    task = made(name, lr=0.0)
    before = weights(task)
    for _ in range(6):
        task.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(task), strict=True))


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        *((name, {"stepps": 1}, f"{name}: unknown key 'stepps'; did you mean 'steps'?") for name in TASKS),
        *((name, {"lr": -1}, f"{name}: lr must be a finite number >= 0, got -1") for name in TASKS),
        ("vae_kl", {"kl_schedule": "sine"}, "kl_schedule 'sine'; valid: constant, linear, slow_linear, cyclical"),
        ("vae_kl", {"beta1": 1.0}, "beta1 must be a number in [0, 0.9999], got 1.0"),
        ("flow_dino_kl", {"ablate": "dinno"}, "ablate 'dinno'; valid: null, flow, dino, kl"),
        ("flow_dino_kl", {"accumulation": 0}, "accumulation must be an integer >= 1, got 0"),
        ("flow_dino_kl", {"dino_network": "no_such_package:load"}, "no_such_package"),
        ("flow_dino_kl", {"dino_network": "math:sqrt"}, "expected module:function"),
        ("two_stage_vlm", {"stage1_steps": 5, "vision_checkpoint": "x"}, "set stage1_steps to 0"),
        ("two_stage_vlm", {"stage1_steps": 0, "vision_checkpoint": "/no/such"}, "neither a checkpoint's folder nor a file"),
        ("two_stage_vlm", {"batch_size": 255}, "batch_size must be at most 254"),
    ],
)
def test_a_mistake_is_said_in_one_line(name: str, config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        made(name, **config)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", TASKS)
def test_the_bundled_study_fits_its_task(name: str) -> None:
    """Every setting that may be launched is one that the task knows, and the held-out metrics are those that it measures."""
    study = load_study(name)
    assert load_task(study.task_path) is TASKS[name]
    task = made(name, **study.task_config, **study.baseline_settings)
    found = task.evaluate()
    assert study.objective.maximize.removeprefix("delta_") in found and set(study.objective.keep) <= set(found)
    settings = [setting for stage in study.space.stages for setting in stage.point_configs()]
    assert settings and set(study.space.parameter_names) <= set(study.baseline_settings)
    for setting in settings:
        made(name, **study.task_config, **setting)
    guards = [metric for guard in study.guard_list for metric in guard.metrics if metric.startswith(("z_", "kl_", "loss_"))]
    stages = [made(name, stage1_steps=stage) for stage in (0, 1)] if name == "two_stage_vlm" else [task]
    shown = {metric for each in stages for metric in each.step()}
    assert set(guards) <= shown


def test_patches_are_real_and_held_out_apart() -> None:
    patches = load_photo_patches()
    assert len(patches.train) == len(PHOTOS)
    for name in ("brick", "retina"):
        train, held_out = load_photo(name)
        assert train.shape[0] / (train.shape[0] + held_out.shape[0]) == pytest.approx(0.7, abs=0.01)
    batch, subjects = patches.held_out_batch(48)
    assert batch.shape == (48, 1, PATCH, PATCH) and subjects.bincount().tolist() == [4] * len(PHOTOS)
    assert batch.min() >= 0 and batch.max() <= 1


# -- VAE


def test_alpha_follows_its_schedule() -> None:
    found = {}
    for schedule in ("constant", "linear", "slow_linear", "cyclical"):
        alpha = made("vae_kl", steps=100, kl_alpha=0.01, kl_schedule=schedule).alpha
        found[schedule] = [round(alpha(step), 4) for step in (1, 5, 10, 25, 50, 100)]
    assert found == {
        "constant": [0.01] * 6,
        "linear": [0.001, 0.005, 0.01, 0.01, 0.01, 0.01],
        "slow_linear": [0.0002, 0.001, 0.002, 0.005, 0.01, 0.01],
        "cyclical": [0.0008, 0.004, 0.008, 0.0, 0.0, 0.01],
    }


def test_the_posterior_collapses_under_too_much_kl_and_runs_away_without() -> None:
    found = {}
    for alpha in (0.0, 1e-3, 1.0):
        task = made("vae_kl", steps=150, kl_alpha=alpha)
        for _ in range(150):
            metrics = task.step()
        found[alpha] = (float(metrics["kl_raw"]), int(metrics["active_units"]), task.evaluate()["elbo"])
    (free_kl, free_units, free_elbo), (kl, units, elbo), (dead_kl, dead_units, dead_elbo) = found.values()
    assert free_kl > 5 * kl and free_units == 16 and dead_kl < 0.05 and dead_units == 0 and units >= 8
    assert elbo > free_elbo + 10 and elbo > dead_elbo + 10


def test_loss_is_the_sum_of_its_terms() -> None:
    vae, flow = made("vae_kl"), made("flow_dino_kl", dino_warmup=0.0)
    for _ in range(3):
        of_vae, of_flow = vae.step(), flow.step()
    assert float(of_vae["loss"]) == pytest.approx(float(of_vae["loss_reconstruction"] + of_vae["loss_kl"]))
    assert float(of_flow["loss"]) == pytest.approx(float(of_flow["loss_flow"] + of_flow["loss_dino"] + of_flow["loss_kl"]))
    assert float(of_flow["loss_dino"]) == pytest.approx(float(of_flow["dino_global"]))


# -- flow, DINO, KL


def test_every_branch_gets_a_gradient_in_every_micro_batch() -> None:
    metrics = made("flow_dino_kl", accumulation=3, dino_warmup=0.0).step()
    for tag in TAGS:
        assert metrics[f"dbg/{tag}_has_grad"] == 3 * metrics[f"dbg/{tag}_trainable"] and metrics[f"dbg/{tag}_coverage"] == 1
        assert float(metrics[f"dbg/grad_{tag}"]) > 0


def test_an_ablated_branch_is_measured_and_does_not_train() -> None:
    task, whole = made("flow_dino_kl", ablate="dino", dino_warmup=0.0), made("flow_dino_kl", dino_warmup=0.0)
    before = weights(task)
    metrics, of_whole = task.step(), whole.step()
    assert metrics["dbg/dino_t_head_has_grad"] == 0 and metrics["dbg/flow_coverage"] == 1
    assert float(metrics["loss_dino"]) == 0 and float(metrics["dino_global"]) == float(of_whole["dino_global"])
    assert float(metrics["loss_flow"]) == float(of_whole["loss_flow"])
    head = list(task.networks.dino_t_head.parameters())
    start = [old for old, parameter in zip(before, task.trainable_parameters(), strict=True) if any(parameter is p for p in head)]
    assert all(torch.equal(a, b) for a, b in zip(start, head, strict=True))


class BrightnessNetwork(nn.Module):
    """Stands for a larger feature network of the user's own."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3)) + 0.1], dim=1)


def load_brightness() -> nn.Module:
    return BrightnessNetwork()


def test_a_network_of_ones_own_is_the_semantic_target() -> None:
    task = made("flow_dino_kl", dino_network=f"{__name__}:load_brightness")
    assert task.networks.dino_t_head[-1].out_features == 6
    assert 0 <= float(task.step()["dino_global"]) <= 2


def test_the_semantic_target_is_frozen_and_says_what_a_patch_shows() -> None:
    from tune_ssim.tasks.patch_features import PatchFeatures
    from tune_ssim.tasks.pretrain_patch_features import nearest_neighbour_accuracy

    task = made("flow_dino_kl")
    before = {name: value.clone() for name, value in task.features.state_dict().items()}
    task.step()
    assert all(torch.equal(before[name], value) for name, value in task.features.state_dict().items())
    torch.manual_seed(0)
    with torch.no_grad():
        assert nearest_neighbour_accuracy(task.features) > nearest_neighbour_accuracy(PatchFeatures()) + 0.05


# -- two stages


def test_labels_count_in_the_answer_alone() -> None:
    question, answer = captions.dialogue(3, 0, 2, torch.Generator().manual_seed(0))
    ids, labels = captions.sequence_of(question, answer)
    start = captions.VISUAL_TOKENS + len(question)
    assert len(ids) == len(labels) == captions.SEQUENCE and answer[-1] == captions.END
    assert labels[:start] == [captions.IGNORED] * start and labels[start : start + len(answer)] == answer
    assert set(labels[start + len(answer) :]) <= {captions.IGNORED}
    assert set(ids[: captions.VISUAL_TOKENS]) == {captions.IMAGE}


def test_an_id_without_a_word_is_found_and_breaks_nothing() -> None:
    beyond = len(captions.VOCABULARY) + 1
    assert beyond < captions.EMBEDDED  # the model can generate it
    assert captions.decode([captions.VOCABULARY.index("dark"), beyond, captions.END, -7]) == ("dark", [beyond])
    task = made("two_stage_vlm")
    with torch.no_grad():  # a bridge that has gone wrong: whatever it sees, it asks for that row
        task.language.norm.weight.zero_()
        task.language.norm.bias.copy_(100 * task.language.embedding.weight[beyond])
    assert statistics_of(task.sample())["undecodable_fraction"] == 1.0
    assert task.evaluate()["undecodable"] == 1.0


def test_stage_2_needs_a_frozen_language_model() -> None:
    task = made("two_stage_vlm", stage1_steps=2)
    task.language.blocks[0].requires_grad_(True)
    task.step(), task.step()
    with pytest.raises(BadSetup, match="must be frozen in stage 2: 12 of its tensors train"):
        task.step()


COLLAPSE = {"steps": 640, "stage1_steps": 635, "stage1_lr": 1e-3}  # five epochs at a hundred times the sound learning rate


@pytest.fixture(scope="module")
def ruined_stage1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What such a stage 1 leaves behind, and what its own training says when stage 2 is to begin."""
    task = made("two_stage_vlm", **COLLAPSE)
    for _ in range(635):
        task.step()
    folder = tmp_path_factory.mktemp("stage1") / "ruined"
    save_checkpoint(folder, {"task": task.state_dict()})
    with pytest.raises(BadSetup) as error:
        task.step()
    return folder, str(error.value)


def test_stage_2_refuses_a_ruined_stage_1(ruined_stage1: tuple[Path, str], tmp_path: Path) -> None:
    folder, words = ruined_stage1
    assert "stage 1 of this training, with stage1_lr 0.001, has visual tokens" in words
    start = {"stage1_steps": 0, "vision_checkpoint": str(folder)}
    with pytest.raises(BadSetup, match=r"below 0\.001: stage 1 has shrunk them to nothing"):
        made("two_stage_vlm", **start)
    # Under another name, as a file of another tool: what counts is what the weights do.
    state = load_checkpoint(folder)["task"]
    tensors = {f"{half}.{name}": value for half in ("vision", "bridge") for name, value in state[half].items()}
    save_file(tensors, tmp_path / "vision_bridge_best.safetensors")
    with pytest.raises(BadSetup, match=r"vision_bridge_best\.safetensors has visual tokens"):
        made("two_stage_vlm", stage1_steps=0, vision_checkpoint=str(tmp_path / "vision_bridge_best.safetensors"))
    assert len(load_file(tmp_path / "vision_bridge_best.safetensors")) == len(tensors)


def test_stage_2_refuses_a_quarantined_stage_1(tmp_path: Path) -> None:
    task = made("two_stage_vlm", stage1_steps=8)
    sound = tensor_contents(dict(task.vision.state_dict()))
    for _ in range(8):
        task.step()
    tensors = {f"{half}.{k}": v for half in ("vision", "bridge") for k, v in getattr(task, half).state_dict().items()}
    save_file(tensors, tmp_path / "sound_looking.safetensors")
    start = {"stage1_steps": 0, "vision_checkpoint": str(tmp_path / "sound_looking.safetensors"), "storage": str(tmp_path)}
    made("two_stage_vlm", **start)  # nothing against it yet
    Ledger(tmp_path).add(tensor_contents(tensors), sound=[sound], study="s", trial_id="t", step=8, reason="collapsed")
    with pytest.raises(BadSetup, match="quarantined"):
        made("two_stage_vlm", **start)


def test_stage_2_goes_on_from_a_sound_stage_1(tmp_path: Path) -> None:
    first = made("two_stage_vlm", stage1_steps=8)
    for _ in range(8):
        first.step()
    save_checkpoint(tmp_path / "c", {"task": first.state_dict(), "trial": {}})
    second = made("two_stage_vlm", stage1_steps=0, vision_checkpoint=str(tmp_path / "c"))
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    assert second.parts()["vision"].weights == tmp_path / "c" / "tensors.safetensors"
    metrics = second.step()
    assert float(metrics["loss_caption"]) > 0.1 and 0.15 < float(metrics["label_fraction"]) < 0.4
    assert metrics["dbg/llm_trainable"] == 0


# -- a study of another loss than SSIM


def test_a_trial_is_compared_by_the_metric_that_its_study_maximises() -> None:
    """Under a weight of the KL that kills the latent, in pairs with the baseline: `kl_` settings are an auxiliary loss's."""
    plan = TrialPlan(
        steps=40, guards=(NormRatio(),), keep=(KeepRule("active_units", min_ratio=0.5),), objective=Objective(maximize="delta_elbo")
    )
    first = Trial(VAEKL(), plan)
    first.start({"steps": 40, "kl_alpha": 1e-3}, role="baseline")
    first.advance()
    dead = Trial(VAEKL(), plan)
    dead.start({"steps": 40, "kl_alpha": 1.0}, baseline=Baseline((first.baseline_run(),)), searched=["kl_alpha"])
    dead.advance()
    assert dead.paired and dead.verdict is not None and dead.verdict.verdict == "degraded", dead.verdict
    assert dead.verdict.metrics["delta_elbo"] < -10 and "active_units" in dead.verdict.reason


def test_settings_and_objectives_are_called_by_their_names() -> None:
    assert [metric_label(name) for name in ("delta_ssim", "delta_elbo", "psnr")] == ["ΔSSIM", "Δelbo", "PSNR"]
    assert format_setting({"kl_alpha": 0.01, "kl_schedule": "linear"}) == "kl_alpha 0.01, kl_schedule linear"
    assert format_setting({"ssim_loss_weight": 30.0, "ssim_loss_max_t": 0.3}) == "gain 30 @ 0.3"
    of_vae = replace(trial("a"), config={"kl_alpha": 0.01}, objective="delta_elbo", metrics={"delta_elbo": 1.5})
    assert "kl_alpha 0.01  Δelbo +1.5000" in verdict_line(of_vae).plain
    assert of_vae.settings == {"kl_alpha": 0.01}
    headings = [column.header for column in trials_table([of_vae], objective=Objective(maximize="delta_elbo")).columns]
    assert headings == ["trial", "setting", "steps", "Δelbo", "verdict", "why"]  # no trial measured a norm ratio
