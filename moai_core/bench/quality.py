"""What quantizing or training on cost a model: loss, divergence and drift of the state, beside its parent.

    moai bench quality --parent runs/mine --model mine-int4 --model mine-gptq --data 'heldout/*.jsonl'

Every model reads the same held-out text in one type of arithmetic: bits per byte by language (each document whole, the
state carried), the Kullback-Leibler divergence of its predictions from the parent's, which tells models apart whose
losses differ by chance, and how far its states are from the parent's after so many tokens of text laid end to end (a
recurrence can accumulate errors). "won back" is the share of the first model's added loss that another one doesn't
have: give what rounding to nearest makes first. Sizes are of what a file holds, with bf16 for what isn't quantized,
also where a run keeps fp32. Left out: speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moai_core import checkpoint
from moai_core.bench import report, score
from moai_core.bench.context import PACKAGED
from moai_core.bench.report import Table
from moai_core.bench.score import Text
from moai_core.device import place
from moai_core.errors import UsageError
from moai_core.quant import kernels, linear
from moai_core.quantize.report import LENGTHS, drift, states_after
from moai_core.recipe import Source
from moai_core.weights import KEEP_FP32

# Rows in which predictions are compared, and at most so many tokens of a language.
ROW, COMPARED = 2048, 32768


# ---- one model


def stored_bytes(model: Any) -> int:
    """What the weights take in a file: quantized matrices as stored; A_log, D and dt_bias in fp32, others in bf16."""
    packed = {f"{name}.{part}" for name, layer in linear.quantized(model).items() for part in layer.stored}
    found: dict[int, int] = {}
    for name, tensor in model.state_dict().items():
        width = tensor.element_size() if name in packed else 4 if name.rpartition(".")[2] in KEEP_FP32 else 2
        found[tensor.data_ptr()] = tensor.numel() * width  # a tied head is the embedding
    return sum(found.values())


def kernel_of(model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """What multiplies with the layers' quantized matrices, in words; None for a plain model."""
    layers = [one for one in linear.quantized(model).values() if not isinstance(one, linear.QuantEmbedding)]
    return kernels.describe(layers[0].spec, device, dtype) if layers else None


@torch.no_grad()
def divergence(parent: Any, model: Any, texts: Sequence[Text], *, limit: int = COMPARED) -> dict[str, float]:
    """Mean Kullback-Leibler divergence, nats a counted token, of the model's predictions from the parent's: by language
    over at most `limit` tokens of each, and of "all" where there are several.
    """
    sums: dict[str, list[float]] = {}
    for language in dict.fromkeys(text.language for text in texts):
        found = sums.setdefault(language, [0.0, 0.0])
        for ids, seq_idx, counted in _rows([text for text in texts if text.language == language], limit):
            where = torch.from_numpy(counted).to(parent.device)
            inputs = {"input_ids": torch.from_numpy(ids).to(parent.device)}
            inputs["seq_idx"] = torch.from_numpy(seq_idx).to(parent.device)
            wanted, got = (_predictions(one, inputs, where) for one in (parent, model))
            found[0] += float((wanted.exp() * (wanted - got)).sum(dtype=torch.float64))
            found[1] += len(wanted)
    result = {language: nats / max(count, 1.0) for language, (nats, count) in sums.items()}
    if len(sums) > 1:
        nats, count = map(sum, zip(*sums.values(), strict=True))
        result["all"] = nats / max(count, 1.0)
    return result


def _rows(texts: Sequence[Text], limit: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, seq_idx, what is predicted and counts), each (1, ROW) or shorter: documents side by side, cut at the rows'
    ends."""
    ids = np.concatenate([text.ids for text in texts])[:limit]
    number = np.concatenate([np.full(len(text.ids), i, dtype=np.int32) for i, text in enumerate(texts)])[:limit]
    counted = np.concatenate([np.append(text.counted[1:], False) for text in texts])[:limit]
    spans = [slice(at, at + ROW) for at in range(0, len(ids), ROW)]
    return [(ids[None, s], number[None, s] - number[s.start], counted[None, s]) for s in spans]


def _predictions(model: Any, inputs: dict[str, torch.Tensor], where: torch.Tensor) -> torch.Tensor:
    """(tokens, V) fp32 logarithms of probabilities at `where` (1, L)."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    return model.lm_head(hidden[where]).float().log_softmax(-1)


