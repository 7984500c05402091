"""What a study of somebody's program says, where it was silent or wrong before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from command_studies import ARGUMENTS, DESCENT, LOSS, Said, run, study, trials

from tune_ssim.base.errors import UserError
from tune_ssim.guards.verdict import Verdict
from tune_ssim.orchestration.phases import run_study
from tune_ssim.records.readers import LineParser
from tune_ssim.results.proof import proof_of
from tune_ssim.results.trial_text import warning_lines
from tune_ssim.results.winner import best_safe
from tune_ssim.study.study import load_study
from tune_ssim.trials.command.checkpoints import Checkpoints
from tune_ssim.trials.summary import TrialSummary

# ---- a step counter that begins again at each epoch

EPOCHS = """
import sys
for epoch in range(1, 5):
    for step in range(10):
        loss = "nan" if sys.argv[1] == "9.0" and epoch == 3 and step == 4 else 1 / (10 * epoch + step)
        print(f"epoch {epoch} step {step}: loss {loss}")
print('TUNE_SSIM {"held_out": {"score": 1}}')
"""


def test_steps_are_counted_over_epochs(tmp_path: Path) -> None:
    given = study(
        tmp_path,
        EPOCHS,
        task={"records": {"pattern": f"epoch (?P<epoch>\\d+) {LOSS}"}},
        space={"name": "rates", "parameters": {"lr": {"choice": [9.0]}}},
        task_config={"steps": 40},
    )
    baseline, trial = trials(given, tmp_path / "results")
    assert (baseline.verdict, baseline.steps) == (Verdict.SAFE, 39)
    assert (trial.verdict, trial.steps, trial.reason) == (Verdict.PRUNED, 24, "loss is nan at step 24")
    assert baseline.warnings == [
        "the step counter begins again at each epoch: steps are counted over epochs (first in line 11: step 0 after step 9)"
    ]


def test_a_counter_that_begins_again_without_an_epoch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the step counter began again \(line 13: step 2 after step 9\)") as error:
        run(study(tmp_path, EPOCHS, task={"records": {"pattern": LOSS}}), tmp_path / "results")
    assert "(?P<epoch>\\d+)" in str(error.value)


PUSHED_EPOCHS = """
import tune_ssim
with tune_ssim.trial_context() as t:
    t.config["lr"]
    for epoch in range(3):
        for step in range(1, 11):
            t.report(step=step, loss=1.0, **({"epoch": epoch} if "epoch" in __import__("sys").argv else {}))
    t.held_out(score=1.0)
