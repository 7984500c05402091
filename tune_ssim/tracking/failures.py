"""Failures of a tracking server that no retry mends, and what to do about them."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

from tune_ssim.base.errors import UserError
from tune_ssim.base.passwords import hide_password

# MLflow's error codes (mlflow/exceptions.py maps HTTP 401, 403 and 404 to the first three).
_ADVICE = {
    "UNAUTHENTICATED": "the server got no valid credentials (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN, where the study is started",
    "PERMISSION_DENIED": "the server refuses this user (403): let its administrator permit EDIT on the experiment",
    "ENDPOINT_NOT_FOUND": "no MLflow server answers there (404): check the address, its port and its path",
    "INVALID_PARAMETER_VALUE": "MLflow cannot use this tracking URI; it takes http://, https://, sqlite:///FILE and postgresql://",
}
# What MLflow says of an answer that is not its own: a web page, a redirect to a login, a wrong method.
_NOT_MLFLOW = (
    "not in a valid JSON format",
    "error code 301",
    "error code 302",
    "error code 303",
    "error code 400",
    "error code 405",
)
_WRONG_LOGIN = ("password authentication failed", "no password supplied", "access denied for user")


def hopeless(error: BaseException) -> str | None:
    """One line that says what is wrong and what to do; None for a failure that may pass, such as an overloaded server."""
    for one in _chain(error):
        if isinstance(one, UserError):
            return str(one)
        if isinstance(one, ssl.SSLError):
            return (
                f"no TLS connection ({one.reason or one}): check https:// against http://, and name the authority of the server's "
                "certificate in MLFLOW_TRACKING_SERVER_CERT_PATH"
            )
        if isinstance(one, socket.gaierror) and one.errno == socket.EAI_NONAME:
            return "no host has this name: check the tracking URI"
        if isinstance(one, ModuleNotFoundError):
            return f"this database needs the Python package {one.name}: install it beside MLflow"
        if isinstance(one, (FileNotFoundError, NotADirectoryError, PermissionError)) and one.filename:
            return f"{one.filename}: {one.strerror}"
    text = " ".join(str(error).split())
    if type(error).__name__ == "InvalidUrlException":
        return f"{hide_password(text)[:100]}; a tracking URI is http://HOST:PORT"
    if any(words in text for words in _NOT_MLFLOW):
        return "what answers there is not an MLflow server: check the address, its port and its path"
    if any(words in text.lower() for words in _WRONG_LOGIN):
        return "the database refuses user or password: check the tracking URI"
    return _ADVICE.get(str(getattr(error, "error_code", "")))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
