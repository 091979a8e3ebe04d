"""A training step of a whole model: forward with the loss, backward, clipping, optimizer; and the reading of prompts.

    python -m moai_core.bench.train [--preset 2b] [--batch 4] [--seq-len 2048] [--checkpointing none] [--json]

The step is the training loop's: model, loss in chunks, scan, checkpointing, precision, clipping and optimizer are those
of a recipe; the tokens are random and the data pipeline is left out. The loss takes the head's gradient in the forward
pass, whose time therefore holds it. MFU counts `plan.flops_per_token` (three times forward, recomputation uncounted)
against a large matrix product measured in the same run. `prefill` reads a prompt into hidden states and a state,
without gradients. The rivals of `moai_core.bench.models` take torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from moai_core import config as sizes
from moai_core import device as devices
from moai_core import plan
from moai_core import recipe as recipes
from moai_core import scan as kernels
from moai_core.bench import models, report, timing
from moai_core.bench.models import Model
from moai_core.bench.report import Table
from moai_core.bench.steps import PHASES, WARMUP, attach, is_preset, make_optimizer, product_rate, read, train
from moai_core.bench.work import documents, recorded
from moai_core.errors import UsageError, at_least
from moai_core.recipe import Recipe
from moai_core.training import in_backward, setup

RIVALS = ("transformers", "mamba_ssm")
OPTIMIZERS = ("recipe", "torch", "adamw", "adamw_bf16", "adamw_8bit")


# ---- what is measured


@dataclass(frozen=True)
class Options:
    """What is asked of a run, checked against the recipe, which has everything else. checkpointing: kind -> layers."""

    recipe: Recipe
    preset: str | None
    batches: list[int]
    lengths: list[int]
    checkpointing: dict[str, int | None]
    steps: int
    optimizer: str
    packed: bool
    against: list[str]
    prefill: list[int]
    chunk: int | None
    repeats: int | None


def measure(
    o: Options, device: torch.device, *, command: str = "", on_event: report.OnEvent = lambda event: None
) -> dict[str, Any]:
    """Times training steps and the reading of prompts.

    Returns {"benchmark", "environment", "model", "parameters", "precision", "optimizer", "product", "results",
    "prefill", "recorded", "notes"}, JSON-able; a result is {"model", "batch", "length", "checkpointing", "step":
    timing, "phases_ms", "tokens_per_s", "mfu", "loss", "peak_bytes", "reserved_bytes"} or has "out_of_memory".
    """
    numbers = plan.numbers(o.recipe)
    dtype, mixed = setup.precision(o.recipe)
    backend = _backend(o.recipe, device, torch.bfloat16 if mixed else dtype, o.packed, numbers)
    clock = timing.Clock(device)
    product = product_rate(clock, torch.bfloat16 if mixed else dtype)
    makers = {
        "moai": lambda: models.moai(numbers, o.recipe, device, o.chunk),
        "transformers": lambda: models.llama(numbers, dtype, mixed, device),
        "mamba_ssm": lambda: models.mamba_ssm(numbers, dtype, mixed, device),
    }
    bench = _Bench(o, numbers, clock, product["flops_per_s"], on_event)
    for name in ("moai", *o.against):
        bench.go(makers[name])
    results, reading = bench.results, bench.reading
    on_event({"event": "progress", "task": "done", "done": 1, "total": 1})
    there = device.type == "cuda" and recorded()["gpu"] in torch.cuda.get_device_name(device)
    if there and dtype == torch.bfloat16 and is_preset(numbers, "2b"):
        attach(results, reading)
    bad = [r for r in results if r.get("loss") is not None and r["loss"] != r["loss"]]
    return {
        "benchmark": "train",
        "environment": report.environment(device, command),
        "model": o.preset or o.recipe.name,
        "parameters": plan.parameters(numbers)["total"],
        "precision": setup.precision_name(o.recipe),
        "optimizer": "torch.optim.AdamW (fused)" if o.optimizer == "torch" else o.recipe.optim.name,
        "clip": o.recipe.optim.clip,
        "in_backward": o.recipe.optim.in_backward,
        "packed": o.packed,
        "backend": backend,
        "product": product,
        "results": results,
        "prefill": reading,
        "recorded": {k: recorded()[k] for k in ("gpu", "source", "date")} if there else None,
        "notes": [f"WRONG RESULT: the loss of {r['model']} is NaN" for r in bad],
    }


class _Bench:
    """The rows of a report as they come; one model exists at a time."""

    def __init__(
        self, o: Options, numbers: dict[str, Any], clock: timing.Clock, rate: float, on_event: report.OnEvent
    ) -> None:
        self.o, self.numbers, self.clock, self.rate, self.on_event = o, numbers, clock, rate, on_event
        self.results: list[dict[str, Any]] = []
        self.reading: list[dict[str, Any]] = []
        rows = len(o.batches) * len(o.lengths)
        train_rows = rows * (len(o.checkpointing) + len(o.against)) if o.steps else 0
        self.total = train_rows * (WARMUP + o.steps) + len(o.prefill) * (1 + len(o.against))
        self.done = 0

    def tell(self, task: str) -> None:
        """One more piece of work begins."""
        self.on_event({"event": "progress", "task": task, "done": self.done, "total": self.total})
        self.done += 1

    def go(self, make: Callable[[], Model]) -> None:
        """Everything about one model; its memory is free again afterwards."""
        try:
            model = make()
        except torch.OutOfMemoryError as exc:
            raise UsageError(
                "the weights alone don't fit into the device's memory", hint="use --layers N, or a smaller preset"
            ) from exc
        for length in self.o.prefill:
            self.tell(f"{model.name}: prefill of {length} tokens")
            row: dict[str, Any] = {"model": model.name, "length": length, "chunk": self.o.chunk}
            self.reading.append(row | self.guarded(lambda n=length: self.read(model, n)))  # type: ignore[misc]
        if self.o.steps:
            optimizer = make_optimizer(model, self.o.recipe, self.o.optimizer)
            kinds = self.o.checkpointing if model.name == "moai" else {"none": None}
            for kind, length, batch in itertools.product(kinds, self.o.lengths, self.o.batches):
                row = {"model": model.name, "batch": batch, "length": length}
                row |= {"checkpointing": kind, "layers": kinds[kind]}
                found = self.guarded(lambda k=kind, b=batch, n=length: self.train(model, optimizer, k, b, n))  # type: ignore[misc]
                optimizer.zero_grad(set_to_none=True)
                self.results.append(row | found)

    def guarded(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the work found, or that the GPU had no memory for it."""
        if self.clock.cuda:
            torch.cuda.empty_cache()
        done = self.done
        try:
            return work()
        except torch.OutOfMemoryError:
            self.done = done
            return {"out_of_memory": True}

    def read(self, model: Model, length: int) -> dict[str, Any]:
        """One row of `prefill`."""
        found = read(model, length, self.numbers["vocab_size"], self.clock, self.o.repeats)
        return {**found, "tokens_per_s": length / found["prefill"]["median_ms"] * 1e3}

    def train(
        self, model: Model, optimizer: torch.optim.Optimizer, kind: str, batch: int, length: int
    ) -> dict[str, Any]:
        """One row of `results`."""
        if model.name == "moai":
            model.module.set_checkpointing(kind, self.o.checkpointing[kind])  # type: ignore[operator]
        device, vocabulary = self.clock.device, self.numbers["vocab_size"]
        inputs = [
            (
                torch.randint(vocabulary, (batch, length), device=device),
                documents(batch, length, device) if self.o.packed and model.name == "moai" else None,
            )
            for _ in range(4)
        ]
        what = f"{model.name}: {batch} x {length}, checkpointing {kind}"
        with ExitStack() as stack:
            early = None
            if model.name == "moai":
                early = in_backward.begin(self.o.recipe, optimizer, accumulation=1, ranks=1, stack=stack)
            found = train(
                model, optimizer, itertools.cycle(inputs), steps=self.o.steps, clip=self.o.recipe.optim.clip,
                device=device, on_step=lambda number: self.tell(f"{what}, step {number + 1 - WARMUP}"), early=early,
            )  # fmt: skip
        speed = batch * length / found["step"]["median_ms"] * 1e3
        flops = plan.flops_per_token(self.numbers, length)["training"] if model.name == "moai" else None
        return {"tokens_per_s": speed, "mfu": flops * speed / self.rate if flops else None, **found}


