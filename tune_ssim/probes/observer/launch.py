"""The environment in which a program is observed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from tune_ssim.base.files import write_atomically

VARIABLE = "TUNE_SSIM_OBSERVE"  # path of the settings; read by inside/
SITE = Path(__file__).parent / "site"

Level = Literal["norms", "full"]


def observed_environment(
    folder: Path,
    environment: Mapping[str, str],
    *,
    level: Level = "norms",
    hold: bool = False,
    weights: Sequence[str | Path] = (),
) -> dict[str, str]:
    """Variables to add to `environment`, with which a program and its children write events into `folder`.

    level: `full` adds norms and coverage of every top-level module. hold: the program runs, and no optimiser changes a weight.
    weights: files that the weights should equal before the first update, besides those that the program opens itself."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "folder": str(folder.absolute()),
        "level": level,
        "hold": hold,
        "weights": [str(Path(path).absolute()) for path in weights],
    }
    file = folder / "settings.json"
    write_atomically(file, json.dumps(settings).encode())
    paths = [str(SITE.absolute()), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return {VARIABLE: str(file.absolute()), "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
