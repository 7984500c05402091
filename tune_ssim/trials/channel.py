"""The channel between a training in a separate process and the trial that judges it: a folder of small files.

    config.json     the settings to train with (written by the trial)
    records.jsonl   the training's reports, one JSON object per line (written by one process of the training)
    images/N.png    the training's samples at step N as one picture
    verdict.json    how the trial ended (written by the trial): the training may exit

Each line of `records.jsonl` is one message. It has either metrics with their `step`, or one of these keys: `effective` (settings as
read where they are used), `held_out` (metrics measured at the end), `read` (the settings looked up so far), `ended` (how the loop
ended). The same objects are read from a command's output when they follow the word TUNE_SSIM. A metric of a step may have any name,
even `read` or `ended`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune_ssim.base.files import write_atomically

VARIABLE = "TUNE_SSIM_TRIAL"  # environment variable that holds the folder
TAG = b"TUNE_SSIM "
CONFIG, RECORDS, IMAGES, VERDICT = "config.json", "records.jsonl", "images", "verdict.json"
KINDS = ("step", "effective", "held_out", "read", "ended")  # a message has exactly one of these, apart from the metrics of a step


class TrialEnd:
    """The trial's side of a channel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._position, self._rest = 0, b""

    def open(
        self, config: Mapping[str, Any], seed: int, smoke_at: tuple[int, ...], steps: int | None, calibrating: bool = False
    ) -> None:
        """Creates the folder. smoke_at: steps at which samples are requested, in addition to the last. steps: None if the training
        ends by itself. calibrating: it is ended after a few steps and its updates are held off."""
        (self.folder / IMAGES).mkdir(parents=True)
        settings = {"config": dict(config), "seed": seed, "smoke_at": list(smoke_at), "steps": steps, "calibrating": calibrating}
        write_atomically(self.folder / CONFIG, json.dumps(settings).encode())

    def read(self) -> list[dict[str, Any]]:
        """Messages since the last call. Lines that are not messages are skipped."""
        path = self.folder / RECORDS
        try:
            if path.stat().st_size <= self._position:
                return []
            with path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [message for line in lines if (message := message_of(line)) is not None]

    def image(self, step: int) -> bytes | None:
        path = self.folder / IMAGES / f"{step}.png"
        return path.read_bytes() if path.exists() else None

    def close(self, verdict: str, reason: str) -> None:
        """Tells the training that it may stop, and why."""
        if self.folder.exists() and not (self.folder / VERDICT).exists():
            write_atomically(self.folder / VERDICT, json.dumps({"verdict": verdict, "reason": reason}).encode())


class TrainingEnd:
    """The training's side of a channel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = json.loads((folder / CONFIG).read_bytes())
        self.config: dict[str, Any] = settings["config"]
        self.seed: int = settings["seed"]
        self.steps: int | None = settings["steps"]
        self.smoke_at: tuple[int, ...] = tuple(settings["smoke_at"])
        self.calibrating: bool = settings["calibrating"]

    def send(self, message: Mapping[str, Any]) -> None:
        # One write per line: a reader sees whole lines, except that a kill may truncate the last one.
        descriptor = os.open(self.folder / RECORDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(message).encode() + b"\n")
        finally:
            os.close(descriptor)

    def save_image(self, step: int, png: bytes) -> None:
        write_atomically(self.folder / IMAGES / f"{step}.png", png)

    def verdict(self) -> dict[str, str] | None:
        try:
            return json.loads((self.folder / VERDICT).read_bytes())  # type: ignore[no-any-return]
        except FileNotFoundError:
            return None


def message_of(line: bytes) -> dict[str, Any] | None:
    """The message in a line of JSON, or None."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict):
        return None
    kinds = [kind for kind in KINDS if kind in message]
    if len(kinds) != 1 and not ("step" in kinds and all(isinstance(message[kind], int | float) for kind in kinds)):
        return None
    if "step" in message:
        step = message["step"]
        if isinstance(step, float) and step.is_integer():
            message["step"] = step = int(step)
        return message if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None
    return message


def tagged_messages(line: bytes) -> list[dict[str, Any]]:
    """The messages that follow the tag in a line of output."""
    _, tag, rest = line.partition(TAG)
    message = message_of(rest) if tag else None
    return [message] if message is not None else []
