"""Tunes an auxiliary image loss (SSIM first) for latent diffusion without ruining the model.

The public names load on first use (PEP 562), so `import tune_ssim` reads none of torch, ray, mlflow, optuna.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_ssim.orchestration.run_study import run
    from tune_ssim.orchestration.trainable import make_trainable
    from tune_ssim.push import TrialPruned, trial_context
    from tune_ssim.records import Record
    from tune_ssim.run_trial import Trial
    from tune_ssim.space import load_space, resolve_settings
    from tune_ssim.study import load_study
    from tune_ssim.tasks.task import Sample, Task
    from tune_ssim.winner import best_safe

__version__ = "0.1.0"

__all__ = [
    "Record",
    "Sample",
    "Task",
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

# A name here must differ from every submodule of this package: importing `tune_ssim.x` binds `x` to the module.
_MODULE_OF = {
    "Record": "tune_ssim.records",
    "Sample": "tune_ssim.tasks.task",
    "Task": "tune_ssim.tasks.task",
    "Trial": "tune_ssim.run_trial",
    "TrialPruned": "tune_ssim.push",
    "best_safe": "tune_ssim.winner",
    "load_space": "tune_ssim.space",
    "load_study": "tune_ssim.study",
    "make_trainable": "tune_ssim.orchestration.trainable",
    "resolve_settings": "tune_ssim.space",
    "run": "tune_ssim.orchestration.run_study",
    "trial_context": "tune_ssim.push",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access is a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
