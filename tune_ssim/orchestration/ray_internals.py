"""All uses of Ray's non-public API. If a version of Ray lacks it, nothing breaks."""

from __future__ import annotations

from typing import Any


def token_authentication() -> bool | None:
    """Whether Ray's token authentication is enabled; None if this version of Ray does not report it. (Seen in Ray 2.55 to 2.60.)"""
    try:
        from ray._private.authentication.authentication_utils import is_token_auth_enabled
    except ImportError:
        return None
    return bool(is_token_auth_enabled())


def keep_actors(controller: Any, resources: Any, count: int) -> None:
    """Keeps `count` actors of a Tune experiment alive between trials, so that short trials run in parallel too.

    In Ray 2.60 (ray/tune/execution/tune_controller.py) a trial whose actor is still starting takes over the actor of a trial that
    just ended, and the starting actor is discarded; two actors that become free at once are reduced to one. Starting an actor
    takes seconds, so shorter trials end up one after the other on a single actor."""
    controller = vars(controller).get("_tune_controller", controller)  # schedulers get a wrapper
    cache, reuse = getattr(controller, "_actor_cache", None), getattr(controller, "_maybe_reuse_cached_actor", None)
    if cache is None or reuse is None or not hasattr(controller, "_trial_to_actor"):
        return
    cache.increase_max(resources, by=count)

    def reuse_unless_starting(trial: Any) -> bool:
        if trial in controller._trial_to_actor:
            return False  # its own actor is starting
        return bool(reuse(trial))

    controller._maybe_reuse_cached_actor = reuse_unless_starting
