"""Options that several commands share, declared once so that they look and behave alike."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moai_cli import console
from moai_core import paths
from moai_core.errors import UsageError, shell


def by_name(model: Any) -> Any:
    """The folder of a model that comes with moai, for its name; any other path (or None), and one that exists, as it
    is."""
    return model if model is None or Path(model).exists() else paths.pretrained(str(model)) or model


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is already there.")]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        help="Run folder, step-N checkpoint, Hugging Face folder of a moai model, or moai-30m, which comes with moai.",
        show_default=False,
        callback=by_name,
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
    str | None, typer.Option("--tokenizer", help="Folder (a model's or run's too) or name, if the model has none.")
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


@contextmanager
def loading(model: Path, device: str) -> Iterator[None]:
    """Around the imports of torch and transformers, before anything else that takes time. Meanwhile a processor's
    kernels are compiled, if it is the one that will answer and moai runs there for the first time. What is imported
    stays: searching it for garbage, while it is made and at the exit, took a third of a short command's time.
    """
    if device == "cpu" or (device == "auto" and not Path("/dev/nvidia0").exists()):
        from moai_core.cpu import warm

        warm.begin(bool(_formats(model)))
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _formats(model: Path) -> list[str]:
    """Of a quantized model's modules, as far as its config.json says it legibly; who loads it says what is wrong."""
    try:
        modules = json.loads((model / "config.json").read_text(encoding="utf-8"))["quantization"]["modules"]
        return [one["format"] for one in modules.values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def required_model(path: Path | None) -> Path:
    """The model named; if none was, the one that comes with moai, with a line that says so. Raises UsageError where
    there is none."""
    if path is not None:
        return path
    runs = sorted(Path("runs").glob("*/step-*/manifest.json"), key=lambda file: file.stat().st_mtime)
    newest = f"--model {shell(runs[-1].parent.parent)}" if runs else None
    if (folder := paths.pretrained()) is not None:
        other = f"{newest} takes the newest run here" if newest else "--model takes another"
        console.note(f"using {folder.name}, the model that comes with moai ({_about(folder)}); {other}")
        return folder
    if newest:
        raise UsageError("no model given", hint=f"the newest one here: {newest}")
    raise UsageError("no model given", hint="train one with `moai train --recipe cpu-tiny`, then --model runs/cpu-tiny")


def _about(folder: Path) -> str:
    from moai_core import config, footprint

    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    numbers = config.fields(**{name: values[name] for name in config.DEFAULTS if name in values})
    stored = max(formats, key=formats.count) if (formats := _formats(folder)) else values.get("dtype")
    return f"{footprint.parameters(numbers)['total'] / 1e6:.1f}M parameters, {stored}"
