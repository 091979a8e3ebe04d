"""Loss by position: what a token costs after so many tokens of its document, up to 32K and beyond.

    python -m moai_core.bench.context --model runs/NAME [--data 'heldout/*.jsonl'] [--max-length 32768] [--json]

A pure-Mamba model reads each document once with its state carried along, so that the last token may use all before it
and memory stays the same; a transformer (the twin of moai_core/bench/twin.py) reads it in one piece. A model that uses
its context gets cheaper with the position; one whose state wears out gets dearer again. Buckets double. Texts of one
language are short in most collections: `join` lays documents end to end and resets nothing, which shows how much a
long past of other matters harms, though little of it can help. Left out: positions of a training run.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moai_core import paths
from moai_core.bench import report, score
from moai_core.bench.pictures import Panel, curves
from moai_core.bench.report import Curve, Table
from moai_core.bench.score import Text
from moai_core.data.tokenize import token_bytes
from moai_core.device import place
from moai_core.errors import UsageError, at_least
from moai_core.evaluate import summary
from moai_core.recipe import Source

PACKAGED = paths.RECIPES / "corpus" / "valid"
FIRST = 64
CONTEXTS = (512, 2048, 8192)
WHOLE = "whole"


def buckets(length: int) -> list[tuple[int, int]]:
    """[first, behind last) positions: 1 to 63, then doubling, up to `length` tokens. The position is the number of
    tokens before the one that is predicted.
    """
    edges = [1]
    while edges[-1] < length:
        edges.append(min(length, max(FIRST, edges[-1] * 2)))
    return list(itertools.pairwise(edges))


def by_position(
    texts: Sequence[Text], costs: Sequence[np.ndarray], tokenizer: Any, length: int
) -> list[dict[str, Any]]:
    """`evaluate.summary` for each language and bucket with tokens, with {"language", "from", "to"}; "all" last."""
    table, result = token_bytes(tokenizer), []
    languages = sorted({text.language for text in texts})
    sums = {name: np.zeros((length, 3)) for name in languages}
    for text, nats in zip(texts, costs, strict=True):
        counted, at = text.counted[1:], slice(1, len(text.ids))
        sums[text.language][at, 0] += np.where(counted, nats, 0)
        sums[text.language][at, 1] += counted
        sums[text.language][at, 2] += np.where(counted, table[text.ids[1:]], 0)
    if len(languages) > 1:
        sums["all"] = np.sum([sums[name] for name in languages], axis=0)
    for name, found in sums.items():
        for first, behind in buckets(length):
            nats, tokens, size = found[first:behind].sum(0)
            if tokens:
                result.append({"language": name, "from": first, "to": behind - 1, **summary(nats, tokens, int(size))})
    return result


def measure(
    models: dict[str, Any],
    texts: Sequence[Text],
    tokenizer: Any,
    *,
    length: int,
    chunk: int = 2048,
    device: torch.device,
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Reads every text with every model: {"benchmark", "environment", "models", "length", "results", "notes"},
    JSON-able. A result is {"model", "language", "from", "to"} and `evaluate.summary`.
    """
    results, about = [], {}
    for name, model in models.items():
        began = time.perf_counter()
        costs = score.carried(model, texts, chunk=chunk, on_event=on_event, task=name)
        seconds = time.perf_counter() - began
        tokens = sum(map(len, costs))
        about[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "state": score.has_state(model),
            "tokens_per_s": tokens / seconds,
        }
        results += [{"model": name, **one} for one in by_position(texts, costs, tokenizer, length)]
    longest = max(len(text.ids) for text in texts)
    notes = [f"{len(texts)} texts; the longest has {longest:,} tokens"]
    if longest < length:
        notes.append(f"no text has {length:,} tokens: --join makes longer ones of several")
    return {
        "benchmark": "context",
        "environment": report.environment(device, command),
        "models": about,
        "length": length,
        "results": results,
        "notes": notes,
    }


# ---- by the length of the context


