"""The training of a trial, connected to MLflow where it logs there."""

from __future__ import annotations

from tune_ssim.tracking.mlflow_source import open_new_run
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.training import Training
from tune_ssim.trials.trial_run import TrialSpec


def make_training(spec: TrialSpec) -> Training:
    """Creates the training in this process. Connects commands to MLflow through `tracking`, which lower packages cannot import."""
    training = spec.make_training()
    if isinstance(training, CommandTask):
        training.open_mlflow = open_new_run
    return training
