"""Signals: the first asks, the second ends the process, wherever the main thread is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from moai_core.errors import Interrupted
from moai_core.training.stop import StopFlag

# `busy` is inside one C call for minutes, which no signal cuts short; like a kernel, it releases the GIL.
SCRIPT = """
import sys
from moai_core.training.stop import StopFlag
from moai_core.errors import Interrupted
flag = StopFlag()
with flag.catching():
    print("ready", flush=True)
    if sys.argv[1] == "busy":
        import hashlib
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    import time
    while not flag:
        time.sleep(0.01)
    print("asked", flag.signum, flush=True)
    time.sleep(30)
"""


def start(*arguments):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("signum,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_asks_and_the_second_ends(signum, code):
    process = start("wait")
    process.send_signal(signum)
    assert process.stdout.readline() == f"asked {int(signum)}\n"
    began = time.monotonic()
    process.send_signal(signum)
    assert process.wait(10) == code and time.monotonic() - began < 5
    process.stdout.close()


def test_the_second_ends_a_process_inside_a_long_call():
    process = start("busy")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # the higher number: where both wait, the kernel delivers it second
    assert process.wait(30) == 143
    process.stdout.close()


def test_handlers_come_back():
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        with StopFlag().catching() as flag:
            os.kill(os.getpid(), signal.SIGTERM)
            while not flag:
                time.sleep(0.001)
            assert flag.signum == signal.SIGTERM
    assert {s: signal.getsignal(s) for s in before} == before
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 1


def test_with_nothing_to_save_a_signal_raises_at_once():
    with StopFlag().catching() as flag, pytest.raises(Interrupted) as caught, flag.at_once():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert caught.value.exit_code == 130
    with pytest.raises(Interrupted), flag.at_once():
        raise AssertionError("not reached: the flag is up already")


def test_a_signal_is_not_mistaken_for_an_error_of_a_library():
    with StopFlag().catching() as flag, pytest.raises(Interrupted) as caught, flag.at_once():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Exception as exc:
            raise ValueError("the file is broken") from exc
    assert caught.value.exit_code == 143
    with pytest.raises(ValueError), StopFlag().at_once():
        raise ValueError("nobody asked to stop")


def test_the_first_request_counts():
    flag = StopFlag()
    assert not flag
    flag.check()
    flag.request(signal.SIGINT)
    flag.request(signal.SIGTERM)
    assert flag.signum == signal.SIGINT
    with pytest.raises(Interrupted):
        flag.check()
