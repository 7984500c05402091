"""Messages about weights in a program's first lines of output. The lines are those that the libraries print."""

from __future__ import annotations

import pytest

from tune_ssim.before_launch.command.startup_output import startup_checks

WARNED = {
    "Some weights of BertForTokenClassification were not initialized from the model checkpoint at bert-base-uncased and are newly "
    "initialized: ['classifier.bias', 'classifier.weight']": "not in the checkpoint",
    "Some weights of the model checkpoint at out/unet were not used when initializing UNet2DModel: ['mid.0.weight']": "not used",
    "[2026-01-02 10:00:00] _IncompatibleKeys(missing_keys=['vae2llm.weight'], unexpected_keys=[])": "not in the checkpoint",
    "_IncompatibleKeys(missing_keys=[], unexpected_keys=['module.vae2llm.weight'])": "not used",
    "        size mismatch for head.weight: copying a param with shape torch.Size([10, 8]) from checkpoint": "another shape",
    "[2026-01-02 10:00:00] Training from scratch.": "no checkpoint",
    "WARNING: could not find the metadata file ckpt/latest_checkpointed_iteration.txt\n    will not load any checkpoints and will "
    "start from random": "no checkpoint",
    "The config attributes {'shift': 3} were passed to UNet2DModel, but are not expected and will be ignored.": "ignored",
    "missing keys in source state_dict: backbone.layer1.0.conv1.weight": "not in the checkpoint",
    "Found keys that are not in the model state dict but in the checkpoint: ['ema.decay']": "not used",
}
SILENT = [
    "<All keys matched successfully>",
    "_IncompatibleKeys(missing_keys=[], unexpected_keys=[])",
    "step 1: loss 0.4, missing 3 of 100 files",
    "loading checkpoint from out/0000100",
]


@pytest.mark.parametrize("line", WARNED)
def test_a_warning_is_quoted_with_its_line(line: str) -> None:
    found = list(startup_checks(["hello", *line.split("\n"), "step 1: loss 0.5"]))
    assert found and all(check.status == "warn" and check.remedy for check in found)
    assert any(WARNED[line] in check.sentence and check.evidence["line"] >= 2 for check in found)
    assert any(part.strip()[:60] in check.sentence for check in found for part in line.split("\n"))


def test_healthy_output_is_ok() -> None:
    (check,) = startup_checks(SILENT)
    assert check.status == "ok" and check.evidence == {"lines": 4.0}


def test_one_check_for_each_kind() -> None:
    line = "_IncompatibleKeys(missing_keys=['a'], unexpected_keys=['b'])"
    found = list(startup_checks([line] * 8))
    assert len(found) == 2 and {check.evidence["lines"] for check in found} == {8.0}
