"""How fast a prompt is read, by the format of the weights: hidden states and a state, without gradients.

    python -m moai_core.bench.prefill [--preset 2b] [--length 8192,32768] [--format none,fp8,int4] [--json]

All formats take turns on the same tokens in one process, so that a ratio doesn't depend on what the GPU's clock did
meanwhile; a time is the median of whole forward passes. Weights are random. Of a layer's matrices in_proj, out_proj,
gate, up and down are quantized, as `moai quantize` does; x_proj and dt_proj stay as they are, and the head isn't asked
(one token's logits at the end of a prompt). What the device has no memory for is left out with a note.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moai_core import config as sizes
from moai_core.bench import report, timing
from moai_core.bench.quantized import FORMATS, model, sized
from moai_core.bench.report import Table
from moai_core.device import place
from moai_core.errors import at_least
from moai_core.quant import kernels
from moai_core.quant import linear as quant
from moai_core.quant.formats import Spec

# What was asked of an H100, times bf16.
GOALS = {("2b", "fp8"): 1.3, ("8b", "fp8"): 1.5, ("2b", "int4"): 0.95}


def run(
    *,
    preset: str | None = None,
    layers: int | None = None,
    lengths: Sequence[str] | str | None = None,
    formats: Sequence[str] | str | None = None,
    chunk: int | None = None,
    dtype: str = "auto",
    repeats: int | None = None,
    device: str = "auto",
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Measure every format at every length: {"environment", "model", "layers", "dtype", "chunk", "results", "notes"},
    JSON-able; a result is {"format", "kernel", "length", "prefill": timing, "tokens_per_s", "times_plain", "goal",
    "weight_bytes"}. Raises UsageError for wrong words."""
    where = place(device)
    cuda = where.type == "cuda"
    at_least(("--repeats", repeats, 1), ("--chunk", chunk, 1))
    name, numbers = sized(preset, layers, where)
    names = report.among("--format", formats or ["none,fp8,int4" if cuda else "none,int4"], list(FORMATS))
    wanted = report.numbers("--length", lengths or (["8192", "32768"] if cuda else ["256"]), least=2)
    number = report.dtype_of(dtype, where)
    found: dict[str, Any] = {
        "benchmark": "prefill",
        "environment": report.environment(where, command),
        "model": name,
        "layers": numbers["num_hidden_layers"],
        "dtype": report.short(number),
        "chunk": chunk,
        "results": [],
        "notes": [],
    }
    tell = _Progress(on_event, len(names) * (1 + len(wanted)))
    made = _models(names, numbers, number, where, found["notes"], tell)
    clock = timing.Clock(where)
    for length in wanted:
        found["results"] += _measure(made, length, chunk, clock, repeats, found["notes"], tell)
    whole = name in sizes.PRESETS and numbers["num_hidden_layers"] == sizes.PRESETS[name]["num_hidden_layers"]
    if whole and "H100" in found["environment"].get("gpu", "") and number == torch.bfloat16:
        for row in found["results"]:
            row["goal"] = GOALS.get((name, row["format"]))
    tell("done")
    return found


class _Progress:
    def __init__(self, on_event: report.OnEvent, total: int) -> None:
        self.on_event, self.total, self.done = on_event, total, 0

    def __call__(self, task: str) -> None:
        self.on_event({"event": "progress", "task": task, "done": min(self.done, self.total), "total": self.total})
        self.done += 1


