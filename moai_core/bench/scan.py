"""The selective scan and the causal convolution against other implementations, and against attention.

    python -m moai_core.bench.scan [--seq-len 2048,8192] [--batch 8] [--dim 4096] [--against mamba_ssm,attention]

What is timed is the whole fused operation of `moai_core.scan.scan`, channel-last, with time-step bias, skip and gate;
`forward` without gradients, `forward+backward` with those of every input. All take turns in one process on fresh
random values. `mamba_ssm` gets its own layout (B, I, L), the transposes around it uncounted. `attention` is torch's
fused causal attention at the same model width, heads of 128 over H = I / 2: only what happens between the projections,
as for the scan. `reference` is the loop that defines the scan. A first stretch of every result is compared with that
loop. Leaves out the projections around, which `moai_core.bench.lengths` and `moai_core.bench.train` measure.

Letters: B batch, L tokens, I channels, N states a channel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moai_core import scan as kernels
from moai_core.bench import report, timing
from moai_core.bench.report import Table
from moai_core.bench.timing import Clock
from moai_core.bench.work import CONV_WIDTH, DIRECTIONS, Inputs, Shape, agreement, cases, picked, recorded
from moai_core.device import place
from moai_core.errors import UsageError
from moai_core.scan import reference

RIVALS = ("mamba_ssm", "attention", "reference", "conv")
# The relative norm error above which a result is called wrong.
_WRONG = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def preset(name: str) -> list[Shape]:
    """The shapes of a --preset. UsageError."""
    if name != "h100":
        raise UsageError(f"--preset: unknown name {name!r}", hint="choose among h100")
    return [Shape(*(row[key] for key in ("batch", "length", "dim", "state"))) for row in recorded()["scan"]]


# ---- the measurement


def check_rivals(asked: Sequence[str], device: torch.device, dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """(rivals to measure, notes on those left out). One that was named and can't run raises UsageError; with `auto`
    it is left out with a note."""
    if list(asked) == ["none"]:
        return [], []
    auto = list(asked) == ["auto"]
    names = list(RIVALS) if auto else report.among("--against", asked, (*RIVALS, "auto", "none"))
    if not auto and {"auto", "none"} & set(names):
        raise UsageError("--against: auto and none stand alone", hint=f"choose among {', '.join(RIVALS)}")
    notes = []
    if "mamba_ssm" in names:
        why = dict(kernels.explain(device, dtype))["mamba_ssm"]
        if why is not None and not auto:
            raise UsageError(f"--against mamba_ssm: {why}", hint="leave it out of --against, or use --against auto")
        if why is not None:
            names.remove("mamba_ssm")
            notes.append(f"mamba_ssm left out: {why}")
    return names, notes


def measure(
    shapes: Sequence[Shape],
    *,
    device: torch.device,
    dtype: torch.dtype,
    against: Sequence[str] = ("auto",),
    resets: bool = False,
    backend: str = "auto",
    repeats: int | None = None,
    limit: float = 20.0,
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Times every shape; see `row` for what a result holds.

    limit: seconds that one of the compared may take; what would take longer is left out with the reason. Returns
    {"benchmark", "environment", "dtype", "results", "recorded", "notes"}, JSON-able. Raises UsageError for shapes,
    rivals and backends that can't be.
    """
    for shape in shapes:
        check_shape(shape)
    rivals, notes = check_rivals(against, device, dtype)
    operations = ["scan", *(["conv"] if "conv" in rivals else [])]
    for shape in shapes:
        for operation in operations:
            kernels.pick(device, dtype, backend=backend, op=operation, seq_idx=resets, N=shape.state, K=CONV_WIDTH)
    known = recorded()
    there = device.type == "cuda" and known["gpu"] in torch.cuda.get_device_name(device)
    clock, results = Clock(device), []
    todo = [(s, o, d) for s in shapes for o in operations for d in DIRECTIONS]
    inputs: Inputs | None = None
    for number, (shape, operation, direction) in enumerate(todo):
        if inputs is None or inputs.shape != shape or operation == "conv":
            inputs = None  # frees the old ones before the new ones are made
            inputs = Inputs(shape, dtype, clock)

        def tell(name: str, number: int = number, what: str = f"{operation} {direction} {shape}") -> None:
            on_event({"event": "progress", "task": f"{what}: {name}", "done": number, "total": len(todo)})

        tell("moai")
        found = row(
            inputs, operation, direction, backend=backend, against=rivals, resets=resets, repeats=repeats, limit=limit,
            on_call=tell,
        )  # fmt: skip
        results.append({**found, "recorded_ms": figures(shape, operation, direction, dtype) if there else None})
        notes += [note for note in remarks(results[-1], inputs) if note not in notes]
    on_event({"event": "progress", "task": "done", "done": len(todo), "total": len(todo)})
    return {
        "benchmark": "scan",
        "environment": report.environment(device, command),
        "dtype": report.short(dtype),
        "results": results,
        "recorded": {key: known[key] for key in ("gpu", "source", "date")} if there else None,
        "notes": notes,
    }


