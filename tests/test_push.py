"""`trial_context` inside a loop: what it sends, what it says to the loop, and that it is nothing without a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tune_ssim import TrialPruned, trial_context
from tune_ssim.channel import TrialEnd, message_of, tagged_messages


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
        t.held_out(ssim=torch.tensor(0.9))
    read, first, samples, force, held_out, ended = trial.read()
    assert read == {"read": ["batch_size", "ssim_loss_weight"]}
    assert first["step"] == 1 and first["loss"] == 0.5 and first["total_norm"] != first["total_norm"]
    assert samples["step"] == 1 and samples["smoke/sharpness"] == 2.0 and samples["smoke/non_finite_fraction"] == 0
    assert (force, held_out) == ({"effective": {"ssim_loss_weight": 3.0}}, {"held_out": {"ssim": pytest.approx(0.9)}})
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


@pytest.mark.parametrize("metrics", [{"loss": torch.ones(2)}, {"loss": "high"}, {"loss": None}])
def test_what_is_no_number_is_refused(trial: TrialEnd, metrics: dict[str, object]) -> None:
    with trial_context() as t, pytest.raises(TypeError, match="loss must be one number"):
        t.report(step=1, **metrics)  # type: ignore[arg-type]
    for step in (-1, 1.5, True):
        with trial_context() as t, pytest.raises(ValueError, match="step must be an integer"):
            t.report(step=step)  # type: ignore[arg-type]


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
