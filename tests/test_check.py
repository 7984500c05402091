"""`tune-ssim check`: the same alerts as live through every door, a verdict a branch, and never a traceback."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs_of_branches import HEALTHY, Values, after, changed, falling, flat, of_heads, records

from tune_ssim.base.errors import UserError
from tune_ssim.cli.app import exit_code
from tune_ssim.cli.log_arguments import open_log
from tune_ssim.guards import Threshold, Violation, Watch
from tune_ssim.guards.baseline_log import baseline_of_source
from tune_ssim.guards.branch_report import judge_branch
from tune_ssim.guards.curves import MAX_BLOCKS, Curve
from tune_ssim.guards.log_check import LogCheck, check_log
from tune_ssim.guards.rule_pack import Branch, load_rules
from tune_ssim.records import Record
from tune_ssim.records.metric_names import usual_names
from tune_ssim.records.record_table import Column

ROOT = Path(__file__).resolve().parents[1]
RUINED = {
    "kl_raw": after(400, lambda step: 10 * math.exp((step - 400) / 500), flat(10)),
    "dbg__flow_has_grad": after(500, lambda step: 20, lambda step: 40),
    "dino_global": after(300, flat(0.62, 0.01), falling(0.9, 0.4, 300, 0.01)),
}
STREAM = records(1200, **changed(HEALTHY["flow_dino_kl"], **RUINED))


def write_jsonl(path: Path, stream: Sequence[Record]) -> Path:
    path.write_text("".join(json.dumps({"step": record.step, **record.values}) + "\n" for record in stream))
    return path


def write_csv(path: Path, stream: Sequence[Record]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *stream[0].values])
        writer.writeheader()
        writer.writerows({"step": record.step, **record.values} for record in stream)
    return path


def write_text(path: Path, stream: Sequence[Record]) -> Path:
    lines = (f"step: {r.step} " + " ".join(f"{name}: {value!r}" for name, value in r.values.items()) for r in stream)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_tensorboard(path: Path, stream: Sequence[Record]) -> Path:
    from tensorboardX import SummaryWriter

    path.mkdir()
    with SummaryWriter(str(path), flush_secs=600) as writer:
        for record in stream:
            for name in ("kl_raw", "dino_global", "dbg/flow_has_grad", "dbg/flow_trainable"):  # it takes its time
                writer.add_scalar(name, record.values[name], record.step)
    return path


def told(violations: Sequence[Violation]) -> list[tuple[str, int]]:
    return [(violation.guard, violation.step) for violation in violations]


def checked(path: Path, **options: Any) -> dict[str, Any]:
    return check_log(open_log(str(path), {}), **options).to_json()


# ---- one run through several doors


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_text, write_tensorboard], ids=lambda write: write.__name__)
def test_every_door_gives_the_alerts_of_a_live_watch(tmp_path: Path, write: Callable[[Path, Sequence[Record]], Path]) -> None:
    pack = load_rules("flow_dino_kl")
    live = Watch(pack.rules).fold(STREAM)
    assert {guard for guard, _ in told(live)} == {f"flow_dino_kl/{rule}" for rule in ("kl_rising", "coverage:flow", "dino_stuck")}
    report = checked(write(tmp_path / "run.log", STREAM), packs=["flow_dino_kl"])
    assert [(alert["guard"], alert["step"]) for alert in report["alerts"]] == told(live)
    assert report["records"] == len(STREAM)


def test_an_alert_is_what_the_guard_said(tmp_path: Path) -> None:
    stream = records(50, loss_ssim=after(30, lambda step: 2.5, lambda step: 0.4))
    live = Watch(load_rules("ssim").rules, strict=False).fold(stream)
    report = checked(write_csv(tmp_path / "run.csv", stream))
    alert = report["alerts"][0]
    assert alert["sentence"] == live[0].sentence == "1 - SSIM cannot be outside [0, 2]: loss_ssim is 2.5, outside [-0.001, 2]"
    assert (alert["step"], alert["value"], alert["limit"], alert["source"]) == (30, 2.5, 2, "SEEDS A7")
    assert alert["cause"] == live[0].cause
    assert alert["remedy"] == live[0].remedy
    assert report["ended"] == {"guard": "ssim/ssim_range", "step": 30, "action": "prune"}


def test_it_reads_on_after_what_would_have_ended_a_live_trial(tmp_path: Path) -> None:
    pack = {"name": "p", "rules": {"a": {"when": {"metric": "loss", "above": 1}, "action": "prune"}}}
    (tmp_path / "p.yaml").write_text(json.dumps(pack))
    log = write_csv(tmp_path / "run.csv", [Record(i, {"loss": 2.0 if i in (5, 9) else 0.5}) for i in range(12)])
    report = checked(log, packs=[tmp_path / "p.yaml"])
    assert [(alert["step"], alert["after_end"]) for alert in report["alerts"]] == [(5, False), (9, True)]
    assert report["last_step"] == 11


def test_a_rule_that_speaks_without_end_is_counted(tmp_path: Path) -> None:
    check = LogCheck([load_rules({"name": "p", "rules": {"a": {"when": {"metric": "loss", "above": 1}}}})])
    check.feed([Record(i, {"loss": 2.0 * (i % 2)}) for i in range(2000)])
    report = check.report()
    assert sum(alert.times for alert in report.alerts) == 1000
    assert len(report.alerts) == 20
    assert report.alerts[-1].last_step == 1999


# ---- which packs


@pytest.mark.parametrize("name", sorted(HEALTHY))
def test_the_pack_is_found_by_the_names_and_a_healthy_log_is_healthy(tmp_path: Path, name: str) -> None:
    stream = records(1500, **HEALTHY[name])
    report = checked(write_csv(tmp_path / "run.csv", stream))
    assert report["verdict"] == "healthy"
    assert report["alerts"] == []
    assert [rules["pack"] for rules in report["rules"]] == [name]
    verdicts = {branch["branch"]: branch["verdict"] for branch in report["branches"]}
    assert "does_not_work" not in verdicts.values()
    if name == "flow_dino_kl":
        assert verdicts == {"flow": "works", "dino": "works", "kl": "works"}


def test_gradient_accumulation_is_read_from_the_log(tmp_path: Path) -> None:
    heads = {key: value for tag, count in (("flow", 40), ("dino_t_head", 12), ("mu_head", 2), ("logvar_head", 2))
             for key, value in of_heads(tag, count, ga=4).items()}  # fmt: skip
    log = write_csv(tmp_path / "run.csv", records(400, **changed(HEALTHY["flow_dino_kl"], **heads)))
    report = checked(log)
    assert report["rules"][0]["options"]["ga"] == 4
    assert report["alerts"] == []
    assert {alert["guard"] for alert in checked(log, options={"ga": 1})["alerts"]} >= {"flow_dino_kl/coverage:flow"}


def test_a_rule_whose_metric_is_not_there_is_unknown(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "run.csv", records(300, loss_reconstruction=falling(1, 0.4, 100)))
    report = checked(log)
    unknown = {one["guard"]: one["reason"] for one in report["unknown"]}
    assert unknown["vae_kl/kl_rising"] == "no metric kl_raw"
    assert "vae_kl/kl_rising" not in report["judged"]
    assert report["judged"] == ["non_finite", "vae_kl/recon_flat"]


def test_a_log_that_ends_too_soon_is_unknown(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "run.csv", records(150, loss_reconstruction=falling(1, 0.4, 100), kl_raw=flat(9)))
    reasons = {one["guard"]: one["reason"] for one in checked(log)["unknown"]}
    too_soon = "a trend over 200 steps needs 20 records that span them"
    assert reasons["vae_kl/recon_flat"] == f"{too_soon}; the log ends before"
    assert reasons["vae_kl/kl_rising"] == f"{too_soon} after step 1000; the log ends before"


def test_it_does_not_matter_when_a_metric_comes(tmp_path: Path) -> None:
    """Which packs a log is about is known at its end, whatever the form of the log and the size of the pieces it is read in."""
    late = records(4000, loss=falling(1, 0.3, 500), dino_global=flat(0.9), more=flat(1), and_more=flat(2))
    stream = [r if r.step >= 1500 else Record(r.step, {k: v for k, v in r.values.items() if k != "dino_global"}) for r in late]
    found = []
    for path in (write_jsonl(tmp_path / "a.jsonl", stream), write_text(tmp_path / "b.log", stream)):
        report = checked(path)
        assert [rules["pack"] for rules in report["rules"]] == ["flow_dino_kl"]
        found.append([(alert["guard"], alert["step"]) for alert in report["alerts"]])
    assert found[0] == found[1]
    assert "flow_dino_kl/dino_stuck" in {guard for guard, _ in found[0]}


def test_the_same_pack_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_csv(tmp_path / "run.csv", STREAM)
    code, _, err = run(capsys, log, "--rules", "flow_dino_kl", "--rules", "flow_dino_kl")
    assert code == 2
    assert "two rule packs are called flow_dino_kl" in err


def test_a_branch_that_does_not_work_is_not_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = records(1500, **changed(HEALTHY["flow_dino_kl"], loss_flow=flat(0.9, 0.01), dbg__grad_flow=flat(0.5)))
    code, out, _ = run(capsys, write_csv(tmp_path / "flat.csv", stream))
    assert code == 3
    assert "does not work: flow" in out
    report = checked(tmp_path / "flat.csv")
    assert report["verdict"] == "does_not_work"
    assert report["alerts"] == []


def test_a_norm_that_is_no_number_needs_no_loss(tmp_path: Path) -> None:
    report = checked(write_csv(tmp_path / "run.csv", records(60, total_norm=after(30, flat(math.nan), flat(1)))))
    assert [(alert["guard"], alert["step"]) for alert in report["alerts"]] == [("non_finite", 30)]


@pytest.mark.parametrize(
    ("loss", "verdict"),
    [
        (falling(1, 0.3, 300), "healthy"),
        (flat(0.9), "healthy"),  # as a fine-tuning
        (lambda step: 2 * math.exp(step / 1500), "does_not_work"),
        (lambda step: 2 * math.exp(step / 150), "alerts"),  # more than ten times its start
        (after(500, lambda step: min(0.4 + (step - 500) / 1000, 0.9), falling(1, 0.4, 150)), "does_not_work"),
    ],
)
def test_a_log_that_no_pack_is_about(tmp_path: Path, loss: Values, verdict: str) -> None:
    report = checked(write_csv(tmp_path / "run.csv", records(1500, loss=loss, total_norm=flat(1))))
    assert report["rules"] == []
    assert report["verdict"] == verdict
    assert [branch["branch"] for branch in report["branches"]] == ["training"]


def test_steps_that_begin_again_are_no_healthy_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": step, "loss": 1.0 if not epoch else 1e6} for epoch in range(5) for step in range(200)]
    (tmp_path / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = checked(tmp_path / "epochs.jsonl")
    assert (report["verdict"], report["records"]) == ("unknown", 200)
    code, out, _ = run(capsys, tmp_path / "epochs.jsonl")
    assert code == 4 and out.startswith("unknown: ")
    assert run(capsys, tmp_path / "epochs.jsonl", "--exit-zero")[0] == 0
    assert "796 rows were passed over or unread and 200 judged" in out


def test_why_nothing_is_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "half.jsonl").write_text("".join(json.dumps({"step": n + 0.5, "loss": 1.0}) + "\n" for n in range(100)))
    code, _, err = run(capsys, tmp_path / "half.jsonl")
    assert code == 2
    assert "half.jsonl: no rule knows any metric" in err
    assert "100 of 100 lines could not be read" in err
    assert "not an integer >= 0" in err


# ---- branches (SEEDS C5)


def branch_of(stream: Sequence[Record], name: str = "flow") -> dict[str, Any]:
    check = LogCheck([load_rules("flow_dino_kl")])
    check.feed(stream)
    return next(branch for branch in check.report().to_json()["branches"] if branch["branch"] == name)


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        ({}, "works", "loss_flow fell from"),
        ({"loss_flow": flat(0.9)}, "does_not_work", "loss_flow did not fall: from 0.9"),
        ({"loss_flow": lambda s: 1 + s / 500}, "does_not_work", "loss_flow rose: from 1"),
        ({"dbg__grad_flow": lambda s: 0.0}, "does_not_work", "dbg/grad_flow is zero from the first record on"),
        ({"dbg__grad_flow": after(500, lambda s: 0.0, flat(0.3))}, "does_not_work", "dbg/grad_flow is zero after step 499"),
        ({"dbg__grad_flow": lambda s: math.nan}, "does_not_work", "dbg/grad_flow is not finite from the first record on"),
        ({"dbg__grad_flow": lambda s: float(s % 4 > 0)}, "does_not_work", "zero or not finite in 25% of the records"),
        ({"dbg__flow_has_grad": lambda s: 20}, "does_not_work", "coverage is 0.5 in every record, and should be 1"),
        ({"dbg__flow_trainable": lambda s: 0}, "does_not_work", "coverage is not a number in every record"),
        ({"loss_flow": flat(1.0, 3.0)}, "unknown", "too noisy to tell"),
    ],
)
def test_a_branch(change: dict[str, Any], verdict: str, said: str) -> None:
    found = branch_of(records(1000, **changed(HEALTHY["flow_dino_kl"], **change)))
    assert found["verdict"] == verdict
    assert said in "; ".join(finding["sentence"] for finding in found["findings"])


@pytest.mark.parametrize("gone", ["loss_flow", "dbg__grad_flow", "dbg__flow_has_grad"])
def test_a_branch_of_which_a_metric_is_missing_is_unknown(gone: str) -> None:
    metrics = {name: values for name, values in HEALTHY["flow_dino_kl"].items() if name != gone}
    found = branch_of(records(1000, **metrics))
    assert found["verdict"] == "unknown"
    assert f"no metric {gone.replace('__', '/')}" in "; ".join(finding["sentence"] for finding in found["findings"])


def test_a_branch_whose_alert_holds_at_the_end_does_not_work() -> None:
    """Its loss fell over the whole log, but stands still since step 300."""
    found = branch_of(STREAM, "dino")
    assert found["verdict"] == "does_not_work"
    assert "dino_stuck holds since step" in found["findings"][0]["sentence"]


def column(steps: Sequence[int], values: Iterable[float]) -> Column:
    return Column(range(len(steps)), steps, list(map(float, values)))


@pytest.mark.parametrize("seed", range(8))
def test_a_regulariser_that_holds_still_works_whichever_way_its_noise_goes(seed: int) -> None:
    pack = load_rules("flow_dino_kl")
    kl = next(branch for branch in pack.branches.values() if branch.may_rise)
    curve = Curve()
    curve.add(column(range(2000), 3 + 0.1 * np.random.default_rng(seed).standard_normal(2000)))
    found = judge_branch(pack, "kl", kl, {"kl_raw": curve}).findings[0]
    assert found.answer == "yes" and "has settled" in found.sentence
    rising = Curve()
    rising.add(column(range(2000), 3 + np.arange(2000) / 500 + 0.1 * np.random.default_rng(seed).standard_normal(2000)))
    assert judge_branch(pack, "kl", kl, {"kl_raw": rising}).findings[0].answer == "unknown"


def test_a_loss_that_is_no_number_at_the_end_does_not_work() -> None:
    gone = after(1050, flat(math.nan), falling(1.2, 0.4, 300))
    found = branch_of(records(2000, **changed(HEALTHY["flow_dino_kl"], loss_flow=gone)))
    assert found["verdict"] == "does_not_work"
    assert found["findings"][0]["sentence"].startswith("loss_flow is not finite after step 10")


@pytest.mark.parametrize("low", [1, 20, 60, 150])
def test_a_loss_that_falls_at_the_very_end_has_not_risen(low: int) -> None:
    """A learning rate that is lowered, a sudden insight: the log ends in the lowest values."""
    values = 2.5 + 0.05 * np.random.default_rng(0).standard_normal(1500)
    values[-low:] -= 1
    curve = Curve()
    curve.add(column(range(1500), values))
    found = judge_branch(None, "training", Branch(loss="loss", may_be_flat=True), {"loss": curve}).findings[0]
    assert found.answer != "no"
    curve.add(column(range(1500, 2000), values[:500]))
    found = judge_branch(None, "training", Branch(loss="loss", may_be_flat=True), {"loss": curve}).findings[0]
    assert found.answer == "no" if low == 150 else found.answer in ("no", "unknown")


def test_what_follows_from_a_nan_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {name: after(300, flat(math.nan), values) for name, values in HEALTHY["vae_kl"].items()}
    log = write_csv(tmp_path / "run.csv", records(1500, **broken))
    report = checked(log)
    assert len(report["alerts"]) > 5 and report["ended"]["guard"] == "non_finite"
    _, out, _ = run(capsys, log)
    _, _, after_that = " ".join(out.split()).partition("after that, rules whose metrics became non-finite: ")
    assert "recon_flat (step" in after_that and "kl_vanished (step" in after_that
    assert out.count("cannot be kept") == 0 and out.count("likely cause") == 1


def test_a_log_that_is_mostly_unread_is_not_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"step": step, "loss": 1 / (step + 1)}) for step in range(900)]
    torn = [f'{{"step": {step}, "loss": #}},' for step in range(900, 1900)]
    (tmp_path / "run.jsonl").write_text("\n".join(lines + torn))
    assert checked(tmp_path / "run.jsonl")["verdict"] == "unknown"
    _, out, _ = run(capsys, tmp_path / "run.jsonl")
    assert "1000 rows were passed over or unread and 900 judged" in out


def test_few_records_say_nothing_of_a_branch() -> None:
    pack = load_rules("flow_dino_kl")
    curve = Curve()
    curve.add(column(range(10), [1.0 / (i + 1) for i in range(10)]))
    report = judge_branch(pack, *next(iter(pack.branches.items())), {"loss_flow": curve})
    assert report.verdict == "unknown"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(allow_nan=True, width=32), max_size=5000), st.integers(1, 999))
def test_a_curve_is_of_bounded_size_and_keeps_the_extremes(values: list[float], chunk: int) -> None:
    curve = Curve()
    for start in range(0, len(values), chunk):
        part = values[start : start + chunk]
        curve.add(column(range(start, start + len(part)), part))
    assert len(curve.steps) <= MAX_BLOCKS
    assert curve.records == len(values)
    seen = [value for value in values[: int(curve.steps[-1]) + 1 if len(curve.steps) else 0] if math.isfinite(value)]
    if seen:
        assert min(seen) == min(low for low in curve.low if not math.isnan(low))
        assert max(seen) == max(high for high in curve.high if not math.isnan(high))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=8))
def test_a_curve_is_the_same_in_whatever_pieces_it_comes(pieces: list[int]) -> None:
    count = sum(pieces)
    values = [math.nan if step % 7 == 3 else 0.0 if step % 5 == 0 else math.sin(step) for step in range(count)]
    whole, pieced = Curve(), Curve()
    whole.add(column(range(count), values))
    for end, piece in zip(accumulate(pieces), pieces, strict=True):
        pieced.add(column(range(end - piece, end), values[end - piece : end]))
    assert repr(whole) == repr(pieced)


def test_a_block_of_a_curve() -> None:
    curve = Curve()
    curve.add(column(range(MAX_BLOCKS), [1.0, 3.0, math.nan, 0.0, math.inf, math.nan] + [2.0] * (MAX_BLOCKS - 6)))
    assert len(curve.steps) == MAX_BLOCKS / 2 and curve.steps[:3] == [1, 3, 5] and curve.steps[-1] == MAX_BLOCKS - 1
    assert curve.mean[:2] == [2, 0] and (curve.low[0], curve.high[0]) == (1, 3) and curve.mean[3] == 2
    assert (curve.zero[:3], curve.broken[:3]) == ([0, 0.5, 0], [0, 0.5, 1])
    assert math.isnan(curve.mean[2]) and math.isnan(curve.low[2])


# ---- a baseline


def norms(level: float, count: int = 200, active: bool = True) -> list[Record]:
    extra = {"ssim_active_fraction": 1.0} if active else {}
    return [Record(i, {"loss": 1.0, "loss_ssim": 0.4, "total_norm": level, **extra}) for i in range(count)]


@pytest.mark.parametrize(("active", "word"), [(True, "paired"), (False, "unpaired")])
def test_the_norm_is_compared_with_the_baselines(tmp_path: Path, active: bool, word: str) -> None:
    write_csv(tmp_path / "pixel.csv", norms(1.0, active=active))
    baseline = baseline_of_source(open_log(str(tmp_path / "pixel.csv"), {}), "--baseline pixel.csv")
    report = checked(write_csv(tmp_path / "run.csv", norms(15.0, active=active)), baseline=baseline)
    alert = next(alert for alert in report["alerts"] if alert["guard"] == "norm_ratio")
    assert (alert["step"], alert["value"]) == (10, 15.0)
    assert f"; {word} median of 10 active steps" in alert["sentence"]
    calm = checked(write_csv(tmp_path / "calm.csv", norms(2.0, active=active)), baseline=baseline)
    assert calm["alerts"] == []
    assert "norm_ratio" in calm["judged"]


def test_a_baseline_without_norms_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "pixel.csv", records(30, loss=flat(1)))
    with pytest.raises(UserError, match=r"--baseline pixel.csv: no total_norm in it, found loss; `--map"):
        baseline_of_source(open_log(str(tmp_path / "pixel.csv"), {}), "--baseline pixel.csv")


# ---- the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = exit_code(["check", *map(str, arguments)])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_a_log_with_a_branch_alone_is_judged_for_not_a_number(tmp_path: Path) -> None:
    stream = records(60, loss_flow=after(30, flat(math.nan), flat(1)))
    report = checked(write_csv(tmp_path / "run.csv", stream))
    assert ("non_finite", 30) in {(alert["guard"], alert["step"]) for alert in report["alerts"]}


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_csv(tmp_path / "run.csv", STREAM)
    code, out, _ = run(capsys, log, "--picture", tmp_path / "run.png")
    assert code == 3
    assert "rules: flow_dino_kl" in out
    assert "does not work" in out
    assert "likely cause" in out
    assert "try first" in out
    assert "raise the KL weight, clamp logvar" in out
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    healthy = write_csv(tmp_path / "good.csv", records(600, **HEALTHY["flow_dino_kl"]))
    code, out, _ = run(capsys, healthy)
    assert code == 0
    rules = len(load_rules("flow_dino_kl").rules) + 2  # non_finite, divergence
    assert out.startswith("healthy: loss_flow fell from") and "; no alert; " in out.splitlines()[0]
    assert f"{rules} of {rules} rules could judge" in out


def test_the_json_is_what_the_document_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, write_csv(tmp_path / "run.csv", STREAM), "--json")
    assert code == 3
    report = json.loads(out)
    text = (ROOT / "docs" / "check_schema.md").read_text(encoding="utf-8")
    schema = json.loads(text.split("```json schema\n", 1)[1].split("```", 1)[0])
    jsonschema.validate(report, schema)
    assert set(schema["properties"]) == set(report)
    for key in report:
        assert f"`{key}`" in text


def test_their_names_are_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = [Record(record.step, {"train/recon": record.values["loss_reconstruction"], "kld": record.values["kl_raw"]})
              for record in records(600, **HEALTHY["vae_kl"])]  # fmt: skip
    log = write_jsonl(tmp_path / "run.jsonl", stream)
    code, out, _ = run(capsys, log, "--map", "train/recon=loss_reconstruction", "--map", "kld=kl_raw")
    assert code == 0
    assert "rules: vae_kl" in out
    code, out, _ = run(capsys, log)
    assert code == 0
    assert "train/recon is taken for loss_reconstruction" in out and "kld is taken for kl_raw" in out
    (tmp_path / "other.csv").write_text("step,acc,lr\n1,0.5,0.1\n2,0.5,0.1\n")
    code, _, err = run(capsys, tmp_path / "other.csv")
    assert code == 2
    assert "no rule knows any metric of this log; saw acc, lr" in err


def test_usual_names_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{step},{1 / (step + 1)},{1 / (step + 2)},{1 + step % 3},9" for step in range(300)]
    header = "step,train_loss_step,val_loss,grad_norm,train_loss_epoch"
    (tmp_path / "metrics.csv").write_text("\n".join([header, *lines]))
    code, out, _ = run(capsys, tmp_path / "metrics.csv")
    assert code == 0 and "training" in out
    assert "grad_norm is taken for total_norm" in out and "train_loss_step is taken for loss" in out
    code, out, _ = run(capsys, tmp_path / "metrics.csv", "--map", "val_loss=loss")
    assert code == 0 and "taken for loss" not in out
    for theirs in ("grad_norm", "train/grad_norm", "grad_2.0_norm_total", "gnorm", "GradNorm"):
        assert usual_names(["loss", theirs]) == {theirs: "total_norm"}
    for theirs in ("train_loss", "train/loss", "Train Loss", "loss_total", "training/loss_step"):
        assert usual_names(["acc", "val_loss", theirs]) == {theirs: "loss"}
    for metrics in (["train/loss", "loss_total"], ["val/loss", "loss_flow"], ["loss", "train_loss"]):
        assert usual_names(metrics) == {}


def test_a_half_precision_run_that_died_is_not_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hugging Face's: the loss is 0 and the norm NaN from step 750 on."""
    history = [{"step": step, "loss": 2 / step, "grad_norm": 1.0} for step in range(10, 750, 10)]
    history += [{"step": step, "loss": 0.0, "grad_norm": math.nan} for step in range(750, 1500, 10)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 1500}))
    code, out, _ = run(capsys, tmp_path / "trainer_state.json")
    assert code == 3 and "total_norm is nan" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no.csv"], "no.csv: no such file"),
        (["run.csv", "--rules", "vae"], "unknown rule pack 'vae'; did you mean 'vae_kl'?"),
        (["run.csv", "--rules", "no.yaml"], "no.yaml: no such file"),
        (["run.csv", "--set", "ga"], "--set: must be name=value with a number, got 'ga'"),
        (["run.csv", "--set", "ga=x"], "--set: must be name=value with a number, got 'ga=x'"),
        (["run.csv", "--set", "gaa=2"], "--set gaa: no rule pack has this option; did you mean 'ga'?"),
        (["run.csv", "--map", "loss"], "--map: must be name=value, got 'loss'"),
        (["run.csv", "--baseline", "no.csv"], "no.csv: no such file"),
        (["run.csv", "--picture", "/no/such/folder/x.png"], "--picture"),
        (["empty.csv"], "no rule knows any metric of this log"),
        (["zip.gz"], "compressed (gzip); unpack it first"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "run.csv", records(60, **HEALTHY["vae_kl"]))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "zip.gz").write_bytes(b"\x1f\x8b\x08\x00")
    code, out, err = run(capsys, *arguments)
    assert code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1
    assert said in err