def by_context(
    models: dict[str, Any],
    texts: Sequence[Text],
    tokenizer: Any,
    *,
    contexts: Sequence[int] = CONTEXTS,
    autocast: score.Autocast = nullcontext,
    on_event: report.OnEvent = lambda event: None,
) -> list[dict[str, Any]]:
    """[{"language", "context" (tokens, or "whole" with the state carried), "tokens", "bytes", "models": {name: {"loss",
    "bits_per_byte"}}}]: the same tokens at every context.
    """
    rows: dict[tuple[Any, str], dict[str, Any]] = {}
    for name, model in models.items():
        wanted: list[Any] = [*contexts, *([WHOLE] if score.has_state(model) else [])]
        for context in wanted:
            tell: dict[str, Any] = {"autocast": autocast, "on_event": on_event, "task": f"{name}, context {context}"}
            whole = context == WHOLE
            costs = score.carried(model, texts, **tell) if whole else score.windowed(model, texts, context, **tell)
            for language, one in score.by_language(texts, costs, tokenizer).items():
                row = rows.setdefault((context, language), {"language": language, "context": context, "models": {}})
                row |= {"tokens": one["tokens"], "bytes": one["bytes"]}
                row["models"][name] = {key: one[key] for key in ("loss", "bits_per_byte")}
    return list(rows.values())


def lengths(texts: Sequence[Text], contexts: Sequence[int]) -> list[str]:
    """How much of the texts a longer context could help, in words."""
    counts = [len(text.ids) - 1 for text in texts]
    shares = [sum(max(0, count - context) for count in counts) / sum(counts) for context in contexts]
    most = ", ".join(f"{context:,}: {share:.1%}" for context, share in zip(contexts, shares, strict=True))
    return [
        f"{len(texts):,} texts of {sum(counts):,} scored tokens; the longest has {max(counts) + 1:,}",
        f"tokens with more before them than a context of {most}",
    ]


def check_contexts(contexts: Sequence[int]) -> None:
    """UsageError for lengths of context that can't be halved."""
    if wrong := [context for context in contexts if context < 2 or context % 2]:
        raise UsageError(f"--context must be even numbers >= 2 (got {wrong[0]})")


# ---- what is shown


