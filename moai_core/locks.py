"""Locks of a run folder and of a single file: one writer at a time, for as long as its process lives.

Why flock: the system ends it with the process, whatever ends that, so a killed holder leaves nothing to clean up. The
file that carries the lock names the holder's PID. POSIX only; left out: waiting, whoever comes second is told at once.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moai_core.errors import LockedError, storage_error

# The files that carry this process's locks, and their descriptors.
_held: dict[Path, int] = {}


def _after_fork() -> None:
    # A flock lives as long as any copy of its descriptor: a data worker that outlives a killed trainer must not keep it
    for fd in _held.values():
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def lock(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Hold `run_dir` (made if missing) against other writers, by `.lock` in it.

    Raises LockedError naming the holder's PID at once, StorageError if the folder can't be written.
    """
    run_dir = Path(os.path.abspath(run_dir))
    hint = "wait for it, stop it, or choose another output folder"
    with _hold(run_dir / ".lock", f"{run_dir}: {{}} is writing to this run folder", hint, keep=True):
        yield


@contextmanager
def lock_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a file, which needn't be there yet, against others that ask the same: by `.NAME.lock` beside it, which is
    gone at the end. Raises as `lock` does.
    """
    path = Path(os.path.realpath(path))
    hint = "end that one first, or choose another file"
    with _hold(path.with_name(f".{path.name}.lock"), f"{path}: {{}} has it open", hint, keep=False):
        yield


def is_locked_here(run_dir: str | os.PathLike[str]) -> bool:
    """Whether this process holds the `lock` of `run_dir`."""
    return Path(os.path.abspath(run_dir)) / ".lock" in _held


@contextmanager
def _hold(file: Path, held: str, hint: str, *, keep: bool) -> Iterator[None]:
    """Hold `file`, which stays afterwards (`keep`) or not. Raises LockedError with the text `held`, in which {} is who
    has it."""
    fd = _acquire(file, held, hint)
    _held[file] = fd
    try:
        yield
    finally:
        if _held.get(file) == fd:  # not so in a forked child, which closed it at birth
            del _held[file]
            with suppress(OSError):
                os.ftruncate(fd, 0)
                if not keep and _lies_at(fd, file):  # not what others made after somebody cleaned up by hand
                    file.unlink()
            os.close(fd)


def _acquire(file: Path, held: str, hint: str) -> int:
    """A descriptor of `file` (made if missing, with its folder) under an exclusive lock, with our PID in it."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as exc:
            raise storage_error(exc, file.parent) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file since we opened it: a lock that nobody else can find guards
            # nothing, while a third process holds the file that lies here now.
            if _lies_at(fd, file):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
        except OSError as exc:
            holder = os.pread(fd, 32, 0).strip()
            os.close(fd)
            if not isinstance(exc, BlockingIOError):
                raise storage_error(exc, file) from exc
            who = f"process {int(holder)}" if holder.isdigit() else "another process"
            raise LockedError(held.format(who), hint=hint) from exc
        os.close(fd)


def _lies_at(fd: int, file: Path) -> bool:
    """Whether `file` is what `fd` has open."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(file))
    except FileNotFoundError:
        return False
