"""What all integrations share: report a step's metrics, send samples when due, and stop all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tune_ssim.trials.push import TrialContext, TrialPruned
from tune_ssim.trials.training import Sample

MakeSamples = Callable[[Any], "Sample | torch.Tensor"]
"""Inference by a model on fixed inputs and fixed noise: images `[n, 3, H, W]` in [0, 1], or a `tune_ssim.Sample`. Called in eval()
mode and without gradients, at the steps of the study's smoke test."""


class Reporting:
    """Reports from a trainer's callback to its trial. pruned: why the trial is over, or None."""

    def __init__(self, trial: TrialContext, samples: MakeSamples | None) -> None:
        self.trial, self.make_samples = trial, samples
        self.pruned: TrialPruned | None = None
        self.is_active = trial.is_active  # on any rank: the folder of a trial may be there on the first node only

    def start(self, step: int, model: Any, device: torch.device) -> bool:
        """Call before the training: samples from the initial weights. Returns whether to stop now."""
        self.is_active = any_rank(self.trial.is_active, device)
        return step == 0 and self._over(lambda: self._send_samples(0, model), device)

    def send(self, step: int, metrics: Mapping[str, Any], model: Any, device: torch.device) -> bool:
        """Reports one optimiser step, and samples if due. Returns whether to stop, the same on every rank."""

        def report() -> None:
            self.trial.report(step=step, **metrics)
            self._send_samples(step, model)

        return self._over(report, device)

    def _over(self, report: Callable[[], None], device: torch.device) -> bool:
        if not self.is_active:
            return False
        try:
            report()
        except TrialPruned as reason:
            self.pruned = reason
        # If one rank left alone, the others would hang in their next collective.
        if any_rank(self.pruned is not None, device) and self.pruned is None:
            self.pruned = TrialPruned("the trial is over on another rank")
        return self.pruned is not None

    def _send_samples(self, step: int, model: Any) -> None:
        if self.make_samples is None or not self.trial.due(step):
            return
        with looking_on(model):
            found = self.make_samples(model)
        self.trial.samples(found, step=step)


@contextmanager
def looking_on(model: Any) -> Iterator[None]:
    """Inference without side effects: no gradients, eval() mode restored afterwards, global generators restored."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank. A collective if the training is distributed."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return flag
    votes = torch.tensor(float(flag), device=device)
    distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
    return bool(votes.item())
