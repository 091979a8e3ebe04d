"""What each token of a text costs a model, in nats: the ground that the tables of quality stand on.

`carried` reads each document whole: a pure-Mamba model in chunks with its state carried along, a transformer in one
piece. `windowed` shows a token at most `context` tokens before it: windows overlap by half, and each scores its second
half (the first one all), so that beyond the first window a token sees between context / 2 and context tokens, every
token is scored once, and the same tokens count at every context. Documents read side by side share no numbers. A
document's first token is predicted by nothing and not scored. Bits per byte as in moai_core/evaluate.py. Left out:
transformers with a cache carried over chunks, which would give the same numbers.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moai_core import checkpoint, storage
from moai_core.data.read import Problems, find_files
from moai_core.data.tokenize import check_tokenizer, load_tokenizer, token_bytes
from moai_core.errors import DataError, UsageError
from moai_core.evaluate import summary, whole_documents
from moai_core.model.loss import IGNORED
from moai_core.recipe import Source

OnEvent = Callable[[dict[str, Any]], None]
Autocast = Callable[[], AbstractContextManager[Any]]

# Tokens in one forward pass, and logits that exist at once.
_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 17}
_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 28}


class Text(NamedTuple):
    """A document: its language or domain (`language_of`), its ids (int64), and which of them count (bool)."""

    language: str
    ids: np.ndarray
    counted: np.ndarray


# ---- models and texts


def load(path: str | Path, device: torch.device, *, scan: str = "auto", on_event: OnEvent | None = None) -> Any:
    """A moai model or a Llama in eval mode from a run, step or model folder. Raises CheckpointError, UsageError."""
    from moai_core.bench import twin_llama

    folder = model_folder(path, on_event)
    if (folder / "config.json").is_file() and twin_llama.model_type(folder) == "llama":
        return twin_llama.load(folder, device=device)
    return checkpoint.load_model(folder, device=device, scan=scan, on_event=on_event)


def load_all(
    paths: Sequence[str | Path], device: torch.device, *, scan: str = "auto", on_event: OnEvent | None = None
) -> dict[str, Any]:
    """Models by `name_of`, which must have one vocabulary. Raises as `load`, and UsageError."""
    found = {name_of(path): load(path, device, scan=scan, on_event=on_event) for path in paths}
    if len(found) < len(paths):
        raise UsageError("two of the models have the same name", hint="give each model once")
    if len(sizes := {name: model.config.vocab_size for name, model in found.items()}) > 1:
        name, first = next(iter(sizes.items()))
        for other, size in sizes.items():
            if size != first:
                raise UsageError(
                    f"{other} has a vocabulary of {size:,}, {name} one of {first:,}: they can't be compared"
                )
    return found


def model_folder(path: str | Path, on_event: OnEvent | None = None) -> Path:
    """The folder that holds the model: `path` itself, or the newest good step of a run folder."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").is_file() or not storage.steps(folder):
        return folder
    return checkpoint.latest(folder, on_event=on_event) or folder


def has_state(model: Any) -> bool:
    """Whether the model reads on from a state of constant size (moai's do), or sees what it is given at once."""
    return hasattr(model.model, "scan_backend")


def name_of(path: str | Path) -> str:
    """What tables call a model: its folder, with the run's name before a step's."""
    folder = Path(path).resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("step-") else folder.name


def tokenizer_of(path: str | Path, name: str | None, model: Any) -> Any:
    """The tokenizer named, else the model folder's own. UsageError where it doesn't fit the model."""
    tokenizer = load_tokenizer(name or model_folder(path))
    check_tokenizer(tokenizer, model.config.vocab_size)
    return tokenizer


