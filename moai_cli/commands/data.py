"""`moai data build|show|check`: training text from many sources, with its licences and held-out parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moai_cli.console import clean, console, fail, print_json, table
from moai_cli.options import Force, Json

app = typer.Typer(no_args_is_help=True, help="Build training text from many sources; show and check it.")

Recipe = Annotated[str, typer.Argument(help="Data recipe: a YAML file, or the name of a packaged one.")]
Root = Annotated[
    Path | None,
    typer.Option(
        "--root", help="Folder that the recipe's paths start from; default: the recipe's.", show_default=False
    ),
]
What = Annotated[str, typer.Argument(help="A folder that `moai data build` wrote, or a data recipe.")]


@app.command(epilog="Example: `moai data build moai-30m --root corpus/ --output mix/`")
def build(
    recipe: Recipe,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("mix"),
    root: Root = None,
    level: Annotated[int, typer.Option("--level", help="zstd's, 1 to 19.", min=1, max=19)] = 9,
    shard_mb: Annotated[int, typer.Option("--shard-mb", help="Unpacked MB a file.", min=1, max=65536)] = 256,
    force: Force = False,
    json: Json = False,
) -> None:
    """Read, clean, filter and deduplicate the sources of a recipe, hold text out, and write it as jsonl.zst files.

    The same files and recipe give the same bytes. The folder appears whole or not at all.
    """
    from moai_cli.watch import Watch
    from moai_core.data import mix

    file = mix.find(recipe)
    with Watch() as watch:
        made = mix.build(
            mix.load(file),
            output,
            root=file.parent if root is None else root,
            force=force,
            level=level,
            shard_bytes=shard_mb << 20,
            on_event=watch,
        )
    print_json(made) if json else _show(made, output)


@app.command(epilog="Examples: `moai data show mix/`, `moai data show mix/ --samples 2`, `moai data show moai-30m`")
def show(
    what: What,
    samples: Annotated[int, typer.Option("--samples", help="Print so many random records a source.", min=0)] = 0,
    part: Annotated[str, typer.Option("--part", help="Of which part: train, valid or calib.")] = "train",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", help="Count tokens with it: folder (a model's or a run's too) or name.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random records.")] = 0,
    json: Json = False,
) -> None:
    """Print what a mix holds by source and why the rest was dropped, random records of it, or a recipe's sources."""
    from moai_core.data import mix
    from moai_core.data.mix import report
    from moai_core.errors import UsageError

    folder = Path(what)
    if not folder.is_dir():
        return _sources(mix.load(mix.find(what)), json)
    made = report.read(folder)
    if part not in ("train", "valid", "calib"):
        raise UsageError(f"--part must be train, valid or calib (got {part!r})")
    if samples:
        found = report.samples(folder, part, samples, seed)
        if json:
            return print_json(found)
        for source, texts in found.items():
            console.rule(clean(source), align="left")
            for text in texts:
                console.print(clean(text) + "\n", markup=False)
        return None
    if tokenizer is not None:
        from moai_core.data.tokenize import load_tokenizer

        counts = report.tokens(folder, part, load_tokenizer(tokenizer))
        for source in made["sources"]:
            source["tokens"] = counts.get(source["name"], 0)
    return print_json(made) if json else _show(made, folder)


@app.command(epilog="Examples: `moai data check moai-30m --root corpus/`, `moai data check mix/`")
def check(what: What, root: Root = None, json: Json = False) -> None:
    """Validate a recipe and that its files are there; or a mix: every byte, and that no line of its held-out text is in
    training.

    Exit code 2 for a wrong recipe or text in both parts, 3 for a damaged folder.
    """
    from moai_core.data import mix
    from moai_core.data.mix import verify
    from moai_core.errors import MoaiError

    folder = Path(what)
    errors: list[MoaiError] = []
    if folder.is_dir():
        found = verify.folder(folder)
        errors += found.pop("errors")
    else:
        file = mix.find(what)
        recipe, wrong = mix.check(file)
        errors += wrong or verify.files(recipe, file.parent if root is None else root)
        found = {"recipe": str(file), "sources": 0 if recipe is None else len(recipe.sources)}
    if json:
        print_json({**found, "valid": not errors, "errors": [{"message": e.message, "hint": e.hint} for e in errors]})
    else:
        for error in errors:
            fail(error)
        if not errors:
            console.print(
                clean(f"{what}: " + ", ".join(f"{key} {value}" for key, value in found.items())), markup=False
            )
    if errors:
        raise typer.Exit(errors[0].exit_code)


def _sources(recipe: Any, json: bool) -> None:
    from moai_core.recipe.schema import items, plain

    if json:
        hidden = ("rules", "place", "where", "columns")
        told = [{k: plain(v) for k, v in items(s) if k not in hidden and v is not None} for s in recipe.sources]
        return print_json({"name": recipe.name, "description": recipe.description, "sources": told})
    rows = [(s.name, s.lang, s.path, f"{s.weight:g}", s.licence, s.origin) for s in recipe.sources]
    return table(("source", "lang", "path", "weight", "licence", "origin"), rows, title=recipe.name, right=(3,))


def _show(made: dict[str, Any], folder: Path) -> None:
    counted = any("tokens" in source for source in made["sources"])
    rows = []
    for source in made["sources"]:
        kept, read = source["kept"], source["read"]["bytes"]
        size = {part: kept.get(part, {}).get("bytes", 0) for part in ("train", "valid", "calib")}
        why = sorted(source["dropped"].items(), key=lambda item: -item[1]["bytes"])[:3]
        share = f"{sum(size.values()) / read:.0%}" if read else ""
        seen = kept.get("train with weight", {}).get("bytes", 0)
        row = [source["name"], source["lang"], _mb(read), share, _mb(size["train"]), _mb(seen), _mb(size["valid"])]
        row += [_mb(size["calib"])] + ([f"{source.get('tokens', 0):,}"] if counted else [])
        rows.append((*row, ", ".join(f"{name} {_mb(c['bytes'])}" for name, c in why)))
    columns = ["source", "lang", "read MB", "kept", "train", "weighted", "valid", "calib"]
    columns += (["tokens"] if counted else []) + ["dropped most (MB)"]
    table(columns, rows, title=f"{made['name']}: {folder}", right=range(2, len(columns) - 1))
    totals = made["totals"]
    sums = [(part, f"{c.get('records', 0):,}", _mb(c["bytes"])) for part, c in totals["kept"].items()]
    console.print()
    table(("part", "records", "MB"), sums, right=(1, 2))
    packed = sum(file["packed"] for file in made["files"].values())
    console.print(f"\n{len(made['files'])} files, {_mb(packed)} MB packed: {clean(str(folder))}", markup=False)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}" if size >= 50_000 else f"{size / 1e6:.3f}" if size else "0"
