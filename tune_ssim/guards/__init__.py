"""Guards: checks over a stream of records, without torch."""

from tune_ssim.guards.baseline import Baseline, BaselineRun
from tune_ssim.guards.divergence import Divergence
from tune_ssim.guards.epoch_mean import EpochMean
from tune_ssim.guards.first_value import FirstValue
from tune_ssim.guards.guard import Guard
from tune_ssim.guards.keep_rule import KeepRule, Margin, decades_beyond
from tune_ssim.guards.moving_mean import MovingMean
from tune_ssim.guards.non_finite import NonFinite
from tune_ssim.guards.norm_ratio import NormRatio, RequireTotalNorm
from tune_ssim.guards.rule import Rule
from tune_ssim.guards.smoke_test import SmokeTest
from tune_ssim.guards.threshold import Threshold
from tune_ssim.guards.trend import Trend
from tune_ssim.guards.violation import Violation
from tune_ssim.guards.watch import MissingMetric, Watch

__all__ = [
    "Baseline",
    "BaselineRun",
    "Divergence",
    "EpochMean",
    "FirstValue",
    "Guard",
    "KeepRule",
    "Margin",
    "MissingMetric",
    "MovingMean",
    "NonFinite",
    "NormRatio",
    "RequireTotalNorm",
    "Rule",
    "SmokeTest",
    "Threshold",
    "Trend",
    "Violation",
    "Watch",
    "decades_beyond",
]
