"""`moai bench`, `moai bench scan`, `moai bench train`: how fast moai is on this machine, and others beside it. What a
model is worth is measured by the subcommands of moai_cli/quality.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moai_cli import quality
from moai_cli.figures import show as _show
from moai_cli.options import Device, Json
from moai_core.errors import UsageError

app = typer.Typer(invoke_without_command=True)

Words = list[str] | None
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown to paste, with machine and command line.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (bf16 on a GPU, fp32 on a CPU), bf16, fp16 or fp32.")]
Backend = Annotated[str, typer.Option("--scan", "--backend", help="Scan backend; `moai doctor` lists them.")]
Repeats = Annotated[
    int | None, typer.Option("--repeats", help="Measured calls of each.", show_default="as many as fit into a second")
]
Preset = Annotated[
    str | None, typer.Option("--preset", help="2b, 8b or 16b.", show_default="2b on a GPU, a small model on a CPU")
]
Layers = Annotated[int | None, typer.Option("--layers", help="Layers, to measure a part.", show_default=False)]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the curves into this PNG.", show_default=False)]


@app.callback()
def bench(
    context: typer.Context,
    seq_len: Annotated[int, typer.Option("--seq-len", help="The longest sequence; lengths double up to it.")] = 32768,
    hidden: Annotated[
        int | None, typer.Option("--hidden", help="Width of the model.", show_default="2048 on a GPU, 64 on a CPU")
    ] = None,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    repeats: Repeats = None,
    limit: Annotated[
        float, typer.Option("--limit", help="Seconds to measure; what would take longer is left out, and said.")
    ] = 50.0,
    plot: Annotated[Path, typer.Option("--plot", help="Draw the curves into this PNG.")] = Path("bench.png"),
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw nothing.")] = False,
    device: Device = "auto",
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure speed: Mamba against attention over the sequence length; the scan; training; generation. And quality.

    Without a subcommand: the scan and one layer of a model against attention and an attention layer of the same width,
    at lengths that double up to --seq-len. Short sequences favour attention, long ones Mamba.

    Examples:

    - `moai bench`

    - `moai bench --seq-len 131072 --limit 120 --plot curve.png`

    - `moai bench scan --seq-len 2048,8192 --against mamba_ssm,attention --resets`

    - `moai bench train --preset 2b --checkpointing none,selective,full`

    - `moai bench prefill --format none,fp8,int4`

    - `moai bench decode --format none,int4`
    """
    if context.invoked_subcommand is not None:
        for parameter in context.command.params:
            source = context.get_parameter_source(parameter.name or "")
            if source is not None and source.name == "COMMANDLINE":
                raise UsageError(
                    f"{parameter.opts[0]} stands before '{context.invoked_subcommand}'", hint="put flags behind it"
                )
        return
    from moai_core.bench import lengths

    settings: dict[str, Any] = {
        "length": seq_len,
        "hidden": hidden,
        "dtype": dtype,
        "backend": backend,
        "repeats": repeats,
    }
    settings |= {"limit": limit, "device": device, "plot": None if no_plot else plot}
    _show(lambda **tell: lengths.run(**settings, **tell), lengths.tables, json, markdown)


