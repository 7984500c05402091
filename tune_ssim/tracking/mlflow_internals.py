"""Everything used of MLflow that is not public API: URLs and tags of its pages, and limits of its stores.

Verified in MLflow 3.12 to 3.17 (mlflow/server/js/build and the files named below); `tests/test_tracking.py` looks for the names of
the pages in the installed version. If a later version drops one, the pages look plainer; no data is lost.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Limits of a request and of a text (mlflow/utils/validation.py). A longer text is refused.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
MAX_NAME_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000  # 8000 from MLflow 2.12 on; servers may be older
MAX_NOTE_LENGTH = 7900

NOTE = "mlflow.note.content"  # the description of a run or an experiment, in Markdown
PARENT = "mlflow.parentRunId"  # nests a run below another
SOURCE = "mlflow.source.name"
# Without this tag MLflow 3 opens an experiment as a GenAI application (server/js: `experimentKind`).
KIND = {"mlflow.experimentKind": "custom_model_development"}
# With this tag the page of a run offers a slider over the steps of its images (mlflow/tracking/client.py, `log_image`).
HAS_IMAGES = {"mlflow.loggedImages": "True"}
TRAINING_PAGES = "workflowType=machine_learning"  # part of a URL: the pages of model training, not those of GenAI

# The columns of the shared view, left to right, with widths in pixels. They are narrow because MLflow opens its assistant next to
# the table on a first visit. The reason comes last and takes the remaining space.
COLUMNS = {
    "attributes.`Run Name`": 300,
    "runDateAndNestInfo": 45,  # "Created" cannot be hidden; it begins with the status of the run
    "tags.`verdict`": 80,
    "params.`gain`": 60,
    "params.`max_t`": 60,
    "metrics.`norm_ratio_max`": 112,
    "metrics.`delta_ssim`": 95,
    "metrics.`psnr`": 60,
    "tags.`reason`": 640,
}


def runs_page(experiment_id: str, share_key: str | None = None) -> str:
    """The table of an experiment's runs, in the view `share_key` if given; relative to the server's address."""
    view = f"&viewStateShareKey={share_key}" if share_key else ""
    return f"#/experiments/{experiment_id}/runs?{TRAINING_PAGES}{view}"


def run_page(experiment_id: str, run_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs/{run_id}?{TRAINING_PAGES}"


def share_view(client: MlflowClient, experiment_id: str, study_id: str, search_filter: str, name: str) -> str:
    """Stores the view of a study's trials, best first, as a tag of the experiment; returns its key for `runs_page`.

    No public call chooses the columns (verdict, gain, reason, …): this is the format of the page's own "Share". The tag
    `mlflow.sharedViewState.<key>` holds `{"name", "createdAt", "state"}`; `state` is JSON, or "deflate;" and the base64 of its zlib
    stream. Runs are nested only while sorted by date; sorted by a metric, the list is flat.
    """
    state = {
        "searchFilter": search_filter,
        "orderByKey": "metrics.`delta_ssim`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(COLUMNS),
        "columnWidths": COLUMNS,
        "viewMaximized": True,  # folds the page's heading: more rows
        "runListHidden": False,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state, separators=(",", ":")).encode())).decode()
    view = json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})
    key = f"tune_ssim-{hashlib.sha256(study_id.encode()).hexdigest()[:16]}"
    tag = f"mlflow.sharedViewState.{key}"
    if client.get_experiment(experiment_id).tags.get(tag) != view:
        client.set_experiment_tag(experiment_id, tag, view)
    return key


def image_paths(folder: str, file_name: str, step: int, time_ms: int, unique: str) -> list[str]:
    """Paths of a stored image: a plain file, and two with the names that `HAS_IMAGES` needs. MLflow's own names have a random part
    in place of `unique`."""
    stem = f"images/{folder.replace('/', '~') or 'images'}+step+{step}+timestamp+{time_ms}+{unique}"
    return [f"{folder}/{file_name}", f"{stem}.png", f"{stem}+compressed.webp"]


def valid_name(name: str) -> str:
    """A name that MLflow accepts for a metric or parameter: letters, digits and ` _-./`, and no path that leaves its folder.

    A colon is left out because servers on Windows refuse it."""
    parts = re.sub(r"[^/\w.\- ]", "_", name).split("/")
    return "/".join(part if part.strip(".") else part.replace(".", "_") for part in parts if part) or "_"


def restored(value: float) -> float:
    """Undoes what MLflow's SQL stores do to an infinity: they keep it as the largest float, 1.8e308."""
    return math.copysign(math.inf, value) if abs(value) == sys.float_info.max else value