def _backend(recipe: Recipe, device: torch.device, dtype: torch.dtype, packed: bool, numbers: dict[str, Any]) -> str:
    asked = recipe.model.scan if recipe.model.use_fast_scan is not False else "reference"
    module = kernels.pick(device, dtype, backend=asked, N=numbers["state_size"], seq_idx=packed)
    return next(name for name, one in kernels.BACKENDS.items() if one is module)


# ---- what is asked


def options(
    where: torch.device,
    *,
    recipe: str | None = None,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    batches: Sequence[str] | None = None,
    lengths: Sequence[str] | None = None,
    steps: int = 10,
    checkpointing: Sequence[str] | None = None,
    layers: int | None = None,
    precision: str | None = None,
    optimizer: str | None = None,
    clip: float | None = None,
    in_backward: bool = False,
    packed: bool = False,
    backend: str | None = None,
    against: Sequence[str] | None = None,
    prefill: Sequence[str] | None = None,
    chunk: int | None = None,
    repeats: int | None = None,
) -> Options:
    """The words of flags, put over a recipe: the one named, else the preset's (bf16 weights with torch's AdamW on a
    GPU), else 2b on a GPU and cpu-tiny on a CPU. Raises UsageError and RecipeError."""
    if recipe is not None and preset is not None:
        raise UsageError("--recipe and --preset don't go together", hint="leave one of them out")
    report.check_preset(preset)
    gpu = where.type == "cuda"
    if recipe is None and preset is None:
        recipe, preset = (None, "2b") if gpu else ("cpu-tiny", None)
    at_least(("--steps", steps, 0), ("--layers", layers, 1), ("--prefill-chunk", chunk, 1), ("--repeats", repeats, 1))
    optimizer = optimizer or ("torch" if preset else "recipe")
    report.among("--optimizer", optimizer, OPTIMIZERS)
    wanted = [f"hardware.gpu={'null' if gpu else 'cpu'}"]
    wanted += [f"train.precision={precision}"] if precision else []
    wanted += [f"train.precision={'bf16' if gpu else 'fp32'}"] if preset and not precision else []
    wanted += [f"model.num_hidden_layers={layers}"] if layers is not None else []
    wanted += [f"model.scan={backend}"] if backend else []
    wanted += [f"optim.clip={'null' if clip == 0 else clip}"] if clip is not None else []
    wanted += [f"optim.name={optimizer}"] if optimizer not in ("recipe", "torch") else []
    if in_backward:  # a step is one micro-batch here in any case
        wanted += ["optim.in_backward=true", "train.effective_batch=null", "train.accumulation=1"]
    source = recipe or f"base/{preset}"
    kinds = [kind.strip() for text in checkpointing or () for kind in text.split(",")]
    one, found = _with_kinds(source, [*wanted, *overrides], kinds)
    if one.optim.in_backward and optimizer == "torch":
        raise UsageError("--in-backward needs moai's own optimizer (got torch)", hint="add --optimizer adamw_bf16")
    rivals = report.among("--against", against, RIVALS) if against else []
    if "mamba_ssm" in rivals:
        models.require_mamba_ssm(where)
    if steps == 0 and not prefill:
        raise UsageError("--steps 0 leaves nothing to measure", hint="add --prefill 32768, or train a few steps")
    return Options(
        recipe=one, preset=preset,
        batches=report.numbers("--batch", batches or (str(4 if preset else one.train.batch_size),)),
        lengths=report.numbers("--seq-len", lengths or (str(one.data.max_length),), least=2),
        checkpointing=found, steps=steps, optimizer=optimizer, packed=packed,
        against=rivals, prefill=report.numbers("--prefill", prefill) if prefill else [], chunk=chunk, repeats=repeats,
    )  # fmt: skip


