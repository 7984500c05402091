"""A training that is somebody's program: the same verdicts as any other, and a clear outcome for every way to go wrong."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.guards import Baseline, NonFinite, NormRatio, SmokeTest
from tune_ssim.guards.verdict import Role
from tune_ssim.orchestration.recorder import quarantine_checkpoints
from tune_ssim.probes import file_contents, tensor_contents
from tune_ssim.results.study_folder import StudyFolder
from tune_ssim.study.command_spec import CommandSpec, fill, fill_value
from tune_ssim.study.study import load_study
from tune_ssim.trials.channel import TrialEnd
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.command.echoes import agrees
from tune_ssim.trials.command.output import CommandOutput
from tune_ssim.trials.final_verdict import TrialPlan
from tune_ssim.trials.load_training import load_task
from tune_ssim.trials.processes import OutputLog
from tune_ssim.trials.quarantine import Ledger
from tune_ssim.trials.summary import TrialSummary
from tune_ssim.trials.trial import Trial

TESTS = Path(__file__).parent
FOREIGN = str(TESTS / "trainings" / "foreign.py")
LOG = r"\(step=(?P<step>\d+)\) Train Loss: (?P<loss>[^,]+), Grad Norm: (?P<total_norm>[^,]+),"
PLAN = TrialPlan(steps=40, guards=(NormRatio(), SmokeTest(at=(0, 10, 20)), NonFinite()))
DOORS: dict[str, Any] = {
    "python task": "small_task:SmallTask",
    "pushed by a function": "pushed:main",
    "pushed by a script": {
        "command": ["{python}", str(TESTS / "trainings" / "pushed.py"), "--ssim_loss_weight", "{ssim_loss_weight}"]
    },
    "a script that knows nothing": {
        "command": [
            *("{python}", FOREIGN, "train", "--ssim_loss_weight", "{ssim_loss_weight}", "--steps", "{steps}"),
            *("--seed", "{seed}", "--out", "{exp_dir}/ck", "--save_every", "5"),
        ],
        "records": {"pattern": LOG},
        "checkpoints": "{exp_dir}/ck/{step:05d}.safetensors",
        "smoke": {
            "command": ["{python}", FOREIGN, "sample", "--checkpoint", "{checkpoint}", "--out", "{out}"],
            "at_start": "start",
        },
        "evaluate": {"command": ["{python}", FOREIGN, "evaluate", "--checkpoint", "{checkpoint}"]},
        "resume": ["--resume", "{checkpoint}"],
    },
}


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(TESTS), str(TESTS / "trainings"), str(TESTS.parent))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(TESTS / "trainings"))


def start(
    door: Any, folder: Path, weight: float, role: str = "search", baseline: Baseline | None = None, plan: TrialPlan = PLAN
) -> Trial:
    task = load_task(door, str(TESTS / "trainings"))()
    if hasattr(task, "identify"):
        task.identify(f"study-{role}-{weight:g}", folder)
    trial = Trial(task, plan)
    trial.start({"steps": plan.steps, "ssim_loss_weight": weight}, role=role, baseline=baseline)
    return trial


def finish(trial: Trial) -> Trial:
    while trial.verdict is None:
        trial.advance(10)
    return trial


@pytest.mark.parametrize("door", DOORS)
def test_the_same_training_through_every_door(door: str, tmp_path: Path) -> None:
    baseline = finish(start(DOORS[door], tmp_path, 0.0, "baseline"))
    assert baseline.verdict and baseline.verdict.verdict == "safe", baseline.verdict
    reference = Baseline((baseline.baseline_run("baseline-0"),))
    good = finish(start(DOORS[door], tmp_path, 1.0, baseline=reference))
    assert good.verdict and good.verdict.verdict == "safe" and good.step == 40
    assert good.verdict.metrics["delta_ssim"] == pytest.approx(2.8975e-3, rel=1e-3)
    assert sorted(good.images) == [0, 10, 20, 40]
    ruined = finish(start(DOORS[door], tmp_path, 1000.0, baseline=reference))
    assert ruined.verdict and ruined.verdict.verdict == "pruned" and ruined.step == 11
    violation = ruined.verdict.violation
    assert violation and violation.guard == "norm_ratio" and violation.value == pytest.approx(4.97e7, rel=1e-2)
    # The log of the script does not say which steps were active, so nothing can be paired there.
    assert ("unpaired" in violation.sentence) == (door == "a script that knows nothing")
    if door == "a script that knows nothing":
        their_checkpoints_are_quarantined(baseline, ruined, tmp_path)


def their_checkpoints_are_quarantined(baseline: Trial, ruined: Trial, storage: Path) -> None:
    folder = StudyFolder(storage / "study").create()
    summaries = []
    for name, trial, role in (("baseline-0", baseline, Role.BASELINE), ("trial-00", ruined, Role.SEARCH)):
        assert trial.verdict
        for checkpoint in trial.wrote:
            folder.add_checkpoint(name, checkpoint)
        summaries.append(TrialSummary(trial_id=name, role=role, verdict=trial.verdict.verdict, reason="ruined"))
    assert quarantine_checkpoints(folder, summaries[1], baselines=()) == []  # nothing is known to be sound yet
    written = ruined.task.written()
    assert len(written) >= 2 and len(quarantine_checkpoints(folder, summaries[1], ["baseline-0"])) == len(written)
    ledger = Ledger(storage)
    for _, path in written:
        refusal = ledger.check(path)
        assert refusal is not None and refusal.entry.trial_id == "trial-00"
    assert all(ledger.check(path) is None for _, path in baseline.task.written())


def test_a_command_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    door = DOORS["a script that knows nothing"]
    plan = TrialPlan(steps=20, guards=(NormRatio(), SmokeTest(at=(0,)), NonFinite()))  # samples of step 0, and at the end
    whole = finish(start(door, tmp_path / "whole", 1.0, "baseline", plan=plan))
    half = start(door, tmp_path / "half", 1.0, "baseline", plan=plan)
    while half.step < 10:
        half.advance(1)
    half.save(tmp_path / "checkpoint")
    half.task.close()
    again = start(door, tmp_path / "half", 1.0, "baseline", plan=plan)
    again.load(tmp_path / "checkpoint")
    assert again.step == 10
    finish(again)
    assert again.series == whole.series and again.verdict == whole.verdict
    assert sorted(path.name for path in (tmp_path / "half").iterdir() if "study" in path.name) == [
        "study-baseline-1",
        "study-baseline-1-try2",  # a new name: nothing that it could pick up by itself
    ]


def test_a_checkpoint_of_torch_is_read_and_nothing_in_it_is_run(tmp_path: Path) -> None:
    model = torch.nn.Linear(20, 20)
    whole = {"model": model.state_dict(), "optimizer": {"step": 3, "moments": [torch.rand(20)]}, "note": "x"}
    (tmp_path / "step-3").mkdir()
    torch.save(whole, tmp_path / "step-3" / "model.pt")
    save_file(dict(model.state_dict()), tmp_path / "step-3" / "ema.safetensors")
    (tmp_path / "step-3" / "torn.safetensors").write_bytes(b"no tensors")
    found = file_contents(tmp_path / "step-3")
    assert found is not None
    assert len(found.hashes) == 5 and set(tensor_contents(model.state_dict()).hashes.values()) <= set(found.hashes.values())
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Evil(tmp_path / "ran")}))
    assert file_contents(tmp_path / "evil.pt") is None
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# ---- scripts that go wrong


def run(code: str, config: Mapping[str, Any] | None = None, **spec: Any) -> CommandTask:
    given = {"command": ["{python}", "-c", code.replace("{", "{{").replace("}", "}}")], "grace_s": 0.5, **spec}
    task = CommandTask(CommandSpec.model_validate(given))
    task.setup({"steps": 40, **(config or {})}, 0)
    return task


def records(task: CommandTask, limit: int = 1000) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    try:
        while len(found) < limit and (record := task.step()) is not None:
            found.append(record)
    finally:
        task.close()
    return found


GOOD = 'for n in range(1, 6): print(\'TUNE_SSIM {"step": %d, "loss": 0.5}\' % n)\n'


@pytest.mark.parametrize(
    ("code", "spec", "says"),
    [
        ("pass", {}, "ended without a record, exit code 0 (nothing was reported through tune_ssim.trial_context"),
        ("pass", {"records": {"pattern": "bagel"}}, "(looked in its output"),
        (
            "print('loading'); print('Epoch 1 loss: 0.5'); print('bye')",
            {"records": {"pattern": r"step (?P<step>\d+) loss (?P<loss>\S+)"}},
            r"in its output; pattern 'step .\?P<step>.*' did not match any of 3 lines, for one 'Epoch 1 loss: 0.5')",
        ),
        ("print('Epoch 1 loss: 0.5')", {"records": {"pattern": "bagel"}}, "bagel did not match the only line, 'Epoch 1 loss"),
        (
            "while True: print('epoch 1')",
            {"records": {"pattern": "key_values"}, "first_record_s": 1.0},
            "no record for 1 s (looked in its output; the built-in pattern key_values did not match any of .*, for one 'epoch 1')",
        ),
        ("raise ValueError('the data is gone')", {}, "ended without a record, exit code 1"),
        ("raise ValueError('the data is gone')", {}, "last: .*ValueError: the data is gone"),
        (GOOD + "raise MemoryError('at 90 %')", {}, "ended after step 5, exit code 1.*MemoryError: at 90 %"),
        ("import os; os.kill(os.getpid(), 9)", {}, "ended without a record, ended by SIGKILL"),
        ("import time; time.sleep(60)", {"first_record_s": 0.3}, "gave no record for 0.3 s (nothing was reported .*(nothing)"),
        ("while True: print('still loading')", {"first_record_s": 1.0}, "gave no record for 1 s.*last: still loading"),
        (GOOD + "import time; time.sleep(60)", {"silence_s": 0.5}, "gave no record after step 5 for 0.5 s"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\xfe bad\\n'); sys.exit(2)", {}, "exit code 2.*bad"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said(code: str, spec: dict[str, Any], says: str) -> None:
    import re

    started = time.monotonic()
    with pytest.raises(UserError) as error:
        records(run(code, **spec))
    assert re.search(says.replace("(", r"\(").replace(")", r"\)"), str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 30


HANGS = "import sys, time\nfor n in range(1, 6): print('step %d loss 0.5' % n, flush=True)\n"
STEP_LOSS = r"step (?P<step>\d+) (?:loss (?P<loss>\S+)|val (?P<val>\S+))"


@pytest.mark.parametrize("door", ["printed", "file"])
@pytest.mark.parametrize(
    "after", ["time.sleep(600)", "while True: print('uploading', flush=True); time.sleep(0.01)"], ids=["hangs", "talks"]
)
def test_a_command_that_does_not_end_after_its_last_step_is_judged_by_it(
    after: str, door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later step shows that the last one is complete. Half an hour of silence need not pass for it: `evaluate` has what it
    needs."""
    monkeypatch.setattr("tune_ssim.trials.command.command_run.LAST_ROWS_S", 0.5)
    code = HANGS + "open(sys.argv[2] + '/5.pt', 'w').write('x')\n" + after
    spec: dict[str, Any] = {"records": {"pattern": STEP_LOSS}}
    if door == "file":
        code = code.replace("flush=True)\n", "flush=True, file=log)\n", 1).replace(
            "for n", "log = open(sys.argv[1], 'w')\nfor n", 1
        )
        spec["records"]["file"] = "{exp_dir}/log.txt"
    spec["evaluate"] = {"command": ["{python}", "-c", 'print(\'{{"ssim": [0.5, 1.0], "psnr": 30}}\')']}
    task = run(code, {"steps": 5}, checkpoints="{exp_dir}/{step}.pt", **spec)
    task.spec.command.extend(["{exp_dir}/log.txt", "{exp_dir}"])
    task.identify("x", tmp_path)
    trial = Trial(task, TrialPlan(steps=5, guards=(NonFinite(),)))
    trial.start({"steps": 5}, role="baseline")
    started = time.monotonic()
    trial.advance()
    assert trial.verdict and trial.verdict.reason == "safe to step 5", trial.verdict
    assert trial.verdict.metrics["ssim"] == 0.75 and trial.step == 5
    assert trial.verdict.per_image == {"ssim": [0.5, 1.0]}
    assert time.monotonic() - started < 30