def measure(
    parent: Path,
    models: Sequence[Path],
    texts: Sequence[Text],
    tokenizer: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    lengths: Sequence[int] = LENGTHS,
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """{"benchmark", "environment", "dtype", "models", "notes"}, JSON-able. Of a model: {"name", "bytes", "kernel",
    "quality" (`evaluate.summary` by language), "kl" (by language), "drift" ([{"tokens", "mean", "max"}])}; the first is
    the parent, without the last two. Raises as `checkpoint.load_model`, and UsageError for another vocabulary.
    """
    stream = np.concatenate([text.ids for text in texts])[: max(lengths, default=0)]
    first, results = None, []
    for path in (parent, *models):
        model: Any = checkpoint.load_model(path, device=device, dtype=dtype)
        size = model.config.vocab_size
        if first is not None and size != (wanted := first[0].config.vocab_size):
            raise UsageError(f"{path} has a vocabulary of {size:,}, {parent} one of {wanted:,}")
        name = score.name_of(path)
        costs = score.carried(model, texts, on_event=on_event, task=name)
        one = {"name": name, "bytes": stored_bytes(model), "kernel": kernel_of(model, device, dtype)}
        one["quality"] = score.by_language(texts, costs, tokenizer)
        states = states_after(model, stream, tuple(lengths))
        if first is None:
            first = (model, states)
        else:
            one["kl"] = divergence(first[0], model, texts)
            one["drift"] = [{"tokens": at, **drift(first[1][at], states[at])} for at in states]
        results.append(one)
    count = f"{len(texts):,} document{'s' * (len(texts) != 1)}"
    notes = [f"{count}; arithmetic in {report.short(dtype)}; MB: what isn't quantized counts as bf16"]
    if len(stream) < max(lengths, default=0):
        notes.append(f"the text has {len(stream):,} tokens: no drift was measured beyond them")
    return {
        "benchmark": "quality",
        "environment": report.environment(device, command),
        "dtype": report.short(dtype),
        "models": results,
        "notes": notes,
    }


# ---- what is shown


def tables(found: dict[str, Any]) -> list[Table]:
    """Size, perplexity, loss and divergence of each model beside the parent; then by language; then the drift."""
    models = found["models"]
    parent, others = models[0], models[1:]
    languages = list(parent["quality"])
    whole = "all" if "all" in languages else languages[0]
    base = parent["quality"][whole]
    added = others[0]["quality"][whole]["loss"] - base["loss"] if others else 0.0
    rows: list[tuple[str, ...]] = []
    for one in models:
        mine = one["quality"][whole]
        more = mine["loss"] - base["loss"]
        cells = [one["name"], f"{one['bytes'] / 1e6:,.2f}", f"{parent['bytes'] / one['bytes']:.2f}"]
        cells += [f"{mine['perplexity']:.3f}", f"{mine['bits_per_byte']:.4f}"]
        if one is parent:
            cells += ["", "", "", ""]
        else:
            won = f"{1 - more / added:.0%}" if added > 0 and one is not others[0] else ""
            cells += [f"{math.expm1(more):+.2%}", f"{more:+.4f}", won, f"{1e3 * one['kl'][whole]:.2f}"]
        rows.append(tuple(cells))
    columns = ("model", "MB", "times smaller", "perplexity", "bits per byte", "perplexity +", "loss +", "won back")
    result = [Table("beside the parent", (*columns, "KL, 10^-3 nats"), rows)]
    by_language = [
        (one["name"], *(f"{one['quality'][language]['bits_per_byte']:.4f}" for language in languages)) for one in models
    ]
    counts = ("tokens", *(f"{parent['quality'][language]['tokens']:,}" for language in languages))
    result.append(Table("bits per byte by language", ("model", *languages), [*by_language, counts]))
    lengths = [entry["tokens"] for entry in others[0]["drift"]] if others else []
    if lengths:
        drifts = [
            (one["name"], *(f"{entry['mean']:.4f} ({entry['max']:.4f})" for entry in one["drift"])) for one in others
        ]
        names = tuple(f"{length:,} tokens" for length in lengths)
        result.append(Table("relative error of the state, mean of the layers (largest)", ("model", *names), drifts))
    return result


def run(
    *,
    parent: Path,
    models: Sequence[Path],
    data: Sequence[str] = (),
    tokens: int | None = 200_000,
    lengths: Sequence[int] = LENGTHS,
    tokenizer: str | None = None,
    train_on: str = "assistant",
    dtype: str = "auto",
    device: str = "auto",
    command: str = "",
    on_event: report.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """`measure` with the words of flags. data: held-out text (none: packaged); tokens: at most so many a language."""
    if tokens is not None and tokens < 2:
        raise UsageError(f"--tokens must be at least 2 (got {tokens})")
    names = [score.name_of(path) for path in (parent, *models)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two of the models have the same name, {twice}", hint="give each model once")
    where = place(device)
    kind = report.dtype_of(dtype, where)
    words = score.tokenizer_of(parent, tokenizer, checkpoint.load_model(parent))
    sources = [Source(path=path) for path in data] or [Source(path=str(PACKAGED))]
    texts = score.read_texts(sources, words, tokens=tokens, train_on=train_on)
    return measure(
        parent, models, texts, words, device=where, dtype=kind, lengths=lengths, command=command, on_event=on_event
    )
