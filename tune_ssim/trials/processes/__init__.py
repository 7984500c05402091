"""Runs commands so that none of their processes outlives its owner, however the owner ends."""

from tune_ssim.trials.processes.output_log import OutputLog, quote_of
from tune_ssim.trials.processes.supervised import SupervisedProcess

__all__ = ["OutputLog", "SupervisedProcess", "quote_of"]
