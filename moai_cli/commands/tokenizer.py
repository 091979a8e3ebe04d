"""`moai tokenizer train|extend|eval`: make a tokenizer, add a domain's words to one, compare several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moai_cli.console import clean, note, on_event, print_json, progress, table, warn
from moai_cli.options import Force, Json, Seed, by_name

app = typer.Typer(no_args_is_help=True, help="Train, extend and compare tokenizers.")

Texts = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders or globs: txt, md, jsonl, json, csv, tsv, parquet (also .gz, .zst); FILE=3 counts its "
        "text thrice, FILE=0.25 a quarter of it.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("--output", "--out", "-o", help="Folder to write.", show_default=False)]
MinFrequency = Annotated[int, typer.Option("--min-frequency", help="A merge must be seen so often.")]
OnError = Annotated[str, typer.Option("--on-error", help="A bad line: stop, or skip and count it.")]
Notice = Annotated[
    Path | None,
    typer.Option(
        "--notice", help="File to put beside it as ATTRIBUTION.md: what text it learnt from.", show_default=False
    ),
]
_PHASES = {"counting": "counting words", "health": "counting ids", "encoding": "encoding"}


@contextmanager
def _working() -> Iterator[Any]:
    """A bar on stderr, and signals that end the work at once: nothing is worth saving half-way."""
    from moai_core.training.stop import StopFlag

    flag, bar = StopFlag(), progress()
    task = bar.add_task("reading", total=None)

    def show(event: dict[str, Any]) -> None:
        flag.check()
        if event["event"] == "read":
            description = _PHASES.get(event["phase"], event["phase"])
            bar.update(
                task, description=f"{description} (MB)", completed=event["done"] >> 20, total=event["total"] >> 20
            )
        elif event["event"] == "merging":
            bar.update(task, visible=False)  # a task that had a total can't lose it
            bar.add_task("merging", total=None)
        else:
            on_event(event)

    with flag.catching(), flag.at_once(), bar:
        yield show


@app.command(
    epilog="Example: `moai tokenizer train books/ chats.jsonl ko.txt.zst=3 --output my-tokenizer --vocab-size 32000`"
)
def train(
    data: Texts,
    out: Out,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="At most so many ids.")] = 128_000,
    min_frequency: MinFrequency = 10,
    seed: Seed = 0,
    on_error: OnError = "stop",
    notice: Notice = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train a tokenizer: byte-level BPE with moai's special tokens and chat template.

    The report says whether the text was enough: a merge that was seen fewer than ten times is noise, an id that is used
    fewer than 50 times hardly gets trained. With too little text there are fewer ids than asked for.
    """
    from moai_core.tokenizer.text import parse_source
    from moai_core.tokenizer.train import train as run

    sources = [parse_source(text) for text in data]
    options: dict[str, Any] = {"seed": seed, "on_error": on_error, "notice": notice, "force": force}
    with _working() as show:
        report = run(sources, out, vocab_size=vocab_size, min_frequency=min_frequency, on_event=show, **options)
    _show(report, json)
    if report["vocab_size"] < vocab_size and not json:
        note(
            f"{vocab_size:,} ids were asked for; no further pair was seen {min_frequency} times. A model may keep "
            f"{vocab_size:,} rows: those beyond {report['vocab_size']:,} are padding"
        )


