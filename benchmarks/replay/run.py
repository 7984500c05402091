"""Plays recorded learning curves through search strategies, many seeds each, and compares what they find and what they cost.

    python benchmarks/replay/run.py --curves benchmarks/replay/curves/sgd_small --strategies guided,asha_tpe,tpe,random --seeds 40

The product's strategies run its real phases, search objects, trials, guards, margins and choice of the winner; the stock ones run
Ray Tune's own searcher and scheduler objects. README.md beside this file says how, and what is counted. Prints the table.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from curves import Curves, recordings_option
from replay import Costs, Played, Result, run_product, run_recommended, run_stock
from truth import USELESS, Truth

from tune_ssim import __version__
from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.base.files import jsonable
from tune_ssim.before_launch.forecast import INERT
from tune_ssim.probes.norm_model import NormModel

HERE = Path(__file__).parent
GOOD = 0.9  # of the best mean improvement of a safe setting of the grid


def _product(space: str | None = None, trials: int | None = None, **search: Any) -> dict[str, Any]:
    return {**({"space": space} if space else {}), "search": {**({"trials": trials} if trials else {}), **search}}


# The study's default space and strategy, unless said otherwise.
PRODUCT: dict[str, dict[str, Any]] = {
    "guided": _product(strategy="guided"),
    "wide": _product("wide", 12, strategy="optuna", skip_beyond=None),  # the bundled study until version 0.3
    "wide_skip": _product("wide", 12, strategy="optuna", skip_beyond=2.0),
    "wide_32": _product("wide", 32, strategy="optuna", skip_beyond=None),
    "wide_random": _product("wide", 12, strategy="random", skip_beyond=None),
    "assertive_3": _product("assertive", 3, strategy="optuna"),
    "assertive_6": _product("assertive", 6, strategy="optuna"),
    "aggressive_6": _product("aggressive", 6, strategy="optuna"),
    "aggressive_12": _product("aggressive", 12, strategy="optuna"),
    "staged": _product("note_v2", strategy="optuna"),
    "note_v3": _product("note_v3", strategy="optuna"),
}
STOCK = {
    "random": {"tpe": False, "asha": False},
    "tpe": {"tpe": True, "asha": False},
    "asha_tpe": {"tpe": True, "asha": True},
    "asha_random": {"tpe": False, "asha": True},
}
DEFAULT = ("guided", "recommend_3", "wide", "aggressive_6", "asha_tpe", "tpe", "asha_random", "random")


def runner(name: str, curves: Curves, workers: int, snap: bool, confirm: bool) -> Callable[[int], Result]:
    """A function of the seed. Raises ValueError for an unknown name."""
    if name in STOCK:
        return lambda seed: run_stock(curves, seed, workers, snap=snap, **STOCK[name])
    if name in PRODUCT:
        return lambda seed: run_product(curves, PRODUCT[name], seed, workers, snap=snap, confirm=confirm)
    if name.startswith("recommend_"):
        return lambda seed: run_recommended(curves, float(name.removeprefix("recommend_")), max(curves.max_ts))
    raise ValueError(f"unknown strategy {name!r}; valid: {', '.join((*PRODUCT, *STOCK))}, recommend_RATIO")


class Judge:
    """What a simulated search found and cost, by the truth of its settings."""

    def __init__(self, curves: Curves, snap: bool) -> None:
        self.truth = Truth(curves, snap)
        self.costs = Costs.of_header(curves.header)
        self.model = NormModel.from_dict(curves.header["calibration"]["model"])

    def row(self, result: Result, workers: int) -> dict[str, Any]:
        trials = [one for one in result.trials if one.role != "baseline"]
        baselines = sum(one.steps for one in result.trials if one.role == "baseline")
        spent = sum(one.steps for one in trials)
        pick = result.pick
        worth = self.truth.of(pick.gain, pick.max_t) if pick else None
        share = self.truth.share(pick.gain, pick.max_t) if pick else 0.0
        return {
            "steps": spent + baselines,
            "with_calibration": spent + baselines + result.calibration,
            "trials": len(trials),
            "pick": None if pick is None else {"gain": round(pick.gain, 4), "max_t": pick.max_t, "trained": pick.steps},
            "truth": worth.truth if worth else "none",
            "share": round(share, 4),
            "good": bool(worth and worth.truth == "safe" and share >= GOOD),
            "first_good": self._until_good(result.trials),
            "harmful_steps": sum(one.steps for one in trials if self.truth.of(one.gain, one.max_t).truth != "safe"),
            "inert_steps": sum(one.steps for one in trials if self._is_inert(one)),
            "useless_steps": sum(one.steps for one in trials if self._is_useless(one)),
            "verdicts": dict(Counter(one.verdict or "-" for one in trials)),
            "false_safe": sum(one.verdict == "safe" and self.truth.of(one.gain, one.max_t).truth == "ruined" for one in trials),
            "false_prune": sum(one.verdict == "pruned" and self.truth.of(one.gain, one.max_t).truth == "safe" for one in trials),
            "makespan": round(result.makespan, 1),
            "idle": round(1 - result.busy / (workers * result.makespan), 4) if result.makespan else 0.0,
            "confirm_steps": sum(one.steps for one in result.confirm),
            "reason": result.why_none or result.end_reason,
        }

    def _until_good(self, trials: Sequence[Played]) -> float:
        """Steps of all trials that ended until a good setting had been trained to its end; infinite if none was."""
        spent = 0
        for one in trials:
            spent += one.steps
            worth = self.truth.of(one.gain, one.max_t)
            if worth.truth == "safe" and self.truth.share(one.gain, one.max_t) >= GOOD and one.steps >= self.truth.curves.steps:
                return spent
        return math.inf

    def _is_inert(self, one: Played) -> bool:
        """Whether the calibration calls the setting inert: total_norm changes by less than 0.1 %."""
        prediction, alone = self.model.predict_gain(one.gain, one.max_t), self.model.predict_gain(0.0, one.max_t)
        return abs(prediction.ratio / alone.ratio - 1) < INERT

    def _is_useless(self, one: Played) -> bool:
        worth = self.truth.of(one.gain, one.max_t)
        return worth.truth == "safe" and worth.delta < USELESS * self.truth.best


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over seeds: medians of costs, shares of outcomes."""
    counts = Counter(row["truth"] for row in rows)
    n = len(rows)
    good = sum(row["good"] for row in rows)
    return {
        "seeds": n,
        "steps": median(row["steps"] for row in rows),
        "with_calibration": median(row["with_calibration"] for row in rows),
        "mean_steps": round(fmean(row["steps"] for row in rows), 1),
        "first_good": median(row["first_good"] for row in rows),
        "trials": median(row["trials"] for row in rows),
        "good": round(good / n, 4),
        "good_interval": wilson(good, n),
        "median_share": round(median(row["share"] for row in rows), 4),
        "no_pick": round(counts["none"] / n, 4),
        "degraded_picks": round(counts["degraded"] / n, 4),
        "ruined_picks": round(counts["ruined"] / n, 4),
        "harmful_steps": round(fmean(row["harmful_steps"] for row in rows), 1),
        "inert_steps": round(fmean(row["inert_steps"] for row in rows), 1),
        "useless_steps": round(fmean(row["useless_steps"] for row in rows), 1),
        "false_safe": sum(row["false_safe"] for row in rows),
        "false_prune": sum(row["false_prune"] for row in rows),
        "makespan": median(row["makespan"] for row in rows),
        "idle": round(fmean(row["idle"] for row in rows), 4),
        "confirm_steps": median(row["confirm_steps"] for row in rows),
        "reasons": dict(Counter(row["reason"] for row in rows if row["reason"]).most_common(3)),
    }


