"""How fast a model generates: tokens/s of a step for one token a row, by engine, format of the weights and batch.

A step reads every weight once and every row's state twice over, so its speed is told as bytes a second too, beside
those of a large copy measured in the same run. The model has random weights and states: the time doesn't depend on
them. On a GPU the graph engine makes 16 steps a call, with the choice of the token (temperature 0.8, top-p 0.95); the
plain one a step with the likeliest token. Prompts, text and the host's looking at tokens are left out.

`python -m moai_core.bench.decode --help` runs it without Typer and Rich.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moai_core.bench import report, timing
from moai_core.bench.quantized import FORMATS, model, sized
from moai_core.bench.report import Table
from moai_core.device import place
from moai_core.errors import UsageError, at_least
from moai_core.generation import decode
from moai_core.generation.sampling import Settings

ENGINES = ("graph", "plain")
_STEPS = 16
# What was asked of the 2b shape on one H100 80GB (tokens/s), and what mamba_ssm 2.3.2 with CUDA graphs reached there.
GOALS = {("none", 1): 740, ("none", 64): 40_000, ("int4", 1): 1700}
RECORDED = {("none", 1): 431, ("none", 64): 22_676}


def weight_bytes(one: Any) -> int:
    """What a step reads of the weights: all but the embedding, unless it is the head too."""
    tied = one.config.tie_word_embeddings
    held = [
        t
        for name, t in [*one.named_parameters(), *one.named_buffers()]
        if tied or not name.startswith("model.embed_tokens")
    ]
    return sum(t.numel() * t.element_size() for t in held)


def state_bytes(one: Any) -> int:
    """A row's state, read and written."""
    c, item = one.config, one.model.final_layernorm.weight.element_size()
    return 2 * c.num_hidden_layers * c.inner_size * (4 * c.state_size + item * (c.conv_kernel_size - 1))


def graph_work(one: Any, rows: int) -> Callable[[], object]:
    """_STEPS steps of the graph engine."""
    made = decode.Decoder(one, one.config.vocab_size)
    made.reserve(rows)
    with torch.no_grad():
        state = one(torch.zeros(1, 2, dtype=torch.int64, device=one.device), use_cache=True, logits_to_keep=1).state
    for row in range(rows):
        made.put(row, state, row, Settings(), row, 0)

    def steps() -> None:
        for _ in range(_STEPS):
            made.step(rows)

    return steps


def plain_work(one: Any, rows: int) -> Callable[[], object]:
    """A step of the model itself, with the likeliest token."""
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=one.device)
    with torch.inference_mode():
        kept = {"ids": ids, "state": one(ids.expand(rows, 2), use_cache=True, logits_to_keep=1).state}

    def step() -> None:
        with torch.inference_mode():
            out = one(kept["ids"], state=kept["state"], use_cache=True, logits_to_keep=1)
            kept["ids"], kept["state"] = out.logits[:, -1].argmax(-1, keepdim=True), out.state

    return step