def figures(shape: Shape, operation: str, direction: str, dtype: torch.dtype) -> dict[str, float] | None:
    """{"mamba_ssm", "goal"}: milliseconds known of this shape in bf16 on the GPU of `recorded`; None without any."""
    key = f"{operation} {direction}"
    for one in recorded()["scan"] if dtype == torch.bfloat16 else ():
        if Shape(one["batch"], one["length"], one["dim"], one["state"]) == shape:
            return {who: one[who][key] for who in ("mamba_ssm", "goal") if key in one[who]} or None
    return None


def check_shape(shape: Shape) -> None:
    """UsageError for a shape that no kernel takes."""
    if shape.dim % 8:
        raise UsageError(f"--dim must be a multiple of 8 (got {shape.dim})", hint=f"use {shape.dim // 8 * 8 + 8}")
    if shape.state > 256:
        raise UsageError(f"--state must be at most 256 (got {shape.state})")


def row(
    inputs: Inputs,
    operation: str,
    direction: str,
    *,
    backend: str,
    against: Sequence[str],
    resets: bool,
    repeats: int | None,
    limit: float,
    on_call: Callable[[str], None],
) -> dict[str, Any]:
    """One operation in one direction at one shape.

    {"operation", "direction", "batch", "length", "dim", "state", "backend", "timings": {name: timing},
    "ratios": {name: how many times the time of moai}, "us_per_million", "error", "left_out": {name: why}}; names are
    moai, packed and the rivals, a timing is `Timing.to_dict`.
    """
    shape = inputs.shape
    compared = timing.compare(
        cases(inputs, operation, direction, backend=backend, against=against, resets=resets),
        shape.length, inputs.clock, limit=limit, repeats=repeats, on_call=on_call,
    )  # fmt: skip
    ours = compared.timings.get("moai")
    found: dict[str, Any] = {"operation": operation, "direction": direction, **vars(shape)}
    found |= {"backend": picked(inputs, operation, backend, False)}
    found |= {"timings": {name: one.to_dict() for name, one in compared.timings.items()}}
    others = {name: one for name, one in compared.timings.items() if name != "moai"} if ours else {}
    found |= {"ratios": {name: one.median / ours.median for name, one in others.items()} if ours else {}}
    found |= {"us_per_million": ours.median * 1e6 / shape.millions if ours else None}
    found |= {"error": agreement(inputs, operation, backend) if ours and direction == "forward" else None}
    return {**found, "left_out": compared.left_out}


def remarks(found: dict[str, Any], inputs: Inputs) -> list[str]:
    """What a reader of a row must know: who was left out, a slow backend, a wrong result."""
    what = f"{found['operation']} {found['direction']}, {inputs.shape}"
    notes = [f"{name} left out of {what}: {why}" for name, why in found["left_out"].items()]
    if kernels.BACKENDS[found["backend"]] is reference:
        notes.append(f"moai's {found['operation']} is the reference here, for want of a kernel; `moai doctor` says why")
    error = found["error"]
    if error is not None and not error <= _WRONG[inputs.dtype]:
        notes.append(f"WRONG RESULT: {what} differs from the reference by {error:.1e}")
    return notes


# ---- what is shown


_BRIEF = {"forward": "fwd", "forward+backward": "fwd+bwd"}


def tables(found: dict[str, Any]) -> list[Table]:
    """The report as one table; a rival's cell has its time and how many times moai's that is."""
    rows, results = [], found["results"]
    names = [name for name in ("packed", *RIVALS) if any(name in one["timings"] for one in results)]
    some = any(one["recorded_ms"] for one in results)
    for one in results:
        ours = one["timings"].get("moai")
        spread = f"{report.ms(ours['low_ms'])}-{report.ms(ours['high_ms'])}" if ours else ""
        line = [f"{one['operation']} {_BRIEF[one['direction']]}", str(_shape(one))]
        line += [report.ms(ours["median_ms"]) if ours else "left out", spread]
        line.append(report.ms(one["us_per_million"]))
        line += [_cell(one["timings"].get(name), one["ratios"].get(name)) for name in names]
        known = one["recorded_ms"] or {}
        if some:
            line += [_known(known.get(who), ours) for who in ("mamba_ssm", "goal")]
        rows.append(tuple(line))
    columns = ["operation", "B x L x I", "moai ms", "quartiles", "µs/M", *names]
    columns += [f"mamba_ssm ({found['recorded']['date']})", "goal"] if some else []
    backends = ", ".join(dict.fromkeys(f"{one['operation']}: {one['backend']}" for one in results))
    title = f"{found['dtype']}; backend {backends}; medians in ms, (times moai's); µs/M a million of B x L x I"
    return [Table(title, tuple(columns), rows, left=2)]


def _shape(one: dict[str, Any]) -> Shape:
    return Shape(*(one[key] for key in ("batch", "length", "dim", "state")))


def _cell(time: dict[str, Any] | None, ratio: float | None) -> str:
    if time is None:
        return "-"
    return report.ms(time["median_ms"]) + (f" ({ratio:.2f}x)" if ratio is not None else "")


