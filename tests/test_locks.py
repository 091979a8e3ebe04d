"""Locks: one holder at a time whatever the others do, told by its PID, gone with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moai_core import locks, storage
from moai_core.errors import LockedError, StorageError


class locked_by_a_child:
    """A child process holds the lock of a run folder; `with` gives its PID. A grandchild may outlive it."""

    def __init__(self, run: Path, *, grandchild: bool = False) -> None:
        self.run, self.grandchild = run, grandchild

    def __enter__(self) -> int:
        ready, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with locks.lock(self.run):
                if self.grandchild and os.fork() == 0:
                    os.write(told, f"{os.getpid()}\n".encode())
                    time.sleep(30)
                    os._exit(0)
                os.write(told, b"ready\n")
                time.sleep(30)
            os._exit(0)
        self.answer = os.read(ready, 100)
        if self.grandchild:
            while self.answer.count(b"\n") < 2:
                self.answer += os.read(ready, 100)
        return self.pid

    def __exit__(self, *_) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def test_a_second_writer_is_told_the_pid_at_once(tmp_path):
    with locked_by_a_child(tmp_path) as pid:
        begin = time.monotonic()
        with pytest.raises(LockedError, match=f"process {pid} is writing") as caught, locks.lock(tmp_path):
            pass
        assert time.monotonic() - begin < 1 and caught.value.exit_code == 6
    with locks.lock(tmp_path), pytest.raises(LockedError, match=str(os.getpid())), locks.lock(tmp_path):
        pass


def test_the_lock_ends_with_its_process_even_if_children_outlive_it(tmp_path):
    locked = locked_by_a_child(tmp_path, grandchild=True)
    with locked:
        pass
    survivor = int(next(line for line in locked.answer.split() if line != b"ready"))
    os.kill(survivor, 0)
    with locks.lock(tmp_path):
        os.kill(survivor, signal.SIGKILL)


def test_leftovers_of_a_locked_run_are_left_alone(tmp_path):
    leftover = tmp_path / "step-2.tmp-9999999999"  # no process has such a number
    leftover.mkdir()
    with locked_by_a_child(tmp_path):
        assert storage.tidy(tmp_path) == [] and leftover.exists()
    with locks.lock(tmp_path):
        assert storage.tidy(tmp_path) == [leftover]
    assert not leftover.exists()


def test_lock_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"), locks.lock(tmp_path / "file" / "run"):
        pass


# Takes the lock of a file and holds it until a line comes; `slow` waits for a line between opening the file that
# carries the lock and locking it, which is where a process can be overtaken.
HOLDER = """
import fcntl, sys
from moai_core import locks
from moai_core.errors import LockedError

path, slow = sys.argv[1], len(sys.argv) > 2
take = fcntl.flock

def overtaken(fd, how):
    global slow
    if slow:
        slow = False
        print("opened", flush=True)
        sys.stdin.readline()
    return take(fd, how)

fcntl.flock = overtaken
try:
    with locks.lock_file(path):
        print("holds it", flush=True)
        sys.stdin.readline()
except LockedError as exc:
    print(exc.message, flush=True)
"""


class Holder:
    """A process that runs HOLDER: `hear` its next line, `go` on past what it waits for."""

    def __init__(self, path: Path, *slow: str) -> None:
        command = [sys.executable, "-c", HOLDER, str(path), *slow]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Holder:
        return self

    def hear(self) -> str:
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __exit__(self, *_) -> None:
        self.process.communicate(timeout=30)


def test_three_processes_at_one_file(tmp_path):
    """The second opens the first's lock file and locks it only after the first has removed it and a third has made
    its own: what the second then holds guards nothing, and it must notice."""
    path = tmp_path / "금요일"
    with Holder(path) as first, Holder(path, "slow") as second:
        assert (first.hear(), second.hear()) == ("holds it", "opened")
        first.go()
        first.process.wait(30)
        with Holder(path) as third:
            assert third.hear() == "holds it"
            second.go()
            assert second.hear() == f"{path}: process {third.process.pid} has it open"
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_overtaken_gets_a_file_that_is_free_again(tmp_path):
    with Holder(tmp_path / "a") as first, Holder(tmp_path / "a", "slow") as second:
        assert (first.hear(), second.hear()) == ("holds it", "opened")
        first.go()
        first.process.wait(30)
        second.go()
        assert second.hear() == "holds it"
        with pytest.raises(LockedError, match=f"process {second.process.pid}"), locks.lock_file(tmp_path / "a"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_another_holders_file_is_not_removed(tmp_path):
    """Somebody cleaned up by hand under the first holder: its end must not free what the second holds."""
    carrier = tmp_path / ".a.lock"
    with Holder(tmp_path / "a") as first:
        assert first.hear() == "holds it"
        carrier.unlink()
        with Holder(tmp_path / "a") as second:
            assert second.hear() == "holds it"
            first.go()
            first.process.wait(30)
            assert carrier.read_text() == f"{second.process.pid}\n"
