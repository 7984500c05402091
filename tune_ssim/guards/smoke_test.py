"""Prunes a trial when inference collapses: compares statistics of samples (fixed crops, fixed noise) with those at step 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tune_ssim.base.errors import check_field
from tune_ssim.guards.guard import Guard, State
from tune_ssim.guards.verdict import Action
from tune_ssim.guards.violation import Violation
from tune_ssim.records import SMOKE, SMOKE_AGAIN, Record

JUDGED = frozenset({"non_finite_fraction", "reference_psnr", "consistency_psnr", "consistency_correlation", "high_frequency"}) | {
    "std_ratio", "entropy_bits", "flow_loss_top_bin", "undecodable_fraction", "high_frequency_share", "diversity",
}  # fmt: skip

NO_CORRELATION = 0.1  # below this at the start, the correlation is meaningless: the images are flatter than the noise of the input

# PSNR against the truth, or the input, that is no collapse, however good the start was: bicubic has 30.6 (FACTS §2).
RECOGNISABLE_DB = 30.0


@dataclass(frozen=True)
class Finding:
    """One statistic on the wrong side of its limit."""

    metric: str
    value: float
    limit: float
    words: str


@dataclass(frozen=True)
class SmokeTest(Guard):
    """Judges the statistics that `probes.collapse` computes from a `Sample`. Missing statistics are not judged.

    The first samples are compared with the autoencoder's reconstructions if there are any, later samples with the first.
    The defaults are from FACTS §2 (32 fundus crops): each limit separates healthy from ruined models.
    Two failures in a row are required, because single failures recover. At step 0 one failure suffices and means a bad setup.
    """

    # Steps at which to sample; the last step of a trial is always included. Under plain SGD a collapse partly recovers and is
    # visible in some tests only: with tests at 0, 25, 50, 100 and 200, gain 1000 of the bundled task passed for two of eight seeds.
    at: tuple[int, ...] = (0, 25, 50, 75, 100, 150, 200)
    consecutive: int = 2  # single failures recover
    max_consistency_drop_db: float = 3.0  # of the pooled sample against its own input: healthy 27.7-29.7, ruined 16-24
    # The same against the ground truth, if there is one. Gain 1000 with seeds 4 and 5: 3.8 to 6 dB down, several times; gains up
    # to 100, and 1000 with clipping, at most 3.0 (ten runs). A partly recovered collapse passes every other limit.
    max_reference_drop_db: float = 3.0
    min_correlation_ratio: float = 0.65  # correlation relative to the start: healthy .66-.69, ruined <= .3
    max_high_frequency: float = 1.6  # energy relative to the autoencoder's reconstruction: healthy .65-1.03, noise >= 1.5
    min_high_frequency: float = 0.1  # flat colour
    min_std_ratio: float = 0.4  # contrast relative to the reference
    # Without ground truth. Energy: 8/9 for white noise; .47 at most for crops of the 17 photographs and textures in scikit-image.
    max_high_frequency_share: float = 0.67
    # Relative to the start: 0 if all samples are equal; seeds and settings change it by a few percent.
    min_diversity_ratio: float = 0.1
    min_entropy_bits: float = 1.5  # of the grey-level histogram (64 bins); a flat colour has 0
    max_flow_loss_ratio: float = 10.0  # flow loss in the noisiest t-bin, relative to the start

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by the study's loader)
    name = "smoke_test"

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", tuple(sorted(set(self.at))))
        are_steps = bool(self.at) and all(isinstance(step, int) and step >= 0 for step in self.at)
        check_field(are_steps, "at", "must list steps >= 0", list(self.at))
        check_field(self.consecutive >= 1, "consecutive", "must be >= 1", self.consecutive)
        for name, value in vars(self).items():
            if name.startswith("max_"):
                check_field(value > 0, name, "must be > 0", value)
            if name.startswith("min_"):  # nothing is below NaN, so the limit would be silently off
                check_field(not math.isnan(value), name, "must be a number", value)
        low, high = self.min_high_frequency, self.max_high_frequency
        check_field(low < high, "min_high_frequency", f"must be below max_high_frequency ({high})", low)

    @property
    def metrics(self) -> tuple[str, ...]:
        return (SMOKE,)

    @property
    def expected_by(self) -> int:
        """The step by which a training that sends its own samples must have sent some: the second smoke test, because the first
        may be at step 0."""
        return self.at[min(1, len(self.at) - 1)]

    def due(self, step: int, last_step: float) -> bool:
        return step in self.at or step == last_step

    def init(self) -> State:
        return {"start": None, "failures": 0, "last_step": -1, "last": None, "used": None}

    def update(self, state: State, record: Record) -> tuple[State, Violation | None]:
        first = _with_prefix(record, SMOKE)
        if not first or record.step <= state["last_step"]:
            return state, None
        start = state["start"] if state["start"] is not None else _ideal(first)
        findings = self.findings(first, start)
        again = _with_prefix(record, SMOKE_AGAIN)
        confirmed = bool(findings and again and self.findings(again, start))  # it also failed with the second noise
        failures = 0 if not findings or (again and not confirmed) else state["failures"] + 1 + confirmed
        state = {
            # Failed samples must not become the reference: a NaN in them would let everything pass later.
            "start": state["start"] if findings or state["start"] is not None else first,
            "failures": failures,
            "last_step": record.step,
            "last": findings[0].words if failures else None,
            "used": state["used"] if record.step == 0 else max(state["used"] or 0.0, self.used(first, start)[0]),
        }
        if not failures:
            return state, None
        worst = findings[0]
        if record.step == 0:
            sentence = f"the model is ruined before its first update: {_join(findings)}"
            remedy = "check that the pretrained weights were loaded and that images are in the range the model expects"
            action = Action.ABORT
        elif failures >= self.consecutive or confirmed:
            sentence = f"samples have collapsed, {failures} smoke tests in a row: {_join(findings)}"
            remedy = "lower the gain (ssim_loss_weight x ssim_grad_scale), ssim_loss_max_t or the learning rate"
            action = Action.PRUNE
        else:
            return state, None
        return state, Violation(self.name, record.step, worst.metric, worst.value, worst.limit, action, sentence, remedy)

    def findings(self, now: dict[str, float], start: dict[str, float]) -> list[Finding]:
        """The statistics of one smoke test that violate their limits, most informative first."""
        found: list[Finding] = []
        for metric, limit, is_floor, words in self._limits(now, start):
            value = now.get(metric)
            if value is None or limit is None:
                continue
            if not math.isfinite(value) or (value < limit if is_floor else value > limit):
                found.append(Finding(SMOKE + metric, value, limit, words.format(value=value, limit=limit)))
        return found

    def used(self, now: dict[str, float], start: dict[str, float]) -> tuple[float, str]:
        """The largest fraction of the distance from start to limit over all statistics (0 at the start, 1 at the limit), and the
        name of that statistic."""
        worst = (0.0, "")
        for metric, limit, _, _ in self._limits(now, start):
            value, first = now.get(metric), start.get(metric)
            if value is None or first is None or limit is None or first == limit:
                continue
            worst = max(worst, ((value - first) / (limit - first), metric))
        return worst

    def _limits(self, now: dict[str, float], start: dict[str, float]) -> Iterator[tuple[str, float | None, bool, str]]:
        """(statistic, limit, whether the limit is a floor, sentence)."""
        # Reported first, because one non-finite pixel makes every other statistic NaN.
        yield "non_finite_fraction", 0.0, False, "{value:.1%} of the sampled pixels are not finite"
        floor_db = _from_start(start, "consistency_psnr", lambda db: min(db - self.max_consistency_drop_db, RECOGNISABLE_DB))
        yield "consistency_psnr", floor_db, True, "agreement with the input {value:.1f} dB (floor {limit:.1f} dB)"
        truth_db = _from_start(start, "reference_psnr", lambda db: min(db - self.max_reference_drop_db, RECOGNISABLE_DB))
        yield "reference_psnr", truth_db, True, "agreement with the ground truth {value:.1f} dB (floor {limit:.1f} dB)"
        floor = _from_start(start, "consistency_correlation", self._correlation_floor)
        yield "consistency_correlation", floor, True, "correlation with the input {value:.2f} (floor {limit:.2f})"
        energy = "high-frequency energy {value:.2f}x the reference's "
        yield "high_frequency", self.max_high_frequency, False, energy + "(limit {limit:g}: noise)"
        yield "high_frequency", self.min_high_frequency, True, energy + "(floor {limit:g}: flat)"
        if "high_frequency" not in now:  # there are no reference images
            share = "high-frequency share of the variance {value:.2f} (limit {limit:g}: noise)"
            yield "high_frequency_share", self.max_high_frequency_share, False, share
        alike = _from_start(start, "diversity", lambda diversity: self.min_diversity_ratio * diversity)
        yield "diversity", alike, True, "samples differ from one another by {value:.2g} (floor {limit:.2g}: all alike)"
        yield "std_ratio", self.min_std_ratio, True, "contrast {value:.2f}x the reference's (floor {limit:g})"
        # Nearly flat images have little entropy even if they are perfect.
        min_entropy = min(self.min_entropy_bits, 0.5 * now.get("ideal_entropy_bits", math.inf))
        yield "entropy_bits", min_entropy, True, "histogram entropy {value:.2f} bit (floor {limit:.2f})"
        ceiling = _from_start(start, "flow_loss_top_bin", lambda loss: self.max_flow_loss_ratio * loss)
        yield "flow_loss_top_bin", ceiling, False, "flow loss at the noisiest t {value:.3g} (limit {limit:.3g})"
        yield "undecodable_fraction", 0.0, False, "{value:.1%} of the generated token ids cannot be decoded"

    def _correlation_floor(self, start: float) -> float | None:
        return self.min_correlation_ratio * start if start >= NO_CORRELATION else None

    def unjudged(self, state: State) -> str | None:
        if state["failures"]:
            return f"guard '{self.name}': the last smoke test, at step {state['last_step']}, failed ({state['last']})"
        if state["last_step"] == 0:
            return f"guard '{self.name}' saw no samples after step 0"
        if state["start"] is not None and not JUDGED & set(state["start"]):
            known, found = ", ".join(sorted(JUDGED)), ", ".join(sorted(state["start"]))
            return f"guard '{self.name}' judges {known}; of the samples only {found} is known"
        return None

    def summary(self, state: State) -> dict[str, float]:
        """`smoke_failures`: consecutive failures at the end. `smoke_used_max`: see `used`; 1 is the limit."""
        used = {} if state["used"] is None else {"smoke_used_max": state["used"]}
        return {"smoke_failures": float(state["failures"])} | used


def _with_prefix(record: Record, prefix: str) -> dict[str, float]:
    return {key[len(prefix) :]: value for key, value in record.values.items() if key.startswith(prefix)}


def _ideal(first: dict[str, float]) -> dict[str, float]:
    """The reference for the first samples: their own statistics, but with the correlation of the reconstructions if known.

    Only the correlation has an absolute scale: relative to the reconstructions, healthy models start at 0.98-1.02, random or
    partly loaded weights at 0.24 or less (bundled task; four sets of weights)."""
    correlation = first.get("ideal_consistency_correlation")
    return first if correlation is None else first | {"consistency_correlation": correlation}


def _from_start(start: dict[str, float], metric: str, rule: Callable[[float], float | None]) -> float | None:
    value = start.get(metric)
    return None if value is None else rule(value)


def _join(findings: list[Finding]) -> str:
    return "; ".join(finding.words for finding in findings[:3])