def test_what_the_last_step_still_makes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint, else an older one would be sampled; later rows; held-out numbers, when nobody else measures them."""
    monkeypatch.setattr("tune_ssim.trials.command.command_run.LAST_ROWS_S", 0.2)
    code = HANGS + "time.sleep(1.5); print('step 5 val 2', flush=True); time.sleep(1.5)\nopen(sys.argv[1], 'w').write('x')\n"
    code += 'print(\'TUNE_SSIM {"held_out": {"ssim": 0.5}}\', flush=True); time.sleep(600)'
    smoke = {"command": ["x", "{checkpoint}"]}
    late = run(code, {"steps": 5}, records={"pattern": STEP_LOSS}, checkpoints="{exp_dir}/{step}.pt", smoke=smoke)
    late.spec.command.append("{exp_dir}/5.pt")
    assert records(late)[-1] == {"step": 5, "loss": 0.5, "val": 2.0}
    early = run(code, {"steps": 5}, records={"pattern": STEP_LOSS})
    early.spec.command.append("{exp_dir}/5.pt")
    assert records(early)[-2:] == [{"step": 5, "loss": 0.5}, {"step": 5, "val": 2.0}]
    assert early._run and early._run.output.held_out == {"ssim": 0.5}


@pytest.mark.parametrize(("steps", "verdict"), [((0, 1000, 2000), "error"), ((1000, 2000), "error"), ((0, 10, 1000), "safe")])
def test_records_beyond_the_trial_are_no_verdict(steps: tuple[int, ...], verdict: str, tmp_path: Path) -> None:
    task = run(f"for n in {steps}: print('step %d loss 0.5' % n)", records={"pattern": STEP_LOSS})
    task.identify("x", tmp_path)
    trial = Trial(task, TrialPlan(steps=20, guards=(NonFinite(),)))
    trial.start({"steps": 20}, role="baseline")
    trial.advance()
    assert trial.verdict and trial.verdict.verdict == verdict, trial.verdict
    if verdict == "error":
        assert (
            "first record after step 0 is at step 1000, but the trial has 20 steps: nothing of it could be judged"
            in trial.verdict.reason
        )


@pytest.mark.parametrize("value", ["1,234", "tensor(0.5)"])
def test_a_value_that_was_matched_and_is_no_number_is_quoted(value: str, tmp_path: Path) -> None:
    pattern = r"step (?P<step>\d+) loss (?P<loss>\S+) norm (?P<total_norm>\S+)"
    task = run(f"for n in range(1, 41): print('step %d loss {value} norm 2' % n)", records={"pattern": pattern})
    task.identify("x", tmp_path)
    trial = Trial(task, TrialPlan(steps=40, guards=(NonFinite(),)))
    trial.start({"steps": 40}, role="baseline")
    trial.advance()
    assert trial.verdict and trial.verdict.verdict == "error"
    assert "metric 'loss*' absent" in trial.verdict.reason
    assert f"group 'loss' found '{value}', which is not a number" in trial.verdict.reason


@pytest.mark.parametrize(
    ("rest", "verdict", "reason"),
    [
        ("norm 2", "error", "the end of the training was not judged"),
        ("norm 2 loss -", "error", "the end of the training was not judged"),
        ("norm 2 loss 0.5 (avg nan)", "bad_setup", "loss_avg is nan at step 15"),
        ("loss nan norm 2", "bad_setup", "loss is nan at step 15"),
    ],
)
def test_a_printed_loss_that_ends_before_the_training(rest: str, verdict: str, reason: str, tmp_path: Path) -> None:
    """A program may leave a NaN out, or write something else in its place."""
    code = f"for n in range(1, 41): print('step %d ' % n + ('loss 0.5 norm 2' if n < 15 else {rest!r}))"
    task = run(code, records={"pattern": "key_values"})
    task.identify("x", tmp_path)
    trial = Trial(task, TrialPlan(steps=40, guards=(NonFinite(),)))
    trial.start({"steps": 40}, role="baseline")
    judged = finish(trial).verdict
    assert judged and judged.verdict == verdict and reason in judged.reason


def test_a_failed_trial_says_how_far_it_came() -> None:
    from tune_ssim.orchestration.trainable import make_trainable

    fails = "import sys\nfor n in range(1, int(sys.argv[1]) + 1): print('step %d loss 0.5' % n)\nraise SystemExit(3)"
    command = {"command": ["{python}", "-c", fails, "{upto}"], "records": {"pattern": STEP_LOSS}, "known": {"lr": 0.1}}
    settings = {"ssim_grad_scale": 1.0, "ssim_loss_max_t": 1.0}
    trainable = make_trainable(command, (NonFinite(),), steps=40, result_every=100)({**settings, "upto": 18})

    def summary() -> dict[str, Any]:
        result = trainable.step()
        assert result["verdict"] == "error" and result["harm"] == 0.0, result
        found: dict[str, Any] = json.loads(result["summary"])
        return found | {"in_force": json.loads(result["effective"])}

    ended = summary()
    assert ended["reason"].startswith("the command ended after step 18")
    assert ended["steps"] == 18 and ended["horizon"] == {"steps": 18, "lr": 0.1}
    assert ended["in_force"]["upto"] == 18
    trainable.reset_config({"gain": "no number", "upto": 3})  # not even set up: nothing of the trial before it
    assert (summary()["steps"], summary()["horizon"], summary()["in_force"]) == (0, {}, {})
    trainable.reset_config({**settings, "upto": 3, "steps": "many"})  # not by the task
    assert (summary()["steps"], summary()["in_force"]) == (0, {})
    trainable.cleanup()


@pytest.mark.parametrize("result_every", [None, 10, 1])
def test_what_a_training_gave_before_it_failed_is_kept(result_every: int | None) -> None:
    from tune_ssim.orchestration.trainable import make_trainable

    fails = "for n in range(1, 19): print('step %d loss 0.5' % n)\nraise SystemExit(3)"
    command = {"command": ["{python}", "-c", fails], "records": {"pattern": STEP_LOSS}}
    trainable = make_trainable(command, (NonFinite(),), steps=40, result_every=result_every, report_every=4)({})
    found: list[int] = []
    while "done" not in (result := trainable.step()):
        found += [record[0] for record in result["records"]]
    found += [record[0] for record in result["records"]]
    assert result["verdict"] == "error" and found == list(range(1, 19))
    trainable.cleanup()


def test_a_command_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    """Its process died before it had written any; Ray has saved the trial all the same."""
    from tune_ssim.orchestration.trainable import make_trainable

    code = "import time\nfor n in range(1, 41): print('step %d loss 0.5' % n, flush=True); time.sleep(0.01)"
    command = {
        "command": ["{python}", "-c", code],
        "records": {"pattern": STEP_LOSS},
        "checkpoints": "{exp_dir}/{step}.pt",
        "resume": ["--resume", "{checkpoint}"],
    }
    kind = make_trainable(command, (NonFinite(),), steps=40, result_every=10, checkpoint_every=10)
    first = kind({})
    assert first.step()["should_checkpoint"] is True
    first.save_checkpoint(str(tmp_path))
    first.cleanup()
    again = kind({})
    again.load_checkpoint(str(tmp_path))
    result = again.step()
    while "done" not in result:
        result = again.step()
    assert result["verdict"] == "safe", result["reason"]
    again.cleanup()


def test_a_command_that_hangs_before_its_last_step_is_read_to_the_end() -> None:
    task = run(HANGS + "time.sleep(600)", records={"pattern": STEP_LOSS}, silence_s=1.0)
    assert len(records(task, limit=5)) == 5  # judged before it is an error
    task = run(HANGS + "time.sleep(600)", records={"pattern": STEP_LOSS}, silence_s=1.0)
    with pytest.raises(UserError, match="gave no record after step 5 for 1 s"):
        records(task)
    task = run(HANGS + "time.sleep(600)", {"steps": 5}, records={"pattern": STEP_LOSS}, silence_s=1.0)
    assert len(records(task)) == 5  # all that it was asked for


def test_half_a_line_and_odd_ones_do_no_harm() -> None:
    code = GOOD + (
        "import sys\n"
        'print(\'TUNE_SSIM {"step": 6, "lo\')\n'
        'print(\'noise TUNE_SSIM {"step": 7, "loss": NaN, "note": "text"}\')\n'
        "sys.stdout.buffer.write(b'\\xff\\xfe\\n'); sys.stdout.flush()\n"
        'sys.stdout.write(\'TUNE_SSIM {"step": 8, "loss": 1}\')'
    )
    found = records(run(code))
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 7, 8]  # the last line has no end, and is one
    assert set(found[5]) == {"step", "loss"}


def test_odd_lines_cost_no_records() -> None:
    """What is printed beside the records may be anything; a NaN behind it is seen."""
    assert agrees("0e-9999999", 0.1) is False and agrees("1e9999999", 0.1) is False
    code = (
        "for n in range(1, 41):\n"
        "  print('TUNE_SSIM {\"step\": %d, \"loss\": %s}' % (n, 'NaN' if n > 30 else '0.5'), flush=True)\n"
        "  if n == 20: print('TUNE_SSIM ' + '[' * 200000)\n"
    )
    trial = Trial(run(code), TrialPlan(steps=40, guards=(NonFinite(),)))
    trial.start({"steps": 40}, role="search")
    finish(trial)
    assert trial.verdict and (trial.verdict.verdict, trial.step) == ("pruned", 31)


def test_output_that_cannot_be_kept_ends_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the records behind it were never read, so there is no verdict."""

    def full(log: OutputLog, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OutputLog, "write", full)
    with pytest.raises(OSError, match="No space left"):
        records(run(GOOD))


