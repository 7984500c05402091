"""What the guards get right on recorded trainings: sound runs pruned, ruined ones missed, by what the norm guard does on an excess.

    python benchmarks/replay/policies.py [--curves FILE …] [--json OUT]

Every recorded run is played through the product's own trial, with each policy, against the recorded baseline of its seed. Its truth
comes from held-out metrics, as in truth.py: ruined; mild (outside a study's margins, not ruined); sound. No margin acts here, so a
run that no guard prunes counts as passed. Without --curves: all recordings in benchmarks/replay/curves. Writes
benchmarks/results/policies.json.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from curves import Curves, Run, recordings_option
from replay import ReplayTraining
from run import wilson
from truth import DEGRADED_DB, DEGRADED_SSIM, Truth

from tune_ssim.base.files import jsonable
from tune_ssim.guards import Baseline, Guard, NonFinite, NormRatio, SmokeTest
from tune_ssim.guards.verdict import Role, Verdict
from tune_ssim.study.space import GRAD_SCALE, MAX_T, WEIGHT
from tune_ssim.trials.final_verdict import TrialPlan
from tune_ssim.trials.job import BaselineFile, TrialJob
from tune_ssim.trials.trial_run import TrialResult, TrialRun, TrialSpec

POLICIES: dict[str, tuple[Guard, ...]] = {
    "norm alone": (NormRatio(on_excess="prune"), NonFinite()),
    "smoke alone": (NormRatio(on_excess="warn"), SmokeTest(), NonFinite()),
    "both, prune": (NormRatio(on_excess="prune"), SmokeTest(), NonFinite()),
    "both, probe": (NormRatio(on_excess="probe"), SmokeTest(), NonFinite()),
    "both, auto": (NormRatio(), SmokeTest(), NonFinite()),
}
RESULT = Path(__file__).parent.parent / "results" / "policies.json"


def measure(curves: Curves) -> dict[str, Any]:
    """One recording: counts by policy."""
    truth = Truth(curves)
    runs = [run for run in curves.runs if run.gain > 0 and run.seed in curves.seeds]
    kinds = [kind_of(truth, run) for run in runs]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = baseline_file(curves, Path(folder))
        for name, guards in POLICIES.items():
            ends = [judged(curves, guards, run, file) for run in runs]
            pruned = [end.summary.verdict is Verdict.PRUNED for end in ends]
            steps = [end.summary.steps for end, kind, cut in zip(ends, kinds, pruned, strict=True) if cut and kind == "ruined"]
            row: dict[str, Any] = {"median_step_of_a_right_prune": median(steps) if steps else None}
            for kind, label in (("sound", "sound_pruned"), ("mild", "mild_pruned"), ("ruined", "ruined_missed")):
                cut = [one for one, own in zip(pruned, kinds, strict=True) if own == kind]
                hits = sum(cut) if kind != "ruined" else len(cut) - sum(cut)
                row[label] = {"count": hits, "of": len(cut), "interval": wilson(hits, len(cut)) if cut else None}
            found[name] = row
    return {"runs": len(runs), "truth": {kind: kinds.count(kind) for kind in ("sound", "mild", "ruined")}, "policies": found}


def kind_of(truth: Truth, run: Run) -> str:
    baseline = truth.curves.baseline(run.seed)
    if truth.is_ruined(run, baseline):
        return "ruined"
    at = [truth.last(run, name) - truth.last(baseline, name) for name in ("ssim", "psnr")]
    return "sound" if at[0] >= DEGRADED_SSIM and at[1] >= DEGRADED_DB else "mild"


def baseline_file(curves: Curves, folder: Path) -> BaselineFile:
    """The recorded baselines of all seeds, as the product writes them."""
    runs = []
    for seed in curves.seeds:
        job = TrialJob(f"baseline-{seed}", curves.header["baseline"], Role.BASELINE, curves.seeds.index(seed))
        found = play(curves, (NormRatio(), NonFinite()), job).baseline
        assert found is not None
        runs.append(found.runs[0])
    baseline = Baseline(tuple(runs))
    path = folder / f"{baseline.sha256}.json"
    path.write_bytes(baseline.to_bytes())
    return BaselineFile(str(path), baseline.sha256)


def judged(curves: Curves, guards: Sequence[Guard], run: Run, baseline: BaselineFile) -> TrialResult:
    settings = {WEIGHT: run.gain, MAX_T: run.max_t, GRAD_SCALE: 1.0, "pixel_loss_weight": 0}
    job = TrialJob("run", settings, seed=curves.seeds.index(run.seed), searched=tuple(settings), baseline=baseline)
    return play(curves, guards, job)


def play(curves: Curves, guards: Sequence[Guard], job: TrialJob) -> TrialResult:
    """A trial to its end. Its seed is a position among the recorded ones."""
    plan = TrialPlan(curves.steps, tuple(guards), image_grids=False)
    spec = TrialSpec(curves.header["task"], plan, curves.header["task_config"])
    run = TrialRun(spec, job, partial(ReplayTraining, curves))
    while (result := run.advance().result) is None:
        pass
    return result


def table(found: dict[str, Any]) -> list[str]:
    lines = ["| recording | policy | sound pruned | mild pruned | ruined missed | step of a right prune |", "|---" * 6 + "|"]
    for name, one in found.items():
        for policy, row in one["policies"].items():
            cells = [f"{row[key]['count']} of {row[key]['of']}" for key in ("sound_pruned", "mild_pruned", "ruined_missed")]
            lines.append(f"| {name} | {policy} | " + " | ".join(cells) + f" | {row['median_step_of_a_right_prune'] or '-'} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = recordings_option(__doc__)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    found = {curves.name: measure(curves) for curves in map(Curves.read, options.curves)}
    print("\n".join(table(found)))
    options.json.write_text(json.dumps(jsonable(found), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
