"""Studies on disk as a run leaves them, made through `StudyFolder` itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.trials.summary import TrialSummary

TESTS = Path(__file__).parent
# A study of the small task, as a mapping: seconds a trial.
SMALL: dict[str, Any] = {
    "name": "small",
    "task": "small_task:SmallTask",
    "import_path": str(TESTS),
    "task_config": {"steps": 40},
    "baseline": {"seeds": 2},
    "space": {
        "name": "inline",
        "parameters": {"gain": {"log_uniform": [0.01, 3000]}},
        "fixed": {"ssim_grad_scale": 1.0, "ssim_loss_max_t": 0.3},
        "points": [
            {"ssim_loss_weight": 1000.0, "ssim_loss_max_t": 0.3, "ssim_grad_scale": 1.0},
            {"ssim_loss_weight": 1.0, "ssim_loss_max_t": 0.3, "ssim_grad_scale": 1.0},
        ],
    },
    "search": {"trials": 8, "seed": 0, "concurrency": 2},
    "guards": {"smoke_test": {"at": [0, 10, 20]}},
    "objective": {"keep": {"psnr": {"min_delta": -100}}},
    "preflight": None,
    "calibration": None,
    "confirm": None,
    "tracking": None,
}

SETTING = {"ssim_loss_weight": 30.0, "ssim_loss_max_t": 0.3, "ssim_grad_scale": 1.0}


def trial(
    trial_id: str,
    verdict: str = "safe",
    delta_ssim: Any = 0.005,
    *,
    role: str = "search",
    config: Mapping[str, Any] | None = None,
    **changes: Any,
) -> TrialSummary:
    reasons = {
        "safe": "safe to step 200, batch 8, lr 0.005",
        "pruned": "total_norm is 32 times the baseline's over steps 1-10",
        "degraded": "PSNR is 3.1 dB below the baseline, more than the 0.3 dB allowed",
    }
    summary = {
        "trial_id": trial_id,
        "run_id": None,
        "role": role,
        "config": {**SETTING, **(config or {})},
        "verdict": verdict,
        "reason": reasons.get(verdict, f"{verdict} for a reason"),
        "horizon": {"steps": 200, "batch_size": 8, "lr": 0.005},
        "evidence": {"guard": "norm_ratio", "step": 10, "metric": "norm_ratio", "value": 32.1, "limit": 10.0}
        if verdict == "pruned"
        else None,
        "steps": 10 if verdict == "pruned" else 200,
        "metrics": {"ssim": 0.9, "delta_ssim": delta_ssim, "psnr": 32.7, "norm_ratio_max": 2.2},
    }
    return TrialSummary.from_dict(summary | changes)


def baseline(trial_id: str = "baseline-0") -> TrialSummary:
    return trial(trial_id, delta_ssim=0.0, role="baseline", config={"ssim_loss_weight": 0.0})


def study(storage: Path, *trials: TrialSummary, name: str = "fundus-ssim", yaml: str = "name: fundus-ssim\n") -> StudyFolder:
    folder = StudyFolder(storage / name).create()
    folder.study_file.write_text(yaml, encoding="utf-8")
    for summary in trials:
        folder.add_trial(summary)
    return folder


USUAL = (
    baseline(),
    baseline("baseline-1"),
    trial("00002", delta_ssim=0.0065, config={"ssim_loss_weight": 10.0}),
    trial("00003", "pruned", "NaN", config={"ssim_loss_weight": 1000.0}),
    trial("00004", delta_ssim=0.0084, config={"ssim_loss_weight": 30.0}),
    trial("00005", "degraded", 0.02, config={"ssim_loss_weight": 200.0}),
)
