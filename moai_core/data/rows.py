"""Rows of cached sources, whose turn it is in a mixture, and rows as tensors.

A row is a list of pieces, each (ids int64, trainable bool). A cached source is an endless sequence of rows: its rows
once, permuted by (seed, epoch), then again by the next epoch's permutation; `row(n)` is a function of n alone, so any
process may ask for any row."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import torch

from moai_core.data.cache import Tokens
from moai_core.data.pack import Pieces, pack

Row = list[tuple[np.ndarray, np.ndarray]]
_PERIOD = 10_000


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """(length,) int64: a permutation fixed by (seed, epoch), from raw Philox bits, which no numpy release may
    change.
    """
    words = np.random.Philox(key=[seed & (2**64 - 1), epoch]).random_raw(length)
    return np.argsort(words, kind="stable")


# ---- cached sources ------------------------------------------------------------------------------------------------


class CachedRows:
    """The rows of one tokenized source. `rows` of them make an epoch; `row(n)` is the n-th of the endless sequence."""

    def __init__(
        self, tokens: Tokens, pieces: Pieces, max_length: int, *, all_turns: bool, seed: int, shuffle: bool
    ) -> None:
        self.tokens, self.all_turns, self.seed, self.shuffle, self.max_length = (
            tokens,
            all_turns,
            seed,
            shuffle,
            max_length,
        )
        # Mixed once, before packing, so that rows hold pieces from all over the source; epochs then permute the rows.
        self.pieces = pieces.take(permutation(len(pieces.lengths), seed, 2**63)) if shuffle else pieces
        self.order, self.bounds = pack(self.pieces.lengths, max_length)
        self.rows = len(self.bounds) - 1
        self._permuted: tuple[int, np.ndarray] | None = None
        self._counts: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_permuted": None}

    def row(self, n: int) -> Row:
        """The pieces of row n as (ids int64, trainable bool)."""
        epoch, index = divmod(n, self.rows)
        if self.shuffle:
            if self._permuted is None or self._permuted[0] != epoch:
                self._permuted = epoch, permutation(self.rows, self.seed, epoch)
            index = int(self._permuted[1][index])
        made = []
        for piece in self.order[self.bounds[index] : self.bounds[index + 1]]:
            start, length = int(self.pieces.starts[piece]), int(self.pieces.lengths[piece])
            flags = np.ones(length, dtype=bool) if self.all_turns else self.tokens.trainable(start, length)
            made.append((self.tokens.read(start, length), flags))
        return made

    def account(self) -> dict[str, int]:
        """Exact counts of one epoch: pack.py says what they mean."""
        if self._counts:
            return self._counts
        total, first = int(self.pieces.lengths.sum(dtype=np.int64)), len(self.pieces.lengths)
        masked = 0
        if not self.all_turns and self.tokens.mask is not None:
            ends = self.pieces.starts + self.pieces.lengths
            masked = int((self.tokens.masked_before(ends) - self.tokens.masked_before(self.pieces.starts + 1)).sum())
        self._counts = {"documents": self.tokens.documents, "pieces": first, "rows": self.rows, "tokens": total}
        self._counts |= {"trained": total - first - masked, "first": first, "masked": masked}
        self._counts |= {"padding": self.rows * self.max_length - total}
        self._counts |= {"skipped": self.tokens.skipped, "empty": self.tokens.empty}
        return self._counts


class Turns:
    """Which source gives global row n, and its how-manieth row that is: a pattern of at most 10 000 rows that holds
    the weights exactly, repeated.
    """

    def __init__(self, weights: list[float]) -> None:
        shares = [Fraction(str(weight)) for weight in weights]
        total = sum(shares)
        period = 1
        for share in shares:
            period = int(np.lcm(period, (share / total).denominator)) if period <= _PERIOD else period
        period = min(period, _PERIOD)
        exact = [share / total * period for share in shares]
        counts = [int(part) for part in exact]
        # Largest remainder; a source never gets less than one turn.
        for index in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: period - sum(counts)]:
            counts[index] += 1
        counts = [max(1, count) for count in counts]
        self.counts, self.period = counts, sum(counts)
        due = sorted((Fraction(2 * k + 1, 2 * n), source) for source, n in enumerate(counts) for k in range(n))
        self.source = np.array([source for _, source in due])
        self.before = np.zeros(self.period, dtype=np.int64)
        for source in range(len(counts)):
            mine = self.source == source
            self.before[mine] = np.arange(mine.sum())

    def pick(self, n: int) -> tuple[int, int]:
        """(source, row of that source) for global row n."""
        cycle, slot = divmod(n, self.period)
        source = int(self.source[slot])
        return source, cycle * self.counts[source] + int(self.before[slot])


# ---- rows to tensors -----------------------------------------------------------------------------------------------


class Collate:
    """Rows to a batch: input_ids (B, L) int64, labels (B, L) int64, seq_idx (B, L) int32, bytes (int)."""

    def __init__(self, max_length: int, pad: int, table: np.ndarray) -> None:
        self.max_length, self.pad, self.table = max_length, pad, table

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        shape = (len(rows), self.max_length)
        ids = np.full(shape, self.pad, dtype=np.int64)
        labels = np.full(shape, -100, dtype=np.int64)
        seq_idx = np.full(shape, -1, dtype=np.int32)
        for r, row in enumerate(rows):
            at = 0
            for number, (tokens, trainable) in enumerate(row):
                end = at + len(tokens)
                ids[r, at:end] = tokens
                # The first token of a piece has nothing before it that could predict it.
                labels[r, at + 1 : end] = np.where(trainable[1:], tokens[1:], -100)
                seq_idx[r, at:end] = number
                at = end
        size = int(self.table[labels[labels >= 0]].sum(dtype=np.int64))
        tensors = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "seq_idx": torch.from_numpy(seq_idx),
        }
        return tensors | {"bytes": size}
