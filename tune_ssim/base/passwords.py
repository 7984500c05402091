"""Passwords in URIs: what is shown or written has none."""

from __future__ import annotations

import re


def hide_password(text: str) -> str:
    """`text`, for people, with `…` in place of each `user:password` in a URI."""
    return re.sub(r"://[^/\s]*@|://[^\s@/:]*:\S*@", "://…@", text)


def without_password(uri: str) -> str:
    """`uri` as it may be written to a file: its user stays. Credentials then come from the environment, for MLflow's server
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    return re.sub(r"^([\w+.-]+://[^/:@\s]*):\S*@", r"\1@", uri)
