"""`moai bench twin`, `context`, `needle`, `samples`, `quality`: what a model is worth; other benchmarks say how fast
it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moai_cli.figures import show
from moai_cli.options import Device, Json, Model, Scan, Seed, by_name, required_model
from moai_core.errors import at_least

Words = list[str] | None
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown to paste, with machine and command line.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw into this PNG.", show_default=False)]
Models = Annotated[
    list[Path] | None,
    typer.Option(
        "--model",
        "-m",
        help="Run, step or model folder, of a twin too; several are compared.",
        show_default=False,
        callback=lambda models: [by_name(model) for model in models] if models else models,
    ),
]
Data = Annotated[
    Words,
    typer.Option("--data", "-d", help="Held-out text: file, folder or glob; may be repeated.", show_default=False),
]
Context = Annotated[Words, typer.Option("--context", help="Tokens of context: one or several.", show_default=False)]
Tokens = Annotated[int, typer.Option("--tokens", help="At most so many tokens a language.")]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder or name; default: the model's own.", show_default=False)
]


def twin(
    overrides: Annotated[
        Words, typer.Argument(metavar="KEY=VALUE", help="Values put over the recipe's.", show_default=False)
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="What both are trained by.")] = "cpu-tiny",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs; given again, they go on.")] = Path(
        "runs/twin"
    ),
    lr: Annotated[
        Words, typer.Option("--lr", help="Learning rates that both try: 3e-3,6e-3.", show_default="the recipe's")
    ] = None,
    sweep: Annotated[
        int | None, typer.Option("--sweep", help="Steps of such a try.", show_default="a tenth of the run")
    ] = None,
    data: Data = None,
    context: Context = None,
    tokens: Tokens = 200_000,
    join: Annotated[
        int, typer.Option("--join", help="Lay documents end to end and cut texts of so many tokens; 0: never.")
    ] = 0,
    theta: Annotated[float, typer.Option("--theta", help="Base of the transformer's rotary positions.")] = 10_000.0,
    plot: Plot = None,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Train a Mamba model and a transformer of equal size on the same tokens, and compare bits per byte.

    The transformer is transformers' Llama of the same width, depth and vocabulary, within 1 % of the parameters,
    trained by the same loop. Both may choose among the same learning rates. Ctrl-C saves; the same command goes on.

    Examples:

    - `moai bench twin --plot pair.png`

    - `moai bench twin -r my-10m.yaml --lr 1e-3,2e-3,4e-3 --sweep 200 --data 'heldout/*.jsonl' --markdown`
    """
    from moai_core.bench import report
    from moai_core.bench import twin as benchmark
    from moai_core.bench.context import CONTEXTS
    from moai_core.training import StopFlag

    settings: dict[str, Any] = {"recipe": recipe, "overrides": overrides or [], "output": output, "sweep": sweep}
    settings |= {"rates": benchmark.numbers(",".join(lr or [])), "data": data or [], "tokens": tokens, "join": join}
    settings |= {"contexts": report.numbers("--context", context, least=2) if context else CONTEXTS}
    settings |= {"theta": theta, "plot": plot}
    with StopFlag().catching() as stop:
        show(lambda **tell: benchmark.run(**settings, stop=stop, **tell), benchmark.tables, json, markdown)