def _models(
    names: Sequence[str],
    numbers: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    notes: list[str],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The models that memory holds beside each other."""
    made: dict[str, Any] = {}
    for name in names:
        tell(f"{name}: weights")
        try:
            one = model(numbers, name, dtype, device)
            quant.release(one, dtype)
            made[name] = one
        except torch.OutOfMemoryError:
            notes.append(f"{name}: left out, no memory for its weights beside the others'; measure it with fewer")
            one = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return made


def _measure(
    made: dict[str, Any],
    length: int,
    chunk: int | None,
    clock: timing.Clock,
    repeats: int | None,
    notes: list[str],
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of one length."""
    vocabulary = min(one.config.vocab_size for one in made.values()) if made else 2
    prompts = list(torch.randint(vocabulary, (2, 1, length), device=clock.device))
    works = {name: timing.Rotation(prompts).calls(_reader(one, chunk)) for name, one in made.items()}
    seen: set[str] = set()

    def on_call(name: str) -> None:
        if name not in seen:
            seen.add(name)
            tell(f"{name}: a prompt of {length:,}")

    taken = timing.take_turns(works, clock, repeats=repeats, on_call=on_call)
    notes += [f"{name}, {length:,} tokens: out of memory" for name, calls in taken.items() if not calls]
    times = {name: timing.summary(calls, clock) for name, calls in taken.items() if calls}
    plain = times.get("none")
    return [
        {
            "format": name,
            "kernel": _kernel(name, clock.device, made[name].dtype),
            "length": length,
            "prefill": time.to_dict(),
            "tokens_per_s": length / time.median,
            "times_plain": plain.median / time.median if plain else None,
            "weight_bytes": sum(t.numel() * t.element_size() for t in _held(made[name])),
        }
        for name, time in times.items()
    ]


def _reader(one: Any, chunk: int | None) -> Callable[[Tensor], Tensor]:
    def read(tokens: Tensor) -> Tensor:
        state, out = None, None
        with torch.inference_mode():
            for part in tokens.split(chunk or tokens.shape[1], dim=1):
                out = one.model(input_ids=part, state=state, use_cache=True)
                state = out.state
        assert out is not None
        return out.last_hidden_state

    return read


def _held(one: Any) -> list[Tensor]:
    """Weights, with what kernels made of them."""
    prepared = [t for module in quant.quantized(one).values() for t in quant.leaves(list(module._prepared.values()))]
    return list({t.data_ptr(): t for t in [*one.parameters(), *one.buffers(), *prepared] if t.numel()}.values())


def _kernel(name: str, device: torch.device, dtype: torch.dtype) -> str:
    if (values := FORMATS[name]) is None:
        return "torch"
    return kernels.pick(Spec.from_dict(values), device, dtype).__name__.rpartition(".")[2]


def tables(found: dict[str, Any]) -> list[Table]:
    """One table; `times plain` is how many times as fast as the model in its own type it is."""
    goals = any(row.get("goal") for row in found["results"])
    columns = ["format", "multiplies", "prompt", "ms", "quartiles", "tokens/s", f"times {found['dtype']}", "weights GB"]
    lines = []
    for row in found["results"]:
        time = row["prefill"]
        cells = [row["format"], row["kernel"], f"{row['length']:,}", report.ms(time["median_ms"])]
        cells += [f"{report.ms(time['low_ms'])}-{report.ms(time['high_ms'])}", f"{row['tokens_per_s']:,.0f}"]
        cells += ["" if row["times_plain"] is None else f"{row['times_plain']:.2f}"]
        cells += [f"{row['weight_bytes'] / 1e9:.2f}"]
        lines.append((*cells, *([str(row.get("goal") or "")] if goals else [])))
    chunk = f", {found['chunk']:,} tokens at once" if found["chunk"] else ""
    title = f"prefill, {found['model']}, {found['layers']} layers, {found['dtype']}{chunk}; random weights"
    return [Table(title, (*columns, *(["goal"] if goals else [])), lines, left=2)]


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m moai_core.bench.prefill", description=about)
    parser.add_argument("--preset", help=f"{', '.join(sizes.PRESETS)}; without one 2b on a GPU, a small model on a CPU")
    parser.add_argument("--layers", type=int, help="so many layers, to measure a part")
    parser.add_argument("--length", dest="lengths", action="append", help="tokens of a prompt: one or several")
    parser.add_argument("--format", dest="formats", action="append", help=f"of the weights: {', '.join(FORMATS)}")
    parser.add_argument("--chunk", type=int, help="tokens read at once (all)")
    parser.add_argument("--dtype", default="auto", help="auto (bf16 on a GPU, fp32 on a CPU), bf16, fp16 or fp32")
    parser.add_argument("--repeats", type=int, help="measured prompts of each (by their time)")
    report.flags(parser)

    def go(o: argparse.Namespace, command: str, on_event: report.OnEvent) -> dict[str, Any]:
        return run(command=command, on_event=on_event, **report.options(o))

    return report.front(parser, argv, go, tables)


if __name__ == "__main__":
    sys.exit(main())
