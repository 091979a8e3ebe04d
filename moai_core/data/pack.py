"""Documents to rows of a fixed length: no token is lost, none is seen twice, and `seq_idx` keeps documents apart.

A document longer than a row is split into pieces of exactly one row and a rest; a shorter one is never split. Pieces
are packed best fit decreasing inside windows of consecutive pieces, so packing is deterministic, needs bounded memory
and fills rows to about 99 % on real text. Every piece is a document of its own to the model (its state starts at
zero; the rest of a split document gets no `<s>`).

Accounting, exact for any set of pieces:  tokens = trained + first + masked
    first    tokens that begin a piece: nothing comes before them that could predict them (one a piece)
    masked   tokens after the first that the loss must not count (a user's turn, the template's own text)
    trained  the labels that are left
and  rows x max_length = tokens + padding.
Source: Krell et al., arXiv 2107.02027 (packing), Johnson 1974 (best fit decreasing).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WINDOW = 4096


class Pieces(NamedTuple):
    """Pieces of documents: `starts` (int64) in the token file, `lengths` (int32), `hashes` (uint64) that decide
    train or valid.
    """

    starts: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray

    def take(self, index: np.ndarray) -> Pieces:
        """Those pieces, in the order of `index` (or a mask)."""
        return Pieces(self.starts[index], self.lengths[index], self.hashes[index])


def split_documents(ends: np.ndarray, hashes: np.ndarray, max_length: int) -> Pieces:
    """The pieces of documents that end at `ends` (int64, ascending) in one run of tokens, each at most `max_length`
    tokens, in order.
    """
    ends = np.asarray(ends, dtype=np.int64)
    starts = np.concatenate([np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1]])
    counts = -((starts - ends) // max_length)
    owner = np.repeat(np.arange(len(ends)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = starts[owner] + number * max_length
    lengths = np.minimum(ends[owner] - begins, max_length).astype(np.int32)
    return Pieces(
        begins,
        lengths,
        _mix(np.asarray(hashes, dtype=np.uint64)[owner] + number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)),
    )


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: spreads every bit over all 64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def below(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """(pieces,) bool: hashes in the lowest `fraction` of their range."""
    return hashes < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """(pieces,) bool: which pieces are for validation: those whose hash falls into the lowest `fraction`.

    A piece's side depends on its own text only, so equal texts are on the same side and more data moves nothing. Only
    where that would leave one side empty, the piece with the lowest (highest) hash changes sides, unless all hashes
    are equal.
    """
    chosen = below(hashes, fraction)
    if fraction <= 0 or not len(hashes) or hashes.min() == hashes.max():
        return np.zeros(len(hashes), dtype=bool)
    if not chosen.any():
        return hashes == hashes.min()
    return chosen if not chosen.all() else hashes != hashes.max()


def pack(lengths: np.ndarray, max_length: int, *, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """Packs pieces of `lengths` (each 1..max_length) into rows.

    Returns `order` (int64, a permutation of the pieces) and `bounds` (int64, rows + 1): row r holds the pieces
    order[bounds[r] : bounds[r + 1]]. Rows come in the order of the earliest piece they hold, and pieces in a row in
    their own order."""
    order: list[int] = []
    bounds = [0]
    for first in range(0, len(lengths), window):
        for row in _best_fit([int(n) for n in lengths[first : first + window]], max_length):
            order.extend(first + piece for piece in row)
            bounds.append(len(order))
    return np.array(order, dtype=np.int64), np.array(bounds, dtype=np.int64)


def _best_fit(lengths: list[int], max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}
    # Bit s is set while some row has exactly s tokens of space left: the best fit is the lowest bit from a length on.
    spaces = 0
    for piece in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[piece]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
            rows[row].append(piece)
        else:
            space, row = max_length, len(rows)
            rows.append([piece])
        left = space - length
        if left:
            by_space.setdefault(left, []).append(row)
            spaces |= 1 << left
    for pieces in rows:
        pieces.sort()
    return sorted(rows)
