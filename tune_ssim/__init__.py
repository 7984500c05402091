"""Tunes an auxiliary image loss (SSIM first) for latent diffusion without ruining the model.

The public names load on first use (PEP 562), so `import tune_ssim` reads none of torch, ray, mlflow, optuna.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tune_ssim.base.lazy import load_on_first_use
from tune_ssim.version import __version__

if TYPE_CHECKING:
    from tune_ssim.cli.launch import run
    from tune_ssim.orchestration.trainable import make_trainable
    from tune_ssim.records import Record
    from tune_ssim.results.winner import best_safe
    from tune_ssim.study.space import load_space, resolve_settings
    from tune_ssim.study.study import load_study
    from tune_ssim.trials.push import TrialPruned, trial_context
    from tune_ssim.trials.training import Forward, Part, Sample, Task, Training
    from tune_ssim.trials.trial import Trial

__all__ = [
    "Forward",
    "Part",
    "Record",
    "Sample",
    "Task",
    "Training",
    "Trial",
    "TrialPruned",
    "__version__",
    "best_safe",
    "load_space",
    "load_study",
    "make_trainable",
    "resolve_settings",
    "run",
    "trial_context",
]

_MODULES = {
    "cli.launch": ("run",),
    "orchestration.trainable": ("make_trainable",),
    "records": ("Record",),
    "results.winner": ("best_safe",),
    "study.space": ("load_space", "resolve_settings"),
    "study.study": ("load_study",),
    "trials.push": ("TrialPruned", "trial_context"),
    "trials.trial": ("Trial",),
    "trials.training": ("Forward", "Part", "Sample", "Task", "Training"),
}
__getattr__, __dir__ = load_on_first_use(__name__, _MODULES)
