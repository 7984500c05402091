"""Predicts the gradient norm for any setting of the auxiliary losses, before anything is launched.

    gradient = g_main + pixel_weight · g_pixel + gain · g_ssim(max_t),   gain = ssim_loss_weight · ssim_grad_scale
    total_norm² = vᵀ Q v,   v = (1, pixel_weight, gain)

Q holds the dot products of the three gradients on one fixed batch. It is measured with updates disabled, so predictions are
exact at step 0 and a forecast after that. Q is computed from the gradients (`gram`), or fitted to total_norm readings
(`readings`), which work with any launcher and any sharding. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

MAIN, PIXEL, SSIM = 0, 1, 2  # rows and columns of Q
PRODUCTS = {  # names of Q's entries in a file
    "main_main": (MAIN, MAIN), "main_pixel": (MAIN, PIXEL), "pixel_pixel": (PIXEL, PIXEL),
    "main_ssim": (MAIN, SSIM), "pixel_ssim": (PIXEL, SSIM), "ssim_ssim": (SSIM, SSIM),
}  # fmt: skip
QUANTILES = (0.1, 0.9)
SCAN_DECADES, SCAN_POINTS = 16, 641  # grid of gains to find the rising branch: 40 per decade
FORMAT = 1


@dataclass(frozen=True)
class Prediction:
    """The prediction for one setting, over the calibrated batches with at least one active sample. NaN if there are none.

    ratio: median total_norm divided by the baseline's median on the same batches, as in the norm guard. ratio_main: the same
    relative to the main loss only. auxiliary_share: median of gain · |g_ssim| / total_norm; above 1 if the gradients partly
    cancel. cosine: median cosine between the main and the SSIM gradient. between: the neighbouring calibrated max_t, if this
    max_t was not calibrated itself; outside the grid, the nearest one twice.
    """

    gain: float
    max_t: float
    pixel_weight: float
    total_norm_mean: float
    total_norm_median: float
    total_norm_p10: float
    total_norm_p90: float
    ratio: float
    ratio_main: float
    auxiliary_share: float
    cosine: float
    active_batches: int
    clamped: bool = False  # ssim_grad_clamp is active at this gain; the numbers ignore the clamp
    between: tuple[float, float] | None = None


@dataclass(frozen=True)
class NormModel:
    """Q for every `max_ts[i]` and batch, and the baseline's total_norm on the same batches.

    q: `[max_t, batch, 3, 3]`, rows and columns main, pixel, SSIM; the pixel entries are NaN if they were not measured.
    active: `[max_t, batch]`, whether any sample passes that gate. baseline: `[batch]`. batches: their step numbers.
    held: default values of a setting, e.g. `pixel_loss_weight`; the gate of the pixel loss is always this one.
    clamp_gain: `[max_t]`, the gain from which `ssim_grad_clamp` is active; infinite without a clamp.
    """

    max_ts: tuple[float, ...]
    q: Array = field(repr=False)
    active: NDArray[np.bool_] = field(repr=False)
    baseline: Array = field(repr=False)
    batches: tuple[int, ...]
    method: str
    held: Mapping[str, float] = field(default_factory=dict)
    clamp_gain: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        n, b = len(self.max_ts), len(self.batches)
        if not n or list(self.max_ts) != sorted(set(self.max_ts)):
            raise ValueError(f"norm model: max_ts must rise, got {list(self.max_ts)}")
        object.__setattr__(self, "batches", tuple(self.batches))
        object.__setattr__(self, "q", np.asarray(self.q, dtype=np.float64))
        object.__setattr__(self, "active", np.asarray(self.active, dtype=bool))
        object.__setattr__(self, "baseline", np.asarray(self.baseline, dtype=np.float64))
        object.__setattr__(self, "clamp_gain", tuple(self.clamp_gain) or (math.inf,) * n)
        shapes = (self.q.shape, self.active.shape, self.baseline.shape, len(self.clamp_gain))
        if shapes != ((n, b, 3, 3), (n, b), (b,), n):
            raise ValueError(f"norm model: {n} max_t and {b} batches, but arrays of {shapes}")

    # -- forward: setting → norm

    def predict_gain(self, gain: float, max_t: float, pixel_weight: float = 0.0) -> Prediction:
        """The prediction for one setting. Raises ValueError for a pixel_weight above 0 if the pixel loss was not measured."""
        return self._prediction(gain, max_t, pixel_weight, self.curve([gain], max_t, pixel_weight))

    def predict_adaptive(
        self, target_ratio: float, max_t: float, pixel_weight: float = 0.0, max_gain: float = math.inf
    ) -> Prediction:
        """The prediction for an adaptive weight: on each batch the gain with which the SSIM gradient is `target_ratio` times as
        long as the rest. Its `gain` is the median of them. `max_gain`: the largest gain that the limit of the weight allows."""

        def gains(index: int) -> Array:
            q = self.q[index][self.active[index]]
            with np.errstate(divide="ignore"):
                rest = np.sqrt(_squares(q, np.zeros((1, 1)), pixel_weight)[0])
                return np.minimum(target_ratio * rest / np.sqrt(q[:, SSIM, SSIM]), max_gain)[None]

        lower, upper, share = self._between(max_t)
        if not (self.active[lower].any() and self.active[upper].any()):
            return self.predict_gain(math.nan, max_t, pixel_weight)
        gain = math.exp((1 - share) * math.log(np.median(gains(lower))) + share * math.log(np.median(gains(upper))))
        return self._prediction(gain, max_t, pixel_weight, self._interpolated(gains, max_t, pixel_weight))

    def _prediction(self, gain: float, max_t: float, pixel_weight: float, found: Mapping[str, Array]) -> Prediction:
        lower, upper, _ = self._between(max_t)
        numbers = {name: float(values[0]) for name, values in found.items()}
        return Prediction(
            gain=gain,
            max_t=max_t,
            pixel_weight=pixel_weight,
            **numbers,
            active_batches=int(min(self.active[i].sum() for i in (lower, upper))),
            clamped=gain > min(self.clamp_gain[i] for i in (lower, upper)),
            between=None if self.is_calibrated(max_t) else (self.max_ts[lower], self.max_ts[upper]),
        )

    def predict_setting(self, setting: Mapping[str, Any]) -> Prediction:
        """The prediction for a task's setting; missing values come from `held`.

        Raises ValueError if its pixel_loss_max_t differs from the calibrated one."""
        full = {"ssim_loss_weight": 0.0, "ssim_grad_scale": 1.0, "pixel_loss_weight": 0.0, **self.held, **setting}
        gate = self.held.get("pixel_loss_max_t", full.get("pixel_loss_max_t"))
        if full["pixel_loss_weight"] and gate is not None and not math.isclose(full.get("pixel_loss_max_t", gate), gate):
            raise ValueError(f"calibrated with pixel_loss_max_t={gate:g}; this setting has {full['pixel_loss_max_t']:g}")
        gain = full["gain"] if "gain" in full else full["ssim_loss_weight"] * full["ssim_grad_scale"]
        return self.predict_gain(float(gain), float(full["ssim_loss_max_t"]), float(full["pixel_loss_weight"]))

    def curve(self, gains: ArrayLike, max_t: float, pixel_weight: float = 0.0) -> dict[str, Array]:
        """The fields of a `Prediction` for many gains `[n]` at once, each `[n]`.

        Between two calibrated max_t, norms and ratios are interpolated in log-log, shares and cosines linearly."""
        wanted = np.asarray(gains, dtype=np.float64)[:, None]
        return self._interpolated(lambda _: wanted, max_t, pixel_weight)

    def _interpolated(self, gains: Callable[[int], Array], max_t: float, pixel_weight: float) -> dict[str, Array]:
        """`gains` of the index of a gate: `[n, 1]`, or `[n, batch]` for its active batches."""
        lower, upper, share = self._between(max_t)
        one = self._statistics(lower, gains(lower), pixel_weight)
        if lower == upper:
            return one
        other = self._statistics(upper, gains(upper), pixel_weight)
        return {
            name: one[name] * (1 - share) + other[name] * share
            if name in ("auxiliary_share", "cosine")
            else _between_logs(one[name], other[name], share)
            for name in one
        }

    def ratios(self, gains: ArrayLike, max_t: float, pixel_weight: float = 0.0) -> Array:
        """The ratios of `curve`, without its other numbers: `gain_for` asks for thousands."""
        wanted = np.asarray(gains, dtype=np.float64)[:, None]
        lower, upper, share = self._between(max_t)
        one = self._ratio(lower, wanted, pixel_weight)
        return one if lower == upper else _between_logs(one, self._ratio(upper, wanted, pixel_weight), share)

    # -- inverse: norm → gain

    def gain_for(self, ratio: float, max_t: float, pixel_weight: float = 0.0) -> float:
        """The gain on the rising branch for which the norm is `ratio` times the baseline's.

        The two gradients may partly cancel, so a small gain can reduce the norm. The rising branch starts after that minimum.
        Raises ValueError if no gain on it has that ratio, if a clamp is active there, or if no calibrated batch is active."""
        if not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f"a norm ratio is a finite number > 0, got {ratio!r}")
        lower, upper, _ = self._between(max_t)
        if not (self.active[lower].any() and self.active[upper].any()):
            raise ValueError(self.inactive_words(max_t))
        scale = self._natural_gain(lower, upper)
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"the SSIM loss sends no gradient at max_t={max_t:g}: no gain changes the norm")
        top = scale * max(1.0, ratio * float(np.max(self.baseline)) / self._main_norm())
        while self.ratios([top], max_t, pixel_weight)[0] <= ratio:
            top *= 10
        gains = np.concatenate([[0.0], np.geomspace(top * 10.0**-SCAN_DECADES, top, SCAN_POINTS)])
        found = self.ratios(gains, max_t, pixel_weight)
        below = np.flatnonzero(found <= ratio)
        if not below.size:
            raise ValueError(f"no gain has a norm ratio of {ratio:.6g} at max_t={max_t:g}: the smallest there is {found.min():.6g}")
        under, over = float(gains[below[-1]]), float(gains[below[-1] + 1])
        for _ in range(12):  # splits the interval by 64 each time; reaches float64 precision after nine
            gains = np.linspace(under, over, 65)
            last = int(np.flatnonzero(self.ratios(gains, max_t, pixel_weight) <= ratio)[-1])
            if last == 64 or not gains[last] < gains[last + 1]:
                break
            under, over = float(gains[last]), float(gains[last + 1])
        if under > (cut := min(self.clamp_gain[i] for i in (lower, upper))):
            raise ValueError(
                f"ssim_grad_clamp cuts in from gain {cut:.3g} on at max_t={max_t:g}: a ratio of {ratio:g} cannot be promised"
            )
        return under

    # -- what was measured

    @property
    def baseline_ratio_main(self) -> float:
        """Median norm of the baseline relative to that of the main loss only."""
        return float(np.median(self.baseline)) / self._main_norm()

    @property
    def has_clamp(self) -> bool:
        return any(math.isfinite(gain) for gain in self.clamp_gain)

    def is_calibrated(self, max_t: float) -> bool:
        return any(_equal(max_t, own) for own in self.max_ts)

    def inactive_words(self, max_t: float) -> str:
        return (
            f"no sample of the {len(self.batches)} calibrated batches has 0 < t <= {max_t:g}: "
            "raise calibration.batches, the batch size or ssim_loss_max_t"
        )

    def _between(self, max_t: float) -> tuple[int, int, float]:
        """Indices of the calibrated neighbours and the interpolation weight of the upper one, in log max_t.

        A gate that no calibrated sample passes is skipped unless `max_t` is exactly that gate."""
        for index, own in enumerate(self.max_ts):
            if _equal(own, max_t):
                return index, index, 0.0
        grid = np.asarray(self.max_ts)
        usable = np.flatnonzero(self.active.any(axis=1))
        usable = usable if usable.size else np.arange(len(grid))
        under, over = usable[grid[usable] < max_t], usable[grid[usable] > max_t]
        if not under.size or not over.size:
            nearest = int((under[-1:] if under.size else over[:1])[0])
            return nearest, nearest, 0.0
        lower, upper = int(under[-1]), int(over[0])
        return lower, upper, math.log(max_t / grid[lower]) / math.log(grid[upper] / grid[lower])

    def _ratio(self, index: int, gains: Array, pixel_weight: float) -> Array:
        chosen = self.active[index]
        if not chosen.any():
            return np.full(len(gains), np.nan)
        norms = np.sqrt(_squares(self.q[index][chosen], gains, pixel_weight))
        return np.median(norms, axis=1) / np.median(self.baseline[chosen])

    def _statistics(self, index: int, gains: Array, pixel_weight: float) -> dict[str, Array]:
        chosen = self.active[index]
        q, baseline = self.q[index][chosen], self.baseline[chosen]
        names = ("total_norm_mean", "total_norm_median", "total_norm_p10", "total_norm_p90")
        if not chosen.any():
            return {name: np.full(len(gains), np.nan) for name in (*names, "ratio", "ratio_main", "auxiliary_share", "cosine")}
        norms = np.sqrt(_squares(q, gains, pixel_weight))  # [gain, batch]
        median = np.median(norms, axis=1)
        low, high = np.quantile(norms, QUANTILES, axis=1)
        main, ssim = np.sqrt(q[:, MAIN, MAIN]), np.sqrt(q[:, SSIM, SSIM])
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = np.full(len(gains), np.median(q[:, MAIN, SSIM] / (main * ssim)))
            share = np.median(gains * ssim / norms, axis=1)
            ratios = [median / np.median(baseline), median / np.median(main)]
        numbers = (norms.mean(axis=1), median, low, high, *ratios, share, cosine)
        return dict(zip((*names, "ratio", "ratio_main", "auxiliary_share", "cosine"), numbers, strict=True))

    def _main_norm(self) -> float:
        return float(np.median(np.sqrt(self.q[-1, :, MAIN, MAIN])))

    def _natural_gain(self, lower: int, upper: int) -> float:
        """The gain at which the SSIM gradient has about the norm of the main gradient."""
        with np.errstate(divide="ignore", invalid="ignore"):
            gains = [
                np.median(np.sqrt(self.q[i, self.active[i], MAIN, MAIN] / self.q[i, self.active[i], SSIM, SSIM]))
                for i in (lower, upper)
            ]
        return float(max(gains))

    # -- as JSON

    def to_dict(self) -> dict[str, Any]:
        products = [
            {
                "max_t": max_t,
                "clamp_gain": self.clamp_gain[i],
                "active": self.active[i].tolist(),
                **{name: self.q[i, :, row, column].tolist() for name, (row, column) in PRODUCTS.items()},
            }
            for i, max_t in enumerate(self.max_ts)
        ]
        return {
            "format": FORMAT,
            "method": self.method,
            "batches": list(self.batches),
            "held": dict(self.held),
            "baseline_total_norm": self.baseline.tolist(),
            "dot_products": products,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NormModel:
        """The model from `to_dict`. Non-finite numbers may be the strings "NaN" and "Infinity". Raises ValueError."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else data
            raise ValueError(f"norm model format {found!r} is not known (this version reads {FORMAT})")
        try:
            gates = data["dot_products"]
            q = np.empty((len(gates), len(data["batches"]), 3, 3))
            for i, gate in enumerate(gates):
                for name, (row, column) in PRODUCTS.items():
                    q[i, :, row, column] = q[i, :, column, row] = [float(x) for x in gate[name]]
            return cls(
                max_ts=tuple(float(gate["max_t"]) for gate in gates),
                q=q,
                active=np.asarray([gate["active"] for gate in gates], dtype=bool),
                baseline=np.asarray([float(x) for x in data["baseline_total_norm"]]),
                batches=tuple(int(n) for n in data["batches"]),
                method=str(data["method"]),
                held={name: float(value) for name, value in data["held"].items()},
                clamp_gain=tuple(float(gate["clamp_gain"]) for gate in gates),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not a norm model ({type(error).__name__}: {error})") from None


def fit(settings: Sequence[tuple[float, float]], norms: ArrayLike) -> Array:
    """Fits Q of every batch to total_norm readings: `settings` [k] of (pixel_weight, gain), `norms` `[k, batch]` → `[batch, 3, 3]`.

    Least squares on the relative error of N² = A + 2Bg + Cg², plus the pixel terms if some pixel_weight is above 0 (else they
    are NaN). Rounding may give C below B²/A, which is impossible for gradients; C is then raised to B²/A.
    Raises ValueError if there are fewer readings than unknowns."""
    pixel, gain = np.asarray(settings, dtype=np.float64).T
    readings = np.asarray(norms, dtype=np.float64)
    features = {
        (MAIN, MAIN): np.ones_like(gain),
        (MAIN, PIXEL): 2 * pixel,
        (MAIN, SSIM): 2 * gain,
        (PIXEL, PIXEL): pixel**2,
        (PIXEL, SSIM): 2 * pixel * gain,
        (SSIM, SSIM): gain**2,
    }
    silent = ({PIXEL} if not pixel.any() else set()) | ({SSIM} if not gain.any() else set())
    known = {place: column for place, column in features.items() if not silent & set(place)}
    matrix = np.stack(list(known.values()), axis=1)
    scale = np.maximum(
        np.abs(matrix).max(axis=0), np.finfo(float).tiny
    )  # columns differ by gain²; without scaling, small ones are lost
    if np.linalg.matrix_rank(matrix / scale) < matrix.shape[1]:
        raise ValueError(f"{matrix.shape[1]} unknowns need as many different settings, got {len(settings)}: {list(settings)}")
    q = np.full((readings.shape[1], 3, 3), np.nan)
    for batch, squares in enumerate((readings**2).T):
        row = 1 / np.where(squares > 0, squares, 1.0)
        solution = np.linalg.lstsq(matrix / scale * row[:, None], squares * row, rcond=None)[0] / scale
        for (i, j), value in zip(known, solution, strict=True):
            q[batch, i, j] = q[batch, j, i] = value
    q[:, SSIM, SSIM] = np.maximum(q[:, SSIM, SSIM], q[:, MAIN, SSIM] ** 2 / q[:, MAIN, MAIN])
    return q


def _equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9)


def _squares(q: Array, gains: Array, pixel_weight: float) -> Array:
    """vᵀQv for every gain, `[n, 1]` or `[n, batch]`, and batch. The pixel entries are used only if `pixel_weight` is not 0."""
    main, cross, ssim = q[:, MAIN, MAIN], q[:, MAIN, SSIM], q[:, SSIM, SSIM]
    if pixel_weight:
        if np.isnan(q[:, PIXEL, PIXEL]).all():
            raise ValueError(f"pixel_loss_weight {pixel_weight:g}: calibrated without the pixel loss")
        main = main + 2 * pixel_weight * q[:, MAIN, PIXEL] + pixel_weight**2 * q[:, PIXEL, PIXEL]
        cross = cross + pixel_weight * q[:, PIXEL, SSIM]
    return np.maximum(main + 2 * gains * cross + gains**2 * ssim, 0.0)


def _between_logs(one: Array, other: Array, share: float) -> Array:
    """Interpolated in the logarithm."""
    with np.errstate(divide="ignore"):  # exp(log 0) is 0 again
        return np.exp(np.log(one) * (1 - share) + np.log(other) * share)
