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
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core import scan as kernels
from moai_core.bench import report, timing
from moai_core.bench.report import Table
from moai_core.bench.timing import Case, Clock, Rotation, Work
from moai_core.errors import UsageError
from moai_core.model.mamba import dt_bias_init
from moai_core.scan import reference

RIVALS = ("mamba_ssm", "attention", "reference", "conv")
DIRECTIONS = ("forward", "forward+backward")
CONV_WIDTH = 4
# Mean length of the documents that --resets packs.
DOCUMENT = 512
# Tokens compared with the reference, and the relative norm error above which a result is called wrong.
_CHECKED, _WRONG = 64, {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_TENSORS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


@dataclass(frozen=True)
class Shape:
    """B x L x I with N states; `str` gives it as tables show it."""

    batch: int
    length: int
    dim: int
    state: int = 16

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} x {self.dim}" + (f", N {self.state}" if self.state != 16 else "")

    @property
    def millions(self) -> float:
        """Millions of (batch, token, channel) triples."""
        return self.batch * self.length * self.dim / 1e6


def recorded() -> dict[str, Any]:
    """Figures of mamba_ssm on one GPU model, with source and date, and the goals set against them."""
    return json.loads(Path(__file__).with_name("h100.json").read_text(encoding="utf-8"))


def preset(name: str) -> list[Shape]:
    """The shapes of a --preset. UsageError."""
    if name != "h100":
        raise UsageError(f"--preset: unknown name {name!r}", hint="choose among h100")
    return [Shape(*(row[key] for key in ("batch", "length", "dim", "state"))) for row in recorded()["scan"]]


# ---- what is compared


