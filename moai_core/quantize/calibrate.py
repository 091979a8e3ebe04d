"""What a model's layers see: sequences of text, and the inputs of every matrix product as the layers are quantized.

`from_text` draws sequences from any of moai's sources of data, packed as in training and without the documents of the
evaluation text; `from_tokens` takes ids. A `Runner` holds the hidden states of all of them (in memory, or mapped from a
file) and moves them through the model a block at a time: the mixer, then the feed-forward network. So one layer's
weights are in memory at a time, and each sees what the quantized layers before it make. `gather` runs as much of a
block as the wanted inputs need and sums their second moments.

Results are the same in every run: order and batches are fixed, products are fp32 whatever TensorFloat-32 setting is
active, and sums over batches are fp64.
Source: GPTQ, arXiv 2210.17323, section 4 (calibration, quantized inputs of later layers). Left out: several devices.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from moai_core.data.cache import tokenized
from moai_core.data.loader import Loader, make_loader
from moai_core.data.pack import split_documents
from moai_core.data.stream import StreamRows
from moai_core.errors import DataError, NonFiniteError, UsageError, storage_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from moai_core.model.modeling import MoaiMambaLayer

OnEvent = Callable[[dict[str, Any]], None]
SEQUENCES, LENGTH = 512, 2048
BLOCKS = ("mamba", "feed_forward")


# ---- sequences -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """ids (S, L) int64; seq_idx (S, L) int32 as in the model's forward, or None where each row is one document;
    left_out: documents (or full-length pieces) that weren't taken because they are the evaluation's.
    """

    ids: Tensor
    seq_idx: Tensor | None = None
    left_out: int = 0

    @property
    def key(self) -> str:
        """Names these sequences: 32 hexadecimal digits."""
        digest = hashlib.sha256(np.ascontiguousarray(self.ids.numpy()).tobytes())
        if self.seq_idx is not None:
            digest.update(np.ascontiguousarray(self.seq_idx.numpy()).tobytes())
        return digest.hexdigest()[:32]

    @property
    def tokens(self) -> int:
        """How many tokens there are, padding aside."""
        return self.ids.numel() if self.seq_idx is None else int((self.seq_idx >= 0).sum())


def from_text(
    sources: Any,
    tokenizer: PreTrainedTokenizerFast,
    *,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
    avoid: Sequence[str] = (),
    valid_fraction: float = 0.0,
    format: str = "auto",
    on_error: str = "stop",
    cache: str | Path | None = None,
    on_event: OnEvent | None = None,
) -> Calibration:
    """Sequences of `length` tokens from a path, `hf://` dataset, mapping or list of them (a recipe's data.train).

    avoid: the evaluation's sources; a document that is among theirs, or a piece of `length` tokens, isn't taken.
    valid_fraction: a recipe's share of held-out pieces, which are left out as in training. Raises DataError for less
    text than is asked for, UsageError for impossible numbers and a stream that is to be avoided.
    """
    for name, value in (("sequences", sequences), ("length", length)):
        if value < 1:
            raise UsageError(f"calibration {name} must be at least 1 (got {value})")
    options: dict[str, Any] = {"format": format, "on_error": on_error, "cache": cache}
    data = SimpleNamespace(
        train=sources, valid=None, valid_fraction=valid_fraction, train_on="all", streaming="auto",
        max_length=length, shuffle=True, workers=0, **options,
    )  # fmt: skip
    evaluation = _pieces(avoid, tokenizer, length, options, on_event)
    loader = make_loader(data, tokenizer, split="train", batch_size=1, seed=seed, on_event=on_event)
    assert loader is not None
    if not loader.streaming and loader.account["tokens"] < sequences * length:
        raise _too_short(sequences, length, loader.account["tokens"], 0, loader, None)
    rows, left_out = _draw(loader, sequences, length, evaluation)
    batch = loader.collate(rows)
    return Calibration(batch["input_ids"], _needed(batch["seq_idx"]), left_out)


def from_tokens(calib_data: Any) -> Calibration:
    """Sequences of ids: a LongTensor (S, L), a list of such or of single sequences (L,), or of batches with input_ids
    and perhaps seq_idx (or attention_mask, right-padded). Shorter ones are padded. Raises UsageError for anything else.
    """
    listed = [calib_data] if isinstance(calib_data, (Tensor, Mapping)) else list(calib_data)
    rows = [row for item in listed for row in _sequences(item)]
    rows = [row for row in rows if len(row[0])]
    if not rows:
        raise UsageError("calibration data holds no tokens", hint="give a LongTensor (sequences, tokens)")
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    seq_idx = torch.full((len(rows), length), -1, dtype=torch.int32)
    for index, (row, numbers) in enumerate(rows):
        ids[index, : len(row)] = row
        seq_idx[index, : len(row)] = numbers
    return Calibration(ids, _needed(seq_idx))


def _needed(seq_idx: Tensor) -> Tensor | None:
    """None without padding and borders: the model then takes its shortest way."""
    return seq_idx if bool((seq_idx != 0).any()) else None


def _sequences(item: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids (L,), seq_idx (L,)) of each row of one batch."""
    numbers = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise UsageError(f"a calibration batch needs input_ids (got {', '.join(map(str, item))[:80]})")
        if (mask := item.get("attention_mask")) is not None:
            numbers = torch.as_tensor(mask).int() - 1
        numbers = item.get("seq_idx", numbers)
        item = item["input_ids"]
    ids = torch.as_tensor(item).cpu()
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise UsageError(
            f"calibration data must be token ids (sequences, tokens) (got {tuple(ids.shape)}, {ids.dtype})"
        )
    ids = torch.atleast_2d(ids).long()
    numbers = torch.zeros_like(ids) if numbers is None else torch.atleast_2d(torch.as_tensor(numbers)).cpu()
    for row, marks in zip(ids, numbers, strict=True):
        real = int((marks >= 0).sum())
        if bool((marks[:real] < 0).any()):
            raise UsageError("padding of calibration data must stand at the end of a row")
        yield row[:real], marks[:real].int()


def _pieces(
    avoid: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int, options: dict[str, Any], tell: Any
) -> set[bytes]:
    """A hash of each piece of the evaluation's documents, cut as the calibration's are."""
    found: set[bytes] = set()
    for path in avoid:
        if str(path).startswith("hf://"):
            raise UsageError(
                f"{path}: a stream can't be kept apart from the calibration text",
                hint="evaluate on a file, or calibrate with --calib on another source",
            )
        tokens = tokenized(str(path), tokenizer, on_event=tell, **options)
        pieces = split_documents(tokens.ends, tokens.hashes, length)
        spans = zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True)
        found.update(_digest(tokens.read(start, count)) for start, count in spans)
    return found


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=16).digest()


