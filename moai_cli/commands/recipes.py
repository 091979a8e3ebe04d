"""`moai recipes ls|show|cp|check`: what can be trained, and what a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moai_cli.console import clean, console, err, fail, print_json, table
from moai_cli.options import Force, Json

app = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")

Name = Annotated[str, typer.Argument(help="Name of a packaged recipe, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value and ~key, as for `moai train`.", show_default=False)
]


@app.command(epilog="Example: `moai recipes ls`")
def ls(json: Json = False) -> None:
    """List the packaged recipes with their exact size, and whether the training step fits into one device."""
    from moai_core import plan, recipe

    found: list[dict[str, Any]] = []
    for name in recipe.names():
        one = recipe.load(name)
        cost = plan.plan(one)
        found.append(
            {
                "name": name,
                "parameters": cost.parameters["total"],
                "device": cost.device,
                "peak_bytes": cost.peak,
                "fits": cost.fits,
                "description": one.description,
            }
        )
    if json:
        print_json(found)
        return
    fits = {True: "yes", False: "no", None: "?"}
    rows = [
        (
            f["name"],
            f"{f['parameters']:,}",
            f["device"],
            f"{f['peak_bytes'] / 2**30:.1f} GiB",
            fits[f["fits"]],
            f["description"],
        )
        for f in found
    ]
    table(("recipe", "parameters", "made for", "peak", "fits", "description"), rows, right=(1, 3))


@app.command(epilog="Examples: `moai recipes show a100-2b`, `moai recipes show cpu-tiny train.steps=50 > mine.yaml`")
def show(
    name: Annotated[
        str | None, typer.Argument(help="Name of a packaged recipe, or a YAML file.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    everything: Annotated[bool, typer.Option("--all", help="Also the keys that are null by default.")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="List every key with type, default and meaning instead.")
    ] = False,
    json: Json = False,
) -> None:
    """Print a recipe with its bases and overrides resolved; a comment says where each value comes from."""
    from moai_core import recipe
    from moai_core.errors import UsageError

    if schema:
        rows = [(key, kind, default, help) for key, kind, default, help in recipe.schema()]
        if json:
            print_json([dict(zip(("key", "type", "default", "help"), row, strict=True)) for row in rows])
        else:
            shown = [
                (key, kind, "" if not kind else "null" if default is None else default, help)
                for key, kind, default, help in rows
            ]
            table(("key", "type", "default", "meaning"), shown)
        return
    if name is None:
        raise UsageError("name a recipe to show", hint=f"recipes: {', '.join(recipe.names())}")
    one = recipe.load(name, overrides or [])
    if json:
        print_json(one.to_dict())
    else:
        typer.echo("\n".join(clean(line) for line in recipe.annotate(one, everything=everything)))


@app.command(epilog="Example: `moai recipes cp cpu-tiny mine.yaml`")
def cp(
    name: Name,
    to: Annotated[Path, typer.Argument(help="Folder or YAML file to write.")] = Path("."),
    force: Force = False,
    json: Json = False,
) -> None:
    """Copy a recipe, to change it. The copy still extends the packaged bases."""
    from moai_core import recipe
    from moai_core.errors import UsageError, shell, storage_error

    source = recipe.find(name)
    target = to / source.name if to.is_dir() or to.suffix not in (".yaml", ".yml") else to
    if target.exists() and not force:
        raise UsageError(f"{target} exists", hint="--force overwrites it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_bytes(source.read_bytes())
        temporary.replace(target)
    except OSError as exc:  # a write that fails doesn't name its file
        raise storage_error(exc, target) from exc
    finally:
        temporary.unlink(missing_ok=True)
    if json:
        print_json({"from": str(source), "to": str(target)})
    else:
        console.print(clean(f"{target}: train it with moai train --recipe {shell(target)}"), markup=False)


@app.command(epilog="Example: `moai recipes check mine.yaml optim.lr=1e-4`")
def check(
    names: Annotated[list[str], typer.Argument(help="Recipes and files, and key=value or ~key to put over them.")],
    json: Json = False,
) -> None:
    """Validate recipes and print every error with its file and line; exit code 2 if there is one."""
    from moai_core import recipe

    overrides = [text for text in names if text.startswith("~") or "=" in text]
    results: list[dict[str, Any]] = []
    for name in [text for text in names if text not in overrides]:
        _, errors = recipe.check(name, overrides)
        results.append(
            {"recipe": name, "valid": not errors, "errors": [{"message": e.message, "hint": e.hint} for e in errors]}
        )
        for error in errors if not json else []:
            fail(error)
        if not errors and not json:
            console.print(clean(f"{name}: valid"), markup=False)
    if json:
        print_json(results)
    wrong = sum(not r["valid"] for r in results)
    if not results:
        err.print("name at least one recipe", markup=False)
    if wrong or not results:
        raise typer.Exit(2)
