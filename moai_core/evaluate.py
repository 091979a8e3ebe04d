"""How well a model predicts text: cross-entropy, perplexity and bits per byte, weighted by tokens, summed in float64.

`evaluate` scores packed batches (validation during training). `evaluate_file` scores documents with their whole
context however long they are: the state is carried over chunks, which costs a fixed amount of memory. So a document
of a million tokens is read once, from its beginning, and no window slides. Bits per byte = nats / (ln 2 x UTF-8 bytes
of the predicted tokens); special tokens such as `</s>` are predicted, and cost nats, but stand for 0 bytes, so models
with different tokenizers can be compared. Left out: multiple-choice tasks. Source: bits per byte as in The Pile
(arXiv 2101.00027, section 3.1)."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moai_core.data.cache import batches_of
from moai_core.data.read import Problems, find_files, left_out, read_documents
from moai_core.data.tokenize import Encoder, check_tokenizer, token_bytes
from moai_core.errors import DataError, NonFiniteError, at_least
from moai_core.model.loss import IGNORED, chunked_cross_entropy, shift_labels
from moai_core.model.padding import in_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from moai_core.model import MoaiMambaForCausalLM, MoaiState

OnEvent = Callable[[dict[str, Any]], None]
Autocast = Callable[[], AbstractContextManager[Any]]


def summary(nats: float, tokens: int, size: int) -> dict[str, Any]:
    """The figures for `nats` summed over `tokens` predicted tokens that stand for `size` bytes; NaN where there is
    nothing to divide by.
    """
    loss = nats / tokens if tokens else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf if tokens else math.nan
    bits = nats / (math.log(2) * size) if size else math.nan
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "tokens": int(tokens), "bytes": int(size)}


@torch.no_grad()
def evaluate(
    model: MoaiMambaForCausalLM,
    batches: Iterable[dict[str, Any]],
    *,
    device: torch.device | str | None = None,
    autocast: Autocast = nullcontext,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Scores batches of a loader: `summary`'s figures, and `nats`, their sum, for adding up over ranks.

    The model is in eval mode meanwhile, and in the mode it was in afterwards. Events: {"event": "progress", "task":
    "evaluate", "done": batches}."""
    device = torch.device(device) if device is not None else next(model.parameters()).device
    training = model.training
    model.eval()
    sums = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    size = 0
    try:
        for done, batch in enumerate(batches, 1):
            ids, labels, seq_idx = (batch[name].to(device) for name in ("input_ids", "labels", "seq_idx"))
            with autocast():
                call = {"num_items": 1, "use_cache": False, "seq_idx_in_order": in_order(batch["seq_idx"])}
                loss = model(input_ids=ids, seq_idx=seq_idx, labels=labels, **call).loss
            sums += loss.double()
            count += (shift_labels(labels, seq_idx) != IGNORED).sum()
            size += int(batch["bytes"])
            if on_event:
                on_event({"event": "progress", "task": "evaluate", "done": done, "total": None, "unit": "batches"})
    finally:
        model.train(training)
    nats = float(sums)
    return summary(nats, int(count), size) | {"nats": nats}


