"""Runs your own loop with accelerate as a trial.

with tune_ssim.trial_context(ssim_loss_weight=0.0) as t:
    reporter = AcceleratedTrial(accelerator, t, samples=generate)
    reporter.start(model)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)   # before clipping
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            if reporter.report(model, step=step, loss=loss, total_norm=norm):
                break
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from tune_ssim.integrations.reporting import MakeSamples, Reporting
from tune_ssim.trials.push import TrialContext

__all__ = ["AcceleratedTrial"]


class AcceleratedTrial:
    """Like `t.report`, for several processes. All must call it, and all learn at the same step that the trial is over.

    samples: inference by the unwrapped model, see `MakeSamples`."""

    def __init__(self, accelerator: Accelerator, trial: TrialContext, samples: MakeSamples | None = None) -> None:
        self.accelerator = accelerator
        self.reporting = Reporting(trial, samples)

    def start(self, model: Any, step: int = 0) -> bool:
        """Call before the first step: samples from the initial weights. `step`: steps taken before a resume. True: stop now."""
        return self.reporting.start(step, self.accelerator.unwrap_model(model), self.accelerator.device)

    def report(self, model: Any, *, step: int, **metrics: float | torch.Tensor | None) -> bool:
        """Reports one optimiser step with the main process's metrics, without those that are None. True: the trial is over, leave
        the loop."""
        known = {name: value for name, value in metrics.items() if value is not None}
        return self.reporting.send(step, known, self.accelerator.unwrap_model(model), self.accelerator.device)
