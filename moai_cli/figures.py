"""How benchmarks show what they found: a bar while they measure, then tables, JSON or Markdown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.markup import escape

from moai_cli.console import NowAndThen, clean, console, note, print_json, progress, table, warn
from moai_core.errors import UsageError


def show(run: Callable[..., dict[str, Any]], tables: Callable[[Any], list[Any]], json: bool, markdown: bool) -> None:
    """Runs with a bar, then prints the report as tables, JSON or Markdown."""
    if json and markdown:
        raise UsageError("--json and --markdown don't go together", hint="leave one of them out")
    from moai_core.bench import report

    with Bar() as bar:
        found = run(command=report.typed("moai", sys.argv[1:]), on_event=bar)
    print_json(found) if json else _print(found, tables, markdown)
    report.check_picture(found)


def _print(found: dict[str, Any], tables: Callable[[Any], list[Any]], markdown: bool) -> None:
    from moai_core.bench import report

    for text in report.warnings(found["environment"]):
        warn(text)
    if markdown:
        typer.echo(clean(report.markdown(found["environment"], tables(found), found["notes"])), nl=False)
        return note(f"curves: {found['plot']}") if found.get("plot") else None
    console.print(f"[dim]{escape(report.headline(found['environment']))}[/]")
    for one in tables(found):
        console.print()
        table(one.columns, one.rows, title=one.title or None, right=one.right)
    if found["notes"]:
        console.print()
    for text in found["notes"]:
        console.print(escape(clean(text)))
    if found.get("plot"):
        console.print(f"\ncurves: {escape(found['plot'])}")


class Bar:
    """A context manager that is also the `on_event` of a benchmark: a bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._bar = progress()
        self._task = self._bar.add_task("starting", total=None)
        self._tell, self._done = NowAndThen(), 0

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] != "progress":
            return
        done, total, task = event["done"], event["total"], escape(event["task"])
        if done < self._done:  # another count has begun
            self._bar.reset(self._task, total=total)
        self._done = done
        self._bar.update(self._task, description=task, completed=done, total=total)
        if done < total:
            self._tell(f"{done}/{total} {event['task']}")
