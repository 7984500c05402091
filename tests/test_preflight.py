"""Preflight tells broken set-ups from sound ones. The whole matrix of defects is `benchmarks/preflight.py`; here each
measurement meets the faults that it exists for, and a set-up without them."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effect_defects import gaussian, ssim_with, uniform
from fundus_defects import BASELINE, DEFECTS, HEALTHY, Case, case, stepping, variant
from PIL import Image
from references import ssim_reference
from rich.console import Console
from small_task import SmallTask
from torch import Tensor
from unseen_defects import UNSEEN
from unseen_defects_2 import UNSEEN_2

from tune_ssim.base.errors import UserError
from tune_ssim.before_launch.inspection import preflight_lines
from tune_ssim.before_launch.preflight import (
    cost,
    flow,
    images,
    launch,
    leakage,
    learning,
    networks,
    picture,
    preflight_task,
    rules,
    run_preflight,
    sampling,
    settings_of,
    step_rules,
    steps,
    targets,
    updates,
)
from tune_ssim.before_launch.preflight.optimizers import observed_updates
from tune_ssim.before_launch.preflight.picture import Album
from tune_ssim.before_launch.preflight.plain import Setting, cosine, expected, plain_ssim
from tune_ssim.before_launch.preflight.report import Check, Report, unknown
from tune_ssim.before_launch.preflight.subject import Subject, guarded
from tune_ssim.cli.tables import preflight_table
from tune_ssim.guards import NormRatio, SmokeTest
from tune_ssim.losses import DecodedLoss
from tune_ssim.study.space import load_space
from tune_ssim.study.study import load_study
from tune_ssim.tasks.fundus_images import load_fundus_images
from tune_ssim.tasks.fundus_networks import VAE, Denoiser
from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.trials.training import Forward

SMALL = {"crop": 32, "batch_size": 4}  # a quarter of the work


def subject_of(found: Case) -> Subject:
    return Subject(found.task, {"steps": found.steps, **SMALL, **found.config}, 0, "cpu", {"lr": 0.0})


def made(found: Case) -> Any:
    return subject_of(found).make(found.baseline)


def bad(checks: Iterator[Check]) -> list[str]:
    return [check.name for check in checks if check.status == "bad_setup"]


# -- the report and its rules


def test_a_report_has_the_worst_status_and_first_reason() -> None:
    checks = (
        Check("setup", "ok", "fine"),
        unknown("gate", "nothing known"),
        Check("loss/main", "bad_setup", "too large", {"loss": math.inf, "ratio": math.nan}, "load the weights"),
        Check("smoke/raw", "bad_setup", "noise"),
    )
    report = Report(checks, 1.5)
    assert report.status == "bad_setup" and report.reason == "loss/main: too large"
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["status"] == report.status and plain["reason"] == report.reason
    assert plain["checks"][2]["evidence"]["loss"] == math.inf and math.isnan(plain["checks"][2]["evidence"]["ratio"])
    assert Report(checks[:2]).status == "ok" and Report(checks[:2]).reason == ""
    assert Report((checks[1],)).status == "unknown"
    assert Report((Check("a", "warn", "hm"), checks[0])).status == "warn"


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (rules.main_loss(0.27, 1.0), "ok"),
        (rules.main_loss(1.01, 1.0), "bad_setup"),
        (rules.main_loss(math.nan, 1.0), "bad_setup"),
        (rules.caption_loss(1.7, 152_064, 0.4), "ok"),
        (rules.caption_loss(11.5, 152_064, None), "bad_setup"),  # FACTS §5: near ln V
        (rules.caption_loss(0.05, 152_064, None), "bad_setup"),  # SEEDS D2
        (rules.caption_loss(2.0, None, 1.0), "bad_setup"),
        (rules.caption_loss(2.0, None, 0.0), "bad_setup"),
        (rules.caption_loss(math.nan, None, None), "bad_setup"),
        (rules.image_range("targets", 0.0, 1.0, 0, 8), "ok"),
        (rules.image_range("targets", -0.005, 1.005, 0, 8), "ok"),
        (rules.image_range("targets", -1.0, 1.0, 0, 8), "bad_setup"),
        (rules.image_range("targets", 0.0, 255.0, 0, 8), "bad_setup"),
        (rules.image_range("targets", 0.0, 1.0, 1, 8), "bad_setup"),
        (rules.constant_images(0, 8), "ok"),
        (rules.constant_images(15, 1600), "ok"),  # a flat sky
        (rules.constant_images(1, 8), "warn"),
        (rules.distinct_references(47, 48), "ok"),
        (rules.distinct_references(40, 48), "warn"),
        (rules.distinct_references(1, 48), "bad_setup"),
        (rules.altered_overlap([12.6, 3.0], 32), "warn"),  # one match may be chance
        (rules.altered_overlap([12.6, 9.0], 32), "bad_setup"),
        (step_rules.outside_updates(0.0), "ok"),
        (step_rules.outside_updates(1.0), "bad_setup"),
        (step_rules.damping(1.0), "ok"),
        (step_rules.damping(0.3), "warn"),
        (step_rules.damping(3e-4), "bad_setup"),
        (step_rules.warm_up(0.5, 200), "warn"),
        (step_rules.warm_up(2e-4, 200), "bad_setup"),
        (rules.constant_images(6, 8), "bad_setup"),
        (rules.own_partner("x", "images", 0.9, 20), "ok"),
        (rules.own_partner("x", "images", 0.5, 20), "bad_setup"),
        (rules.own_partner("x", "images", 0.5, 3), "unknown"),
        (rules.own_partner("x", "images", math.nan, 20), "unknown"),
        (rules.latent_scale(1.0, {0.5: 2.0, 2.0: 1.4}, 0.5, 20), "ok"),
        (rules.latent_scale(1.0, {0.5: 0.4, 2.0: 5.0}, 0.5, 20), "bad_setup"),
        (rules.latent_scale(1.0, {0.5: 0.4, 2.0: 5.0}, -0.5, 20), "warn"),
        (rules.latent_scale(1.0, {0.5: 0.4, 2.0: 5.0}, 0.5, 3), "unknown"),
        (rules.latent_scale(math.nan, {0.5: 0.4, 2.0: 5.0}, 0.5, 20), "bad_setup"),
        (rules.overlap([0, 0], [9, 9], 4), "ok"),
        (rules.overlap([0, 7], [9, 9], 4), "bad_setup"),
        (rules.overlap([2, 2], [9, 9], 4), "warn"),
        (rules.overlap([0, 0], [0, 0], 4), "unknown"),
        (step_rules.step_gradient("ssim", 1.0, 1.0, 1.0), "ok"),
        (step_rules.step_gradient("ssim", 8.0, 1.0, 1.0), "bad_setup"),
        (step_rules.step_gradient("ssim", 8.0, 1.0, 1.0, random=True), "unknown"),
        (step_rules.step_gradient("ssim", 0.96, 1.0, 0.998, turns=1.0), "unknown"),  # a Gaussian window of 9 in place of 11
        (step_rules.step_gradient("ssim", 0.96, 1.0, 0.998, turns=50.0), "bad_setup"),
        (step_rules.step_gradient("ssim", 1.0, 1.0, 0.4), "bad_setup"),
        (step_rules.step_gradient("ssim", 1.0, 1.0, math.nan), "bad_setup"),
        (step_rules.parameter("lr", 0.1, 0.1, 1.0), "ok"),
        (step_rules.parameter("lr", 0.1, 0.2, 1.0), "bad_setup"),
        (step_rules.parameter("lr", 0.1, None), "bad_setup"),
        (step_rules.parameter("lr", 0.1, 0.1, 10.0), "bad_setup"),
        (step_rules.parameter("lr", 0.1, 0.1, math.nan), "bad_setup"),
        (step_rules.parameter("lr", 0.1, 0.1), "unknown"),
        (step_rules.clipping(None, 30.0, 30.0, 30.0), "ok"),
        (step_rules.clipping(1.0, 30.0, 1.0, 30.0), "ok"),
        (step_rules.clipping(1.0, 0.4, 0.4, 0.4), "ok"),
        (step_rules.clipping(1.0, 30.0, 30.0, 30.0), "bad_setup"),
        (step_rules.clipping(None, 30.0, 1.0, 30.0), "bad_setup"),
        (step_rules.clipping(1.0, 1.0, 1.0, 30.0), "bad_setup"),
        (rules.ema_distance("ema", "raw", 0.02), "ok"),
        (rules.ema_distance("ema", "raw", 0.99), "bad_setup"),
        (rules.ema_distance("ema", "raw", math.nan), "bad_setup"),
        (step_rules.law_of_t(0.1, 64), "ok"),
        (step_rules.law_of_t(0.5, 64), "bad_setup"),
        (step_rules.time_of_noise(1e-3), "ok"),
        (step_rules.time_of_noise(0.27), "bad_setup"),
        (step_rules.main_gradient(1.0, 0, 4, 1.0), "ok"),
        (step_rules.main_gradient(0.5, 0, 4, 9.0), "bad_setup"),  # the batch's mean for a target
        (step_rules.main_gradient(1.0, 3, 4, 1.2), "bad_setup"),
        (step_rules.main_gradient(1.0, 0, 3, 1 / 3072), "bad_setup"),
        (step_rules.decoder(0.0, 0.0, 0.5), "ok"),
        (step_rules.decoder(0.0, 0.5, 0.4), "bad_setup"),
        (rules.kernels(9.0, {"transposed": 5.0}, 1.0), "ok"),  # random weights
        (rules.sample_error(0.2, 0.1), "ok"),
        (rules.sample_error(2.0, 0.1), "bad_setup"),
        (step_rules.baseline_push(1.0, 1.0, 10.0), "ok"),
        (step_rules.baseline_push(1.0, 0.0, 10.0), "bad_setup"),
        (step_rules.baseline_push(17.6, 1.0, 10.0), "warn"),  # FACTS §1: note 001's own baseline
        (step_rules.average("ema", 1e-4), "ok"),
        (step_rules.average("ema", 0.0), "unknown"),  # kept as loaded, or averaged later
        (step_rules.average("ema", -0.5), "bad_setup"),
        (step_rules.same_step(0.0, 0.0), "ok"),
        (step_rules.same_step(0.3, 0.0), "warn"),  # the global generator: dropout, or the data
        (step_rules.same_step(0.3, 0.3), "bad_setup"),
        (step_rules.loss_under_updates("update", [1.0] * 9, [1 + 0.1 * n for n in range(9)]), "bad_setup"),
        (step_rules.loss_under_updates("update", [1.0] * 9, [1.0, *[1.3 - 0.1 * n for n in range(8)]]), "ok"),  # a bump
        (step_rules.loss_under_updates("update", [1.0] * 7, [1.0] * 7), "unknown"),
        (step_rules.noise(0.01, 1.0, 0.1), "ok"),
        (step_rules.noise(0.5, 0.3, 0.1), "bad_setup"),
        (step_rules.noise(0.0, 2.0, 0.1), "warn"),
        (rules.target_difference(0.0, None), "ok"),
        (rules.target_difference(0.03, 0.0), "ok"),
        (rules.target_difference(0.03, 0.9), "warn"),
        (rules.tokens(9, 0, 0, 8, 9), "ok"),
        (rules.tokens(9, 1, 0, 9, 9), "bad_setup"),
    ],
)
def test_rules(check: Check, status: str) -> None:
    assert check.status == status
    assert check.sentence and (check.remedy or status != "bad_setup")


def test_known_fingerprints_are_judged_only_where_all_their_metrics_are() -> None:
    assert rules.fingerprints({"mse": 2.0}) == []
    healthy = rules.fingerprints({"mse": 0.41, "ce": 0.55})
    ruined = rules.fingerprints({"mse": 2.0, "ce": 11.9})
    assert [check.status for check in healthy] == ["ok", "ok"] and [check.status for check in ruined] == ["bad_setup"] * 2


class Centred(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad -= parameter.grad.mean()
        return super().step(closure)


@pytest.mark.parametrize("epsilon", [1e-8, 1.0])
@pytest.mark.parametrize("restarts", [False, True])
def test_updates_are_observed_from_outside(epsilon: float, restarts: bool) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Centred([weight], lr=0.1, eps=epsilon)
    with observed_updates([]) as found:
        for _ in range(3):
            optimizer.zero_grad()
            (0.01 * weight.square()).sum().backward()
            optimizer.step()
            if restarts:
                weight.data.copy_(torch.tensor([1.0, 2.0]))
    assert found.gradients is not None and torch.equal(found.gradients[0], torch.tensor([0.02, 0.04]))
    assert len(found.outside) == 2 and all(moved == (1.0 if restarts else 0.0) for moved in found.outside)
    assert all(share > 0.99 if epsilon < 1 else share < 0.05 for share in found.damping) and len(found.damping) == 3


@pytest.mark.parametrize(("p", "steps", "needed"), [(0.1, 30, 5), (0.57, 20, 11), (0.999, 12, 11), (0.0, 5, 1), (1.0, 5, 5)])
def test_chance_of_enough_active_steps(p: float, steps: int, needed: int) -> None:
    draws = np.random.default_rng(0).random((20_000, steps)) < p
    assert step_rules.chance_of_at_least(needed, steps, p) == pytest.approx((draws.sum(1) >= needed).mean(), abs=0.015)


def test_gates_are_bad_only_if_no_setting_can_be_judged() -> None:
    assert step_rules.gates({0.3: 0.9, 0.1: 0.5}, 200, 11).status == "ok"
    assert step_rules.gates({0.3: 0.9, 0.01: 0.001}, 200, 11).status == "warn"
    assert step_rules.gates({0.02: 0.002, 0.01: 0.001}, 200, 11).status == "bad_setup"
    assert step_rules.gates({0.1: 11.5 / 20}, 20, 11).status == "warn"  # just enough on average


# -- the reference that steps are held against


@pytest.fixture(scope="module")
def decoder() -> Iterator[torch.nn.Module]:
    torch.manual_seed(0)
    yield VAE().requires_grad_(False).eval()


def forward_of(decoder: torch.nn.Module, loss: DecodedLoss, **others: Any) -> tuple[Forward, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(4, 4, generator=generator))
    noise = torch.randn(5, 4, 6, 6, generator=generator)
    z0 = torch.einsum("ij,njhw->nihw", weight, noise)
    targets = torch.rand(5, 3, 24, 24, generator=generator)
    t = torch.tensor([0.0, 0.1, 0.25, 0.6, 0.9])
    return Forward(z0.square().mean(), z0, t, targets, loss, decoder.decode, **others), [weight]


@pytest.mark.parametrize(
    ("setting", "others"),
    [
        (Setting(ssim_loss_weight=3.0, ssim_loss_max_t=0.3, ssim_grad_scale=0.1), {}),
        (Setting(ssim_loss_weight=1.0, pixel_loss_weight=20.0, pixel_loss_max_t=0.6), {}),
        (Setting(ssim_loss_weight=1.0, ssim_grad_clamp=1e-5), {}),
        (Setting(ssim_loss_weight=1.0), {"is_target": torch.tensor([True, True, False, True, True])}),
        (Setting(ssim_loss_weight=1.0), {"sizes": [(24, 24), (20, 24), (24, 16), (12, 12), (24, 24)]}),
        (Setting(), {}),
    ],
)
def test_the_expected_gradient_is_the_losss_own(decoder: torch.nn.Module, setting: Setting, others: dict[str, Any]) -> None:
    loss = DecodedLoss(**{name: getattr(setting, name) for name in Setting.__dataclass_fields__})
    forward, parameters = forward_of(decoder, loss, **others)
    found = expected(forward, setting, parameters)
    result = forward.auxiliary()
    (mine,) = torch.autograd.grad(forward.main + result.total, parameters)
    assert found.total_norm == pytest.approx(mine.norm().item(), rel=1e-5)
    assert cosine([mine], found.gradients) == pytest.approx(1, abs=1e-7)
    assert found.active_fraction == result.ssim_active_fraction
    if result.loss_ssim is not None:
        assert found.loss_ssim == pytest.approx(result.loss_ssim.item(), rel=1e-5)


def test_plain_ssim_is_the_definition() -> None:
    x, y = np.random.default_rng(0).random((2, 3, 16, 20))
    assert plain_ssim(torch.from_numpy(x)[None], torch.from_numpy(y)[None]).item() == pytest.approx(ssim_reference(x, y), abs=1e-12)


# -- measurements, each on the bundled task and on faults of its own


def weights(found: Case) -> Iterator[Check]:
    return networks.check_weights(made(found))


def samples(found: Case) -> Iterator[Check]:
    task = made(found)
    return networks.check_samples(task, SmokeTest(), task.sample(0))


def pairs(found: Case) -> Iterator[Check]:
    task = made(found)
    return images.check_pairs(task.sample(0), images.look(task))


def training_images(found: Case) -> Iterator[Check]:
    task = made(found)
    return images.check_training_images(task, 60, task.sample(0), None)


def losses(found: Case) -> Iterator[Check]:
    return images.check_losses(images.look(made(found)))


def decoding(found: Case) -> Iterator[Check]:
    return learning.check_decoder(made(found))


def precision(found: Case) -> Iterator[Check]:
    return steps.check_ssim(made(found))


def parameters(found: Case) -> Iterator[Check]:
    return steps.check_parameters(steps.Probe(subject_of(found), found.baseline))


def learning_steps(found: Case) -> Iterator[Check]:
    return learning.check_learning(subject_of(found), found.baseline, SmokeTest())


def inference(found: Case) -> Iterator[Check]:
    task = made(found)
    yield from sampling.check_sampling(task, task.sample(0))
    yield from images.check_samples(task.sample(0), images.look(task))


def draws(found: Case) -> Iterator[Check]:
    task = made(found)
    return images.check_draws(task, images.look(task))


def predictions(found: Case) -> Iterator[Check]:
    task = made(found)
    yield from flow.check_prediction(task)
    yield from flow.check_time(task)


def main_losses(found: Case) -> Iterator[Check]:
    task = made(found)
    yield from flow.check_main_loss(task)
    yield from flow.check_kernels(task)


def noise(found: Case) -> Iterator[Check]:
    task = made(found)
    seen = images.look(task)
    yield from flow.check_noise(seen)
    yield from flow.check_held_out(task.sample(0), seen)


def target_images(found: Case) -> Iterator[Check]:
    task = made(found)
    return targets.check_targets(task, images.look(task))


def first_updates(found: Case) -> Iterator[Check]:
    return updates.check_updates(subject_of(found), found.baseline)


def gates(found: Case) -> Iterator[Check]:
    task = made(found)
    return launch.check_gates(task, None, found.settings, found.steps, [NormRatio()])


FAULTS: list[tuple[Callable[[Case], Iterator[Check]], list[str]]] = [
    (
        weights,
        ["half the tensors missing, tolerant loader", "the EMA was loaded for the raw weights", "one layer is random in the file"],
    ),
    (
        main_losses,
        [
            "the main loss has one channel",
            "the main loss compares with the batch's mean",
            "the gate gets t before its shift",
            "kernels in the file are transposed",
        ],
    ),
    (samples, ["the EMA is noise on the raw weights"]),
    (losses, ["low-resolution inputs are exchanged in training"]),
    (decoding, ["functional dropout in decode()", "the decoder returns its images in reversed order"]),
    (precision, ["SSIM in bfloat16, inside the loss", "images rounded to bfloat16 before SSIM"]),
    (pairs, ["the loss takes [-1, 1] for [0, 1]", "targets are shuffled within the batch"]),
    (training_images, ["training reaches over all the held-out part", "training sees the held-out part mirrored"]),
    (
        parameters,
        ["grad_scale is echoed but not applied", "ssim_loss_max_t is dropped, and echoed", "SSIM in bfloat16, inside the step"],
    ),
    (learning_steps, ["the autoencoder is trained", "part of the denoiser is frozen"]),
    (gates, ["max_t so small that no step is active"]),
    (inference, ["inference returns the truth", "inference draws new noise every time", "the condition is in [0, 1] in inference"]),
    (draws, ["every step has the same noise and t", "the loader is not seeded"]),
    (predictions, ["z0 has the wrong sign of the velocity", "the network is told always 0.5"]),
    (noise, ["the noise is the same for all images of a batch", "the condition is empty in training"]),
    (target_images, ["the targets are 1 pixels beside the crop", "the targets are blurred"]),
    (
        first_updates,
        [
            "inference uses a stale copy of the weights",
            "inference leaves the averaged weights in the network",
            "the gradient is ascended",
            "the gradients are one step old",
        ],
    ),
]


@pytest.mark.parametrize(("measure", "name"), [(measure, name) for measure, names in FAULTS for name in names])
def test_a_fault_is_blamed_on_its_cause(measure: Callable[[Case], Iterator[Check]], name: str, tmp_path: Path) -> None:
    with case(name, tmp_path) as broken:
        found = bad(measure(broken))
    assert any(name.startswith(cause) for name in found for cause in broken.blamed), found


@pytest.mark.parametrize(
    ("name", "blamed"),
    [
        ("bundled VAE: the KL has the wrong sign", "parameter/kl_alpha"),
        ("bundled VAE: the KL is annealed over three million steps", "parameter/kl_alpha"),
        ("bundled flow: all micro-batches are the same", "data/micro_batches"),
    ],
)
def test_a_fault_without_a_forward_pass_is_blamed_on_its_cause(name: str, blamed: str, tmp_path: Path) -> None:
    with case(name, tmp_path) as broken:
        subject = Subject(broken.task, {"steps": broken.steps, **broken.config}, 0, "cpu", {"lr": 0.0})
        late = launch.check_last_step(subject, broken.baseline, broken.settings, broken.steps)
        assert bad(itertools.chain(late, learning.check_learning(subject, broken.baseline, None))) == [blamed]


@pytest.mark.parametrize("measure", [measure for measure, _ in FAULTS])
def test_the_bundled_task_has_no_fault(measure: Callable[[Case], Iterator[Check]]) -> None:
    found = list(measure(Case()))
    assert {check.status for check in found} <= {"ok", "unknown"}, [check for check in found if check.status != "ok"]
    assert any(check.status == "ok" for check in found)


SCHEDULES = [
    {"ssim_loss_weight": {"adaptive": {"target_ratio": 2.0}}},
    {"ssim_loss_weight": {"cosine": {"start": 9, "end": 1, "steps": 40}}},
]


class AtFullWeight(FundusSR):
    """Echoes a schedule and a warm-up, and trains with the constant weight 1."""

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        weight = 1.0 if isinstance(config.get("ssim_loss_weight"), Mapping) else config.get("ssim_loss_weight", 0.0)
        super().setup({**config, "ssim_loss_weight": weight, "ssim_warmup_steps": 0.0}, seed, device)
        self.asked = {name: config[name] for name in ("ssim_loss_weight", "ssim_warmup_steps") if name in config}

    def effective(self) -> dict[str, Any]:
        return {**super().effective(), **self.asked}


@pytest.mark.parametrize(("task", "status"), [(FundusSR, "ok"), (AtFullWeight, "bad_setup")])
def test_schedules_and_a_warm_up_are_checked_by_their_effect(task: type, status: str) -> None:
    probe = steps.Probe(subject_of(Case(task)), BASELINE, [*SCHEDULES, {"ssim_warmup_steps": 20.0}])
    found = {check.name: check.status for check in steps._changing_weights(probe)}
    names = ("ssim_warmup_steps", "ssim_loss_weight.adaptive", "ssim_loss_weight.cosine")
    assert found == {f"parameter/{name}": status for name in names}


def test_every_further_dimension_of_a_space_reaches_the_loss() -> None:
    """The lines of docs/spaces.md."""
    lines = {
        "pixel_loss_weight": {"choice": [0, 0.05]},
        "pixel_loss_max_t": {"choice": [0.1, 0.3]},
        "ssim_warmup_steps": {"choice": [0, 50]},
        "ssim_grad_clamp": {"log_uniform": [1e-6, 1e-3]},
    }
    space = load_space({"name": "s", "parameters": {"gain": {"log_uniform": [1, 30]}, "lr": {"choice": [1e-3, 1e-2]}, **lines}})
    probe = steps.Probe(subject_of(Case()), BASELINE, settings_of(space))
    found = {check.name: check.status for check in steps.check_parameters(probe)}
    assert {name: found[f"parameter/{name}"] for name in lines} == dict.fromkeys(lines, "ok")
    assert bad(launch.check_settings(subject_of(Case()), BASELINE, settings_of(space))) == []  # the learning rate


def test_every_defect_that_the_issue_lists_is_in_the_matrix() -> None:
    assert sum(listed for listed, _ in DEFECTS.values()) >= 12 and len(DEFECTS) >= 80
    assert {name for _, names in FAULTS for name in names} <= DEFECTS.keys()


def test_set_ups_that_the_checks_were_not_tuned_on_are_many() -> None:
    assert sum(name in DEFECTS for name in UNSEEN) >= 15 and sum(name in HEALTHY for name in UNSEEN) >= 40
    assert sum(name in DEFECTS for name in UNSEEN_2) >= 50 and sum(name in HEALTHY for name in UNSEEN_2) >= 60


def test_fresh_layers_are_those_that_were_never_trained() -> None:
    task = made(Case())
    assert networks.fresh_layers(task.model) == networks.fresh_layers(task.vae) == []
    untouched = Denoiser()
    layers = [m for m in untouched.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert len(networks.fresh_layers(untouched)) == len(layers)


@pytest.mark.parametrize(
    "turned", [lambda x: x, lambda x: x.flip(-1), lambda x: x.transpose(-1, -2), lambda x: x.flip(-2).transpose(-1, -2)]
)
def test_shared_patches_are_found_at_any_place_and_in_any_orientation(turned: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(1, 3, 80, 80, generator=generator)
    held_out, apart = photo[..., 30:62, 5:37], torch.rand(2, 3, 40, 40, generator=generator)
    training = turned(photo[..., 20:60, 0:40])  # 12 rows and columns beyond, so off every grid
    assert leakage.shared_patches(training, held_out)[0][0] > 0
    assert leakage.shared_patches(apart, held_out)[0] == [0, 0]
    assert leakage.shared_patches(torch.full((2, 3, 40, 40), 0.5), torch.full((1, 3, 40, 40), 0.5)) == ([0, 0], [0, 0])


@pytest.mark.parametrize(
    "altered",
    [
        lambda x: 0.7 * x + 0.05,
        lambda x: x**1.5,
        lambda x: x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4)),
        lambda x: (x + x.roll(1, -1)) / 2,
    ],
)
def test_altered_copies_are_found_and_disjoint_crops_are_not(altered: Callable[[Tensor], Tensor]) -> None:
    photo = load_fundus_images("coffee", 48).train
    crops = torch.stack([photo[:, y : y + 48, x : x + 48] for y in range(0, 240, 48) for x in range(0, 480, 48)])
    inside = photo[:, 100:148, 200:248][None]
    assert max(match.score for match in leakage.altered_copies(crops, altered(inside).clamp(0, 1))) > rules.MAX_OF_ONE
    scores = [match.score for match in leakage.altered_copies(crops[:30], altered(crops[40:]).clamp(0, 1))]
    assert rules.altered_overlap(scores, 10).status == "ok"


def test_round_trip_targets_leave_no_push_at_a_perfect_prediction() -> None:
    subject = subject_of(Case())
    raw = next(targets.check_round_trip(subject.make(BASELINE), {}))
    assert raw.status == "ok" and raw.evidence["share"] > rules.MAX_RAW_SHARE and "`roundtrip` follows" in raw.sentence
    forward = subject.make({**BASELINE, "target": "roundtrip"}).forward(1)
    perfect = replace(forward, z0=forward.clean.clone().requires_grad_())
    loss = replace(forward.loss, ssim_loss_weight=1.0, ssim_loss_max_t=1.0)
    assert perfect.auxiliary(loss).total.item() == pytest.approx(0, abs=1e-5)
    assert perfect.auxiliary(replace(loss, target="raw")).total.item() > 0.05
    read = {check.name: check.status for check in parameters(Case(config={"target": "roundtrip"}))}
    assert read["gradient/ssim"] == read["gradient/pixel"] == "ok"


# -- an SSIM of one's own


@pytest.mark.parametrize(
    ("similarity", "status", "words"),
    [
        (ssim_with(uniform(7)), "unknown", "another form of SSIM"),
        (lambda x, y: 0.5 + 0.5 * plain_ssim(x, y), "ok", "so is the recorded loss"),
        (lambda x, y: 2 - plain_ssim(x, y), "bad_setup", "opposite sign"),
        (ssim_with(gaussian(11, 1.5), 255.0), "bad_setup", "0.0"),
        (lambda x, y: plain_ssim(x, y.roll(3, -1)), "bad_setup", "targets moved 3 pixels right"),
        (lambda x, y: plain_ssim(x.bfloat16(), y.bfloat16()).float(), "bad_setup", "not that of SSIM in float32"),
    ],
)
def test_an_ssim_of_ones_own_is_told_from_a_broken_one(similarity: Any, status: str, words: str) -> None:
    found = {check.name: check for check in parameters(Case(stepping(similarity)))}
    assert found["gradient/ssim"].status == status and words in found["gradient/ssim"].sentence, found["gradient/ssim"]


# -- whole reports


def test_the_bundled_set_up_is_sound_and_wholly_known() -> None:
    study = load_study({"task_config": SMALL, "baseline": {name: value for name, value in BASELINE.items() if "ssim" not in name}})
    report = run_preflight(study, device="cpu")
    assert report.status == "ok", report.reason
    assert not report.of("unknown")


def test_a_check_that_costs_too_much_is_unknown_with_its_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ALWAYS_S", 0.0)
    report = preflight_task(FundusSR, SMALL, baseline=BASELINE, device="cpu", runs=2, max_share=1e-9)
    assert report.status == "ok", report.reason
    skipped = {check.name: check for check in report.checks if cost.ESTIMATE in check.evidence}
    for name in ("forward", "smoke", "flow/z0", "flow/time", "sampling", "ssim/precision", "parameter", "update", "trained"):
        assert skipped[name].status == "unknown" and skipped[name].evidence[cost.ESTIMATE] > 0
    free = {check.name for check in report.checks if check.status == "ok"}
    assert {"setup", "weights/denoiser", "data/inputs", "data/overlap", "seeds", "gate"} <= free
    lines = preflight_lines(report.to_dict())
    assert all(any(f"{name}: not run: it would take about" in line for line in lines) for name in skipped)


def test_the_limit_of_a_check_is_a_share_of_the_study_and_never_short() -> None:
    budget = cost.Budget(subject_of(Case()), steps=100, runs=10, max_share=0.05, seconds={"step": 1.0, "sample": 20.0})
    assert budget.study_s == 1000
    assert budget.refusal("x", sample=2) is None  # 40 of 50 s
    refused = budget.refusal("x", sample=3)
    assert refused is not None and refused.evidence == {"estimated_s": 60.0, "share": 0.06}
    budget.subject.setup_s.extend([9.0, 2.0])
    assert budget.study_s == 1020 and budget.refusal("x", setup=7) is None
    assert replace(budget, steps=10).refusal("x", step=15) is None  # no more than 15 s
    assert replace(budget, max_share=None).refusal("x", sample=1000) is None


def test_what_preflight_looked_at_is_a_picture(tmp_path: Path) -> None:
    album = Album()
    with case("the targets are 4 pixels beside the crop", tmp_path) as broken:
        task = made(broken)
        album.sample, album.seen, album.training_images = task.sample(0), images.look(task), task.training_images(1)
    assert album.seen is not None and album.seen.flow.shape == (len(album.seen.all_targets), 2)
    assert targets.fit_of_shifts(album.training_images, album.seen.all_targets[:4]).argmax() == 8 * 17 + 8 + 4
    titles = [title for title, _ in picture.rows_of(album)]
    assert len(titles) == 8 and titles[0] == "training images of step 1" and titles[-1] == "held out: samples of step 0"
    album.sample.images[0, :, :4] = math.nan
    drawn = picture.draw(album, [rules.tokens(9, 1, 0, 9, 9), step_rules.step_gradient("ssim", 1.0, 1.0, -1.0)])
    assert Image.open(io.BytesIO(drawn)).size[0] > 1000
    assert picture.draw(Album(training_images=album.training_images), []).startswith(b"\x89PNG")
    assert picture.draw(Album(), []) == b""


def test_the_table_says_every_check_and_every_remedy() -> None:
    report = Report((Check("setup", "ok", "it sets up"), rules.tokens(9, 1, 0, 9, 9), unknown("gate", "no law of t")))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(preflight_table(report.to_dict(), ascii_only=True))
    text = " ".join(console.export_text().split())
    for check in report.checks:
        assert check.name in text and check.status in text and check.sentence in text and check.remedy in text


def test_a_task_without_hooks_gets_unknown_and_never_a_false_ok() -> None:
    report = preflight_task(SmallTask, {}, settings=[{"ssim_loss_max_t": 0.3}], baseline={"ssim_loss_weight": 0.0}, device="cpu")
    assert report.status == "ok", report.reason
    status = {check.name: check.status for check in report.checks}
    assert status["setup"] == status["smoke/raw"] == status["parameter/unknown"] == "ok"
    for name in ("weights", "loss/main", "ssim/precision", "gate", "time_law", "trained", "frozen/decoder"):
        assert status[name] == "unknown", name


@pytest.mark.parametrize(
    ("fault", "blamed"),
    [("ruined_start", "smoke/raw"), ("drops_weight", "parameter/ssim_loss_weight")],
)
def test_what_a_task_without_hooks_shows_is_judged(fault: str, blamed: str) -> None:
    report = preflight_task(SmallTask, {"fault": fault}, baseline={"ssim_loss_weight": 0.0}, device="cpu")
    assert report.status == "bad_setup" and blamed in [check.name for check in report.of("bad_setup")]


class Deaf(SmallTask):
    """Says that the weight is in force, and does not use it."""

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        super().setup(config, seed, device)
        self.gain = 0.0


def test_a_dropped_weight_is_seen_without_a_forward_pass() -> None:
    report = preflight_task(Deaf, {}, baseline={"ssim_loss_weight": 0.0}, device="cpu")
    assert "parameter/ssim_loss_weight" in [check.name for check in report.of("bad_setup")]


class Climbing(SmallTask):
    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        super().setup(config, seed, device)
        self.config["lr"] = -self.config.get("lr", 0.1)


class Unseeded(SmallTask):
    """Whatever the seed, no step is like the one before it, in any object of the process."""

    steps_of_all = itertools.count(1)

    def step(self) -> dict[str, float | Tensor]:
        found = super().step()
        return {**found, "loss": found["loss"] * next(self.steps_of_all)}


@pytest.mark.parametrize(("task", "blamed"), [(SmallTask, []), (Climbing, ["update/descent"]), (Unseeded, ["seeds/same"])])
def test_steps_are_compared_without_a_forward_pass(task: type, blamed: list[str]) -> None:
    found = Subject(task, {}, 0, "cpu", {"lr": 0.0})
    checks = [
        *guarded("seeds", lambda: launch.check_seeds(found, {})),
        *guarded("update", lambda: updates.check_updates(found, {})),
    ]
    assert bad(iter(checks)) == blamed, checks


def test_failures_inside_the_task_are_findings_and_mistakes_are_not() -> None:
    def failing(self: FundusSR) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    report = preflight_task(variant(step=failing), SMALL, baseline=BASELINE, device="cpu")
    assert (
        report.status == "bad_setup"
        and "step() failed: RuntimeError: CUDA error: out of memory" in report.of("bad_setup")[-1].sentence
    )

    def broken(self: FundusSR, *_: Any) -> None:
        raise KeyError("vae")

    report = preflight_task(variant(setup=broken), {}, device="cpu")
    (check,) = report.checks
    assert (check.name, check.status) == ("setup", "bad_setup")
    assert check.sentence.startswith("setup() failed: KeyError: 'vae' (test_preflight.py:")
    with pytest.raises(UserError, match="unknown key 'presett'"):
        preflight_task(FundusSR, {"presett": "sgd"}, device="cpu")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"decode": lambda z: z.reshape(7, 7)}, r"decode\(\) failed: RuntimeError: shape .* \(test_preflight.py:"),
        (
            {"decode": lambda z: z.reshape(1, 4, 8, 8)},
            r"decode\(\) failed: RuntimeError: shape .* \(test_preflight.py:",
        ),  # not of one latent
        ({"targets": torch.zeros(1, 3, 8, 8)}, r"forward\(\) failed: IndexError"),
    ],
)
def test_a_decoder_that_fails_is_one_finding(change: dict[str, Any], sentence: str) -> None:
    task = variant(forward=lambda self, n: replace(FundusSR.forward(self, n), **change))
    (check,) = preflight_task(task, SMALL, baseline=BASELINE, device="cpu").checks
    assert (check.name, check.status) == ("setup", "bad_setup") and re.match(sentence, check.sentence), check


def test_what_a_space_may_launch() -> None:
    settings = settings_of(load_space("wide"))
    assert {setting["ssim_loss_max_t"] for setting in settings if "ssim_loss_max_t" in setting} == {0.1, 0.2, 0.3, 1.0}
    relative = load_space(
        {"name": "r", "parameters": {"gain": {"unit": "norm_ratio", "log_uniform": [1.0, 1.5]}, "lr": {"uniform": [0.001, 0.01]}}}
    )
    assert [setting.get("lr") for setting in settings_of(relative)] == [0.001, 0.01]
