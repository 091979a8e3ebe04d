"""Mamba against attention over the length of the sequence: the scan alone, and one whole layer.

    python -m moai_core.bench.lengths [--seq-len 32768] [--hidden 2048] [--json] [--plot bench.png]

`scan` is `moai_core.scan.scan` with I = 2 H channels; `attention` is torch's fused causal attention, heads of 128 over
H. `mamba block` is a layer of moai's model (norm, mixer, norm, SwiGLU) and the stack's last norm; `attention block` is
the same of transformers' Llama with that width H and that feed-forward (rotary positions, SDPA). One row of tokens.
Lengths double up to the one given. What would take too long or too much memory is left out with the reason. Attention
wins where sequences are short, and the table shows it. Leaves out generation, where attention's cache grows too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moai_core import scan as kernels
from moai_core.bench import report, timing
from moai_core.bench.report import Curve, Table
from moai_core.bench.timing import Case, Clock, Rotation, Timing, Work
from moai_core.bench.work import DIRECTIONS, Inputs, Shape, attend, both_ways, cases, heads_of
from moai_core.device import place
from moai_core.errors import UsageError, at_least
from moai_core.scan import reference

NAMES = ("scan", "attention", "mamba block", "attention block")
# The shortest length, and how many.
_SHORTEST, _MOST = 256, 10
# Widths: the 2b model's on a GPU; what two cores finish in a minute on a CPU.
_HIDDEN = {"cuda": 2048, "cpu": 64}


def lengths_up_to(last: int) -> list[int]:
    """Lengths that double up to `last`, from 256 or less on; 1000 -> 250, 500, 1000."""
    found = [last]
    while found[0] // 2 >= min(_SHORTEST, last) // 2 and found[0] > _SHORTEST and len(found) < _MOST:
        found.insert(0, found[0] // 2)
    return found


def mamba_block(hidden: int, ffn: int, backend: str) -> nn.Module:
    """moai's model with one layer and without a head; fed with hidden states it is that layer and the last norm."""
    from moai_core.model.configuration import MoaiMambaConfig
    from moai_core.model.modeling import MoaiMambaModel

    shape: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": 1}
    stack = MoaiMambaModel(MoaiMambaConfig(vocab_size=8, **shape))
    stack.scan_backend = backend
    return stack


def attention_block(hidden: int, ffn: int) -> nn.Module:
    """The same of transformers' Llama, with as many key and value heads as heads."""
    from transformers import LlamaConfig, LlamaModel

    heads = heads_of(hidden)[0]
    shape: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "attn_implementation": "sdpa"}
    return LlamaModel(LlamaConfig(vocab_size=8, pad_token_id=None, **shape))