@app.command()
def scan(
    seq_len: Annotated[
        Words, typer.Option("--seq-len", help="Tokens L: one or several, 2048,8192.", show_default=False)
    ] = None,
    batch: Annotated[Words, typer.Option("--batch", help="Rows B: one or several.", show_default=False)] = None,
    dim: Annotated[Words, typer.Option("--dim", help="Channels I: one or several.", show_default=False)] = None,
    state: Annotated[Words, typer.Option("--state", help="States N a channel: one or several.")] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="The shapes of a published table: h100 (on a GPU).", show_default=False),
    ] = None,
    dtype: Dtype = "auto",
    against: Annotated[
        Words,
        typer.Option(
            "--against",
            help="Among mamba_ssm, attention, reference, conv (the convolution too); or auto: all that run; or none.",
            show_default="auto",
        ),
    ] = None,
    resets: Annotated[bool, typer.Option("--resets", help="Also with packed documents, 512 tokens each.")] = False,
    backend: Backend = "auto",
    repeats: Repeats = None,
    limit: Annotated[
        float, typer.Option("--limit", help="Seconds that one of the compared may take a shape, else it is left out.")
    ] = 20.0,
    plot: Plot = None,
    device: Device = "auto",
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Time the selective scan, forward and backward, against other implementations and against attention.

    All take turns in this process on the same shapes; a cell has the median and how many times moai's it is. On a GPU
    the times are the device's own (CUDA events), inputs come from memory, not from the cache.

    Examples:

    - `moai bench scan`

    - `moai bench scan --seq-len 2048,8192,32768 --batch 1 --dim 4096 --against mamba_ssm,attention,reference`

    - `moai bench scan --preset h100 --resets --markdown`

    - `moai bench scan --seq-len 512,2048 --device cpu --plot scan.png`
    """
    from moai_core.bench import scan as benchmark

    settings: dict[str, Any] = {
        "lengths": seq_len,
        "batches": batch,
        "dims": dim,
        "states": state,
        "preset": preset,
        "dtype": dtype,
    }
    settings |= {"against": against, "resets": resets, "backend": backend, "repeats": repeats, "limit": limit}
    settings |= {"plot": plot, "device": device}
    _show(lambda **tell: benchmark.run(**settings, **tell), benchmark.tables, json, markdown)


@app.command()
def train(
    overrides: Annotated[
        Words, typer.Argument(metavar="KEY=VALUE", help="Values put over the recipe's.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe, with its precision, optimizer, rows and length; without one: 2b, on a CPU cpu-tiny.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="A size instead: 2b, 8b, 16b; on a GPU bf16 weights.", show_default=False),
    ] = None,
    batch: Annotated[
        Words, typer.Option("--batch", help="Rows: one or several.", show_default="the recipe's; 4")
    ] = None,
    seq_len: Annotated[Words, typer.Option("--seq-len", help="Tokens a row.", show_default="the recipe's")] = None,
    steps: Annotated[int, typer.Option("--steps", help="Measured steps; 0: only --prefill.")] = 10,
    checkpointing: Annotated[
        Words,
        typer.Option("--checkpointing", help="none, selective, full: one or several.", show_default="the recipe's"),
    ] = None,
    layers: Layers = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, bf16 or bf16-mixed.", show_default="the recipe's")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            "--optimizer",
            help="recipe, torch (its fused AdamW), adamw, adamw_bf16, adamw_8bit.",
            show_default="recipe; torch with --preset",
        ),
    ] = None,
    clip: Annotated[
        float | None, typer.Option("--clip", help="Clip gradients to this norm; 0: never.", show_default="the recipe's")
    ] = None,
    in_backward: Annotated[
        bool, typer.Option("--in-backward", help="Update inside of the backward pass; with --clip 0.")
    ] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Rows of packed documents, 512 tokens each.")] = False,
    backend: Annotated[
        str | None, typer.Option("--scan", "--backend", help="Scan backend.", show_default="the recipe's")
    ] = None,
    against: Annotated[
        Words,
        typer.Option(
            "--against", help="transformers (its Llama of the same size), mamba_ssm (its model).", show_default="none"
        ),
    ] = None,
    prefill: Annotated[
        Words, typer.Option("--prefill", help="Also read prompts of these lengths.", show_default=False)
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option("--prefill-chunk", help="Tokens of a prompt read at once.", show_default="all")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", help="Measured prompts a length.", show_default="by time")
    ] = None,
    device: Device = "auto",
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Time a training step of a whole model on random tokens: forward with the loss, backward, clipping and optimizer.

    Shows tokens/s, the phases, peak memory, and the share of a matrix product's rate measured in the same run (MFU).

    Examples:

    - `moai bench train`

    - `moai bench train --recipe h100-2b --checkpointing selective,full`

    - `moai bench train --preset 2b --batch 4,8 --clip 0 --against transformers`

    - `moai bench train --preset 2b --steps 0 --prefill 32768,131072 --markdown`
    """
    from moai_core.bench import train as benchmark

    settings: dict[str, Any] = {
        "recipe": recipe,
        "preset": preset,
        "overrides": overrides or [],
        "batches": batch,
        "steps": steps,
    }
    settings |= {"lengths": seq_len, "checkpointing": checkpointing, "layers": layers, "precision": precision}
    settings |= {"optimizer": optimizer, "clip": clip, "packed": packed, "backend": backend, "against": against}
    settings |= {"in_backward": in_backward}
    settings |= {"prefill": prefill, "chunk": prefill_chunk, "repeats": repeats, "device": device}
    _show(lambda **tell: benchmark.run(**settings, **tell), benchmark.tables, json, markdown)