def test_a_column_that_is_called_step_and_is_none() -> None:
    code = 'for n in range(1, 6): print(\'{"global_step": %d, "step": %d, "loss": 0.5}\' % (n, 4 * n))'
    task = run(code, records={"names": {"global_step": "step"}})
    assert [record["step"] for record in records(task)] == [1, 2, 3, 4, 5]


def test_tagged_lines_have_the_names_that_the_study_gave() -> None:
    code = 'for n in range(1, 6): print(\'TUNE_SSIM {"step": %d, "train_loss": 0.5, "loss": 7}\' % n)'
    found = records(run(code, records={"names": {"train_loss": "loss"}}))
    assert found == [{"step": step, "loss": 0.5} for step in range(1, 6)]


def test_a_flood_between_the_records_is_read(tmp_path: Path) -> None:
    code = (
        "import sys\nfor n in range(1, 6):\n  sys.stdout.write('x' * 99 + '\\n')\n  sys.stdout.write(('y' * 99 + '\\n') * 200000)\n"
    )
    code += '  print(\'TUNE_SSIM {"step": %d, "loss": 0.5}\' % n)\n'
    task = run(code)
    task.identify("flood", tmp_path)
    assert [record["step"] for record in records(task)] == [1, 2, 3, 4, 5]
    assert sum(path.stat().st_size for path in (tmp_path / "flood").glob("output.log*")) <= 3 * 2**25


