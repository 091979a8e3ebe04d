"""Options that several commands share, declared once so that they look and behave alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moai_core.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is already there.")]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        help="Run folder, step-N checkpoint, or Hugging Face folder of a moai model.",
        show_default=False,
    ),
]
Recipe = Annotated[
    str, typer.Option("--recipe", "-r", help="Name of a recipe (`moai recipes ls`) or a YAML file.", show_default=False)
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto.")]
Scan = Annotated[str, typer.Option("--scan", help="Scan backend; `moai doctor` lists them.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the random numbers.")]

# ---- quantize and qat

GroupSize = Annotated[
    int | None,
    typer.Option("--group-size", help="Columns that share a scale: 32, 64, 128, 256; 0: a row.", show_default="128"),
]
Embeddings = Annotated[
    str | None, typer.Option("--embeddings", help="bf16 (as stored), int8, int4.", show_default="int8")
]

# ---- generate and chat

Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Tokenizer folder or name, if the model has none of its own.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", "-n", help="End after so many tokens.", show_default="256")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", help="0 always takes the likeliest token.", show_default="0.8")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Choose among the K likeliest tokens; 0: all.", show_default="0")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Choose among the likeliest tokens that hold this probability.", show_default="0.95"),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", help="Drop tokens below this fraction of the likeliest's probability.", show_default="0"),
]
Repetition = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1, tokens that occurred become less likely.", show_default="1"),
]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End at this text; may be repeated.")]
SeedOrNone = Annotated[int | None, typer.Option("--seed", help="Seed of the random numbers.", show_default="a new one")]

Engine = Annotated[
    str,
    typer.Option("--engine", help="What decodes: graph (fused kernels on a GPU), plain (the model itself), or auto."),
]


def sampling(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings among the flags given, checked; an error names the flag."""
    from moai_core.generation.sampling import SETTINGS, check_settings

    values = {name: flags[name] for name in SETTINGS if flags.get(name) is not None}
    check_settings(values, lambda name: "--" + name.replace("_", "-"))
    return values


def compile_ahead(model: Path, device: str) -> None:
    """Have a processor's kernels compiled while everything else is loaded, if it is the one that will answer and moai
    runs there for the first time. To be called before anything that takes time."""
    if device == "cpu" or (device == "auto" and not Path("/dev/nvidia0").exists()):
        from moai_core.cpu import warm

        try:
            quantized = '"quantization": {' in (model / "config.json").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            quantized = False
        warm.begin(quantized)


def required_model(path: Path | None) -> Path:
    """The model named; if none was, an error that says how to get one."""
    if path is not None:
        return path
    runs = sorted(Path("runs").glob("*/step-*/manifest.json"), key=lambda file: file.stat().st_mtime)
    if runs:
        raise UsageError("no model given", hint=f"the newest one here: --model {runs[-1].parent.parent}")
    raise UsageError("no model given", hint="train one with `moai train --recipe cpu-tiny`, then --model runs/cpu-tiny")
