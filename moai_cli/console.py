"""What every command shares with the person in front of it: consoles, tables, JSON, progress, one-line errors.

Results go to stdout, everything else (progress, notes, warnings, errors) to stderr, so that a pipe gets results only.
Text that comes from prompts, data or a model passes through `clean` before it reaches a terminal: control characters of
C0 and C1 can move the cursor, retitle the window or worse (ECMA-48).
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from moai_core.errors import MoaiError


class _Err(Console):
    """stderr. When its reader leaves (`moai train 2>&1 | head`), the work goes on unseen: a note is no result."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


console = Console(highlight=False, soft_wrap=True)
err = _Err(stderr=True, highlight=False, soft_wrap=True)

# C0 without tab and newline, DEL, C1; and the bidirectional overrides that can make a line read as another.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """`text` without characters that steer a terminal; tab and newline stay. Works a character at a time, so chunks may
    be cleaned alone.
    """
    return _CONTROL.sub("", text)


def fail(error: MoaiError) -> int:
    """Prints `error: …` and its hint on stderr and returns the exit code."""
    message = " ".join(clean(error.message).split("\n"))
    err.print(f"[bold red]error:[/] {escape(message)}")
    if error.hint:
        err.print(f"[bold]hint:[/] {escape(clean(error.hint))}")
    return error.exit_code


def note(text: str) -> None:
    """A calm line on stderr."""
    err.print(f"[dim]{escape(clean(text))}[/]")


def warn(text: str) -> None:
    """A warning line on stderr."""
    err.print(f"[yellow]warning:[/] {escape(clean(text))}")


class _Notes(logging.Handler):
    """Each message once: a file of kernels is compiled for several types."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            note(text)


def show_log() -> None:
    """What the core logs of work that happens once (GPU kernels that are compiled) becomes a note."""
    log = logging.getLogger("moai")
    if not log.handlers:
        log.addHandler(_Notes())
        log.setLevel(logging.INFO)


def on_event(event: dict[str, Any]) -> None:
    """Warnings of the core, on stderr."""
    if event.get("event") == "warning":
        warn(str(event.get("message")))


def show(text: str) -> None:
    """Generated text on stdout at once, without what could steer a terminal."""
    sys.stdout.write(clean(text))
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """`value` as one JSON document on stdout; text stays readable (no \\u escapes), NaN is refused by the JSON standard
    and becomes null.
    """
    sys.stdout.write(json.dumps(_strict(value), ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None, right: Sequence[int] = ()
) -> None:
    """A table on stdout; `right` lists the columns to align right. No word is broken: where the terminal is too narrow
    for that, each row becomes a list of its cells. A pipe or file gets whole lines.
    """
    cells = [[clean(str(cell)) for cell in row] for row in rows]
    narrow = console.is_terminal or "COLUMNS" in os.environ
    if title:
        console.print(Text(clean(title), style="italic"), soft_wrap=not narrow)
    full, least = (
        [max(map(width, column)) for column in zip(columns, *cells, strict=True)] for width in (_full, _least)
    )
    space = console.width - _GAP * (len(columns) - 1) if narrow else sum(full)
    if sum(least) > space:
        return _lists(columns, cells)
    widths = _share(space, least, full)
    grid = Table(show_header=any(columns), header_style="bold", box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    grid.width = sum(widths) + _GAP * (len(columns) - 1)
    for index, (name, width) in enumerate(zip(columns, widths, strict=True)):
        grid.add_column(escape(name), justify="right" if index in right else "left", overflow="fold", width=width)
    for row in cells:
        grid.add_row(*map(escape, row))
    _print(grid)


# Columns between two cells; what a sentence in a cell needs to be read with ease; from where on a path may be folded.
_GAP, _SENTENCE, _PATH = 2, 16, 24


def _full(cell: str) -> int:
    """Columns of the terminal that a cell takes in one line."""
    return max(map(cell_len, cell.split("\n")))


def _least(cell: str) -> int:
    """Columns that it needs: its longest word's, but a path may be folded, and so may what has no spaces at all."""
    words = max(
        (min(cell_len(w), _PATH) if "/" in w or not w.isascii() else cell_len(w) for w in cell.split()), default=0
    )
    return max(words, min(_full(cell), _SENTENCE))


def _share(space: int, least: list[int], full: list[int]) -> list[int]:
    """The columns' widths: the least of each, and of what is left over as much as it needs, narrow ones first."""
    widths, left = list(least), space - sum(least)
    order = sorted(range(len(least)), key=lambda n: full[n] - least[n])
    for place, index in enumerate(order):
        more = min(full[index] - least[index], left // (len(order) - place))
        widths[index] += more
        left -= more
    return widths


def _lists(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Each row as its first cell and, below it, the others with their names; a cell without a name goes behind the one
    before it."""
    names = max(map(cell_len, columns[1:]), default=0)
    for first, *rest in rows:
        if first:
            console.print(Text.assemble((f"{columns[0]} ".lstrip(), "dim"), (first, "bold")), soft_wrap=False)
        lines: dict[str, list[str]] = {}
        name = ""
        for column, cell in zip(columns[1:], rest, strict=True):
            name = column or name
            lines.setdefault(name, []).extend([cell] * bool(cell))
        grid = Table.grid(padding=(0, _GAP, 0, 0))
        if names:
            grid.add_column(width=names)
        grid.add_column(overflow="fold")
        for name, values in lines.items():
            if values:
                grid.add_row(*[escape(name)] * bool(names), escape("  ".join(values)))
        _print(Padding(grid, (0, 0, 0, 2)))


def _print(grid: Any) -> None:
    """Without the spaces at the ends of lines, which would fill a pager's next line."""
    if console.is_terminal:
        return console.print(grid)
    with console.capture() as caught:
        console.print(grid)
    for line in caught.get().splitlines():
        console.print(line.rstrip(), markup=False)


def progress(*fields: str) -> Progress:
    """A bar with count, elapsed time and ETA on stderr; `fields` are extra text columns, read from the task's fields.
    Silent where stderr is no terminal.
    """
    columns = [
        TextColumn("{task.description}"),
        *([BarColumn(bar_width=None)] if err.width >= 50 else []),
        MofNCompleteColumn(),
        *([TimeElapsedColumn()] if err.width >= 100 else []),  # else ETA or count would be cut off
        TextColumn("ETA"),
        TimeRemainingColumn(),
    ]
    columns += [TextColumn("{task.fields[" + name + "]}") for name in fields]
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


class NowAndThen:
    """How far work is, as a line on stderr at most every ten seconds, where no bar shows it: stderr is no terminal."""

    def __init__(self) -> None:
        self._shown = time.monotonic()

    def __call__(self, text: str) -> None:
        if not err.is_terminal and time.monotonic() - self._shown > 10:
            self._shown = time.monotonic()
            note(text)


class ReadingBar:
    """A bar on stderr while a long prompt is read; gone before the first word of the answer."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        from moai_core.generation.engine import CHUNK

        if event["event"] != "prefill" or event["total"] <= CHUNK:
            return
        if self._bar is None:
            self._bar = progress()
            self._task = self._bar.add_task("reading the prompt", total=event["total"])
            self._bar.start()
        self._bar.update(self._task, completed=event["done"])
        if event["done"] >= event["total"]:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
