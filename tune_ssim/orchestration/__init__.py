"""The phases of a study and their executors: Ray Tune, or this process. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_ssim.orchestration.mlflow_callback import MLflowTracking
    from tune_ssim.orchestration.ray_search import BaselineFirst, GuardedOptunaSearch, StagedSearch, param_space
    from tune_ssim.orchestration.trainable import make_trainable

__all__ = [
    "BaselineFirst",
    "GuardedOptunaSearch",
    "MLflowTracking",
    "StagedSearch",
    "make_trainable",
    "param_space",
]

_MODULE_OF = {
    "BaselineFirst": "tune_ssim.orchestration.ray_search",
    "GuardedOptunaSearch": "tune_ssim.orchestration.ray_search",
    "MLflowTracking": "tune_ssim.orchestration.mlflow_callback",
    "StagedSearch": "tune_ssim.orchestration.ray_search",
    "make_trainable": "tune_ssim.orchestration.trainable",
    "param_space": "tune_ssim.orchestration.ray_search",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