def test_a_command_that_ended_before_it_was_read_is_read_in_its_order() -> None:
    code = "for n in range(1, 6): print('step %d loss 0.5' % n)"
    task = run(code, records={"pattern": r"step (?P<step>\d+) loss (?P<loss>\S+)"})
    task._start()
    assert task._run is not None and task._run.process.wait(30)
    assert [record["step"] for record in records(task)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("log", ["jsonl", "csv"])
def test_records_from_a_file_that_it_writes(log: str, tmp_path: Path) -> None:
    line = {"jsonl": "json.dumps({'step': n, 'grad': n / 10})", "csv": "f'{n},{n / 10}'"}[log]
    head = {"jsonl": "", "csv": "f.write('step,grad\\n')\n"}[log]
    code = f"import json, sys, time\nf = open(sys.argv[1], 'w')\n{head}"
    code += f"for n in range(1, 9):\n  print({line}, file=f, flush=True); time.sleep(0.02)"
    task = run(code, records={"file": "{exp_dir}/log." + log, "names": {"grad": "total_norm"}})
    task.spec.command.append("{exp_dir}/log." + log)
    task.identify("file", tmp_path)
    assert records(task) == [{"step": n, "total_norm": n / 10} for n in range(1, 9)]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_records_from_before_it_was_started_are_not_its_own(kind: str, tmp_path: Path) -> None:
    """Else the first values of a step stand, and the trial is judged by a run that is over."""
    log = tmp_path / "log.jsonl" if kind == "file" else tmp_path / "tb"
    old = log if kind == "file" else log / "events.out.tfevents.1.host"
    code = f"open({str(log)!r}, 'a').write('{{\"step\": 1, \"loss\": 9}}\\n')"
    spec = {"records": {"file": str(log)}} if kind == "file" else {"records": {"file": str(log), "format": "tensorboard"}}
    old.parent.mkdir(exist_ok=True)
    old.write_text("")  # empty: nobody's records
    if kind == "file":
        assert records(run(code, **spec)) == [{"step": 1, "loss": 9}]
    else:
        old.write_text("x")
    with pytest.raises(UserError, match=f"{old} is there before the command was started: its records are another run's"):
        records(run(code, **spec))


def test_records_from_mlflow(tmp_path: Path) -> None:
    """A script that logs to MLflow as any other does, with a run that it finds in its environment."""
    from tune_ssim.tracking.mlflow_source import open_new_run

    code = "import mlflow\nwith mlflow.start_run():\n"
    code += "  for n in range(1, 9): mlflow.log_metrics({'loss': 1 / n, 'grad': n}, step=n)\n"
    task = run(code, records={"mlflow": f"sqlite:///{tmp_path}/theirs.db", "names": {"grad": "total_norm"}})
    with pytest.raises(UserError, match="only in a study"):
        task.step()
    task.open_mlflow = open_new_run
    assert records(task) == [{"step": n, "loss": 1 / n, "total_norm": n} for n in range(1, 9)]


# ---- what reaches it


ECHO = "import os, sys, json\nprint('TUNE_SSIM ' + json.dumps({'held_out': {'words': len(sys.argv)}}))\n" + GOOD
AWKWARD = "a b'\"$(touch x) `y`\n*"


def test_settings_reach_it_by_flag_environment_and_file(tmp_path: Path) -> None:
    code = (
        "import json, os, sys\n"
        "out = {'flag': sys.argv[1], 'env': os.environ['NAME'], 'exp': os.environ['EXP_NAME']}\n"
        "out['file'] = json.load(open(sys.argv[2]))\n"
        "json.dump(out, open(sys.argv[3], 'w'))\n" + GOOD
    )
    (tmp_path / "base.json").write_text('{"loss": {"ssim": {"weight": 9, "kept": true}}, "other": [1]}')
    task = run(
        code,
        {"name": AWKWARD, "ssim_loss_weight": 1e-5, "flag": True},
        environment={"NAME": "<{name}>"},
        config_file={
            "path": "{exp_dir}/config.json",
            "base": str(tmp_path / "base.json"),
            "set": {"loss.ssim.weight": "{ssim_loss_weight}", "tag": "w={ssim_loss_weight:.0e}", "loss.use": "{flag}"},
        },
    )
    task.spec.command.extend(["{name}", "{exp_dir}/config.json", str(tmp_path / "out.json")])
    task.identify("study-trial-00", tmp_path / "work")
    assert len(records(task)) == 5
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["flag"] == AWKWARD and out["env"] == f"<{AWKWARD}>" and out["exp"] == "study-trial-00"
    assert out["file"] == {"loss": {"ssim": {"weight": 1e-5, "kept": True}, "use": True}, "other": [1], "tag": "w=1e-05"}
    assert not (tmp_path / "x").exists()


def test_a_setting_that_reaches_nothing_is_a_bad_setup() -> None:
    with pytest.raises(BadSetup, match=r"ssim_loss_weight is set to 3\.0 but does not reach the training"):
        records(run(GOOD, {"ssim_loss_weight": 3.0}))
    assert records(run(GOOD, {"ssim_grad_scale": 1.0, "ssim_loss_max_t": 1.0}))  # they ask for nothing


@pytest.mark.parametrize(
    ("printed", "in_force"),
    [
        ("Namespace(ssim_loss_weight=0.1, steps=40)", 0.1),
        ('{"ssim_loss_weight": 0.5}', 0.5),
        ("  ssim_loss_weight: 3", 3.0),
        ("args: --ssim_loss_weight=1e-3", 1e-3),
        ("my_ssim_loss_weight=7", None),
        ("ssim_loss_weight=unset", None),
    ],
)
def test_what_it_prints_is_what_is_in_force(printed: str, in_force: float | None) -> None:
    task = run(f"print({printed!r})\n" + GOOD, {"ssim_loss_weight": 3.0}, environment={"W": "{ssim_loss_weight}"})
    records(task)
    assert task.effective()["ssim_loss_weight"] == (3.0 if in_force is None else in_force)
    assert (task.where_printed("ssim_loss_weight") is None) == (in_force is None)


def test_another_value_in_force_stops_the_trial(tmp_path: Path) -> None:
    task = run("print('ssim_loss_weight=0.1')\n" + GOOD, environment={"W": "{ssim_loss_weight}"})
    task.identify("x", tmp_path)
    trial = Trial(task, TrialPlan(steps=5, guards=(NonFinite(),)))
    trial.start({"steps": 5, "ssim_loss_weight": 3.0}, role="baseline")
    trial.advance()
    assert trial.verdict and trial.verdict.verdict == "bad_setup"
    assert "ssim_loss_weight was set to 3.0 but 0.1 is in force" in trial.verdict.reason
    assert "; it printed 'ssim_loss_weight=0.1'" in trial.verdict.reason


WARM_UP = "for n in range(1, 4): print('step %d | loss 0.5 | lr: %.2e' % (n, n * 1e-3))\n"


@pytest.mark.parametrize(
    ("printed", "config", "in_force"),
    [
        ("prompt='a photo of a dog', lr=3)", {"prompt": "a photo of a dog"}, True),
        ('{"out": "/a/b c", "x": 1}', {"out": "/a/b c"}, True),
        ("prompt: a photo of a dog", {"prompt": "a photo of a dog"}, True),
        ("prompt='a photo of a cat'", {"prompt": "a photo of a dog"}, "a photo of a cat"),
        ("prompt='a'", {"prompt": "a photo of a dog"}, "a"),
        ("model=v1.", {"model": "v1."}, True),
        ("model=v1.", {"model": "v1"}, True),
        ("it says 'it\\'s'; name=\"it's\"", {"name": "it's"}, True),
        ("w=0.1235", {"w": 0.123456}, True),
        ("w=0.1236", {"w": 0.123456}, 0.1236),
        ("w=1.23e-01.", {"w": 0.123456}, True),
        ("w=0.1", {"w": 0.13}, 0.1),  # a default, printed as Python does
        ("w=0", {"w": 0.5}, 0.0),
        ("w=1", {"w": 0.5}, 1.0),
        ("w=0.0", {"w": 1e-5}, 0.0),
        ("w=0.0000", {"w": 1e-5}, None),  # as %.4f prints both 0 and 1e-5
        ("w=0.12345679104328156", {"w": 0.12345678905}, True),  # float32
        ("n=41", {"n": 40}, 41.0),
        ("n=1000001", {"n": 1000000}, 1000001.0),
        ("n=1e+06", {"n": 1000000}, True),
        ("w=0.1\\nother run had: w=1.0", {"w": 0.1}, True),
        ("default w=1.0\\nw=0.1", {"w": 0.1}, True),
        ("default w=1.0\\nw=2.0", {"w": 0.1}, 1.0),
        ("cmd = train.py --w=0.1\\nNamespace(w=1.0)", {"w": 0.1}, 1.0),  # told, and not in force
        ("Namespace(steps=40)\\nsteps: 500000 in the schedule", {}, True),
        ("[1, 2] = sizes; sizes=[1, 2]", {"sizes": [1, 2]}, None),
        ("flag=True", {"flag": True}, True),
        ("flag=false", {"flag": True}, False),
        ("[1/20] loss=0.5 lr=1e-4", {"lr": 0.1}, None),
    ],
)
def test_a_printed_value_is_compared_as_it_is_printed(printed: str, config: dict[str, Any], in_force: Any) -> None:
    """True: as asked for; None: it says nothing; else another value."""
    name = next(iter(config), "steps")
    for echo in ("auto", "required"):
        task = run("", {"steps": 40, **config}, records={"file": "x"}, echo=echo)
        folder = Path(tempfile.mkdtemp())
        output = CommandOutput(task.settings, OutputLog(folder / "log"), TrialEnd(folder), None)
        for byte in printed.replace("\\n", "\n").encode():
            output.take(bytes([byte]))
        output.collect(final=True)
        asked = task.config[name]
        assert task.effective()[name] == (asked if in_force is None or (in_force is True) else in_force)
        assert (name in task.settings.stated) == (in_force is not None)


@pytest.mark.parametrize("pattern", [r"step (?P<step>\d+) \| loss (?P<loss>\S+) \| lr: (?P<lr>\S+)", "key_values", None])
def test_a_record_is_no_echo(pattern: str | None) -> None:
    task = run(
        "print('lr=0.01')\n" + WARM_UP, {"lr": 0.01}, environment={"LR": "{lr}"}, records={"pattern": pattern}, echo="required"
    )
    assert len(records(task)) == 3
    assert task.effective()["lr"] == 0.01
    for rows in ({"pattern": pattern}, None):
        task = run(WARM_UP + GOOD, {"lr": 0.01}, environment={"LR": "{lr}"}, records=rows)
        records(task)
        assert "lr" not in task.settings.stated
    task = run('print(\'TUNE_SSIM {"step": 1, "lr": 0.5}\')\n' + GOOD, {"lr": 0.01}, environment={"LR": "{lr}"})
    records(task)
    assert "lr" not in task.settings.stated


def test_what_a_format_told_is_in_force() -> None:
    task = run("print('w=0.1')\n" + GOOD, {"w": 0.1004}, environment={"W": "{w:.2e}"}, echo="required")
    assert len(records(task)) == 5 and task.effective()["w"] == 0.1004


def test_a_required_echo_that_does_not_come(tmp_path: Path) -> None:
    task = run(GOOD, {"ssim_loss_weight": 3.0}, environment={"W": "{ssim_loss_weight}"}, echo="required")
    with pytest.raises(BadSetup, match="does not print ssim_loss_weight"):
        records(task)


# ---- samples


def sampling(code: str, **smoke: Any) -> CommandTask:
    command = ["{python}", "-c", code.replace("{", "{{").replace("}", "}}"), "{out}", "{step}", "{noise}", "{checkpoint}"]
    return run(GOOD, smoke={"command": command, **smoke}, checkpoints="{exp_dir}/{step:03d}.pt")


IMAGES = """
import sys, numpy as np
from PIL import Image
for n in range(3):
    Image.fromarray(np.full((8, 8, 3), 40 * n, dtype=np.uint8)).save(f"{sys.argv[1]}/{n}.png")
"""


def test_samples_of_the_newest_checkpoint_that_is_not_beyond(tmp_path: Path) -> None:
    task = sampling(IMAGES + "open(sys.argv[1] + '/../seen', 'w').write(' '.join(sys.argv[2:]))", at_start="hub://start")
    task.identify("s", tmp_path)
    first = task.sample(0)
    assert first is not None and first.images.shape == (3, 3, 8, 8) and first.images.max() == pytest.approx(80 / 255)
    assert (tmp_path / "seen").read_text() == "0 0 hub://start"
    while task.step_now < 4:
        task.step()
    assert task.sample(0) is None  # nothing there yet
    for step in (2, 4, 5):
        (tmp_path / "s" / f"{step:03d}.pt").touch()
    task.sample(1)
    assert (tmp_path / "seen").read_text() == f"4 1 {tmp_path}/s/004.pt"
    task.close()


def test_samples_are_compared_with_what_lies_beside(tmp_path: Path) -> None:
    for kind, level in (("truth", 50), ("through_vae", 100), ("low", 200)):
        (tmp_path / kind).mkdir()
        for n in range(3):
            Image.new("RGB", (4, 4) if kind == "low" else (8, 8), (level, level, level + n)).save(tmp_path / kind / f"{n}.png")
    folders = {"references": "truth", "reconstructions": "through_vae", "inputs": "low"}
    task = sampling(IMAGES, at_start="start", **{key: str(tmp_path / folder) for key, folder in folders.items()})
    task.identify("s", tmp_path)
    made = task.sample(0)
    task.close()
    assert made is not None and made.inputs is not None and made.inputs.shape == (3, 3, 4, 4)
    for images, level in ((made.references, 50), (made.reconstructions, 100)):
        assert images is not None and images[:, 0].eq(level / 255).all()
        assert images[:, 2, 0, 0].tolist() == pytest.approx([(level + n) / 255 for n in range(3)])  # each beside its own


@pytest.mark.parametrize(
    ("code", "smoke", "says"),
    [
        ("raise SystemExit('no weights')", {}, "the smoke test's command failed, exit code 1: no weights"),
        ("pass", {}, "smoke: no images: "),
        ("import time; time.sleep(60)", {"timeout_s": 0.5}, "not done after 0.5 s"),
        (IMAGES + "Image.new('RGB', (4, 4)).save(sys.argv[1] + '/9.png')", {}, "of one size"),
        ("import sys; open(sys.argv[1] + '/0.png', 'w').write('x')", {}, "0.png"),
        (IMAGES, {"references": "/no/such/folder"}, "/no/such/folder"),
        (IMAGES, {"tokens": "t.json", "vocabulary_size": 9}, "t.json: not a JSON list"),
    ],
)
def test_a_failing_smoke_command_is_said(code: str, smoke: dict[str, Any], says: str, tmp_path: Path) -> None:
    task = sampling(code, at_start="x", **smoke)
    task.identify("s", tmp_path)
    with pytest.raises(UserError, match=says):
        task.sample(0)


def test_tokens_outside_the_vocabulary_are_seen(tmp_path: Path) -> None:
    from tune_ssim.trials.sample_check import statistics_of

    code = "import sys; open(sys.argv[1] + '/t.json', 'w').write('[[1, 2], [11, null]]')"
    task = sampling(code, at_start="x", images=None, tokens="t.json", vocabulary_size=9)
    task.identify("s", tmp_path)
    sample = task.sample(0)
    assert sample is not None and statistics_of(sample) == {"undecodable_fraction": 0.5}


# ---- templates, and what a study says about them


def test_templates() -> None:
    values = {"a": 1e-5, "b": "x y", "c": True, "d": None}
    assert fill("{a} {a:.1f} {b} {c} {d} {{a}}", values) == "1e-05 0.0 x y true  {a}"
    assert fill_value("{a}", values) == 1e-5 and fill_value("{c}", values) is True and fill_value("{a}!", values) == "1e-05!"
    assert fill_value(3, values) == 3


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"command": ["x", "{typo}"]}, "no setting 'typo'"),
        ({"command": ["x", "{checkpoint}"]}, "no setting 'checkpoint'"),
        ({"command": ["x"], "records": {"pattern": "bagel"}}, "the space varies ssim_loss_weight, but the command does not use it"),
        ({"command": []}, "must not be empty"),
        ({"command": ["{ssim_loss_weight}"], "records": {"pattern": "bagel"}}, "smoke_test: nothing makes samples"),
        ({"command": ["x"], "config_file": {"path": "a.toml"}}, "must end in .json or .yaml"),
        ({"command": ["x"], "smoke": {"command": ["y"], "tokens": "t"}}, "tokens and vocabulary_size belong together"),
    ],
)
def test_a_study_says_what_is_wrong_with_its_command(task: dict[str, Any], says: str) -> None:
    space = {
        "name": "s",
        "parameters": {"gain": {"log_uniform": [1, 2]}},
        "fixed": {"ssim_grad_scale": 1.0, "ssim_loss_max_t": 1.0},
    }
    with pytest.raises(UserError, match=says):
        load_study({"name": "s", "task": task, "space": space})


