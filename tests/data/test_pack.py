"""Packing: every token exactly once, no document across a border, deterministic, full rows; the held-out share is
stable.
"""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_core.data.pack import held_out, pack, split_documents

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=200)


def pieces_of(lengths, max_length):
    ends = np.cumsum(lengths, dtype=np.int64)
    return split_documents(ends, np.arange(len(ends), dtype=np.uint64), max_length), ends


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(1, 64), st.integers(1, 50))
def test_every_token_exactly_once(lengths, max_length, window):
    pieces, _ = pieces_of(lengths, max_length)
    order, bounds = pack(pieces.lengths, max_length, window=window)
    seen = np.zeros(sum(lengths), dtype=int)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for first, last in pairwise(bounds):
        assert 0 < pieces.lengths[order[first:last]].sum() <= max_length
        for piece in order[first:last]:
            span = slice(pieces.starts[piece], pieces.starts[piece] + pieces.lengths[piece])
            seen[span] += 1
            assert len(set(owner[span])) == 1  # no piece holds two documents
    assert (seen == 1).all()
    assert sorted(order) == list(range(len(pieces.lengths)))
    # rows x max_length = tokens + padding, tokens = first + the labels that are left
    rows, tokens, first = len(bounds) - 1, sum(lengths), len(pieces.lengths)
    assert rows * max_length >= tokens >= first


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 64))
def test_only_long_documents_are_split_and_into_full_pieces(lengths, max_length):
    pieces, ends = pieces_of(lengths, max_length)
    starts = [0, *ends[:-1]]
    at = 0
    for begin, length in zip(starts, lengths, strict=True):
        count = -(-length // max_length)
        mine = pieces.lengths[at : at + count]
        assert pieces.starts[at] == begin
        assert mine[:-1].tolist() == [max_length] * (count - 1)
        assert mine.sum() == length
        at += count
    assert at == len(pieces.lengths)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_best_fit_is_within_its_proven_bound(lengths):
    """Best fit decreasing needs at most 11/9 of the optimum + 1 rows (Johnson 1974); the optimum is at least the
    sum over the length.
    """
    _, bounds = pack(np.array(lengths), 30)
    optimum = -(-sum(lengths) // 30)
    large = sum(n > 15 for n in lengths)
    assert len(bounds) - 1 <= 11 / 9 * max(optimum, large) + 1 or len(bounds) - 1 <= first_fit(lengths, 30)


def first_fit(lengths, size):
    spaces: list[int] = []
    for n in sorted(lengths, reverse=True):
        for i, space in enumerate(spaces):
            if space >= n:
                spaces[i] -= n
                break
        else:
            spaces.append(size - n)
    return len(spaces)


def test_packing_is_deterministic_and_full():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 150, 20_000), 1024)
    order, bounds = pack(lengths, 1024)
    again = pack(lengths.copy(), 1024)
    assert (order == again[0]).all()
    assert (bounds == again[1]).all()
    assert lengths.sum() / ((len(bounds) - 1) * 1024) > 0.99


def test_nothing_to_pack():
    pieces, _ = pieces_of([], 8)
    order, bounds = pack(pieces.lengths, 8)
    assert len(order) == 0
    assert bounds.tolist() == [0]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_the_held_out_share_is_about_its_size_and_stable(fraction):
    hashes = np.random.default_rng(1).integers(0, 2**63, 20_000).astype(np.uint64) * np.uint64(2) + np.uint64(1)
    chosen = held_out(hashes, fraction)
    assert abs(chosen.mean() - fraction) < 0.01
    more = np.concatenate([hashes, hashes[:100] ^ np.uint64(0xABCDEF << 32)])
    assert (held_out(more, fraction)[: len(hashes)] == chosen).all()
    assert (held_out(hashes[::-1], fraction)[::-1] == chosen).all()


def test_both_sides_get_something_when_they_can():
    hashes = np.array([2**63, 2**63 + 5, 2**63 + 9], dtype=np.uint64)
    assert held_out(hashes, 0.01).tolist() == [True, False, False]
    assert held_out(np.array([1, 2, 3], dtype=np.uint64), 0.5).tolist() == [True, True, False]
    assert not held_out(np.array([7, 7], dtype=np.uint64), 0.5).any()  # equal texts can't be on both sides
    assert not held_out(hashes, 0.0).any()
    assert len(held_out(np.zeros(0, dtype=np.uint64), 0.1)) == 0