def context(
    model: Models = None,
    data: Data = None,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens of each text.")] = 32768,
    join: Annotated[
        bool | None,
        typer.Option("--join/--no-join", help="Lay documents end to end.", show_default="only without --data"),
    ] = None,
    context: Context = None,
    tokens: Tokens = 200_000,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens read at once; the state carries the rest.")] = 2048,
    format: Annotated[str, typer.Option("--format", help="Kind of records, as for `moai eval`.")] = "auto",
    tokenizer: Tokenizer = None,
    plot: Plot = None,
    device: Device = "auto",
    scan: Scan = "auto",
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure loss by position, up to 32K tokens and beyond: does a longer past help, or harm?

    Each text is read once with the state carried along. With --context also the same tokens with at most so many
    before them. A file's name up to the first dot is its language. Without --data: the packaged validation text.

    Examples:

    - `moai bench context -m runs/cpu-tiny --plot context.png`

    - `moai bench context -m runs/pair/moai-lr0.004 -m runs/pair/llama-lr0.002 -d 'heldout/*.txt' --context 512,2048`
    """
    models = model or [required_model(None)]
    from moai_core.bench import context as benchmark
    from moai_core.bench import report

    settings: dict[str, Any] = {"models": models, "data": data or [], "length": max_length}
    settings |= {"join": join, "tokens": tokens, "chunk": chunk, "format": format, "tokenizer": tokenizer}
    settings |= {"contexts": report.numbers("--context", context, least=2) if context else ()}
    settings |= {"plot": plot, "device": device, "scan": scan}
    show(lambda **tell: benchmark.run(**settings, **tell), benchmark.tables, json, markdown)


def needle(
    model: Models = None,
    lengths: Annotated[
        Words, typer.Option("--lengths", help="Tokens of a prompt: one or several.", show_default="512,2048,8192")
    ] = None,
    depths: Annotated[
        Words, typer.Option("--depths", help="Where the needle is, percent.", show_default="0,25,50,75,100")
    ] = None,
    languages: Annotated[
        Words, typer.Option("--languages", help="Among en, ko, ja, zh.", show_default="en,ko,ja,zh")
    ] = None,
    trials: Annotated[int, typer.Option("--trials", help="Prompts a cell.")] = 4,
    pairs: Annotated[int, typer.Option("--pairs", help="Keys with numbers in each prompt; one is asked for.")] = 1,
    candidates: Annotated[int, typer.Option("--candidates", help="Numbers to choose among.")] = 10,
    digits: Annotated[int, typer.Option("--digits", help="Digits of each number.")] = 5,
    seed: Seed = 0,
    filler: Annotated[
        str | None, typer.Option("--data", "-d", help="Other filler text.", show_default="the packaged corpus")
    ] = None,
    tokenizer: Tokenizer = None,
    plot: Plot = None,
    device: Device = "auto",
    scan: Scan = "auto",
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Hide a number in filler text and ask for it: retrieval over length and depth, with chance beside it.

    A cell has how often the number is the likeliest among --candidates (how often the continuation spells it).

    Examples:

    - `moai bench needle -m runs/cpu-tiny --lengths 256,1024 --plot needle.png`

    - `moai bench needle -m runs/pair/moai-lr0.004 -m runs/pair/llama-lr0.002 --pairs 4 --trials 16`
    """
    models = model or [required_model(None)]
    from moai_core.bench import needle as benchmark
    from moai_core.bench import report
    from moai_core.bench.needle_prompts import LANGUAGES

    settings: dict[str, Any] = {"models": models}
    if lengths:
        settings["lengths"] = report.numbers("--lengths", lengths, least=32)
    if depths:
        settings["depths"] = report.numbers("--depths", depths, least=0)
    if languages:
        settings["languages"] = report.among("--languages", languages, tuple(LANGUAGES))
    settings |= {"trials": trials, "pairs": pairs, "candidates": candidates, "digits": digits, "seed": seed}
    settings |= {"filler": filler, "tokenizer": tokenizer, "plot": plot, "device": device, "scan": scan}
    show(lambda **tell: benchmark.run(**settings, **tell), benchmark.tables, json, markdown)


def samples(
    model: Model = None,
    tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--tokens", "-n", help="At most so many tokens a sample.")
    ] = 64,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.")] = 0.8,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    scan: Scan = "auto",
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Print what a model writes after ten fixed prompts in four languages, finance and code: nothing is picked.

    Examples:

    - `moai bench samples -m runs/cpu-tiny`

    - `moai bench samples -m runs/cpu-tiny --json > samples.json`
    """
    at_least(("--max-new-tokens", tokens, 1))
    chosen = required_model(model)
    from moai_core.bench import samples as benchmark

    settings: dict[str, Any] = {"model": chosen, "tokens": tokens, "temperature": temperature}
    settings |= {"seed": seed, "tokenizer": tokenizer, "device": device, "scan": scan}
    show(lambda **tell: benchmark.run(**settings, **tell), benchmark.tables, json, markdown)


def quality(
    parent: Annotated[
        Path, typer.Option("--parent", help="The model that the others were made of.", show_default=False)
    ],
    model: Annotated[
        list[Path], typer.Option("--model", "-m", help="Quantized or trained on; may be repeated.", show_default=False)
    ],
    data: Data = None,
    tokens: Tokens = 200_000,
    lengths: Annotated[
        Words, typer.Option("--lengths", help="Tokens after which states are compared.", show_default="1k,4k,16k,32k")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the arithmetic: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp16, fp32.")
    ] = "auto",
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Lay quantized models beside the one that they were made of: size, loss by language, predictions, states.

    "won back" is the share of the first model's added loss that another one doesn't have: give --method int4 first.

    Examples:

    - `moai bench quality --parent runs/mine -m runs/mine-int4 -m runs/mine-gptq`

    - `moai bench quality --parent runs/mine -m runs/mine-int4 -m runs/qat -m runs/control -d 'heldout/*.jsonl' --json`
    """
    from moai_core.bench import quality as benchmark
    from moai_core.bench import report

    settings: dict[str, Any] = {"parent": parent, "models": model, "data": data or [], "tokens": tokens}
    settings |= {"lengths": report.numbers("--lengths", lengths)} if lengths else {}
    settings |= {"dtype": dtype, "tokenizer": tokenizer, "device": device}
    show(lambda **tell: benchmark.run(**settings, **tell), benchmark.tables, json, markdown)
