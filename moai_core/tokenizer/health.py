"""Whether a text was enough for a vocabulary: how often its rarest merges were seen, and its rarest ids used.

A merge that was learnt from a handful of places is noise, and an id that a training text hardly has gets an embedding
that nobody trained. How often a merge was seen when it was learnt follows from the ids of the finished tokenizer: it is
as often applied, and its product is in the text either as it is or inside the tokens that were made of it later. (In a
line of dashes pairs overlap, and are seen twice as often as they can be merged: hence one in a hundred is forgiven.)
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np

SEEN = 10
USED = 50
_LAST = 1000
_BATCH = 4096


def count_ids(backend: Any, texts: Iterable[str], size: int) -> np.ndarray:
    """(size,) int64: how often each id is used in `texts`."""
    counts = np.zeros(size, dtype=np.int64)
    batch: list[str] = []

    def add() -> None:
        made = backend.encode_batch_fast(batch, add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in made), dtype=np.int64)
        counts[:] += np.bincount(ids, minlength=size)

    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            add()
            batch = []
    add()
    return counts


def applied(merges: list[tuple[int, int, int]], counts: np.ndarray) -> np.ndarray:
    """(merges,) int64: how often each merge `(left id, right id, made id)`, in the order learnt, was applied where the
    ids of the result are used `counts` times.
    """
    inside = counts.astype(np.int64).copy()
    times = np.zeros(len(merges), dtype=np.int64)
    for index in range(len(merges) - 1, -1, -1):
        left, right, made = merges[index]
        times[index] = inside[made]
        inside[left] += inside[made]
        inside[right] += inside[made]
    return times


def merges_of(state: dict[str, Any]) -> list[tuple[int, int, int]]:
    """`(left id, right id, made id)` of every merge of a tokenizer.json."""
    vocab = state["model"]["vocab"]
    pairs = (merge if isinstance(merge, list) else merge.split(" ", 1) for merge in state["model"]["merges"])
    return [(vocab[left], vocab[right], vocab[left + right]) for left, right in pairs]


def report(merges: list[tuple[int, int, int]], counts: np.ndarray) -> dict[str, Any]:
    """`merges`: number, how many were seen fewer than ten times, the rarest of the last thousand; `ids`: how many are
    used fewer than 50 times and never. Merges are those to report on, in the order learnt.
    """
    times = applied(merges, counts)
    used = counts[[made for _, _, made in merges]] if merges else counts[:0]
    last = times[-_LAST:]
    return {
        "merges": len(merges),
        f"seen_under_{SEEN}": int((times < SEEN).sum()),
        "last": {
            "merges": len(last),
            "fewest": int(last.min()) if len(last) else 0,
            "median": int(np.median(last)) if len(last) else 0,
            f"seen_under_{SEEN}": int((last < SEEN).sum()),
        },
        "ids": {f"used_under_{USED}": int((used < USED).sum()), "never_used": int((used == 0).sum())},
        "healthy": bool(len(last)) and int((last < SEEN).sum()) <= len(last) // 100,
    }
