"""`trial_context` inside a loop: what it sends, what it says to the loop, and that it is nothing without a study."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tune_ssim import TrialPruned, trial_context
from tune_ssim.base.errors import BadSetup, UserError
from tune_ssim.guards import Divergence, NonFinite, SmokeTest
from tune_ssim.study.command_spec import CommandSpec
from tune_ssim.trials.channel import TrialEnd, message_of, tagged_messages
from tune_ssim.trials.command.command_task import CommandTask
from tune_ssim.trials.command.output import CommandOutput
from tune_ssim.trials.command.settings import SettingsInForce
from tune_ssim.trials.final_verdict import TrialPlan
from tune_ssim.trials.processes import OutputLog
from tune_ssim.trials.push import TrialContext
from tune_ssim.trials.training import Sample
from tune_ssim.trials.trial import Trial


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrialEnd:
    end = TrialEnd(tmp_path / "channel")
    end.open({"ssim_loss_weight": 3.0, "lr": 0.1}, seed=5, smoke_at=(0, 10), steps=40)
    monkeypatch.setenv("TUNE_SSIM_TRIAL", str(end.folder))
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    return end


def test_without_a_study_it_does_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TUNE_SSIM_TRIAL", raising=False)
    monkeypatch.chdir(tmp_path)
    with trial_context(ssim_loss_weight=0.1) as t:
        t.report(step=1, loss=torch.tensor(1.0))
        t.samples(torch.rand(2, 3, 8, 8))
        t.in_force(ssim_loss_weight=0.1)
        t.held_out(ssim=0.9)
        assert (t.is_active, t.due(10), t.seed, t.steps, dict(t.config)) == (False, False, 0, None, {"ssim_loss_weight": 0.1})
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), trial_context():
        {}["the loop's own error"]


def test_what_is_sent(trial: TrialEnd) -> None:
    with trial_context(ssim_loss_weight=0.1, batch_size=8) as t:
        assert (t.config["ssim_loss_weight"], t.config["batch_size"], t.steps) == (3.0, 8, 40)
        assert [step for step in range(41) if t.due(step)] == [0, 10, 40]
        t.report(step=1, loss=torch.tensor([0.5]), total_norm=float("nan"))
        t.samples(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), sharpness=2.0)
        t.in_force(ssim_loss_weight=3.0)
        t.held_out(ssim=torch.tensor(0.9), psnr=[30.0, torch.tensor(31.0)])
    _, read, first, samples, force, held_out, ended = trial.read()
    assert read == {"read": ["batch_size", "ssim_loss_weight"]}
    assert first["step"] == 1 and first["loss"] == 0.5 and first["total_norm"] != first["total_norm"]
    assert samples["step"] == 1 and samples["smoke/sharpness"] == 2.0 and samples["smoke/non_finite_fraction"] == 0
    assert force == {"effective": {"ssim_loss_weight": 3.0}}
    assert held_out == {"held_out": {"ssim": pytest.approx(0.9), "psnr": [30.0, 31.0]}}
    assert ended == {"ended": "finished"}
    assert (trial.image(1) or b"").startswith(b"\x89PNG") and trial.image(2) is None
    assert trial.read() == []


def test_a_prune_is_swallowed_after_a_last_word(trial: TrialEnd) -> None:
    reached = []
    with trial_context() as t:
        for step in range(1, 100):
            t.report(step=step, loss=1.0)
            reached.append(step)
            if step == 3:
                trial.close("pruned", "total_norm is 20x the baseline's")
    assert reached == [1, 2, 3]
    assert trial.read()[-1] == {"ended": "pruned"}
    with pytest.raises(TrialPruned, match="pruned: total_norm is 20x"):
        t.raise_if_over()


def test_an_error_of_the_loop_is_told_and_not_swallowed(trial: TrialEnd) -> None:
    with pytest.raises(ZeroDivisionError), trial_context():
        1 / 0  # noqa: B018
    assert trial.read()[-1]["ended"].startswith("failed: ZeroDivisionError")


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_is_heard_but_all_hear(trial: TrialEnd, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    trial.close("pruned", "why")
    with trial_context() as t:
        t.report(step=1, loss=1.0)
        pytest.fail("a prune reaches every rank")
    assert trial.read() == []


@pytest.fixture(params=["in a study", "outside"])
def anywhere(request: pytest.FixtureRequest, trial: TrialEnd, monkeypatch: pytest.MonkeyPatch) -> TrialEnd:
    """What is a mistake in a study is the same mistake by hand."""
    if request.param == "outside":
        monkeypatch.delenv("TUNE_SSIM_TRIAL")
    return trial


WRONG: dict[str, tuple[Callable[[TrialContext], None], str]] = {
    "two numbers": (lambda t: t.report(step=1, loss=torch.ones(2)), "report: loss must be one number, got a tensor of shape"),
    "a word": (lambda t: t.report(step=1, loss="high"), "report: loss must be one number, got 'high'"),  # type: ignore[arg-type]
    "nothing": (lambda t: t.report(step=1, loss=None), "report: loss must be one number, got None"),  # type: ignore[arg-type]
    "two held out": (lambda t: t.held_out(ssim=np.ones(2)), "held_out: ssim must be one number"),  # type: ignore[arg-type]
    "an object": (lambda t: t.in_force(clip=Path()), "in_force: clip must be a plain value"),
    "an array": (lambda t: t.in_force(betas=np.ones(2)), "in_force: betas must be a plain value, got a tensor of shape"),
    "a statistic": (
        lambda t: t.samples(torch.rand(1, 3, 8, 8), sharpness="high"),  # type: ignore[arg-type]
        "samples: sharpness must be one number",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_number_is_refused(anywhere: TrialEnd, what: str) -> None:
    wrong, words = WRONG[what]
    with trial_context() as t, pytest.raises(TypeError, match=words):
        wrong(t)


@pytest.mark.parametrize("step", [-1, 1.5, True, "3", None, float("nan"), float("inf"), np.array([1, 2]), torch.tensor(1.5)])
def test_what_is_no_step_is_refused(anywhere: TrialEnd, step: Any) -> None:
    with trial_context() as t, pytest.raises(ValueError, match="report: step must be an integer"):
        t.report(step=step)


@pytest.mark.parametrize("step", [3, np.int64(3), 3.0, np.float32(3), torch.tensor(3), torch.tensor([3.0]), np.array([3])])
def test_numbers_of_any_kind(anywhere: TrialEnd, step: Any) -> None:
    with trial_context() as t:
        t.report(step=step, loss=np.array([2.0]), total_norm=np.float32(0.5), lr=torch.tensor([[0.25]]))  # type: ignore[arg-type]
        t.in_force(w=np.float32(3), clip=torch.tensor(1.0), betas=(0.5, np.float64(0.75)), on=np.True_, name=None)
    if t.is_active:
        _, record, force, _ = anywhere.read()
        assert record == {"step": 3, "loss": 2.0, "total_norm": 0.5, "lr": 0.25}
        assert force == {"effective": {"w": 3.0, "clip": 1.0, "betas": [0.5, 0.75], "on": True, "name": None}}


def test_nothing_is_transferred_where_nobody_listens(trial: TrialEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device `meta` has no values to transfer."""
    monkeypatch.setenv("RANK", "1")
    other_rank = trial_context()
    monkeypatch.delenv("TUNE_SSIM_TRIAL")
    for t in (other_rank, trial_context()):
        t.report(step=1, loss=torch.ones((), device="meta"))
        t.in_force(w=torch.ones((), device="meta"))
        t.samples(torch.rand(1, 3, 8, 8, device="meta"), references=torch.rand(1, 3, 8, 8, device="meta"))
        with pytest.raises(TypeError, match="loss must be one number"):
            t.report(step=1, loss=torch.ones(2, device="meta"))


