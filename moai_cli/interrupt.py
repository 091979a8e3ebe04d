"""Ctrl-C before and beside a command's own work. The first module that runs: it imports nothing but the standard
library.

Most of a short command's time goes into imports, and Python's own handler is wrong there: KeyboardInterrupt in a
library's C++ initialization aborts the process, and one raised inside `exec` of a text (dataclasses are made so) turns
exit code 130 into death by SIGINT, even where it was caught. Commands with something to save put their own handlers in
place of this one (moai_core/training/stop.py).
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from contextlib import suppress
from types import FrameType

CODE = 128 + signal.SIGINT


class CtrlC(KeyboardInterrupt):
    """A subclass, because CPython looks for KeyboardInterrupt itself where it turns the exit code into a signal."""


def catch() -> None:
    """From now on Ctrl-C raises CtrlC; while something is imported it ends the process at once with a line and exit
    code 130. Does nothing outside the main thread, or where Ctrl-C is ignored (`nohup`, `&` in a script).
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    owner = os.getpid()

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner and _importing(frame):
            with suppress(OSError):
                os.write(2, b"error: interrupted\n")
            os._exit(CODE)
        raise CtrlC

    signal.signal(signal.SIGINT, handle)
    # Registered first, so it runs last: the result is out, and tearing down torch takes a moment.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