def _draw(loader: Loader, sequences: int, length: int, evaluation: set[bytes]) -> tuple[list[Any], int]:
    """The first rows of the loader's endless sequence, without what is the evaluation's; none is taken twice. And how
    many pieces that was.
    """
    rows: list[Any] = []
    tokens = drawn = dropped = 0
    while len(rows) < sequences:
        number, index = loader.turns.pick(drawn)
        source = loader.sources[number]
        if isinstance(source, StreamRows):
            row = source.next()
            ended = source.state()["epoch"] > 0
        else:
            ended = index >= source.rows
            row = [] if ended else source.row(index)
        if ended:
            raise _too_short(sequences, length, tokens, dropped, loader, number)
        drawn += 1
        kept = [piece for piece in row if _digest(piece[0]) not in evaluation]
        dropped += len(row) - len(kept)
        tokens += sum(len(ids) for ids, _ in kept)
        rows += [kept] if kept else []
    # Packing leaves little empty, unless the text is little.
    if tokens < 0.5 * sequences * length:
        raise _too_short(sequences, length, tokens, dropped, loader, None)
    return rows, dropped


def _too_short(sequences: int, length: int, tokens: int, dropped: int, loader: Loader, number: int | None) -> DataError:
    one = number is not None and len(loader.sources) > 1
    where = f"source {(number or 0) + 1} of the calibration text" if one else "the calibration text"
    left = f", with {dropped} documents of the evaluation text left out" if dropped else ""
    return DataError(
        f"{where} is shorter than needed: {sequences} sequences of {length} tokens are {sequences * length} tokens, "
        f"and it gives {tokens}{left}",
        hint="give more text with --calib, or ask for fewer or shorter sequences",
    )


