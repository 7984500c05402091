"""Logs as people have them: every producer's format is read without an option, and no NaN is lost."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_samples import PRODUCERS

from tune_ssim.base.errors import UserError
from tune_ssim.cli.app import exit_code
from tune_ssim.cli.log_arguments import open_log
from tune_ssim.guards import NonFinite, Watch
from tune_ssim.guards.log_check import LogCheck, check_log
from tune_ssim.records import Record
from tune_ssim.records.metric_names import is_held_out, is_loss_like, usual_names
from tune_ssim.records.readers import LineParser
from tune_ssim.records.record_table import Table


def checked(path: Path, text: str | None = None, names: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    if text is not None:
        path.write_bytes(text.encode())
    return check_log(open_log(str(path), names or {}), label=path.name, **options).to_json()


def broken(path: Path, text: str) -> tuple[list[int], str]:
    """The steps at which `NonFinite` fires, and what the reader says."""
    path.write_bytes(text.encode())
    source, watch = open_log(str(path), {}), Watch([NonFinite()], strict=False)
    found = [violation for part in source.all_batches() for row in watch.update_table(Table.of(part)) for violation in row]
    return [violation.step for violation in found], source.issues.sentence()


# ---- no NaN is lost


def as_csv(rows: Sequence[dict[str, float]]) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n"


def as_jsonl(rows: Sequence[dict[str, float]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_lines(rows: Sequence[dict[str, float]]) -> str:
    return "".join(" ".join(f"{name}: {value}" for name, value in row.items()) + "\n" for row in rows)


LOSSES = ["loss", "ssim_loss", "kl_loss", "val_loss", "lpips_loss", "vae_loss", "train/nll", "Loss/KL", "klLoss", "mse", "loss_G"]


@pytest.mark.parametrize("write", [as_csv, as_jsonl, as_lines])
@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_in_any_loss_is_an_alert(tmp_path: Path, name: str, write: Callable[..., str]) -> None:
    for place in (0, 7, 29):
        rows = [{"step": step, "acc": 0.5, name: math.nan if step == place else 1 / (step + 1)} for step in range(30)]
        assert broken(tmp_path / "run.log", write(rows))[0] == [place]


@pytest.mark.parametrize(
    "name",
    ["min_snr_loss", "loss_min_snr", "gradient_loss", "train/target_loss", "timeLoss", "count_loss", "scale_loss", "loss_gradient"],
)
def test_what_is_a_loss(name: str) -> None:
    assert is_loss_like(name)


@pytest.mark.parametrize(
    "name",
    [
        "loss_scale",
        "kl_weight",
        "loss_weight/ssim",
        "best_val_loss",
        "best_loss",
        "loss_min",
        "min_loss",
        "max_train_loss",
        "loss_time",
        "psnr",
        "lr",
        "dbg/loss_grad/flow",
        "dbg/flow_loss",
        "smoke/flow_loss",
        "time/loss",
    ],
)
def test_what_is_no_loss(name: str) -> None:
    assert not is_loss_like(name)


@pytest.mark.parametrize("write", [as_jsonl, as_lines])
@pytest.mark.parametrize(
    "steps",
    [
        [0, 50, 100, 0, 50, 100],  # a counter that begins again, and no epoch
        [0, 50, 100, 100, 100, 150],  # a step that is logged twice
        [0, 50, 100, 150, 20, 200],  # one row out of order
    ],
)
def test_a_nan_in_a_row_that_is_skipped_is_an_alert(tmp_path: Path, steps: list[int], write: Callable[..., str]) -> None:
    rows: list[dict[str, float]] = [{"step": step, "loss": 1.0} for step in steps]
    rows[4]["loss"] = math.nan
    fired, said = broken(tmp_path / "run.log", write(rows))
    assert len(fired) == 1 and "loss is nan in line" in said


@pytest.mark.parametrize("row", ['{"loss": NaN}', '{"step": 1.5, "loss": NaN}', '{"step": "x", "val_loss": "nan"}'])
@pytest.mark.parametrize("place", [0, 3, 12])
def test_a_nan_in_a_row_without_a_step_is_an_alert(tmp_path: Path, row: str, place: int) -> None:
    lines = [f'{{"step": {step}, "loss": 0.5}}' for step in range(12)]
    lines.insert(place, row)
    assert len(broken(tmp_path / "run.jsonl", "\n".join(lines) + "\n")[0]) == 1


@pytest.mark.parametrize("head", ["Epoch: [0][{at}/400] Time 0.1 ( 0.1) ", "step {at}: "])
@pytest.mark.parametrize("mean", ["({})", " ({})", " ( {} )"])
def test_a_nan_in_a_running_mean_is_an_alert(tmp_path: Path, head: str, mean: str) -> None:
    lines = [f"{head.format(at=at)} Loss: 5.0e-02{mean.format(0.1 if at < 30 else 'nan')} Acc 0.5" for at in range(40)]
    assert broken(tmp_path / "run.log", "\n".join(lines) + "\n")[0] == list(range(30, 40))


@pytest.mark.parametrize("name", ["grad_norm", "total_norm", "train/gnorm"])
def test_a_nan_norm_in_a_row_that_is_skipped_is_an_alert(tmp_path: Path, name: str) -> None:
    rows = [{"step": step, "loss": 1.0, name: 1.0} for step in range(39)]
    rows.append({"step": 10, "loss": 1.0, name: math.nan})
    report = checked(tmp_path / "run.jsonl", as_jsonl(rows))
    assert report["verdict"] == "alerts" and report["alerts"][0]["metric"] == "total_norm"


@pytest.mark.parametrize("text", ["1.#INF", "-1.#INF00", "1.#QNAN", "-1.#IND"])
@pytest.mark.parametrize("row", ['{{"step": {}, "loss": {}}}', "step {} loss {}", "step {} | loss: {} | lr: 0.1", "{},{}"])
def test_a_nan_as_windows_prints_it_is_an_alert(tmp_path: Path, row: str, text: str) -> None:
    lines = [row.format(step, text if step == 20 else 0.5) for step in range(40)]
    header = "step,loss\n" if lines[0][0] == "0" else ""
    assert broken(tmp_path / "run.log", header + "\n".join(lines) + "\n")[0] == [20]


@pytest.mark.parametrize("value", ["[0.1, NaN]", '["inf", 0.1]', "[[0.1], [0.1, nan]]"])
def test_a_nan_in_a_list_is_an_alert(tmp_path: Path, value: str) -> None:
    lines = [f'{{"step": {step}, "loss": 0.5, "losses": {value if step == 20 else [0.1, 0.1]}}}' for step in range(40)]
    assert broken(tmp_path / "run.jsonl", "\n".join(lines) + "\n")[0] == [20]


@pytest.mark.parametrize("name", ["loss", "val_loss", "KL loss"])
@pytest.mark.parametrize("row", ["step {}: {} is {}", "step {} WARNING: the {} was {}, update skipped", "step {} {} of {} seen"])
def test_a_nan_in_a_sentence_is_an_alert(tmp_path: Path, row: str, name: str) -> None:
    lines = [row.format(step, name, "NaN") if step == 20 else f"step {step} loss 0.5" for step in range(40)]
    assert broken(tmp_path / "run.log", "\n".join(lines) + "\n")[0] == [20]


LOSS_LIKE = ["loss", "train/loss", "avg_loss", "kl_loss", "val_loss", "loss_flow", "lpips", "Loss/recon", "g_loss", "mse"]
BAR = "\rEpoch {epoch}: {percent:3d}%|##   | {step}/40 [00:01<00:07,  1.48it/s, {rest}]"
Rows = list[dict[str, Any]]


def plain(name: str, values: Sequence[Any]) -> Rows:
    return [{"step": at, "lr": 1e-4, name: value} for at, value in enumerate(values)]


def dropped(name: str, values: Sequence[Any]) -> Rows:
    """The counter begins again every ten rows, and nothing names the epoch."""
    return [{**row, "step": 5 * (row["step"] % 10)} for row in plain(name, values)]


def of_epochs(name: str, values: Sequence[Any]) -> Rows:
    return [{"epoch": row["step"] // 10, **row, "step": row["step"] % 10} for row in plain(name, values)]


def validated(name: str, values: Sequence[Any]) -> Rows:
    """Rows of a validation alone have the values."""
    return [
        row for at, value in enumerate(values) for row in ({"step": at, "loss": 0.5}, {"step": at, "split": "val", name: value})
    ]


def as_bar(rows: Rows) -> str:
    shown = [
        BAR.format(
            epoch=row.get("epoch", 0),
            percent=2 * row["step"],
            step=row["step"],
            rest=", ".join(f"{name}={value}" for name, value in row.items() if name not in ("step", "epoch", "split")),
        )
        for row in rows
    ]
    return "".join(shown)


def as_state(rows: Rows) -> str:
    return json.dumps({"global_step": len(rows), "log_history": rows})


def as_nested(rows: Rows) -> str:
    head = ("step", "split")
    inside = [{name: value for name, value in row.items() if name not in head} for row in rows]
    outside = [{name: row[name] for name in head if name in row} for row in rows]
    return as_jsonl([{**outer, "metrics": {"all": {"of": inner}}} for outer, inner in zip(outside, inside, strict=True)])


def as_dicts(rows: Rows) -> str:
    return "".join(f"{row}\n" for row in rows)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(LOSS_LIKE),
    at=st.integers(0, 39),
    value=st.sampled_from([math.nan, math.inf, -math.inf, "nan", "NaN", "-Infinity", "1.#QNAN"]),
    shape=st.sampled_from([plain, dropped, of_epochs, validated]),
    write=st.sampled_from([as_csv, as_jsonl, as_lines, as_bar, as_state, as_nested, as_dicts]),
)
def test_a_nan_is_an_alert_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    at: int,
    value: Any,
    shape: Callable[[str, Sequence[Any]], Rows],
    write: Callable[[Rows], str],
) -> None:
    rows = shape(name, [value if row == at else 1 / (row + 1) for row in range(40)])
    if write is as_csv:
        names = list(dict.fromkeys(name for row in rows for name in row))
        rows = [{name: row.get(name, "") for name in names} for row in rows]
    ending = {as_csv: ".csv", as_jsonl: ".jsonl", as_nested: ".jsonl", as_state: ".json"}.get(write, ".log")
    path = tmp_path_factory.getbasetemp() / f"run{ending}"
    assert broken(path, write(rows))[0], path.read_text()


@pytest.mark.parametrize("at", [0, 20, 39])
@pytest.mark.parametrize(
    "odd",
    [
        "loss avg nan",
        "loss: NaN.",
        "loss 0.5 avg nan",
        "loss 0.5 (avg: nan)",
        "loss: 0.5, mean=nan acc 0.5",
        "loss (nan) acc 0.5",
        "loss 0.5 / nan acc 0.5",
        "loss 0.5 ± nan",
        "loss -> nan",
        "losses: total nan recon 0.5",
        "loss avg 0.5 (nan)",
        "the average loss is [nan]",
        "loss: tensor(nan, device='cuda:0', grad_fn=<MulBackward0>)",
        "loss=np.float64(-inf) acc=0.5",
    ],
)
def test_a_nan_that_belongs_to_a_loss_is_an_alert(tmp_path: Path, odd: str, at: int) -> None:
    lines = [f"step {step} " + (odd if step == at else "loss 0.5 acc 0.5") for step in range(40)]
    assert broken(tmp_path / "run.log", "\n".join(lines) + "\n")[0] == [at]


@pytest.mark.parametrize("odd", ["acc avg nan", "acc 0.5 (nan)", "loss 0.5 (inf norm 3.0)", "loss 0.5 acc 0.5 / nan", "avg nan"])
def test_a_nan_that_belongs_to_another_metric_is_none(tmp_path: Path, odd: str) -> None:
    lines = [f"step {step} " + (odd if step == 20 else "loss 0.5 acc 0.5") for step in range(40)]
    assert broken(tmp_path / "run.log", "\n".join(lines) + "\n")[0] == []


def test_numbers_as_pytorch_prints_them() -> None:
    parser = LineParser()
    lines = "".join(
        f"step {at} loss: tensor({at}.5, device='cuda:0', grad_fn=<MulBackward0>), psnr np.float64(9.5)\n" for at in (1, 2)
    )
    found = parser.feed(lines.encode()) + parser.finish()
    assert found == [Record(at, {"loss": at + 0.5, "psnr": 9.5}) for at in (1, 2)]


def test_a_value_is_no_word_of_the_next_name() -> None:
    lines = [f"Epoch {epoch} train acc 0.5 val acc {0.5 if epoch != 20 else 'nan'} val loss 0.05" for epoch in range(1, 40)]
    parser = LineParser()
    found = parser.feed(("\n".join(lines) + "\n").encode()) + parser.finish()
    assert {name for record in found for name in record.values} == {"epoch", "acc", "val_acc", "val_loss"}


def test_a_list_in_many_lists_is_no_number() -> None:
    row = f'{{"step": 1, "loss": 0.5, "losses": {"[" * 900}NaN{"]" * 900}}}\n'
    parser = LineParser(format="jsonl")
    assert parser.feed(row.encode()) + parser.finish() == [Record(1, {"loss": 0.5})]


def test_a_live_trial_sees_the_nan_of_a_skipped_row() -> None:
    parser = LineParser()
    found = parser.feed(b"step 1 loss 1\nstep 2 loss 0.5\nstep 1 loss nan\nstep 3 loss 0.4\n") + parser.finish()
    assert [math.isnan(record.values["loss"]) for record in found] == [False, True, False]


@pytest.mark.parametrize(("every", "said"), [(1, "the last 28 rows, from step 13 on, hold no number"), (20, "")])
def test_rows_without_a_number_at_the_end_are_reported(every: int, said: str) -> None:
    """As a live trial reports them, whose records they are not. every: the training prints its loss every so many steps."""
    parser = LineParser()
    losses = [0.5 if (every > 1 and step % every == 1) or (every == 1 and step < 13) else "--" for step in range(1, 41)]
    parser.feed("".join(f"step {step} loss {loss}\n" for step, loss in enumerate(losses, 1)).encode())
    parser.finish()
    assert parser.issues.sentence() == said


def test_rows_that_are_read_again_are_not_reported_again() -> None:
    parser = LineParser()
    parser.feed(b"step 1 loss nan\nstep 2 loss 0.5\nstep 3 loss 1\n")
    parser.begin_anew("rewritten")
    found = parser.feed(b"step 1 loss nan\nstep 2 loss 0.5\nstep 3 loss 1\nstep 4 loss 1\n") + parser.finish()
    assert all(math.isfinite(record.values["loss"]) for record in found)


@pytest.mark.parametrize("write", [as_csv, as_jsonl, as_lines])
@pytest.mark.parametrize("name", ["ssim", "psnr", "perceptual", "adv", "dice", "train/penalty"])
def test_other_metrics_that_are_not_finite_are_a_note(tmp_path: Path, name: str, write: Callable[..., str]) -> None:
    rows = [{"step": at, "loss": 1 / (at + 1), name: 0.5 if at < 20 else math.nan, "fid": math.nan} for at in range(39)]
    rows[0]["best"] = math.inf
    rows[1:] = [{**row, "best": 0.5} for row in rows[1:]]
    report = checked(tmp_path / "run.log", write(rows))
    assert report["alerts"] == []
    assert sorted(report["notes"]) == sorted(
        [
            "fid is nan in 39 of 39 records, from step 0, not judged",
            "best is inf in 1 of 39 records, from step 0, not judged",
            f"{name} is nan in 19 of 39 records, from step 20, not judged",
        ]
    )


# ---- a loss that is no longer logged


@pytest.mark.parametrize(
    "write",
    [
        lambda step, loss: f'{{"step": {step}, "loss": {loss or "null"}}}',
        lambda step, loss: f'{{"step": {step}, "loss": {loss or "null"}, "lr": 0.1}}',
        lambda step, loss: f"step {step} loss {loss or '--'}",
        lambda step, loss: f"step {step} loss: {loss or 'N/A'} lr: 0.1",
        lambda step, loss: f"{step},{loss}",
        lambda step, loss: f"{step},{loss or 'NA'}",
    ],
)
def test_a_loss_that_is_missing_to_the_end_is_not_healthy(tmp_path: Path, write: Callable[[int, str], str]) -> None:
    lines = [write(step, str(1 / step) if step < 20 else "") for step in range(1, 80)]
    header = "step,loss\n" if lines[0][0] == "1" else ""
    report = checked(tmp_path / "run.log", header + "\n".join(lines) + "\n")
    assert report["summary"] == "unknown: loss is missing in 60 of 79 records, from step 20 on; no alert"


@pytest.mark.parametrize("rest", ["", "0.1"])
def test_a_loss_in_every_nth_row_is_not_missing(tmp_path: Path, rest: str) -> None:
    rows = [f"{step},{100 / (step + 100) if step % 50 == 0 else ''},{rest}" for step in range(590)]
    report = checked(tmp_path / "run.csv", "step,train_loss,lr\n" + "\n".join(rows) + "\n")
    assert report["verdict"] == "healthy"


# ---- half precision


def fp16(*norms: float) -> str:
    return as_jsonl([{"step": step, "loss": 1 / (step + 1), "grad_norm": norm} for step, norm in enumerate(norms)])


def test_infinite_norms_at_the_start_are_a_note(tmp_path: Path) -> None:
    report = checked(tmp_path / "run.jsonl", fp16(math.inf, math.inf, *[1.0] * 30))
    assert report["alerts"] == []
    assert any(note.startswith("the first 2 norms are infinite: normal in fp16") for note in report["notes"])


@pytest.mark.parametrize("norms", [[1.0, math.inf, 1.0], [math.nan, 1.0], [math.inf] * 21])
def test_other_norms_that_are_not_finite_are_alerts(tmp_path: Path, norms: list[float]) -> None:
    report = checked(tmp_path / "run.jsonl", fp16(*norms), packs=["ssim"])
    assert report["ended"]["guard"] == "non_finite"


def test_a_norm_that_is_infinite_to_the_end_is_not_healthy(tmp_path: Path) -> None:
    assert checked(tmp_path / "run.jsonl", fp16(*[math.inf] * 9), packs=["ssim"])["verdict"] != "healthy"


# ---- names


@pytest.mark.parametrize("theirs", ["vae_loss", "avr_loss", "lm_loss", "g_loss", "diffusion_loss", "Loss/loss/mean", "train/nll"])
def test_the_only_loss_is_the_loss(theirs: str) -> None:
    assert usual_names(["acc", "val_loss", "lr", theirs]) == {theirs: "loss"}


@pytest.mark.parametrize("theirs", ["grdn", "train/gnorm", "actor/grad_norm", "grad_norm_before_clip"])
def test_names_of_the_gradient_norm(theirs: str) -> None:
    assert usual_names(["loss", theirs]) == {theirs: "total_norm"}


@pytest.mark.parametrize("metrics", [["g_loss", "d_loss"], ["val_loss"], ["kl"], ["param_norm", "loss"], ["loss_flow", "vae_loss"]])
def test_what_could_be_several_metrics_is_left_alone(metrics: list[str]) -> None:
    assert usual_names(metrics) == {}


def test_names_of_held_out_metrics() -> None:
    assert all(map(is_held_out, ["val_loss", "eval/loss", "ValLoss", "test-loss", "loss_valid"]))
    assert not any(map(is_held_out, ["value_loss", "loss", "latest_loss", "develop"]))


# ---- --map is obeyed, or it is an error


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ('{"loss": 1.0, "progress": {"tick": %d}}', {"progress/tick": "step"}),
        ('{"loss": 1.0, "step": 3, "a": {"b": {"c": %d}}}', {"a/b/c": "step"}),
        ('{"loss": 1.0, "Progress/seen": {"num": 1, "mean": %d, "std": 0}}', {"Progress/seen": "step"}),
        ('{"L": 1.0, "step": %d}', {"L": "loss"}),
    ],
)
def test_a_name_that_was_given_is_obeyed(line: str, names: dict[str, str]) -> None:
    parser = LineParser(names=names)
    found = parser.feed("".join(line % step + "\n" for step in (100, 200, 300)).encode()) + parser.finish()
    assert found == [Record(step, {**found[0].values}) for step in (100, 200, 300)]
    assert found[0].values["loss"] == 1.0
    assert parser.rows.names.unused == []


@pytest.mark.parametrize("write", [as_csv, as_jsonl, as_lines])
def test_a_name_that_is_not_in_the_log_is_an_error(tmp_path: Path, write: Callable[..., str]) -> None:
    rows = [{"step": step, "loss": 1.0, "tock": step * 10} for step in range(3)]
    for theirs, ours in (("tick", "step"), ("tick", "total_norm")):
        with pytest.raises(UserError, match="--map tick=…: the log has no tick; did you mean 'tock'"):
            checked(tmp_path / "run.log", write(rows), names={theirs: ours})
    assert checked(tmp_path / "run.log", write(rows), names={"tock": "total_norm"})["records"] == 3


# ---- what it dares to say


def verdict_of(rows: Sequence[dict[str, float]]) -> tuple[str, str]:
    """As by `check_log` for a log that no rule pack is about, without loading the packs."""
    check = LogCheck([])
    records = [Record(int(row["step"]), {name: value for name, value in row.items() if name != "step"}) for row in rows]
    table = Table.of(records)
    check.feed(table.renamed(usual_names(table.metrics)))
    return said_by(check.report().to_json())


def said_by(report: dict[str, Any]) -> tuple[str, str]:
    found = [finding["sentence"] for branch in report["branches"] for finding in branch["findings"]]
    return report["verdict"], "; ".join([report["summary"], *found])


FALLING = [{"step": step, "loss": 1 / (1 + step / 20), "grad_norm": 1.0, "lr": 1e-4, "acc": 0.5} for step in range(60)]


def with_metric(name: str, value: Callable[[int], float]) -> list[dict[str, float]]:
    return [{**row, name: value(at)} for at, row in enumerate(FALLING)]


@pytest.mark.parametrize(
    ("rows", "verdict", "said"),
    [
        (FALLING, "healthy", "healthy: loss fell from 0.954 to 0.279; no alert; loss and gradient norm, 2 of 4 metrics judged"),
        (
            FALLING[:3],
            "healthy",
            "2 of 4 metrics judged, for NaN and Inf alone: 3 records",
        ),
        (with_metric("loss", lambda at: 3e8 + at % 7 * 1e7), "unknown", "unknown: loss is never below 3e+08"),
        (with_metric("grad_norm", lambda at: 5e5), "unknown", "unknown: gradient norm is never below 5e+05"),
        (with_metric("loss", lambda at: 3e8 / (1 + at) ** 4), "healthy", "loss fell"),  # summed over pixels, and it falls
        (with_metric("grad_norm", lambda at: float(at % 7 > 0)), "healthy", "total_norm is zero in 15% of the records, and not in"),
        (with_metric("grad_norm", lambda at: float(at % 4 == 3)), "healthy", "total_norm is zero in 75% of the records"),
        (with_metric("grad_norm", lambda at: float(at < 30)), "does_not_work", "total_norm is zero after step 29"),
        (with_metric("loss", lambda at: 1 + at / 60), "does_not_work", "does not work: training: loss rose"),
        (
            [{**row, "loss": 1 + at / 60, "kl_weight": at / 60} for at, row in enumerate(FALLING)],
            "healthy",
            "so did a weight in it",
        ),
        ([{**row, "loss": 1 + at / 60, "kl_weight": 0.5} for at, row in enumerate(FALLING)], "does_not_work", "loss rose"),
        (with_metric("loss", lambda at: 0.02), "healthy", "loss is flat"),  # converged
        (with_metric("val_loss", lambda at: 5 + at / 20), "healthy", "loss fell"),  # it overfits, which no rule judges
        (
            with_metric("loss", lambda at: 1.0 if at < 40 else 20.0),
            "alerts",
            "15 alerts: loss is 20, 20x that of its first 10 records",
        ),
    ],
)
def test_the_verdict(rows: list[dict[str, float]], verdict: str, said: str) -> None:
    found, words = verdict_of(rows)
    assert found == verdict, words
    assert said in words
    assert "names no coverage" not in words


def vae(reconstruction: Callable[[int], float], kl: Callable[[int], float]) -> list[dict[str, float]]:
    return [{"step": step * 10, "recon_loss": reconstruction(step), "kl_loss": kl(step)} for step in range(300)]


@pytest.mark.parametrize(
    ("rows", "verdict", "said"),
    [
        (vae(lambda step: 4e4 - step, lambda step: 1e-9), "alerts", "the posterior has collapsed onto the prior"),
        (vae(lambda step: 4e4 / (1 + step / 50), lambda step: 0.02), "healthy", "loss_reconstruction fell"),  # a mean KL
        (vae(lambda step: 0.02 + 1e-4 * (step * 7 % 13), lambda step: 0.02), "healthy", "loss_reconstruction is flat"),  # converged
        (vae(lambda step: 0.3 / (1 + step / 90), lambda step: 9e4), "healthy", "loss_reconstruction fell"),  # weighed with 1e-6
    ],
)
def test_the_terms_of_a_vae_are_known_by_their_usual_names(
    tmp_path: Path, rows: list[dict[str, float]], verdict: str, said: str
) -> None:
    found, words = said_by(checked(tmp_path / "run.jsonl", as_jsonl(rows), packs=["vae_kl"]))
    assert found == verdict, words
    assert said in words


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for loss, code in ((1.0, 0), (math.nan, 3), (1e9, 4)):
        (tmp_path / "run.jsonl").write_text(as_jsonl([{"step": 1, "loss": loss}]))
        assert exit_code(["check", str(tmp_path / "run.jsonl"), "--rules", "ssim"]) == code
        assert capsys.readouterr().out.startswith({0: "healthy: ", 3: "1 alert: loss is nan", 4: "unknown: loss is never"}[code])
        assert exit_code(["check", str(tmp_path / "run.jsonl"), "--rules", "ssim", "--exit-zero"]) == 0
        capsys.readouterr()


# ---- what to try where nothing can be read

UNREAD = [
    "tick 12 ~ mse 0.5 (gn 7.5)\ntick 13 ~ mse 0.25 (gn 7.25)\n",
    "2026-01-01 10:00:00 INFO [12] cost=0.5 | acc=12.5%\n2026-01-01 10:00:01 INFO [13] cost=0.25 | acc=13.5%\n",
    "12 0.5 0.3\n13 0.25 0.2\n",
    "loading it's data (3 files)\n#12: 'err'=0.5\n#13: 'err'=0.25\n#14: 'err'=nan\n",
    "After 12 iterations the loss is 0.5 and the norm is 7.5\nAfter 13 iterations the loss is 0.25 and the norm is 7\n",
    "batch 12 of 500 -> objective\t0.5 in 3s\nbatch 13 of 500 -> objective\t0.25 in 3s\n",
]


@pytest.mark.parametrize("text", UNREAD)
def test_the_proposed_pattern_can_be_pasted(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.log").write_text(text)
    with pytest.raises(UserError) as error:
        open_log(str(tmp_path / "run.log"), {})
    command = str(error.value).partition("; try ")[2].partition("; valid formats")[0]
    option, pattern = shlex.split(command)
    assert option == "--pattern"
    source = open_log(str(tmp_path / "run.log"), {}, [pattern])
    found = [record for part in source.all_batches() for record in part]
    assert [record.step for record in found][:2] == [12, 13]
    (name,) = [theirs for theirs in found[0].values if {theirs: theirs, **usual_names(found[0].values)}[theirs] == "loss"]
    assert [record.values[name] for record in found][:2] == [0.5, 0.25]


def test_the_proposed_name_can_be_pasted(tmp_path: Path) -> None:
    text = "step,lr,my cost\n1,0.1,0.5\n2,0.1,nan\n"
    with pytest.raises(UserError, match="no rule knows any metric of this log; saw lr, my cost") as error:
        checked(tmp_path / "run.csv", text, packs=["ssim"])
    option, pair = shlex.split(str(error.value).partition("my cost; ")[2].partition(" says that")[0])
    assert (option, pair) == ("--map", "my cost=loss")
    report = checked(tmp_path / "run.csv", names=dict([pair.split("=")]), packs=["ssim"])
    assert report["ended"]["step"] == 2


# ---- producers


@pytest.mark.parametrize("producer", PRODUCERS)
def test_the_log_of_a_producer(tmp_path: Path, producer: str) -> None:
    name, text, expected = PRODUCERS[producer]
    (tmp_path / name).write_bytes(text.encode())
    source = open_log(str(tmp_path / name), {})
    found = [record for part in source.all_batches() for record in part]
    assert [record.step for record in found] == [step for step, _ in expected], source.issues.sentence()
    for record, (_, values) in zip(found, expected, strict=True):
        assert {key: record.values.get(key) for key in values} == pytest.approx(values, nan_ok=True)
    assert not source.issues.unread
    assert any(map(is_loss_like, found[0].values))


# ---- a log by its producer itself


def test_a_nan_in_the_bar_of_lightning_is_an_alert(tmp_path: Path) -> None:
    """It pads numbers with zeros: `nan.0`."""
    bar = "\rEpoch 0:  {0}%|##   | {0}/80 [00:00<00:01, 58.89it/s, v_num=0, train_loss={1}]"
    text = "".join(bar.format(step, "nan.0" if step > 40 else f"{1 / step:.3f}") for step in range(1, 81))
    assert broken(tmp_path / "out.log", text)[0][0] == 41


def test_lines_that_differ_by_a_number_are_answered_in_words(tmp_path: Path) -> None:
    """A `#`, of which bars consist, was once taken for a number."""
    with pytest.raises(UserError, match="no row of a training in 2 lines"):
        checked(tmp_path / "out.log", "tick 1 of 2 at 0.5\ntick 1 of # at 0.5\n")


def test_bars_by_tqdm_itself(tmp_path: Path) -> None:
    tqdm = pytest.importorskip("tqdm").tqdm
    with (tmp_path / "run.log").open("w") as file:
        for epoch in range(2):
            shown = tqdm(range(5), desc=f"Epoch {epoch}", file=file, mininterval=0, miniters=1)
            for step in shown:
                shown.set_postfix(loss=math.nan if (epoch, step) == (1, 3) else 1 / (1 + epoch + step))
    fired, said = broken(tmp_path / "run.log", (tmp_path / "run.log").read_text())
    assert fired == [9, 10], said  # step 3 of the second epoch, and the bar that still shows it