def _with_kinds(source: str, words: list[str], kinds: list[str]) -> tuple[Recipe, dict[str, int | None]]:
    """The recipe with the first of the kinds of checkpointing, and the layers of each; without kinds its own."""
    off = {"none": ["~train.checkpointing_layers"]}
    each = [[*words, f"train.checkpointing={kind}", *off.get(kind, [])] for kind in kinds] or [words]
    found = [recipes.load(source, one) for one in each]
    return found[0], {one.train.checkpointing: one.train.checkpointing_layers for one in found}


def run(
    *, device: str = "auto", command: str = "", on_event: report.OnEvent = lambda event: None, **flags: Any
) -> dict[str, Any]:
    """`measure` with the words of flags; see `options`. Refuses what a CPU has no memory for before it begins."""
    where = devices.place(device)
    asked = options(where, **flags)
    if where.type == "cpu":
        shape = replace(asked.recipe.train, batch_size=max(asked.batches), accumulation=1, effective_batch=None)
        data = replace(asked.recipe.data, max_length=max(asked.lengths))
        try:
            devices.require(replace(asked.recipe, train=shape, data=data))
        except UsageError as exc:
            hint = "use a smaller --batch or --seq-len, --layers N, or --checkpointing full"
            raise UsageError(exc.message, hint=hint) from exc
    return measure(asked, where, command=command, on_event=on_event)


