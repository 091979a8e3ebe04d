"""What all benchmarks say beside their figures: the machine, tables to look at and to paste, progress, and the front of
`python -m moai_core.bench.NAME`, which needs neither Typer nor Rich.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moai_core import __version__, storage
from moai_core import device as devices
from moai_core.config import PRESETS
from moai_core.errors import Interrupted, MoaiError, StorageError, UsageError, shell, storage_error

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OnEvent = Callable[[dict[str, Any]], None]


# ---- choices that benchmarks share


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The type of a --dtype flag; auto is bf16 on a GPU and fp32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UsageError(f"--dtype must be auto, {', '.join(DTYPES)} (got {name!r})")
    return DTYPES[name]


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> bf16."""
    return next(name for name, one in DTYPES.items() if one == dtype)


def numbers(flag: str, values: Iterable[str | int] | str, *, least: int = 1) -> list[int]:
    """Whole numbers from one or several comma-separated lists, each number once. UsageError naming the flag."""
    words = [word for value in ([values] if isinstance(values, str) else values) for word in str(value).split(",")]
    found: list[int] = []
    for word in words:
        try:
            number = int(word.strip().replace("_", ""))
        except ValueError:
            number = least - 1
        if number < least:
            raise UsageError(f"{flag} must be whole numbers >= {least} with commas between them (got {word.strip()!r})")
        found += [number] if number not in found else []
    return found


def among(flag: str, values: Iterable[str] | str, known: Sequence[str]) -> list[str]:
    """Names from one or several comma-separated lists. UsageError naming the flag and the nearest."""
    words = [word.strip() for value in ([values] if isinstance(values, str) else values) for word in value.split(",")]
    for word in words:
        if word not in known:
            raise UsageError(f"{flag}: unknown name {word!r}", hint=f"choose among {', '.join(known)}")
    return list(dict.fromkeys(words))


def check_preset(preset: str | None) -> None:
    """UsageError for a --preset that is no size of moai's."""
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--preset: unknown size {preset!r}", hint=f"choose among {', '.join(PRESETS)}")


# ---- the machine


def environment(device: torch.device, command: str = "") -> dict[str, Any]:
    """What the figures depend on: device, driver, clocks, versions, how many programs wanted to run in the last
    minute; and the date (UTC) and the command line."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "device": str(device),
        "processor": processor(),
        "cores": devices.cores(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "moai": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("transformers", "triton", "numba")},
    }
    return {**found, **gpu(device)} if device.type == "cuda" else found


def gpu(device: torch.device) -> dict[str, Any]:
    """A GPU's name, memory, CUDA version, and what nvidia-smi knows of it: driver, clock of the SMs and its maximum
    in MHz, power limit in W."""
    props = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {"gpu": props.name, "memory": props.total_memory, "cuda": torch.version.cuda}
    fields = {"driver": "driver_version", "clock_mhz": "clocks.sm", "max_clock_mhz": "clocks.max.sm"}
    fields["power_limit_w"] = "power.limit"
    query = ["nvidia-smi", f"--id=GPU-{props.uuid}", f"--query-gpu={','.join(fields.values())}"]
    try:
        done = subprocess.run([*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10)
        values: list[str | None] = [value.strip() for value in done.stdout.split(",")] if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        values = []
    return {**found, **dict(zip(fields, values or [None] * len(fields), strict=False))}


def processor() -> str:
    """The product name of the processor."""
    return devices.cpu().label.rpartition(",")[0]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def headline(found: dict[str, Any]) -> str:
    """The environment in one line."""
    if "gpu" in found:
        clocks = f", {found['clock_mhz']} of {found['max_clock_mhz']} MHz" if found.get("clock_mhz") else ""
        where = f"{found['gpu']} (driver {found.get('driver') or '?'}, CUDA {found['cuda']}{clocks})"
    else:
        threads = f"{found['threads']} thread{'s' * (found['threads'] != 1)}"
        where = f"{found['processor']}, {threads} on {found['cores']} cores"
    versions = [f"{name} {found[name]}" for name in ("torch", "triton", "transformers", "numba") if found.get(name)]
    return f"{where}; moai {found['moai']}, {', '.join(versions)}, Python {found['python']}; {found['date']}"


def warnings(found: dict[str, Any]) -> list[str]:
    """What makes the figures doubtful."""
    load = found.get("load") or 0.0
    if load > 0.5 and "gpu" not in found:
        text = f"other programs are running (load {load:.1f}): figures are noisy (OMP_WAIT_POLICY=PASSIVE helps)"
        return [text]
    return []


def typed(program: str, arguments: Sequence[str]) -> str:
    """The command line as it was typed."""
    return " ".join([program, shlex.join(arguments)]).strip()


# ---- tables


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; `left` counts the columns at the left that hold words, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: int = 1

    @property
    def right(self) -> tuple[int, ...]:
        """The indices of the columns to align right."""
        return tuple(range(self.left, len(self.columns)))


def plain(table: Table) -> str:
    """A table for a terminal without Rich."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    aligned = [
        "  ".join(
            cell.ljust(width) if i < table.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, *aligned] if table.title else aligned)