def wilson(hits: int, n: int, z: float = 1.96) -> list[float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, spread = hits / n, z * math.sqrt(hits / n * (1 - hits / n) / n + z * z / (4 * n * n))
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    return [round((centre - spread) / scale, 3), round((centre + spread) / scale, 3)]


def compare(
    curves: Curves, strategies: Sequence[str], seeds: int, workers: int, *, snap: bool = False, confirm: bool = False
) -> dict[str, Any]:
    """The whole comparison, as plain data. Prints each row as it is ready."""
    judge = Judge(curves, snap)
    truth = judge.truth
    found: dict[str, Any] = {}
    print(heading(curves, truth, workers))
    print("\n".join(table({})))
    for name in strategies:
        search = runner(name, curves, workers, snap, confirm)
        began_s = time.perf_counter()
        try:
            rows = [judge.row(search(seed), workers) for seed in range(seeds)]
        except (BadSetup, UserError) as error:
            found[name] = {"error": str(error)}
            print(f"| {name} | cannot run: {error} |", flush=True)
            continue
        found[name] = {**summary(rows), "wall_s": round(time.perf_counter() - began_s, 1), "searches": rows}
        print(table({name: found[name]})[-1], flush=True)
    return {
        "curves": curves.name,
        "recorded_runs": len(curves.runs),
        "recorded_seeds": curves.seeds,
        "workers": workers,
        "off_grid": "snapped to the nearest recorded gain" if snap else "interpolated",
        "best": truth.best_setting
        and {"gain": truth.best_setting[0], "max_t": truth.best_setting[1], "delta": round(truth.best, 6)},
        "helps": truth.helps,
        "costs": vars(judge.costs),
        "settings": [
            {"gain": gain, "max_t": max_t, **{key: _rounded(value) for key, value in vars(truth.of(gain, max_t)).items()}}
            for gain, max_t in curves.settings
        ],
        "version": __version__,
        "python": platform.python_version(),
        "strategies": found,
    }


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def heading(curves: Curves, truth: Truth, workers: int) -> str:
    best = truth.best_setting
    words = f"gain {best[0]:g} @ {best[1]:g}, delta_{truth.metric} {truth.best:+.4f}" if best else "none is safe"
    helps = "" if truth.helps else " (not above the noise: nothing beats the baseline)"
    what = f"{curves.name}: {len(curves.runs)} recorded runs, seeds {curves.seeds}, {workers} workers"
    return f"{what}. Best safe setting: {words}{helps}\n"


COLUMNS = {
    "steps": ("steps", "{:.0f}"),
    "with_calibration": ("+ calibration", "{:.0f}"),
    "first_good": ("to the first good", "{:.0f}"),
    "confirm_steps": ("confirm", "{:.0f}"),
    "trials": ("trials", "{:.0f}"),
    "good": ("safe and >= 90 %", "{:.0%}"),
    "median_share": ("median share", "{:.2f}"),
    "no_pick": ("no pick", "{:.0%}"),
    "degraded_picks": ("degraded picks", "{:.0%}"),
    "ruined_picks": ("ruined picks", "{:.0%}"),
    "harmful_steps": ("steps on harmful", "{:.0f}"),
    "inert_steps": ("on inert", "{:.0f}"),
    "useless_steps": ("on useless", "{:.0f}"),
    "makespan": ("makespan", "{:.0f}"),
    "idle": ("idle", "{:.0%}"),
}


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| strategy | " + " | ".join(head for head, _ in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(form.format(row[key]) for key, (_, form) in COLUMNS.items()) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = recordings_option(__doc__)
    parser.add_argument("--strategies", default=",".join(DEFAULT), help=f"of {', '.join((*PRODUCT, *STOCK))}, recommend_RATIO")
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--confirm", action="store_true", help="the product's confirm phase too, as long as the recorded runs")
    parser.add_argument("--snap", action="store_true", help="play the nearest recorded gain instead of an interpolation")
    parser.add_argument("--json", type=Path, help="write the results here, every search included; without it results/replay.json")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="optuna")
    names = options.strategies.split(",")
    for name in names:
        try:
            runner(name, Curves({}, []), options.workers, False, False)
        except ValueError as error:
            parser.error(str(error))
    found = {}
    for path in options.curves:
        curves = Curves.read(path)
        one = compare(curves, names, options.seeds, options.workers, snap=options.snap, confirm=options.confirm)
        if options.json is None:  # in the repository: without the single searches
            for row in one["strategies"].values():
                row.pop("searches", None)
        found[curves.name] = one
    out = options.json or HERE.parent / "results" / "replay.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(jsonable(found), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
