"""Two ways for a study to end early that are nobody's bug. The command line turns them into one line and an exit code."""

from __future__ import annotations


class UserError(ValueError):
    """The user's mistake (exit code 2): the message says where, what was got and what is valid."""


class NothingToResume(UserError):
    """There is no state to go on from: the training begins again."""


class BadSetup(RuntimeError):
    """The set-up is not sound (exit code 3): weights, data or baseline, not a setting."""