SCHEDULED = {"parameters": {"ssim_loss_weight": {"adaptive": {"target_ratio": {"choice": [1, 2]}}}}}


@pytest.mark.parametrize(
    ("task", "changes", "place"),
    [
        ({"command": ["x"], "records": {"pattern": "bagel"}}, {"space": SCHEDULED}, "space"),
        ({"command": ["x", "{ssim_loss_weight}"]}, {"space": SCHEDULED}, "space"),
        (
            {"command": ["x", "{ssim_loss_weight}"]},
            {"task_config": {"ssim_loss_weight": {"linear": {"start": 1, "end": 2, "steps": 3}}}},
            "task_config.ssim_loss_weight",
        ),
    ],
)
def test_a_command_gets_no_schedule(task: dict[str, Any], changes: dict[str, Any], place: str) -> None:
    space = {"parameters": {"lr": {"choice": [1, 2]}}}
    with pytest.raises(UserError, match=rf"{place}: a command gets numbers, and a schedule of ssim_loss_weight .*--target_ratio="):
        load_study({"name": "s", "task": task, "space": space, "guards": {"smoke_test": None}, **changes})


def test_a_loop_that_asks_for_its_settings_gets_the_schedule() -> None:
    assert load_study({"name": "s", "task": {"command": ["x"]}, "space": SCHEDULED}).has_ssim