def copy_rate(clock: timing.Clock) -> float:
    """Bytes a second, read and written, of a large copy."""
    size = 1 << 30 if clock.cuda else 1 << 27
    source = torch.ones(size // 4, device=clock.device)
    target = torch.empty_like(source)
    calls = timing.take_turns({"copy": lambda: target.copy_(source)}, clock, repeats=10)["copy"]
    return 2 * size / timing.summary(calls, clock).median


def run(
    *,
    preset: str | None = None,
    layers: int | None = None,
    batches: Sequence[str] | str | None = None,
    formats: Sequence[str] | str | None = None,
    engines: Sequence[str] | str | None = None,
    dtype: str = "auto",
    repeats: int | None = None,
    device: str = "auto",
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Measure every format, engine and batch asked for: {"environment", "model", "copy_bytes_per_s", "results",
    "notes"}. What an engine refuses or memory doesn't hold is left out with a note. UsageError for wrong words."""
    where = place(device)
    cuda = where.type == "cuda"
    at_least(("--repeats", repeats, 1))
    name, numbers = sized(preset, layers, where)
    rows = report.numbers("--batch", batches or ["1", "8", "64"])
    names = report.among("--format", formats or (["none", "int4"] if cuda else ["none"]), list(FORMATS))
    chosen = report.among("--engine", engines or list(ENGINES), ENGINES)
    if chosen == ["graph"] and not cuda:  # told before a large model is made
        raise UsageError(f"--engine graph runs on CUDA GPUs only, not on {where}", hint="--engine plain")
    number = report.dtype_of(dtype, where)
    clock = timing.Clock(where)
    found: dict[str, Any] = {
        "environment": report.environment(where, command),
        "model": name,
        "layers": numbers["num_hidden_layers"],
        "dtype": report.short(number),
        "copy_bytes_per_s": copy_rate(clock),
        "results": [],
        "notes": [],
    }
    total, done = len(names) * len(chosen) * len(rows), 0
    for form in names:
        one: Any = model(numbers, form, number, where)
        why = decode.why_not(one)
        if why is not None and "graph" in chosen:
            found["notes"].append(f"{form}: the graph engine can't be used here: {why}")
        for engine in chosen:
            for batch in rows:
                on_event({"event": "progress", "task": f"{form}, {engine}, {batch}", "done": done, "total": total})
                done += 1
                if engine == "plain" or (why is None and batch <= decode.WIDTHS[-1]):
                    _one(found, one, form, engine, batch, clock, repeats)
                elif why is None:
                    found["notes"].append(f"{form}: the graph engine takes {decode.WIDTHS[-1]} rows, not {batch}")
        del one
        if cuda:
            torch.cuda.empty_cache()
    on_event({"event": "progress", "task": "done", "done": total, "total": total})
    if not found["results"] and chosen == ["graph"]:
        raise UsageError(f"--engine graph: nothing to measure ({'; '.join(found['notes'])})", hint="--engine plain")
    return found


def _one(
    found: dict[str, Any], one: Any, form: str, engine: str, batch: int, clock: timing.Clock, repeats: int | None
) -> None:
    steps = _STEPS if engine == "graph" else 1
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats(clock.device)
    try:
        work = (graph_work if engine == "graph" else plain_work)(one, batch)
        calls = timing.take_turns({"step": work}, clock, repeats=repeats)["step"]
    except torch.OutOfMemoryError:
        calls = []
    if not calls:
        found["notes"].append(f"{form}, {engine}, batch {batch}: out of memory")
        return
    time = timing.summary([(seconds / steps, host / steps) for seconds, host in calls], clock)
    moved = weight_bytes(one) + batch * state_bytes(one)
    row = {
        "format": form,
        "engine": engine,
        "batch": batch,
        "step": time.to_dict(),
        "tokens_per_s": batch / time.median,
        "bytes": moved,
        "bytes_per_s": moved / time.median,
        "of_copy": moved / time.median / found["copy_bytes_per_s"],
        "peak_bytes": torch.cuda.max_memory_allocated(clock.device) if clock.cuda else None,
    }
    if found["model"] == "2b" and found["layers"] == 24 and "H100" in found["environment"].get("gpu", ""):
        row |= {"goal": GOALS.get((form, batch)), "mamba_ssm": RECORDED.get((form, batch))}
    found["results"].append(row)


def tables(found: dict[str, Any]) -> list[Table]:
    """One table; a speed says how many times that of the plain engine it is."""
    title = f"{found['model']}, {found['layers']} layers, {found['dtype']}; one token a row; random weights; "
    title += f"a large copy: {found['copy_bytes_per_s'] / 1e9:,.0f} GB/s"
    against = any(row.get("goal") or row.get("mamba_ssm") for row in found["results"])
    columns = ["format", "engine", "batch", "tokens/s", "ms a step", "quartiles", "MB a step", "GB/s", "of copy"]
    columns += ["host ms", *(["mamba_ssm (recorded)", "goal"] if against else [])]
    lines = []
    for row in found["results"]:
        step = row["step"]
        speed = f"{row['tokens_per_s']:,.0f}"
        same = [
            r
            for r in found["results"]
            if (r["format"], r["batch"], r["engine"]) == (row["format"], row["batch"], "plain")
        ]
        if row["engine"] != "plain" and same:
            speed += f" ({row['tokens_per_s'] / same[0]['tokens_per_s']:.1f}x)"
        cells = [row["format"], row["engine"], str(row["batch"]), speed, report.ms(step["median_ms"])]
        cells += [f"{report.ms(step['low_ms'])}-{report.ms(step['high_ms'])}", f"{row['bytes'] / 1e6:,.0f}"]
        cells += [f"{row['bytes_per_s'] / 1e9:,.0f}", f"{100 * row['of_copy']:.0f} %", report.ms(step.get("host_ms"))]
        cells += [f"{row.get(who) or '':,}" if row.get(who) else "" for who in ("mamba_ssm", "goal")] if against else []
        lines.append(tuple(cells))
    return [Table(title, tuple(columns), lines, left=2)]


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m moai_core.bench.decode", description=__doc__)
    parser.add_argument("--preset", help="2b, 8b or 16b; without one 2b on a GPU, a small model on a CPU")
    parser.add_argument("--layers", type=int, help="so many layers, to measure a part")
    parser.add_argument("--batch", action="append", help="rows: one or several (1,8,64)")
    parser.add_argument("--format", action="append", help=f"of the weights: {', '.join(FORMATS)}")
    parser.add_argument("--engine", action="append", help="graph, plain (both)")
    parser.add_argument("--dtype", default="auto", help="auto (bf16 on a GPU, fp32 on a CPU), bf16, fp16 or fp32")
    parser.add_argument("--repeats", type=int, help="measured calls of each")
    report.flags(parser)

    def go(options: argparse.Namespace, command: str, on_event: report.OnEvent) -> dict[str, Any]:
        return run(
            preset=options.preset, layers=options.layers, batches=options.batch, formats=options.format,
            engines=options.engine, dtype=options.dtype, repeats=options.repeats, device=options.device,
            command=command, on_event=on_event,
        )  # fmt: skip

    return report.front(parser, argv, go, tables)


if __name__ == "__main__":
    sys.exit(main())
