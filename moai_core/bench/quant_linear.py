"""Products with int4 and int8 matrices on a GPU, against bf16 and against torch's own int4 kernel, at a model's shapes.

    python -m moai_core.bench.quant_linear [--preset 2b,8b] [--rows 1,8,8192] [--only in_proj,head] [--tune]

A call is one of many in a CUDA graph, each with a matrix that no cache holds any more, so that launches cost what they
cost in a decoder; the time is the graph's over its calls. All that is compared at a shape takes turns. The share is
that of the bytes of W (scales included) over the rate of a large copy in the same run (bytes read and written). `moai`
is what the operators do: a launch reads its first weights while the one in front still runs; `alone` is the same
without. Leaves out the CPU, and the decode engine, which has kernels of its own: `moai bench decode` shows them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core import cuda
from moai_core.bench import report, timing
from moai_core.bench.report import Table
from moai_core.bench.timing import Clock
from moai_core.device import place
from moai_core.errors import UsageError
from moai_core.model.configuration import get_mamba_config
from moai_core.quant import cuda as kernel
from moai_core.quant import cuda_ops
from moai_core.quant.cuda_ops import Gpu, Plan, Shape, Tiles
from moai_core.quant.formats import Spec, decode

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 8192)
NAMES = ("in_proj", "out_proj", "gate_up", "down", "head")
_GROUP = 128
# A graph's calls take about so many seconds in all.
_GRAPH = 1e-3
_REPEATS = 11
_WRONG = 1e-2
_OTHERS = ("cublas", "tinygemm")


class Case(NamedTuple):
    """A matrix of a model: W (out, columns) in the format that moai gives it."""

    preset: str
    name: str
    out: int
    columns: int
    spec: Spec

    @property
    def label(self) -> str:
        """What tables call it: matrix and preset."""
        return f"{self.name} {self.preset}"


def cases(preset: str) -> list[Case]:
    """The matrices of a preset; gate and up are one product."""
    c = get_mamba_config(preset)
    inner = c.expand_factor * c.hidden_size
    int4, int8 = Spec("int4", _GROUP), Spec("int8", 0)
    return [
        Case(preset, "in_proj", 2 * inner, c.hidden_size, int4),
        Case(preset, "out_proj", c.hidden_size, inner, int4),
        Case(preset, "gate_up", 2 * c.intermediate_size, c.hidden_size, int4),
        Case(preset, "down", c.hidden_size, c.intermediate_size, int4),
        Case(preset, "head", c.vocab_size, c.hidden_size, int8),
    ]


def stored(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Random weights as formats.py stores them, of a trained matrix's size."""
    groups = case.columns // case.spec.group_size if case.spec.group_size else 1
    scales = torch.rand(case.out, groups, device=device).add_(0.5).mul_(1e-2).half()
    if case.spec.format == "int4":
        return {"qweight": _integers(0, 256, case.out, case.columns // 2, torch.uint8, device), "scales": scales}
    return {"qweight": _integers(-127, 128, case.out, case.columns, torch.int8, device), "scales": scales / 16}


def _integers(low: int, high: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randint(low, high, (rows, columns), dtype=dtype, device=device)


# ---- what is compared: a call on one of several sets of weights

Call = Callable[[Tensor, Any], object]


class Rival(NamedTuple):
    """make() gives one set of weights of `size` bytes, call(x, weights) multiplies."""

    name: str
    make: Callable[[], Any]
    call: Call
    size: int


def rivals(case: Case, m: int, device: torch.device) -> list[Rival]:
    """moai, the same without overlapping, cuBLAS in bf16, tinygemm: those that can."""
    weights, few = case.out * case.columns, m < cuda_ops.DENSE_FROM
    first = kernel.prepare(case.spec, stored(case, device))
    size = sum(t.numel() * t.element_size() for t in first)
    int4 = Spec("int4", _GROUP)

    def ours() -> Any:
        return kernel.Prepared(first.weights.clone(), first.scales.clone())

    def dense() -> Tensor:
        return torch.randn(case.out, case.columns, device=device, dtype=torch.bfloat16)

    def tiny() -> tuple[Tensor, Tensor]:
        packed = torch.ops.aten._convert_weight_to_int4pack(stored(case._replace(spec=int4), device)["qweight"], 8)
        groups = case.columns // _GROUP
        return packed, torch.rand(groups, case.out, 2, device=device, dtype=torch.bfloat16)

    tinygemm = torch.ops.aten._weight_int4pack_mm
    found = [Rival("moai", ours, lambda x, w: kernel.linear(case.spec, w, x, case.out), size)]
    if few and cuda_ops.overlaps(device.index):
        found.append(Rival("alone", ours, launching(case, m, None, False), size))
    found.append(Rival("cublas", dense, lambda x, w: F.linear(x, w), 2 * weights))
    if m <= 1024:  # it would take minutes
        found.append(Rival("tinygemm", tiny, lambda x, w: tinygemm(x, w[0], _GROUP, w[1]), weights // 2))
    return found


def launching(case: Case, m: int, division: Plan | Tiles | None, overlap: bool) -> Call:
    """moai's kernel for m rows with a division of its own."""
    layout = kernel.layout(case.spec)
    tiles = isinstance(division or plan_of(case, m, torch.device("cuda", torch.cuda.current_device())), Tiles)
    launch: Any = cuda_ops.launch_tiles if tiles else cuda_ops.launch
    return lambda x, w: launch(x, w.weights, w.scales, case.out, layout, division, overlap)


def recorded(rival: Rival, x: Tensor, clock: Clock, seconds: float) -> tuple[torch.cuda.CUDAGraph, int, list[Any]]:
    """(graph, calls in it, what it reads): as many sets of weights as are larger than the cache. seconds: about those
    of a call."""
    sets = [rival.make() for _ in range(timing.sets_of(rival.size, clock, most=64))]
    calls = len(sets) * max(1, round(_GRAPH / seconds / len(sets)))
    with torch.no_grad():
        rival.call(x, sets[0])  # compiles
        torch.cuda.synchronize(x.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                rival.call(x, sets[i % len(sets)])
    return graph, calls, sets


def microseconds(found: Sequence[Rival], x: Tensor, clock: Clock, seconds: float) -> dict[str, float]:
    """Median time of a call of each, taking turns."""
    graphs = {rival.name: recorded(rival, x, clock, seconds) for rival in found}
    works = {name: graph.replay for name, (graph, *_) in graphs.items()}
    taken = timing.take_turns(works, clock, repeats=_REPEATS, warmup=dict.fromkeys(works, 1))
    return {n: statistics.median(s for s, _ in t) * 1e6 / graphs[n][1] for n, t in taken.items() if t}


def copy_rate(clock: Clock) -> float:
    """Bytes a second, read and written, of a large copy."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=clock.device).fill_(1)
    b = torch.empty_like(a)
    times = [clock(lambda: b.copy_(a))[0] for _ in range(15)]
    return 2 * a.numel() / statistics.median(times[3:])


# ---- the measurement


def measure(
    chosen: Sequence[Case], rows: Sequence[int], device: torch.device, *, tune: bool = False, command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:  # fmt: skip
    """{"benchmark", "environment", "copy_TBps", "results", "parts", "notes"}, JSON-able; see `row` and `parts`."""
    clock = Clock(device)
    rate = copy_rate(clock)
    torch.cuda.empty_cache()
    results, notes = [], []
    for number, case in enumerate(chosen):
        on_event({"event": "progress", "task": case.label, "done": number, "total": len(chosen)})
        for m in rows:
            results.append(row(case, m, clock, rate, tune))
            if not results[-1]["error"] <= _WRONG:
                notes.append(f"WRONG RESULT: {case.label} at {m} rows is off by {results[-1]['error']:.1e}")
        torch.cuda.empty_cache()
    first = next((case for case in chosen if case.name == "gate_up"), None)
    return {
        "benchmark": "quant_linear",
        "environment": report.environment(device, command),
        "copy_TBps": rate / 1e12,
        "results": results,
        "parts": parts(first, clock, rate) if first else [],
        "notes": notes,
    }


def row(case: Case, m: int, clock: Clock, rate: float, tune: bool) -> dict[str, Any]:
    """One matrix at m rows: {"preset", "name", "out", "columns", "format", "rows", "us": {name: µs}, "share" of the
    copy's rate, "error" relative to float64, "plan", and with tune "variants": [{"plan", "us"}] sorted}."""
    x = torch.randn(m, case.columns, device=clock.device, dtype=torch.bfloat16)
    found = rivals(case, m, clock.device)
    seconds = found[0].size / rate + 2e-6 + 2 * m * case.out * case.columns / 6e14
    times = microseconds(found, x, clock, seconds)
    p = plan_of(case, m, clock.device)
    line: dict[str, Any] = {"preset": case.preset, "name": case.name, "out": case.out, "columns": case.columns}
    line |= {"format": case.spec.format, "rows": m, "us": times, "share": found[0].size / rate / times["moai"] * 1e6}
    line |= {"error": agreement(case, x[:128]), "plan": None if p is None else list(p)}
    if tune and p is not None:
        line["variants"] = variants(case, x, p, found[0], clock, seconds)
    return line


def plan_of(case: Case, m: int, device: torch.device) -> Plan | Tiles | None:
    """The division of the work that is taken, None where cuBLAS multiplies."""
    if m >= cuda_ops.DENSE_FROM:
        return None
    shape, gpu = _shape(case, m), cuda_ops.gpu(device.index)
    return cuda_ops.plan(shape, gpu) if cuda_ops.few(shape, gpu) else cuda_ops.tiles(shape, gpu)


def _shape(case: Case, m: int) -> Shape:
    units = -(-case.columns // cuda_ops.UNIT)
    return Shape(m, -(-case.out // cuda_ops.TILE), units, 2, kernel.layout(case.spec))


def agreement(case: Case, x: Tensor) -> float:
    """Relative norm error of the first rows of W, a multiple of the kernel's, against float64."""
    small = case._replace(out=min(case.out, 1024))
    weights = stored(small, x.device)
    y = kernel.linear(small.spec, kernel.prepare(small.spec, weights), x, small.out).double()
    wanted = x.double() @ decode(small.spec, weights).double().t()
    return float((y - wanted).norm() / wanted.norm())


def variants(
    case: Case, x: Tensor, division: Plan | Tiles, ours: Rival, clock: Clock, seconds: float
) -> list[dict[str, Any]]:
    """Times of other divisions of the work, the fastest first, each overlapping the one before."""
    m, gpu = x.shape[0], cuda_ops.gpu(clock.device.index)
    plans: list[Plan | Tiles] = [division, *dict.fromkeys(p for p in divisions(_shape(case, m), gpu) if p != division)]
    overlap = cuda_ops.overlaps(clock.device.index)
    each = [Rival(str(i), ours.make, launching(case, m, p, overlap), ours.size) for i, p in enumerate(plans)]
    times: dict[str, float] = {}
    for i in range(0, len(each), 8):  # a few at once: each has sets of weights of its own
        times |= microseconds(each[i : i + 8], x, clock, seconds)
    found = [{"plan": list(plans[int(name)]), "us": us} for name, us in times.items()]
    return sorted(found, key=lambda one: one["us"])


def divisions(shape: Shape, gpu: Gpu) -> Iterator[Plan | Tiles]:
    """Those worth a try."""
    if not cuda_ops.few(shape, gpu):
        for (nt, wm, wk), split, blocks in product(
            ((2, 1, 2), (4, 1, 2), (6, 1, 2), (8, 1, 2), (8, 2, 1)), (1, 2, 3, 4, 8), (1, 2)
        ):
            made = Tiles(nt, wm, wk, 4, split, blocks)
            fits = blocks * made.shared(shape.layout) <= gpu.shared_of_block and 2 * split <= shape.units
            if (
                fits
                and (gpu.clusters or split == 1)
                and shape.m <= made.rows <= max(16, 2 * shape.m)
                and nt * blocks <= 8
            ):
                yield made
        return
    for mt, warps, stages, (blocks, share) in product(
        (1, 2, 3, 4, 6), (8, 11, 16), (1, 2, 4), ((1, 1), (2, 1), (2, 2), (4, 2))
    ):
        found = cuda_ops.divide(shape, gpu, mt, -(-shape.m // 8), 1, stages, warps, share, shape.m, blocks)
        if found is not None and warps * blocks <= 32:
            yield found


def parts(case: Case, clock: Clock, rate: float) -> list[dict[str, Any]]:
    """What stands around the products, [{"what", "us", "share"}]: a matrix decoded, for cuBLAS."""
    first = kernel.prepare(case.spec, stored(case, clock.device))
    size = sum(t.numel() * t.element_size() for t in first)
    moved = size + 2 * case.out * case.columns

    def copy() -> Any:
        return kernel.Prepared(first.weights.clone(), first.scales.clone())

    def out(x: Tensor, w: Any) -> object:
        return kernel.values(case.spec, w, case.out, case.columns, torch.bfloat16)

    x = torch.empty(0, device=clock.device)
    us = microseconds([Rival("decode", copy, out, size)], x, clock, moved / rate)["decode"]
    return [{"what": f"{case.name} decoded", "us": us, "share": moved / rate / us * 1e6}]


# ---- what is shown


def tables(found: dict[str, Any]) -> list[Table]:
    """Times by matrix and rows; what stands around; the fastest variants where they were asked for."""
    lines, tuned = [], []
    for one in found["results"]:
        us = one["us"]
        line = [f"{one['name']} {one['preset']}", one["format"], str(one["rows"]), f"{us['moai']:.1f}"]
        line.append(f"{one['share']:.0%}" if one["plan"] else "-")
        line += [f"{us[name]:.1f}" if name in us else "-" for name in ("alone",)]
        line += [f"{us[name]:.1f} ({us[name] / us['moai']:.2f}x)" if name in us else "-" for name in _OTHERS]
        lines.append(tuple(line))
        for best in one.get("variants", [])[:4]:
            taken = "taken" if best["plan"] == one["plan"] else ""
            cells = [line[0], line[2], f"{best['us']:.2f}", taken]
            tuned.append(tuple([*cells, " ".join(map(str, best["plan"]))]))
    title = f"W x in µs (times moai's); share of a copy's {found['copy_TBps']:.2f} TB/s; bf16 activations"
    shown = [Table(title, ("matrix", "W", "rows", "moai", "share", "alone", *_OTHERS), lines, left=2)]
    around: list[tuple[str, ...]] = [(one["what"], f"{one['us']:.1f}", f"{one['share']:.0%}") for one in found["parts"]]
    if around:
        shown.append(Table("around the products", ("what", "µs", "share"), around))
    if tuned:
        columns = ("matrix", "rows", "µs", "", "as in cuda_ops.Plan, cuda_ops.Tiles")
        shown.append(Table("divisions of the work, the four fastest", columns, tuned))
    return shown


def run(
    *,
    presets: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    tune: bool = False,
    device: str = "auto",
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """`measure` with the words of flags. Raises UsageError for what isn't known, and where there is no GPU."""
    names = report.among("--preset", presets or ["2b", "8b"], ("2b", "8b", "16b"))
    wanted = report.among("--only", only or list(NAMES), NAMES)
    counts = report.numbers("--rows", rows or [str(m) for m in ROWS])
    where = place(device)
    if reason := cuda.why_not(where):
        raise UsageError(f"moai's kernels for integer matrices can't run here: {reason}", hint="use a CUDA GPU")
    chosen = [case for name in names for case in cases(name) if case.name in wanted]
    return measure(chosen, counts, where, tune=tune, command=command, on_event=on_event)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moai_core.bench.quant_linear", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--preset", action="append", help="2b, 8b, 16b: one or several (2b,8b)")
    parser.add_argument("--rows", action="append", help="rows of x: one number or several with commas")
    parser.add_argument("--only", action="append", help=f"among {', '.join(NAMES)}")
    parser.add_argument("--tune", action="store_true", help="measure other divisions of the work as well")
    report.flags(parser)

    def go(o: argparse.Namespace, command: str, on_event: report.OnEvent) -> dict[str, Any]:
        return run(
            presets=o.preset, rows=o.rows, only=o.only, tune=o.tune, device=o.device, command=command, on_event=on_event
        )

    return report.front(parser, argv, go, tables)


if __name__ == "__main__":
    sys.exit(main())