def tables(found: dict[str, Any]) -> list[Table]:
    """One table a model: bits per byte, a row a language, a column a bucket; then the one by context, if measured."""
    result = []
    for model in found["models"]:
        mine = [one for one in found["results"] if one["model"] == model]
        columns = sorted({(one["from"], one["to"]) for one in mine})
        rows = []
        for language in dict.fromkeys(one["language"] for one in mine):
            cells = {(one["from"], one["to"]): one for one in mine if one["language"] == language}
            rows.append((language, *(_cell(cells.get(column)) for column in columns)))
        counts = {column: sum(o["tokens"] for o in mine if (o["from"], o["to"]) == column) for column in columns}
        if any(row[0] == "all" for row in rows):
            counts = {column: count // 2 for column, count in counts.items()}
        rows.append(("tokens", *(f"{counts[column]:,}" for column in columns)))
        title = f"{model}: bits per byte by position"
        names = tuple(f"{first:,}-{last:,}" for first, last in columns)
        result.append(Table(title, ("language", *names), rows))
    if found.get("contexts"):
        result.append(context_table(found["contexts"], list(found["models"])))
    return result


def context_table(results: Sequence[dict[str, Any]], models: Sequence[str]) -> Table:
    """Bits per byte by language and context, a column a model; with two, the first over the second."""
    rows: list[tuple[str, ...]] = []
    for one in results:
        found = [one["models"].get(name, {}).get("bits_per_byte") for name in models]
        context = one["context"] if one["context"] == WHOLE else f"{one['context']:,}"
        cells = [one["language"], context, f"{one['tokens']:,}"]
        cells += ["-" if value is None else f"{value:.4f}" for value in found]
        if len(models) == 2:
            cells.append(f"{found[0] / found[1]:.3f}" if found[0] and found[1] else "-")
        rows.append(tuple(cells))
    ratio = (" / ".join(models),) if len(models) == 2 else ()
    return Table("bits per byte on held-out text", ("language", "context", "tokens", *models, *ratio), rows, left=2)


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return "-"
    value = one["bits_per_byte"]
    return f"{value:.3f}" if math.isfinite(value) else f"({one['loss']:.2f} nats)"


def picture(found: dict[str, Any], path: Path) -> None:
    """Bits per byte over the position (a bucket's geometric middle), a line a language. StorageError."""
    lines = []
    for model, about in found["models"].items():
        mine = [one for one in found["results"] if one["model"] == model]
        for language in dict.fromkeys(one["language"] for one in mine):
            points = [
                (math.sqrt(one["from"] * one["to"]), one["bits_per_byte"])
                for one in mine
                if one["language"] == language and math.isfinite(one["bits_per_byte"])
            ]
            label = f"{language}, {model}" if len(found["models"]) > 1 else language
            lines += [Curve(label, points, not about["state"])] if points else []
    title = report.headline(found["environment"])
    curves(path, [Panel("loss by position", "tokens before", "bits per byte", lines)], title)


def run(
    *,
    models: Sequence[Path],
    data: Sequence[str] = (),
    length: int = 32768,
    contexts: Sequence[int] = (),
    tokens: int | None = 200_000,
    join: bool | None = None,
    chunk: int = 2048,
    tokenizer: str | None = None,
    format: str = "auto",
    scan: str = "auto",
    plot: Path | None = None,
    device: str = "auto",
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """`measure` with the words of flags, the same tokens at several `contexts` where asked for (report["contexts"]),
    and the picture. join: None joins the packaged text, whose records are short,
    and leaves other texts as they are.
    """
    at_least(("--max-length", length, 2), ("--tokens", tokens, 2), ("--chunk", chunk, 1))
    check_contexts(contexts)
    report.check_plot(plot)
    where = place(device)
    sources = [Source(path=path) for path in data] or [Source(path=str(PACKAGED))]
    loaded = score.load_all(models, where, scan=scan, on_event=on_event)
    words = score.tokenizer_of(models[0], tokenizer, next(iter(loaded.values())))
    joined = length if (join if join is not None else not data) else 0
    texts = score.read_texts(sources, words, tokens=tokens, join=joined, length=length, format=format)
    found = measure(loaded, texts, words, length=length, chunk=chunk, device=where, command=command, on_event=on_event)
    if joined:
        found["notes"].append("documents of a language laid end to end, a line end between them; nothing is reset")
    if contexts:
        found["contexts"] = by_context(loaded, texts, words, contexts=contexts, on_event=on_event)
        found["notes"] += lengths(texts, contexts)[1:]
    return report.with_picture(found, plot, picture)


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m moai_core.bench.context", description=about)
    parser.add_argument("--model", action="append", type=Path, required=True, help="model folder; may be repeated")
    parser.add_argument("--data", action="append", default=[], help="file, folder or glob; may be repeated")
    parser.add_argument("--max-length", type=int, default=32768, help="tokens of each text")
    parser.add_argument("--tokens", type=int, default=200_000, help="at most so many tokens a language")
    parser.add_argument("--context", default="", help="also the same tokens with at most so many before: 512,2048")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens read at once")
    parser.add_argument("--join", action=argparse.BooleanOptionalAction, help="lay documents end to end")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    report.flags(parser)

    def go(o: argparse.Namespace, command: str, on_event: report.OnEvent) -> dict[str, Any]:
        return run(
            models=o.model, data=o.data, length=o.max_length, tokens=o.tokens, join=o.join, chunk=o.chunk,
            contexts=report.numbers("--context", o.context, least=2) if o.context else (),
            plot=o.plot, device=o.device, command=command, on_event=on_event,
        )  # fmt: skip

    return report.front(parser, argv, go, tables)


if __name__ == "__main__":
    sys.exit(main())