def read_texts(
    sources: Iterable[Source],
    tokenizer: Any,
    *,
    tokens: int | None = None,
    join: int = 0,
    length: int | None = None,
    format: str = "auto",
    train_on: str = "assistant",
    on_error: str = "stop",
) -> list[Text]:
    """Documents by language: the source's name, else `language_of` its file.

    tokens: at most so many a language. join: lay a language's documents end to end, with a line end that isn't scored
    in place of each end token (in training nothing ever follows one), and cut them into texts of so many tokens.
    length: keep so many tokens at the head of each. Raises DataError where nothing can be scored.
    """
    files: dict[str, list[tuple[Path, str, str]]] = {}
    for source in sources:
        for file in find_files(source.path)[0]:
            kind, turns = source.format or format, source.train_on or train_on
            files.setdefault(source.name or language_of(file), []).append((file, kind, turns))
    texts: list[Text] = []
    for language, listed in files.items():
        found = list(_limited(_documents(language, listed, tokenizer, on_error), tokens))
        if join and found:
            found = [_open_ended(one, tokenizer) for one in found]
            ids, counted = (np.concatenate([one[part] for one in found]) for part in (1, 2))
            cuts = range(0, len(ids), join)
            found = [Text(language, ids[at : at + join], counted[at : at + join]) for at in cuts]
        if length is not None:
            found = [Text(language, one.ids[:length], one.counted[:length]) for one in found]
        texts += [one for one in found if one.counted[1:].any()]
    if not texts:
        raise DataError(f"nothing to score in {', '.join(source.path for source in sources)}")
    return texts


def language_of(file: Path) -> str:
    """What a file of text is called in tables: its name up to the first dot, without the part that it belongs to and
    its number. ko.jsonl, valid-ko-000.jsonl.zst and heldout-ko.txt are all ko.
    """
    stem = file.name.partition(".")[0]
    return re.sub(r"^(train|valid|validation|test|calib|heldout)[-_]|[-_]\d+$", "", stem) or stem


def _documents(language: str, listed: list[tuple[Path, str, str]], tokenizer: Any, on_error: str) -> Iterator[Text]:
    for file, kind, turns in listed:
        problems = Problems(on_error)
        for ids, flags in whole_documents([file], tokenizer, kind, problems, None, turns == "all"):
            counted = np.ones(len(ids), dtype=bool) if flags is None else np.asarray(flags, dtype=bool)
            yield Text(language, ids.astype(np.int64), counted)


def _open_ended(text: Text, tokenizer: Any) -> Text:
    """The text with a line end where its end token is."""
    line = np.array(tokenizer("\n", add_special_tokens=False)["input_ids"], dtype=np.int64)
    keep = len(text.ids) - int(text.ids[-1] == tokenizer.eos_token_id)
    counted = np.concatenate([text.counted[:keep], np.zeros(len(line), dtype=bool)])
    return Text(text.language, np.concatenate([text.ids[:keep], line]), counted)


def _limited(texts: Iterator[Text], tokens: int | None) -> Iterator[Text]:
    left = math.inf if tokens is None else tokens
    for text in texts:
        keep = int(min(left, len(text.ids)))
        yield Text(text.language, text.ids[:keep], text.counted[:keep])
        left -= keep
        if left <= 0:
            return


# ---- costs