# ---- statistics ----------------------------------------------------------------------------------------------------


@dataclass
class Statistics:
    """Of the inputs x (I,) of a matrix product, over `count` tokens: hessian (I, I) fp64, the mean of x x^T; mean_abs
    and max_abs (I,) fp64, of |x|.
    """

    count: int
    hessian: Tensor
    mean_abs: Tensor
    max_abs: Tensor

    def scaled(self, scale: Tensor) -> Statistics:
        """Those of x / scale, scale (I,)."""
        by = 1 / scale.double()
        return Statistics(self.count, self.hessian * by * by[:, None], self.mean_abs * by, self.max_abs * by.abs())

    def blocks(self, group: int) -> Tensor:
        """(I/g, g, g): the second moments of each group of g inputs (0: one group)."""
        size = len(self.mean_abs)
        group = group or size
        return torch.stack([self.hessian[at : at + group, at : at + group] for at in range(0, size, group)])

    def energy(self, weight: Tensor) -> float:
        """The mean of |W x|^2, weight (O, I)."""
        with exact_products():
            return float(((weight @ self.hessian.to(weight.dtype)) * weight).sum(dtype=torch.float64).clamp(min=0))


class _Sums:
    """Statistics under way."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, real: Tensor | None) -> None:
        x = x.detach().reshape(-1, x.shape[-1]) if real is None else x.detach()[real]
        x = x if x.dtype == torch.float64 else x.float()
        size = x.abs()
        second, total, largest = (x.T @ x).double(), size.sum(0, dtype=torch.float64), size.amax(0).double()
        if self.sums:
            second, total = self.sums[0].add_(second), self.sums[1].add_(total)
            largest = torch.maximum(self.sums[2], largest)
        self.sums = [second, total, largest]
        self.count += len(x)

    def finish(self, name: str) -> Statistics:
        second, total, largest = self.sums
        if not bool(torch.isfinite(second).all()):
            raise NonFiniteError(
                f"{name}: its inputs hold NaN or infinity on the calibration text",
                hint="quantize a model whose loss is finite; with half precision, try --dtype fp32",
            )
        return Statistics(self.count, second / self.count, total / self.count, largest)


# ---- the runner ----------------------------------------------------------------------------------------------------


class _Reached(Exception):
    """The last input that was wanted has been seen."""


@dataclass
class Runner:
    """The hidden states (S, L, H) of all sequences, before the block that comes next.

    device: where the layers are, and on a GPU the states (S * L * H numbers) if half of its free memory holds them.
    dtype: of the residual stream (None: the embedding's). scratch: a folder for a temporary file that holds the states
    instead of memory. batch_tokens: tokens run at a time.
    Events: {"event": "progress", "task": "calibrate", "source": what is run, "done", "total", "unit": "sequences"}.
    """

    calibration: Calibration
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    scratch: str | Path | None = None
    batch_tokens: int = 16384
    on_event: OnEvent | None = None
    hidden: Tensor = field(init=False, repr=False, default_factory=lambda: torch.empty(0))
    block: int = field(init=False, default=0)

    @torch.no_grad()
    def embed(self, embedding: nn.Module) -> None:
        """Hidden states from ids; the next block is the first layer's mixer. Raises UsageError for ids beyond the
        vocabulary.
        """
        ids, size = self.calibration.ids, int(getattr(embedding, "num_embeddings", 0))
        if size and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise UsageError(f"calibration data has the token id {int(ids.max())}, the vocabulary {size} entries")
        self.block, first = 0, True
        for rows in self._batches("embedding"):
            x = embedding(ids[rows].to(self.device))
            x = x.to(self.dtype or x.dtype)
            if first:
                self.hidden, first = self._space((*ids.shape, x.shape[-1]), x.dtype), False
            self.hidden[rows] = x.to(self.hidden.device)

    def gather(self, layer: MoaiMambaLayer, names: Sequence[str]) -> dict[str, Statistics]:
        """The statistics of the inputs of the layer's modules of these names ("mamba.in_proj"), all of the block that
        comes next. Raises NonFiniteError for NaN in them.
        """
        sums = {name: _Sums() for name in names}
        with torch.no_grad(), exact_products(), ExitStack() as stack:
            seen: dict[str, Tensor] = {}

            def note(name: str, args: tuple[Any, ...]) -> None:
                seen[name] = args[0]
                if len(seen) == len(sums):
                    raise _Reached

            for name in names:
                module = layer.get_submodule(name)
                handle = module.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
                stack.callback(handle.remove)
            for rows in self._batches(" ".join(names)):
                seen.clear()
                with suppress(_Reached):
                    self._run(layer, rows)
                real = self._real(rows)
                for name in names:
                    sums[name].add(seen[name], real)
        return {name: sums[name].finish(name) for name in names}

    def step(self, layer: MoaiMambaLayer) -> None:
        """Move the states through the block that comes next, with the layer's weights as they are now."""
        with torch.no_grad():
            for rows in self._batches(BLOCKS[self.block]):
                self.hidden[rows] = self._run(layer, rows).to(self.hidden)
        self.block = (self.block + 1) % 2 if layer.feed_forward is not None else 0

    def advance(self, layer: MoaiMambaLayer) -> None:
        """Move past the layer, or what is left of it."""
        self.step(layer)
        while self.block:
            self.step(layer)

    def _run(self, layer: MoaiMambaLayer, rows: slice) -> Tensor:
        x, seq_idx = self.hidden[rows].to(self.device), self.calibration.seq_idx
        if BLOCKS[self.block] == "mamba":
            marks = None if seq_idx is None else seq_idx[rows].to(self.device)
            return x + layer.mamba(layer.input_layernorm(x), None, marks, "auto")[0]
        assert layer.pre_ff_layernorm is not None and layer.feed_forward is not None
        return x + layer.feed_forward(layer.pre_ff_layernorm(x))

    def _real(self, rows: slice) -> Tensor | None:
        seq_idx = self.calibration.seq_idx
        return None if seq_idx is None else seq_idx[rows].to(self.device) >= 0

    def _batches(self, source: str) -> Iterator[slice]:
        total, length = self.calibration.ids.shape
        step = max(1, self.batch_tokens // length)
        for at in range(0, total, step):
            yield slice(at, min(at + step, total))
            if self.on_event:
                done = {"done": min(at + step, total), "total": total, "unit": "sequences"}
                self.on_event({"event": "progress", "task": "calibrate", "source": source, **done})

    def _space(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size, where = int(np.prod(shape)), torch.device(self.device)
        if where.type == "cuda" and size * dtype.itemsize <= torch.cuda.mem_get_info(where)[0] // 2:
            return torch.empty(shape, dtype=dtype, device=where)  # each block would move all of them to and fro
        if self.scratch is None:
            return torch.empty(shape, dtype=dtype)
        try:
            # Without a name from the start: nothing is left behind, however this process ends.
            with tempfile.NamedTemporaryFile(dir=self.scratch, prefix="calibration-") as file:
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
                return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
        except (OSError, RuntimeError) as exc:
            raise storage_error(exc if isinstance(exc, OSError) else OSError(str(exc)), self.scratch) from exc


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products in fp32, whatever is set for training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
