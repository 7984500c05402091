"""Removes passwords from URIs before they are shown or written."""

from __future__ import annotations

import re


def hide_password(text: str) -> str:
    """`text` for display, with `…` in place of every `user:password` in a URI."""
    return re.sub(r"://[^/\s]*@|://[^\s@/:]*:\S*@", "://…@", text)


def without_password(uri: str) -> str:
    """`uri` without its password, safe to write to a file. The user name is kept.

    The password must then come from the environment; an MLflow server reads MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD."""
    return re.sub(r"^([\w+.-]+://[^/:@\s]*):\S*@", r"\1@", uri)
