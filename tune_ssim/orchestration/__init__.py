"""The phases of a study and their executors: Ray Tune, or this process. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tune_ssim.base.lazy import load_on_first_use

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

_MODULES = {
    "mlflow_callback": ("MLflowTracking",),
    "ray_search": ("BaselineFirst", "GuardedOptunaSearch", "StagedSearch", "param_space"),
    "trainable": ("make_trainable",),
}
__getattr__, __dir__ = load_on_first_use(__name__, _MODULES)
