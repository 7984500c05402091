"""Runs a Lightning training as a trial.

with tune_ssim.trial_context(ssim_loss_weight=0.0, lr=1e-4) as t:
    trainer = Trainer(max_steps=t.steps or 10_000, callbacks=[TrialCallback(t, samples=generate)])
    trainer.fit(MyModule(t.config), loader)
    t.held_out(**evaluate(module))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as missing:
    if missing.name not in ("lightning", "lightning.pytorch"):
        raise
    from pytorch_lightning import Callback  # the older name of the package

from tune_ssim.integrations.reporting import MakeSamples, Reporting
from tune_ssim.probes import total_norm
from tune_ssim.trials.push import TrialContext

__all__ = ["TrialCallback"]


NOT_OF_A_STEP = ("val", "test")  # Lightning keeps the last validation's metrics among those of every step


class TrialCallback(Callback):
    """Reports every optimiser step: `loss`, `total_norm` of the whole gradient before clipping, `lr`, and the metrics that the
    module logs for the step (`self.log("ssim_active_fraction", …)`), except names with a slash or starting with val or test. When
    the trial is over, the fit ends as with early stopping. Outside a study it does nothing.

    samples: inference by the module, see `MakeSamples`.

    With several micro-batches per step, `loss` is their mean. With several optimisers per batch, squared norms are added. Gradients
    may be sharded with FSDP2 (see `probes.total_norm`). With FSDP1 and DeepSpeed the whole gradient is not visible."""

    def __init__(self, trial: TrialContext, samples: MakeSamples | None = None) -> None:
        self.reporting = Reporting(trial, samples)
        self._squares: list[torch.Tensor] = []  # squared norms of this step, one per optimiser
        self._losses: list[torch.Tensor] = []  # losses of its micro-batches

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        stop = self.reporting.start(trainer.global_step, pl_module, trainer.strategy.root_device)
        trainer.should_stop = trainer.should_stop or stop

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # Lightning clips after this hook; a GradScaler unscales before it.
        if self.reporting.is_active:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self._squares.append(total_norm(parameters).square())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        reporting = self.reporting
        if not reporting.is_active or reporting.pruned:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self._losses.append(loss.detach())
        if not self._squares:
            return  # a micro-batch: the optimiser has not stepped yet
        logged = trainer.callback_metrics.items()
        metrics: dict[str, Any] = {name: value for name, value in logged if "/" not in name and not name.startswith(NOT_OF_A_STEP)}
        if self._losses:
            # Lightning has already divided each by the number of micro-batches.
            metrics["loss"] = torch.stack(self._losses).sum()
        metrics["total_norm"] = torch.stack(self._squares).sum().sqrt()
        metrics.setdefault("lr", trainer.optimizers[0].param_groups[0]["lr"])
        self._squares, self._losses = [], []
        if reporting.send(trainer.global_step, metrics, pl_module, trainer.strategy.root_device):
            trainer.should_stop = True
