"""Errors that a user can cause, each with the exit code that the command line documents.

Why one family: the command line turns any `MoaiError` into one line on stderr, an optional hint, and `exit_code`;
everything else is a bug (exit 1). Invariants inside the core stay plain asserts and never come here.
"""

from __future__ import annotations

import errno
import os
import shlex
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HINTS = {
    errno.ENOENT: "check the path: a file or folder in it doesn't exist",
    errno.ENOTDIR: "check the path: what should be a folder in it is a file",
    errno.EEXIST: "a file stands where a folder should be: choose another name",
    errno.EISDIR: "name a file, not a folder",
    errno.EROFS: "choose a place that may be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
}


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
    """Another process writes to this run folder, or has this session open."""

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
    hint = _HINTS.get(exc.errno or 0, "check that the path exists and that you may read and write there")
    return StorageError(f"{where}: {exc.strerror or exc}", hint=hint)


def shell(path: str | os.PathLike[str]) -> str:
    """A path as a hint shows it inside a command to paste: in quotes where a shell would take it apart."""
    return shlex.quote(os.fspath(path))


def at_least(*limits: tuple[str, int | None, int], hint: str | None = None) -> None:
    """(flag, value, least) each: raises UsageError naming the first whose value is below its least. None passes."""
    for flag, value, least in limits:
        if value is not None and value < least:
            raise UsageError(f"{flag} must be at least {least} (got {value})", hint=hint)
