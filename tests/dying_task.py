"""The small task with processes that end: by SIGTERM once, or by SIGKILL once or always."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from small_task import SmallTask


class DyingTask(SmallTask):
    """At step 5 a strong setting kills its process every time, and a weak one is asked to end once. `mark`: a folder."""

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        super().setup(config, seed, device)
        self.marks = Path(config["mark"])

    def step(self) -> dict[str, Any]:
        metrics = super().step()
        if self.n == 5 and self.gain > 500:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.n == 5 and self.gain > 0 and not (self.marks / "asked").exists():
            (self.marks / "asked").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        if self.gain > 0:
            with (self.marks / f"steps-{self.gain:g}").open("a") as file:
                file.write(f"{self.n}\n")
        return dict(metrics)


class DyingAtItsStart(SmallTask):
    """The process is killed in the first setup of a trial, once. `mark`: a folder."""

    def setup(self, config: Mapping[str, Any], seed: int, device: str | None = None) -> None:
        super().setup(config, seed, device)
        mark = Path(config["mark"], "killed")
        if self.gain > 0 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
