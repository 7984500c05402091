"""Errors that are not bugs of tune-ssim. The command line prints them as one line and sets an exit code."""

from __future__ import annotations

import errno

# File system errors that are not bugs of this package, such as a full disk or a read-only folder.
ENVIRONMENT = (
    errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENXIO,
    errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ENOTCONN, errno.ENODEV,
)  # fmt: skip


class UserError(ValueError):
    """A mistake in the user's input (exit code 2). The message gives the location, the value, and what is valid."""


class FieldError(ValueError):
    """An invalid value of a field of an object. The message begins with the field's name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field, self.message = field, message


def check_field(holds: bool, field: str, rule: str, value: object) -> None:
    """Raises FieldError, e.g. `window must be >= 1, got 0`, unless `holds`."""
    if not holds:
        raise FieldError(field, f"{rule}, got {value!r}")


class NothingToResume(UserError):
    """No saved state to resume from, so training starts from scratch."""


class BadSetup(RuntimeError):
    """A broken setup (exit code 3): the weights, the data or the baseline are at fault, not a hyperparameter."""


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C, or a batch system's SIGTERM, in a study that can be resumed."""

    def __init__(self, study: str) -> None:
        super().__init__(study)
        self.study = study