@torch.no_grad()
def carried(
    model: Any,
    texts: Sequence[Text],
    *,
    chunk: int = 2048,
    autocast: Autocast = nullcontext,
    on_event: OnEvent | None = None,
    task: str = "reading",
) -> list[np.ndarray]:
    """For each text (len - 1,) float32: nats of its tokens but the first, given all before them.

    Events: {"event": "progress", "task", "done", "total"} in tokens. Raises UsageError for a chunk below 1.
    """
    if chunk < 1:
        raise UsageError(f"the chunk must be at least 1 token (got {chunk})")
    costs = [np.zeros(len(text.ids) - 1, dtype=np.float32) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    budget, total, done = _TOKENS[_device(model).type], sum(map(len, costs)), 0
    while order:
        longest = len(costs[order[0]])
        size = min(chunk, longest) if has_state(model) else longest
        group, order = order[: max(1, budget // size)], order[max(1, budget // size) :]
        state = None
        for begin in range(0, longest, size):
            rows = [i for i in group if len(costs[i]) > begin]
            if state is not None and len(rows) < state.batch_size:
                state = state.select(torch.arange(len(rows)))
            spans = [(texts[i], begin, min(begin + size, len(costs[i])), begin) for i in rows]
            found, state = _score(model, spans, state, autocast, keep=begin + size < longest)
            for i, (_, first, last, _), nats in zip(rows, spans, found, strict=True):
                costs[i][first:last] = nats
                done += last - first
            _tell(on_event, task, done, total)
    return costs


@torch.no_grad()
def windowed(
    model: Any,
    texts: Sequence[Text],
    context: int,
    *,
    autocast: Autocast = nullcontext,
    on_event: OnEvent | None = None,
    task: str = "reading",
) -> list[np.ndarray]:
    """As `carried`, but a token sees at most `context` tokens (an even number >= 2)."""
    if context < 2 or context % 2:
        raise UsageError(f"a context must be an even number of tokens >= 2 (got {context})")
    costs = [np.zeros(len(text.ids) - 1, dtype=np.float32) for text in texts]
    todo = [(i, a, b, c) for i, cost in enumerate(costs) for a, b, c in windows(len(cost), context)]
    todo.sort(key=lambda one: one[1] - one[2])
    budget, total, done = _TOKENS[_device(model).type], sum(map(len, costs)), 0
    while todo:
        size = todo[0][2] - todo[0][1]
        rows, todo = todo[: max(1, budget // size)], todo[max(1, budget // size) :]
        found, _ = _score(model, [(texts[i], a, b, c) for i, a, b, c in rows], None, autocast, keep=False)
        for (i, _, last, scored), nats in zip(rows, found, strict=True):
            costs[i][scored:last] = nats
            done += last - scored
        _tell(on_event, task, done, total)
    return costs


def windows(count: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(first input, behind the last input, first input whose successor is scored) for texts of `count` inputs."""
    half = context // 2
    yield 0, min(context, count), 0
    for begin in range(half, count - half, half):
        yield begin, min(begin + context, count), begin + half


def _score(
    model: Any, spans: Sequence[tuple[Text, int, int, int]], state: Any, autocast: Autocast, *, keep: bool
) -> tuple[list[np.ndarray], Any]:
    """Nats of the successors of inputs [scored, last) for each (text, first, last, scored), and the state after."""
    device, width = _device(model), max(last - first for _, first, last, _ in spans)
    ids = np.zeros((len(spans), width), dtype=np.int64)
    targets = np.full((len(spans), width), IGNORED, dtype=np.int64)
    for row, (text, first, last, scored) in enumerate(spans):
        ids[row, : last - first] = text.ids[first:last]
        after = slice(scored + 1, last + 1)
        targets[row, scored - first : last - first] = np.where(text.counted[after], text.ids[after], IGNORED)
    inputs = torch.from_numpy(ids).to(device)
    was_training = model.training
    model.eval()
    try:
        with autocast():
            # Padding stands behind a row's last token, which sees nothing of it, and such a row is not read on.
            if has_state(model):
                out = model.model(input_ids=inputs, state=state, use_cache=keep)
                hidden, state = out.last_hidden_state, out.state
            else:
                hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            nats = token_nats(model.lm_head, hidden, torch.from_numpy(targets).to(device))
    finally:
        model.train(was_training)
    costs = nats.cpu().numpy()
    return [costs[r, scored - first : last - first] for r, (_, first, last, scored) in enumerate(spans)], state


def token_nats(head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """(B, L) fp32: what each target costs under head(hidden (B, L, H)); 0 where it is IGNORED."""
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    nats = torch.zeros(wanted.shape, device=hidden.device)
    at = (wanted != IGNORED).nonzero().squeeze(1)
    vocabulary = getattr(head, "out_features", None) or 1 << 17
    for part in at.split(max(16, _LOGITS[hidden.device.type] // vocabulary)):
        nats[part] = F.cross_entropy(head(flat[part]).float(), wanted[part], reduction="none")
    return nats.view(targets.shape)


def _device(model: Any) -> torch.device:
    return next(itertools.chain(model.parameters(), model.buffers())).device


def _tell(on_event: OnEvent | None, task: str, done: int, total: int) -> None:
    if on_event is not None:
        on_event({"event": "progress", "task": task, "done": done, "total": total})


# ---- sums


def by_language(texts: Sequence[Text], costs: Sequence[np.ndarray], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """`evaluate.summary` of each language, and of "all" where there are several."""
    table, sums = token_bytes(tokenizer), dict[str, list[float]]()
    for text, nats in zip(texts, costs, strict=True):
        counted = text.counted[1:]
        size = int(table[text.ids[1:][counted]].sum(dtype=np.int64))
        for language in {text.language, "all"}:
            found = sums.setdefault(language, [0.0, 0, 0])
            found[0] += float(nats[counted].sum(dtype=np.float64))
            found[1] += int(counted.sum())
            found[2] += size
    if len(sums) == 2:
        del sums["all"]
    names = sorted(sums, key=lambda name: (name == "all", name))
    return {name: summary(sums[name][0], int(sums[name][1]), int(sums[name][2])) for name in names}
