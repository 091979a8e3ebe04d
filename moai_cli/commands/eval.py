"""`moai eval`: how well a model predicts a file: loss, perplexity, bits per byte."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moai_cli.console import clean, note, print_json, progress, table, warn
from moai_cli.options import Device, Json, Model, Scan, loading, required_model


def evaluate(
    model: Model = None,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            help="File, folder or glob: txt, md, jsonl, json, csv, tsv, parquet (also .gz, .zst).",
            show_default=False,
        ),
    ] = "",
    max_length: Annotated[
        int,
        typer.Option(
            "--max-length", help="Tokens read at once; the state carries the rest, so the result doesn't change."
        ),
    ] = 2048,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Documents read side by side.")] = 8,
    limit: Annotated[int | None, typer.Option("--limit", help="At most so many documents.", show_default=False)] = None,
    format: Annotated[
        str, typer.Option("--format", help="Kind of records: auto, text, messages, conversations, instruction, prompt.")
    ] = "auto",
    train_on: Annotated[
        str, typer.Option("--train-on", help="Of chats, score the turns of: assistant, all.")
    ] = "assistant",
    on_error: Annotated[str, typer.Option("--on-error", help="A bad line: stop, or skip and count it.")] = "stop",
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Folder or name; default: the model's own.", show_default=False)
    ] = None,
    device: Device = "auto",
    scan: Scan = "auto",
    json: Json = False,
) -> None:
    """Measure loss, perplexity and bits per byte on a file.

    Every document is scored with its whole context: the state is carried over chunks, so documents may be longer than
    memory would allow a transformer.

    Examples:

    - `moai eval --data book.txt`

    - `moai eval -m runs/cpu-tiny/step-300 -d 'chats/**/*.jsonl' --limit 500 --json`
    """
    from moai_core.errors import UsageError, at_least

    if not data:
        raise UsageError("--data is missing", hint="a file, a folder or a glob: --data book.txt")
    for name, value, allowed in (
        ("--train-on", train_on, ("assistant", "all")),
        ("--on-error", on_error, ("stop", "skip")),
    ):
        if value not in allowed:
            raise UsageError(f"{name} must be {' or '.join(allowed)} (got {value!r})")
    at_least(("--max-length", max_length, 1), ("--batch-size", batch_size, 1), ("--limit", limit, 1))
    result = _run(
        required_model(model),
        data,
        tokenizer,
        device,
        scan,
        max_length=max_length,
        batch_size=batch_size,
        limit=limit,
        format=format,
        train_on=train_on,
        on_error=on_error,
    )
    if json:
        print_json(result)
        return
    if result["skipped"]:
        warn(f"{result['skipped']} bad line{'s' * (result['skipped'] != 1)} left out")
    rows = [
        ["loss", f"{result['loss']:.4f}"],
        ["perplexity", f"{result['perplexity']:.3f}"],
        ["bits per byte", f"{result['bits_per_byte']:.4f}" if result["bytes"] else "-"],
    ]
    rows += [[name, f"{result[name]:,}"] for name in ("tokens", "bytes", "documents")]
    rows += [["seconds", f"{result['seconds']:.1f}"], ["tokens/s", f"{result['tokens_per_second']:,.0f}"]]
    table(["measure", "value"], rows, title=clean(f"{result['model']} on {data}"), right=[1])


def _run(model: Path, data: str, tokenizer: str | None, device: str, scan: str, **options: Any) -> dict[str, Any]:
    with loading(model, device):
        from moai_core.checkpoint import latest, load_model
        from moai_core.data.read import find_files
        from moai_core.data.tokenize import load_tokenizer
        from moai_core.device import place
        from moai_core.evaluate import evaluate_file

    bar = progress("tokens")
    task = bar.add_task("evaluating", total=None, tokens="")

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            bar.update(task, completed=event["done"], tokens=event["unit"])
        elif event["event"] == "warning":
            warn(event["message"])
        elif event["event"] == "note":
            note(event["message"])

    find_files(data)  # a wrong path is told before the model loads
    where = place(device)
    step = latest(model, on_event=show) if model.is_dir() and not (model / "config.json").exists() else None
    folder = step or model
    loaded = load_model(folder, device=where, scan=scan, on_event=show)
    words = load_tokenizer(tokenizer or folder)
    begin = time.perf_counter()
    with bar:
        result = evaluate_file(loaded, words, data, on_event=show, **options)
    seconds = time.perf_counter() - begin
    return {
        "model": str(model),
        "data": data,
        **result,
        "seconds": seconds,
        "tokens_per_second": result["tokens"] / max(seconds, 1e-9),
    }
