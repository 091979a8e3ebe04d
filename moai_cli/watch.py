"""Training as a person sees it: a bar with loss, speed, memory and ETA on a terminal, calm lines anywhere else. All of
it on stderr.
"""

from __future__ import annotations

import time
from typing import Any

from rich.markup import escape

from moai_cli.console import NowAndThen, clean, err, note, progress, warn

# From how many columns of the terminal on each has its place.
FIELDS = {"loss": 0, "lr": 90, "speed": 66, "memory": 76}


class Watch:
    """A context manager that is also the `on_event` of `train`."""

    def __init__(self) -> None:
        self._bar = progress(*(name for name, least in FIELDS.items() if err.width >= least))
        self._tasks: dict[str, Any] = {}
        self._log_every = 10
        self._began = (0, 0.0)
        self._tell = NowAndThen()

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Shows one event; kinds it doesn't know are passed over."""
        show = getattr(self, "_" + event["event"], None)
        if show is not None:
            show(event)

    def _task(self, name: str, total: int | None, done: int = 0) -> Any:
        if name not in self._tasks:
            fields: dict[str, Any] = dict.fromkeys(FIELDS, "")
            self._tasks[name] = self._bar.add_task(escape(name), total=total, completed=done, **fields)
        return self._tasks[name]

    def _progress(self, event: dict[str, Any]) -> None:
        scale, unit = (1024, " (KiB)") if event.get("unit") == "bytes" else (1, "")
        done, total = (None if event.get(k) is None else int(event[k]) // scale for k in ("done", "total"))
        name = f"{event['task']}{unit}"
        self._bar.update(self._task(name, total), completed=done, total=total)
        if total is not None:
            self._tell(f"{event['task']} {done}/{total}{unit}")
        if event.get("total") is not None and event["done"] >= event["total"]:
            self._bar.remove_task(self._tasks.pop(name))

    def _start(self, event: dict[str, Any]) -> None:
        for task in self._tasks.values():
            self._bar.remove_task(task)
        self._tasks.clear()
        ranks = f" x {event['ranks']}" if event["ranks"] > 1 else ""
        where = f"{event['parameters']:,} parameters on {event['device']}{ranks}, {event['precision']}"
        note(f"{where}, {event['rows']} rows a step -> {event['run_dir']}")
        if event["resumed_from"] is not None:
            note(f"resuming after step {event['resumed_from']} of {event['steps']}")
        self._log_every = event["log_every"]
        self._began = (event["step"], time.monotonic())
        if event["step"] < event["steps"]:
            self._task("train", event["steps"], event["step"])

    def _step(self, event: dict[str, Any]) -> None:
        loss = "not finite" if event.get("skipped") else f"{event['loss']:.4f}"
        speed, memory = f"{_short(event['tokens_per_s'])} tok/s", f"{event['memory_mb'] / 1000:.1f} GB"
        if err.is_terminal:
            shown: Any = {"loss": f"loss {loss}", "lr": f"lr {event['lr']:.2e}", "speed": speed, "memory": memory}
            task = self._task("train", event["steps"])
            self._bar.update(task, completed=event["step"], **shown)
        elif event["step"] % self._log_every == 0 or event["step"] == event["steps"]:
            first, began = self._began
            left = (event["steps"] - event["step"]) * (time.monotonic() - began) / max(1, event["step"] - first)
            figures = f"loss {loss}  lr {event['lr']:.2e}  {speed}  {memory}"
            note(f"step {event['step']}/{event['steps']}  {figures}  ETA {clock(left)}")

    def _valid(self, event: dict[str, Any]) -> None:
        for name in [name for name in self._tasks if name != "train"]:
            self._bar.remove_task(self._tasks.pop(name))
        figures = f"loss {event['valid_loss']:.4f}  perplexity {event['perplexity']:.2f}"
        err.print(f"step {event['step']}  validation: {figures}  bits per byte {event['bits_per_byte']:.4f}")
        if sets := event.get("sets"):
            each = "  ".join(f"{clean(name)} {one['bits_per_byte']:.4f}" for name, one in sets.items())
            err.print(f"step {event['step']}  bits per byte: {each}", markup=False)

    def _sample(self, event: dict[str, Any]) -> None:
        prompt, text = escape(clean(event["prompt"])), escape(clean(one_line(event["text"])))
        err.print(f"[dim]step {event['step']}  sample:[/] [bold]{prompt}[/]{text}")

    def _checkpoint(self, event: dict[str, Any]) -> None:
        note(f"saved {event['path']}")

    def _note(self, event: dict[str, Any]) -> None:
        note(event["message"])

    def _warning(self, event: dict[str, Any]) -> None:
        warn(event["message"])


def one_line(text: str) -> str:
    """`text` with its line breaks shown as a space."""
    return " ".join(text.split("\n"))


def clock(seconds: float) -> str:
    """75 -> 1:15; 3675 -> 1:01:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 10_000 else f"{number:.0f}"