@app.command()
def decode(
    preset: Preset = None,
    batch: Annotated[Words, typer.Option("--batch", help="Rows: one or several.", show_default="1,8,64")] = None,
    form: Annotated[
        Words,
        typer.Option(
            "--format", help="Of the weights: none, int4, int8, fp8, nf4, …", show_default="none,int4; on a CPU none"
        ),
    ] = None,
    engine: Annotated[
        Words, typer.Option("--engine", help="graph, plain: one or both.", show_default="graph,plain")
    ] = None,
    layers: Layers = None,
    dtype: Dtype = "auto",
    repeats: Repeats = None,
    device: Device = "auto",
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Time generation: a step for one token a row, by engine, format of the weights and batch.

    Shows tokens/s, and bytes a second beside those of a large copy in the same run: a step reads every weight once.

    Examples:

    - `moai bench decode`

    - `moai bench decode --batch 1,64 --format none,int4,fp8 --markdown`

    - `moai bench decode --preset 8b --layers 4 --engine graph`
    """
    from moai_core.bench import decode as benchmark

    settings: dict[str, Any] = {"preset": preset, "layers": layers, "batches": batch, "formats": form}
    settings |= {"engines": engine, "dtype": dtype, "repeats": repeats, "device": device}
    _show(lambda **tell: benchmark.run(**settings, **tell), benchmark.tables, json, markdown)


@app.command()
def prefill(
    preset: Preset = None,
    length: Annotated[
        Words, typer.Option("--length", help="Tokens of a prompt: one or several.", show_default="8192,32768; 256")
    ] = None,
    form: Annotated[
        Words,
        typer.Option(
            "--format",
            help="Of the weights: none, fp8, int4, int8, nvfp4, mxfp4, nf4, bnb8.",
            show_default="none,fp8,int4; on a CPU none,int4",
        ),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option("--chunk", help="Tokens of a prompt read at once.", show_default="all")
    ] = None,
    layers: Layers = None,
    dtype: Dtype = "auto",
    repeats: Repeats = None,
    device: Device = "auto",
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Time the reading of a prompt by the format of the weights, all of which take turns, with the ratio to none.

    Examples:

    - `moai bench prefill`

    - `moai bench prefill --preset 8b --length 8192 --format none,fp8 --markdown`

    - `moai bench prefill --device cpu --format none,int4,int8`
    """
    from moai_core.bench import prefill as benchmark

    settings: dict[str, Any] = {"preset": preset, "layers": layers, "lengths": length, "formats": form, "chunk": chunk}
    settings |= {"dtype": dtype, "repeats": repeats, "device": device}
    _show(lambda **tell: benchmark.run(**settings, **tell), benchmark.tables, json, markdown)


for _command in (quality.twin, quality.context, quality.needle, quality.samples, quality.quality):
    app.command()(_command)
