"""What a program says about its weights while it starts: keys that are missing, unexpected or of another shape, or no checkpoint.

Messages of torch, transformers, diffusers, Lightning, mmengine, detectron2, Megatron, open_clip and BAGEL. A message is a hint and
never a fault by itself, since a new head is as `missing` as a lost backbone: `weights` of the observer decides, where it can.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tune_ssim.before_launch.preflight.report import Check

SHOWN = 200  # characters of a quoted line
REMEDY = "load the weights strictly, or make sure that only new layers are named there"


@dataclass(frozen=True)
class Message:
    """A message of a library. what: continues "the program said …"."""

    what: str
    pattern: re.Pattern[str]


def _message(what: str, *patterns: str) -> Message:
    return Message(what, re.compile("|".join(f"(?:{one})" for one in patterns), re.IGNORECASE))


MESSAGES = (
    _message(
        "some weights are not in the checkpoint",
        r"were not initialized from the model checkpoint",  # transformers, diffusers
        r"\bmissing_keys=\[[^\]]",  # torch, of load_state_dict(strict=False); BAGEL logs it
        r"missing key\(s\) in state_dict",  # torch, strict
        r"missing keys in source state_dict",  # mmengine
        r"not found in the checkpoint",  # detectron2
        r"in the model state dict but not in the checkpoint",  # Lightning
        r"\|\s*MISSING\s*\|",  # the load report of transformers 5
    ),
    _message(
        "some weights of the checkpoint are not used",
        r"were not used when initializing",  # transformers, diffusers
        r"\bunexpected_keys=\[[^\]]",  # torch
        r"unexpected key\(s\) in state_dict",  # torch, strict
        r"unexpected key in source state_dict",  # mmengine
        r"contains keys that are not used by the model",  # detectron2
        r"not in the model state dict but in the checkpoint",  # Lightning
        r"\|\s*UNEXPECTED\s*\|",  # transformers 5
    ),
    _message(
        "some weights have another shape than in the checkpoint",
        r"size mismatch for \S+: copying a param",  # torch
        r"because the shapes did not match",  # transformers
        r"\|\s*MISMATCH\s*\|",  # transformers 5
    ),
    _message(
        "no checkpoint is loaded",
        r"\btraining from scratch\b",  # BAGEL
        r"will start from random",  # Megatron
        r"could not find the metadata file .* will not load any checkpoints",  # Megatron
        r"no pretrained weights loaded|model initialized randomly",  # open_clip
        r"no checkpoint found (?:at|in)\b|checkpoint .* does not exist",
    ),
    _message(
        "settings of the model's configuration are ignored",
        r"config attributes .* are not expected and will be ignored",  # diffusers
    ),
)


def startup_checks(lines: Iterable[str]) -> Iterator[Check]:
    """One `warn` for each kind of message, quoting its first line with the line number. `ok` if there is none."""
    found: dict[str, tuple[int, str]] = {}
    counts: dict[str, int] = {}
    number = 0
    for number, line in enumerate(lines, 1):
        for message in MESSAGES:
            if message.pattern.search(line):
                found.setdefault(message.what, (number, line.strip()))
                counts[message.what] = counts.get(message.what, 0) + 1
    for what, (at, line) in found.items():
        quoted = line if len(line) <= SHOWN else line[:SHOWN] + "…"
        evidence = {"line": float(at), "lines": float(counts[what])}
        yield Check("output", "warn", f"the program said that {what} (line {at}): {quoted}", evidence, REMEDY)
    if not found:
        yield Check("output", "ok", f"no warning about weights in the first {number} lines of its output", {"lines": float(number)})
