"""A Mamba model and a transformer of equal parameters, trained on the same tokens by the same loop, and compared.

    python -m moai_core.bench.twin --recipe cpu-tiny --output runs/pair [--lr 3e-3,6e-3] [--sweep 200] [KEY=VALUE ...]

Both are trained by `training.train` from one recipe: the same rows in the same order, optimizer, schedule, precision
and checkpoints; an interrupted comparison goes on where it stopped when the same command is given again. Every learning
rate of `lr` is tried by both in a short run of `sweep` steps with its own whole schedule, and each model is then
trained with the one that gave it the lower validation loss: neither is judged by the other's. What is compared is bits
per byte of held-out text by language at several lengths of context (score.py: the same tokens count at each), and for
the Mamba model with its state carried over whole documents as well. Left out: several seeds (give train.seed=1 and
another output).
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moai_core import footprint
from moai_core import recipe as recipes
from moai_core.bench import report, score, twin_llama
from moai_core.bench.context import CONTEXTS, WHOLE, by_context, check_contexts, context_table, lengths
from moai_core.bench.pictures import Panel, curves
from moai_core.bench.report import Curve, Table
from moai_core.errors import UsageError
from moai_core.recipe import Recipe, Source
from moai_core.training import StopFlag, metrics, setup, train

MODELS = ("moai", "llama")


# ---- training


def kinds(theta: float = twin_llama.THETA) -> dict[str, setup.Kind]:
    """How each of the two is made."""
    return {"moai": setup.MAMBA, "llama": twin_llama.kind(theta=theta)}


def train_pair(
    recipe: Recipe,
    output: Path,
    *,
    rates: Sequence[float],
    sweep: int,
    theta: float = twin_llama.THETA,
    on_event: report.OnEvent = lambda event: None,
    stop: StopFlag | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains both into `output`/MODEL-lrRATE: {model: {"folder", "parameters", "lr", "tried", "tokens", "steps",
    "seconds", "tokens_per_s", "train_loss", "valid"}}. Raises what `training.train` raises.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, kind in kinds(theta).items():
        tried: dict[str, float | None] = {}
        for rate in rates if len(rates) > 1 else ():
            short = _with(recipe, lr=rate, steps=sweep, eval_every=sweep, save_every=sweep, sample_every=0)
            folder = output / f"{name}-lr{rate:g}-{sweep}"
            result = train(short, output=folder, kind=kind, stop=stop, on_event=_told(on_event, f"{name}, lr {rate:g}"))
            tried[f"{rate:g}"] = result.valid["loss"] if result.valid else None
            _free()
        chosen = min(rates, key=lambda rate: (tried.get(f"{rate:g}") is None, tried.get(f"{rate:g}") or 0.0))
        # The rate is part of the name: when more are tried later, what was trained with another one stays.
        folder = output / f"{name}-lr{chosen:g}"
        result = train(_with(recipe, lr=chosen), output=folder, kind=kind, stop=stop, on_event=_told(on_event, name))
        _free()
        assert result.checkpoint is not None
        found[name] = {
            "folder": str(result.checkpoint),
            "lr": chosen,
            "tried": tried,
            "tokens": result.tokens,
            "steps": result.step,
            "seconds": result.seconds,
            # From the records: a comparison that is shown again trains nothing.
            "tokens_per_s": _speed(folder),
            "train_loss": result.loss,
            "valid": result.valid,
        }
    return found


def _with(recipe: Recipe, *, lr: float, **train_fields: Any) -> Recipe:
    steps = train_fields.get("steps")
    changed = replace(recipe.train, **(train_fields | ({"epochs": None} if steps else {})))
    warmup = min(recipe.optim.warmup_steps, steps // 5) if steps else recipe.optim.warmup_steps
    return replace(recipe, optim=replace(recipe.optim, lr=lr, warmup_steps=warmup), train=changed)


def _told(on_event: report.OnEvent, task: str) -> report.OnEvent:
    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            on_event({"event": "progress", "task": task, "done": event["step"], "total": event["steps"]})
        elif event["event"] in ("warning", "note"):
            on_event(event)

    return tell


def _speed(run: Path) -> float | None:
    """Tokens a second of the median step."""
    rates = sorted(row["tokens_per_s"] for row in metrics.read_rows(run / metrics.METRICS) if "tokens_per_s" in row)
    return rates[len(rates) // 2] if rates else None


def _free() -> None:
    """Gives a GPU's memory back before the next model takes it."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


