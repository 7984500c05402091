"""Does preflight tell broken set-ups from sound ones? Every defect of tests/fundus_defects.py, injected into the real bundled
task, and every sound variation of it, each on several variants of the task.

    python benchmarks/preflight.py [--variants 0 1 2] [--processes 2] [--only TEXT] [--output benchmarks/results/preflight.json]

recall     share of the broken set-ups that come out `bad_setup`; "with the right reason": blamed on a check that knows it
precision  share of the `bad_setup` verdicts that are about a broken set-up
limits     for each number that a rule judges: the range over sound set-ups, and over the defects that this check must find

About 5 s a set-up on a quiet core, so half an hour for three variants on two.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fundus_defects import DEFECTS, HEALTHY, Case, case
from held_apart_defects import HELD_APART
from rich.console import Console
from rich.table import Table
from small_diffusion import SmallDiffusion
from ssim import save
from unseen_defects import UNSEEN
from unseen_defects_2 import UNSEEN_2

from tune_ssim.before_launch.preflight import preflight_task
from tune_ssim.guards import NormRatio, SmokeTest
from tune_ssim.tasks.fundus_sr import FundusSR

# (seed, configuration below the defect's own): size, optimiser and clipping differ
VARIANTS: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (1, {"crop": 32, "batch_size": 4, "preset": "adamw_clip"}),
    (2, {"crop": 40, "batch_size": 6, "t_law": "shifted_sigmoid_normal", "timestep_shift": 0.5}),
]
GROUPS = {"held apart": HELD_APART, "unseen": UNSEEN, "unseen 2": UNSEEN_2}
# check → the number that decides it
DECISIVE = {
    "loss/main": "ratio",
    "data/inputs": "ratio",
    "data/reconstructions": "ratio",
    "data/predictions": "ratio",
    "data/batch": "ratio",
    "data/inputs_order": "own_wins",
    "data/reconstructions_order": "own_wins",
    "data/predictions_order": "own_wins",
    "data/latents": "ratio",
    "data/autoencoder": "correlation",
    "data/overlap": "shared_patches",
    "data/overlap_altered": "best_score",
    "sampling/repeatable": "again",
    "sampling/generated": "from_references",
    "flow/z0": "ratio",
    "flow/time": "ratio",
    "flow/t": "apart",
    "loss/main_gradient": "agreeing",
    "weights/kernels": "ratio",
    "sampling/error": "ratio",
    "targets/shift": "ratio",
    "targets/sharpness": "detail",
    "update/descent": "cosine",
    "update/fresh": "cosine",
    "ssim/precision": "cosine",
    "gradient/main": "factor",
    "gradient/ssim": "cosine",
    "gradient/pixel": "factor",
    "parameter/ssim_loss_weight": "factor",
    "parameter/ssim_grad_scale": "factor",
    "parameter/ssim_loss_max_t": "factor",
    "parameter/pixel_loss_weight": "factor",
    "parameter/pixel_loss_max_t": "factor",
    "parameter/lr": "factor",
    "weights/denoiser_ema~denoiser": "distance",
    "frozen/decoder": "repeat",
    "time_law": "p_value",
    "batches": "largest_difference",
    "baseline/norm": "ratio",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--only", default="", help=f"defects and variations whose name holds this text; or one of the groups {', '.join(GROUPS)}"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "preflight.json")
    arguments = parser.parse_args()
    jobs = [
        (kind, name, variant)
        for variant in arguments.variants
        for kind, names in (("defect", DEFECTS), ("sound", HEALTHY))
        for name in names
        if arguments.only in name or name in GROUPS.get(arguments.only, ())
    ]
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        results = []
        for result in pool.map(judge, jobs):
            results.append(result)
            mark = "" if result["right"] else "  <-- " + ("missed" if result["kind"] == "defect" else "false alarm")
            print(f"{len(results):4d}/{len(jobs)} {result['name']} [{result['variant']}]: {result['status']}{mark}", flush=True)
    summary = summarise(results)
    for table in (names_table(results), limits_table(summary["limits"])):
        Console(width=160).print(table)
    print(json.dumps({key: value for key, value in summary.items() if key != "limits"}, indent=1))
    save(arguments.output, {"variants": VARIANTS, **summary, "results": results})


def judge(job: tuple[str, str, int]) -> dict[str, Any]:
    """One set-up: what came out, and whether it is right. In a process of its own kind: defects patch modules."""
    import torch

    torch.set_num_threads(1)
    kind, name, variant = job
    with tempfile.TemporaryDirectory() as folder:
        if kind == "sound":
            return told(kind, name, variant, HEALTHY[name])
        with case(name, Path(folder)) as broken:
            return told(kind, name, variant, broken)


def told(kind: str, name: str, variant: int, found: Case) -> dict[str, Any]:
    started = time.process_time()
    seed, config = VARIANTS[variant] if issubclass(found.task, FundusSR | SmallDiffusion) else (variant, {})
    options = {"steps": found.steps, "settings": found.settings, "baseline": found.baseline}
    guards = (NormRatio(), SmokeTest()) if found.smoke_test else (NormRatio(),)
    report = preflight_task(found.task, {**config, **found.config}, seed, device="cpu", guards=guards, **options)
    bad = [check.name for check in report.of("bad_setup")]
    blamed = any(check.startswith(cause) for check in bad for cause in found.blamed)
    return {
        "kind": kind,
        "name": name,
        "variant": variant,
        "status": report.status,
        "right": blamed if kind == "defect" else not bad,
        "listed": kind == "defect" and DEFECTS[name][0],
        "group": next((group for group, names in GROUPS.items() if name in names), "tuned on"),
        "blamed": list(found.blamed),
        "bad": bad,
        "first_is_blamed": bool(bad) and any(bad[0].startswith(cause) for cause in found.blamed),
        "warned": [check.name for check in report.of("warn")],
        "reason": report.reason,
        "cpu_s": round(time.process_time() - started, 2),
        "decisive": {
            check.name: float(f"{check.evidence[DECISIVE[check.name]]:.5g}")
            for check in report.checks
            if check.name in DECISIVE and DECISIVE[check.name] in check.evidence
        },
    }


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    broken = [result for result in results if result["kind"] == "defect"]
    sound = [result for result in results if result["kind"] == "sound"]
    caught = [result for result in broken if result["status"] == "bad_setup"]
    alarms = [result for result in sound if result["status"] == "bad_setup"]
    listed = [result for result in broken if result["listed"]]
    return {
        "broken_set_ups": len(broken),
        "sound_set_ups": len(sound),
        "recall": share(caught, broken),
        "recall_with_the_right_reason": share([result for result in broken if result["right"]], broken),
        "recall_of_the_listed": share([result for result in listed if result["right"]], listed),
        "groups": {group: shares_of([result for result in results if result["group"] == group]) for group in ("tuned on", *GROUPS)},
        "first_reason_is_the_right_one": share([result for result in broken if result["first_is_blamed"]], broken),
        "precision": share(caught, [*caught, *alarms]),
        "false_alarms": [[result["name"], result["variant"], result["reason"]] for result in alarms],
        "missed": [[result["name"], result["variant"], result["reason"]] for result in broken if not result["right"]],
        "median_cpu_s": sorted(result["cpu_s"] for result in results)[len(results) // 2],
        "limits": limits(broken, sound),
    }


def shares_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    broken = [result for result in results if result["kind"] == "defect"]
    sound = [result for result in results if result["kind"] == "sound"]
    return {
        "broken_set_ups": len(broken),
        "sound_set_ups": len(sound),
        "recall": share([result for result in broken if result["status"] == "bad_setup"], broken),
        "recall_with_the_right_reason": share([result for result in broken if result["right"]], broken),
        "first_reason_is_the_right_one": share([result for result in broken if result["first_is_blamed"]], broken),
        "false_alarms": sum(result["status"] == "bad_setup" for result in sound),
    }


def share(some: list[Any], of: list[Any]) -> float | None:
    return len(some) / len(of) if of else None


def limits(broken: Iterable[dict[str, Any]], sound: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each decisive number: its range over sound set-ups, and over defects that this very check must find."""
    rows = []
    for name, key in DECISIVE.items():
        healthy = [result["decisive"][name] for result in sound if name in result["decisive"]]
        faulty = [
            r["decisive"][name]
            for r in broken
            if name in r["decisive"] and name in r["bad"] and any(map(name.startswith, r["blamed"]))
        ]
        spans = {kind: [min(values), max(values)] if values else None for kind, values in (("sound", healthy), ("broken", faulty))}
        rows.append({"check": name, "number": key, **spans})
    return rows


def names_table(results: list[dict[str, Any]]) -> Table:
    table = Table("set-up", "right", "first reason")
    for kind in ("defect", "sound"):
        for name in dict.fromkeys(result["name"] for result in results if result["kind"] == kind):
            mine = [result for result in results if result["name"] == name and result["kind"] == kind]
            table.add_row(name, f"{sum(result['right'] for result in mine)} of {len(mine)}", mine[0]["reason"][:100])
        table.add_section()
    return table


def limits_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("check", "number", "sound", "broken")
    for row in rows:
        spans = ("–" if span is None else f"{span[0]:.4g} … {span[1]:.4g}" for span in (row["sound"], row["broken"]))
        table.add_row(row["check"], row["number"], *spans)
    return table


if __name__ == "__main__":
    main()