# ---- what is shown


def tables(found: dict[str, Any]) -> list[Table]:
    """Training steps and prompts as tables; a rival's speed has how many times moai's it is."""
    product = found["product"]
    rate = f"{product['dtype']} product of {product['n']}³: {product['flops_per_s'] / 1e12:.3g} TFLOP/s"
    clip = "no clipping" if found["clip"] is None else f"clip {found['clip']:g}"
    title = f"{found['model']}, {found['parameters']:,} parameters, {found['precision']}, {found['optimizer']}, {clip}"
    title += ", updated inside of the backward pass" if found.get("in_backward") else ""
    title += f"{', packed documents' if found['packed'] else ''}, scan backend {found['backend']}; {rate}"
    title += "; ms by phase; peak GB (reserved)" if found["environment"].get("gpu") else "; ms by phase"
    result = []
    if found["results"]:
        columns: tuple[str, ...] = ("model", "checkpointing", "B x L", "tokens/s", "ms a step", "quartiles")
        columns = (*columns, *PHASES, "peak GB", "MFU")
        rows = [_training(row, found["results"]) for row in found["results"]]
        result.append(_recorded(Table(title, columns, rows, left=3), found["results"], _speed))
        title = ""
    if found["prefill"]:
        columns = ("model", "prompt", "chunk", "ms", "quartiles", "tokens/s", "peak GB")
        rows = [_reading(row) for row in found["prefill"]]
        heading = "prefill: hidden states and state, without gradients" + (f"; {title}" if title else "")
        result.append(_recorded(Table(heading, columns, rows, left=1), found["prefill"], _milliseconds))
    return result


