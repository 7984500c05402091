"""At which predicted norm ratio the best safe setting sits, over recordings: the evidence for a setting before any trial.

    python benchmarks/replay/recommend.py [--curves FILE …] [--json OUT]

For fixed predicted ratios at each recorded max_t: the share of the best mean improvement of the recording's safe settings, and the
truth of the setting (truth.py). No trial is run. Without --curves: all recordings in benchmarks/replay/curves. Writes
benchmarks/results/recommend.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from curves import Curves, recordings_option
from truth import Truth

from tune_ssim.base.files import jsonable
from tune_ssim.probes.norm_model import NormModel

RATIOS = (1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
RESULT = Path(__file__).parent.parent / "results" / "recommend.json"
GOOD = 0.9
FINE = 60  # gains of the range scan


def evidence(curves: Curves) -> dict[str, Any]:
    """One recording."""
    truth, model = Truth(curves), NormModel.from_dict(curves.header["calibration"]["model"])
    gates = {}
    for max_t in curves.max_ts:
        own = {setting: worth for setting, worth in truth.safe.items() if setting[1] == max_t}
        best = max(own, key=lambda setting: own[setting].delta, default=None)
        gates[f"{max_t:g}"] = {
            "best": best and {"gain": best[0], "ratio": _ratio(model, *best), "delta": round(own[best].delta, 6)},
            "good_ratios": good_range(curves, truth, model, max_t),
            "at_ratio": {f"{ratio:g}": at_ratio(truth, model, ratio, max_t) for ratio in RATIOS},
        }
    best = truth.best_setting
    return {
        "runs": len(curves.runs),
        "seeds": len(curves.seeds),
        "best": best and {"gain": best[0], "max_t": best[1], "ratio": _ratio(model, *best), "delta": round(truth.best, 6)},
        "helps": truth.helps,
        "by_max_t": gates,
    }


def at_ratio(truth: Truth, model: NormModel, ratio: float, max_t: float) -> dict[str, Any] | None:
    """None if no gain has that ratio."""
    try:
        gain = model.gain_for(ratio, max_t)
    except ValueError:
        return None
    worth = truth.of(gain, max_t)
    return {"gain": round(gain, 3), "share": round(worth.delta / truth.best, 3), "truth": worth.truth}


def good_range(curves: Curves, truth: Truth, model: NormModel, max_t: float) -> list[float] | None:
    """The smallest and the largest predicted ratio between which a setting is safe and reaches 90 % of the recording's best."""
    gains = [gain for gain, gate in curves.settings if gate == max_t]
    scanned = [float(gain) for gain in np.geomspace(min(gains), max(gains), FINE)]
    good = [gain for gain in scanned if truth.of(gain, max_t).truth == "safe" and truth.share(gain, max_t) >= GOOD]
    return [_ratio(model, gain, max_t) for gain in (good[0], good[-1])] if good else None


def _ratio(model: NormModel, gain: float, max_t: float) -> float:
    return round(model.predict_gain(gain, max_t).ratio, 3)


def rule(found: dict[str, Any]) -> dict[str, Any]:
    """Over the recordings in which SSIM helps: how a fixed ratio behind the widest recorded gate does."""
    rows = {}
    for ratio in RATIOS:
        at = [list(one["by_max_t"].values())[-1]["at_ratio"][f"{ratio:g}"] for one in found.values() if one["helps"]]
        known = [one for one in at if one is not None]
        shares = [one["share"] if one["truth"] == "safe" else 0.0 for one in known]
        if known:
            rows[f"{ratio:g}"] = {
                "recordings": len(known),
                "good": sum(share >= GOOD for share in shares),
                "harmful": sum(one["truth"] != "safe" for one in known),
                "median_share": round(median(shares), 3),
                "worst_share": min(shares),
            }
    return rows


def table(found: dict[str, Any]) -> list[str]:
    lines = ["| recording | max_t | best safe gain (ratio) | good ratios | " + " | ".join(f"ratio {r:g}" for r in RATIOS) + " |"]
    lines.append("|---" * (4 + len(RATIOS)) + "|")
    for name, one in found.items():
        for max_t, gate in one["by_max_t"].items():
            best, good = gate["best"], gate["good_ratios"]
            cells = [
                f"{best['gain']:g} ({best['ratio']:.2f}), {best['delta']:+.4f}" if best else "none",
                f"{good[0]:.2f} to {good[1]:.2f}" if good else "none",
            ]
            for at in gate["at_ratio"].values():
                cells.append("-" if at is None else f"{at['share']:.0%}" + ("" if at["truth"] == "safe" else f" {at['truth']}"))
            lines.append(f"| {name} | {max_t} | " + " | ".join(cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = recordings_option(__doc__)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    found = {curves.name: evidence(curves) for curves in map(Curves.read, options.curves)}
    print("\n".join(table(found)))
    result = {"recordings": found, "rule_behind_the_widest_gate": rule(found)}
    print("\nBehind the widest gate:", json.dumps(result["rule_behind_the_widest_gate"], indent=1))
    options.json.write_text(json.dumps(jsonable(result), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
