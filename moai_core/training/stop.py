"""A flag that SIGINT and SIGTERM raise: the first asks the training loop to save and end, the second ends the process
at once.

Python runs signal handlers between bytecodes of the main thread, so one that waits inside a kernel or a collective
would never see the second signal. The interpreter's wake-up descriptor is written by the C handler itself; a thread
reads it and counts. Left out: Windows' console events.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from moai_core.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """`signum` is 0 until somebody asks to stop; tests set it by `request`. Nothing is caught before `catching()`."""

    def __init__(self) -> None:
        self.signum = 0
        self._at_once = False

    def __bool__(self) -> bool:
        return self.signum != 0

    def request(self, signum: int = signal.SIGTERM) -> None:
        """Asks to stop, as a signal does."""
        self.signum = self.signum or int(signum)

    def check(self) -> None:
        """Raises Interrupted when a stop was asked for."""
        if self.signum:
            raise Interrupted(self.signum)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, there is nothing to save: a signal raises Interrupted wherever the main thread is."""
        self.check()
        self._at_once = True
        try:
            yield
        except Interrupted:
            raise  # it may say what is kept
        except Exception:
            # Whoever catches every exception of a library takes Interrupted for one of them.
            if self.signum:
                raise Interrupted(self.signum) from None
            raise
        finally:
            self._at_once = False

    @contextmanager
    def catching(self) -> Iterator[StopFlag]:
        """Catches SIGINT and SIGTERM (main thread only); puts the former handlers back at the end."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        old_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reader, os.getpid()), name="moai-signals", daemon=True)
        watcher.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(old_fd)
            for signum, handler in before.items():
                signal.signal(signum, handler)
            os.close(writer)
            watcher.join(timeout=5)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.request(signum)
        if self._at_once:
            self._at_once = False
            raise Interrupted(signum)

    def _watch(self, reader: int, pid: int) -> None:
        seen = 0
        try:
            while data := os.read(reader, 64):
                for signum in data:
                    if signum not in SIGNALS:
                        continue
                    seen += 1
                    self.request(signum)
                    # A forked child shares the pipe until it installs its own: only the process that watches may be
                    # ended.
                    if seen > 1 and os.getpid() == pid:
                        os._exit(128 + signum)
        finally:
            os.close(reader)