@pytest.mark.parametrize("name", ["read", "ended", "held_out", "effective", "echoed"])
def test_a_metric_of_any_name_is_kept(trial: TrialEnd, name: str, tmp_path: Path) -> None:
    with trial_context() as t:
        t.report(step=3, loss=1.0, **{name: 2.0})
    assert {"step": 3, "loss": 1.0, name: 2.0} in trial.read()
    output = CommandOutput(
        SettingsInForce(CommandSpec(command=["true"]), {}), OutputLog(tmp_path / "log"), TrialEnd(tmp_path), None
    )
    output.take(b'TUNE_SSIM {"step": 3, "loss": 1, "%s": 2}\n' % name.encode())
    output.collect()
    assert output.records == [(3, {"loss": 1.0, name: 2.0})]


LOOKS_LATE = """
import time, torch, tune_ssim
with tune_ssim.trial_context() as t:
    blobs = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(blobs, size=32, mode="bilinear")
    {early}
    t.samples(images)
    time.sleep(0.3)  # the record of step 0 is read alone
    {late}
    for step in range(1, t.steps + 1):
        t.report(step=step, loss=1.0)
    t.samples(images)
"""
LOOKS_UP = "t.config['ssim_loss_weight'], t.seed"


def trial_of(script: str, folder: Path, *smoke_at: int) -> Trial:
    task = CommandTask(CommandSpec(command=["{python}", "-c", script.replace("{", "{{").replace("}", "}}")]))
    task.identify("trial", folder)
    trial = Trial(task, TrialPlan(steps=3, guards=(SmokeTest(at=smoke_at), NonFinite())))
    trial.start({"steps": 3, "ssim_loss_weight": 0.5}, role="baseline")
    return trial