WIDE = {"name": "s", "space": "wide", "guards": {"smoke_test": None}, "task_config": {"steps": 200}}
TOLD = ["{python}", "train.py", "--weight={ssim_loss_weight}", "--max_t={ssim_loss_max_t}"]
LINES = {"pattern": r"step (?P<step>\d+) loss (?P<loss>\S+)"}


def says(study: Any, **more: Any) -> str:
    with pytest.raises(UserError) as error:
        load_study(study, **more)
    return str(error.value)


def test_every_value_that_reaches_nothing_is_said_when_the_study_is_read() -> None:
    """The space fixes pixel_loss_weight at 0, which asks for nothing, and has points with a scale of 0.1."""
    found = says({**WIDE, "task": {"command": TOLD, "records": LINES}})
    assert "task.command: the space has a point with ssim_grad_scale 0.1, but the command does not use it" in found
    assert '"--ssim_grad_scale={ssim_grad_scale}"' in found and len(found.splitlines()) == 1
    fixed = {"ssim_grad_scale": 0.5, "ssim_loss_max_t": 1.0, "kl_weight": 0.0, "class_weight": 0.0}
    space = {"name": "s", "parameters": {"gain": {"log_uniform": [1, 2]}}, "fixed": fixed}
    found = says({**WIDE, "task": {"command": TOLD, "records": LINES}, "space": space, "task_config": {"lr": 0.1}})
    assert [line.split(", but")[0] for line in found.splitlines()] == [
        "study: task.command: the space fixes ssim_grad_scale 0.5",
        "study: task.command: the space fixes class_weight 0.0",
        "study: task_config.lr: is 0.1",
    ]
    assert load_study({**WIDE, "task": {"command": [*TOLD, "--grad_scale={ssim_grad_scale}"], "records": LINES}})
    assert load_study({**WIDE, "task": {"command": ["x"]}})  # it may look them up


