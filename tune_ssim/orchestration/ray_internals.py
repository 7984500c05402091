"""The private parts of Ray that we use, each with the versions in which it was seen. Nothing else may import `ray._private`."""

from __future__ import annotations


def token_authentication() -> bool | None:
    """Whether Ray's own token authentication is enabled here; None where this version of Ray does not tell.

    `is_token_auth_enabled`: seen in Ray 2.60."""
    try:
        from ray._private.authentication.authentication_utils import is_token_auth_enabled
    except ImportError:
        return None
    return bool(is_token_auth_enabled())
