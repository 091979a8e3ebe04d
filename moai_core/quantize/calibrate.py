"""What a model is calibrated on: sequences of text as its layers will see them.

`from_text` draws sequences from any of moai's sources of data, packed as in training and without the documents of the
evaluation text; `from_tokens` takes ids. Order and cuts are fixed, so that the same words give the same sequences in
every run. What the layers make of them: runner.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moai_core.data.cache import tokenized
from moai_core.data.loader import Loader, make_loader
from moai_core.data.pack import split_documents
from moai_core.data.stream import StreamRows
from moai_core.errors import DataError, UsageError, at_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OnEvent = Callable[[dict[str, Any]], None]
SEQUENCES, LENGTH = 512, 2048


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
    at_least(("calibration sequences", sequences, 1), ("calibration length", length, 1))
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
    try:
        ids = torch.as_tensor(item).cpu()
    except (TypeError, ValueError, RuntimeError) as exc:
        raise UsageError(
            f"calibration data must be token ids (sequences, tokens) (got {str(item)[:40]!r})",
            hint="tokenize text first: tokenizer(text).input_ids",
        ) from exc
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
    shorter = min(length, 256)
    fewer = f"--calib-sequences {tokens // shorter}" + (f" --calib-length {shorter}" if shorter < length else "")
    enough = not one and not dropped and tokens >= shorter
    return DataError(
        f"{where} is shorter than needed: {sequences:,} sequences of {length:,} tokens are {sequences * length:,} "
        f"tokens, and it gives {tokens:,}{left}",
        hint="give more text with --calib, or ask for fewer or shorter sequences" + (f": {fewer}" if enough else ""),
    )