# ---- the comparison


def run(
    *,
    recipe: str = "cpu-tiny",
    overrides: Sequence[str] = (),
    output: str | Path = "runs/twin",
    rates: Sequence[float] = (),
    sweep: int | None = None,
    data: Sequence[str] = (),
    contexts: Sequence[int] = CONTEXTS,
    tokens: int | None = 200_000,
    join: int = 0,
    theta: float = twin_llama.THETA,
    plot: Path | None = None,
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
    stop: StopFlag | None = None,
) -> dict[str, Any]:
    """Trains, compares and draws. rates: learning rates to try (none: the recipe's). sweep: steps of a try (default: a
    tenth of the run's). data: texts to compare on (none: the recipe's validation text). The report is {"benchmark",
    "environment", "recipe", "models", "shapes", "results", "notes", "plot"}, JSON-able.
    """
    made = recipes.load(recipe, list(overrides))
    report.check_plot(plot)
    if not made.train.eval_every:
        raise made.error("train.eval_every", "must be above 0: the pair is judged by validation")
    if made.data.valid is None and not data:
        raise made.error("data.valid", "is not set", hint="name held-out text with --data, or data.valid=PATH")
    tries = [*dict.fromkeys(rates or [made.optim.lr])]
    if wrong := [rate for rate in tries if not 0 < rate <= 10]:
        raise UsageError(f"--lr must be numbers above 0 and at most 10 (got {wrong[0]:g})")
    steps = sweep or max(10, (made.train.steps or 0) // 10)
    check_contexts(contexts)
    shapes = shapes_of(made)
    device = torch.device("cpu" if setup.on_cpu(made) else "cuda")
    found = train_pair(made, Path(output), rates=tries, sweep=steps, theta=theta, on_event=on_event, stop=stop)
    for name in MODELS:
        found[name]["parameters"] = shapes[name]["parameters"]
    sources = [Source(path=path) for path in data] or list(made.data.valid or ())
    models = {name: score.load(found[name]["folder"], device) for name in MODELS}
    tokenizer = setup.load_tokenizer(made, None)
    mixed = setup.precision(made)[1]
    texts = score.read_texts(
        sources, tokenizer, tokens=tokens, join=join, format=made.data.format, train_on=made.data.train_on
    )
    results = by_context(
        models, texts, tokenizer, contexts=contexts, on_event=on_event,
        autocast=partial(torch.autocast, device.type, torch.bfloat16) if mixed else nullcontext,
    )  # fmt: skip
    notes = lengths(texts, contexts)
    if len(tries) > 1:
        notes.append(f"learning rates tried for {steps:,} steps each, with a whole schedule of that length")
        notes += _edges(found, tries)
    notes += [f"{name}: {Path(found[name]['folder']).parent}" for name in MODELS]
    full = {
        "benchmark": "twin",
        "environment": report.environment(device, command),
        "recipe": made.to_dict(),
        "output": str(output),
        "models": found,
        "shapes": shapes,
        "sweep_steps": steps if len(tries) > 1 else 0,
        "results": results,
        "notes": notes,
    }
    return report.with_picture(full, plot, picture)


def _edges(found: dict[str, dict[str, Any]], tries: Sequence[float]) -> list[str]:
    """A better rate may lie beyond the ones that were tried."""
    ends = {min(tries): "lowest", max(tries): "highest"}
    chosen = {name: found[name]["lr"] for name in MODELS}
    return [f"{name} chose the {ends[lr]} rate tried: try one beyond it" for name, lr in chosen.items() if lr in ends]


def shapes_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The sizes of both models and their exact parameters. UsageError, RecipeError where no pair can be made."""
    ours = setup.numbers(recipe, setup.load_tokenizer(recipe, None))
    theirs = twin_llama.shape(ours)
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "tie_word_embeddings")
    own = {"moai": (ours, ("state_size", "expand_factor")), "llama": (theirs, ("num_attention_heads", "head_dim"))}
    shapes = {name: {key: fields[key] for key in (*names, *more)} for name, (fields, more) in own.items()}
    shapes["moai"]["parameters"] = footprint.parameters(ours)["total"]
    shapes["llama"]["parameters"] = twin_llama.parameters(theirs)
    return shapes


# ---- what is shown


def tables(found: dict[str, Any]) -> list[Table]:
    """The two runs, then bits per byte by language and context; a ratio below 1 says that the Mamba model is better."""
    rows: list[tuple[str, ...]] = []
    for name in MODELS:
        one = found["models"][name]
        tried = ", ".join(f"{lr}: {loss:.3f}" if loss else f"{lr}: failed" for lr, loss in one["tried"].items())
        valid = one["valid"]["loss"] if one["valid"] else None
        rows.append(
            (
                name, f"{one['parameters']:,}", f"{one['lr']:g}", tried or "-", f"{one['steps']:,}",
                f"{one['tokens']:,}", f"{one['tokens_per_s'] or 0:,.0f}", _number(one["train_loss"]), _number(valid),
            )
        )  # fmt: skip
    columns = ("model", "parameters", "lr", "lr tried: loss", "steps", "tokens", "tokens/s", "train loss", "valid loss")
    result = [Table("one recipe, two models", columns, rows)]
    return [*result, context_table(found["results"], MODELS)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def picture(found: dict[str, Any], path: Path) -> None:
    """Validation loss over tokens, and bits per byte over the context. StorageError."""
    losses = []
    for name in MODELS:
        rows = list(metrics.read_rows(Path(found["models"][name]["folder"]).parent / metrics.METRICS))
        tokens = {row["step"]: row["tokens"] for row in rows if row.get("kind") == "train"}
        points = [
            (tokens[row["step"]], row["valid_loss"])
            for row in rows
            if row.get("kind") == "valid" and row.get("valid_loss") is not None and row["step"] in tokens
        ]
        losses += [Curve(name, points, name == "llama")] if points else []
    byte = []
    for language in dict.fromkeys(one["language"] for one in found["results"]):
        for name in MODELS:
            points = [
                (one["context"], one["models"][name]["bits_per_byte"])
                for one in found["results"]
                if one["language"] == language and one["context"] != WHOLE and name in one["models"]
            ]
            byte.append(Curve(language, points, name == "llama"))
    panels = [
        Panel("validation while training", "tokens", "loss (nats a token)", losses, log=False),
        Panel("held-out text", "context (tokens)", "bits per byte", byte),
    ]
    counts = ", ".join(f"{name} {found['models'][name]['parameters']:,} parameters" for name in MODELS)
    curves(path, panels, f"{counts}; {report.headline(found['environment'])}")


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m moai_core.bench.twin", description=about)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="put over the recipe's values")
    parser.add_argument("--recipe", default="cpu-tiny")
    parser.add_argument("--output", type=Path, default=Path("runs/twin"), help="folder of the runs")
    parser.add_argument("--lr", default="", help="learning rates that both try, with commas")
    parser.add_argument("--sweep", type=int, help="steps of a try (default: a tenth)")
    parser.add_argument("--data", action="append", default=[], help="text to compare on; may be repeated")
    parser.add_argument("--context", default=",".join(map(str, CONTEXTS)), help="tokens of context")
    parser.add_argument("--tokens", type=int, default=200_000, help="at most so many a language")
    parser.add_argument("--join", type=int, default=0, help="lay documents end to end, texts of so many tokens")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    report.flags(parser)

    def go(o: argparse.Namespace, command: str, on_event: report.OnEvent) -> dict[str, Any]:
        if o.device != "auto":
            raise UsageError("--device: a recipe decides that", hint="hardware.gpu=cpu computes on the CPU")
        with StopFlag().catching() as stop:
            return run(
                recipe=o.recipe, overrides=o.overrides, output=o.output, rates=numbers(o.lr), sweep=o.sweep,
                data=o.data, contexts=report.numbers("--context", o.context, least=2), tokens=o.tokens, join=o.join,
                plot=o.plot, command=command, on_event=on_event, stop=stop,
            )  # fmt: skip

    return report.front(parser, argv, go, tables)


def numbers(text: str) -> list[float]:
    """Learning rates with commas between them. UsageError."""
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(float(word))
        except ValueError:
            raise UsageError(f"--lr must be numbers with commas between them (got {word!r})") from None
    return found


if __name__ == "__main__":
    sys.exit(main())
