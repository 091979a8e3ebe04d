"""`moai doctor`: versions, devices, which scan and which quantized product runs and whether they compute the right
numbers, memory and disk."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moai_cli.console import clean, console, print_json, table
from moai_cli.options import Json

_SLOW = ", for want of a kernel: a loop over time, slow, and training keeps every step in memory"
_MARKS = {True: "ok", False: "BROKEN", None: "-"}


def doctor(
    json: Json = False,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the self-test's inputs.", show_default="fresh")
    ] = None,
) -> None:
    """Check the installation and this machine; the exit code is 1 when something is broken.

    Runs every scan backend that works here against a float64 reference, forward and backward, and the product that each
    quantized format gets.

    Examples:

    - `moai doctor`

    - `moai doctor --json`
    """
    import secrets

    report = _examine(secrets.randbits(32) if seed is None else seed)
    broken = [
        one for key in ("versions", "folders", "self_test", "products") for one in report[key] if one["ok"] is False
    ]
    if json:
        print_json({"ok": not broken, **report})
    else:
        _show(report)
        names = ", ".join(one.get("name") or f"{one['operation']} {one['backend']}" for one in broken)
        if broken:
            console.print(clean(f"\n{len(broken)} broken: {names}"), style="bold red", markup=False)
    if broken:
        raise typer.Exit(1)


def _examine(seed: int) -> dict[str, Any]:
    from moai_core import __version__
    from moai_core.bench import install

    report: dict[str, Any] = {"moai": __version__, "seed": seed, "versions": list(install.versions())}
    report |= {
        "devices": [],
        "backends": [],
        "fallbacks": [],
        "self_test": [],
        "products": [],
        "folders": list(install.folders()),
    }
    try:
        from moai_core.bench import selftest, selftest_products
    except (ImportError, OSError) as exc:
        # A torch that is missing or doesn't load is a finding like any other.
        found = {"version": None, "ok": False, "why": f"can't be imported: {exc}", "hint": "pip install moai"}
        report["versions"].append({"name": "moai_core.scan", **found})
        return report
    report["devices"] = selftest.devices()
    for device in report["devices"]:
        report["backends"] += selftest.backends(device["name"])
        report["fallbacks"] += [line for line in [selftest.fallback(device["name"])] if line]
        report["self_test"] += selftest.self_tests(device["name"], seed)
        report["products"] += selftest_products.products(device["name"], seed)
    return report


def _show(report: dict[str, Any]) -> None:
    versions = [(v["name"], v["version"] or "", _MARKS[v["ok"]], _reason(v)) for v in report["versions"]]
    table(("package", "version", "", ""), [("moai", report["moai"], "ok", ""), *versions])
    console.print()
    devices = [
        (d["name"], d["label"], _gib(d["memory"]), _gib(d["free"]), "yes" if d["bf16"] else "no")
        for d in report["devices"]
    ]
    table(("device", "product", "memory", "free", "bf16 in hardware"), devices, right=(2, 3))
    console.print()
    picks = [
        (b["device"], b["operation"], b["backend"], b["why_not"] or f"picked{_SLOW if b['slow'] else ''}")
        for b in report["backends"]
    ]
    table(("device", "operation", "backend", ""), picks)
    for line in report["fallbacks"]:
        console.print(clean(line), style="yellow", markup=False)
    console.print()
    tests = [
        (
            *(f"{t['device']} {t['dtype']}", t["operation"], t["backend"], _MARKS[t["ok"]]),
            *(f"{t['forward']:.1e}", f"{t['backward']:.1e}", f"{t['tolerance']:.0e}", t["why"] or ""),
        )
        for t in report["self_test"]
    ]
    table(("self-test", "operation", "backend", "", "forward", "backward", "allowed", ""), tests, right=(4, 5, 6))
    console.print()
    products = [
        (
            f"{p['device']} {p['dtype']}",
            p["format"],
            _MARKS[p["ok"]],
            f"{p['forward']:.1e}",
            p["why"] or p["description"],
        )
        for p in report["products"]
    ]
    table(("quantized", "format", "", "error", "multiplied by"), products, right=(3,))
    console.print(f"errors relative to float64; seed {report['seed']}", style="dim")
    console.print()
    folders = [(f["name"], f["path"], _gib(f["free"]), _MARKS[f["ok"]], _reason(f)) for f in report["folders"]]
    table(("folder", "path", "free", "", ""), folders, right=(2,))


def _reason(finding: dict[str, Any]) -> str:
    return "; ".join(text for text in (finding["why"], finding["hint"]) if text)


def _gib(n: int | None) -> str:
    return "" if n is None else f"{n / 2**30:.1f} GiB"
