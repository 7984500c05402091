"""A trial without Ray: verdicts, evidence, resuming, and the real collapse on the real task."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_task import SmallTask

from tune_ssim.base.errors import UserError
from tune_ssim.guards import Baseline, Divergence, Guard, KeepRule, NonFinite, NormRatio, SmokeTest
from tune_ssim.tasks.fundus_sr import FundusSR
from tune_ssim.trials.final_verdict import TrialPlan, harm_of
from tune_ssim.trials.job import BaselineFile, TrialJob
from tune_ssim.trials.trial import Trial
from tune_ssim.trials.trial_run import TrialRun, TrialSpec

ALL: tuple[Guard, ...] = (NormRatio(), SmokeTest(at=(0, 10, 20)), NonFinite())
STEPS = 40


def trial(role: str = "search", baseline: Baseline | None = None, guards: tuple[Guard, ...] = ALL, **config: Any) -> Trial:
    plan = {key: config.pop(key) for key in ("keep", "report_every") if key in config}
    made = Trial(SmallTask(), TrialPlan(steps=STEPS, guards=guards, **plan))
    made.start({"steps": STEPS, **config}, role=role, baseline=baseline, searched=config.pop("searched", ()))
    return made


@pytest.fixture(scope="module")
def baseline() -> Baseline:
    made = trial("baseline")
    made.advance()
    assert made.verdict is not None and made.verdict.verdict == "safe", made.verdict
    return Baseline((made.baseline_run("baseline-0"),))


def test_a_harmless_setting_is_safe_and_says_how_far(baseline: Baseline) -> None:
    made = trial(baseline=baseline, ssim_loss_weight=1.0)
    records = made.advance()
    assert made.verdict is not None and made.verdict.verdict == "safe"
    assert [record.step for record in records] == list(range(STEPS + 1))
    assert made.horizon()["steps"] == STEPS and made.horizon()["lr"] == 0.1
    assert {"ssim", "psnr", "delta_ssim", "delta_psnr", "norm_ratio_max"} <= set(made.summary_metrics())
    assert made.harm() <= 0
    assert made.advance() == []


def test_a_violent_setting_is_pruned_with_evidence(baseline: Baseline) -> None:
    made = trial(baseline=baseline, ssim_loss_weight=300.0)
    records = made.advance()
    verdict = made.verdict
    assert verdict is not None and verdict.verdict == "pruned" and verdict.violation is not None
    evidence = verdict.violation.evidence()
    assert evidence["guard"] == "norm_ratio" and evidence["value"] > evidence["limit"] == 10
    assert evidence["step"] == 11 == records[-1].step == made.step  # ten active steps make a window, patience 2
    assert made.harm() > 0


def test_without_the_norm_guard_the_smoke_test_prunes(baseline: Baseline) -> None:
    made = trial(baseline=baseline, guards=ALL[1:2], ssim_loss_weight=300.0)
    made.advance()
    assert made.verdict is not None and made.verdict.violation is not None
    assert (made.verdict.violation.guard, made.step) == ("smoke_test", 20)


@pytest.mark.parametrize("report_every", [1, 7, 40])
def test_batched_reports_give_the_same_step_and_discard_what_came_later(baseline: Baseline, report_every: int) -> None:
    made = trial(baseline=baseline, report_every=report_every, ssim_loss_weight=300.0, guards=ALL[:1])
    records = made.advance()
    assert made.verdict is not None and made.verdict.violation is not None
    assert made.verdict.violation.step == 11 and records[-1].step == 11 and made.step == 11


def test_clipping_turns_the_prune_into_a_probe(baseline: Baseline) -> None:
    clipped = trial("baseline", max_grad_norm=0.05)
    clipped.advance()
    reference = Baseline((clipped.baseline_run(),))
    made = trial(baseline=reference, ssim_loss_weight=300.0, max_grad_norm=0.05, guards=(NormRatio(), SmokeTest(at=(0,))))
    made.advance()
    assert made.warnings and made.warnings[0].action == "probe"
    assert made.verdict is not None and made.verdict.verdict == "safe"  # a high norm, clipped, has done no harm


def test_non_finite_and_exceptions_of_the_training(baseline: Baseline) -> None:
    made = trial(baseline=baseline, fault="nan_at_5")
    made.advance()
    assert made.verdict is not None and made.verdict.violation is not None
    assert (made.verdict.violation.guard, made.verdict.violation.step) == ("non_finite", 5)
    with pytest.raises(RuntimeError, match="the training broke"):
        trial(baseline=baseline, fault="raise_at_5").advance()


class FailsAfterwards(SmallTask):
    """A process whose end, or the look at the files that it wrote, fails."""

    reports_after_last_step = True

    def close(self, verdict: str = "", reason: str = "") -> None:
        raise OSError("stale file handle")


@pytest.mark.parametrize(("weight", "verdict"), [(300.0, "pruned"), (1.0, "safe")])
def test_the_first_verdict_stands_if_the_training_fails_afterwards(
    tmp_path: Path, baseline: Baseline, weight: float, verdict: str
) -> None:
    file = tmp_path / baseline.sha256
    file.write_bytes(baseline.to_bytes())
    job = TrialJob("t", {"ssim_loss_weight": weight}, baseline=BaselineFile(str(file), baseline.sha256))
    run = TrialRun(TrialSpec(FailsAfterwards, TrialPlan(steps=STEPS, guards=ALL), result_every=STEPS), job)
    with pytest.warns(UserWarning, match="t: the training's close: OSError: stale file handle"):
        result = run.advance().result
    assert result is not None and result.summary.verdict == verdict
    assert any("after the verdict: OSError: stale file handle" in line for line in result.summary.warnings)


def test_a_ruined_start_is_a_bad_setup_not_a_setting(baseline: Baseline) -> None:
    made = trial(baseline=baseline, fault="ruined_start", ssim_loss_weight=1.0)
    records = made.advance()
    assert made.verdict is not None and made.verdict.verdict == "bad_setup"
    assert [record.step for record in records] == [0]


def test_a_parameter_that_does_not_arrive_is_a_bad_setup(baseline: Baseline) -> None:
    made = trial(baseline=baseline, fault="drops_weight", ssim_loss_weight=1.0)
    made.advance()
    assert made.verdict is not None and made.verdict.verdict == "bad_setup"
    assert "ssim_loss_weight was set to 1.0 but 0.0 is in force" in made.verdict.reason


def test_a_missing_metric_is_an_error_never_a_pass(baseline: Baseline) -> None:
    made = trial(baseline=baseline, fault="no_norm")
    made.advance()
    assert made.verdict is not None and made.verdict.verdict == "error"
    assert "guard 'norm_ratio': metric 'total_norm' absent from the first 20 records; saw" in made.verdict.reason


class OddlyNamed(SmallTask):
    """Reports its loss under `name` alone, from step `after` on if given."""

    def __init__(self, name: str, after: int = 0) -> None:
        self.name, self.after = name, after

    def step(self) -> dict[str, float | torch.Tensor]:
        values = super().step()
        loss = values.pop("loss") if self.n > self.after else values["loss"]
        return values if self.name == "" and self.n > self.after else {**values, self.name or "loss": loss}


@pytest.mark.parametrize(
    ("task", "verdict", "said"),
    [
        (OddlyNamed("loss_flow"), "safe", "guard 'divergence' judged nothing: no record has loss; saw loss_flow, ssim_active"),
        (OddlyNamed("", after=12), "error", "loss is missing in 28 of 40 records, from step 13 on: the end of the training was"),
        (OddlyNamed("loss_flow", after=12), "safe", "loss is missing in 28 of 40 records, from step 13 on"),
        (OddlyNamed("loss"), "safe", ""),
        (OddlyNamed("", after=35), "safe", ""),  # five records: a test after the training
    ],
)
def test_a_loss_that_is_not_reported_is_not_passed_over(
    baseline: Baseline, tmp_path: Path, task: SmallTask, verdict: str, said: str
) -> None:
    def started() -> Trial:
        made = Trial(task, TrialPlan(steps=STEPS, guards=(*ALL, Divergence())))
        made.start({"steps": STEPS, "ssim_loss_weight": 1.0}, baseline=baseline, searched=())
        return made

    made = started()
    made.advance()
    assert made.verdict is not None and made.verdict.verdict == verdict, made.verdict
    found = made.verdict.reason if verdict == "error" else "; ".join(made.remarks)
    assert found.startswith(said) and bool(found) == bool(said)
    first = started()
    first.advance(30)
    first.save(tmp_path / "c")
    resumed = started()
    resumed.load(tmp_path / "c")
    resumed.advance()
    assert resumed.verdict == made.verdict


def test_another_training_is_not_comparable(baseline: Baseline) -> None:
    made = trial(baseline=baseline, lr=0.05)
    made.advance()
    assert made.verdict is not None and made.verdict.verdict == "bad_setup" and "lr is 0.05 here" in made.verdict.reason
    searched = Trial(SmallTask(), TrialPlan(steps=STEPS, guards=ALL))
    searched.start({"steps": STEPS, "lr": 0.05, "ssim_loss_weight": 1000.0}, baseline=baseline, searched=["lr", "ssim_loss_weight"])
    searched.advance()
    assert searched.verdict is not None and "unpaired" in searched.verdict.reason


def test_worse_than_the_margin_is_degraded(baseline: Baseline) -> None:
    made = trial(baseline=baseline, ssim_loss_weight=20.0, keep=(KeepRule("psnr", min_delta=1e6),))
    made.advance()
    assert made.verdict is not None and made.verdict.verdict == "degraded"
    assert made.verdict.violation is not None and made.verdict.violation.metric == "psnr"
    assert made.harm() > 0


def test_the_worst_broken_margin_is_the_reason_and_grades_the_harm(baseline: Baseline) -> None:
    def degraded(*keep: KeepRule) -> Trial:
        made = trial(baseline=baseline, ssim_loss_weight=20.0, keep=keep)
        made.advance()
        assert made.verdict is not None and made.verdict.verdict == "degraded"
        return made

    slight, strong = KeepRule("psnr", min_ratio=5.0), KeepRule("ssim", min_ratio=50.0)
    assert degraded(slight).harm() < degraded(strong).harm() == degraded(slight, strong).harm()
    both = degraded(slight, strong).verdict
    assert both is not None and both.reason.startswith("SSIM")


@pytest.mark.parametrize(
    ("value", "limit", "harm"),
    [(20.0, 2.0, 1.0), (-3.0, -0.3, 1.0), (2.0, 2.0, 0.05), (-0.31, -0.3, 0.05), (-9.0, 0.0, 1.0), (math.nan, 1.0, 1.0)],
)
def test_harm_beyond_a_margin_is_counted_in_decades(value: float, limit: float, harm: float) -> None:
    evidence = {"guard": "objective", "step": 40, "metric": "m", "value": value, "limit": limit}
    assert harm_of("degraded", evidence, 40, 40) == pytest.approx(harm)


def test_a_keep_rule_that_nothing_can_judge_is_said(baseline: Baseline) -> None:
    unknown, usual = KeepRule("psnrs", min_delta=-1), KeepRule("flow_loss_bins", max_ratio=2.0)
    for made in (trial("baseline", keep=(unknown, usual)), trial(baseline=baseline, keep=(unknown, usual))):
        made.advance()
        assert made.remarks == (
            "objective.keep: psnrs: not measured by the baseline, so nothing was judged by it; did you mean 'psnr'?",
        )


def test_a_trial_without_a_metric_that_the_baseline_kept_is_not_safe(baseline: Baseline) -> None:
    (run,) = baseline.runs
    with_lpips = Baseline((replace(run, evaluation={**run.evaluation, "lpips/vgg": 0.1}),))
    made = trial(baseline=with_lpips, keep=(KeepRule("lpips", max_ratio=1.1),))
    made.advance()
    assert made.verdict is not None and made.verdict.verdict == "error"
    assert made.verdict.reason == "objective.keep: the baseline measured lpips, this trial did not"


def evaluated(baseline: Baseline | None, role: str = "search", rival: tuple[int, float] | None = None, **config: Any) -> Trial:
    made = Trial(SmallTask(), TrialPlan(steps=STEPS, guards=ALL, evaluate_at=(10, 20)))
    made.start({"steps": STEPS, **config}, role=role, baseline=baseline, rival=rival)
    return made


@pytest.fixture(scope="module")
def evaluated_baseline() -> Baseline:
    made = evaluated(None, "baseline")
    made.advance()
    return Baseline((made.baseline_run("baseline-0"),))


def test_evaluations_on_the_way_change_nothing_and_are_compared_with_the_baseline(
    baseline: Baseline, evaluated_baseline: Baseline
) -> None:
    found, plain = evaluated(evaluated_baseline, ssim_loss_weight=1.0), trial(baseline=baseline, ssim_loss_weight=1.0)
    records = found.advance()
    assert [record.step for record in records if "ssim" in record.values] == [10, 20]
    assert list(evaluated_baseline.runs[0].series["ssim"]) == [10, 20]
    improvements = [
        record.values["ssim"] - evaluated_baseline.runs[0].series["ssim"][record.step]
        for record in records
        if "ssim" in record.values
    ]
    assert found.curve == [(10, improvements[0]), (20, improvements[1])]
    without = [{name: value for name, value in record.values.items() if name != "ssim"} for record in records]
    assert without == [dict(record.values) for record in plain.advance()]


def test_a_trial_behind_its_rival_is_stopped_there(evaluated_baseline: Baseline) -> None:
    behind = evaluated(evaluated_baseline, rival=(20, 1.0), ssim_loss_weight=1.0)
    behind.advance()
    assert behind.verdict is not None and behind.verdict.verdict == "stopped" and behind.step == 20
    assert "stopped at step 20, since it is behind" in behind.verdict.reason and behind.harm() == 0
    ahead = evaluated(evaluated_baseline, rival=(20, -1.0), ssim_loss_weight=1.0)
    ahead.advance()
    assert ahead.verdict is not None and ahead.verdict.verdict == "safe"


@pytest.mark.parametrize("at", [3, 10, 15, 20])
def test_a_resumed_trial_keeps_its_evaluations(evaluated_baseline: Baseline, tmp_path: Path, at: int) -> None:
    straight, first, second = (evaluated(evaluated_baseline, ssim_loss_weight=1.0) for _ in range(3))
    straight.advance()
    first.advance(at)
    first.save(tmp_path / "c")
    second.load(tmp_path / "c")
    second.advance()
    assert second.curve == straight.curve and second.verdict == straight.verdict


@pytest.mark.parametrize("at", [0, 3, 11, 39])
def test_resuming_anywhere_changes_nothing(baseline: Baseline, tmp_path: Path, at: int) -> None:
    straight = trial(baseline=baseline, ssim_loss_weight=40.0)
    whole = straight.advance()
    first = trial(baseline=baseline, ssim_loss_weight=40.0)
    early = first.advance(at)
    first.save(tmp_path / "c")
    second = trial(baseline=baseline, ssim_loss_weight=40.0)
    second.load(tmp_path / "c")
    late = second.advance()
    assert early + late == whole
    assert second.verdict == straight.verdict and second.summary_metrics() == straight.summary_metrics()


def test_a_checkpoint_of_another_trial_is_refused(baseline: Baseline, tmp_path: Path) -> None:
    first = trial(baseline=baseline, ssim_loss_weight=40.0)
    first.advance(5)
    first.save(tmp_path / "c")
    for other in (trial(baseline=baseline, ssim_loss_weight=41.0), trial("baseline", ssim_loss_weight=40.0)):
        with pytest.raises(UserError, match="checkpoint"):
            other.load(tmp_path / "c")


# -- the decisive ones, on the real task: harmful settings are caught, harmless ones are not. Limits and steps are the defaults.


def fundus(seed: int, baseline: Baseline | None = None, guards: tuple[Guard, ...] | None = None, **config: Any) -> Trial:
    made = Trial(FundusSR(), TrialPlan(steps=60, guards=guards or (NormRatio(), SmokeTest(), NonFinite())))
    base = {"steps": 60, "pixel_loss_weight": 0.0}
    made.start({**base, **config}, seed=seed, role="search" if baseline else "baseline", baseline=baseline, device="cpu")
    made.advance()
    return made


@pytest.mark.e2e  # the README's study has a safe and a pruned trial of the same task
@pytest.mark.parametrize("seed", [0, 3])
def test_fundus_gain_30_survives_and_gain_1000_does_not(seed: int) -> None:
    reference = fundus(seed, pixel_loss_weight=0.05)
    assert reference.verdict is not None and reference.verdict.verdict == "safe"
    baseline = Baseline((reference.baseline_run(),))
    for gain, verdict, guard in ((0.1, "safe", None), (30.0, "safe", None), (1000.0, "pruned", "norm_ratio")):
        made = fundus(seed, baseline, ssim_loss_weight=gain, ssim_loss_max_t=0.3)
        assert made.verdict is not None and made.verdict.verdict == verdict, (gain, made.verdict)
        assert (made.verdict.violation.guard if made.verdict.violation else None) == guard
    # At 1000 the samples come and go from one smoke test to the next; from 2000 on they are gone for good.
    blind = fundus(seed, baseline, (SmokeTest(), NonFinite()), ssim_loss_weight=2000.0, ssim_loss_max_t=0.3)
    assert blind.verdict is not None and blind.verdict.violation is not None
    assert blind.verdict.violation.guard == "smoke_test"