def _training(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    some = f" of {row['layers']}" if row.get("layers") else ""  # so many layers
    head = (row["model"], row["checkpointing"] + some, f"{row['batch']} x {row['length']}")
    if row.get("out_of_memory"):
        return (*head, "out of memory", *[""] * (4 + len(PHASES)))
    same = [r for r in rows if r["model"] == "moai" and (r["batch"], r["length"]) == (row["batch"], row["length"])]
    speed = f"{row['tokens_per_s']:,.0f}"
    if row["model"] != "moai" and same and same[0].get("tokens_per_s"):
        speed += f" ({row['tokens_per_s'] / same[0]['tokens_per_s']:.2f}x)"
    step = row["step"]
    cells = [report.ms(step["median_ms"]), f"{report.ms(step['low_ms'])}-{report.ms(step['high_ms'])}"]
    cells += [report.ms(row["phases_ms"][name]) for name in PHASES]
    mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
    return (*head, speed, *cells, _gb(row), mfu)


def _reading(row: dict[str, Any]) -> tuple[str, ...]:
    head = (row["model"], f"{row['length']:,}", "whole" if row["chunk"] is None else f"{row['chunk']:,}")
    if row.get("out_of_memory"):
        return (*head, "out of memory", "", "", "")
    time = row["prefill"]
    cells = (report.ms(time["median_ms"]), f"{report.ms(time['low_ms'])}-{report.ms(time['high_ms'])}")
    return (*head, *cells, f"{row['tokens_per_s']:,.0f}", _gb(row))


def _recorded(table: Table, rows: list[dict[str, Any]], words: Callable[[dict[str, Any]], str]) -> Table:
    """The table with columns for mamba_ssm's recorded figures and the goals, if a row has some."""
    if not any(row.get("recorded") for row in rows):
        return table
    more = [tuple(words((row.get("recorded") or {}).get(who, {})) for who in ("mamba_ssm", "goal")) for row in rows]
    lines = [(*line, *cells) for line, cells in zip(table.rows, more, strict=True)]
    return Table(table.title, (*table.columns, "mamba_ssm (recorded)", "goal"), lines, table.left)


def _speed(known: dict[str, Any]) -> str:
    if known.get("out_of_memory"):
        return "out of memory"
    speed = f"{known['tokens_per_s']:,.0f}" if "tokens_per_s" in known else ""
    return ", ".join(filter(None, (speed, f"{_gb(known)} GB" if "peak_bytes" in known else "")))


def _milliseconds(known: dict[str, Any]) -> str:
    return report.ms(known.get("ms"))


def _gb(row: dict[str, Any]) -> str:
    """Bytes of tensors at the peak (of the process on a CPU), and what torch had reserved for them."""
    reserved = f" ({row['reserved_bytes'] / 1e9:.1f})" if row.get("reserved_bytes") else ""
    return f"{row['peak_bytes'] / 1e9:.2f}{reserved}" if row.get("peak_bytes") else ""


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m moai_core.bench.train", description=about)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values put over the recipe's")
    parser.add_argument("--recipe", help="a recipe, with its precision, optimizer, batch and length")
    parser.add_argument("--preset", help=f"a model size instead: {', '.join(sizes.PRESETS)}")
    parser.add_argument("--batch", dest="batches", action="append", help="rows; one number or several with commas")
    parser.add_argument("--seq-len", dest="lengths", action="append", help="tokens a row; one or several")
    parser.add_argument("--steps", type=int, default=10, help="measured steps (default: 10); 0: only --prefill")
    parser.add_argument("--checkpointing", action="append", help="none, selective, full; one or several")
    parser.add_argument("--layers", type=int, help="layers, instead of the model's")
    parser.add_argument("--precision", help="fp32, bf16, bf16-mixed")
    parser.add_argument("--optimizer", help=f"one of {', '.join(OPTIMIZERS)}")
    parser.add_argument("--clip", type=float, help="norm that gradients are clipped to; 0: never")
    parser.add_argument("--in-backward", action="store_true", help="update inside of the backward pass")
    parser.add_argument("--packed", action="store_true", help="packed documents of 512 tokens in the mean")
    parser.add_argument("--backend", help="scan backend of moai")
    parser.add_argument("--against", action="append", help=f"among {', '.join(RIVALS)}")
    parser.add_argument("--prefill", action="append", help="lengths of prompts to read")
    parser.add_argument("--prefill-chunk", dest="chunk", type=int, help="tokens read at once (default: all)")
    parser.add_argument("--repeats", type=int, help="measured prompts of each length (default: by their time)")
    report.flags(parser)

    def go(o: argparse.Namespace, command: str, on_event: report.OnEvent) -> dict[str, Any]:
        return run(command=command, on_event=on_event, **report.options(o))

    return report.front(parser, argv, go, tables)


if __name__ == "__main__":
    sys.exit(main())