"""


@pytest.mark.parametrize("names_epoch", [True, False])
def test_reported_steps_are_counted_alike(names_epoch: bool, tmp_path: Path) -> None:
    given = study(tmp_path, PUSHED_EPOCHS, ("epoch",) if names_epoch else ())
    if names_epoch:
        assert [trial.steps for trial in trials(given, tmp_path / "results")] == [30, 30]
    else:
        with pytest.raises(UserError, match=r"the step counter began again \(record 13: step 3 after step 10\)"):
            run(given, tmp_path / "results")


@pytest.mark.parametrize(
    ("rows", "steps"),
    [
        ([(0, 1), (5, 1), (10, 1), (0, 2), (5, 2)], [0, 5, 10, 15, 20]),  # a row every 5 steps
        ([(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)], [1, 2, 3, 4]),  # fractions of an epoch, and a counter that goes on
        ([(1, 1), (2, 1), (3, 1), (1, 1), (4, 1)], [1, 2, 3, 4]),  # a validation that counts epochs
        ([(1, 1), (2, 1), (2, 2), (3, 2)], [1, 2, 3]),
        ([(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (2, 3)], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_epochs_that_rows_name(rows: list[tuple[int, float]], steps: list[int]) -> None:
    text = "".join(f'{{"step": {step}, "epoch": {epoch}, "loss": 1.0}}\n' for step, epoch in rows)
    for size in (1, 1000):  # row by row, and as one table
        parser = LineParser(format="jsonl")
        found = [record for at in range(0, len(text), size) for record in parser.feed(text[at : at + size].encode())]
        assert [record.step for record in [*found, *parser.finish()]] == steps
        assert parser.issues.restarted == ""


# ---- a loss that diverges, and what else a program that prints only its loss is judged by


def rates(*values: float) -> dict[str, Any]:
    return {"space": {"name": "rates", "parameters": {"lr": {"choice": list(values)}}}, "search": {"trials": len(values)}}


def by_rate(found: list[TrialSummary]) -> dict[float, TrialSummary]:
    return {trial.config["lr"]: trial for trial in found if trial.role == "search"}


def test_a_loss_that_diverges_is_pruned(tmp_path: Path) -> None:
    given = study(tmp_path, task={"records": {"pattern": LOSS}}, **rates(0.05, 0.2, 2.0))
    found = by_rate(trials(given, tmp_path / "results"))
    diverged = found[2.0]
    assert (diverged.verdict, diverged.steps) == (Verdict.PRUNED, 11)
    assert diverged.evidence and diverged.evidence["guard"] == "divergence" and "x the baseline's (limit 10" in diverged.reason
    for healthy in (found[0.05], found[0.2]):  # the slower one ends with a loss that is larger, and near zero
        assert healthy.verdict == Verdict.SAFE, healthy.reason
        assert healthy.checked[0].startswith("loss at most ") and healthy.checked[1].startswith("loss at the end ")


ENDS_WORSE = """
import sys
for step in range(1, 31): print(f"step {step}: loss {4 / step + (2 if sys.argv[1] == '9.0' else 0.5)}")
print('TUNE_SSIM {"held_out": {"score": %s}}' % {"7.0": 0.4, "8.0": 0.9}.get(sys.argv[1], 1 + float(sys.argv[2]) / 10))
"""


def test_the_loss_at_the_end_and_the_objective_have_margins(tmp_path: Path) -> None:
    given = study(
        tmp_path, ENDS_WORSE, task={"records": {"pattern": LOSS}}, baseline={"lr": 0.1, "seeds": 2}, **rates(0.2, 7.0, 8.0, 9.0)
    )
    found = by_rate(trials(given, tmp_path / "results"))
    assert {rate: trial.verdict.value for rate, trial in found.items()} == {
        0.2: "safe", 7.0: "degraded", 8.0: "safe", 9.0: "degraded",
    }  # fmt: skip
    assert found[9.0].reason.startswith("loss at the end 3.2") and found[9.0].reason.endswith("x the baseline's (at most 2x)")
    assert found[7.0].reason == "score -0.6 against the baseline (at least -0.2)"  # twice the difference of its seeds


def test_to_look_for_nan_alone_is_not_enough(tmp_path: Path) -> None:
    given = study(tmp_path, task={"records": {"pattern": LOSS}})
    given["guards"] = {**given["guards"], "divergence": None}
    with pytest.raises(UserError, match="only NaN was checked"):
        run(given, tmp_path / "results")


# ---- a log that does not have every step

SPARSE = """
import sys
for step in range(10, 61, 10):
    norm = 100 if sys.argv[1] == "9.0" else 1 + step / 100
    print(f"step {step}: loss {1 / step} norm {norm}")
