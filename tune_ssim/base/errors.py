"""Errors that are not bugs of tune-ssim. The command line prints them as one line and sets an exit code."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the user's input (exit code 2). The message gives the location, the value, and what is valid."""


class NothingToResume(UserError):
    """No saved state to resume from, so training starts from scratch."""


class BadSetup(RuntimeError):
    """A broken setup (exit code 3): the weights, the data or the baseline are at fault, not a hyperparameter."""
