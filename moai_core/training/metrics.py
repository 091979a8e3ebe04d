"""What a run writes down: `metrics.jsonl`, `samples.jsonl` and the picture of the losses, `loss.png`.

metrics.jsonl has one line `{"kind": "train", "step": N, "loss": ..., ...}` for every optimizer step, exactly once
whatever interruptions there were, and one line `{"kind": "valid", "step": N, "valid_loss": ...}` for every validation.
Lines reach the system one by one; they are flushed to the disk before a checkpoint that counts on them. Left out:
rotation; a line is about 200 bytes.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moai_core.errors import storage_error
from moai_core.storage import write_file

METRICS, SAMPLES, PLOT = "metrics.jsonl", "samples.jsonl", "loss.png"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Lines:
    """A JSON-lines file that is appended to; numbers JSON has no word for become null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        except OSError as exc:
            raise storage_error(exc, path) from exc

    def write(self, row: dict[str, Any]) -> None:
        """Appends one line. Raises StorageError."""
        try:
            self._file.write(json.dumps({k: _finite(v) for k, v in row.items()}, ensure_ascii=False) + "\n")
        except OSError as exc:
            raise storage_error(exc, self.path) from exc

    def sync(self) -> None:
        """Flushes to the disk. Raises StorageError."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as exc:
            raise storage_error(exc, self.path) from exc

    def close(self) -> None:
        """Closes the file; what a full disk kept from being written is lost with it."""
        try:
            self._file.close()
        except OSError as exc:
            raise storage_error(exc, self.path) from exc


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; a line cut short by a crash, or without a step, is passed over. Nothing where
    there is no file.
    """
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def truncate(path: Path, known: Mapping[str, int], *, source: Path | None = None) -> None:
    """Keeps the rows of each kind up to the step in `known`: those that the checkpoint knows of. What came after it is
    done and recorded again. source: the file of the run that this one branches off. Raises StorageError.
    """
    source = source or path
    if source.is_file():
        kept = (row for row in read_rows(source) if row["step"] <= known.get(row.get("kind", ""), -1))
        write_file(path, (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in kept))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place, NaN ones left out."""
    total, count, result = 0.0, 0, []
    for index, value in enumerate(values):
        for sign, v in ((1, value), (-1, values[index - window] if index >= window else math.nan)):
            if math.isfinite(v):
                total, count = total + sign * v, count + sign
        result.append(total / count if count else math.nan)
    return result


def plot(run_dir: Path, *, title: str = "") -> Path | None:
    """Draws train loss, its running mean, validation loss and learning rate over the steps into `loss.png`, atomically;
    its path.

    None where no step is recorded yet. Raises StorageError.
    """
    rows = list(read_rows(run_dir / METRICS))
    train = [r for r in rows if r.get("kind") == "train"]
    valid = [r for r in rows if r.get("kind") == "valid" and r.get("valid_loss") is not None]
    if not train:
        return None
    # A canvas of its own, without pyplot: no global state, no display, and nothing that a thread could share.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5))
    canvas, axes = FigureCanvasAgg(figure), figure.add_axes((0.08, 0.11, 0.82, 0.8))
    steps = [r["step"] for r in train]
    losses = [math.nan if r.get("loss") is None else r["loss"] for r in train]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="train")
    axes.plot(
        steps, smooth(losses, max(1, len(losses) // 50)), color="tab:blue", linewidth=1.6, label="train, running mean"
    )
    if valid:
        axes.plot(
            [r["step"] for r in valid],
            [r["valid_loss"] for r in valid],
            color="tab:orange",
            marker="o",
            markersize=3,
            label="validation",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    rate = axes.twinx()
    rate.plot(steps, [r["lr"] for r in train], color="tab:gray", linewidth=0.8, linestyle=":", label="learning rate")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    # The fonts that matplotlib carries have no CJK glyphs: better a name less than a row of boxes.
    axes.set_title(title if title.isascii() else "")
    axes.grid(alpha=0.25)
    axes.legend(handles=[*axes.lines, *rate.lines], loc="upper right", frameon=False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_file(run_dir / PLOT, buffer.getvalue())
    return run_dir / PLOT