@pytest.mark.parametrize("seed", range(12))
def test_broken_logs_give_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    chance = random.Random(seed)
    write = chance.choice([write_csv, write_jsonl, write_text])
    path = write(tmp_path / f"run.{chance.choice(['csv', 'jsonl', 'log'])}", records(250, **HEALTHY["flow_dino_kl"]))
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([0, 5, 300])):
        place = chance.randrange(len(data))
        data[place : place + chance.choice([0, 1, 1, 7])] = chance.choice(
            [b"", b"\x00", b"\xff\xfe", b"\n", b"nan", b"1e999", b'{"', b",,,,", b"-", bytes([chance.randrange(256)])]
        )
    path.write_bytes(bytes(data[: chance.randrange(len(data))] if seed % 2 else data))
    code, _, err = run(capsys, path, *(["--picture", tmp_path / "run.png"] if seed < 3 else []))
    assert code in (0, 2, 3), err
    assert "Traceback" not in err
    assert "bug of tune-ssim" not in err


def test_a_log_of_nothing_but_nan_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = records(300, **{name: lambda step: math.nan for name in HEALTHY["flow_dino_kl"]})
    code, out, err = run(capsys, write_csv(tmp_path / "run.csv", stream), "--picture", tmp_path / "run.png")
    assert code == 3, err
    assert "loss is nan" in out


def test_follow_says_alerts_as_they_come_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    lines = [json.dumps({"step": record.step, **record.values}) + "\n" for record in STREAM]
    process = subprocess.Popen(
        [sys.executable, "-m", "tune_ssim", "check", str(log), "--follow"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        log.write_text("".join(lines[:100]))
        with log.open("a") as file:
            file.write("".join(lines[100:]))
        first = process.stdout.readline()
        assert first.startswith("step 5")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3, err
    assert "Traceback" not in err
    assert "alert" in out


def test_follow_ends_when_a_rule_would_end_the_run(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "run.csv", records(60, loss_ssim=after(30, lambda step: 2.5, lambda step: 0.4)))
    started = time.monotonic()
    report = checked(log, follow=True)
    assert report["ended"]["step"] == 30
    assert time.monotonic() - started < 60


# ---- what a watch does when it is not strict


def test_a_watch_that_is_not_strict_waits_for_ever() -> None:
    watch = Watch([Threshold("rare", upper=1)], strict=False)
    for record in records(500, loss=flat(1)):
        assert watch.update(record) == []
    assert watch.update(Record(501, {"rare": 2.0}))
    assert watch.finish() == []
