"""Tunes an auxiliary image loss (SSIM first) for latent diffusion without ruining the model.

The public names load on first use (PEP 562), so `import tune_ssim` reads none of torch, ray, mlflow, optuna.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

# Names here must differ from all submodules, since importing `tune_ssim.x` binds `x` to the module.
_MODULE_OF = {
    "Forward": "tune_ssim.trials.training",
    "Part": "tune_ssim.trials.training",
    "Record": "tune_ssim.records",
    "Sample": "tune_ssim.trials.training",
    "Task": "tune_ssim.trials.training",
    "Training": "tune_ssim.trials.training",
    "Trial": "tune_ssim.trials.trial",
    "TrialPruned": "tune_ssim.trials.push",
    "best_safe": "tune_ssim.results.winner",
    "load_space": "tune_ssim.study.space",
    "load_study": "tune_ssim.study.study",
    "make_trainable": "tune_ssim.orchestration.trainable",
    "resolve_settings": "tune_ssim.study.space",
    "run": "tune_ssim.cli.launch",
    "trial_context": "tune_ssim.trials.push",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access is a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
