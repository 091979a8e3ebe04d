"""Which units are near to another: MinHash signatures and locality-sensitive hashing for duplicates within the mix, an
exhaustive search of windows for what is near to held-out text.

Duplicates: two units whose sets of shingles (8 folded characters, 4 in CJK) have a Jaccard similarity of about
`threshold`; of each such pair the later goes. Units that share four values of their 128 in one of 32 bands are
compared, each with the first and with the last before it in its bucket, so time and memory stay linear: similarity 0.7
is found with a probability above 0.999, 0.5 with 0.87. Held-out text is searched without such chances: every line of
training text is looked up window by window (12 folded characters, 6 in CJK). Source: Leskovec, Rajaraman, Ullman,
Mining of Massive Datasets, chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from moai_core.data.mix import kernels as k
from moai_core.data.mix.text import points_of, tables

BANDS, ROWS = 32, 4
FEWEST = 8  # shingles: shorter units are duplicates only when equal
NARROW, WIDE, WINDOWS, SHARE = 12, 6, 8, 0.5
_CHUNK = 1 << 17


def duplicates(
    signatures: np.ndarray, units: np.ndarray, thresholds: np.ndarray, on_band: Callable[[int], None]
) -> np.ndarray:
    """(units,) bool: which of `units` (rows of `signatures`, in the order of preference) a kept earlier one is near.

    thresholds (units,): the similarity at which that unit counts as near. Memory: 40 bytes a unit beside signatures.
    """
    first, second = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for band in range(BANDS):
        keys = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS]).view(np.uint64)[units, 0]
        order = np.argsort(keys, kind="stable")
        ranked = keys[order]
        same = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1
        begins = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
        leader = begins[np.searchsorted(begins, same, side="right") - 1]
        for earlier in (leader, same - 1):
            a, b = order[earlier], order[same]
            near = _similar(signatures, units[a], units[b]) >= thresholds[b]
            first.append(a[near])
            second.append(b[near])
        on_band(band + 1)
    return _later(np.concatenate(first), np.concatenate(second), len(units))


def _similar(signatures: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    parts = [
        (signatures[a[i : i + _CHUNK]] == signatures[b[i : i + _CHUNK]]).mean(axis=1, dtype=np.float32)
        for i in range(0, len(a), _CHUNK)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _later(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Walks the pairs in the order of the later unit: it goes if the earlier one stays."""
    gone = np.zeros(count, bool)
    for pair in np.lexsort((first, second)):
        if not gone[first[pair]]:
            gone[second[pair]] = True
    return gone


class Windows:
    """The windows of held-out text, and which lines of other text they cover."""

    def __init__(self, texts: Iterable[list[str]]) -> None:
        keys = [np.zeros(0, np.uint64)]
        for batch in texts:
            points, _ = points_of(batch)
            out = np.zeros(2 * len(points) + 1, np.uint64)
            count = k.windows(points, *tables(), NARROW, WIDE, out)
            keys.append(np.unique(out[:count]))
        every = np.unique(np.concatenate(keys))
        self.count = len(every)
        self.table = np.zeros(1 << max(4, (2 * len(every)).bit_length()), np.uint64)
        self.bits = np.zeros(k.BITS, np.uint64)
        k.insert(every, self.table, self.bits)

    def near(self, texts: list[str]) -> list[np.ndarray]:
        """For each text, (lines,) bool: lines of which half of the windows stand in held-out text."""
        points, _ = points_of(texts)
        near = np.zeros(int(np.count_nonzero(points == k.LINE)), bool)
        k.covered(points, *tables(), NARROW, WIDE, WINDOWS, SHARE, self.table, self.bits, near)
        bounds = np.cumsum([text.count("\n") + 1 for text in texts])
        return np.split(near, bounds[:-1]) if texts else []