def test_the_trials_of_the_readmes_study_start(tmp_path: Path) -> None:
    readme = (TESTS.parent / "README.md").read_text()
    (tmp_path / "study.yaml").write_text("name: my-study\n" + readme.split("```yaml\nname: my-study\n")[1].split("```")[0])
    (tmp_path / "train.py").write_text("print('(step=1) loss 1 grad_norm 1\\n(step=2) loss 1 grad_norm 1')")
    study = load_study(tmp_path / "study.yaml", launch=True)
    assert isinstance(study.task, CommandSpec)
    for config in (study.baseline_settings, *study.space.stages[0].point_configs()):
        task = CommandTask(study.task, study.import_path)
        task.setup({**study.task_config, **config}, 0)
        assert [record["step"] for record in records(task)] == [1, 2]


def test_a_broken_space_is_not_blamed_on_the_command() -> None:
    space = {
        "name": "s",
        "parameters": {"ssim_loss_max_t": {"choice": [0.1]}},
        "points": [{"lr": 1}],
        "fixed": {"ssim_loss_weight": 1},
    }
    assert "for the braces" not in says({**WIDE, "task": {"command": TOLD, "records": LINES}, "space": space})
    found = says({**WIDE, "task": {"command": [*TOLD, "{ssim_grad_scale}", "{typo}"], "records": LINES}})
    assert found.count("steps") == 1 and "no setting 'typo'" in found


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"command": ["{steps:zz}"]}, "task.command.0: the format in '{steps:zz}' does not fit steps = 200"),
        ({"command": ["{ssim_loss_weight:d}"]}, "task.command.0: the format in '{ssim_loss_weight:d}' does not fit"),
        ({"command": ["{exp_name:.1f}"]}, "task.command.0: the format in '{exp_name:.1f}' does not fit"),
        ({"records": {"pattern": "bagle"}}, "task.records.pattern: no built-in pattern 'bagle'; did you mean 'bagel'?"),
        ({"records": {"pattern": "(?P<step>"}}, "task.records.pattern: "),
        ({"records": {"pattern": [r"(?P<at>\d+) (?P<loss>\S+)"]}}, "named groups: at, loss"),
        ({"records": {"file": "x.csv", "format": "cvs"}}, "task.records.format: unknown format 'cvs'; did you mean 'csv'?"),
    ],
)
def test_a_command_that_cannot_work_is_said_when_the_study_is_read(task: dict[str, Any], words: str) -> None:
    told = [*TOLD, "{ssim_grad_scale}"]
    assert words in says({**WIDE, "task": {"records": LINES, **task, "command": [*task.get("command", ()), *told]}})
    log = {"file": "x", **task.get("records", {})}
    if "records" in task:
        assert words.removeprefix("task.records.") in says({"name": "s", "baseline": {"log": log}})


