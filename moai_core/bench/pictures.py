"""Pictures of the quality benchmarks: curves over positions and contexts, heat maps of needles. PNG, whole or not at
all."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai_core import storage
from moai_core.bench.report import Curve


@dataclass(frozen=True)
class Panel:
    """Axes with lines: (x, y) in each Curve; `log` for a base-2 axis of x."""

    title: str
    x: str
    y: str
    curves: list[Curve]
    log: bool = True


def curves(path: Path, panels: Sequence[Panel], title: str) -> None:
    """One panel beside the other, each with its own axes. Raises StorageError."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, canvas = _figure(len(panels), 5.5, 4.6)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        colours: dict[str, str] = {}
        for curve in panel.curves:
            # A solid and a dashed line of one label belong together.
            colour = colours.setdefault(curve.label, f"C{len(colours)}")
            label = f"{curve.label} (transformer)" if curve.dashed else curve.label
            style: Any = {"color": colour, "linestyle": "--" if curve.dashed else "-", "linewidth": 1.4}
            marker = "o" if len(curve.points) <= 40 else ""
            axes.plot(*zip(*curve.points, strict=True), label=label, marker=marker, markersize=3.5, **style)
        if panel.log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.tick_params(axis="x", labelrotation=30)
        axes.set_title(panel.title)
        axes.set_xlabel(panel.x)
        axes.set_ylabel(panel.y)
        axes.grid(alpha=0.25)
        if panel.curves:
            axes.legend(frameon=False, fontsize=8)
    _write(path, figure, canvas, title)


def heatmaps(
    path: Path, panels: dict[str, list[list[float]]], *, x: Sequence[str], y: Sequence[str], labels: tuple[str, str],
    title: str,
) -> None:  # fmt: skip
    """One map of shares (0 to 1; rows y, columns x) a panel, on one scale. Raises StorageError."""
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure, canvas = _figure(across, 1.5 + 0.75 * len(x), down * (1.6 + 0.5 * len(y)))
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (name, values) in zip(grid, panels.items(), strict=False):
        axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(x)), x)
        axes.set_yticks(range(len(y)), y)
        axes.set_title(name)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
    _write(path, figure, canvas, title)


def _figure(panels: int, width: float, height: float) -> tuple[Any, Any]:
    # A canvas of its own, without pyplot: no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height + 0.5), layout="constrained")
    return figure, FigureCanvasAgg(figure)


def _write(path: Path, figure: Any, canvas: Any, title: str) -> None:
    # The fonts that matplotlib carries have no CJK glyphs.
    wide = int(14 * figure.get_figwidth())
    figure.suptitle(textwrap.fill(title.encode("ascii", "replace").decode(), max(40, wide)), fontsize=8)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    storage.write_file(path, buffer.getvalue())
