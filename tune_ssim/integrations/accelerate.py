"""A loop of one's own with accelerate, as a trial.

with tune_ssim.trial_context(ssim_loss_weight=0.0) as t:
    reporter = AcceleratedTrial(accelerator, t, samples=generate)
    reporter.start(model)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)   # as it was before clipping
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
    """Like `t.report`, for several processes: all of them call it, and all of them hear at the same step that the trial is over.

    samples: given the model without its wrapper, images `[n, 3, H, W]` in [0, 1] from fixed inputs and fixed noise, or a
    `tune_ssim.Sample`; called at the steps of the study's smoke test, in eval() mode and without gradients."""

    def __init__(self, accelerator: Accelerator, trial: TrialContext, samples: MakeSamples | None = None) -> None:
        self.accelerator = accelerator
        self.reporting = Reporting(trial, samples)

    def start(self, model: Any, step: int = 0) -> bool:
        """Before the first step: samples of the weights as they are. `step`: steps taken before a resume. True: stop already."""
        return self.reporting.start(step, self.accelerator.unwrap_model(model), self.accelerator.device)

    def report(self, model: Any, *, step: int, **metrics: float | torch.Tensor | None) -> bool:
        """The numbers of one optimiser step as the main process has them; None is left out. True: the trial is over, leave the
        loop."""
        known = {name: value for name, value in metrics.items() if value is not None}
        return self.reporting.send(step, known, self.accelerator.unwrap_model(model), self.accelerator.device)