def _known(ms: float | None, ours: dict[str, Any] | None) -> str:
    return "" if ms is None else _cell({"median_ms": ms}, ms / ours["median_ms"] if ours else None)


def curves(found: dict[str, Any]) -> dict[str, list[report.Curve]]:
    """Milliseconds over length, a panel a direction, for `report.draw`."""
    panels: dict[str, list[report.Curve]] = {}
    for direction in DIRECTIONS:
        lines: dict[tuple[str, bool], list[tuple[float, float]]] = {}
        for one in [one for one in found["results"] if one["direction"] == direction]:
            for name, time in one["timings"].items():
                shape = f"{one['batch']} x L x {one['dim']}"
                who = f"{name} {one['operation']}" if name in ("moai", "packed", "mamba_ssm") else name
                key = (f"{who}, {shape}", name not in ("moai", "packed"))
                lines.setdefault(key, []).append((one["length"], time["median_ms"]))
        panels[direction] = [report.Curve(label, sorted(points), dashed) for (label, dashed), points in lines.items()]
    return panels


def picture(found: dict[str, Any], path: Path) -> None:
    """Draws the curves. StorageError."""
    title = report.headline(found["environment"])
    report.draw(path, curves(found), x="tokens (L)", y="milliseconds", title=title)


def shapes_of(
    device: torch.device,
    name: str | None,
    lengths: Sequence[str] | None,
    batches: Sequence[str] | None,
    dims: Sequence[str] | None,
    states: Sequence[str] | None,
) -> list[Shape]:
    """The shapes that flags ask for: a preset's, for a GPU alone, or every combination; on a CPU smaller by default.
    UsageError."""
    given = {"--seq-len": lengths, "--batch": batches, "--dim": dims, "--state": states}
    if name is not None:
        if named := [flag for flag, value in given.items() if value]:
            raise UsageError(f"--preset and {named[0]} don't go together", hint="leave one of them out")
        shapes = preset(name)
        if device.type != "cuda":  # hours, and more memory than most have
            largest = max(shapes, key=lambda one: one.millions)
            raise UsageError(
                f"--preset {name} has shapes for a GPU, up to {largest}, not for {device}",
                hint="name smaller ones: --seq-len 512,2048 --dim 512",
            )
        return shapes
    usual = ("2048,8192", "1", "4096", "16") if device.type == "cuda" else ("512,2048", "1", "512", "16")
    choices = [report.numbers(flag, value or text) for (flag, value), text in zip(given.items(), usual, strict=True)]
    return [Shape(b, n, d, s) for s in choices[3] for d in choices[2] for b in choices[1] for n in choices[0]]


def run(
    *,
    lengths: Sequence[str] | None = None,
    batches: Sequence[str] | None = None,
    dims: Sequence[str] | None = None,
    states: Sequence[str] | None = None,
    preset: str | None = None,
    dtype: str = "auto",
    against: Sequence[str] | None = None,
    resets: bool = False,
    backend: str = "auto",
    repeats: int | None = None,
    limit: float = 20.0,
    plot: Path | None = None,
    device: str = "auto",
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """`measure` with the words of flags, and the picture; the report, with `plot` where there is one."""
    report.check_plot(plot)
    report.check_effort(limit, repeats)
    where = place(device)
    found = measure(
        shapes_of(where, preset, lengths, batches, dims, states), device=where, dtype=report.dtype_of(dtype, where),
        against=[word.strip() for text in against or ["auto"] for word in text.split(",")], resets=resets,
        backend=backend, repeats=repeats, limit=limit, command=command, on_event=on_event,
    )  # fmt: skip
    return report.with_picture(found, plot, picture)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moai_core.bench.scan", description=(__doc__ or "").split("\n")[0])
    for flag, help in (("--seq-len", "tokens"), ("--batch", "rows"), ("--dim", "channels"), ("--state", "states")):
        parser.add_argument(flag, action="append", help=f"{help}; one number or several with commas")
    parser.add_argument("--preset", help="shapes of a published table instead: h100")
    parser.add_argument("--dtype", default="auto", help="auto (bf16 on a GPU), bf16, fp16, fp32")
    parser.add_argument("--against", action="append", help=f"auto, none, or among {', '.join(RIVALS)}")
    parser.add_argument("--resets", action="store_true", help="also with packed documents of 512 tokens in the mean")
    parser.add_argument("--backend", default="auto", help="scan backend of moai")
    parser.add_argument("--repeats", type=int, help="measured calls of each (default: by their time)")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that one of the compared may take")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times over the lengths")
    report.flags(parser)

    def go(o: argparse.Namespace, command: str, on_event: report.OnEvent) -> dict[str, Any]:
        return run(
            lengths=o.seq_len, batches=o.batch, dims=o.dim, states=o.state, preset=o.preset, dtype=o.dtype,
            against=o.against, resets=o.resets, backend=o.backend, repeats=o.repeats, limit=o.limit, plot=o.plot,
            device=o.device, command=command, on_event=on_event,
        )  # fmt: skip

    return report.front(parser, argv, go, tables)


if __name__ == "__main__":
    sys.exit(main())