class Blocks:
    """Both layers and their inputs; made once, called at every length."""

    def __init__(self, hidden: int, clock: Clock, dtype: torch.dtype, backend: str) -> None:
        ffn = 11 * hidden // 4  # the 2b model's ratio
        self.clock, self.dtype, self.hidden = clock, dtype, hidden
        self.layers: dict[str, nn.Module] = {
            "mamba block": mamba_block(hidden, ffn, backend),
            "attention block": attention_block(hidden, ffn),
        }
        for layer in self.layers.values():
            layer.to(device=clock.device, dtype=dtype).train()
        self.weights = {
            name: [p for part, p in layer.named_parameters() if part != "embed_tokens.weight"]
            for name, layer in self.layers.items()
        }

    def case(self, name: str, direction: str, order: float) -> Case:
        """One of the two layers as a case: forward, or forward and backward to its weights and its input."""
        layer, weights = self.layers[name], self.weights[name]

        def make(length: int) -> Work:
            draw = torch.randn(2, 1, length, self.hidden, device=self.clock.device, dtype=self.dtype)
            count = timing.sets_of(draw.numel() * draw.element_size() // 2, self.clock)

            def call(one: Tensor) -> object:
                if direction == "forward":
                    with torch.no_grad():
                        return layer(inputs_embeds=one[0], use_cache=False).last_hidden_state
                x = one[0].detach().requires_grad_()
                y = layer(inputs_embeds=x, use_cache=False).last_hidden_state
                return torch.autograd.grad(y, [x, *weights], one[1])

            return Rotation([draw, *(torch.randn_like(draw) for _ in range(count - 1))]).calls(call)

        return Case(name, make, order, 4 * self.hidden * (60 if direction != "forward" else 16))


def measure(
    lengths: Sequence[int],
    *,
    hidden: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    repeats: int | None = None,
    limit: float = 50.0,
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Times all four, in both directions, at every length.

    limit: seconds for everything; what wouldn't fit into what is left of them is left out with the reason. Returns
    {"benchmark", "environment", "dtype", "hidden", "backend", "parameters" of the blocks, "results", "notes"}: one
    result a length and direction, {"length", "direction", "timings": {name: timing}, "ratios": {"attention": times of
    the scan's, "attention block": times of the mamba block's}, "left_out": {name: why}}.
    """
    picked = kernels.pick(device, dtype, backend=backend)
    clock = Clock(device)
    blocks = Blocks(hidden, clock, dtype, backend)
    end, results = time.monotonic() + limit, []
    last: dict[str, dict[str, tuple[int, float]]] = {direction: {} for direction in DIRECTIONS}
    todo = [(length, direction) for length in lengths for direction in DIRECTIONS]
    share = limit / 4 / len(todo) / len(NAMES)  # three quarters are left for what is slow
    notes = []
    if picked is reference:
        notes.append("moai's scan is the reference here, for want of a kernel; `moai doctor` says why")
    for number, (length, direction) in enumerate(todo):

        def tell(name: str, number: int = number, what: str = f"{direction}, {length} tokens") -> None:
            on_event({"event": "progress", "task": f"{what}: {name}", "done": number, "total": len(todo)})

        tell("scan")
        inputs = Inputs(Shape(1, length, 2 * hidden), dtype, clock)
        scan = cases(inputs, "scan", direction, backend=backend, against=(), resets=False)[0]
        attention = both_ways(attend, direction)
        here = [
            replace(scan, name="scan"),
            Case("attention", lambda n, i=inputs, f=attention: i.attention(n).calls(f), 2.0),  # type: ignore[misc]
            blocks.case("mamba block", direction, scan.order),
            blocks.case("attention block", direction, 2.0),
        ]
        left = end - time.monotonic()
        later = 1.3 * sum(
            timing.calls(seconds, repeats, share) * seconds
            for n, d in todo[number + 1 :]
            for seconds in (expected(case, n, last[d]) for case in here if case.order == 1)
        )
        chosen, left_out = affordable(here, length, last[direction], left, later, repeats, share)
        known = {case.name: expected(case, length, last[direction]) for case in chosen}
        found = timing.compare(
            chosen, length, clock, limit=max(1.0, left), repeats=repeats, share=share, known=known, on_call=tell
        )
        for name, one in found.timings.items():
            last[direction][name] = (length, one.median)
        results.append(_result(length, direction, found.timings, {**left_out, **found.left_out}))
    on_event({"event": "progress", "task": "done", "done": len(todo), "total": len(todo)})
    return {
        "benchmark": "lengths",
        "environment": report.environment(device, command),
        "dtype": report.short(dtype),
        "hidden": hidden,
        "backend": next(name for name, module in kernels.BACKENDS.items() if module is picked),
        "parameters": {name: sum(p.numel() for p in weights) for name, weights in blocks.weights.items()},
        "results": results,
        "notes": notes + omissions(results),
    }


def omissions(results: list[dict[str, Any]]) -> list[str]:
    """What was left out: a line a name and direction, with the last reason."""
    found: dict[tuple[str, str], tuple[list[str], str]] = {}
    for one in results:
        for name, why in one["left_out"].items():
            lengths = found.get((name, one["direction"]), ([], ""))[0]
            found[name, one["direction"]] = ([*lengths, f"{one['length']:,}"], why)
    return [
        f"{name}, {direction}, left out at {' and '.join(lengths)} tokens: {why}"
        for (name, direction), (lengths, why) in found.items()
    ]


def affordable(
    here: Sequence[Case],
    length: int,
    before: dict[str, tuple[int, float]],
    left: float,
    later: float,
    repeats: int | None,
    share: float,
) -> tuple[list[Case], dict[str, str]]:
    """(cases for which time is left, the cheapest first; why for the others), from their times at the length before.

    before: name -> (length, seconds) of what was measured last; left: seconds, of which `later`, at most the
    half, are kept for the cases of linear time at lengths to come.
    """
    chosen: list[Case] = []
    why: dict[str, str] = {}

    for case in sorted(here, key=lambda case: expected(case, length, before)):
        seconds = expected(case, length, before)
        count = timing.calls(seconds, repeats, share)
        free = left - (min(later, left / 2) if case.order > 1 else 0.0)
        if count * seconds > free or free <= 0:
            rest = f"{max(0.0, free):.0f} s of the time limit left"
            about = f"a call would take about {timing.words(seconds)} ({count} calls, {rest})"
            why[case.name] = about if seconds else rest
            continue
        left -= count * seconds
        chosen.append(case)
    return [case for case in here if case in chosen], why


def expected(case: Case, length: int, before: dict[str, tuple[int, float]]) -> float:
    """Seconds of a call, from what was measured at another length; 0 where nothing was."""
    known, seconds = before.get(case.name, (length, 0.0))
    return seconds * (length / known) ** case.order


def _result(length: int, direction: str, timings: dict[str, Timing], left_out: dict[str, str]) -> dict[str, Any]:
    pairs = {"attention": "scan", "attention block": "mamba block"}
    ratios = {
        theirs: timings[theirs].median / timings[ours].median
        for theirs, ours in pairs.items()
        if theirs in timings and ours in timings
    }
    found: dict[str, Any] = {"length": length, "direction": direction}
    found |= {"timings": {name: timings[name].to_dict() for name in NAMES if name in timings}}
    return {**found, "ratios": ratios, "left_out": left_out}


# ---- what is shown


def tables(found: dict[str, Any]) -> list[Table]:
    """One table a direction; the attentions' cells have their time and how many times ours that is."""
    result = []
    for direction in DIRECTIONS:
        rows = []
        for one in [one for one in found["results"] if one["direction"] == direction]:
            times, ratios = one["timings"], one["ratios"]
            cells = [_cell(times.get(name), ratios.get(name)) for name in NAMES]
            rows.append((f"{one['length']:,}", *cells))
        counts = ", ".join(f"{name} {count:,} parameters" for name, count in found["parameters"].items())
        width = f"H {found['hidden']}, {found['dtype']}, 1 row, scan backend {found['backend']}"
        title = f"{direction}: medians in ms (times moai's, above 1 moai is faster); {width}; {counts}"
        result.append(Table(title, ("tokens", *NAMES), rows, left=0))
    return result


def _cell(time: dict[str, Any] | None, ratio: float | None) -> str:
    if time is None:
        return "-"
    return report.ms(time["median_ms"]) + (f" ({ratio:.2f}x)" if ratio is not None else "")


def picture(found: dict[str, Any], path: Path) -> None:
    """Draws milliseconds over length, a panel a direction. StorageError."""
    panels = {}
    for direction in DIRECTIONS:
        rows = [one for one in found["results"] if one["direction"] == direction]
        lines = {
            name: [(one["length"], one["timings"][name]["median_ms"]) for one in rows if name in one["timings"]]
            for name in NAMES
        }
        panels[direction] = [Curve(name, points, "attention" in name) for name, points in lines.items() if points]
    title = f"H {found['hidden']}, {found['dtype']}, 1 row; {report.headline(found['environment'])}"
    report.draw(path, panels, x="tokens", y="milliseconds", title=title)


def run(
    *,
    length: int = 32768,
    hidden: int | None = None,
    dtype: str = "auto",
    backend: str = "auto",
    repeats: int | None = None,
    limit: float = 50.0,
    plot: Path | None = None,
    device: str = "auto",
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """`measure` with the words of flags, and the picture; the report, with `plot` where there is one."""
    report.check_plot(plot)
    at_least(("--seq-len", length, 16))
    report.check_effort(limit, repeats)
    where = place(device)
    width = _HIDDEN[where.type] if hidden is None else hidden
    if width < 8 or width % 8:
        raise UsageError(f"--hidden must be a multiple of 8 (got {width})", hint=f"use {width // 8 * 8 + 8}")
    found = measure(
        lengths_up_to(length), hidden=width, device=where, dtype=report.dtype_of(dtype, where), backend=backend,
        repeats=repeats, limit=limit, command=command, on_event=on_event,
    )  # fmt: skip
    return report.with_picture(found, plot, picture)


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m moai_core.bench.lengths", description=about)
    parser.add_argument("--seq-len", type=int, default=32768, help="the longest; lengths double up to it")
    parser.add_argument("--hidden", type=int, help="width H (default: 2048 on a GPU, 64 on a CPU)")
    parser.add_argument("--dtype", default="auto", help="auto (bf16 on a GPU), bf16, fp16, fp32")
    parser.add_argument("--backend", default="auto", help="scan backend of moai")
    parser.add_argument("--repeats", type=int, help="measured calls of each (default: by their time)")
    parser.add_argument("--limit", type=float, default=50.0, help="seconds that the measurement may take")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times over the lengths")
    report.flags(parser)

    def go(o: argparse.Namespace, command: str, on_event: report.OnEvent) -> dict[str, Any]:
        return run(
            length=o.seq_len, hidden=o.hidden, dtype=o.dtype, backend=o.backend, repeats=o.repeats, limit=o.limit,
            plot=o.plot, device=o.device, command=command, on_event=on_event,
        )  # fmt: skip

    return report.front(parser, argv, go, tables)


if __name__ == "__main__":
    sys.exit(main())
