"""Programs of other people, run so that nothing of them outlives their owner, whatever happens to it."""

from tune_ssim.trials.processes.output_log import OutputLog, quote_of
from tune_ssim.trials.processes.supervised import SupervisedProcess

__all__ = ["OutputLog", "SupervisedProcess", "quote_of"]
