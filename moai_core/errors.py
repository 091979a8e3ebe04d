"""Errors that a user can cause, each with the exit code that the command line documents.
 Why one family: the command line turns any `MoaiError` into one line on stderr, an optional hint, and `exit_code`;
everything else is a bug (exit 1). Invariants inside the core stay plain asserts and never come here.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class MoaiError(Exception):
    """Base of all user-facing errors: `message` is one line, `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MoaiError):
    """A flag, argument or combination of them is wrong."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe can't be read, or a value in it is wrong; the message begins with `file:line:`."""


class DataError(UsageError):
    """Training or evaluation data is missing, empty, broken or of an unknown format; the message names `file:line`."""


class CheckpointError(MoaiError):
    """A checkpoint or model folder is damaged, incomplete, unsafe or of another kind."""

    exit_code = 3


class StorageError(MoaiError):
    """Reading or writing failed: disk full, permission, vanished file."""

    exit_code = 4


class NonFiniteError(MoaiError):
    """Loss or gradients were NaN or infinite too many times in a row."""

    exit_code = 5


class LockedError(MoaiError):
    """Another process writes to this run folder."""

    exit_code = 6


class RankError(MoaiError):
    """A process of a distributed run died or hung."""

    exit_code = 7


class Interrupted(MoaiError):
    """SIGINT or SIGTERM ended the work, after saving what is worth keeping; exit code 128 + the signal's number."""

    def __init__(self, signum: int, message: str = "interrupted", *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signum


def storage_error(exc: OSError, path: str | os.PathLike[str]) -> StorageError:
    """The `StorageError` for an `OSError` met at `path`; a full disk or quota is named as such."""
    where = Path(path)
    if exc.errno in _FULL:
        return StorageError(
            f"{where}: disk full ({exc.strerror})",
            hint="free some space or choose another folder, then run the same command again",
        )
    return StorageError(
        f"{where}: {exc.strerror or exc}", hint="check that the path exists and that you may write there"
    )
