"""A training run as a stream of records, and readers of other people's logs."""

from tune_ssim.records.record import (
    ACTIVE_FRACTION,
    EPOCH,
    LOSS,
    LOSS_FLOW,
    LOSS_PIXEL,
    LOSS_SSIM,
    LR,
    NORM_RATIO,
    SMOKE,
    SMOKE_AGAIN,
    STEP_SKIPPED,
    TOTAL_NORM,
    TOTAL_NORM_MAIN,
    Record,
    is_of_training,
    merge,
)

__all__ = [
    "ACTIVE_FRACTION",
    "EPOCH",
    "LOSS",
    "LOSS_FLOW",
    "LOSS_PIXEL",
    "LOSS_SSIM",
    "LR",
    "NORM_RATIO",
    "SMOKE",
    "SMOKE_AGAIN",
    "STEP_SKIPPED",
    "TOTAL_NORM",
    "TOTAL_NORM_MAIN",
    "Record",
    "is_of_training",
    "merge",
]
