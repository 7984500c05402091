"""What a recorded setting is worth and whether it harms, from whole curves of all seeds and without the guards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import fmean, stdev

from curves import Curves, Run

RUINED_DB, RUINED_SSIM = -3.0, -0.03  # held out, against the baseline with the same seed; ruined settings lose more (FACTS §2)
DEGRADED_DB, DEGRADED_SSIM = -0.3, -0.005  # means over seeds; the default margins of a study, which judge single runs
USELESS = 0.1  # of the best mean improvement: below it a trial was a waste


@dataclass(frozen=True)
class Worth:
    """A setting over all recorded seeds. delta: mean improvement of the objective; deviation: its standard deviation. ruined: the
    share of the seeds that it ruins."""

    truth: str  # safe | degraded | ruined
    delta: float
    deviation: float
    delta_psnr: float
    ruined: float


class Truth:
    """metric: the one that is compared, `ssim` or what the header names; the larger the better."""

    def __init__(self, curves: Curves, snap: bool = False) -> None:
        self.curves, self.snap = curves, snap
        self.metric = str(curves.header.get("metric", "ssim"))
        self.of = lru_cache(maxsize=None)(self._of)
        worths = {setting: self.of(*setting) for setting in curves.settings}
        self.safe = {setting: worth for setting, worth in worths.items() if worth.truth == "safe"}
        self.best_setting = max(self.safe, key=lambda setting: self.safe[setting].delta, default=None)
        self.best = self.safe[self.best_setting].delta if self.best_setting else math.nan

    @property
    def helps(self) -> bool:
        """Whether any recorded setting is better than the baseline by more than twice its standard error."""
        if self.best_setting is None:
            return False
        best, n = self.safe[self.best_setting], len(self.curves.seeds)
        return best.delta > (2 * best.deviation / math.sqrt(n) if n > 1 else 0.0)

    def share(self, gain: float, max_t: float) -> float:
        """The mean improvement of a setting as a share of the best safe one of the grid."""
        return self.of(gain, max_t).delta / self.best

    def _of(self, gain: float, max_t: float) -> Worth:
        runs = [self.curves.play(gain, max_t, index, self.snap) for index in range(len(self.curves.seeds))]
        baselines = [self.curves.baseline(run.seed) for run in runs]
        deltas = [self.last(run, self.metric) - self.last(base, self.metric) for run, base in zip(runs, baselines, strict=True)]
        decibels = [self.last(run, "psnr") - self.last(base, "psnr") for run, base in zip(runs, baselines, strict=True)]
        ruined = fmean(self.is_ruined(run, base) for run, base in zip(runs, baselines, strict=True))
        delta, delta_psnr = fmean(deltas), fmean(decibels)
        is_degraded = not (delta >= DEGRADED_SSIM and delta_psnr >= DEGRADED_DB)  # NaN too
        truth = "ruined" if ruined else "degraded" if is_degraded else "safe"
        deviation = stdev(deltas) if len(deltas) > 1 and all(map(math.isfinite, deltas)) else 0.0
        return Worth(truth, delta, deviation, delta_psnr, ruined)

    def last(self, run: Run, metric: str) -> float:
        return float(run.values["evaluations"].get(metric, [0.0])[-1])  # a metric that was not recorded does not tell

    def is_ruined(self, run: Run, baseline: Run) -> bool:
        """At the last evaluation, or at two in a row: a collapse may partly recover."""
        steps = [step for step in self.curves.steps_of("evaluations") if step > 0]
        offset = len(self.curves.steps_of("evaluations")) - len(steps)
        bad = [
            self._is_collapsed(run.at("evaluations", i + offset), baseline.at("evaluations", i + offset)) for i in range(len(steps))
        ]
        return bad[-1] or any(one and other for one, other in pairwise(bad))

    def _is_collapsed(self, now: Mapping[str, float], baseline: Mapping[str, float]) -> bool:
        for name, limit in (("psnr", RUINED_DB), ("ssim", RUINED_SSIM)):
            if name in baseline and not now.get(name, math.nan) - baseline[name] > limit:
                return True
        return False
