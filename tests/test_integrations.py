"""The real trainers, one after the other, inside a trial's channel: what they report, that nothing of the training changes,
and that a verdict ends them. Lightning comes with the `test` extra; the others are large, and tested where installed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tune_ssim
from tune_ssim import Sample
from tune_ssim.trials.channel import VARIABLE, TrialEnd

ROOT = Path(__file__).resolve().parents[1]
STEPS, CLIP, LR, MICRO_BATCHES = 6, 0.05, 0.1, 2
CONFIG = {"ssim_loss_weight": 0.5}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.0), nn.Conv2d(4, 3, 3, padding=1))


def pictures() -> Tensor:
    """`[steps * micro-batches, 2, 3, 12, 12]`."""
    return torch.rand(STEPS * MICRO_BATCHES, 2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, batch: Tensor, weight: float) -> Tensor:
    return functional.mse_loss(model(batch), batch) + weight * (model(batch).mean() - 0.5).square()


def generate(model: nn.Module) -> Sample:
    """Would disturb the training if it were called as it is: batch statistics and the global generator."""
    assert not model.training and not torch.is_grad_enabled()
    start = torch.rand(2, 3, 12, 12)
    net = getattr(model, "net", model)
    return Sample(net(start).clamp(0, 1), references=start)


def by_hand(steps: int = STEPS) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The same training as a plain loop: loss and total_norm of each step, and the weights at the end."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    found, data = [], pictures()
    for n in range(steps):
        optimizer.zero_grad()
        losses = []
        for batch in data[n * MICRO_BATCHES : (n + 1) * MICRO_BATCHES]:
            loss = loss_of(model, batch, CONFIG["ssim_loss_weight"])
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.item())
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        found.append({"loss": sum(losses) / MICRO_BATCHES, "total_norm": norm.item(), "lr": LR, "ssim_active_fraction": 0.25})
    return found, model.state_dict()


@dataclass
class Ended:
    """What a trainer left behind."""

    model: nn.Module
    steps: int


def with_lightning(t: Any, folder: Path) -> Ended:
    lightning = pytest.importorskip("lightning.pytorch")
    from tune_ssim.integrations.lightning import TrialCallback

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            self.log("ssim_active_fraction", 0.25)
            self.log("debug/kernel", self.net[0].weight.mean())
            self.log("val_loss", 1.0)
            return loss_of(self.net, batch, t.config["ssim_loss_weight"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        gradient_clip_val=CLIP,
        accumulate_grad_batches=MICRO_BATCHES,
        callbacks=[TrialCallback(t, samples=generate)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(list(pictures()), batch_size=None))
    return Ended(module.net, trainer.global_step)


def with_transformers(t: Any, folder: Path) -> Ended:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from tune_ssim.integrations.huggingface import TrialCallback

    callback = TrialCallback(t, samples=generate)

    class Trainer(transformers.Trainer):  # type: ignore[name-defined,misc]
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: Any) -> Tensor:
            callback.add(ssim_active_fraction=0.25)
            return loss_of(model, inputs["pictures"], t.config["ssim_loss_weight"])

    model = network()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=MICRO_BATCHES,
        max_grad_norm=CLIP,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="no",
        report_to="none",
        logging_steps=500,
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=list(pictures()),  # type: ignore[arg-type]
        data_collator=lambda rows: {"pictures": rows[0]},
        callbacks=[callback],
    )
    trainer.train()
    return Ended(model, trainer.state.global_step)


def with_accelerate(t: Any, folder: Path) -> Ended:
    accelerate = pytest.importorskip("accelerate")
    from tune_ssim.integrations.accelerate import AcceleratedTrial

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    reporter = AcceleratedTrial(accelerator, t, samples=generate)
    module = network()
    loader = torch.utils.data.DataLoader(list(pictures()), batch_size=None)
    model, optimizer, loader = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=LR), loader)
    step, losses = 0, []
    reporter.start(model)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = loss_of(model, batch, t.config["ssim_loss_weight"])
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            mean, losses = sum(losses) / len(losses), []
            if reporter.report(model, step=step, loss=mean, total_norm=norm, lr=LR, ssim_active_fraction=0.25, loss_ssim=None):
                break
    return Ended(module, step)


Train = Callable[[Any, Path], Ended]
TRAINERS = pytest.mark.parametrize(
    "train", [with_lightning, with_transformers, with_accelerate], ids=lambda train: train.__name__[5:]
)


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrialEnd:
    """The judging side of a channel; the environment is that of a training which a study has started."""
    end = TrialEnd(tmp_path / "channel")
    end.open(CONFIG, seed=3, smoke_at=(0, 2), steps=STEPS)
    monkeypatch.setenv(VARIABLE, str(end.folder))
    return end


@TRAINERS
def test_every_step_is_reported_as_a_plain_loop_has_it(train: Train, trial: TrialEnd, tmp_path: Path) -> None:
    with tune_ssim.trial_context(ssim_loss_weight=0.0) as t:
        ended = train(t, tmp_path)
    steps = [message for message in trial.read() if message.get("step") and "loss" in message]
    expected, weights = by_hand()
    assert [message["step"] for message in steps] == list(range(1, STEPS + 1)) and ended.steps == STEPS
    for message, numbers in zip(steps, expected, strict=True):
        assert message["total_norm"] > CLIP  # it was clipped, and is told as it was before
        for name, value in numbers.items():
            assert math.isclose(message[name], value, rel_tol=1e-5), (message, numbers)
        assert message.keys() == {"step", *numbers}
    for name, weight in ended.model.state_dict().items():
        torch.testing.assert_close(weight, weights[name])


@TRAINERS
def test_samples_go_out_when_they_are_due(train: Train, trial: TrialEnd, tmp_path: Path) -> None:
    torch.manual_seed(11)
    with tune_ssim.trial_context(ssim_loss_weight=0.0) as t:
        train(t, tmp_path)
    samples = [message for message in trial.read() if "smoke/reference_psnr" in message]
    assert [message["step"] for message in samples] == [0, 2, STEPS]
    assert all(trial.image(step) for step in (0, 2, STEPS))


@TRAINERS
def test_a_verdict_ends_the_training_gracefully(train: Train, trial: TrialEnd, tmp_path: Path) -> None:
    """The verdict falls while the training is at step 3, by the hand of its own report."""
    with tune_ssim.trial_context(ssim_loss_weight=0.0) as t:
        report = t.report

        def judged(**metrics: Any) -> None:
            if metrics["step"] == 3:
                trial.close("pruned", "total_norm is 12x the baseline's")
            report(**metrics)

        t.report = judged  # type: ignore[method-assign]
        ended = train(t, tmp_path)
        assert ended.steps == 3
        with pytest.raises(tune_ssim.TrialPruned, match="12x the baseline's"):
            t.raise_if_over()
    steps = [message["step"] for message in trial.read() if "loss" in message]
    assert steps == [1, 2, 3]


@TRAINERS
def test_a_loss_that_is_not_finite_is_told_as_it_is(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = TrialEnd(tmp_path / "channel")
    trial.open({"ssim_loss_weight": math.nan}, seed=3, smoke_at=(), steps=STEPS)
    monkeypatch.setenv(VARIABLE, str(trial.folder))
    with tune_ssim.trial_context() as t:
        train(t, tmp_path)
    steps = [message for message in trial.read() if "loss" in message]
    assert len(steps) == STEPS and all(math.isnan(message["loss"]) for message in steps)


@TRAINERS
def test_outside_a_study_nothing_happens(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with tune_ssim.trial_context(**CONFIG) as t:
        ended = train(t, tmp_path)
    _, weights = by_hand()
    assert ended.steps == STEPS
    for name, weight in ended.model.state_dict().items():
        torch.testing.assert_close(weight, weights[name])


def test_all_ranks_stop_at_the_same_step(trial: TrialEnd, tmp_path: Path) -> None:
    """Two processes of which one alone sees the trial's folder, as on two machines: the other hears of the verdict from it."""
    code = """
import sys, torch
from torch import distributed, nn
from tune_ssim import trial_context
from tune_ssim.integrations.reporting import Reporting
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
with trial_context() as t:
    reporting, model, device = Reporting(t, None), nn.Linear(1, 1), torch.device("cpu")
    assert not reporting.start(0, model, device)
    print(t.is_active, next(n for n in range(1, 9) if reporting.send(n, {"loss": 1.0}, model, device)), reporting.pruned)
"""
    trial.close("pruned", "total_norm is 12x the baseline's")
    alone = {name: value for name, value in os.environ.items() if name != VARIABLE} | {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "rendezvous")],
            cwd=ROOT,
            env={**alone, **({VARIABLE: str(trial.folder)} if rank == 0 else {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=200)[0].strip() for process in ranks]
    assert said == ["True 1 pruned: total_norm is 12x the baseline's", "False 1 the trial is over on another rank"]
