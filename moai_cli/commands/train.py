"""`moai train`: a recipe in, a run folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from moai_cli import launch
from moai_cli.console import clean, console, print_json, table
from moai_cli.options import Json, Model, Recipe
from moai_cli.watch import Watch, clock

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE ~KEY -- LAUNCHER",
        help="Values that replace or (`~`) reset the recipe's; after `--`, torchrun's arguments.",
        show_default=False,
    ),
]


def train(
    recipe: Recipe,
    arguments: Arguments = None,
    model: Model = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume", help="auto: go on where the output folder stopped; never; or the checkpoint to go on from."
        ),
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Run folder; default: the recipe's, runs/NAME.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, memory, FLOPs and steps; train nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a model, or resume or fine-tune one.

    SIGINT and SIGTERM save before they end the run; the same command resumes it.

    Examples:

    - `moai train --recipe cpu-tiny`

    - `moai train --recipe a100-2b --dry-run`

    - `moai train --recipe cpu-tiny data.train=mytext/ ~data.valid train.steps=500 --output runs/mine`

    - `moai train --recipe cpu-tiny --model runs/mine data.train=chats.jsonl --output runs/tuned`

    - `moai train --recipe a100-2b data.train=text/ tokenizer=mine/ -- --nproc-per-node 4`
    """
    from moai_core import recipe as recipes

    overrides, launcher = launch.split(arguments or [])
    wanted = recipes.load(recipe, overrides)
    if dry_run:
        return _plan(wanted, json)
    from moai_core import device

    device.require(wanted)
    if launcher:
        flags = {"--model": model, "--resume": resume, "--output": output}
        command = [
            "train",
            "--recipe",
            recipe,
            *(f"{k}={v}" for k, v in flags.items() if v is not None),
            *(["--json"] if json else []),
            *overrides,
        ]
        return launch.launch(launcher, command)
    from moai_core import training

    with training.StopFlag().catching() as stop, Watch() as watch:
        result = training.train(wanted, model_path=model, resume=resume, output=output, on_event=watch, stop=stop)
    if launch.is_first():
        print_json(result.to_dict()) if json else show_result(result)


def _plan(recipe: Any, json: bool) -> None:
    from moai_core import plan

    cost = plan.plan(recipe)
    if json:
        print_json(cost.to_dict())
    else:
        table(("", "", ""), cost.rows(), title=recipe.name)


def show_result(result: Any) -> None:
    """The table at a run's end."""
    rows = [
        ("steps", f"{result.step:,}" + (f" ({result.skipped} skipped)" if result.skipped else "")),
        ("target tokens", f"{result.tokens:,}"),
    ]
    rows += [("train loss", f"{result.loss:.4f}")] if result.loss is not None else []
    if result.valid:
        rows += [
            ("validation loss", f"{result.valid['loss']:.4f}"),
            ("perplexity", f"{result.valid['perplexity']:.2f}"),
        ]
        rows += [("bits per byte", f"{result.valid['bits_per_byte']:.4f}")]
        for name, one in result.valid.get("sets", {}).items():
            rows += [(f"bits per byte, {name}", f"{one['bits_per_byte']:.4f}")]
        if result.best and result.best["step"] != result.valid["step"]:
            kept = result.run_dir / f"step-{result.best['step']}"
            where = str(kept) if kept.is_dir() else f"step {result.best['step']}"
            rows += [("best validation loss", f"{result.best['loss']:.4f} ({where})")]
    rows += [("tokens/s", f"{result.tokens_per_s:,.0f}")] if result.tokens_per_s else []
    rows += [("time", clock(result.seconds)), ("checkpoint", result.checkpoint)]
    table(("", "result"), rows)
    if result.sample:
        console.print(f"\n[bold]{escape(clean(result.sample['prompt']))}[/]{escape(clean(result.sample['text']))}\n")
    if result.plot:
        console.print(f"loss curve: {escape(str(result.plot))}")