def markdown(found: dict[str, Any], tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Environment, command, tables and notes, ready to stand in docs/bench/."""
    parts = [headline(found) + "."]
    if found.get("command"):
        parts.append(f"    {found['command']}")
    for table in tables:
        dashes = ["---" if i < table.left else "---:" for i in range(len(table.columns))]
        lines = ["| " + " | ".join(cells) + " |" for cells in (table.columns, dashes, *table.rows)]
        parts.append("\n".join([f"{table.title}\n", *lines] if table.title else lines))
    return "\n\n".join([*parts, *(f"- {note}" for note in notes)]) + "\n"


def ms(value: float | None) -> str:
    """Milliseconds with four significant digits; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


# ---- pictures


@dataclass(frozen=True)
class Curve:
    """One line of a panel: (x, y) points; `dashed` for what it is compared with."""

    label: str
    points: list[tuple[float, float]]
    dashed: bool = False


def check_effort(limit: float, repeats: int | None) -> None:
    """Raises UsageError for a time limit or a number of repetitions with which nothing can be measured."""
    if not limit > 0 or (repeats is not None and repeats < 1):
        raise UsageError("--limit must be above 0 and --repeats at least 1")


def check_plot(path: Path | None) -> None:
    """Raises before the work begins what would stop the picture at its end: StorageError, UsageError."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        name = shell(f"{path.stem or 'bench'}.png")
        raise UsageError(f"--plot must name a PNG file (got {str(path)!r})", hint=f"--plot {name}")
    if not path.parent.is_dir():
        raise StorageError(f"{path}: no such folder", hint="make the folder first")
    if path.exists() and not path.is_file():
        raise StorageError(f"{path}: is not a regular file", hint="give the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise StorageError(f"{path}: you may not write there", hint="choose another place with --plot, or --no-plot")
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise UsageError("the picture needs matplotlib", hint="pip install matplotlib, or --no-plot") from exc


def with_picture(
    found: dict[str, Any], path: Path | None, picture: Callable[[dict[str, Any], Path], None]
) -> dict[str, Any]:
    """The report with `plot`, where its picture is: drawn if there is a path, else None.

    A picture that can't be written is no reason to lose what was measured: `plot_error` says why (`check_picture`).
    """
    if path is None:
        return {**found, "plot": None}
    try:
        picture(found, path)
    except StorageError as exc:
        return {**found, "plot": None, "plot_error": exc.message}
    return {**found, "plot": str(path)}


def check_picture(found: dict[str, Any]) -> None:
    """Raises StorageError where the report's picture couldn't be written; the report has been shown by then."""
    if found.get("plot_error"):
        raise StorageError(found["plot_error"], hint="the figures above are whole; the picture needs another --plot")


def draw(path: Path, panels: dict[str, list[Curve]], *, x: str, y: str, title: str) -> None:
    """One log-log panel beside the other, with common axes, as a PNG; written whole or not at all. StorageError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(1 + 5.5 * len(panels), 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, curves) in zip(grid, panels.items(), strict=True):
        for number, curve in enumerate(curves):
            style: Any = {"color": f"C{number}", "linestyle": "--" if curve.dashed else "-", "marker": "o"}
            axes.plot(*zip(*curve.points, strict=True), label=curve.label, markersize=4, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelrotation=30)
        axes.set_title(name)
        axes.set_xlabel(x)
        axes.grid(alpha=0.25, which="both")
        if curves:
            axes.legend(frameon=False)
    grid[0].set_ylabel(y)
    figure.suptitle(textwrap.fill(title, 150), fontsize=8)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    try:
        storage.write_file(path, buffer.getvalue())
    except OSError as exc:
        raise storage_error(exc, path) from exc


# ---- the front of `python -m moai_core.bench.NAME`


class Progress:
    """Events as lines on stderr: one that is overwritten on a terminal, else one every ten seconds."""

    def __init__(self) -> None:
        self._began = self._shown = time.monotonic()
        self._width = self._done = 0

    def __call__(self, event: dict[str, Any]) -> None:
        """Shows a `progress` event."""
        if event.get("event") != "progress":
            return
        now, done, total = time.monotonic(), event["done"], event["total"]
        if done < self._done:  # another count has begun
            self._began = now
        self._done = done
        terminal = sys.stderr.isatty()
        if done >= total:
            self.clear()
        elif terminal or now - self._shown > 10:
            self._shown = now
            left = f", ETA {(total - done) * (now - self._began) / done:.0f} s" if done else ""
            line = f"[{done}/{total}{left}] {event['task']}"
            sys.stderr.write(f"\r{line.ljust(self._width)}" if terminal else f"{line}\n")
            sys.stderr.flush()
            self._width = len(line)

    def clear(self) -> None:
        """Wipes the line."""
        if self._width and sys.stderr.isatty():
            sys.stderr.write("\r" + " " * self._width + "\r")
        self._width = 0


def flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all benchmarks have."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto (default)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    group.add_argument("--markdown", action="store_true", help="print Markdown, with machine and command")


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of a benchmark by name, without those that say how its report is printed."""
    return {name: value for name, value in vars(arguments).items() if name not in ("json", "markdown")}


def front(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    run: Callable[[argparse.Namespace, str, OnEvent], dict[str, Any]],
    tables: Callable[[dict[str, Any]], list[Table]],
) -> int:
    """Parses, runs and prints; the exit code. run(options, command, on_event) gives the report."""
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(words)
    progress = Progress()
    try:
        report = run(options, typed(parser.prog, words), progress)
    except (MoaiError, KeyboardInterrupt) as exc:
        progress.clear()
        return _fail(Interrupted(2) if isinstance(exc, KeyboardInterrupt) else exc)
    progress.clear()
    if options.json:
        print(json.dumps(report, indent=2))
    elif options.markdown:
        print(markdown(report["environment"], tables(report), report["notes"]), end="")
    else:
        print(headline(report["environment"]))
        for text in warnings(report["environment"]):
            print(f"warning: {text}", file=sys.stderr)
        for table in tables(report):
            print(f"\n{plain(table)}")
        print("".join(f"\n{note}" for note in report["notes"]))
    try:
        check_picture(report)
    except StorageError as exc:
        return _fail(exc)
    return 0


def _fail(error: MoaiError) -> int:
    hint = f"\nhint: {error.hint}" if error.hint else ""
    print(f"error: {error.message}{hint}", file=sys.stderr)
    return error.exit_code
