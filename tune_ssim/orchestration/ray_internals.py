"""All uses of Ray's non-public API. If a version of Ray lacks it, nothing breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError


def token_authentication() -> bool | None:
    """Whether Ray's token authentication is enabled; None if this version of Ray does not report it. (Seen in Ray 2.55 to 2.60.)"""
    try:
        from ray._private.authentication.authentication_utils import is_token_auth_enabled
    except ImportError:
        return None
    return bool(is_token_auth_enabled())


def refuses_token(address: str, timeout_s: float) -> bool:
    """Whether the cluster refuses this process's token, or wants one and gets none. False if that cannot be known.

    Ray itself tries for half a minute to a minute, with a warning every second."""
    try:
        from ray._private.grpc_utils import grpc, init_grpc_channel
        from ray._private.services import canonicalize_bootstrap_address

        found = canonicalize_bootstrap_address(address)
        if found is None:
            return False
        with init_grpc_channel(found) as channel:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=timeout_s)
    except ImportError:  # grpcio comes with ray[default]; another version of Ray
        return False
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    return False


@contextmanager
def without_messages_of_nodes() -> Iterator[None]:
    """Keeps Ray from printing the deaths of processes and nodes, with their logs. The study reports them in one line.
    (Ray 2.60: ray/_private/worker.py, `listen_error_messages`.)"""
    from ray._private import worker

    before = getattr(worker, "print_to_stdstream", None)
    if before is None:
        yield
        return
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before


class _Hook:
    """A function in place of a controller's method. Ray pickles the controller's attributes into its snapshot, but not this one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._function(*arguments, **named)

    def __reduce__(self) -> Any:
        return str, ()


def _controller_of(controller: Any) -> Any:
    """The controller of a Tune experiment; schedulers get a wrapper."""
    return vars(controller).get("_tune_controller", controller)


def keep_actors(controller: Any, resources: Any, count: int) -> None:
    """Keeps `count` actors of a Tune experiment alive between trials, so that short trials run in parallel too.

    In Ray 2.60 (ray/tune/execution/tune_controller.py) a trial whose actor is still starting takes over the actor of a trial that
    just ended, and the starting actor is discarded; two actors that become free at once are reduced to one. Starting an actor
    takes seconds, so shorter trials end up one after the other on a single actor."""
    controller = _controller_of(controller)
    cache, reuse = getattr(controller, "_actor_cache", None), getattr(controller, "_maybe_reuse_cached_actor", None)
    if cache is None or reuse is None or not hasattr(controller, "_trial_to_actor"):
        return
    cache.increase_max(resources, by=count)

    def reuse_unless_starting(trial: Any) -> bool:
        if trial in controller._trial_to_actor:
            return False  # its own actor is starting
        return bool(reuse(trial))

    controller._maybe_reuse_cached_actor = _Hook(reuse_unless_starting)


def without_snapshots(controller: Any) -> None:
    """Leaves out the snapshots of a Tune experiment that is never restored, but for the last, which Ray reads. With `num_to_keep`,
    Ray 2.60 writes one of all trials after each trial, so that a trial costs more the more there are."""
    controller = _controller_of(controller)
    write = getattr(controller, "checkpoint", None)
    if write is not None:
        controller.checkpoint = _Hook(lambda force=False, wait=False: write(force=force, wait=wait) if force else None)


def forget_statistics(trial: Any) -> None:
    """Frees the running averages that Ray keeps of each metric of an ended trial: 0.7 kB a metric, which a study never reads.
    (Ray 2.60: ray/tune/trainable/metadata.py.)"""
    metadata = getattr(trial, "run_metadata", None)
    for name in ("metric_analysis", "metric_n_steps"):
        kept = getattr(metadata, name, None)
        if isinstance(kept, dict):
            kept.clear()


def intercept_failures(controller: Any, handle: Callable[[Any, Exception, Callable[[], None]], None]) -> None:
    """Calls `handle(trial, exception, proceed)` when a trial failed. `proceed` does what Ray does by itself: it counts the failure
    and starts the trial again at once, or ends it. Before that the trial counts as running.

    In Ray 2.60 an answer that is lost with its node, such as a big result, ends the whole experiment as an unexpected exception.
    Here it is the trial's failure like any other loss of its node. And a trial that gets the actor of an ended one stays marked as
    being reset if that actor dies meanwhile: it would never start."""
    controller = _controller_of(controller)
    process, manager = getattr(controller, "_process_trial_failure", None), getattr(controller, "_actor_manager", None)
    if process is None or manager is None:
        return

    def failed_trial(trial: Any, exception: Exception) -> None:
        getattr(controller, "_resetting_trials", set()).discard(trial)
        handle(trial, exception, lambda: process(trial, exception=exception))

    controller._process_trial_failure = _Hook(failed_trial)
    failed = getattr(manager, "_actor_task_failed", None)
    if failed is None:
        return

    def failed_or_lost(tracked_actor_task: Any, exception: Exception) -> None:
        if not isinstance(exception, RayActorError | RayTaskError):
            exception = ActorUnavailableError(str(exception), None)
        failed(tracked_actor_task=tracked_actor_task, exception=exception)

    manager._actor_task_failed = failed_or_lost
