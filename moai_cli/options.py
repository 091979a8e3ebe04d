"""Options that several commands share, declared once so that they look and behave alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto.")]
Scan = Annotated[str, typer.Option("--scan", help="Scan backend; `moai doctor` lists them.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the random numbers.")]
