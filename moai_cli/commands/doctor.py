"""`moai doctor`: versions, devices, which scan runs and whether it computes the right numbers, memory and disk."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moai_cli.console import clean, console, print_json, table
from moai_cli.options import Json

_MARKS = {True: "ok", False: "BROKEN", None: "-"}


def doctor(
    json: Json = False,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the self-test's inputs.", show_default="fresh")
    ] = None,
) -> None:
    """Check the installation and this machine; the exit code is 1 when something is broken.

    Runs every scan backend that works here against a float64 reference, forward and backward. Example: `moai doctor
    --json`
    """
    import secrets

    from moai_core import __version__
    from moai_core.bench import install

    seed = secrets.randbits(32) if seed is None else seed
    versions, folders = list(install.versions()), list(install.folders())
    devices: list[dict[str, Any]] = []
    backends: list[dict[str, Any]] = []
    tests: list[dict[str, Any]] = []
    try:
        from moai_core.bench import selftest
    except (ImportError, OSError) as exc:
        # A torch that is missing or doesn't load is a finding like any other.
        versions.append(
            {
                "name": "moai_core.scan",
                "version": None,
                "ok": False,
                "why": f"can't be imported: {exc}",
                "hint": "pip install moai",
            }
        )
    else:
        devices = selftest.devices()
        backends = [one for device in devices for one in selftest.backends(device["name"])]
        tests = [one for device in devices for one in selftest.self_tests(device["name"], seed)]
    broken = [one for one in (*versions, *folders, *tests) if one["ok"] is False]
    if json:
        report = {"moai": __version__, "ok": not broken, "versions": versions, "devices": devices, "backends": backends}
        print_json({**report, "self_test": tests, "folders": folders})
        raise typer.Exit(1 if broken else 0)

    rows = [(v["name"], v["version"] or "", _MARKS[v["ok"]], _reason(v)) for v in versions]
    table(("package", "version", "", ""), [("moai", __version__, "ok", ""), *rows])
    console.print()
    memory = [
        (d["name"], d["label"], _gib(d["memory"]), _gib(d["free"]), "yes" if d["bf16"] else "no") for d in devices
    ]
    table(("device", "product", "memory", "free", "bf16 in hardware"), memory, right=(2, 3))
    console.print()
    picks = [(b["device"], b["operation"], b["backend"], "picked" if b["picked"] else b["why_not"]) for b in backends]
    table(("device", "operation", "backend", ""), picks)
    console.print()
    what = [(f"{t['device']} {t['dtype']}", t["operation"], t["backend"], _MARKS[t["ok"]]) for t in tests]
    errors = [(f"{t['forward']:.1e}", f"{t['backward']:.1e}", f"{t['tolerance']:.0e}", t["why"] or "") for t in tests]
    tested = [(*a, *b) for a, b in zip(what, errors, strict=True)]
    table(("self-test", "operation", "backend", "", "forward", "backward", "allowed", ""), tested, right=(4, 5, 6))
    console.print(f"errors relative to float64; seed {seed}", style="dim")
    console.print()
    table(
        ("folder", "path", "free", "", ""),
        [(f["name"], f["path"], _gib(f["free"]), _MARKS[f["ok"]], _reason(f)) for f in folders],
        right=(2,),
    )
    if broken:
        console.print(
            clean(f"\n{len(broken)} broken: " + ", ".join(one.get("name") or one["backend"] for one in broken)),
            style="bold red",
        )
        raise typer.Exit(1)


def _reason(finding: dict[str, Any]) -> str:
    return "; ".join(text for text in (finding["why"], finding["hint"]) if text)


def _gib(n: int | None) -> str:
    return "" if n is None else f"{n / 2**30:.1f} GiB"
