"""`moai init`: a project folder that trains at once, to be filled with one's own text."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from moai_cli.console import clean, console, print_json
from moai_cli.options import Force, Json

_RECIPE = """\
# What {name} is and how it trains. Everything not said here comes from the recipe it extends:
#   moai recipes show recipe.yaml     every value, and where it comes from
#   moai recipes show --schema        every key, and what it means
description: {name}
name: {name}
extends: {extends}
tokenizer: {tokenizer}
data:
  train: data/train          # your text: file, folder, glob or hf://dataset; txt, md, jsonl, json, csv, tsv, parquet
  valid: data/valid
train:
  steps: {steps}                  # enough to see the sample data learned; remove both lines for your own text
  effective_batch: {rows}
"""

_NOTES = """\
# {name}

Run these in this folder.

| command | what it does |
|---|---|
| `moai train --recipe recipe.yaml --dry-run` | parameters, memory and steps, before anything runs |
| `moai train --recipe recipe.yaml` | trains; run it again to go on where it stopped |
| `moai generate --model {run} --prompt "..."` | continues a text |
| `moai chat --model {run}` | talks to the model |
| `moai eval --model {run} --data data/valid` | perplexity and bits per byte |
| `moai doctor` | versions, devices, and which scan runs |

Change a value for one run with `key=value` at the end of the command, for good in `recipe.yaml`.

`data/train` and `data/valid` hold a few lines of Korean, English, Japanese and Chinese, text and chats, to show the
formats. Put your own files there, one record a line: `{{"text": "..."}}` or
`{{"messages": [{{"role": "user", "content": "..."}}, ...]}}`.
"""


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make or fill.")] = Path("."),
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the project and its runs.", show_default="the folder's")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe to build on.", show_default="by the GPU found")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Name or folder.", show_default="the recipe's")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a project folder: a recipe for this machine, sample data in four languages, a tokenizer, notes with the
    next commands.

    Asks for what no option gives when it has a terminal, with defaults to accept by Enter.

    Examples:

    - `moai init mine`

    - `moai init mine --yes --recipe a100-2b --tokenizer path/to/tokenizer`
    """
    from moai_core import recipe as recipes
    from moai_core.errors import UsageError

    _check_folder(folder, force)
    ask = not yes and not json and sys.stdin.isatty() and sys.stdout.isatty()
    name = _chosen("name", name, folder.absolute().name or "moai", ask)
    if not name.strip() or name in (".", "..") or any(c in name for c in '/\\:"|`\0') or not name.isprintable():
        raise UsageError(f"--name must be usable as a folder's name (got {clean(name)!r})")
    recipe = _chosen(
        f"recipe ({', '.join(recipes.names())})", recipe, _for_this_machine() if recipe is None else "", ask
    )
    base = recipes.find(recipe)
    extends = str(base.absolute()) if recipe not in recipes.names() else recipe
    loaded = recipes.load(recipe, ["train.steps=1", "~train.epochs"])
    tokenizer = _tokenizer(_chosen("tokenizer (name or folder)", tokenizer, loaded.tokenizer or "moai_tiny", ask))

    values = {"name": name, "extends": extends, "tokenizer": tokenizer, "steps": 40, "rows": loaded.train.batch_size}
    written = _write(folder, values)
    if json:
        print_json({"folder": str(folder), "recipe": recipe, "tokenizer": tokenizer, "name": name, "files": written})
        return
    for path in written:
        console.print(clean(f"  {folder / path}"), markup=False)
    go = "" if folder.absolute() == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    console.print(clean(f"next: {go}moai train --recipe recipe.yaml"), markup=False)


def _chosen(label: str, given: str | None, default: str, ask: bool) -> str:
    return given if given is not None else typer.prompt(label, default=default) if ask else default


def _for_this_machine() -> str:
    from moai_core import device

    kind = device.nearest_class()
    return "cpu-tiny" if kind == "cpu" else f"{kind}-2b"


def _tokenizer(text: str) -> str:
    """A name as it is, a folder as its absolute path."""
    from moai_core import paths
    from moai_core.errors import UsageError
    from moai_core.storage import tokenizer_folder

    names = sorted(p.name for p in paths.TOKENIZERS.iterdir() if p.is_dir())
    if text in names:
        return text
    folder = tokenizer_folder(text)
    if folder is not None and (folder / "tokenizer.json").is_file():
        given = Path(text).expanduser()
        return str(given.absolute()) if given.is_dir() else text
    hint = f"give one of {', '.join(names)}, or a folder with tokenizer.json, a model's or a run's"
    raise UsageError(f"no tokenizer {clean(text)!r}", hint=hint)


def _check_folder(folder: Path, force: bool) -> None:
    from moai_core.errors import UsageError

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", hint="name a folder")
    if folder.is_dir() and not force and any(p.name != ".git" for p in folder.iterdir()):
        raise UsageError(f"{folder} is not empty", hint="name another folder, or --force to write into this one")


def _write(folder: Path, values: dict[str, object]) -> list[str]:
    """Writes everything beside the folder first, checks it, and moves it in: on an error nothing is left."""
    import yaml

    from moai_core import paths
    from moai_core import recipe as recipes
    from moai_core.errors import storage_error

    target = folder.absolute()
    existed = target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    temporary = target / f".moai-init-{os.getpid()}"
    try:
        temporary.mkdir()
        quoted = {k: yaml.safe_dump(v, allow_unicode=True, width=10**6).splitlines()[0] for k, v in values.items()}
        (temporary / "recipe.yaml").write_text(_RECIPE.format(**quoted), encoding="utf-8")
        (temporary / "NOTES.md").write_text(
            _NOTES.format(name=values["name"], run=shlex.quote(f"runs/{values['name']}")), encoding="utf-8"
        )
        (temporary / ".gitignore").write_text("runs/\n", encoding="utf-8")
        sample = paths.RECIPES / "sample"
        for source in sorted(sample.rglob("*.jsonl")):
            file = temporary / "data" / source.relative_to(sample)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(source.read_bytes())
        recipes.load(temporary / "recipe.yaml")
        files = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())
        for name in files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, target / name)
        return files
    except BaseException as exc:
        if not existed:
            shutil.rmtree(target, ignore_errors=True)
        if isinstance(exc, OSError):  # a write that fails doesn't name its file
            raise storage_error(exc, target) from exc
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