@dataclass
class Inputs:
    """Random inputs of one shape, made once a length and shared by all that read the same layout; `random` draws them.

    Values as a trained model has them: unit-normal projections, time steps as the model starts with, A = -1 … -N.
    """

    shape: Shape
    dtype: torch.dtype
    clock: Clock
    _kept: dict[tuple[str, int], Rotation] = field(default_factory=dict)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.clock.device, dtype=self.dtype)

    def scan(self, length: int) -> Rotation:
        """Sets of u, dt, A, B, C, D, z, dt_bias, with gradients wanted, and dy."""
        return self._sets("scan", length, self._scan)

    def channel_first(self, operation: str, length: int) -> Rotation:
        """The same values as of `scan` or `conv`, (B, I, L) and (B, N, L)."""

        def turn(name: str, t: Tensor) -> Tensor:
            if t.dim() < 3 or name == "weight":
                return t
            other = t.detach().transpose(1, 2).contiguous()
            return other if name == "dy" else other.requires_grad_()

        key = (f"{operation}, channel first", length)
        if key not in self._kept:
            sets = self.scan(length) if operation == "scan" else self.conv(length)
            turned = [{name: turn(name, t) for name, t in one.items()} for one in sets.sets]
            self._kept[key] = Rotation(turned)
        return self._kept[key]

    def conv(self, length: int) -> Rotation:
        """Sets of u, weight, bias and dy."""
        return self._sets("conv", length, self._conv)

    def attention(self, length: int) -> Rotation:
        """Sets of q, k, v and dy: (B, heads, L, size)."""
        return self._sets("attention", length, self._attention)

    def seq_idx(self, length: int) -> Tensor:
        """(B, L) int32: documents of exponentially distributed length, 512 tokens in the mean."""
        lengths = torch.empty(self.shape.batch, length).exponential_(1 / DOCUMENT).ceil().clamp(min=1)
        tokens = torch.arange(length).float().repeat(self.shape.batch, 1)
        return torch.searchsorted(lengths.cumsum(1), tokens, right=True).to(self.clock.device, torch.int32)

    def _sets(self, kind: str, length: int, make: Callable[[int], dict[str, Tensor]]) -> Rotation:
        if (kind, length) not in self._kept:
            first = make(length)
            count = timing.sets_of(sum(t.numel() * t.element_size() for t in first.values()), self.clock)
            self._kept[kind, length] = Rotation([first, *(make(length) for _ in range(count - 1))])
        return self._kept[kind, length]

    def _scan(self, length: int) -> dict[str, Tensor]:
        batch, dim, state, device = self.shape.batch, self.shape.dim, self.shape.state, self.clock.device
        A = -torch.arange(1, state + 1, device=device, dtype=torch.float32).repeat(dim, 1)
        wide = {"A": A, "D": torch.ones(dim, device=device), "dt_bias": dt_bias_init(dim, device)}
        tokens = {name: self.draw(batch, length, dim) for name in ("u", "dt", "z", "dy")}
        tokens |= {name: self.draw(batch, length, state) for name in ("B", "C")}
        return _wanting({**wide, **tokens})

    def _conv(self, length: int) -> dict[str, Tensor]:
        batch, dim = self.shape.batch, self.shape.dim
        found = {"u": self.draw(batch, length, dim), "dy": self.draw(batch, length, dim)}
        return _wanting({**found, "weight": self.draw(dim, 1, CONV_WIDTH), "bias": self.draw(dim)})

    def _attention(self, length: int) -> dict[str, Tensor]:
        heads, size = heads_of(self.shape.dim // 2)
        shape = (self.shape.batch, length, heads, size)
        return _wanting({name: self.draw(*shape).transpose(1, 2) for name in ("q", "k", "v", "dy")})


def _wanting(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t if name == "dy" else t.requires_grad_() for name, t in tensors.items()}


def heads_of(width: int) -> tuple[int, int]:
    """(heads, size of a head): 128 where it divides the width, else the largest multiple of 4 below that does."""
    size = next((size for size in range(min(128, width), 3, -1) if width % size == 0 and size % 4 == 0), width)
    return width // size, size


def both_ways(function: Callable[[dict[str, Tensor]], Tensor], direction: str) -> Callable[[dict[str, Tensor]], object]:
    """One call forward without gradients, or forward and backward to every input."""

    def forward(one: dict[str, Tensor]) -> object:
        with torch.no_grad():
            return function(one)

    def backward(one: dict[str, Tensor]) -> object:
        y = function(one)
        return torch.autograd.grad(y, [t for name, t in one.items() if name != "dy"], one["dy"])

    return forward if direction == "forward" else backward


def flash(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """On a GPU in half precision only the flash kernel may run; elsewhere torch chooses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    half = device.type == "cuda" and dtype != torch.float32
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if half else nullcontext()


def attend(one: dict[str, Tensor]) -> Tensor:
    """Causal attention; see `Inputs.attention`."""
    with flash(one["q"].device, one["q"].dtype):
        return F.scaled_dot_product_attention(one["q"], one["k"], one["v"], is_causal=True)


def _selective_scan(one: dict[str, Tensor]) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, dt, A, B, C, D, z, dt_bias = (one[name] for name in _TENSORS)
    return selective_scan_fn(u, dt, A, B, C, D, z=z, delta_bias=dt_bias, delta_softplus=True)


def _causal_conv1d(one: dict[str, Tensor]) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(one["u"], one["weight"][:, 0], one["bias"], activation="silu")


def cases(
    inputs: Inputs, operation: str, direction: str, *, backend: str, against: Sequence[str], resets: bool
) -> list[Case]:
    """What is compared for one operation and direction; the first is moai's."""
    shape, back = inputs.shape, direction != "forward"
    row = 4.0 * shape.batch * shape.dim  # bytes of a token's channels in fp32
    op = getattr(kernels, operation)
    names = _TENSORS if operation == "scan" else ("u", "weight", "bias")
    own = inputs.scan if operation == "scan" else inputs.conv
    looping = kernels.BACKENDS.get(_picked(inputs, operation, backend, False)) is reference
    loop_order = 2.0 if back and operation == "scan" else 1.0  # each token's gradient is as large as the sequence
    loop_memory = row * (8 + (5 * shape.state if back else 0))
    usual = row * (12 + shape.state / 4 if back else 5)

    def case(name: str, backend: str, packed: bool = False) -> Case:
        def make(length: int) -> Work:
            seq_idx = inputs.seq_idx(length) if packed else None

            def call(one: dict[str, Tensor]) -> Tensor:
                return op(*(one[name] for name in names), seq_idx=seq_idx, backend=backend)[0]

            return own(length).calls(both_ways(call, direction))

        loops = backend == "reference" or (backend == "auto" and looping)
        return Case(name, make, loop_order if loops else 1.0, loop_memory if loops else usual)

    def turned(function: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[int], Work]:
        return lambda length: inputs.channel_first(operation, length).calls(both_ways(function, direction))

    found = [case("moai", backend)]
    if resets:
        found.append(case("packed", backend, packed=True))
    if "mamba_ssm" in against and operation == "scan":
        found.append(Case("mamba_ssm", turned(_selective_scan)))
    if "mamba_ssm" in against and operation == "conv" and _conv1d(inputs) is None:
        found.append(Case("mamba_ssm", turned(_causal_conv1d)))
    if operation == "scan" and "attention" in against:
        attention = both_ways(attend, direction)
        found.append(Case("attention", lambda n: inputs.attention(n).calls(attention), 2.0, 4 * row))
    if operation == "scan" and "reference" in against:
        found.append(case("reference", "reference"))
    return found


def _conv1d(inputs: Inputs) -> str | None:
    """Why causal_conv1d, which stands for mamba_ssm's convolution, can't run; None if it can."""
    return dict(kernels.explain(inputs.clock.device, inputs.dtype, op="conv", K=CONV_WIDTH))["mamba_ssm"]


def _picked(inputs: Inputs, operation: str, backend: str, packed: bool) -> str:
    chosen = kernels.pick(
        inputs.clock.device, inputs.dtype, backend=backend, op=operation, N=inputs.shape.state, K=CONV_WIDTH,
        seq_idx=packed,
    )  # fmt: skip
    return next(name for name, module in kernels.BACKENDS.items() if module is chosen)


def agreement(inputs: Inputs, operation: str, backend: str) -> float:
    """Relative norm error of the first tokens of a row against the loop that defines the operation, in float64."""
    names = _TENSORS if operation == "scan" else ("u", "weight", "bias")
    one = (inputs.scan if operation == "scan" else inputs.conv)(inputs.shape.length).sets[0]
    few = min(_CHECKED, inputs.shape.length)

    def part(t: Tensor, name: str) -> Tensor:
        return t[:1, :few].double() if t.dim() == 3 and name != "weight" else t.double()

    with torch.no_grad():
        # The whole length, as it is timed: a kernel that cuts time into segments is right from its first token on.
        y = getattr(kernels, operation)(*(one[name] for name in names), backend=backend)[0][:1, :few].double()
        want = getattr(reference, operation)(*(part(one[name], name) for name in names))[0]
        return float((y - want).norm() / want.norm())


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
    found |= {"backend": _picked(inputs, operation, backend, False)}
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


def tables(found: dict[str, Any]) -> list[Table]:
    """The report as one table; a rival's cell has its time and how many times moai's that is."""
    rows, results = [], found["results"]
    names = [name for name in ("packed", *RIVALS) if any(name in one["timings"] for one in results)]
    some = any(one["recorded_ms"] for one in results)
    for one in results:
        ours = one["timings"].get("moai")
        spread = f"{report.ms(ours['low_ms'])}-{report.ms(ours['high_ms'])}" if ours else ""
        line = [f"{one['operation']} {one['direction']}", str(_shape(one))]
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
    """The shapes that flags ask for: a preset's, or every combination; on a CPU smaller by default. UsageError."""
    given = {"--seq-len": lengths, "--batch": batches, "--dim": dims, "--state": states}
    if name is not None:
        if named := [flag for flag, value in given.items() if value]:
            raise UsageError(f"--preset and {named[0]} don't go together", hint="leave one of them out")
        return preset(name)
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
    if plot is not None:
        report.check_plot(plot)
    if limit <= 0 or (repeats is not None and repeats < 1):
        raise UsageError("--limit must be above 0 and --repeats at least 1")
    where = report.place(device)
    found = measure(
        shapes_of(where, preset, lengths, batches, dims, states), device=where, dtype=report.dtype_of(dtype, where),
        against=[word.strip() for text in against or ["auto"] for word in text.split(",")], resets=resets,
        backend=backend, repeats=repeats, limit=limit, command=command, on_event=on_event,
    )  # fmt: skip
    if plot is not None:
        picture(found, plot)
    return {**found, "plot": None if plot is None else str(plot)}


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
