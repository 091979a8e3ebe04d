"""TensorBoard, Weights & Biases and trackio, each on a thread of its own behind a bounded queue.

A tracker that is not installed is an error before training starts. Afterwards it can do no harm: one that raises, hangs
or falls behind is reported once and left, and the loop never waits for it longer than CLOSE_S at the end. Left out:
artifacts, media, resuming a tracker's old run otherwise than by the name of the run folder.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moai_core.errors import UsageError

Log = Callable[[dict[str, float], int], None]
Event = Callable[[dict[str, Any]], None]

QUEUE, CLOSE_S = 1000, 10.0


def _tensorboard(run_dir: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _wandb(run_dir: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import wandb

    run = wandb.init(
        project="moai",
        name=run_dir.name,
        dir=str(run_dir),
        config=config,
        settings=wandb.Settings(silent=True, console="off"),
    )
    return lambda values, step: run.log(values, step=step), run.finish


def _trackio(run_dir: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import trackio

    run = trackio.init(project="moai", name=run_dir.name, config=config, embed=False)
    return lambda values, step: run.log(values, step=step), trackio.finish


# name -> (package, how to open it); opening and every call happen on the tracker's own thread.
TRACKERS: dict[str, tuple[str, Callable[[Path, dict[str, Any]], tuple[Log, Callable[[], None]]]]] = {
    "tensorboard": ("tensorboard", _tensorboard),
    "wandb": ("wandb", _wandb),
    "trackio": ("trackio", _trackio),
}


def require(names: tuple[str, ...]) -> None:
    """UsageError for the first tracker whose package is missing."""
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"unknown tracker {name!r}", hint=f"trackers: {', '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name][0]) is None:
            raise UsageError(
                f"track: {name} is not installed", hint="pip install 'moai[track]', or leave it out of `track`"
            )


class Tracker:
    """One tracker at work. `log` and `close` never raise and never wait for the tracker (close: at most `close_s`)."""

    def __init__(
        self, name: str, run_dir: Path, config: dict[str, Any], on_event: Event, *, queue_size: int = QUEUE
    ) -> None:
        self.name = name
        self._on_event = on_event
        self._queue: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(queue_size)
        self._failure: str | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._work, args=(run_dir, config), name=f"moai-{name}", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, float], step: int) -> None:
        """Hands the numbers over; dropped (and reported once) when the tracker failed or is a full queue behind."""
        if self._failure is None:
            try:
                self._queue.put_nowait((values, step))
                return
            except queue.Full:
                self._failure = f"hasn't answered for {self._queue.maxsize} records"
        self._warn()

    def close(self, close_s: float = CLOSE_S) -> None:
        """Waits at most `close_s` seconds for what is queued."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._failure = self._failure or f"hasn't answered for {self._queue.maxsize} records"
        else:
            self._thread.join(close_s)
            if self._thread.is_alive():
                self._failure = self._failure or f"didn't finish within {close_s:g} s"
        if self._failure:
            self._warn()

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            message = f"tracker {self.name} {self._failure}; training goes on without it"
            self._on_event({"event": "warning", "message": message})

    def _work(self, run_dir: Path, config: dict[str, Any]) -> None:
        try:
            log, finish = TRACKERS[self.name][1](run_dir, config)
            while (item := self._queue.get()) is not None:
                log(*item)
            finish()
        except BaseException as exc:  # SystemExit included: whatever a tracker throws ends the tracker alone
            self._failure = f"failed ({type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''})"