@app.command(
    epilog="Example: `moai tokenizer extend moai filings/ reports.jsonl --add 8000 --output moai-filings`; with a "
    "model: `moai tokenizer extend my-model filings/ --add 8000 --model my-model --output my-model-filings`"
)
def extend(
    base: Annotated[
        str,
        typer.Argument(
            help="Folder (a model's or a run's too), tokenizer.json, one of moai's by name, or a name of the hub."
        ),
    ],
    data: Texts,
    out: Out,
    add: Annotated[int, typer.Option("--add", help="At most so many new tokens.")] = 8000,
    min_frequency: MinFrequency = 10,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="Model that uses BASE: OUT is then the model with rows for the new tokens.",
            show_default=False,
            callback=by_name,
        ),
    ] = None,
    seed: Seed = 0,
    on_error: OnError = "stop",
    notice: Notice = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Add a domain's words to a tokenizer: new tokens made of old ones, learnt on the domain's text.

    Old ids keep their meaning. The ids of any text are the old ones with some runs replaced by one new id each, so a
    trained model goes on from where it was: with --model, each new row is the mean of the rows of its run.
    """
    from moai_core.tokenizer.extend import extend as run
    from moai_core.tokenizer.text import parse_source

    sources = [parse_source(text) for text in data]
    options: dict[str, Any] = {"model": model, "seed": seed, "on_error": on_error, "notice": notice, "force": force}
    with _working() as show:
        report = run(base, sources, out, add=add, min_frequency=min_frequency, on_event=show, **options)
    _show(report, json)
    if report["added"] < add and not json:
        note(f"{add:,} new tokens were asked for; no further pair was seen {min_frequency} times")


def _show(report: dict[str, Any], json: bool) -> None:
    if json:
        print_json(report)
        return
    health, grown = report["health"], report.get("model")
    rows = [(source["path"], f"{source['bytes']:,} bytes, weight {source['weight']:g}") for source in report["sources"]]
    rows.append(("ids", f"{report['vocab_size']:,}"))
    if "base" in report:
        rows.append(("new tokens", f"{report['added']:,}, from id {report['first_new_id']:,} on"))
        rows.append(("bytes per token before", f"{report['bytes_per_token_before']:.3f}"))
    rows += [
        ("bytes per token here", f"{report['bytes_per_token']:.3f}"),
        ("merges", f"{health['merges']:,}, {health['seen_under_10']:,} of them seen fewer than 10 times"),
        (
            "the last thousand",
            f"seen {health['last']['fewest']:,} times at least, {health['last']['median']:,} in the median",
        ),
        (
            "used under 50 times",
            f"{health['ids']['used_under_50']:,} ids, {health['ids']['never_used']:,} of them never",
        ),
    ]
    if grown:
        rows.append(("rows of the model", f"{grown['rows_before']:,} before, {grown['rows']:,} now"))
    rows.append(("seconds", f"{report['seconds']:.1f}"))
    table(("what", "value"), rows, title=clean(report["path"]))
    if not health["healthy"]:
        warn("of the last 1,000 merges some were seen fewer than 10 times: take more text, or fewer ids")


@app.command(
    name="eval", epilog="Example: `moai tokenizer eval moai moai_tiny Qwen/Qwen3-0.6B --data ko.txt --data en=books/`"
)
def evaluate(
    tokenizers: Annotated[
        list[str],
        typer.Argument(
            help="Folders (a model's or a run's too), tokenizer.json files, moai's own by name, or names of the hub.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            "-d",
            help="File, folder or glob, or LABEL=PATH; texts of one label count together.",
            show_default=False,
        ),
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", help="At most about so many bytes of a label.", show_default=False)
    ] = None,
    on_error: OnError = "stop",
    json: Json = False,
) -> None:
    """Compare tokenizers: bytes that one token stands for, file by file. More is denser; compare within a column."""
    from moai_core.tokenizer.evaluate import evaluate as run

    with _working() as show:
        report = run(tokenizers, data, limit=limit, on_error=on_error, on_event=show)
    if json:
        print_json(report)
        return
    made = report["tokenizers"]
    short = [Path(row["tokenizer"]).name for row in made]
    names = short if len(set(short)) == len(short) else [row["tokenizer"] for row in made]
    rows: list[tuple[str, ...]] = [("ids", *(f"{row['vocab_size']:,}" for row in made))]
    for label in report["labels"]:
        rows.append((label, *(f"{row['texts'][label]['bytes_per_token']:.3f}" for row in made)))
    rows.append(("harmonic mean", *(f"{row['mean']:.3f}" for row in made)))
    rows.append(("text comes back", *("exactly" if row["exact"] else "changed" for row in made)))
    table(("bytes per token", *names), rows, right=range(1, len(made) + 1))
