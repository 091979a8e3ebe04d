"""`moai qat`: train a model in the form in which it will be stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moai_cli import launch
from moai_cli.commands.train import Arguments, show_result
from moai_cli.console import note, print_json, table
from moai_cli.options import Embeddings, GroupSize, Json, Model, Recipe
from moai_cli.watch import Watch


def qat(
    recipe: Recipe,
    arguments: Arguments = None,
    model: Model = None,
    mode: Annotated[str, typer.Option("--mode", help="full, scales or qlora.")] = "full",
    method: Annotated[
        str, typer.Option("--method", help="How a plain model is quantized first: int4, or bnb4 for qlora.")
    ] = "int4",
    bits: Annotated[int | None, typer.Option("--bits", help="4 or 8.", show_default="4")] = None,
    group_size: GroupSize = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="Without zeros, or with.", show_default="scales: with"),
    ] = None,
    embeddings: Embeddings = None,
    distill: Annotated[
        Path | None, typer.Option("--distill", help="A teacher, mostly the model before quantization.")
    ] = None,
    distill_weight: Annotated[float, typer.Option("--distill-weight", help="Of the teacher, 0 to 1.")] = 0.5,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the teacher's predictions.")] = 1.0,
    rank: Annotated[int, typer.Option("--rank", help="Of qlora's adapters.")] = 16,
    alpha: Annotated[float, typer.Option("--alpha", help="Adapters count alpha / rank.")] = 32.0,
    dropout: Annotated[float, typer.Option("--dropout", help="Before the adapters.")] = 0.0,
    merge: Annotated[
        str, typer.Option("--merge", help="After qlora, into RUN/merged: bf16, fp32, packed (as the base), none.")
    ] = "none",
    resume: Annotated[str, typer.Option("--resume", help="As in `moai train`.")] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder.", show_default="runs/NAME-qat-MODE")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the memory of weights, gradients and optimizer; train nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a quantized model, so that it loses less by being quantized.

    full: every weight, behind fake quantization; needs more memory than `moai train`. scales: only the scales and
    zeros of constant int4 codes; a tenth of the memory. qlora: adapters beside a constant 4-bit model; a tenth as well.
    The run folder holds the quantized model at every step: chat, generate and eval read it as it is.

    Examples:

    - `moai qat --recipe cpu-tiny --model runs/cpu-tiny --group-size 64 train.steps=200`

    - `moai qat -r h100-2b -m runs/mine --mode scales --distill runs/mine data.train=text/`

    - `moai qat -r h100-2b -m runs/mine --mode qlora --merge bf16 data.train=chats.jsonl -- --nproc-per-node 4`
    """
    from moai_core import device
    from moai_core import recipe as recipes
    from moai_core.quantize.plan import Settings
    from moai_core.quantize.qat import Options, learning_rate, memory
    from moai_core.quantize.qat import qat as run

    overrides, launcher = launch.split(arguments or [])
    settings = Settings(method, bits, group_size, symmetric, embeddings)
    options = Options(mode, settings, distill, distill_weight, temperature, rank, alpha, dropout)
    options.check()
    dtype = _merged(merge, mode)
    wanted = recipes.load(recipe, overrides)
    if not dry_run:
        device.require(wanted)
    rate = learning_rate(mode, wanted.model.numbers()["hidden_size"])
    folder = output or Path("runs") / f"{wanted.name}-qat-{mode}"
    if model is not None and not any(text.startswith(("optim.finetune_lr=", "optim.lr=")) for text in overrides):
        overrides = [*overrides, f"optim.finetune_lr={rate}"]
        wanted = recipes.load(recipe, overrides)
        note(f"learning rate {rate:g}, that of mode {mode}; optim.finetune_lr=… sets another")
    if model is None and mode == "full" and not dry_run:
        note("no --model: a new run begins with random weights; --model PATH trains one that you have")
    if dry_run:
        return _plan(memory(wanted, options), f"{wanted.name}, mode {mode}", json)
    if launcher:
        return launch.launch(launcher, _again(locals(), folder, overrides))
    from moai_core import training

    with training.StopFlag().catching() as stop, Watch() as watch:
        result = run(wanted, options, model_path=model, resume=resume, output=folder, on_event=watch, stop=stop)
    if not launch.is_first():
        return
    shown = result.to_dict()
    if dtype != "none" and mode == "qlora":
        from moai_core.data.tokenize import load_tokenizer
        from moai_core.quantize.qat import merge as merged

        words = load_tokenizer(str(result.checkpoint))
        place = merged(folder, folder / "merged", dtype=dtype, tokenizer=words)
        shown["merged"] = str(place)
        note(f"merged: {place}")
    print_json(shown) if json else show_result(result)


def _plan(found: dict[str, int], title: str, json: bool) -> None:
    if json:
        return print_json(found)
    rows = [(kind, f"{size / 1e9:,.2f} GB") for kind, size in [*found.items(), ("together", sum(found.values()))]]
    table(("memory", title), rows)
    note("activations come on top, as in `moai train --dry-run`; a teacher's weights too")


def _merged(name: str, mode: str) -> Any:
    import torch

    from moai_core.errors import UsageError

    known = {"none": "none", "bf16": torch.bfloat16, "fp32": torch.float32, "packed": None}
    if name not in known:
        raise UsageError(f"--merge can't be {name!r}", hint=f"choose one of: {', '.join(known)}")
    if name != "none" and mode != "qlora":
        raise UsageError(f"--merge is for --mode qlora (got --mode {mode})", hint="the others have nothing to merge")
    return known[name]


def _again(flags: dict[str, Any], folder: Path, overrides: list[str]) -> list[str]:
    """The command line that each process of a distributed run gets."""
    names = ("model", "mode", "method", "bits", "group_size", "embeddings", "distill", "distill_weight", "temperature",
             "rank", "alpha", "dropout", "merge", "resume")  # fmt: skip
    given = [f"--{name.replace('_', '-')}={flags[name]}" for name in names if flags[name] is not None]
    symmetric = {None: [], True: ["--symmetric"], False: ["--asymmetric"]}[flags["symmetric"]]
    more = [*symmetric, f"--output={folder}", *(["--json"] if flags["json"] else [])]
    return ["qat", "--recipe", flags["recipe"], *given, *more, *overrides]