class _Lane:
    """One row of the batch: documents one after the other, cut every `length` tokens. Knows the token after each
    cut.
    """

    def __init__(self) -> None:
        self.queue: deque[tuple[np.ndarray, np.ndarray]] = deque()
        self.at = 0
        self.waiting = 0
        self.fresh = True

    def add(self, ids: np.ndarray, trainable: np.ndarray | None) -> None:
        self.queue.append((ids.astype(np.int64), np.ones(len(ids), dtype=bool) if trainable is None else trainable))
        self.waiting += len(ids)

    def take(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """(ids, targets, seq_idx, whether the state must start from zero), each (length,), padded at the end."""
        ids, targets = np.zeros(length, dtype=np.int64), np.full(length, IGNORED, dtype=np.int64)
        seq_idx = np.full(length, -1, dtype=np.int32)
        filled, number, fresh = 0, 0, self.fresh
        while filled < length and self.queue:
            tokens, flags = self.queue[0]
            part = min(length - filled, len(tokens) - self.at)
            span = slice(filled, filled + part)
            ids[span], seq_idx[span] = tokens[self.at : self.at + part], number
            after = slice(self.at + 1, self.at + 1 + part)
            known = len(tokens[after])
            targets[filled : filled + known] = np.where(flags[after], tokens[after], IGNORED)
            filled, number, self.at = filled + part, number + 1, self.at + part
            self.waiting -= part
            self.fresh = self.at == len(tokens)
            if self.fresh:
                self.queue.popleft()
                self.at = 0
        return ids, targets, seq_idx, fresh


@torch.no_grad()
def evaluate_file(
    model: MoaiMambaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    path: str,
    *,
    max_length: int = 2048,
    batch_size: int = 8,
    limit: int | None = None,
    format: str = "auto",
    on_error: str = "stop",
    train_on: str = "assistant",
    autocast: Autocast = nullcontext,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Scores the documents of a file, folder or glob (at most `limit`), each with its whole context.

    `max_length` is the chunk that is read at once and changes speed and memory, not the result (up to rounding). Of
    chats the assistant's turns are scored unless `train_on` is "all". Returns `summary`'s figures, `nats`,
    `documents`, `skipped` and `empty`. Raises DataError, UsageError, and
    NonFiniteError for a loss that is NaN or infinite."""
    at_least(("max_length", max_length, 1), ("batch_size", batch_size, 1), ("limit", limit, 1))
    check_tokenizer(tokenizer, model.config.vocab_size)
    files, _ = find_files(path)
    problems = Problems(on_error)
    device = next(model.parameters()).device
    table = token_bytes(tokenizer)
    documents = whole_documents(files, tokenizer, format, problems, limit, train_on == "all")
    lanes = [_Lane() for _ in range(batch_size)]
    training, state = model.training, None
    counted = scored = size = 0
    sums = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    try:
        while True:
            for lane in sorted(lanes, key=lambda lane: lane.waiting):
                while lane.waiting < max_length and (got := next(documents, None)) is not None:
                    lane.add(*got)
                    counted += 1
            if any(not lane.waiting for lane in lanes):  # the documents have come to their end
                left = [row for row, lane in enumerate(lanes) if lane.waiting]
                if not left:
                    break
                lanes = [lanes[row] for row in left]
                state = None if state is None else _rows(state, left)
            length = min(max_length, max(lane.waiting for lane in lanes))
            rows = [lane.take(length) for lane in lanes]
            loss, state = _step(model, rows, state, device, autocast)
            sums += loss
            targets = np.stack([row[1] for row in rows])
            found = targets[targets != IGNORED]
            scored, size = scored + len(found), size + int(table[found].sum(dtype=np.int64))
            if on_event:
                on_event({"event": "progress", "task": "evaluate", "done": scored, "total": None, "unit": "tokens"})
    finally:
        model.train(training)
    if not scored:
        bad = left_out(problems.skipped, problems.examples)
        raise DataError(
            f"{path}: holds nothing to score{f' ({bad})' if bad else ''}",
            hint="a document needs at least two tokens, of which the second is scored",
        )
    nats = float(sums)
    extra = {"nats": nats, "documents": counted, "skipped": problems.skipped, "empty": problems.empty}
    if scored and not math.isfinite(nats):
        raise NonFiniteError(
            f"the model's loss on {path} is not finite ({nats})",
            hint="its weights are damaged, or its training diverged: take an earlier checkpoint",
        )
    return summary(nats, scored, size) | extra


def _rows(state: MoaiState, rows: list[int]) -> MoaiState:
    return type(state)([(conv[rows], ssm[rows]) for conv, ssm in state.layers], state.seen[rows])


def _step(
    model: MoaiMambaForCausalLM, rows: list[Any], state: MoaiState | None, device: torch.device, autocast: Autocast
) -> tuple[torch.Tensor, MoaiState]:
    ids, targets, seq_idx = (torch.from_numpy(np.stack([row[part] for row in rows])).to(device) for part in range(3))
    if state is not None:
        # A row whose chunk begins a document starts from nothing; inside a chunk the model does that by seq_idx.
        keep = torch.tensor([not row[3] for row in rows], device=device)
        state = type(state)(
            [
                (conv * keep[:, None, None].to(conv.dtype), ssm * keep[:, None, None].to(ssm.dtype))
                for conv, ssm in state.layers
            ],
            state.seen * keep,
        )
    with autocast():
        out = model.model(input_ids=ids, state=state, seq_idx=seq_idx, use_cache=True)
        loss = chunked_cross_entropy(out.last_hidden_state, targets, model.lm_head, 1)
    return loss.double(), out.state


def whole_documents(
    files: list[Any],
    tokenizer: PreTrainedTokenizerFast,
    format: str,
    problems: Problems,
    limit: int | None,
    all_turns: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Whole documents, at most `limit`, as (ids, trainable or None); the parts of a long text are joined."""
    encoder = Encoder(tokenizer)
    source = read_documents(files, format=format, problems=problems)
    parts: list[np.ndarray] = []
    number = itertools.count(1)
    for group in batches_of(source):
        for document, encoded in zip(group, encoder.encode(group), strict=True):
            parts.append(encoded.ids)
            if document.last:
                yield np.concatenate(parts), None if all_turns else encoded.trainable
                parts = []
                if next(number) == limit:
                    return