def test_asha_needs_an_evaluation() -> None:
    told = [*TOLD, "{ssim_grad_scale}"]
    found = says({**WIDE, "task": {"records": LINES, "command": told}, "scheduler": {"asha": {"grace_steps": 5}}})
    assert "scheduler: asha needs held-out numbers while the training goes on" in found


def test_what_is_not_on_this_machine_is_said_before_the_launch(tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text("#!/bin/sh\n")
    names = ("no-such-program", "train.sh", "./train.sh", "./none.sh")
    text = "name: s\nguards: {smoke_test: null}\ntask:\n  command:\n    - %s\n    - '{ssim_loss_weight}'\n"
    for name, words in zip(names, ("no program", "meant by ./train.sh", "cannot be executed", "does not exist"), strict=True):
        (tmp_path / "s.yaml").write_text(text % name)
        load_study(tmp_path / "s.yaml")
        assert (found := says(tmp_path / "s.yaml", launch=True)).startswith(f"{tmp_path}/s.yaml:5: task.command.0: "), found
        assert words in found
    (tmp_path / "s.yaml").write_text((text % "python") + "resources: {nodes: 2}\n")
    load_study(tmp_path / "s.yaml", launch=True)
    more = "  evaluate: {command: [gone]}\nbaseline:\n  log: {file: gone.jsonl}\n"
    (tmp_path / "s.yaml").write_text(text % "'{python}'" + more)
    assert [line.removeprefix(f"{tmp_path}/") for line in says(tmp_path / "s.yaml", launch=True).splitlines()] == [
        "s.yaml:7: task.evaluate.command.0: no program 'gone' in the PATH",
        f"s.yaml:9: baseline.log: {tmp_path}/gone.jsonl: no such file",
    ]


@pytest.mark.parametrize(
    ("file", "cwd", "shared"),
    [
        ("metrics.csv", None, True),
        ("/tmp/metrics.csv", "{exp_dir}", True),
        ("runs/{ssim_loss_weight}-{seed}/log.csv", None, True),  # of every baseline the same
        ("{exp_dir}/../metrics.csv", "{exp_dir}", True),
        ("../metrics.csv", "{exp_dir}", True),
        ("{exp_dir}/log.csv", None, False),
        ("runs/{exp_name}/log.csv", None, False),
        ("metrics.csv", "runs/{exp_name}", False),
    ],
)
def test_a_file_of_records_that_trials_share_is_refused(file: str, cwd: str | None, shared: bool, tmp_path: Path) -> None:
    command = {"command": ["x", "{ssim_loss_weight}"], "records": {"file": file}, **({"cwd": cwd} if cwd else {})}
    space = {"parameters": {"ssim_loss_weight": {"log_uniform": [1, 2]}}}
    given = {"name": "s", "task": command, "space": space, "guards": {"smoke_test": None}}
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(given, indent=1))
    if not shared:
        load_study(path)
        return
    with pytest.raises(UserError, match=r"study\.yaml:\d+.*is one file for several trials.*\{exp_dir\}") as error:
        load_study(path)
    line = next(at for at, text in enumerate(path.read_text().splitlines(), 1) if '"file"' in text)
    assert f"study.yaml:{line}" in str(error.value)


def test_the_baseline_has_a_value_for_every_placeholder() -> None:
    """Without a weight the gate and the scale mean nothing, but the command line has a place for them."""
    words = ["x", "{ssim_loss_weight}", "{ssim_loss_max_t}", "{ssim_grad_scale}", "{lr}"]
    task = {"command": words, "records": {"pattern": "bagel"}}
    given = {"name": "s", "task": task, "space": "wide", "guards": {"smoke_test": None}}
    study = load_study({**given, "task_config": {"lr": 0.1}})
    settings = {**study.task_config, **study.baseline_settings}
    assert fill(" ".join(words), settings) == "x 0.0 1.0 1.0 0.1"
    space = {"name": "s", "parameters": {"gain": {"log_uniform": [1, 2]}, "lr": {"choice": [1.0, 2.0]}}}
    fixed = {"ssim_grad_scale": 1.0, "ssim_loss_max_t": 1.0}
    with pytest.raises(UserError, match="baseline: has no lr, which the command uses"):
        load_study({**given, "space": {**space, "fixed": fixed}})
    with pytest.raises(UserError, match=r"no value for the braces in '\{lr\}'"):
        fill("{lr}", {"steps": 3})


def test_a_study_with_a_command_is_what_it_was_after_yaml() -> None:
    space = {
        "name": "s",
        "parameters": {"gain": {"log_uniform": [1, 2]}},
        "fixed": {"ssim_grad_scale": 1.0, "ssim_loss_max_t": 1.0},
    }
    task = DOORS["a script that knows nothing"]
    study = load_study({"name": "s", "task": task, "task_config": {"steps": 200}, "space": space})
    assert study.preflight is not None and study.baseline.overrides == {}
    assert study.calibration is not None and study.calibration.disable_update == {}  # held off from outside
    from ruamel.yaml import YAML

    assert load_study({**YAML(typ="safe").load(study.to_yaml())}).to_dict() == study.to_dict()
    assert sys.executable not in study.to_yaml()  # it runs where it is launched


def test_a_config_file_is_read_alike_by_every_reader_of_yaml(tmp_path: Path) -> None:
    """PyYAML reads YAML 1.1, where 1e-05 is a text, `off` is false and 1:30 is 90."""
    import yaml

    texts = ["off", "yes", "1:30", "1e5", "0o17", "null", "~", "a: b", "0x1F", "line\nbreak", ""]
    numbers = [1e-5, 3e-7, 1e16, 0.1, 5, -2.5e-8, True, None]
    code = f"import shutil; shutil.copy('c.yaml', {str(tmp_path / 'copy.yaml')!r})"
    settings = {f"v{place}": value for place, value in enumerate([*texts, *numbers])}
    task = run(
        code, settings, cwd=str(tmp_path), config_file={"path": "c.yaml", "set": {name: "{" + name + "}" for name in settings}}
    )
    with pytest.raises(UserError, match="without a record"):
        records(task)
    read = yaml.safe_load((tmp_path / "copy.yaml").read_text())
    assert read == settings and [type(value) for value in read.values()] == [type(value) for value in settings.values()]
