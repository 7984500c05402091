"""Runs a transformers.Trainer as a trial.

with tune_ssim.trial_context(ssim_loss_weight=0.0) as t:
    arguments = TrainingArguments(max_steps=t.steps or 10_000, max_grad_norm=1.0, …)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[TrialCallback(t, samples=generate)])
    trainer.train()
    t.held_out(**evaluate(model))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from tune_ssim.integrations.reporting import MakeSamples, Reporting
from tune_ssim.trials.push import TrialContext

__all__ = ["TrialCallback"]


class TrialCallback(TrainerCallback):
    """Reports every optimiser step: `loss`, `total_norm` (the trainer's `grad_norm`, measured before clipping), `lr`, and metrics
    passed to `add`. When the trial is over, the training ends as with early stopping. Outside a study it does nothing.

    Within a study it makes the trainer log every step, since the norm is reported only there, and lets NaN and Inf through
    (`logging_nan_inf_filter` would replace them with the mean of earlier steps).

    samples: inference by the model, see `MakeSamples`."""

    def __init__(self, trial: TrialContext, samples: MakeSamples | None = None) -> None:
        self.reporting = Reporting(trial, samples)
        self._added: dict[str, list[Any]] = {}

    def add(self, **metrics: float | torch.Tensor) -> None:
        """Adds metrics of the step in progress, e.g. from compute_loss(): ssim_active_fraction, loss_ssim. They are averaged over
        micro-batches."""
        if self.reporting.is_active:
            for name, value in metrics.items():
                self._added.setdefault(name, []).append(value.detach() if isinstance(value, torch.Tensor) else value)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.reporting.start(state.global_step, model, args.device):
            control.should_training_stop = True
        if self.reporting.is_active:
            args.logging_nan_inf_filter = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._added = {}  # of an evaluation, which calls compute_loss() too

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.reporting.is_active:
            control.should_log = True
        if self.reporting.pruned:
            control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, model: Any = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs or not self.reporting.is_active or self.reporting.pruned:
            return  # an evaluation, or the summary at the end
        metrics: dict[str, Any] = {name: sum(values) / len(values) for name, values in self._added.items()}
        self._added = {}
        metrics["loss"] = logs["loss"]
        for ours, theirs in (("total_norm", "grad_norm"), ("lr", "learning_rate")):
            if logs.get(theirs) is not None:
                metrics[ours] = logs[theirs]
        if self.reporting.send(state.global_step, metrics, model, args.device):
            control.should_training_stop = True