@pytest.mark.parametrize("last", ["t.report(step=step, acc=0.5)", "t.report(step=step)"])
def test_a_loss_that_is_no_longer_reported_is_not_passed_over(tmp_path: Path, last: str) -> None:
    head = "import tune_ssim\nwith tune_ssim.trial_context() as t:\n for step in range(1, 41):\n"
    script = f"{head}  t.report(step=step, loss=0.5) if step < 13 else {last}"
    task = CommandTask(CommandSpec(command=["{python}", "-c", script]))
    task.identify("trial", tmp_path)
    trial = Trial(task, TrialPlan(steps=40, guards=(NonFinite(), Divergence())))
    trial.start({"steps": 40}, role="baseline")
    trial.advance()
    assert trial.verdict is not None and trial.verdict.verdict == "error"
    assert trial.verdict.reason.startswith("loss is missing in 28 of 40 records, from step 13 on: the end of the training was")


@pytest.mark.parametrize("place", ["early", "late"])
def test_settings_may_be_looked_up_after_the_samples_of_step_0(place: str, tmp_path: Path) -> None:
    trial = trial_of(LOOKS_LATE.format(**{"early": "pass", "late": "pass", place: LOOKS_UP}), tmp_path, 0)
    trial.advance()
    assert trial.verdict is not None and (trial.verdict.verdict, trial.step) == ("safe", 3), trial.verdict
    assert trial.task.is_paired  # type: ignore[attr-defined]


def test_settings_that_are_never_looked_up_are_found_after_samples_too(tmp_path: Path) -> None:
    trial = trial_of(LOOKS_LATE.format(early="pass", late="pass"), tmp_path, 0)
    with pytest.raises(BadSetup, match=r"ssim_loss_weight is set to 0\.5 but does not reach the training"):
        trial.advance()
    trial.task.close()  # type: ignore[attr-defined]


def test_a_loop_that_ends_after_its_samples_is_asked_too(tmp_path: Path) -> None:
    script = LOOKS_LATE.format(early="pass", late="pass").replace("t.report(step=step, loss=1.0)", "break")
    with pytest.raises(BadSetup, match=r"ssim_loss_weight is set to 0\.5 but does not reach the training"):
        trial_of(script, tmp_path, 0).advance()


def test_what_is_in_force_may_be_said_after_the_samples_of_step_0(tmp_path: Path) -> None:
    trial = trial_of(LOOKS_LATE.format(early=LOOKS_UP, late="t.in_force(ssim_loss_weight=0.7)"), tmp_path, 0)
    trial.advance()
    assert trial.verdict is not None and trial.verdict.verdict == "bad_setup"
    assert "ssim_loss_weight was set to 0.5 but 0.7 is in force" in trial.verdict.reason


def test_samples_tell_what_was_read(trial: TrialEnd) -> None:
    with trial_context() as t:
        assert t.config["lr"] == 0.1
        t.samples(torch.rand(2, 3, 8, 8))
    assert trial.read()[:2] == [{"read": []}, {"read": ["lr"]}]


