"""When a failed trial is tried again: lost nodes cost it nothing, its own deaths are limited, every try waits longer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
)

OWN_DEATHS = 2  # a trial whose process died resumes from its checkpoint; exceptions of the training are verdicts
LOSSES = 20  # then a trial is suspected of killing its nodes, and each further one counts as its own death
FIRST_DELAY_S, MAX_DELAY_S = 1.0, 60.0  # a node is known to be dead after a minute at most (health checks of Ray 2.60: 5 × 13 s)
POLL_S = 0.05  # a wait of the driver while nothing else may be running
# In an ActorDiedError, Ray 2.55 to 2.60. An actor that never ran has executed nothing of the trial.
NODE_DIED = ("node has died", "node was terminated", "node is dead", "placement group", "actor never ran")
CRASHED = "connection error code 2"  # the process ended without a word to Ray
LOST = (ActorUnavailableError, NodeDiedError, LocalRayletDiedError, ObjectLostError)
PASSED_THROUGH = (RayActorError, *LOST)  # exceptions that a training over several processes did not raise itself


class Preempted(Exception):
    """The trial's process was asked to end (SIGTERM) and has saved the trial."""


def cause_of(exception: BaseException) -> BaseException:
    """What an actor raised, without Ray's wrapping."""
    if isinstance(exception, RayTaskError):
        found = exception.as_instanceof_cause()
        return getattr(found, "cause", found)
    return exception


def is_lost(exception: BaseException) -> bool:
    """Whether a trial's node, connection or reservation failed, and not the trial."""
    cause = cause_of(exception)
    if isinstance(cause, RayActorError) and cause.preempted:
        return True
    if isinstance(cause, ActorDiedError):
        return any(words in str(cause) for words in NODE_DIED)
    return isinstance(cause, (*LOST, Preempted))


def words_of(exception: BaseException) -> str:
    """One line."""
    cause = cause_of(exception)
    if isinstance(cause, Preempted):
        return str(cause)
    if isinstance(cause, ActorUnavailableError):
        return "the connection to its node broke"
    return words_of_death(str(cause)) or type(cause).__name__


def error_of(trial: Any) -> str:
    """What a Ray trial failed of, in one line; empty if there is no message. `get_error` reads a copy of the file, which Ray makes
    with its next snapshot of the experiment."""
    written = Path(trial.error_file or "")
    return words_of_death(written.read_text(errors="replace") if written.is_file() else str(trial.get_error() or ""))


def words_of_death(message: str) -> str:
    """The last line of Ray's message, without its list of common causes; empty if there is no message."""
    lines = message.strip().splitlines()
    if not lines:
        return ""
    detail = lines[-1].strip().rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0]
    return "killed (out of memory?) or crashed" if CRASHED in detail else shorten(detail.removesuffix("."), 300)


@dataclass
class _Waiting:
    trial: Any
    proceed: Callable[[], None]
    due_s: float


class Retries:
    """Decides for every failed trial. say: shows a line to the user."""

    def __init__(self, name_of: Callable[[Any], str], say: Callable[[str], None]) -> None:
        self._name_of, self._say = name_of, say
        self._deaths, self._losses = Counter[str](), Counter[str]()
        self._waiting: list[_Waiting] = []

    def __reduce__(self) -> Any:
        """For Ray's snapshot, which is never restored. The progress display cannot be pickled."""
        return Retries, (str, print)

    def failed(self, trial: Any, exception: Exception, proceed: Callable[[], None]) -> None:
        """For `ray_internals.intercept_failures`. A trial out of tries ends at once, with this failure as its reason."""
        if any(one.trial is trial for one in self._waiting):
            return  # Ray reports the death of a process once for it and once for what it was doing
        name = self._name_of(trial)
        is_free = is_lost(exception) and self._losses[name] < LOSSES
        if is_free:
            self._losses[name] += 1
        else:
            self._deaths[name] += 1
        # Ray counts every failure alike, so its own limit is lifted while ours lasts.
        trial.max_failures = -1 if self._deaths[name] <= OWN_DEATHS else 0
        if trial.max_failures == 0:
            proceed()
            return
        delay_s = min(FIRST_DELAY_S * 2 ** (self._losses[name] + self._deaths[name] - 1), MAX_DELAY_S)
        if is_free:
            self._say(f"{name}: {words_of(exception)}; it goes on from its last checkpoint, no try is used up")
        else:
            tries = f"try {self._deaths[name] + 1} of {OWN_DEATHS + 1}"
            self._say(f"{name}: its process died: {words_of(exception)}; {tries} in {delay_s:g} s")
        self._waiting.append(_Waiting(trial, proceed, time.monotonic() + delay_s))

    def start_due(self) -> None:
        """Starts the trials again whose delay is over. Called at every step of the experiment."""
        if not self._waiting:
            return
        now = time.monotonic()
        due = [one for one in self._waiting if one.due_s <= now]
        self._waiting = [one for one in self._waiting if one.due_s > now]
        for one in due:
            if one.trial.status == "RUNNING":  # not stopped meanwhile
                one.proceed()
        if self._waiting:
            time.sleep(POLL_S)