print('TUNE_SSIM {"held_out": {"score": 1}}')
"""
NORM = LOSS + r" norm (?P<total_norm>\S+)"


def test_the_window_follows_a_sparse_log(tmp_path: Path) -> None:
    given = study(
        tmp_path,
        SPARSE,
        task={"records": {"pattern": NORM}, "observe": "off"},
        guards={"smoke_test": None},
        task_config={"steps": 60},
        **rates(0.2, 9.0),
    )
    found = by_rate(trials(given, tmp_path / "results"))
    assert found[0.2].verdict == Verdict.SAFE and found[0.2].metrics["norm_ratio_max"] == pytest.approx(1)
    assert (found[9.0].verdict, found[9.0].steps) == (Verdict.PRUNED, 40)
    assert "median of 3 active steps up to step 40" in found[9.0].reason


def test_a_log_with_too_few_rows_is_an_error_of_the_baseline(tmp_path: Path) -> None:
    script = SPARSE.replace("range(10, 61, 10)", "range(20, 61, 20)")
    given = study(tmp_path, script, task={"records": {"pattern": NORM}}, guards={"smoke_test": None}, task_config={"steps": 60})
    words = r"total_norm is logged every 20 steps, 3 times in 60 steps, and a trial needs 4 to be judged: log it more often"
    with pytest.raises(UserError, match=words):
        run(given, tmp_path / "results")


# ---- a command that knows its own length

OWN_LENGTH = DESCENT.replace("int(sys.argv[3])", "300 if float(sys.argv[1]) < 0.3 else 250")
SAMPLER = """
import json, sys
open(sys.argv[1], "a").write(sys.argv[3] + " ")
open(sys.argv[2] + "/t.json", "w").write("[[1, 2]]")
"""


def own_length(folder: Path, **changes: Any) -> dict[str, Any]:
    task = {"records": {"pattern": LOSS}, **changes.pop("task", {})}
    return study(folder, OWN_LENGTH, ("{lr}", "{seed}"), task=task, **{"task_config": {}, **changes})


def test_without_steps_a_command_ends_by_itself(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text(SAMPLER)
    words = ["{python}", "sample.py", str(tmp_path / "sampled"), "{out}", "{step}"]
    smoke = {"command": words, "images": None, "tokens": "t.json", "vocabulary_size": 9, "at_start": "train.py"}
    guards = {"norm_ratio": None, "smoke_test": {"at": [1]}}
    given = own_length(tmp_path, task={"smoke": smoke, "checkpoints": "train.py"}, guards=guards, confirm={"seeds": 2})
    found = trials(given, tmp_path / "results")
    assert [(trial.steps, trial.horizon["steps"], trial.verdict) for trial in found] == [(300, 300, Verdict.SAFE)] * 6
    assert (tmp_path / "sampled").read_text().split() == ["0", "1", "300"] * 6


@pytest.mark.parametrize("config", [{}, {"steps": 2000}])
def test_how_long_a_command_is_confirmed_is_its_own(config: dict[str, int], tmp_path: Path) -> None:
    said = Said()
    run(own_length(tmp_path, task_config=config, confirm={"seeds": 2}), tmp_path / "results", progress=said)
    assert said.phases[-1] == "confirm: the baseline and up to 1 finalists, 2 new seeds, until the command ends by itself"


def test_a_trial_that_ends_before_the_baseline_is_not_comparable(tmp_path: Path) -> None:
    space = {"name": "rates", "parameters": {"lr": {"choice": [0.2, 0.35]}}}
    found = trials(own_length(tmp_path, space=space, search={"trials": 2}), tmp_path / "results")
    reasons = {trial.settings["lr"]: trial.reason for trial in found}
    assert reasons[0.35] == "the training ended by itself at step 250, the baseline's at 300: not comparable"
    assert reasons[0.2].startswith("safe to step 300")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": {"environment": {"N": "{steps}"}}}, "task.environment.N: '{steps}' needs a number of steps: say "),
        ({"confirm": {"steps": 900}}, "confirm.steps: cannot be told to the command, which runs to its own end: leave it out, or "),
        (
            {"task": {"evaluate": {"command": ["true"]}}, "scheduler": {"asha": {}}},
            "scheduler.asha: max_steps is missing",
        ),
    ],
)  # fmt: skip
def test_where_the_length_must_be_said(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_study(own_length(tmp_path, **changes))
    assert said in str(error.value)
    load_study(own_length(tmp_path, **{**changes, "task_config": {"steps": 300}}))


# ---- the first contact


def test_what_is_read_is_said_once_the_baseline_has_begun(tmp_path: Path) -> None:
    said = Said()
    task = {"records": {"pattern": LOSS + " grad_norm (?P<total_norm>\\S+)"}, "checkpoints": "{exp_dir}/{step}.pt"}
    script = DESCENT.replace("    print(", "    print(f'step {step}: loss much grad_norm 1') if step == 7 else print(")
    given = study(tmp_path, script, (*ARGUMENTS, "norm"), task=task, guards={"smoke_test": None}, result_every=30)
    run(given, tmp_path / "results", progress=said)
    at = next(n for n, line in enumerate(said.lines) if line.startswith("how the command is read"))
    assert said.lines[at : at + 7] == [
        "how the command is read: steps 1 to 30 of 30; read 31 lines; 1 of 31 lines could not be read "
        "(line 7: 'step 7: loss much grad_norm 1': group 'loss' found 'much', which is not a number)",
        "  metrics: loss, total_norm",
        "  total_norm: at 30 of 30 records; not observed: no Python process of it imports torch, or it clears PYTHONPATH (as "
        "python -I and -S do), so the observer is not in it",
        "  seed: handed to the command",
        "  checkpoints: none so far ({exp_dir}/{step}.pt)",
        "  guards: norm_ratio, divergence, non_finite can judge",
        "  objective: maximize score, not measured so far: a later record or an evaluation must give it",
    ]
    assert sum(line.startswith("how the command is read") for line in said.lines) == 1


# ---- checkpoints


def test_checkpoints_without_a_step_and_with_any_text(tmp_path: Path) -> None:
    for name in ("a/1/x.pt", "a/2/y.pt", "a/10/z.pt", "a/10/deep/w.pt", "last.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(template: str) -> list[tuple[int, str]]:
        paths = Checkpoints(template, {"exp_dir": str(tmp_path)}, lambda path: tmp_path / path).found(7)
        return [(step, str(path.relative_to(tmp_path))) for step, path in paths]

    assert found("{exp_dir}/last.pt") == [(7, "last.pt")]
    assert found("a/{step}/*.pt") == [(1, "a/1/x.pt"), (2, "a/2/y.pt"), (10, "a/10/z.pt")]
    assert sorted(found("a/{step}/**/*.pt")) == [(1, "a/1/x.pt"), (2, "a/2/y.pt"), (10, "a/10/deep/w.pt"), (10, "a/10/z.pt")]
    assert found("gone-{step}.pt") == found("*.ckpt") == []
    steps = Checkpoints("a/{step}/*.pt", {}, lambda path: tmp_path / path)
    assert steps.newest(9) == tmp_path / "a/2/y.pt" and steps.newest(0) is None


SAVES = DESCENT + "open(sys.argv[4] + '/ckpt.pt', 'w').write(str(w))\n"


def test_a_checkpoint_that_is_overwritten_is_the_newest(tmp_path: Path) -> None:
    evaluate = {"command": ["{python}", "-c", "print('{{\"score\": %s}}' % open('{checkpoint}').read())"]}
    task = {"records": {"pattern": LOSS}, "checkpoints": "{exp_dir}/ckpt.pt", "evaluate": evaluate}
    found = trials(study(tmp_path, SAVES, (*("{lr}", "{seed}", "{steps}"), "{exp_dir}"), task=task), tmp_path / "results")
    assert [trial.verdict for trial in found] == [Verdict.SAFE, Verdict.SAFE]
    assert all(0 < trial.metrics["score"] < 5 for trial in found) and not found[0].warnings


def test_checkpoints_that_match_no_file_are_reported(tmp_path: Path) -> None:
    task = {"records": {"pattern": LOSS}, "checkpoints": "{exp_dir}/{step}/*.safetensors"}
    found = trials(study(tmp_path, task=task), tmp_path / "results")
    (line,) = warning_lines(found)
    assert line.startswith("baseline-0 and 1 more: checkpoints: '{exp_dir}/{step}/*.safetensors' matches no file, so no ruined")


# ---- records that the study does not describe


def test_printed_lines_are_read_with_the_known_patterns(tmp_path: Path) -> None:
    given = study(tmp_path, DESCENT, (*ARGUMENTS, "norm"), guards={"smoke_test": None})
    baseline, trial = trials(given, tmp_path / "results")
    assert (baseline.steps, trial.steps, trial.verdict) == (30, 30, Verdict.SAFE)
    assert trial.metrics["norm_ratio_max"] < 10 and trial.metrics["score"] < 0  # sent behind the tag
    assert "grad_norm is taken for total_norm; else `records: {names: {…: total_norm}}`" in baseline.warnings


def test_a_log_that_is_only_in_a_file_is_proposed(tmp_path: Path) -> None:
    script = "import sys\nprint('hello')\nlog = open(sys.argv[4] + '/m.csv', 'w')\nlog.write('step,loss\\n1,2\\n2,1\\n')\n"
    with pytest.raises(UserError) as error:
        run(study(tmp_path, script, (*ARGUMENTS, "{exp_dir}")), tmp_path / "results")
    assert "no row of a training in 1 line, beginning with 'hello'" in str(error.value)
    assert 'it wrote a log: `records: {file: "{exp_dir}/m.csv"}`' in str(error.value)


def test_what_a_loop_prints_besides_its_reports_is_no_record(tmp_path: Path) -> None:
    script = PUSHED_EPOCHS.replace("for epoch in range(3)", "for epoch in range(1)").replace(
        "            t.report", "            print(f'step {step} loss 9', flush=True)\n            t.report"
    )
    trial = trials(study(tmp_path, script, ()), tmp_path / "results")[1]
    assert (trial.verdict, trial.steps) == (Verdict.SAFE, 10)
    events = (tmp_path / "results" / "rates" / "events.jsonl").read_text()
    assert '"loss": 1.0' in events and '"loss": 9' not in events


# ---- the exit code of a training that has ended well


def test_another_exit_code_may_be_a_good_end(tmp_path: Path) -> None:
    given = study(tmp_path, DESCENT + "sys.exit(1)\n", task={"records": {"pattern": LOSS}})
    with pytest.raises(UserError, match=r"ended after step 30, exit code 1 .*`exit_codes: \[0, 1\]`"):
        run(given, tmp_path / "results")
    given["task"]["exit_codes"] = [0, 1]
    assert [trial.verdict for trial in trials(given, tmp_path / "other")] == [Verdict.SAFE, Verdict.SAFE]


# ---- seeds that are copies


UNSEEDED = DESCENT.replace("random.Random(seed)", "random.Random(0)")
CONFIRMED = {"objective": {"maximize": "delta_score"}, "confirm": {"seeds": 3, "steps": 30}}


@pytest.mark.parametrize("seed", ["{seed}", "0"])
def test_copies_are_no_proof(tmp_path: Path, seed: str) -> None:
    given = study(tmp_path, UNSEEDED, ("{lr}", seed, "{steps}"), task={"records": {"pattern": LOSS}}, **CONFIRMED)
    (tmp_path / "study.yaml").write_text(load_study(given).to_yaml())
    loaded, said = load_study(tmp_path / "study.yaml"), Said()
    folder = run_study(loaded, storage=tmp_path / "results", in_process=True, progress=said)
    proof = proof_of(best_safe(folder), folder)
    (reason,) = proof["unproven"]
    assert reason.startswith("its 2 seeds gave the same delta_score, ") and "copies of one training, no repetitions" in reason
    words = rf"warning: {tmp_path}/study\.yaml:\d+: task\.command: the command does not get {{seed}}, so that the 3 seeds of"
    assert sum(re.match(words, line) is not None for line in said.lines) == len(loaded.warnings) == (seed == "0")
    assert load_study({**given, "confirm": None}).warnings == ()


# ---- a program that goes silent

PAUSES = """
import os, time
for step in range(1, 31):
    print(f"step {step}: loss {1 / step}", flush=True)
    while step == 15 and not os.path.exists("go"): time.sleep(0.05)
print('TUNE_SSIM {"held_out": {"score": 1}}', flush=True)
time.sleep(600)
"""


def test_a_silent_program_is_reported_while_it_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_ssim.trials.command.command_run.QUIET_S", 0.3)
    monkeypatch.setattr("tune_ssim.trials.command.command_run.LAST_ROWS_S", 1.0)
    given = study(tmp_path, PAUSES, task={"records": {"pattern": LOSS}, "silence_s": 1234, "observe": "off"})

    class Told(Said):
        def say(self, text: str) -> None:
            super().say(text)
            if "no record for" in text:
                (tmp_path / "go").touch()

    said = Told()
    folder = run(given, tmp_path / "results", progress=said)
    assert [trial.verdict for trial in folder.trials()] == [Verdict.SAFE, Verdict.SAFE]
    told = [line for line in said.lines if line.startswith("baseline-0: no record for 0.3 s")]
    assert re.search(r"after step 15 of 30, .* \(process \d+\); it is ended after 1234 s \(task: silence_s\)", told[0])
    assert len(told) == 2 and "after step 30 of 30" in told[1]