def images(low: float = 0, high: float = 1) -> torch.Tensor:
    drawn = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    drawn.view(-1)[:2] = torch.tensor([0.0, 1.0])
    return low + (high - low) * drawn


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "uint8": (
        lambda: {"images": images(0, 255).byte()},
        r"images must be float \[n, 3, height, width\] in \[0, 1\], got uint8 \[4, 3, 32, 32\] from 0 to 255$",
    ),
    "NHWC": (lambda: {"images": images().permute(0, 2, 3, 1)}, r"got float32 \[4, 32, 32, 3\] from 0 to 1$"),
    "one image": (lambda: {"images": images()[0]}, r"got float32 \[3, 32, 32\]"),
    "numpy": (lambda: {"images": images().numpy()}, r"got numpy.ndarray float32 \[4, 3, 32, 32\]"),
    "a list": (lambda: {"images": list(images())}, "got list"),
    "two channels": (lambda: {"images": images()[:, :2]}, r"got float32 \[4, 2, 32, 32\]"),
    "references, uint8": (lambda: {"images": images(), "references": images(0, 255).byte()}, "references must be .*uint8"),
    "references, smaller": (
        lambda: {"images": images(), "references": images()[..., 1:]},
        r"references must be of .* beside images",
    ),
    "inputs, fewer": (lambda: {"images": images(), "inputs": images()[:3]}, r"inputs must be one an image, got \[3, 3"),
    "tokens": (lambda: {"images": images(), "token_ids": [1, 2], "vocabulary_size": 3}, "token_ids must be a tensor of integers"),
}
FAR_OUT: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "references in [-1, 1]": (lambda: {"images": images(), "references": images(-1)}, "references must be .* from -1 to 1$"),
    "references to 255": (lambda: {"images": images(), "references": images(0, 255)}, "references must be .* from 0 to 255$"),
    "inputs in [-1, 1]": (lambda: {"images": images(), "inputs": images(-1)[..., ::4, ::4]}, "inputs must be"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_samples_of_another_kind_are_refused(anywhere: TrialEnd, what: str) -> None:
    given, words = REFUSED[what]
    with trial_context() as t, pytest.raises(UserError, match=f"^samples: .*{words}"):
        t.samples(**given())


@pytest.mark.parametrize("what", FAR_OUT)
def test_real_images_of_another_range_are_refused(trial: TrialEnd, what: str) -> None:
    given, words = FAR_OUT[what]
    with trial_context() as t, pytest.raises(UserError, match=words):
        t.samples(**given())


@pytest.mark.parametrize(
    "made", [images(), images(-0.2, 1.2), images().half(), images().double(), images()[:, :1], images()[:1], images() * torch.nan]
)
def test_sound_samples_and_those_without_a_number_are_judged(trial: TrialEnd, made: torch.Tensor) -> None:
    with warnings.catch_warnings(), trial_context() as t:
        warnings.simplefilter("error")
        t.samples(made, step=np.int64(10), references=images()[: len(made), : made.shape[1]])  # type: ignore[arg-type]
    assert trial.read()[1]["step"] == 10 and trial.image(10)


@pytest.mark.parametrize("made", [images(-1, 1), images(0, 255), images(-1e6, 1e6)])
def test_samples_far_out_are_judged_with_a_word(trial: TrialEnd, made: torch.Tensor) -> None:
    with trial_context() as t, pytest.warns(UserWarning, match=r"images should be float .* in another range, or of a model"):
        t.samples(made, references=images())
    assert trial.read()[1]["step"] == 0


def test_a_sample_may_be_sent_as_a_whole(trial: TrialEnd) -> None:
    images, references = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    with trial_context() as t:
        t.samples(images, step=1, references=references, flow_loss_top_bin=torch.tensor(0.5))
        t.samples(Sample(images, references, statistics={"flow_loss_top_bin": torch.tensor(0.5)}), step=2)  # type: ignore[dict-item]
    one, other = [message for message in trial.read() if "step" in message]
    assert other == {**one, "step": 2} and other["smoke/flow_loss_top_bin"] == 0.5


def test_text_needs_no_images(trial: TrialEnd) -> None:
    with trial_context() as t:
        t.samples(torch.zeros(0, 3, 1, 1), token_ids=torch.tensor([1, 7]), vocabulary_size=5)
    assert {"step": 0, "smoke/undecodable_fraction": 0.5} in trial.read()


def test_samples_of_another_kind_end_the_trial_with_the_sentence(tmp_path: Path) -> None:
    script = "import torch, tune_ssim\nwith tune_ssim.trial_context() as t: t.samples(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))"
    trial = trial_of(script, tmp_path, 0)
    with pytest.raises(UserError, match=r"samples: images must be float .*, got uint8 \[4, 3, 32, 32\] from 0 to 0"):
        trial.advance()


def test_samples_of_a_python_task_are_looked_at_too() -> None:
    from small_task import SmallTask

    class Bytes(SmallTask):
        def sample(self, noise: int = 0) -> Any:
            found = SmallTask.sample(self, noise)
            found.images = (found.images * 255).byte()
            return found

    trial = Trial(Bytes(), TrialPlan(steps=3, guards=(SmokeTest(at=(0,)),)))
    trial.start({"steps": 3}, role="baseline")
    with pytest.raises(UserError, match=r"samples: images must be float .* got uint8"):
        trial.advance()


def test_half_a_line_waits_for_its_other_half(trial: TrialEnd) -> None:
    path = trial.folder / "records.jsonl"
    line = json.dumps({"step": 1, "loss": 0.5})
    path.write_text(line[:10])
    assert trial.read() == []
    with path.open("a") as file:
        file.write(line[10:] + "\nnot json\n[1]\n" + json.dumps({"step": 2}) + "\n")
    assert trial.read() == [{"step": 1, "loss": 0.5}, {"step": 2}]


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"{}", b'{"step": -1}', b'{"step": true}', b'{"step": 1, "ended": "x"}', b"\xff", b"{" * 99]
)
def test_what_is_no_message(line: bytes) -> None:
    assert message_of(line) is None
    assert tagged_messages(b"TUNE_SSIM " + line) == []


def test_a_tagged_line_in_other_output() -> None:
    assert tagged_messages(b'12:00 INFO TUNE_SSIM {"step": 3.0, "loss": NaN}')[0]["step"] == 3
    assert tagged_messages(b'{"step": 3}') == []
